//! What hooks alone hold has a guard and a time as well: a runner that stands still keeps no service quiesced.

use std::path::PathBuf;
use std::time::Duration;

use hestner_tests::{Agent, Hook, Service, World, clock, files, processes, wait_for, wait_until};
use nix::sys::signal::Signal;

const WINDOW: Duration = Duration::from_secs(1);
/// How long a hook may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// What its supervisor may take to end it, and a busy machine to start the release.
const GRACE: Duration = Duration::from_secs(5);

/// A service that is held by a hook and by nothing else.
struct Quiesced {
    agent: Agent,
    notes: PathBuf,
    hang: PathBuf,
    _world: World,
}

impl Quiesced {
    fn new(name: &str) -> Self {
        Self::with_hooks(name, &[""])
    }

    /// With a hook for each suffix of what it notes.
    fn with_hooks(name: &str, suffixes: &[&str]) -> Self {
        let world = World::new(name);
        let (notes, hang) = (world.at("notes.txt"), world.at("hang"));
        let body = format!(
            "echo $1 >> {notes}\nwhile [ -e {hang}-$1 ]; do sleep 0.02; done",
            notes = notes.display(),
            hang = hang.display()
        );
        let program = files::write_script(world.at("hooks/note"), &body).to_string_lossy().into_owned();
        let mut service = Service::files("docs", [world.source("source")]);
        for suffix in suffixes {
            let [pre, post] = ["pre", "post"].map(|word| format!("{word}{suffix}"));
            let hook = Hook::new(&format!("db{suffix}")).pre(&[&program, &pre]).post(&[&program, &post]);
            service = service.hook(hook.timeout("2s"));
        }
        let agent = world.agent().setting("freeze", "window = \"1s\"").allowed(service).started();
        Self { agent, notes, hang, _world: world }
    }

    /// From now on what notes this word hangs.
    fn hang(&self, word: &str) {
        files::write(format!("{}-{word}", self.hang.display()), "");
    }

    fn let_go(&self, word: &str) {
        std::fs::remove_file(format!("{}-{word}", self.hang.display())).expect("the file that makes it hang");
    }

    fn notes(&self) -> Vec<String> {
        files::lines(&self.notes)
    }

    fn begin(&self) -> String {
        let asked = self.agent.cli(&["snapshot", "docs", "--detach", "--json"]).json();
        asked["run_uid"].as_str().expect("a run").to_owned()
    }

    fn runner_of(&self, uid: &str) -> i32 {
        let lock = self.agent.state().join("runs").join(uid).join("alive");
        let holds = |p: &processes::Process| p.is_part("runner") && processes::has_open(p.pid, &lock);
        wait_for("the runner", GRACE, || processes::all().into_iter().find(holds)).pid
    }

    fn guard_of(&self, uid: &str) -> i32 {
        let journal = self.agent.state().join("runs").join(uid).join("hook.journal");
        let holds = |p: &processes::Process| p.is_part("guard") && processes::has_open(p.pid, &journal);
        wait_for("the guard", GRACE, || processes::all().into_iter().find(holds)).pid
    }
}

#[test]
fn runner_that_stands_still_between_hooks_has_them_released_without_it() {
    let quiesced = Quiesced::new("hook-guard-between");
    let failpoint = files::write(quiesced.agent.state().join("failpoint"), "taken stop");
    let uid = quiesced.begin();
    let runner = quiesced.runner_of(&uid);
    wait_until("the runner to stand still", GRACE, || processes::is_stopped(runner));
    std::fs::remove_file(failpoint).expect("the failpoint");
    assert_eq!(quiesced.notes(), ["pre"]);
    wait_until("the release", WINDOW + GRACE, || quiesced.notes() == ["pre", "post"]);
    assert!(processes::is_stopped(runner), "nobody has continued it");
    processes::send(runner, Signal::SIGCONT);
    quiesced.agent.wait_last_run_ended().assert_failed("freeze_timeout");
    assert_eq!(quiesced.notes(), ["pre", "post"], "the runner does not release once more");
    quiesced.agent.snapshot_ok("docs");
}

#[test]
fn runner_that_stands_still_in_a_pre_hook_has_it_ended_and_released_without_it() {
    let quiesced = Quiesced::new("hook-guard-pre");
    quiesced.hang("pre");
    let uid = quiesced.begin();
    wait_until("the hook to run", GRACE, || quiesced.notes() == ["pre"]);
    let runner = quiesced.runner_of(&uid);
    processes::send(runner, Signal::SIGSTOP);
    wait_until("the release", TIMEOUT + GRACE, || quiesced.notes() == ["pre", "post"]);
    processes::send(runner, Signal::SIGCONT);
    let run = quiesced.agent.wait_last_run_ended();
    assert!(["hook_timeout", "freeze_timeout"].contains(&run.text("error_class")), "{run:?}");
    assert_eq!(quiesced.notes(), ["pre", "post"]);
    quiesced.let_go("pre");
    quiesced.agent.snapshot_ok("docs");
}

#[test]
fn hook_whose_runner_was_killed_is_released_at_once_and_after_its_own_end() {
    let mut quiesced = Quiesced::new("hook-guard-killed");
    quiesced.hang("pre");
    let uid = quiesced.begin();
    wait_until("the hook to run", GRACE, || quiesced.notes() == ["pre"]);
    let runner = quiesced.runner_of(&uid);
    // Without a daemon: only the guard is left to have it released.
    quiesced.agent.kill9();
    processes::kill(runner);
    let killed = clock::now();
    wait_until("the release", GRACE, || quiesced.notes() == ["pre", "post"]);
    println!("released {} ms after runner and daemon were killed", killed.elapsed().as_millis());
    let program = quiesced.notes.with_file_name("hooks");
    assert!(processes::marked(&program.to_string_lossy()).is_empty(), "the pre hook is gone before its release");
    quiesced.let_go("pre");
    quiesced.agent.start();
    quiesced.agent.wait_last_run_ended().assert_failed("interrupted");
    assert_eq!(quiesced.notes(), ["pre", "post"]);
}

#[test]
fn run_whose_guard_of_hooks_is_lost_is_no_success() {
    let quiesced = Quiesced::new("hook-guard-lost");
    quiesced.hang("pre");
    let uid = quiesced.begin();
    wait_until("the hook to run", GRACE, || quiesced.notes() == ["pre"]);
    processes::kill(quiesced.guard_of(&uid));
    quiesced.let_go("pre");
    quiesced.agent.wait_last_run_ended().assert_failed("guard_lost");
    assert_eq!(quiesced.notes(), ["pre", "post"]);
}

#[test]
fn runner_that_stands_still_in_a_release_keeps_the_other_hooks_from_nothing() {
    let quiesced = Quiesced::with_hooks("hook-guard-release", &["-a", "-b"]);
    quiesced.hang("post-b");
    let uid = quiesced.begin();
    wait_until("the first release", WINDOW + GRACE, || quiesced.notes() == ["pre-a", "pre-b", "post-b"]);
    let runner = quiesced.runner_of(&uid);
    processes::send(runner, Signal::SIGSTOP);
    let all = ["pre-a", "pre-b", "post-b", "post-a"];
    wait_until("the other release", TIMEOUT + GRACE + GRACE, || quiesced.notes() == all);
    quiesced.let_go("post-b");
    processes::send(runner, Signal::SIGCONT);
    assert_eq!(quiesced.agent.wait_last_run_ended().text("status"), "failed");
    assert_eq!(quiesced.notes(), all, "each was released once");
    quiesced.agent.snapshot_ok("docs");
}

#[test]
fn pre_hook_whose_guard_is_stopped_is_ended_before_its_release() {
    let quiesced = Quiesced::new("hook-guard-term");
    quiesced.hang("pre");
    let uid = quiesced.begin();
    wait_until("the hook to run", GRACE, || quiesced.notes() == ["pre"]);
    processes::send(quiesced.guard_of(&uid), Signal::SIGTERM);
    quiesced.agent.wait_last_run_ended().assert_failed("guard_lost");
    let program = quiesced.notes.with_file_name("hooks");
    assert!(processes::marked(&program.to_string_lossy()).is_empty(), "the pre hook is gone");
    assert_eq!(quiesced.notes(), ["pre", "post"]);
    quiesced.let_go("pre");
    quiesced.agent.snapshot_ok("docs");
}
