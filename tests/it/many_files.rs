//! Memory does not grow with the number of files.
//!
//! Many files of little content, so that the index of blobs, which may grow, stays small, beside one that fills all
//! buffers. The engine is called as a library: deriving the key from a password takes more memory for a moment than
//! all the rest, and would hide it. The bound of a million files is held by `scripts/bench restore-million`.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hestner_agent::format::key::Cost;
use hestner_agent::platform::clock::{SharedClock, SystemClock};
use hestner_agent::repository::open::{Archive, Who};
use hestner_agent::repository::restore::{self, Reader};
use hestner_agent::repository::write::{Cancel, Counters, Files, Options, Source, Stored};
use hestner_agent::storage::Folder;
use hestner_tests::{files, processes, world};

const FEW: u64 = 1_000;
const MANY: u64 = 21_000;
/// What a file more may take at most, in bytes: less than a list of their paths would. What it takes are the packs of
/// trees, which are bounded, but not full here.
const BYTES_A_FILE: u64 = 120;
const FILLING_BYTES: usize = 18_000_000;

fn tree(folder: &Path, count: u64) {
    files::write(folder.join("filling"), files::random_bytes(FILLING_BYTES));
    for number in 0..count {
        let parent = folder.join(format!("part{:03}", number / 200));
        if number % 200 == 0 {
            fs::create_dir_all(&parent).expect("a folder");
        }
        let mut file = File::create(parent.join(format!("a-name-as-long-as-many-{number}"))).expect("a file");
        write!(file, "one of {}", number % 50).expect("some bytes");
    }
}

/// The peak of our own memory during `work`.
fn peak<T>(work: impl FnOnce() -> T) -> (u64, T) {
    // Sets the high-water mark back to what is held now, `man 5 proc_pid_clear_refs`.
    files::write("/proc/self/clear_refs", "5");
    let done = work();
    let own = i32::try_from(std::process::id()).expect("a pid");
    (processes::kilobytes(own, "status", "VmHWM").expect("our own memory"), done)
}

fn store(archive: &Archive, clock: &SharedClock, source: &Path) -> Stored {
    let source = Source::Files(Files { paths: vec![source.to_owned()], ..Files::default() });
    let options = Options::new(Who::this_process());
    archive.store(source, &options, clock, &Cancel::default(), &Counters::default()).expect("a snapshot")
}

fn restore(archive: &Archive, stored: &Stored, target: &Path) {
    fs::create_dir_all(target).expect("a folder");
    let index = archive.load_index().expect("an index");
    let (options, counters) = (restore::Options::default(), restore::Counters::default());
    let reader = Reader::new(archive, &index);
    let restored = restore::restore(&reader, stored.tree, target, &options, &counters, &AtomicBool::new(false));
    assert_eq!(restored.expect("a whole restore").files, stored.files);
}

#[test]
fn memory_of_backup_and_restore_does_not_grow_with_the_number_of_files() {
    let folder = world::own_folder("many-files");
    let clock: SharedClock = Arc::new(SystemClock);
    let mut peaks = Vec::new();
    // The first round makes what stays allocated afterwards.
    for (name, count) in [("warm-up", FEW), ("few", FEW), ("many", MANY)] {
        let source = folder.join(name);
        tree(&source, count);
        let storage = Arc::new(Folder::create(&folder.join(format!("{name}-repository"))).expect("a folder"));
        let cost = Cost { log_n: 10, ..Cost::default() };
        let archive = Archive::make(storage, b"x", cost, &Who::this_process(), clock.as_ref()).expect("a repository");
        let (first, stored) = peak(|| store(&archive, &clock, &source));
        let (unchanged, again) = peak(|| store(&archive, &clock, &source));
        assert_eq!((stored.files, again.bytes_read), (count + 1, 0));
        let (restored, ()) = peak(|| restore(&archive, &again, &folder.join(format!("{name}-restored"))));
        // The judge judged: what takes twice as much as is allowed for each file is seen.
        let (held, _) = peak(|| {
            let held = files::random_bytes(usize::try_from((count - FEW) * BYTES_A_FILE * 2).expect("a size"));
            store(&archive, &clock, &source);
            held
        });
        assert!(count == FEW || held > unchanged + (count - FEW) * BYTES_A_FILE, "{held} bytes instead of {unchanged}");
        peaks.push([("first", first), ("unchanged", unchanged), ("restore", restored)]);
    }
    for ((case, few), (_, many)) in peaks[1].into_iter().zip(peaks[2]) {
        let more = many.saturating_sub(few);
        println!("{case}: {few} bytes for {FEW} files, {more} more for {MANY}");
        assert!(more < (MANY - FEW) * BYTES_A_FILE, "{case}: {more} bytes more for {} files more", MANY - FEW);
    }
    fs::remove_dir_all(folder).expect("our own folder");
}
