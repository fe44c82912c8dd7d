//! Several writers at once, threads and processes, ours and restic's; who may prune, and when; locks that somebody
//! takes away; and places that let nothing be removed or written over.

use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;

use crate::platform::command::Program;
use crate::storage::fault::Denying;
use crate::storage::{Folder, Kind, Object, Storage, StorageError};

use super::super::super::open::{Archive, ArchiveError};
use super::super::{Cancel, Counters, Files, Source, Stored};
use super::faults::options;
use super::fixtures::{Place, added, assert_same, clock, noise, put_file, store};

const PLACE: &str = "HESTNER_TEST_WRITER_PLACE";
const SOURCE: &str = "HESTNER_TEST_WRITER_SOURCE";

fn store_path(archive: &Archive, path: &Path) -> Result<Stored, ArchiveError> {
    let files = Files { paths: vec![path.to_owned()], ..Files::default() };
    archive.store(Source::Files(files), &options(), &clock(), &Cancel::default(), &Counters::default())
}

/// What the test below starts.
#[test]
fn child() {
    let (Some(place), Some(source)) = (std::env::var_os(PLACE), std::env::var_os(SOURCE)) else { return };
    let archive = Archive::open(Arc::new(Folder::open(place.as_ref()).unwrap()), b"secret").unwrap();
    store_path(&archive, source.as_ref()).unwrap();
}

#[test]
fn four_writers_of_ours_and_one_of_restics_at_once_leave_whole_snapshots() {
    let place = Place::new();
    let source = |n: u64| place.source().join(format!("{n}"));
    for n in 0..5 {
        for f in 0..8 {
            // Half of it is the same for all.
            let seed = if f < 4 { f } else { n * 100 + f };
            put_file(&source(n).join(format!("f{f}")), &noise(200_000, seed + 1));
        }
    }
    std::thread::scope(|scope| {
        for n in [0, 1] {
            let path = source(n);
            let place = &place;
            scope.spawn(move || store_path(&place.open(), &path).unwrap());
        }
        for n in [2, 3] {
            let path = source(n);
            let program = Program::new(std::env::current_exe().unwrap())
                .args(["--exact", "repository::write::tests::writers::child"])
                .env(PLACE, place.repository())
                .env(SOURCE, path);
            scope.spawn(move || {
                let output = program.prepare().output().unwrap();
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            });
        }
        let (theirs, place) = (source(4), &place);
        scope.spawn(move || place.restic(&["backup", theirs.to_str().unwrap()]));
    });
    assert_eq!(place.snapshots().len(), 5);
    assert!(place.folder().list(Kind::Lock).unwrap().is_empty());
    place.check();
    for snapshot in place.snapshots() {
        let target = place.source().join(format!("restored-{snapshot}"));
        place.restic(&["restore", &snapshot, "--target", target.to_str().unwrap()]);
        let below = target.join(place.source().strip_prefix("/").unwrap());
        let names: Vec<_> = below.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        let [name] = &names[..] else { panic!("{names:?}") };
        assert_same(&place.source().join(name), &below.join(name));
    }
}

#[test]
fn prune_is_refused_while_we_write_and_goes_through_afterwards() {
    let place = Arc::new(Place::new());
    put_file(&place.source().join("old"), &noise(300_000, 1));
    let old = place.store().unwrap();
    put_file(&place.source().join("new"), &noise(300_000, 2));
    place.restic(&["forget", &old.snapshot.to_hex()]);
    let refusals = Arc::new(Mutex::new(Vec::new()));
    let (asked, told) = (Arc::clone(&place), Arc::clone(&refusals));
    let hooked = place.hooked(move |object| {
        if object.kind == Kind::Pack || object.kind == Kind::Snapshot {
            told.lock().unwrap().push(asked.restic_fails(&["prune"]));
        }
        Ok(())
    });
    let stored = store_path(&place.open_at(hooked).unwrap(), &place.source()).unwrap();
    let refusals = refusals.lock().unwrap();
    assert!(refusals.len() >= 2 && refusals.iter().all(|said| said.contains("locked")), "{refusals:?}");
    place.restic(&["prune"]);
    place.check();
    assert_same(&place.source(), &place.restored(&stored));
}

#[test]
fn lock_that_somebody_takes_away_while_we_write_leaves_no_snapshot() {
    let place = Place::new();
    put_file(&place.source().join("a"), &noise(300_000, 1));
    let folder = place.folder();
    let hooked = place.hooked(move |object| {
        if object.kind == Kind::Pack {
            for (name, _) in folder.list(Kind::Lock).unwrap() {
                folder.remove(&Object::new(Kind::Lock, name)).unwrap();
            }
        }
        Ok(())
    });
    let lost = store_path(&place.open_at(hooked).unwrap(), &place.source()).unwrap_err();
    assert!(matches!(lost, ArchiveError::LockLost), "{lost}");
    assert!(place.snapshots().is_empty());
    place.check();
    let next = place.store().unwrap();
    assert!(added(&next) < 50_000, "what was put is used: {next:?}");
}

#[test]
fn pack_of_a_writer_who_lives_is_not_taken_for_a_dead_ones() {
    let place = Arc::new(Place::new());
    put_file(&place.source().join("a"), &noise(300_000, 1));
    put_file(&place.source().join("z"), b"z");
    let other = Arc::clone(&place);
    let seen = Arc::new(Mutex::new(0));
    let count = Arc::clone(&seen);
    let hooked = place.hooked(move |object| {
        // Our packs are there and no index file names them.
        if object.kind == Kind::Index && *count.lock().unwrap() == 0 {
            let files = Files { paths: vec![other.source().join("z")], ..Files::default() };
            let stored = store(&other.open(), Source::Files(files), &Cancel::default()).unwrap();
            *count.lock().unwrap() = stored.objects.len();
        }
        Ok(())
    });
    store_path(&place.open_at(hooked).unwrap(), &place.source()).unwrap();
    assert!(*seen.lock().unwrap() > 0);
    let check = place.restic(&["check", "--read-data"]);
    assert!(!check.contains("several indexes"), "{check}");
}

#[test]
fn damaged_pack_that_no_index_names_is_left_alone() {
    let place = Place::new();
    put_file(&place.source().join("a"), &noise(300_000, 1));
    let refuse = place.hooked(|object| match object.kind {
        Kind::Index => Err(StorageError::Full(object.clone())),
        _ => Ok(()),
    });
    assert!(store_path(&place.open_at(refuse).unwrap(), &place.source()).is_err());
    let packs = place.folder().list(Kind::Pack).unwrap();
    assert!(packs.len() > 1);
    for (name, _) in &packs {
        let path = place.repository().join(Object::new(Kind::Pack, name.as_str()).path());
        let mut bytes = std::fs::read(&path).unwrap();
        // Its header is right, and what it names is not.
        bytes[10] ^= 1;
        std::fs::remove_file(&path).unwrap();
        put_file(&path, &bytes);
    }
    let next = place.store().unwrap();
    assert!(added(&next) > 300_000, "{next:?}");
    assert_same(&place.source(), &place.restored(&next));
}

/// As credentials that can put, get and list, and remove below `locks/`; and a bucket that keeps what is there.
fn put_only(inner: Folder) -> Denying<Folder> {
    let is_new =
        |inner: &Folder, object: &Object| inner.list(object.kind).unwrap().iter().all(|(n, _)| *n != object.name);
    Denying { inner, may_put: is_new, may_remove: |object| object.kind == Kind::Lock }
}

#[test]
fn credentials_that_only_put_are_enough_also_after_a_run_that_failed() {
    let place = Place::new();
    let archive = place.open_at(Arc::new(put_only(place.folder()))).unwrap();
    put_file(&place.source().join("a"), &noise(300_000, 1));
    store_path(&archive, &place.source()).unwrap();
    store_path(&archive, &place.source()).unwrap();
    put_file(&place.source().join("b"), &noise(300_000, 2));
    let failing = Files { paths: vec![place.source(), "/proc/self/mem".into()], ..Files::default() };
    let failed = archive.store(Source::Files(failing), &options(), &clock(), &Cancel::default(), &Counters::default());
    assert!(matches!(failed, Err(ArchiveError::Unreadable(_))));
    let next = store_path(&archive, &place.source()).unwrap();
    assert!(added(&next) < 50_000, "{next:?}");
    assert_eq!(place.snapshots().len(), 3);
    assert!(place.folder().list(Kind::Lock).unwrap().is_empty());
    place.check();
    assert_same(&place.source(), &place.restored(&next));
}
