//! Nothing partial is ever counted, kept or offered for restore: each fault ends as `failed` with its own
//! class, and after the next start the repository holds no snapshot of it and no lock.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::restic::FaultyRestic;
use hestner_tests::{Agent, AgentBuilder, Run, Service, World, files, is_root_or_skips, processes, wait_until};

/// A user that owns nothing: `nobody`.
const NOBODY: u32 = 65_534;

/// After a restart: the run stays failed, nothing of it is in the repository, nothing can be restored.
fn assert_nothing_is_left(world: &World, agent: &mut Agent, failed: &Run, class: &str, good: &[&Run]) {
    agent.stop();
    agent.start();
    let runs = agent.runs();
    let again = runs.iter().find(|run| run.uid() == failed.uid()).expect("the run is still known");
    again.assert_failed(class);
    agent.wait_repository_holds(good);
    let target = world.at("must-stay-away");
    let refused = agent.restore(failed.uid(), &target);
    assert_ne!(refused.code, Some(0), "a failed run was restored: {refused}");
    let written = std::fs::read_dir(&target).map(Iterator::count).unwrap_or_default();
    assert_eq!(written, 0, "a refused restore wrote something");
    let row = world.receiver.wait_run_ended(agent.server_id, failed.uid());
    assert_eq!((&row["status"], &row["error_class"]), (&"failed".into(), &class.into()), "{row}");
    assert!(
        !world.receiver.ledger(agent.server_id).iter().any(|(uid, _)| uid == failed.uid()),
        "a failed run was booked"
    );
}

/// An agent run by `nobody`, with a source in which root keeps `secret` for itself.
fn agent_of_nobody(world: &World) -> (AgentBuilder, PathBuf) {
    let source = world.source("source");
    let secret = files::write(source.join("secret.key"), "only root reads this");
    files::set_mode(&secret, 0o600);
    (world.agent().as_user(NOBODY).allowed(Service::files("docs", [&source])), source)
}

#[test]
fn unreadable_file_fails_the_run_with_its_name_and_commits_nothing() {
    if !is_root_or_skips("unreadable_file_fails_the_run_with_its_name_and_commits_nothing") {
        return;
    }
    let world = World::new("gate-unreadable");
    let (builder, source) = agent_of_nobody(&world);
    let mut agent = builder.started();
    let run = agent.snapshot("docs");
    run.assert_failed("source_unreadable");
    assert_eq!(run.number("unreadable"), 1, "{run:?}");
    assert!(run.0["unreadable_names"].to_string().contains("secret.key"), "{run:?}");
    assert_nothing_is_left(&world, &mut agent, &run, "source_unreadable", &[]);

    files::set_mode(&source.join("secret.key"), 0o644);
    let good = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&good]);
}

#[test]
fn folder_that_cannot_be_listed_fails_the_run_and_an_older_good_one_stays() {
    if !is_root_or_skips("folder_that_cannot_be_listed_fails_the_run_and_an_older_good_one_stays") {
        return;
    }
    let world = World::new("gate-unlistable");
    let source = world.source("source");
    let closed = source.join("closed");
    files::write(closed.join("inside.txt"), "inside");
    let mut agent = world.agent().as_user(NOBODY).allowed(Service::files("docs", [&source])).started();
    let good = agent.snapshot_ok("docs");
    for mode in [0o700, 0o711] {
        files::set_mode(&closed, mode);
        let run = agent.snapshot("docs");
        run.assert_failed("source_unreadable");
        assert!(run.number("unreadable") >= 1, "{run:?}");
        assert!(run.0["unreadable_names"].to_string().contains("closed"), "{run:?}");
        assert_nothing_is_left(&world, &mut agent, &run, "source_unreadable", &[&good]);
    }
}

#[test]
fn missing_path_beside_a_good_one_fails_the_run() {
    let world = World::new("gate-missing");
    let missing = world.at("not-there");
    let service = Service::files("docs", [&world.source("source"), &missing]);
    let mut agent = world.agent().allowed(service).started();
    let run = agent.snapshot("docs");
    run.assert_failed("source_missing");
    assert!(run.text("error_message").contains("not-there"), "{run:?}");
    assert_nothing_is_left(&world, &mut agent, &run, "source_missing", &[]);

    std::fs::create_dir_all(&missing).expect("a folder");
    let good = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&good]);
}

// It goes away after it was checked: restic itself calls a missing path beside a good one a success.
#[test]
fn path_that_disappears_while_the_archiver_starts_fails_the_run() {
    let world = World::new("gate-disappears");
    let second = world.source("second");
    let faulty = FaultyRestic::new(&world.at("bin"));
    let service = Service::files("docs", [&world.source("source"), &second]);
    let mut agent = world.agent().restic(&faulty).allowed(service).started();
    faulty.on("backup", &format!("mv {path} {path}.away", path = second.display()));
    let run = agent.snapshot("docs");
    run.assert_failed("source_missing");
    faulty.heal("backup");
    assert_nothing_is_left(&world, &mut agent, &run, "source_missing", &[]);
}

/// An agent whose archiver is slow enough to be caught at work.
fn slow_agent(world: &World) -> (Agent, FaultyRestic) {
    let faulty = FaultyRestic::new(&world.at("bin"));
    faulty.slow_down(3_000);
    let source = world.bulky_source("source", 60_000_000);
    (world.agent().restic(&faulty).allowed(Service::files("docs", [source])).started(), faulty)
}

#[test]
fn killed_archiver_fails_the_run_and_leaves_nothing() {
    let world = World::new("gate-archiver-killed");
    let (mut agent, faulty) = slow_agent(&world);
    let snapshot = agent.snapshot_started("docs");
    let archiver = agent.wait_archiving();
    processes::kill(archiver.pid);
    let run = snapshot.run();
    run.assert_failed("archiver_killed");
    faulty.heal("backup");
    assert_nothing_is_left(&world, &mut agent, &run, "archiver_killed", &[]);
    let good = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&good]);
}

#[test]
fn killed_worker_fails_the_run_and_takes_its_archiver_along() {
    let world = World::new("gate-worker-killed");
    let (mut agent, faulty) = slow_agent(&world);
    let snapshot = agent.snapshot_started("docs");
    let archiver = agent.wait_archiving();
    processes::kill(agent.wait_part("worker").pid);
    let run = snapshot.run();
    run.assert_failed("worker_killed");
    wait_until("the archiver to end with its worker", Duration::from_secs(10), || !processes::is_alive(archiver.pid));
    faulty.heal("backup");
    assert_nothing_is_left(&world, &mut agent, &run, "worker_killed", &[]);
}

/// Brings an agent to the moment between the archiver's exit code 3 and the removal of its snapshot.
fn agent_before_the_removal(world: &World) -> (Agent, FaultyRestic, String) {
    let faulty = FaultyRestic::new(&world.at("bin"));
    let (builder, _) = agent_of_nobody(world);
    let agent = builder.restic(&faulty).started();
    faulty.hang_on("forget");
    let asked = agent.cli(&["snapshot", "docs", "--detach", "--json"]).json();
    faulty.wait_reached("forget");
    let committed = agent.repository("local").snapshots();
    assert_eq!(committed.len(), 1, "restic commits before it exits with 3; the test caught the moment");
    let uid = asked["run_uid"].as_str().unwrap_or_else(|| panic!("no run_uid in {asked}")).to_owned();
    (agent, faulty, uid)
}

fn assert_interrupted(world: &World, agent: &mut Agent, uid: &str) {
    let run = agent.wait_last_run_ended();
    assert_eq!(run.uid(), uid);
    run.assert_failed("interrupted");
    assert_nothing_is_left(world, agent, &run, "interrupted", &[]);
}

#[test]
fn daemon_killed_before_the_removal_leaves_nothing_after_its_next_start() {
    if !is_root_or_skips("daemon_killed_before_the_removal_leaves_nothing_after_its_next_start") {
        return;
    }
    let world = World::new("gate-daemon-killed");
    let (mut agent, faulty, uid) = agent_before_the_removal(&world);
    let below = processes::descendants(agent.pid());
    agent.kill9();
    // As when its whole cgroup dies.
    below.iter().for_each(|process| processes::kill(process.pid));
    faulty.heal("forget");
    agent.start();
    assert_interrupted(&world, &mut agent, &uid);
}

#[test]
fn runner_killed_before_the_removal_leaves_nothing() {
    if !is_root_or_skips("runner_killed_before_the_removal_leaves_nothing") {
        return;
    }
    let world = World::new("gate-runner-killed");
    let (mut agent, faulty, uid) = agent_before_the_removal(&world);
    processes::kill(agent.wait_part("runner").pid);
    faulty.heal("forget");
    assert_interrupted(&world, &mut agent, &uid);
}

#[test]
fn stream_whose_producer_fails_half_way_commits_nothing() {
    let world = World::new("gate-producer");
    let producer = files::write_script(
        world.at("bin/dump"),
        "head -c 5000000 /dev/urandom\necho 'connection to the database was lost' >&2\nexit 1",
    );
    let producer = producer.to_string_lossy().into_owned();
    let mut agent = world.agent().allowed(Service::command("dump", &[&producer], "dump.sql")).started();
    let run = agent.snapshot("dump");
    run.assert_failed("producer_failed");
    assert!(run.text("log_tail").contains("connection to the database was lost"), "{run:?}");
    assert_nothing_is_left(&world, &mut agent, &run, "producer_failed", &[]);
}

/// A producer that writes, leaves a mark and then waits until the file `go` is there.
fn waiting_producer(world: &World) -> (Service, PathBuf, PathBuf) {
    let (mark, go) = (world.at("producer.mark"), world.at("producer.go"));
    let body = format!(
        "head -c 5000000 /dev/urandom\ntouch {}\nwhile [ ! -e {} ]; do sleep 0.05; done",
        mark.display(),
        go.display()
    );
    let producer = files::write_script(world.at("bin/dump"), &body).to_string_lossy().into_owned();
    (Service::command("dump", &[&producer], "dump.sql"), mark, go)
}

fn wait_mark(mark: &Path) {
    wait_until("the producer to have written its half", Duration::from_secs(60), || mark.exists());
}

#[test]
fn stream_with_a_killed_worker_commits_nothing() {
    let world = World::new("gate-stream-worker");
    let (service, mark, _) = waiting_producer(&world);
    let mut agent = world.agent().allowed(service).started();
    let snapshot = agent.snapshot_started("dump");
    wait_mark(&mark);
    processes::kill(agent.wait_part("worker").pid);
    let run = snapshot.run();
    run.assert_failed("worker_killed");
    assert_nothing_is_left(&world, &mut agent, &run, "worker_killed", &[]);
    wait_until("the producer to be gone", Duration::from_secs(10), || {
        processes::marked(&world.at("bin/dump").to_string_lossy()).is_empty()
    });
}

#[test]
fn stream_with_a_killed_producer_commits_nothing() {
    let world = World::new("gate-stream-producer");
    let (service, mark, _) = waiting_producer(&world);
    let mut agent = world.agent().allowed(service).started();
    let snapshot = agent.snapshot_started("dump");
    wait_mark(&mark);
    let program = world.at("bin/dump").to_string_lossy().into_owned();
    let producer = processes::descendants(agent.pid()).into_iter().find(|p| {
        p.argv.first().is_some_and(|a| a.ends_with("bash")) && p.names(&program) || p.argv.first() == Some(&program)
    });
    processes::kill(producer.expect("a producer").pid);
    let run = snapshot.run();
    run.assert_failed("producer_failed");
    assert_nothing_is_left(&world, &mut agent, &run, "producer_failed", &[]);
}

#[test]
fn stream_with_every_process_killed_at_once_commits_nothing() {
    let world = World::new("gate-stream-all");
    let (service, mark, _) = waiting_producer(&world);
    let mut agent = world.agent().allowed(service).started();
    let asked = agent.cli(&["snapshot", "dump", "--detach", "--json"]).json();
    wait_mark(&mark);
    let below = processes::descendants(agent.pid());
    agent.kill9();
    below.iter().for_each(|process| processes::kill(process.pid));
    agent.start();
    let run = agent.wait_last_run_ended();
    assert_eq!(asked["run_uid"], run.uid());
    run.assert_failed("interrupted");
    assert_nothing_is_left(&world, &mut agent, &run, "interrupted", &[]);
}

#[test]
fn stream_with_runner_and_worker_killed_together_commits_nothing() {
    // Whoever feeds restic closes its standard input by dying; restic would commit what it has.
    let world = World::new("gate-stream-feeder");
    let (service, mark, _) = waiting_producer(&world);
    let mut agent = world.agent().allowed(service).started();
    let asked = agent.cli(&["snapshot", "dump", "--detach", "--json"]).json();
    wait_mark(&mark);
    let parts: Vec<_> = agent.parts("worker").into_iter().chain(agent.parts("runner")).collect();
    assert!(parts.len() >= 2, "{parts:?}");
    parts.iter().for_each(|part| processes::kill(part.pid));
    let run = agent.wait_last_run_ended();
    assert_eq!(asked["run_uid"], run.uid());
    assert_eq!(run.text("status"), "failed", "{run:?}");
    assert_nothing_is_left(&world, &mut agent, &run, run.text("error_class"), &[]);
}

#[test]
fn file_that_vanishes_during_the_archive_is_counted_apart_and_the_run_succeeds() {
    let world = World::new("gate-vanish");
    // restic reads a folder's names at once and opens its files one after the other, as its readers come
    // free: when the first pack is stored, the last names are known and far from being opened.
    let source = world.at("source");
    for number in 0..8_000 {
        files::write(source.join(format!("a-{number:05}.bin")), files::random_bytes(10_000));
    }
    for number in 0..40 {
        files::write(source.join(format!("z-vanishing-{number}.txt")), "soon gone");
    }
    let faulty = FaultyRestic::new(&world.at("bin"));
    faulty.slow_down(20_000);
    let agent = world.agent().restic(&faulty).allowed(Service::files("docs", [&source])).started();
    let snapshot = agent.snapshot_started("docs");
    agent.wait_archiving();
    for number in 0..40 {
        std::fs::remove_file(source.join(format!("z-vanishing-{number}.txt"))).expect("a file to remove");
    }
    faulty.heal("backup");
    let run = snapshot.run();
    assert_eq!(run.text("status"), "success", "{run:?}");
    assert_eq!(run.number("unreadable"), 0, "{run:?}");
    assert!(run.number("vanished") >= 1, "{run:?}");
    agent.assert_repository_holds(&[&run]);
}

#[test]
fn removal_that_fails_is_owed_and_done_at_the_next_start() {
    if !is_root_or_skips("removal_that_fails_is_owed_and_done_at_the_next_start") {
        return;
    }
    let world = World::new("gate-owed");
    let faulty = FaultyRestic::new(&world.at("bin"));
    let (builder, _) = agent_of_nobody(&world);
    let mut agent = builder.restic(&faulty).started();
    faulty.on("forget", "echo 'the disk is busy' >&2; exit 1");
    let run = agent.snapshot("docs");
    run.assert_failed("source_unreadable");
    assert_eq!(agent.repository("local").snapshots().len(), 1, "the partial snapshot could not be removed yet");
    let refused = agent.restore(run.uid(), &world.at("must-stay-away"));
    assert_ne!(refused.code, Some(0), "what is there is still not offered: {refused}");
    faulty.heal("forget");
    assert_nothing_is_left(&world, &mut agent, &run, "source_unreadable", &[]);
}

/// Makes restic's first, second, third ... call of a run go wrong, until the run no longer gets that far.
fn fault_at_every_call(world: &World, instead: &str) {
    let faulty = FaultyRestic::new(&world.at("bin"));
    let source = world.source("source");
    let mut agent = world.agent().restic(&faulty).allowed(Service::files("docs", [&source])).started();
    let mut good: Vec<Run> = Vec::new();
    for number in 1.. {
        assert!(number < 30, "a run does not call restic so often");
        files::write(source.join("changing.txt"), format!("version {number}"));
        faulty.on_call(number, instead);
        let run = agent.snapshot("docs");
        let reached = !faulty.is_waiting();
        faulty.heal("any");
        if run.text("status") == "success" {
            good.push(run);
        } else {
            assert!(reached, "it failed without a fault: {run:?}");
            assert!(!run.text("error_message").is_empty() && run.text("artifact_url").is_empty(), "{run:?}");
        }
        agent.stop();
        agent.start();
        agent.wait_repository_holds(&good.iter().collect::<Vec<_>>());
        if !reached {
            assert!(number > 2, "the faults were never reached");
            return;
        }
    }
}

#[test]
fn restic_that_fails_at_any_call_leaves_only_whole_snapshots() {
    fault_at_every_call(&World::new("gate-every-fails"), "exit 1");
}

#[test]
fn restic_that_is_killed_at_any_call_leaves_only_whole_snapshots() {
    fault_at_every_call(&World::new("gate-every-killed"), "kill -9 $$");
}

#[test]
fn restic_that_dies_after_it_committed_leaves_only_whole_snapshots() {
    // It does its work, and dies before it can say so.
    fault_at_every_call(&World::new("gate-every-after"), "/usr/bin/restic \"$@\" >/dev/null; kill -9 $$");
}
