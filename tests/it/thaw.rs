//! `hestner-agent thaw`: releases what runs have left held, as often as anybody likes, and leaves alone what
//! goes as it should.

use std::path::PathBuf;
use std::time::Duration;

use hestner_tests::processes::Process;
use hestner_tests::stage::{Stage, Start, Step, WINDOW};
use hestner_tests::{
    Agent, Cmd, Hook, Service, World, clock, files, is_root_or_skips, processes, wait_for, wait_until,
};
use nix::sys::signal::Signal;

/// A service whose hooks note what they do, and hang for as long as a file says so.
struct Noting {
    world: World,
    agent: Agent,
    notes: PathBuf,
    hang: PathBuf,
}

impl Noting {
    fn new(name: &str) -> Self {
        let world = World::new(name);
        let (notes, hang) = (world.at("notes.txt"), world.at("hang-on"));
        let body = format!(
            "echo \"$1 $2\" >> {notes}\nwhile [ -e {hang}-$1-$2 ]; do sleep 0.02; done\necho \"$1 $2 done\" >> {notes}",
            notes = notes.display(),
            hang = hang.display()
        );
        let program = files::write_script(world.at("hooks/note"), &body).to_string_lossy().into_owned();
        let hook =
            |name: &str| Hook::new(name).pre(&[&program, "pre", name]).post(&[&program, "post", name]).timeout("60s");
        let service = Service::files("docs", [world.source("source")]).hook(hook("a")).hook(hook("b"));
        let agent = world.agent().allowed(service).started();
        Self { world, agent, notes, hang }
    }

    fn hang(&self, what: &str) {
        files::write(format!("{}-{what}", self.hang.display()), "");
    }

    fn let_go(&self, what: &str) {
        std::fs::remove_file(format!("{}-{what}", self.hang.display())).expect("the file that makes it hang");
    }

    fn notes(&self) -> Vec<String> {
        files::lines(&self.notes)
    }

    fn count(&self, line: &str) -> usize {
        self.notes().iter().filter(|l| *l == line).count()
    }

    fn wait_note(&self, line: &str) {
        wait_until(line, Duration::from_secs(30), || self.count(line) > 0);
    }

    fn begin(&self) {
        self.agent.cli(&["snapshot", "docs", "--detach"]).ok();
    }

    /// At one stroke: a runner that hears of its daemon's death goes on to its first release.
    fn kill_all(&mut self) {
        let below = processes::descendants(self.agent.pid());
        let stopped = |p: &Process| processes::is_stopped(p.pid) || !processes::is_alive(p.pid);
        below.iter().for_each(|process| processes::send(process.pid, Signal::SIGSTOP));
        wait_until("all of them to stand still", Duration::from_secs(10), || below.iter().all(stopped));
        self.agent.kill9();
        below.iter().for_each(|process| processes::kill(process.pid));
    }

    /// Kills the daemon and all that descends from it, inside the second `pre_freeze`.
    fn kill_all_inside_the_second_pre_hook(&mut self) {
        self.hang("pre-b");
        self.begin();
        self.wait_note("pre b");
        self.kill_all();
        self.let_go("pre-b");
    }

    /// The hook's own process may outlive its supervisor by a moment; the run counts as alive until then.
    fn thaw_until_released(&self) -> serde_json::Value {
        self.agent.cli(&["thaw", "--wait", "30", "--json"]).json()
    }
}

#[test]
fn nothing_to_thaw_is_said_and_is_no_failure() {
    let world = World::new("thaw-nothing");
    let agent = world.agent().written();
    std::fs::remove_dir_all(agent.state()).expect("the state folder");
    assert_eq!(agent.cli(&["thaw"]).ok(), "nothing is held\n");
    assert_eq!(agent.cli(&["thaw", "--wait", "5"]).ok(), "nothing is held\n");
    let told = agent.cli(&["thaw", "--json"]).json();
    assert_eq!((told["runs"].as_array().map(Vec::len), told["holding"].as_array().map(Vec::len)), (Some(0), Some(0)));
    // A package's script calls it also where nothing was ever set up.
    let nowhere = world.at("nowhere/agent.toml");
    let program = hestner_tests::world::bin("hestner-agent");
    assert_eq!(Cmd::new(program).arg("--config").arg(nowhere).arg("thaw").run().code, Some(0));
}

#[test]
fn dead_run_gets_its_releases_in_reverse_order_once_however_often_it_is_thawed() {
    let mut noting = Noting::new("thaw-dead");
    noting.kill_all_inside_the_second_pre_hook();
    let told = noting.thaw_until_released();
    let posts = |noting: &Noting| -> Vec<String> {
        noting.notes().into_iter().filter(|l| l.starts_with("post") && l.ends_with("done")).collect()
    };
    assert_eq!(posts(&noting), ["post b done", "post a done"], "{told}");
    let did: Vec<&str> =
        told["runs"][0]["did"].as_array().expect("what it did").iter().filter_map(|d| d.as_str()).collect();
    assert_eq!(did, ["ran the release of hook `b`", "ran the release of hook `a`"], "{told}");
    assert_eq!(noting.agent.cli(&["thaw"]).ok(), "nothing is held\n");
    noting.agent.start();
    let run = noting.agent.wait_last_run_ended();
    run.assert_failed("interrupted");
    assert!(run.0["warnings"].to_string().contains("release of hook `b`"), "the run tells of it: {run:?}");
    assert_eq!(posts(&noting).len(), 2, "settling finds nothing that is owed");
    noting.agent.snapshot_ok("docs");
}

#[test]
fn two_thaws_at_once_run_each_release_once() {
    let mut noting = Noting::new("thaw-two");
    noting.hang("post-b");
    noting.kill_all_inside_the_second_pre_hook();
    let several: Vec<_> = (0..3).map(|_| noting.agent.command(&["thaw", "--wait", "60"]).start()).collect();
    noting.wait_note("post b");
    noting.let_go("post-b");
    several.into_iter().for_each(|thaw| {
        thaw.ended().ok();
    });
    assert_eq!((noting.count("post b"), noting.count("post a")), (1, 1), "{:?}", noting.notes());
}

#[test]
fn run_that_goes_as_it_should_is_left_alone_and_waited_for() {
    let noting = Noting::new("thaw-alive");
    noting.hang("pre-b");
    noting.begin();
    noting.wait_note("pre b");
    noting.agent.cli(&["thaw"]).ok();
    let waited = noting.agent.cli(&["thaw", "--wait", "1"]);
    assert_eq!(waited.code, Some(1), "{waited}");
    assert!(waited.stderr.contains("service `docs`") && waited.stderr.contains("still_held"), "{waited}");
    assert_eq!(noting.count("post b"), 0, "a living run's hooks are its own");
    let waiting = noting.agent.command(&["thaw", "--wait", "60"]).start();
    noting.let_go("pre-b");
    waiting.ended().ok();
    assert_eq!(noting.count("post a done"), 1, "it waited for the last release");
    let run = noting.agent.wait_last_run_ended();
    assert_eq!(run.text("status"), "success", "{run:?}");
    assert_eq!((noting.count("post b"), noting.count("post a")), (1, 1));
}

#[test]
fn thaw_that_is_told_to_end_brings_what_it_is_at_to_an_end() {
    let mut noting = Noting::new("thaw-signalled");
    noting.hang("post-b");
    noting.kill_all_inside_the_second_pre_hook();
    let thaw = noting.agent.command(&["thaw", "--wait", "60"]).start();
    noting.wait_note("post b");
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        processes::send(thaw.pid(), signal);
    }
    noting.let_go("post-b");
    thaw.ended().ok();
    assert_eq!((noting.count("post b"), noting.count("post a done")), (1, 1), "{:?}", noting.notes());
}

#[test]
fn slip_in_the_settings_keeps_nothing_held() {
    let mut noting = Noting::new("thaw-slip");
    noting.kill_all_inside_the_second_pre_hook();
    noting.agent.change(|agent| agent.setting("limits", "concurrent_runs = 0"));
    assert_eq!(noting.agent.cli(&["status"]).code, Some(64), "these settings have a mistake");
    noting.thaw_until_released();
    assert_eq!((noting.count("post b done"), noting.count("post a done")), (1, 1));
}

#[test]
fn release_that_was_cut_off_is_run_once_more() {
    let mut noting = Noting::new("thaw-cut-off");
    noting.hang("post-b");
    noting.begin();
    noting.wait_note("post b");
    noting.kill_all();
    noting.let_go("post-b");
    noting.thaw_until_released();
    assert_eq!((noting.count("post b done"), noting.count("post a done")), (1, 1), "{:?}", noting.notes());
}

#[test]
fn next_run_of_a_service_waits_for_the_releases_of_the_one_before() {
    let mut noting = Noting::new("thaw-next");
    noting.hang("post-b");
    noting.kill_all_inside_the_second_pre_hook();
    let thaw = noting.agent.command(&["thaw", "--wait", "60"]).start();
    noting.wait_note("post b");
    noting.agent.start();
    noting.begin();
    // The new run is there and waits.
    wait_for("a runner", Duration::from_secs(30), || noting.agent.part("runner"));
    clock::let_pass(Duration::from_millis(500));
    assert_eq!(noting.count("pre a"), 1, "its first hook has to wait: {:?}", noting.notes());
    noting.let_go("post-b");
    thaw.ended().ok();
    wait_until("the second run's end", Duration::from_secs(60), || noting.agent.last_run().text("status") == "success");
    let notes = noting.notes();
    let at = |line: &str, nth: usize| {
        notes.iter().enumerate().filter(|(_, l)| *l == line).nth(nth).map(|(i, _)| i).expect("a note")
    };
    assert!(at("post a done", 0) < at("pre a", 1), "{notes:?}");
    drop(noting.world);
}

fn on_stage(name: &str) -> Option<Stage> {
    is_root_or_skips(name).then(|| Stage::new(name, "ext4", Start::Processes).expect("processes"))
}

#[test]
fn runner_that_stands_still_is_thawed_and_released_without_it_and_cannot_succeed_afterwards() {
    let Some(stage) = on_stage("thaw-stopped") else { return };
    let uid = stage.run_until(Step::Command);
    let begun = clock::monotonic();
    let runner = stage.wait_runner(&uid);
    processes::send(runner, Signal::SIGSTOP);
    stage.writer.wait_progress(begun + WINDOW / 2, Duration::from_secs(20));
    let released = || stage.count_ended(&uid, "post") == 1;
    wait_until("the release that the guard has run", Duration::from_secs(20), released);
    assert!(processes::is_stopped(runner), "its runner had no part in it");
    stage.go_on();
    processes::send(runner, Signal::SIGCONT);
    let run = stage.wait_ended(&uid);
    run.assert_failed("freeze_timeout");
    assert_eq!((stage.count(&uid, "pre"), stage.count(&uid, "post")), (1, 1), "{run:?}");
    assert!(stage.writer.longest_stall(begun) < WINDOW + Duration::from_secs(1));
    stage.agent.snapshot_ok("docs");
}

/// Runner, guard and daemon are dead at once; the filesystem is frozen and nobody is there to thaw it.
fn all_dead_inside_the_window(stage: &mut Stage) -> String {
    let uid = stage.run_until(Step::Command);
    let all = [stage.guards(&uid), vec![stage.wait_runner(&uid)]].concat();
    assert_eq!(all.len(), 3, "the guards of filesystem and hooks, and the runner");
    let below = processes::descendants(stage.agent.pid());
    // At one stroke, so that none can thaw for the others.
    all.iter().for_each(|pid| processes::send(*pid, Signal::SIGSTOP));
    wait_until("all to stand still", WINDOW, || all.iter().all(|pid| processes::is_stopped(*pid)));
    stage.agent.kill9();
    all.iter().for_each(|pid| processes::kill(*pid));
    below.iter().for_each(|process| processes::kill(process.pid));
    wait_until("all of them to be gone", Duration::from_secs(20), || {
        ["runner", "guard", "hook"].iter().all(|word| stage.parts(word).is_empty())
    });
    uid
}

#[test]
fn nobody_left_to_thaw_is_made_good_by_hand() {
    let Some(mut stage) = on_stage("thaw-by-hand") else { return };
    let uid = all_dead_inside_the_window(&mut stage);
    assert!(stage.disk.is_frozen(), "with all of them dead at once it stays frozen");
    let told = stage.agent.cli(&["thaw", "--json"]).json();
    assert!(!stage.disk.is_frozen());
    assert!(told["runs"][0]["did"].to_string().contains("thawed "), "{told}");
    assert_eq!(stage.count_ended(&uid, "post"), 1, "{told}");
    stage.agent.start();
    stage.wait_ended(&uid).assert_failed("interrupted");
    assert_eq!(stage.count(&uid, "post"), 1);
}

#[test]
fn start_of_the_daemon_thaws_what_nobody_else_has() {
    let Some(mut stage) = on_stage("thaw-at-start") else { return };
    let uid = all_dead_inside_the_window(&mut stage);
    assert!(stage.disk.is_frozen());
    stage.agent.start_alone();
    stage.wait_ended(&uid).assert_failed("interrupted");
    assert!(!stage.disk.is_frozen());
    assert_eq!(stage.count_ended(&uid, "post"), 1);
}

#[test]
fn after_a_reboot_nothing_is_thawed_and_every_release_that_is_owed_runs() {
    let Some(mut stage) = on_stage("thaw-reboot") else { return };
    let uid = all_dead_inside_the_window(&mut stage);
    stage.agent.seem_rebooted(&uid, &["freeze.journal", "hook.journal"]);
    // Whatever is frozen now was frozen by somebody else, after the reboot.
    let told = stage.agent.cli(&["thaw", "--json"]).json();
    assert!(stage.disk.is_frozen(), "an earlier life's record thaws nothing: {told}");
    assert_eq!(told["runs"][0]["did"].as_array().map(Vec::len), Some(1), "{told}");
    assert_eq!(stage.count_ended(&uid, "post"), 1, "{told}");
    stage.disk.thaw();
    stage.agent.start();
    stage.wait_ended(&uid).assert_failed("interrupted");
    assert_eq!(stage.count(&uid, "post"), 1);
}

#[test]
fn record_that_cannot_be_read_keeps_no_hook_from_being_released() {
    let Some(mut stage) = on_stage("thaw-garbled") else { return };
    let uid = all_dead_inside_the_window(&mut stage);
    let journal = stage.agent.state().join("runs").join(&uid).join("freeze.journal");
    let text = std::fs::read_to_string(&journal).expect("the guard's record");
    stage.disk.thaw();
    files::write(&journal, "no record\n");
    let thaw = stage.agent.cli(&["thaw"]);
    assert_eq!(thaw.code, Some(1), "it says that it could not read it: {thaw}");
    assert!(thaw.stderr.contains("freeze.journal"), "{thaw}");
    assert_eq!(stage.count_ended(&uid, "post"), 1, "{thaw}");
    files::write(&journal, text);
    stage.agent.start();
    stage.wait_ended(&uid).assert_failed("interrupted");
    assert_eq!(stage.count(&uid, "post"), 1);
}
