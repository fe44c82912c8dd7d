//! Containers that are held for a point: paused or stopped, and running again whatever becomes of the run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use hestner_tests::docker::Docker;
use hestner_tests::mounts::Mounted;
use hestner_tests::{
    Agent, AgentBuilder, Hook, Moment, Run, Service, World, files, is_root_or_skips, processes, tree, wait_until,
};

/// How soon a container runs again after whoever held it died.
const RUNS_AGAIN: Duration = Duration::from_secs(30);

/// Taken apart in this order: the agent's parts, Docker, the disk, the world.
struct Held {
    docker: Docker,
    source: PathBuf,
    disk: Mounted,
    world: World,
}

fn held(name: &str, kind: &str) -> Held {
    let world = World::new(name);
    let disk = Mounted::of_kind(kind, &world.at("disk"));
    let source = disk.path().join("data");
    std::fs::create_dir_all(&source).expect("a folder");
    Held { docker: Docker::start(&world.at("docker")), source, disk, world }
}

impl Held {
    fn agent(&self) -> AgentBuilder {
        self.world
            .agent()
            .setting("inventory", &format!("docker_socket = {:?}", self.docker.socket()))
            .setting("inventory", "systemd = false")
    }

    fn wait_runs(&self, name: &str) {
        wait_until(&format!("{name} to run again"), RUNS_AGAIN, || self.docker.status(name) == "running");
        let lines = self.lines().len();
        wait_until(&format!("{name} to write again"), RUNS_AGAIN, || self.lines().len() > lines);
    }

    fn lines(&self) -> Vec<String> {
        files::lines(&self.source.join("log"))
    }

    fn restored(&self, agent: &Agent, run: &Run) -> Vec<String> {
        let target = self.world.at(&format!("restored-{}", run.uid()));
        agent.restore(run.uid(), &target).ok();
        files::lines(&tree::restored(&target, &self.source).join("log"))
    }
}

fn service(source: &Path, containers: &str) -> Service {
    Service::files("docs", [source]).point_line(&format!("containers = [{containers}]"))
}

#[test]
fn paused_container_writes_nothing_into_the_point_and_runs_on_as_it_was() {
    if !is_root_or_skips("paused_container_writes_nothing_into_the_point_and_runs_on_as_it_was") {
        return;
    }
    let held = held("containers-pause", "btrfs");
    held.docker.run_writer("db", &held.source);
    // Two that are not running, each in its way: they stay so.
    held.docker.run("paused", &[], &["/bin/sleep", "5000"]);
    held.docker.docker(&["pause", "paused"]).ok();
    held.docker.run("stopped", &[], &["/bin/sleep", "5000"]);
    held.docker.docker(&["stop", "-t", "0", "stopped"]).ok();
    let started = held.docker.started_at("db");
    let service = service(&held.source, "\"db\", \"paused\", \"stopped\"").consistency("filesystem");
    let agent = held.agent().allowed(service).started();
    let run = agent.snapshot_ok("docs");
    assert_eq!(run.text("consistency_achieved"), "filesystem", "{run:?}");
    assert!((1..7_000).contains(&run.number("freeze_ms")), "{run:?}");
    assert_eq!(held.docker.started_at("db"), started, "it was paused and not started anew");
    held.wait_runs("db");
    assert_eq!(held.docker.status("paused"), "paused");
    assert_eq!(held.docker.status("stopped"), "exited");
    let stored = held.restored(&agent, &run);
    assert!(stored.len() > 2 && held.lines().starts_with(&stored), "a beginning of what it wrote");
    let format = "{{.Action}} {{.Actor.Attributes.name}}";
    let ask = || held.docker.docker(&["events", "--since", "1h", "--until", "0s", "--format", format]).ok();
    // Docker tells what happened up to the last full second.
    wait_until("Docker to tell of the run", Duration::from_secs(10), || ask().contains("unpause db"));
    let events = ask();
    for (action, times) in [("pause db", 1), ("unpause db", 1), ("pause stopped", 0), ("unpause paused", 0)] {
        assert_eq!(events.lines().filter(|line| *line == action).count(), times, "{action}:\n{events}");
    }
}

#[test]
fn stopped_container_is_down_until_everything_was_read_and_runs_again() {
    if !is_root_or_skips("stopped_container_is_down_until_everything_was_read_and_runs_again") {
        return;
    }
    let held = held("containers-stop", "ext4");
    held.docker.run_writer("db", &held.source);
    held.docker.run("stopped", &[], &["/bin/sleep", "5000"]);
    held.docker.docker(&["stop", "-t", "0", "stopped"]).ok();
    let service = service(&held.source, "\"db\", \"stopped\"").point_line("hold = \"stop\"").consistency("application");
    let agent = held.agent().allowed(service).started();
    agent.archiver().hold_at(Moment::Store);
    let snapshot = agent.snapshot_started("docs");
    agent.archiver().wait_reached(Moment::Store);
    assert_eq!(held.docker.status("db"), "exited", "down while it is read");
    let down = held.lines();
    assert_eq!(down.last().map(String::as_str), Some("end"), "it was told to end and did");
    agent.archiver().go_on();
    let run = snapshot.run();
    assert_eq!(run.text("status"), "success", "{run:?}");
    assert_eq!(run.text("consistency_achieved"), "application", "{run:?}");
    held.wait_runs("db");
    assert_eq!(held.docker.status("stopped"), "exited");
    assert_eq!(held.restored(&agent, &run), down);
}

#[test]
fn downtime_that_is_over_fails_the_run_and_starts_the_container() {
    if !is_root_or_skips("downtime_that_is_over_fails_the_run_and_starts_the_container") {
        return;
    }
    let held = held("containers-downtime", "ext4");
    held.docker.run_writer("db", &held.source);
    // Long enough for the archive to be reached on a busy machine: opening a repository takes seconds.
    let service = service(&held.source, "\"db\"").point_line("hold = \"stop\"").point_line("downtime_max = \"15s\"");
    let agent = held.agent().allowed(service).started();
    agent.archiver().hold_at(Moment::Store);
    let snapshot = agent.snapshot_started("docs");
    agent.archiver().wait_reached(Moment::Store);
    assert_eq!(held.docker.status("db"), "exited");
    held.wait_runs("db");
    agent.archiver().go_on();
    snapshot.run().assert_failed("freeze_timeout");
    agent.wait_repository_holds(&[]);
    assert_eq!(held.docker.status("db"), "running");
}

#[test]
fn container_that_has_to_be_killed_has_not_closed_its_files() {
    if !is_root_or_skips("container_that_has_to_be_killed_has_not_closed_its_files") {
        return;
    }
    let held = held("containers-killed", "ext4");
    files::write(held.source.join("file"), "content");
    // The first process of a container ignores SIGTERM unless it says otherwise.
    held.docker.run("deaf", &["--stop-timeout", "1"], &["/bin/sleep", "5000"]);
    let stops = |name: &str| {
        Service::files(name, [&held.source]).point_line("containers = [\"deaf\"]").point_line("hold = \"stop\"")
    };
    let agent = held.agent().allowed(stops("any")).allowed(stops("strict").consistency("application")).started();
    let run = agent.snapshot_ok("any");
    assert_eq!(run.text("consistency_achieved"), "crash", "{run:?}");
    let run = agent.snapshot("strict");
    run.assert_failed("point_failed");
    assert!(run.text("error_message").contains("did not end within its stop timeout"), "{run:?}");
    assert_eq!(held.docker.status("deaf"), "running");
}

#[test]
fn containers_that_cannot_be_held_are_refused_by_name() {
    if !is_root_or_skips("containers_that_cannot_be_held_are_refused_by_name") {
        return;
    }
    let held = held("containers-refused", "ext4");
    files::write(held.source.join("file"), "content");
    held.docker.run("passing", &["--rm"], &["/bin/sleep", "5000"]);
    let of = |name: &str, containers: &str, hold: &str| {
        let service = Service::files(name, [&held.source]).point_line(&format!("containers = [{containers}]"));
        service.point_line(&format!("hold = {hold:?}"))
    };
    let agent = held
        .agent()
        .allowed(of("missing", "\"nobody\"", "stop"))
        .allowed(of("removed", "\"passing\"", "stop"))
        .allowed(of("nothing", "\"passing\"", "pause"))
        .started();
    for (name, reason) in [
        ("missing", "container `nobody` cannot be stopped: there is no such container"),
        ("removed", "started with `--rm`"),
        ("nothing", "paused containers run again before anything is read"),
    ] {
        let run = agent.snapshot(name);
        run.assert_failed("point_failed");
        assert!(run.text("error_message").contains(reason), "{run:?}");
    }
    assert_eq!(held.docker.status("passing"), "running");
}

#[test]
fn container_runs_again_wherever_its_run_is_killed() {
    if !is_root_or_skips("container_runs_again_wherever_its_run_is_killed") {
        return;
    }
    let held = held("containers-faults", "ext4");
    held.docker.run_writer("db", &held.source);
    let marks = held.world.at("marks");
    std::fs::create_dir_all(&marks).expect("a folder");
    let at_point = format!("touch {0}/point; while [ ! -e {0}/go ]; do sleep 0.05; done", marks.display());
    let at_point = files::write_script(held.world.at("point/take"), &at_point).display().to_string();
    let paused = service(&held.source, "\"db\"")
        .point_line("kind = \"fsfreeze\"")
        .point_program("command", &[&at_point])
        .point_line(&format!("read_from = {:?}", held.world.source("copy")));
    let stopped =
        Service::files("stopped", [&held.source]).point_line("containers = [\"db\"]").point_line("hold = \"stop\"");
    let mut agent = held.agent().setting("freeze", "window = \"5s\"").allowed(paused).allowed(stopped).started();
    for whole in [false, true] {
        // Paused, and its filesystem frozen.
        agent.cli(&["snapshot", "docs", "--detach"]).ok();
        wait_until("the point to be taken", Duration::from_secs(30), || marks.join("point").exists());
        assert_eq!(held.docker.status("db"), "paused");
        assert!(held.disk.is_frozen());
        kill(&mut agent, whole);
        held.wait_runs("db");
        assert!(!held.disk.is_frozen());
        std::fs::remove_file(marks.join("point")).expect("a mark");
        start(&mut agent, whole);
        agent.wait_last_run_ended().assert_failed("interrupted");

        // Stopped, while it is read.
        agent.archiver().hold_at(Moment::Store);
        agent.cli(&["snapshot", "stopped", "--detach"]).ok();
        agent.archiver().wait_reached(Moment::Store);
        assert_eq!(held.docker.status("db"), "exited");
        kill(&mut agent, whole);
        held.wait_runs("db");
        agent.archiver().go_on();
        start(&mut agent, whole);
        agent.wait_last_run_ended().assert_failed("interrupted");
    }
    agent.wait_repository_holds(&[]);
    assert_eq!(agent.snapshot_ok("stopped").text("consistency_achieved"), "application");
    held.wait_runs("db");
}

#[test]
fn runner_that_stands_still_keeps_no_container_paused_and_nothing_frozen() {
    if !is_root_or_skips("runner_that_stands_still_keeps_no_container_paused_and_nothing_frozen") {
        return;
    }
    let held = held("containers-still", "xfs");
    held.docker.run_writer("db", &held.source);
    let marks = held.world.at("marks");
    std::fs::create_dir_all(&marks).expect("a folder");
    let at_point = format!("touch {}/point; sleep 300", marks.display());
    let at_point = files::write_script(held.world.at("point/take"), &at_point).display().to_string();
    let service = service(&held.source, "\"db\"")
        .point_line("kind = \"fsfreeze\"")
        .point_program("command", &[&at_point])
        .point_line(&format!("read_from = {:?}", held.world.source("copy")));
    let agent = held.agent().setting("freeze", "window = \"2s\"").allowed(service).started();
    let snapshot = agent.snapshot_started("docs");
    wait_until("the point to be taken", Duration::from_secs(30), || marks.join("point").exists());
    let lines = held.lines().len();
    let runner = agent.wait_part("runner").pid;
    processes::send(runner, Signal::SIGSTOP);
    // The window, a second, and what Docker needs on a busy machine.
    wait_until("the container to write again", Duration::from_secs(5), || held.lines().len() > lines);
    assert_eq!(held.docker.status("db"), "running");
    assert!(!held.disk.is_frozen());
    processes::send(runner, Signal::SIGCONT);
    snapshot.run().assert_failed("freeze_timeout");
    assert_eq!(held.docker.status("db"), "running");
    agent.assert_repository_holds(&[]);
}

#[test]
fn container_that_is_being_stopped_when_its_run_dies_runs_again() {
    if !is_root_or_skips("container_that_is_being_stopped_when_its_run_dies_runs_again") {
        return;
    }
    let held = held("containers-midway", "ext4");
    // It takes its time to end, so that the request is under way inside Docker when its sender dies.
    let script = "trap 'sleep 2; exit 0' TERM; while :; do echo x >>/data/log; sleep 0.05; done";
    let volume = format!("{}:/data", held.source.display());
    held.docker.run("slow", &["-v", &volume], &["/bin/sh", "-c", script]);
    let service = service(&held.source, "\"slow\"").point_line("hold = \"stop\"");
    let agent = held.agent().allowed(service).started();
    let before = held.docker.started_at("slow");
    agent.cli(&["snapshot", "docs", "--detach"]).ok();
    let runs = agent.state().join("runs");
    let claimed = || walk(&runs).iter().any(|path| path.ends_with("container-0"));
    wait_until("the container to be claimed", Duration::from_secs(20), claimed);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(held.docker.status("slow"), "running", "it is still on its way down");
    processes::kill(agent.wait_part("runner").pid);
    wait_until("the container to be started anew", RUNS_AGAIN, || {
        held.docker.status("slow") == "running" && held.docker.started_at("slow") != before
    });
    agent.wait_last_run_ended().assert_failed("interrupted");
    agent.assert_repository_holds(&[]);
}

#[test]
fn stopped_container_that_a_run_owes_is_started_after_a_reboot() {
    if !is_root_or_skips("stopped_container_that_a_run_owes_is_started_after_a_reboot") {
        return;
    }
    let held = held("containers-reboot", "ext4");
    held.docker.run_writer("db", &held.source);
    held.docker.run("stopped", &[], &["/bin/sleep", "5000"]);
    held.docker.docker(&["stop", "-t", "0", "stopped"]).ok();
    let notes = held.world.at("notes");
    let note = files::write_script(held.world.at("hooks/note"), &format!("echo $1 >> {}", notes.display()));
    let note = note.display().to_string();
    let service = service(&held.source, "\"db\", \"stopped\"")
        .point_line("hold = \"stop\"")
        .hook(Hook::new("app").pre(&[&note, "pre"]).post(&[&note, "post"]));
    let mut agent = held.agent().allowed(service).started();
    agent.archiver().hold_at(Moment::Store);
    let begun = agent.cli(&["snapshot", "docs", "--detach", "--json"]).json();
    let uid = begun["run_uid"].as_str().expect("a run").to_owned();
    agent.archiver().wait_reached(Moment::Store);
    assert_eq!(held.docker.status("db"), "exited");
    // A power cut: nobody is left who could let anything go.
    let below = processes::descendants(agent.pid());
    below.iter().for_each(|process| processes::send(process.pid, Signal::SIGSTOP));
    agent.kill9();
    below.iter().for_each(|process| processes::kill(process.pid));
    wait_until("all of them to be gone", Duration::from_secs(20), || below.iter().all(|p| !processes::is_alive(p.pid)));
    assert_eq!((held.docker.status("db").as_str(), files::lines(&notes)), ("exited", vec!["pre".to_owned()]));
    agent.seem_rebooted(&uid, &["hold.journal", "hook.journal"]);
    agent.archiver().go_on();
    agent.start();
    held.wait_runs("db");
    agent.wait_last_run_ended().assert_failed("interrupted");
    assert_eq!(held.docker.status("stopped"), "exited", "what was stopped before stays so");
    assert_eq!(files::lines(&notes), ["pre", "post"]);
    agent.wait_repository_holds(&[]);
}

#[test]
fn container_that_somebody_else_lets_go_is_no_point_in_time() {
    if !is_root_or_skips("container_that_somebody_else_lets_go_is_no_point_in_time") {
        return;
    }
    let held = held("containers-touched", "ext4");
    held.docker.run_writer("db", &held.source);
    let service = service(&held.source, "\"db\"").point_line("hold = \"stop\"");
    let agent = held.agent().allowed(service).started();
    // Still running when it is let go, or stopped again by then: either way it wrote meanwhile.
    for stops_again in [false, true] {
        agent.archiver().hold_at(Moment::Store);
        let snapshot = agent.snapshot_started("docs");
        agent.archiver().wait_reached(Moment::Store);
        held.docker.docker(&["start", "db"]).ok();
        if stops_again {
            held.docker.docker(&["stop", "db"]).ok();
        }
        agent.archiver().go_on();
        let run = snapshot.run();
        run.assert_failed("point_failed");
        assert!(run.text("error_message").contains("somebody else"), "{run:?}");
        held.wait_runs("db");
    }
    agent.wait_repository_holds(&[]);
}

#[test]
fn docker_that_does_not_answer_is_asked_until_the_container_runs() {
    if !is_root_or_skips("docker_that_does_not_answer_is_asked_until_the_container_runs") {
        return;
    }
    let held = held("containers-deaf", "ext4");
    held.docker.run_writer("db", &held.source);
    let marks = held.world.at("marks");
    std::fs::create_dir_all(&marks).expect("a folder");
    let at_point = format!("touch {0}/point; while [ ! -e {0}/go ]; do sleep 0.05; done", marks.display());
    let at_point = files::write_script(held.world.at("point/take"), &at_point).display().to_string();
    let service = service(&held.source, "\"db\"")
        .point_line("kind = \"fsfreeze\"")
        .point_program("command", &[&at_point])
        .point_line(&format!("read_from = {:?}", held.world.source("copy")));
    let agent = held.agent().setting("freeze", "window = \"3s\"").allowed(service).started();
    let snapshot = agent.snapshot_started("docs");
    wait_until("the point to be taken", Duration::from_secs(30), || marks.join("point").exists());
    processes::send(held.docker.pid(), Signal::SIGSTOP);
    files::write(marks.join("go"), "");
    // The filesystem needs no Docker to be thawed; the container does, also beyond the window.
    wait_until("the filesystem to thaw", Duration::from_secs(4), || !held.disk.is_frozen());
    std::thread::sleep(Duration::from_secs(4));
    processes::send(held.docker.pid(), Signal::SIGCONT);
    held.wait_runs("db");
    snapshot.run().assert_failed("freeze_timeout");
    agent.assert_repository_holds(&[]);
}

fn walk(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

#[test]
fn stream_from_a_stopped_container_is_read_while_it_is_down() {
    if !is_root_or_skips("stream_from_a_stopped_container_is_read_while_it_is_down") {
        return;
    }
    let held = held("containers-stream", "ext4");
    held.docker.run_writer("db", &held.source);
    let log = held.source.join("log").display().to_string();
    let service = Service::command("docs", &["/usr/bin/cat", &log], "log")
        .point_line("containers = [\"db\"]")
        .point_line("hold = \"stop\"");
    let agent = held.agent().allowed(service).started();
    let run = agent.snapshot_ok("docs");
    held.wait_runs("db");
    let target = held.world.at("restored");
    agent.restore(run.uid(), &target).ok();
    let stored = walk(&target);
    let stored = stored.iter().find(|path| path.ends_with("log")).expect("the stream");
    assert_eq!(files::lines(stored).last().map(String::as_str), Some("end"), "it was down when it was read");
}

#[test]
fn filesystem_with_docker_on_it_is_never_frozen() {
    if !is_root_or_skips("filesystem_with_docker_on_it_is_never_frozen") {
        return;
    }
    let world = World::new("containers-data");
    let disk = Mounted::of_kind("ext4", &world.at("disk"));
    let docker = Docker::start(&disk.path().join("docker"));
    let source = disk.path().join("data");
    files::write(source.join("file"), "content");
    let service = Service::files("docs", [&source])
        .point_line("kind = \"fsfreeze\"")
        .point_program("command", &["/bin/true"])
        .point_line(&format!("read_from = {:?}", world.source("copy")));
    let socket = format!("docker_socket = {:?}", docker.socket());
    let agent = world.agent().setting("inventory", &socket).allowed(service).started();
    let run = agent.snapshot("docs");
    run.assert_failed("point_failed");
    assert!(run.text("error_message").contains("Docker's data"), "{run:?}");
}

/// The runner alone, or the daemon and it at once.
fn kill(agent: &mut Agent, whole: bool) {
    let runner = agent.wait_part("runner").pid;
    if whole {
        agent.kill9();
    }
    processes::kill(runner);
}

fn start(agent: &mut Agent, whole: bool) {
    if whole {
        agent.start();
    }
}
