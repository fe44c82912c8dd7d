//! Every call of the storage fails, hangs, panics or is the last one of the process, and every look at the source
//! fails or hangs: there is no new snapshot, restic finds nothing wrong, and the next run ends well, leaves no lock and
//! stores nothing twice.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use crate::storage::fault::{Fault, Faulty};
use crate::storage::{Folder, Kind, Storage as _};

use super::super::super::open::{ArchiveError, Who};
use super::super::step::Plan;
use super::super::{Cancel, Counters, Options, Parent, Source, Stored};
use super::fixtures::{Place, added, assert_same, clock, noise, put_file, store};

/// Packs are small, so that little data makes many.
const PACK_BYTES: usize = 32 * 1024;
/// What differs from run to run beside packs: index, snapshot, and the trees above the source, which others change.
const SLACK_BYTES: u64 = 24 * 1024;

pub(super) fn options() -> Options {
    Options { pack_bytes: PACK_BYTES, parent: Parent::ForceRead, ..Options::new(Who::this_process()) }
}

/// A repository with a snapshot, and a source with something new.
pub(super) fn small() -> Place {
    let place = Place::new();
    for n in 0..4_u64 {
        put_file(&place.source().join(format!("{}/f{n}", n % 2)), &noise(3000, n));
    }
    place.store().unwrap();
    for n in 0..3 {
        put_file(&place.source().join(format!("new{n}")), &noise(100_000, 1000 + n));
    }
    place
}

/// What the repository holds now, without locks.
fn bytes_in_packs(place: &Place) -> u64 {
    place.folder().list(Kind::Pack).unwrap().iter().map(|(_, bytes)| bytes).sum()
}

/// After a run that did not end well: nothing partial is there, and the next one ends well and uses what is there.
/// `whole` is what a run stores that finds nothing of it.
pub(super) fn assert_recovers(place: &Place, before: u64, whole: u64, what: &str) -> Stored {
    place.restic(&["check", "--no-lock"]);
    let left = bytes_in_packs(place) - before;
    let next = next(place).unwrap_or_else(|error| panic!("{what}: {error}"));
    let again = added(&next);
    assert!(again + left <= whole + SLACK_BYTES, "{what}: {left} bytes were left, and {again} stored of {whole}");
    assert!(place.folder().list(Kind::Lock).unwrap().is_empty(), "{what}: a lock stays");
    next
}

fn next(place: &Place) -> Result<Stored, ArchiveError> {
    let (cancel, counters) = (Cancel::default(), Counters::default());
    place.open().store(Source::Files(place.files()), &options(), &clock(), &cancel, &counters)
}

/// What a run stores into a place that nothing went wrong in.
pub(super) fn whole(place: &Place) -> u64 {
    added(&next(place).unwrap())
}

/// Whether the store ended before its N-th call.
fn got_through(fault: Fault, nth: u64, whole: u64) -> bool {
    let place = small();
    let before = bytes_in_packs(&place);
    let cancel = Cancel::default();
    let action = cancel.clone();
    let faulty = Arc::new(Faulty::new(place.folder(), nth, fault).doing(move || action.cancel()));
    let tried = with_release(&faulty, &cancel, || {
        let archive = place.open_at(faulty.clone())?;
        archive.store(Source::Files(place.files()), &options(), &clock(), &cancel, &Counters::default())
    });
    let what = format!("{fault:?} at call {nth}");
    match &tried {
        Ok(_) => assert_eq!(place.snapshots().len(), 2, "{what}"),
        // A panic while the lock is removed comes when the snapshot is there.
        Err(ArchiveError::Broken(_)) if fault == Fault::Panic => assert!(place.snapshots().len() <= 2, "{what}"),
        // One whose own put did not say that it was done is withdrawn.
        Err(error) => assert_eq!(place.snapshots().len(), 1, "{what}: {error}"),
    }
    if fault == Fault::Panic {
        // Its process goes with it; here the process is this one, and a panic of the lock's removal leaves it.
        for (name, _) in place.folder().list(Kind::Lock).unwrap() {
            place.folder().remove(&crate::storage::Object::new(Kind::Lock, name)).unwrap();
        }
    } else {
        assert!(place.folder().list(Kind::Lock).unwrap().is_empty(), "{what}: a lock stays");
    }
    let next = assert_recovers(&place, before, whole, &what);
    if !faulty.was_reached() || nth.is_multiple_of(8) {
        place.check();
        assert_same(&place.source(), &place.restored(&next));
    }
    !faulty.was_reached()
}

/// A call that hangs is let go as soon as the store was cancelled; a panic is an error like another.
fn with_release(
    faulty: &Faulty<Folder>,
    cancel: &Cancel,
    work: impl FnOnce() -> Result<Stored, ArchiveError>,
) -> Result<Stored, ArchiveError> {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !faulty.has_hung() && !ended.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            if faulty.has_hung() {
                cancel.cancel();
                faulty.release();
            }
        });
        let done = catch_unwind(AssertUnwindSafe(work));
        ended.store(true, Ordering::Release);
        done.unwrap_or_else(|_| Err(ArchiveError::Broken("it panicked".to_owned())))
    })
}

fn every_call(fault: Fault) {
    let whole = whole(&small());
    // A new repository each time: what a failed run leaves makes the next one ask for more.
    for nth in 1.. {
        assert!(nth < 100, "a store never got through");
        if got_through(fault, nth, whole) {
            return;
        }
    }
}

#[test]
fn call_that_fails_leaves_no_snapshot_and_a_good_repository() {
    every_call(Fault::Fail);
}

#[test]
fn call_that_is_done_but_says_that_it_failed_leaves_no_snapshot() {
    every_call(Fault::FailAfter);
}

#[test]
fn place_that_is_full_at_any_call_leaves_no_snapshot_and_a_good_repository() {
    every_call(Fault::Full);
}

#[test]
fn call_that_hangs_ends_with_the_cancelled_store_and_leaves_no_lock() {
    every_call(Fault::Hang);
}

#[test]
fn call_that_panics_ends_the_store_and_leaves_a_good_repository() {
    every_call(Fault::Panic);
}

#[test]
fn cancelling_at_any_call_leaves_no_snapshot_and_a_good_repository() {
    every_call(Fault::Act);
}

#[test]
fn look_at_the_source_that_fails_is_named_and_leaves_no_snapshot() {
    let place = small();
    std::os::unix::fs::symlink("f", place.source().join("link")).unwrap();
    put_file(&place.source().join("big"), &noise(700_000, 5));
    let archive = place.open();
    for nth in 1.. {
        let plan = Plan::new(nth, || Err(Errno::IO));
        let tried = plan.during(|| {
            archive.store(Source::Files(place.files()), &options(), &clock(), &Cancel::default(), &Counters::default())
        });
        match tried {
            Err(ArchiveError::Unreadable(errors)) => {
                assert!(plan.was_reached() && errors.unreadable == 1, "look {nth}: {errors:?}");
                assert!(errors.names[0].contains("Input/output error"), "look {nth}: {errors:?}");
            }
            Ok(stored) => {
                assert!(nth > 30 && !plan.was_reached(), "look {nth} failed and was not told");
                assert_same(&place.source(), &place.restored(&stored));
                break;
            }
            Err(other) => panic!("look {nth}: {other}"),
        }
        assert_eq!(place.snapshots().len(), 1, "look {nth}");
        assert!(place.folder().list(Kind::Lock).unwrap().is_empty());
        if nth.is_multiple_of(4) {
            place.restic(&["check", "--no-lock"]);
        }
    }
    place.check();
}

#[test]
fn source_that_hangs_at_any_look_ends_with_the_cancelled_store() {
    let place = small();
    let archive = place.open();
    for nth in (1..).step_by(3) {
        // The look takes as long as it takes until somebody has cancelled.
        let cancel = Cancel::default();
        let cancelled = cancel.clone();
        let plan = Plan::new(nth, move || {
            cancelled.cancel();
            Ok(())
        });
        let tried = plan.during(|| store(&archive, Source::Files(place.files()), &cancel));
        match tried {
            Err(ArchiveError::Cancelled) => assert!(plan.was_reached()),
            Ok(_) => {
                assert!(!plan.was_reached(), "look {nth}");
                break;
            }
            Err(other) => panic!("look {nth}: {other}"),
        }
        assert_eq!(place.snapshots().len(), 1);
        assert!(place.folder().list(Kind::Lock).unwrap().is_empty());
    }
    place.check();
}

#[test]
fn what_a_failed_run_has_put_is_used_by_the_next() {
    let place = Place::new();
    put_file(&place.source().join("a"), &noise(4 << 20, 1));
    // The snapshot's own put: everything else is there.
    let folder = place.folder();
    let count = |kind| folder.list(kind).unwrap().len();
    let refuse = place.hooked(|object| match object.kind {
        Kind::Snapshot => Err(crate::storage::StorageError::Full(object.clone())),
        _ => Ok(()),
    });
    let archive = place.open_at(refuse).unwrap();
    let (cancel, counters) = (Cancel::default(), Counters::default());
    let failed = archive.store(Source::Files(place.files()), &options(), &clock(), &cancel, &counters).unwrap_err();
    assert!(matches!(failed, ArchiveError::Storage(_)));
    assert_eq!(count(Kind::Snapshot), 0);
    assert!(count(Kind::Pack) >= 3);
    let next = place.store().unwrap();
    assert!(added(&next) < 50_000, "{next:?}");
    place.check();
}
