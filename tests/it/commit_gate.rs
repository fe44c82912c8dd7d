//! Nothing partial is ever counted, kept or offered for restore: each fault ends as `failed` with its own
//! class, and after the next start the repository holds no snapshot of it and no lock.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_tests::{
    Agent, AgentBuilder, Archiver, Cmd, Moment, Run, Service, World, files, is_root_or_skips, processes, wait_until,
};

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

// It goes away after it was checked.
#[test]
fn path_that_disappears_while_the_archiver_starts_fails_the_run() {
    let world = World::new("gate-disappears");
    let second = world.source("second");
    let service = Service::files("docs", [&world.source("source"), &second]);
    let mut agent = world.agent().allowed(service).started();
    let archiver = agent.archiver();
    archiver.hold_at(Moment::Store);
    let snapshot = agent.snapshot_started("docs");
    archiver.wait_reached(Moment::Store);
    Cmd::new("mv").arg(&second).arg(second.with_extension("away")).ok();
    archiver.go_on();
    let run = snapshot.run();
    run.assert_failed("source_missing");
    assert_nothing_is_left(&world, &mut agent, &run, "source_missing", &[]);
}

#[test]
fn killed_worker_fails_the_run_and_the_next_one_goes_on_with_a_sound_repository() {
    let world = World::new("gate-worker-killed");
    let source = world.bulky_source("source", 60_000_000);
    let mut agent = world.agent().allowed(Service::files("docs", [source])).started();
    let archiver = agent.archiver();
    archiver.hold_at(Moment::Pack(2));
    let snapshot = agent.snapshot_started("docs");
    archiver.wait_reached(Moment::Pack(2));
    let worker = agent.wait_part("worker").pid;
    processes::kill(worker);
    let run = snapshot.run();
    run.assert_failed("worker_killed");
    assert!(!processes::is_alive(worker));
    archiver.go_on();
    assert_nothing_is_left(&world, &mut agent, &run, "worker_killed", &[]);
    let good = agent.snapshot_ok("docs");
    agent.assert_repository_holds(&[&good]);
    assert_sound(&agent);
}

fn assert_sound(agent: &Agent) {
    let check = agent.repository("local").check();
    assert_eq!(check.code, Some(0), "{check}");
}

/// Brings an agent to the moment before the snapshot of a failed run is removed: its worker died when it had
/// committed.
fn agent_before_the_removal(world: &World) -> (Agent, Archiver, String) {
    let agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let archiver = agent.archiver();
    archiver.kill_once_at(Moment::Stored);
    archiver.hold_at(Moment::Forget);
    let asked = agent.cli(&["snapshot", "docs", "--detach", "--json"]).json();
    archiver.wait_reached(Moment::Forget);
    let committed = agent.repository("local").snapshots();
    assert_eq!(committed.len(), 1, "the test caught the moment");
    let uid = asked["run_uid"].as_str().unwrap_or_else(|| panic!("no run_uid in {asked}")).to_owned();
    (agent, archiver, uid)
}

fn assert_interrupted(world: &World, agent: &mut Agent, uid: &str) {
    let run = agent.wait_last_run_ended();
    assert_eq!(run.uid(), uid);
    run.assert_failed("interrupted");
    assert_nothing_is_left(world, agent, &run, "interrupted", &[]);
}

#[test]
fn daemon_killed_before_the_removal_leaves_nothing_after_its_next_start() {
    let world = World::new("gate-daemon-killed");
    let (mut agent, archiver, uid) = agent_before_the_removal(&world);
    let below = processes::descendants(agent.pid());
    agent.kill9();
    // As when its whole cgroup dies.
    below.iter().for_each(|process| processes::kill(process.pid));
    archiver.go_on();
    agent.start();
    assert_interrupted(&world, &mut agent, &uid);
}

#[test]
fn runner_killed_before_the_removal_leaves_nothing() {
    let world = World::new("gate-runner-killed");
    let (mut agent, archiver, uid) = agent_before_the_removal(&world);
    processes::kill(agent.wait_part("runner").pid);
    archiver.go_on();
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
    // Whoever feeds the archiver ends its stream by dying; it must not take that for an end.
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
    // The archiver reads a folder's names at once and opens its files one after the other. While no pack goes on it
    // reads what its buffers hold, 68 MB at most: the last names are known then and far from being opened.
    let source = world.at("source");
    for number in 0..8_000 {
        files::write(source.join(format!("a-{number:05}.bin")), files::random_bytes(12_000));
    }
    for number in 0..40 {
        files::write(source.join(format!("z-vanishing-{number}.txt")), "soon gone");
    }
    let agent = world.agent().allowed(Service::files("docs", [&source])).started();
    let archiver = agent.archiver();
    archiver.hold_at(Moment::Pack(1));
    let snapshot = agent.snapshot_started("docs");
    archiver.wait_reached(Moment::Pack(1));
    for number in 0..40 {
        std::fs::remove_file(source.join(format!("z-vanishing-{number}.txt"))).expect("a file to remove");
    }
    archiver.go_on();
    let run = snapshot.run();
    assert_eq!(run.text("status"), "success", "{run:?}");
    assert_eq!(run.number("unreadable"), 0, "{run:?}");
    assert!(run.number("vanished") >= 1, "{run:?}");
    agent.assert_repository_holds(&[&run]);
}

#[test]
fn removal_that_fails_is_owed_and_done_at_the_next_start() {
    let world = World::new("gate-owed");
    let mut agent = world.agent().allowed(Service::files("docs", [world.source("source")])).started();
    let archiver = agent.archiver();
    archiver.kill_once_at(Moment::Stored);
    archiver.fail_at(Moment::Forget);
    let run = agent.snapshot("docs");
    run.assert_failed("worker_killed");
    assert_eq!(agent.repository("local").snapshots().len(), 1, "the snapshot could not be removed yet");
    let refused = agent.restore(run.uid(), &world.at("must-stay-away"));
    assert_ne!(refused.code, Some(0), "what is there is still not offered: {refused}");
    archiver.go_on();
    assert_nothing_is_left(&world, &mut agent, &run, "worker_killed", &[]);
}
