//! Our own archive engine as the archiver of a run, with stock restic as the judge of what it stored.

use std::time::Duration;

use hestner_tests::mounts::Mounted;
use hestner_tests::restic::FaultyRestic;
use hestner_tests::{
    AgentBuilder, Hook, Service, World, clock, files, is_root_or_skips, processes, tree, wait_for, wait_until,
};

/// A user that owns nothing: `nobody`.
const NOBODY: u32 = 65_534;

fn agent(world: &World) -> AgentBuilder {
    // Nothing that stores, lists or restores may need it; only pruning does.
    let broken = FaultyRestic::new(&world.at("bin"));
    broken.on("any", "exit 9");
    world.agent().restic(&broken)
}

#[test]
fn odd_tree_is_stored_without_restic_and_given_back_by_it() {
    if !is_root_or_skips("odd_tree_is_stored_without_restic_and_given_back_by_it") {
        return;
    }
    let world = World::new("archiver-odd");
    let source = tree::odd(&world.at("source"));
    let before = tree::manifest(&source);
    let agent = agent(&world).allowed(Service::files("odd", [&source])).started();
    let first = agent.snapshot_ok("odd");
    tree::assert_same_manifest(&before, &tree::manifest(&source));
    let again = agent.snapshot_ok("odd");
    assert!(again.number("bytes_stored") < first.number("bytes_stored") / 10, "nothing has changed: {again:?}");

    let repository = agent.repository("local");
    let check = repository.check();
    assert_eq!(check.code, Some(0), "{check}");
    for (name, run) in [("first", &first), ("again", &again)] {
        let stock = world.at(&format!("{name}-by-restic"));
        repository.restore(&run.snapshot_id(), &stock);
        tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&stock, &source)));
        let ours = world.at(&format!("{name}-by-hestner"));
        agent.restore(run.uid(), &ours).ok();
        tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&ours, &source)));
    }
    agent.cli(&["verify", again.uid()]).ok();
    assert!(repository.locks().is_empty());
}

#[test]
fn repository_of_one_archiver_is_gone_on_with_by_the_other() {
    let world = World::new("archiver-changes");
    let source = world.source("source");
    let before = tree::manifest(&source);
    let mut agent = world.agent().allowed(Service::files("docs", [&source])).started();
    let by_restic = agent.snapshot_ok("docs");

    let ours = agent.snapshot_ok("docs");
    assert!(ours.number("bytes_stored") < by_restic.number("bytes_stored"), "{ours:?}");
    let repository = agent.repository("local");
    repository.stock(&["backup", source.to_str().expect("UTF-8")]).ok();
    for run in [&by_restic, &ours] {
        let target = world.at(&format!("restored-{}", run.uid()));
        agent.restore(run.uid(), &target).ok();
        tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
    }
    let difference = repository.stock(&["diff", "--metadata", &by_restic.snapshot_id(), &ours.snapshot_id()]).ok();
    assert!(difference.contains("Files:           0 new,     0 removed,     0 changed"), "{difference}");
    let check = repository.check();
    assert_eq!(check.code, Some(0), "{check}");
}

#[test]
fn unreadable_file_commits_nothing_and_the_next_run_uses_what_was_stored() {
    if !is_root_or_skips("unreadable_file_commits_nothing_and_the_next_run_uses_what_was_stored") {
        return;
    }
    let world = World::new("archiver-unreadable");
    let source = world.source("source");
    let secret = files::write(source.join("secret.key"), "only root reads this");
    files::set_mode(&secret, 0o600);
    let agent = agent(&world).as_user(NOBODY).allowed(Service::files("docs", [&source])).started();
    let run = agent.snapshot("docs");
    run.assert_failed("source_unreadable");
    assert_eq!(run.number("unreadable"), 1, "{run:?}");
    assert!(run.0["unreadable_names"].to_string().contains("secret.key"), "{run:?}");
    agent.wait_repository_holds(&[]);
    files::set_mode(&secret, 0o644);
    let good = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&good]);
    assert_eq!(agent.repository("local").check().code, Some(0));
}

#[test]
fn killed_worker_leaves_no_snapshot_no_lock_and_a_sound_repository() {
    let world = World::new("archiver-killed");
    let source = world.source("source");
    // Enough to be in the middle of it, and nothing that compresses.
    for part in 0..12 {
        files::write(source.join(format!("big{part}")), files::random_bytes(8 << 20));
    }
    let agent = agent(&world).allowed(Service::files("docs", [&source])).started();
    let repository = agent.repository("local");
    for killed_after in [Duration::ZERO, Duration::from_millis(200), Duration::from_millis(600)] {
        let packs = repository.has_packs();
        agent.cli(&["snapshot", "docs", "--detach"]).ok();
        let worker = wait_for("the worker", Duration::from_secs(30), || agent.part("worker"));
        wait_until("packs", Duration::from_secs(30), || packs || repository.has_packs());
        clock::let_pass(killed_after);
        processes::kill(worker.pid);
        let run = agent.wait_last_run_ended();
        run.assert_failed("worker_killed");
    }
    agent.wait_repository_holds(&[]);
    let good = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&good]);
    assert!(repository.locks().is_empty());
    assert_eq!(repository.check().code, Some(0));
}

#[test]
fn stream_is_stored_and_one_that_was_cut_off_is_not() {
    let world = World::new("archiver-stream");
    let fails = world.at("fails");
    let body = format!("seq 1 200000; [ ! -e {} ]", fails.display());
    let program = files::write_script(world.at("programs/dump"), &body).display().to_string();
    let service = Service::command("dump", &[&program], "dump.txt");
    let agent = agent(&world).allowed(service).started();
    files::write(&fails, "");
    agent.snapshot("dump").assert_failed("producer_failed");
    agent.wait_repository_holds(&[]);
    std::fs::remove_file(&fails).expect("a file");
    let run = agent.snapshot_ok("dump");
    let target = world.at("restored");
    agent.restore(run.uid(), &target).ok();
    let lines = files::lines(&target.join("dump.txt"));
    assert_eq!((lines.len(), lines.last().map(String::as_str)), (200_000, Some("200000")));
    assert_eq!(agent.repository("local").check().code, Some(0));
}

#[test]
fn snapshot_of_btrfs_is_what_is_read_and_not_the_live_tree() {
    if !is_root_or_skips("snapshot_of_btrfs_is_what_is_read_and_not_the_live_tree") {
        return;
    }
    let world = World::new("archiver-btrfs");
    let disk = Mounted::btrfs(&world.at("disk"));
    let source = disk.path().join("data");
    files::small_tree(&source, 20, 2_000);
    let before = tree::manifest(&source);
    // The release runs after the point was taken and before the archive begins.
    let change = format!("echo later >{0}/part0/file0.txt; echo later >{0}/written-later.txt", source.display());
    let change = files::write_script(world.at("hooks/change"), &change).display().to_string();
    let service = Service::files("docs", [&source]).hook(Hook::new("app").pre(&["/bin/true"]).post(&[&change]));
    let agent = agent(&world).allowed(service).started();
    let run = agent.snapshot_ok("docs");
    assert!(source.join("written-later.txt").exists());
    let target = world.at("restored");
    agent.restore(run.uid(), &target).ok();
    tree::assert_same_manifest(&before, &tree::manifest(&tree::restored(&target, &source)));
}
