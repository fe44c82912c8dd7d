//! The process dies: by SIGKILL at every call of the storage, without memory, and while a call hangs. What it left is
//! good, and the next run needs nobody and uses it.

use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{Signal, raise};

use crate::platform::command::Program;
use crate::storage::fault::{Fault, Faulty};
use crate::storage::{Folder, Kind, Storage as _};

use super::super::super::open::Archive;
use super::super::{Cancel, Counters, Files, Source};
use super::faults::{assert_recovers, options, small, whole};
use super::fixtures::{Place, clock, noise, put_file};

const PLACE: &str = "HESTNER_TEST_STORE_PLACE";
const HOW: &str = "HESTNER_TEST_STORE_HOW";
/// How long a process that gives up waits for its store, as a worker does for some seconds.
const GRACE: Duration = Duration::from_millis(200);
const GAVE_UP: i32 = 3;

/// What the child does.
#[derive(Clone, Copy, Debug)]
enum How {
    /// It kills itself before the N-th call.
    DieBefore(u64),
    /// It kills itself when the N-th call is done.
    DieAfter(u64),
    /// The N-th call hangs for good; the store is cancelled, and the process ends when its grace is over.
    Hang(u64),
    /// It may take so much memory beside what it has.
    Memory(u64),
}

impl How {
    fn text(self) -> String {
        match self {
            Self::DieBefore(n) => format!("before {n}"),
            Self::DieAfter(n) => format!("after {n}"),
            Self::Hang(n) => format!("hang {n}"),
            Self::Memory(n) => format!("memory {n}"),
        }
    }

    fn of(text: &str) -> Self {
        let (word, number) = text.split_once(' ').unwrap();
        let number = number.parse().unwrap();
        match word {
            "before" => Self::DieBefore(number),
            "after" => Self::DieAfter(number),
            "hang" => Self::Hang(number),
            _ => Self::Memory(number),
        }
    }
}

/// What the tests below start.
#[test]
fn child() {
    let (Some(root), Ok(how)) = (std::env::var_os(PLACE), std::env::var(HOW)) else { return };
    let (root, how) = (Path::new(&root).to_owned(), How::of(&how));
    let (nth, fault) = match how {
        How::DieBefore(nth) => (nth, Fault::Act),
        How::DieAfter(nth) => (nth, Fault::ActAfter),
        How::Hang(nth) => (nth, Fault::Hang),
        How::Memory(_) => (0, Fault::Fail),
    };
    // Nobody wants to keep what is left of it.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).unwrap();
    if let How::Memory(more) = how {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let taken: u64 = pages.split(' ').next().unwrap().parse().unwrap();
        setrlimit(Resource::RLIMIT_AS, taken * 4096 + more, taken * 4096 + more).unwrap();
    }
    let folder = Folder::open(&root.join("repository")).unwrap();
    let faulty = Arc::new(Faulty::new(folder, nth, fault).doing(|| raise(Signal::SIGKILL).unwrap()));
    let cancel = Cancel::default();
    if let How::Hang(_) = how {
        let (faulty, cancel) = (faulty.clone(), cancel.clone());
        std::thread::spawn(move || {
            while !faulty.has_hung() {
                std::thread::yield_now();
            }
            cancel.cancel();
            std::thread::sleep(GRACE);
            std::process::exit(GAVE_UP);
        });
    }
    let archive = Archive::open(faulty, b"secret").unwrap();
    let files = Files { paths: vec![root.join("source")], ..Files::default() };
    archive.store(Source::Files(files), &options(), &clock(), &cancel, &Counters::default()).unwrap();
}

fn start(place: &Place, how: How) -> ExitStatus {
    let program = Program::new(std::env::current_exe().unwrap())
        .args(["--exact", "repository::write::tests::deaths::child"])
        .env(PLACE, place.source().parent().unwrap())
        .env(HOW, how.text());
    program.prepare().stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

fn bytes_in_packs(place: &Place) -> u64 {
    place.folder().list(Kind::Pack).unwrap().iter().map(|(_, bytes)| bytes).sum()
}

/// Whether the child ended well.
fn survives(place: &Place, how: How, whole: u64) -> bool {
    let before = bytes_in_packs(place);
    let snapshots = place.snapshots().len();
    let ended = start(place, how);
    let what = format!("{how:?}");
    if ended.success() {
        assert_eq!(place.snapshots().len(), snapshots + 1, "{what}");
        return true;
    }
    // The snapshot's own put, and the removal of the lock after it, come when everything is there.
    let new = place.snapshots().len() - snapshots;
    let is_whole = new == 1 && matches!(how, How::DieAfter(_) | How::DieBefore(_) | How::Hang(_));
    assert!(new == 0 || is_whole, "{what}: {new} new snapshots");
    assert_recovers(place, before, whole, &what);
    false
}

fn at_every_call(how: impl Fn(u64) -> How) {
    let whole = whole(&small());
    let mut last_with_new = 0;
    for nth in 1.. {
        assert!(nth < 100, "a store never got through");
        let place = small();
        if survives(&place, how(nth), whole) {
            assert!(nth - last_with_new <= 4, "only the last calls follow the snapshot's put");
            return;
        }
        // Two are there anyway: the first one's and the next run's.
        if place.snapshots().len() == 2 {
            last_with_new = nth;
        }
    }
}

#[test]
fn process_that_is_killed_before_any_call_leaves_what_the_next_run_uses() {
    at_every_call(How::DieBefore);
}

#[test]
fn process_that_is_killed_after_any_call_leaves_what_the_next_run_uses() {
    at_every_call(How::DieAfter);
}

#[test]
fn process_that_ends_around_a_call_that_hangs_leaves_a_lock_that_the_next_run_clears() {
    let whole = whole(&small());
    for nth in (1..).step_by(5) {
        let place = small();
        if survives(&place, How::Hang(nth), whole) {
            break;
        }
    }
}

/// Many packs and several index files.
fn big() -> Place {
    let place = Place::new();
    for n in 0..240 {
        put_file(&place.source().join(format!("{}/{n}", n % 3)), &noise(40_000, n));
    }
    place
}

#[test]
fn big_store_that_is_killed_or_fails_anywhere_loses_nothing_that_it_put() {
    let place = big();
    let faulty = Arc::new(Faulty::new(place.folder(), 0, Fault::Fail));
    let archive = Archive::open(faulty.clone(), b"secret").unwrap();
    let source = || Source::Files(place.files());
    let stored = archive.store(source(), &options(), &clock(), &Cancel::default(), &Counters::default()).unwrap();
    let (whole, calls) = (super::fixtures::added(&stored), faulty.calls());
    assert!(calls > 240, "{calls}");
    for sample in 1..=12_u64 {
        let place = big();
        let nth = calls * sample / 13;
        let how = if sample.is_multiple_of(2) { How::DieBefore(nth) } else { How::DieAfter(nth) };
        assert!(!survives(&place, how, whole), "{how:?}");
        if sample.is_multiple_of(6) {
            place.check();
        }
    }
}

#[test]
fn process_without_memory_leaves_what_the_next_run_uses() {
    let place = small();
    let whole = whole(&small());
    let (mut died, mut more) = (0, 256 * 1024);
    while !survives(&place, How::Memory(more), whole) {
        died += 1;
        more += more / 3 + 64 * 1024;
        assert!(more < 4 << 30, "it needs more than 4 GiB");
    }
    assert!(died > 10, "{died}");
    place.check();
}
