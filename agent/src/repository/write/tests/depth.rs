//! Folders in folders in folders, and key files that lead astray.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::fs::{Mode, OFlags};

use crate::format::key::Cost;
use crate::platform::clock::SystemClock;
use crate::storage::{Folder, Kind, Object, Storage as _};

use super::super::super::open::{Archive, ArchiveError, KEYS_MAX, Who};
use super::super::super::restore::{self, DEPTH_MAX, Reader};
use super::fixtures::{Place, put_file};

/// Makes folders one in another; the kernel takes no path that is so long.
fn dig(from: &Path, levels: usize) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at: OwnedFd = rustix::fs::open(from, flags, Mode::empty()).unwrap();
    for _ in 0..levels {
        rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
        at = rustix::fs::openat(&at, "d", flags, Mode::empty()).unwrap();
    }
}

/// A descriptor a level; whoever starts us gives 1024, of which others are taken.
fn raise_descriptors() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(most > 3000, "{most}");
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

#[test]
fn folders_are_stored_and_restored_as_deep_as_a_path_may_be() {
    raise_descriptors();
    let place = Place::new();
    dig(&place.source(), 1900);
    let stored = place.store().unwrap();
    place.check();
    let archive = place.open();
    let index = archive.load_index().unwrap();
    let target = tempfile::tempdir().unwrap();
    let (options, counters) = (restore::Options::default(), restore::Counters::default());
    let never = std::sync::atomic::AtomicBool::new(false);
    let reader = Reader::new(&archive, &index);
    restore::restore(&reader, stored.tree, target.path(), &options, &counters, &never).unwrap();
    assert!(counters.others_done.into_inner() > 1900);
}

#[test]
fn folders_that_are_too_deep_are_an_error_and_no_overflow() {
    raise_descriptors();
    let place = Place::new();
    dig(&place.source(), DEPTH_MAX + 100);
    let Err(ArchiveError::Unreadable(errors)) = place.store() else { panic!("it must fail") };
    assert!(errors.names[0].ends_with("(folders are deeper than 2048)"), "{}", errors.names[0].len());
    assert!(place.snapshots().is_empty());
}

#[test]
fn source_that_needs_more_descriptors_than_there_are_is_an_error() {
    setrlimit(Resource::RLIMIT_NOFILE, 256, 256).unwrap();
    let place = Place::new();
    dig(&place.source(), 400);
    let Err(ArchiveError::Unreadable(errors)) = place.store() else { panic!("it must fail") };
    assert!(errors.names.iter().any(|name| name.contains("open files")), "{:?}", errors.names);
    assert!(place.snapshots().is_empty());
    assert!(place.folder().list(Kind::Lock).unwrap().is_empty());
}

/// The key file of a repository that was made elsewhere with the same password.
fn foreign_key() -> (Object, Vec<u8>) {
    let other = tempfile::tempdir().unwrap();
    let storage = std::sync::Arc::new(Folder::open(other.path()).unwrap());
    let cost = Cost { log_n: 10, r: 8, p: 1 };
    Archive::make(storage.clone(), b"secret", cost, &Who::this_process(), &SystemClock).unwrap();
    let (name, _) = storage.list(Kind::Key).unwrap().remove(0);
    let key = Object::new(Kind::Key, name);
    let bytes = storage.get(&key, 10_000).unwrap();
    (key, bytes)
}

#[test]
fn flood_of_foreign_key_files_is_named_where_it_hides_ours() {
    let place = Place::new();
    place.store().unwrap();
    let ours = place.folder().list(Kind::Key).unwrap().remove(0).0;
    place.folder().remove(&Object::new(Kind::Key, ours)).unwrap();
    for _ in 0..=KEYS_MAX {
        let (key, bytes) = foreign_key();
        place.folder().put(&key, &bytes).unwrap();
    }
    let refused = place.open_with(b"secret").unwrap_err().to_string();
    assert!(refused.contains(&format!("none of the {KEYS_MAX} key files")), "{refused}");
    assert!(refused.contains(&format!("which has {}", KEYS_MAX + 1)), "{refused}");
}

#[test]
fn key_file_of_another_repository_with_the_same_password_does_not_hide_ours() {
    let place = Place::new();
    put_file(&place.source().join("a"), b"a");
    place.store().unwrap();
    // Whichever is listed first, some come before ours.
    for _ in 0..6 {
        let (key, bytes) = foreign_key();
        place.folder().put(&key, &bytes).unwrap();
    }
    place.store().unwrap();
    assert!(matches!(place.open_with(b"guess"), Err(ArchiveError::WrongPassword(_))));
    // Without ours the config says what is wrong.
    for (name, _) in place.folder().list(Kind::Key).unwrap() {
        let key = Object::new(Kind::Key, name);
        let bytes = place.folder().get(&key, 10_000).unwrap();
        place.folder().remove(&key).unwrap();
        if let Err(error) = place.open_with(b"secret") {
            // Ours may be the last one that was listed, and then nothing opens anything any more.
            let are_others = !place.folder().list(Kind::Key).unwrap().is_empty();
            assert!(!are_others || error.to_string().contains("config"), "{error}");
            place.folder().put(&key, &bytes).unwrap();
        }
    }
    assert_eq!(place.folder().list(Kind::Key).unwrap().len(), 1);
    place.store().unwrap();
}
