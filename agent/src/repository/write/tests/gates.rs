//! What must not end as a snapshot: sources that could not be read, streams that did not end well, locks of others.

use std::io::{self, Read};
use std::num::NonZeroUsize;

use crate::format::Timestamp;
use crate::format::lock::Lock;
use crate::storage::{Kind, Storage as _};

use super::super::super::open::{Archive, ArchiveError, Who, timestamp};
use super::super::super::place::stored_bytes;
use super::super::{Cancel, Counters, Files, Options, Source};
use super::fixtures::{Place, added, clock, noise, put_file, store};

#[test]
fn entry_that_cannot_be_read_is_named_and_leaves_no_snapshot() {
    let place = Place::new();
    put_file(&place.source().join("a"), b"a");
    // Reading the memory at address 0 fails, whoever tries.
    let paths = vec![place.source(), "/proc/self/mem".into()];
    for live in [false, true] {
        let files = Files { paths: paths.clone(), live, ..Files::default() };
        let Err(ArchiveError::Unreadable(errors)) = place.store_files(files) else { panic!("it must fail") };
        assert_eq!(errors.unreadable, 1, "{errors:?}");
        assert!(errors.names[0].starts_with("/proc/self/mem ("), "{errors:?}");
    }
    assert!(place.snapshots().is_empty());
    place.check();
}

/// What the second store puts shows whether an index names the pack.
#[test]
fn pack_that_does_not_read_back_is_not_taken_for_stored_by_anybody() {
    let place = Place::new();
    put_file(&place.source().join("file"), &noise(1 << 20, 1));
    let repository = place.repository();
    let archive = place.open_at(place.hooked_before_proof(move |object| {
        if object.kind == Kind::Pack {
            let path = repository.join(object.path());
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[1000] ^= 1;
            put_file(&path, &bytes);
        }
        Ok(())
    }));
    let error = place.store_in(&archive.unwrap()).unwrap_err();
    assert!(matches!(&error, ArchiveError::Object { object, .. } if object.starts_with("data/")), "{error}");
    assert!(place.snapshots().is_empty());
    let stored = place.store().unwrap();
    assert!(added(&stored) > 1 << 20, "the damaged pack counts as stored");
    place.check();
}

#[test]
fn what_the_repository_holds_after_a_store_is_what_lies_there() {
    let place = Place::new();
    for number in 0..3 {
        put_file(&place.source().join(format!("file{number}")), &noise(100_000, number));
        let stored = place.store().unwrap();
        assert_eq!(stored.repository_bytes, stored_bytes(&place.folder()).unwrap());
    }
}

#[test]
fn path_that_is_missing_leaves_no_snapshot_even_of_a_live_tree() {
    let place = Place::new();
    let paths = vec![place.source(), place.source().join("missing")];
    for live in [false, true] {
        let files = Files { paths: paths.clone(), live, ..Files::default() };
        assert!(matches!(place.store_files(files), Err(ArchiveError::Unreadable(_))));
    }
    for paths in [vec!["relative".into()], vec![place.source().join("..")]] {
        assert!(place.store_files(Files { paths, ..Files::default() }).is_err());
    }
    assert!(place.snapshots().is_empty());
}

/// One worker and one uploader: the worker hands over its second pack when the first was put, and only then comes
/// to the entry that goes away while the first is put.
#[test]
fn entry_that_vanishes_counts_apart_in_a_tree_that_lives() {
    for live in [true, false] {
        let place = Place::new();
        put_file(&place.source().join("first"), &noise(40 << 20, 1));
        put_file(&place.source().join("vanishes"), b"x");
        let (file, locks) = (place.source().join("vanishes"), place.folder());
        let hooked = place.hooked(move |object| {
            if object.kind == Kind::Pack {
                // Whoever wants to prune sees us.
                assert_eq!(locks.list(Kind::Lock).unwrap().len(), 1);
                let _ = std::fs::remove_file(&file);
            }
            Ok(())
        });
        let archive = place.open_at(hooked).unwrap();
        let options =
            Options { workers: NonZeroUsize::MIN, uploads: NonZeroUsize::MIN, ..Options::new(Who::this_process()) };
        let (source, cancel) = (Source::Files(Files { live, ..place.files() }), Cancel::default());
        let stored = archive.store(source, &options, &clock(), &cancel, &Counters::default());
        match live {
            true => assert_eq!(stored.unwrap().vanished, 1),
            false => assert!(matches!(stored, Err(ArchiveError::Unreadable(errors)) if errors.unreadable == 1)),
        }
        place.check();
        assert_eq!(place.snapshots().len(), usize::from(live));
    }
}

fn stream<'s>(bytes: impl Read + Send + 's, ended: Result<(), String>) -> Source<'s> {
    Source::Stream { name: "dump.sql".to_owned(), bytes: Box::new(bytes), ended: Box::new(move || ended) }
}

#[test]
fn stream_is_a_file_in_a_snapshot() {
    let place = Place::new();
    let bytes = noise(20 << 20, 4);
    let stored = store(&place.open(), stream(&bytes[..], Ok(())), &Cancel::default()).unwrap();
    assert_eq!((stored.bytes, stored.files), (bytes.len() as u64, 1));
    place.check();
    let target = place.source().join("restored");
    place.restic(&["restore", &stored.snapshot.to_hex(), "--target", target.to_str().unwrap()]);
    assert_eq!(std::fs::read(target.join("dump.sql")).unwrap(), bytes);
    let again = store(&place.open(), stream(&bytes[..], Ok(())), &Cancel::default()).unwrap();
    assert!(added(&again) < 100_000, "{again:?}");
}

#[test]
fn stream_whose_producer_failed_leaves_no_snapshot() {
    struct Broken(usize);
    impl Read for Broken {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.0 += 1;
            if self.0 > 3 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(into.len()) }
        }
    }
    let place = Place::new();
    let archive = place.open();
    let failed = store(&archive, stream(&b"half"[..], Err("exit 1".to_owned())), &Cancel::default()).unwrap_err();
    assert_eq!(failed.to_string(), "the stream did not end well: exit 1");
    assert!(matches!(store(&archive, stream(Broken(0), Ok(())), &Cancel::default()), Err(ArchiveError::Stream(_))));
    let odd = Source::Stream { name: "../x".into(), bytes: Box::new(&b""[..]), ended: Box::new(|| Ok(())) };
    assert!(matches!(store(&archive, odd, &Cancel::default()), Err(ArchiveError::Stream(_))));
    assert!(place.snapshots().is_empty());
    place.check();
}

#[test]
fn exclusive_lock_of_another_is_respected_and_a_stale_one_of_this_host_is_cleared() {
    let place = Place::new();
    put_file(&place.source().join("a"), b"a");
    let archive = place.open();
    let lock_of = |hostname: &str, pid, exclusive, age| Lock {
        time: Timestamp { seconds: timestamp(clock().as_ref()).seconds - age, nanos: 0 },
        exclusive,
        hostname: hostname.to_owned(),
        username: "somebody".to_owned(),
        pid,
        uid: None,
        gid: None,
    };
    let put = |lock: Lock| archive.write_file(Kind::Lock, &lock.to_bytes().unwrap()).unwrap().0;
    let here = nix::unistd::gethostname().unwrap().to_string_lossy().into_owned();
    let lock = |hostname: &str, pid, exclusive| lock_of(hostname, pid, exclusive, 0);
    put(lock(&here, i32::MAX, false));
    put(lock_of(&here, i32::MAX, true, 31 * 60));
    put(lock("elsewhere", i32::MAX, false));
    place.store().unwrap();
    // Another machine can have our name.
    let namesake = put(lock_of(&here, i32::MAX, true, 20 * 60));
    assert!(matches!(place.store(), Err(ArchiveError::Locked(_))));
    archive.storage().remove(&namesake).unwrap();
    let theirs = put(lock("elsewhere", 1, true));
    let refused = place.store().unwrap_err();
    assert_eq!(refused.to_string(), "the repository is locked by process 1 on elsewhere");
    archive.storage().remove(&theirs).unwrap();
    place.store().unwrap();
    // Nothing of ours is left, and nothing of theirs was removed.
    assert_eq!(place.folder().list(Kind::Lock).unwrap().len(), 1);
}

#[test]
fn wrong_password_opens_nothing_and_a_second_repository_is_not_made() {
    use crate::format::key::Cost;
    let place = Place::new();
    let storage = std::sync::Arc::new(place.folder());
    let who = Who::this_process();
    assert!(matches!(Archive::open(storage.clone(), b"guess"), Err(ArchiveError::WrongPassword(_))));
    let again = Archive::make(storage, b"x", Cost::default(), &who, clock().as_ref());
    assert!(matches!(again, Err(ArchiveError::Exists(_))));
}
