//! Restores that end early, by a failing place, by being cancelled, and by SIGKILL.

use std::fs;
use std::sync::LazyLock;
use std::time::Duration;

use super::memory::{Memory, folder};
use super::tree::{assert_same, fill, noise};
use super::*;

const TARGET: &str = "HESTNER_TEST_RESTORE_TARGET";
const MARK: &str = "HESTNER_TEST_RESTORE_MARK";
const REPOSITORY: &str = "HESTNER_TEST_RESTORE_REPOSITORY";

static LARGE: LazyLock<Vec<u8>> = LazyLock::new(|| noise(20_000_000, 77));

fn sample(memory: &mut Memory) -> Id {
    let mut folders = Vec::new();
    for f in 0..10 {
        let nodes = (0..10).map(|n| memory.file(&format!("{n}"), &noise(500 * n, f * 10 + n as u64))).collect();
        let tree = memory.tree(nodes);
        folders.push(folder(&format!("{f}"), tree));
    }
    folders.push(memory.file("large", &LARGE));
    memory.tree(folders)
}

fn assert_whole(target: &Path) {
    for f in 0..10 {
        for n in 0..10 {
            let read = fs::read(target.join(format!("{f}/{n}"))).unwrap();
            assert_eq!(read, noise(500 * n, f * 10 + n as u64));
        }
        assert_eq!(fs::read_dir(target.join(format!("{f}"))).unwrap().count(), 10);
    }
    assert!(fs::read(target.join("large")).unwrap() == *LARGE);
}

/// Whatever has its final name is right.
fn assert_nothing_wrong(target: &Path) {
    for f in 0..10 {
        for n in 0..10 {
            if let Ok(read) = fs::read(target.join(format!("{f}/{n}"))) {
                assert_eq!(read, noise(500 * n, f * 10 + n as u64));
            }
        }
    }
    if let Ok(read) = fs::read(target.join("large")) {
        assert!(read == *LARGE);
    }
}

#[test]
fn place_that_fails_at_any_read_ends_it_and_the_next_restore_goes_on() {
    let mut memory = Memory::default();
    let root = sample(&mut memory);
    for reads_max in 1.. {
        let target = tempfile::tempdir().unwrap();
        (memory.reads, memory.reads_max) = (AtomicU64::new(0), reads_max);
        let ended = memory.restore(root, target.path());
        assert_nothing_wrong(target.path());
        memory.reads_max = 0;
        match ended {
            Ok(_) => break,
            Err(error) => assert!(error.to_string().contains("asked to"), "{error}"),
        }
        memory.restore(root, target.path()).unwrap();
        assert_whole(target.path());
    }
}

/// In the thread that walks, or in a worker: nobody waits for the other for ever.
#[test]
fn place_that_panics_at_any_read_ends_it_and_the_next_restore_goes_on() {
    let mut memory = Memory::default();
    let root = sample(&mut memory);
    for panic_at in (1..).step_by(3) {
        let target = tempfile::tempdir().unwrap();
        (memory.reads, memory.panic_at) = (AtomicU64::new(0), panic_at);
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| memory.restore(root, target.path())));
        assert_nothing_wrong(target.path());
        match ended {
            Ok(Ok(_)) => {
                assert!(memory.reads.load(Ordering::Relaxed) < panic_at, "read {panic_at} panicked in silence");
                break;
            }
            Ok(Err(error)) => panic!("read {panic_at}: {error}"),
            Err(_) => {}
        }
        memory.panic_at = 0;
        memory.restore(root, target.path()).unwrap();
        assert_whole(target.path());
    }
}

#[test]
fn cancelled_restore_says_so_and_can_be_continued() {
    let mut memory = Memory::default();
    let root = sample(&mut memory);
    let target = tempfile::tempdir().unwrap();
    for after in 1..100 {
        (memory.reads, memory.cancel_after) = (AtomicU64::new(0), after);
        memory.cancel = AtomicBool::new(false);
        let ended = memory.restore(root, target.path());
        assert_nothing_wrong(target.path());
        match ended {
            Ok(_) => break,
            Err(error) => assert!(matches!(error, RestoreError::Cancelled), "{after}: {error}"),
        }
    }
    (memory.cancel_after, memory.cancel) = (0, AtomicBool::new(false));
    memory.restore(root, target.path()).unwrap();
    assert_whole(target.path());
}

/// What the test below starts and kills.
#[test]
fn child() {
    let (Some(target), Some(repository)) = (std::env::var_os(TARGET), std::env::var_os(REPOSITORY)) else { return };
    let archive = Archive::open(Arc::new(Place::open(repository.as_ref()).unwrap()), b"secret").unwrap();
    let index = archive.load_index().unwrap();
    let tree = snapshots::list(&archive).unwrap().last().unwrap().snapshot.tree;
    let options = Options { threads: 2, ..Options::default() };
    write(Path::new(&std::env::var_os(MARK).unwrap()), b"from here on");
    let (counters, never) = (Counters::default(), AtomicBool::new(false));
    restore(&Reader::new(&archive, &index), tree, Path::new(&target), &options, &counters, &never).unwrap();
}

#[test]
fn restore_that_is_killed_ten_times_finishes_and_is_right() {
    let (source, target, stock) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Stock::new());
    fill(source.path());
    for number in 0..300 {
        write(&source.path().join(format!("a/{number}")), &noise(20_000, number + 1));
    }
    stock.backup(source.path());
    let program = Program::new(std::env::current_exe().unwrap())
        .args(["--exact", "repository::restore::tests::killed::child"])
        .env(MARK, source.path().with_extension("mark"))
        .env(TARGET, target.path())
        .env(REPOSITORY, stock.path());
    let mark = source.path().with_extension("mark");
    let start = || program.prepare().stdout(std::process::Stdio::null()).spawn().unwrap();
    let mut killed = 0;
    for round in 0..10_u64 {
        let mut child = start();
        // Opening takes what the password's key costs; only what comes after is of interest.
        while !mark.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(7 * round));
        if child.try_wait().unwrap().is_none() {
            killed += 1;
            child.kill().unwrap();
        }
        child.wait().unwrap();
        fs::remove_file(&mark).unwrap();
    }
    assert!(killed > 0, "none was killed in its work");
    assert!(start().wait().unwrap().success());
    fs::remove_file(&mark).unwrap();
    assert_same(source.path(), target.path());
}
