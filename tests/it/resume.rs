//! A restore that was killed goes on when the same command is given again.

use std::path::Path;
use std::time::Duration;

use hestner_tests::{Service, World, files, processes, tree, wait_for};

const FILES: usize = 5_000;
const KILLS: usize = 10;
/// Stored last, so that a restore has something to do when all others are there.
const BULK_BYTES: usize = 30_000_000;
/// Each restore gets so many files further than the one before did.
const STEP_FILES: usize = 20;

/// How many files are there, whatever their names.
fn count(folder: &Path) -> usize {
    let entries = folder.read_dir().map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let below = |entry: &std::fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => count(&entry.path()),
        _ => 1,
    };
    entries.iter().map(below).sum()
}

#[test]
fn restore_that_is_killed_ten_times_goes_on_and_is_right() {
    let world = World::new("resume-kills");
    let source = files::small_tree(&world.at("source"), FILES, 3_000);
    files::write(source.join("z/bulk.bin"), files::random_bytes(BULK_BYTES));
    let before = tree::manifest(&source);
    let agent = world.agent().allowed(Service::files("docs", [&source])).started();
    let run = agent.snapshot_ok("docs");
    files::write(source.join("later"), "later");
    let other = agent.snapshot_ok("docs");

    let target = world.at("restored");
    let arguments = ["restore", run.uid(), "--target", target.to_str().expect("UTF-8")];
    for kill in 1..=KILLS {
        let start = count(&target);
        let restoring = agent.command(&arguments).start();
        let pid = restoring.pid();
        wait_for("the restore to be so far", Duration::from_secs(60), || {
            assert!(processes::is_alive(pid), "it ended before it was killed");
            (count(&target) > start + STEP_FILES * kill).then_some(())
        });
        processes::kill(pid);
        let ended = restoring.ended();
        assert_eq!(ended.code, None, "it was killed: {ended}");
        assert_eq!(ended.stderr.contains("going on with an unfinished restore"), kill > 1, "{ended}");
        // Whatever has its final name is right.
        for n in [0, FILES / 2] {
            let name = format!("part{}/file{n}.txt", n % 7);
            let (original, restored) = (source.join(&name), target.join(source.strip_prefix("/").expect("absolute")));
            if let (Ok(original), Ok(restored)) = (std::fs::read(original), std::fs::read(restored.join(&name))) {
                assert!(original == restored, "{name} is wrong");
            }
        }
    }
    let refused = agent.restore(other.uid(), &target);
    assert_eq!(refused.code, Some(64), "{refused}");
    assert!(refused.stderr.contains("unfinished restore of another snapshot"), "{refused}");

    let ended = agent.command(&arguments).run();
    assert_eq!(ended.code, Some(0), "{ended}");
    let whole = format!("{0} of {0} files", FILES + 1);
    assert!(ended.stderr.contains(&whole), "how far it came is told: {ended}");
    tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
    let names: Vec<_> = target.read_dir().expect("a folder").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names.len(), 1, "no mark and no part stays: {names:?}");
    assert!(agent.repository("local").locks().len() <= KILLS, "a lock each, which the next writer clears");
    agent.snapshot_ok("docs");
    assert!(agent.repository("local").locks().is_empty());

    let again = agent.restore(run.uid(), &target);
    assert_eq!(again.code, Some(64), "what is finished is not written over: {again}");
    assert!(again.stderr.contains("is not empty"), "{again}");
    let verified = agent.cli(&["verify", run.uid()]);
    assert_eq!(verified.code, Some(0), "{verified}");
    assert!(verified.stderr.contains("reading back 100 %"), "how far it came is told: {verified}");
}
