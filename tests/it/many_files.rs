//! Memory does not grow with the number of files.
//!
//! Many files of little content, so that the index of blobs, which may grow, stays small. The bound of a million
//! files is held by `scripts/bench restore-million`.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use hestner_tests::memory::Sampler;
use hestner_tests::{Agent, Cmd, Service, World};

const FEW: u64 = 2_000;
const MANY: u64 = 60_000;
/// What a file more may take at most, in bytes: less than the shortest list of names would.
const BYTES_A_FILE: u64 = 120;

fn tree(folder: &Path, files: u64) {
    for number in 0..files {
        let parent = folder.join(format!("part{:03}", number / 200));
        if number % 200 == 0 {
            fs::create_dir_all(&parent).expect("a folder");
        }
        let mut file = File::create(parent.join(format!("a-name-as-long-as-many-{number}"))).expect("a file");
        write!(file, "one of {}", number % 50).expect("some bytes");
    }
}

/// The peak of the biggest process.
fn peak(agent: &Agent, command: Cmd) -> u64 {
    let started = command.start();
    let sampler = Sampler::start(vec![started.pid(), agent.pid()]);
    let ended = started.ended();
    let peaks = sampler.stop();
    assert_eq!(ended.code, Some(0), "{ended}");
    peaks.biggest
}

#[test]
fn memory_of_backup_and_restore_does_not_grow_with_the_number_of_files() {
    let world = World::new("many-files");
    let mut builder = world.agent().setting("repository", "archiver = \"hestner\"");
    for (name, files) in [("few", FEW), ("many", MANY)] {
        tree(&world.at(name), files);
        builder = builder.allowed(Service::files(name, [world.at(name)]));
    }
    let agent = builder.started();
    let mut peaks = Vec::new();
    for name in ["few", "many"] {
        let first = peak(&agent, agent.command(&["snapshot", name]));
        let unchanged = peak(&agent, agent.command(&["snapshot", name]));
        let target = world.at(&format!("restored-{name}"));
        let run = agent.last_run();
        let restore = peak(&agent, agent.command(&["restore", run.uid(), "--target"]).arg(&target));
        peaks.push([("first", first), ("unchanged", unchanged), ("restore", restore)]);
    }
    for ((case, few), (_, many)) in peaks[0].into_iter().zip(peaks[1]) {
        let more = many.saturating_sub(few);
        println!("{case}: {few} bytes for {FEW} files, {more} more for {MANY}");
        assert!(more < (MANY - FEW) * BYTES_A_FILE, "{case}: {more} bytes more for {} files more", MANY - FEW);
    }
}
