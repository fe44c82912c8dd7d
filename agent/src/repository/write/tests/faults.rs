//! Every call of the storage fails once, before or after it was done, or is where the caller cancels: there is no
//! new snapshot, restic finds nothing wrong, and the next run ends well.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::storage::{Folder, Kind, Object, Storage, StorageError};

use super::super::super::open::ArchiveError;
use super::super::{Cancel, Source};
use super::fixtures::{Place, added, assert_same, noise, put_file, store};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Before,
    After,
    Cancel,
}

/// The N-th call fails, and nothing else.
#[derive(Debug)]
struct Faulty {
    inner: Folder,
    calls: AtomicUsize,
    nth: usize,
    fault: Fault,
    cancel: Cancel,
}

impl Faulty {
    fn call<T>(&self, what: &str, work: impl FnOnce() -> Result<T, StorageError>) -> Result<T, StorageError> {
        let is_it = self.calls.fetch_add(1, Ordering::SeqCst) + 1 == self.nth;
        let failed =
            || StorageError::Failed { operation: "do", what: what.to_owned(), reason: "the test says so".to_owned() };
        match self.fault {
            Fault::Before if is_it => Err(failed()),
            Fault::After if is_it => work().and_then(|_| Err(failed())),
            Fault::Cancel if is_it => {
                self.cancel.cancel();
                work()
            }
            _ => work(),
        }
    }
}

impl Storage for Faulty {
    fn place(&self) -> String {
        self.inner.place()
    }
    fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError> {
        self.call("put", || self.inner.put(object, bytes))
    }
    fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
        self.call("get", || self.inner.get(object, bytes_max))
    }
    fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError> {
        self.call("get a part", || self.inner.get_range(object, offset, length))
    }
    fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
        self.call("list", || self.inner.list(kind))
    }
    fn remove(&self, object: &Object) -> Result<(), StorageError> {
        self.call("remove", || self.inner.remove(object))
    }
}

fn every_fault(fault: Fault) {
    // A new repository each time: what a failed run leaves makes the next one ask for more.
    for nth in 1.. {
        assert!(nth < 100, "a store never got through");
        if !got_through(fault, nth) {
            continue;
        }
        return;
    }
}

/// Whether the store ended before its N-th call.
fn got_through(fault: Fault, nth: usize) -> bool {
    let place = Place::new();
    for n in 0..6_u64 {
        put_file(&place.source().join(format!("{}/f{n}", n % 3)), &noise(20_000, n));
    }
    place.store().unwrap();
    // More than one pack of it at times.
    let length = if nth.is_multiple_of(6) { 18 << 20 } else { 700_000 };
    put_file(&place.source().join("new"), &noise(length, 1000));
    let cancel = Cancel::default();
    let (inner, calls) = (place.folder(), AtomicUsize::new(0));
    let faulty = Arc::new(Faulty { inner, calls, nth, fault, cancel: cancel.clone() });
    let archive = place.open_at(faulty.clone());
    let tried = archive.and_then(|archive| store(&archive, Source::Files(place.files()), &cancel));
    let snapshots = place.snapshots().len();
    match tried {
        Ok(_) => assert_eq!(snapshots, 2, "{fault:?} {nth}"),
        Err(error) => assert_eq!(snapshots, 1, "{fault:?} {nth}: {error}"),
    }
    place.check();
    let next = place.store().unwrap();
    let got_through = faulty.calls.load(Ordering::SeqCst) < nth;
    if got_through || nth.is_multiple_of(5) {
        assert_same(&place.source(), &place.restored(&next));
    }
    got_through
}

#[test]
fn call_that_fails_leaves_no_snapshot_and_a_good_repository() {
    every_fault(Fault::Before);
}

#[test]
fn call_that_is_done_but_says_that_it_failed_leaves_no_snapshot() {
    every_fault(Fault::After);
}

#[test]
fn cancelling_at_any_call_leaves_no_snapshot_and_a_good_repository() {
    every_fault(Fault::Cancel);
}

#[test]
fn what_a_failed_run_has_put_is_used_by_the_next() {
    let place = Place::new();
    put_file(&place.source().join("a"), &noise(40 << 20, 1));
    // The snapshot's own put: everything else is there.
    let folder = place.folder();
    let count = |kind| folder.list(kind).unwrap().len();
    let refuse = place.hooked(|object| match object.kind {
        Kind::Snapshot => Err(StorageError::Full(object.clone())),
        _ => Ok(()),
    });
    let archive = place.open_at(refuse).unwrap();
    let failed = store(&archive, Source::Files(place.files()), &Cancel::default()).unwrap_err();
    assert!(matches!(failed, ArchiveError::Storage(_)));
    assert_eq!(count(Kind::Snapshot), 0);
    assert!(count(Kind::Pack) >= 3);
    let next = place.store().unwrap();
    assert!(added(&next) < 100_000, "{next:?}");
    place.check();
}
