//! How much of what is stored is read back is the operator's choice, and what is damaged is found by it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use hestner_tests::{Agent, Service, World, files};

/// Some packs of 16 MiB.
const BULK_BYTES: usize = 70_000_000;
/// In which samples of one of the packs find the one that is damaged, and others, but for once in a million times.
const TRIES: usize = 100;

fn read_back(agent: &Agent, run: &str, how: &[&str]) -> u64 {
    let told = agent.cli(&[&["verify", run, "--json"], how].concat()).json();
    assert_eq!(told["verified"], true, "{told}");
    told["packs_read"].as_u64().expect("a number")
}

fn packs(agent: &Agent) -> Vec<PathBuf> {
    let inside = |folder: PathBuf| folder.read_dir().expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut packs: Vec<_> = inside(agent.repository_path("local").join("data")).flat_map(inside).collect();
    packs.sort_by_key(|path| path.metadata().expect("a file").len());
    packs
}

#[test]
fn as_much_is_read_back_as_is_asked_for_and_damage_is_found_by_it() {
    let world = World::new("verify-extent");
    let source = world.bulky_source("source", BULK_BYTES);
    let agent = world.agent().allowed(Service::files("docs", [&source])).started();
    let run = agent.snapshot_ok("docs");
    let all = packs(&agent).len() as u64;
    assert!(all >= 5, "{all}");
    assert_eq!(read_back(&agent, run.uid(), &[]), all);
    assert_eq!(read_back(&agent, run.uid(), &["--percent", "0"]), 0);
    let sample = read_back(&agent, run.uid(), &["--sample", "1 MB"]);
    assert!((1..=3).contains(&sample), "one that is big enough, and the small ones that came before it: {sample}");
    let half = read_back(&agent, run.uid(), &["--percent", "50"]);
    assert!(half > 0 && half < all, "{half} of {all}");
    let both = agent.cli(&["verify", run.uid(), "--percent", "50", "--sample", "1 MB"]);
    assert_eq!(both.code, Some(64), "{both}");

    let biggest = packs(&agent).pop().expect("a pack");
    let mut bytes = std::fs::read(&biggest).expect("a pack");
    bytes[1_000_000] ^= 1;
    files::replace(&biggest, bytes);
    assert_eq!(read_back(&agent, run.uid(), &["--percent", "0"]), 0, "the structure is whole");
    let name = biggest.file_name().expect("a name").to_str().expect("UTF-8");
    let found = |how: &[&str]| {
        let ended = agent.cli(&[&["verify", run.uid()], how].concat());
        assert!(ended.code == Some(0) || ended.stderr.contains("code: verify_failed"), "{ended}");
        ended.code != Some(0) && ended.stderr.contains(name)
    };
    assert!(found(&[]));
    let mut outcomes = BTreeSet::new();
    let mut sample = || outcomes.insert(found(&["--sample", "1 MB"])) && outcomes.len() == 2;
    assert!((0..TRIES).any(|_| sample()), "each sample is another one");
}
