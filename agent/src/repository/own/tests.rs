//! The way to the engine: streams that are called off, and places that can only be read.

use std::io::Write as _;
use std::os::fd::OwnedFd;

use super::*;
use crate::policy::How;
use crate::repository::restore::Reader;
use crate::storage::fault::Denying;
use crate::storage::{Folder, Kind};

const CHEAP: Cost = Cost { log_n: 10, r: 8, p: 1 };

fn made(folder: &Path) -> Archive {
    let storage = Arc::new(Folder::open(folder).unwrap());
    Archive::make(storage, b"secret", CHEAP, &Who::this_process(), clock().as_ref()).unwrap()
}

fn stream_job() -> Job {
    Job {
        run_uid: "r1".into(),
        service: "db".into(),
        input: Input::Stream { file_name: "dump".into() },
        how: How::default(),
    }
}

#[test]
fn stream_that_is_silent_is_called_off_and_leaves_no_lock() {
    let folder = tempfile::tempdir().unwrap();
    let archive = made(folder.path());
    let (read, mut write) = std::io::pipe().unwrap();
    write.write_all(b"some bytes, and then nothing more").unwrap();
    let cancel = Cancel::default();
    let input = source(&stream_job(), Some(OwnedFd::from(read)), Arc::default(), &cancel).unwrap();
    std::thread::scope(|scope| {
        let storing =
            scope.spawn(|| archive.store(input, &options(&stream_job()), &clock(), &cancel, &Counters::default()));
        while archive.storage().list(Kind::Lock).unwrap().is_empty() {
            std::thread::yield_now();
        }
        cancel.cancel();
        // It ends although its producer lives on: otherwise this would wait for ever.
        assert!(matches!(storing.join().unwrap(), Err(ArchiveError::Cancelled)));
    });
    drop(write);
    assert!(archive.storage().list(Kind::Lock).unwrap().is_empty());
    assert!(archive.storage().list(Kind::Snapshot).unwrap().is_empty());
}

#[test]
fn place_that_takes_nothing_more_is_read_without_a_lock() {
    let folder = tempfile::tempdir().unwrap();
    let made = made(folder.path());
    let stored = made.store(
        Source::Stream { name: "dump".into(), bytes: Box::new(&b"content"[..]), ended: Box::new(|| Ok(())) },
        &options(&stream_job()),
        &clock(),
        &Cancel::default(),
        &Counters::default(),
    );
    let tree = stored.unwrap().tree;
    let read_only = Arc::new(read_only(folder.path()));
    let archive = Archive::open(read_only, b"secret").unwrap();
    assert!(locked(&archive, Instant::now()).is_err());
    let lock = locked_to_read(&archive, Instant::now()).unwrap();
    assert!(lock.is_none());
    let target = tempfile::tempdir().unwrap();
    let index = archive.load_index().unwrap();
    let (options, counters) = (restore::Options::default(), restore::Counters::default());
    let never = AtomicBool::default();
    restore::restore(&Reader::new(&archive, &index), tree, target.path(), &options, &counters, &never).unwrap();
    assert_eq!(std::fs::read(target.path().join("dump")).unwrap(), b"content");
    verify::verify(&archive, Extent::All, 1, &verify::Counters::default(), &never).unwrap();
}

#[test]
fn lock_of_another_keeps_a_reader_out_even_where_nothing_can_be_written() {
    use crate::format::lock::Lock;
    let folder = tempfile::tempdir().unwrap();
    let made = made(folder.path());
    let theirs = Lock {
        time: crate::format::Timestamp { seconds: 1_700_000_000, nanos: 0 },
        exclusive: true,
        hostname: "elsewhere".into(),
        username: "somebody".into(),
        pid: 1,
        uid: None,
        gid: None,
    };
    made.write_file(Kind::Lock, &theirs.to_bytes().unwrap()).unwrap();
    let archive = Archive::open(Arc::new(read_only(folder.path())), b"secret").unwrap();
    let refused = locked_to_read(&archive, Instant::now()).unwrap_err();
    assert!(matches!(refused, RepositoryError::Locked(_)), "{refused}");
}

fn read_only(folder: &Path) -> Denying<Folder> {
    Denying { inner: Folder::open(folder).unwrap(), may_put: |_, _| false, may_remove: |_| false }
}
