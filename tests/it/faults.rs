//! A frozen service always thaws: whatever dies, hangs, stops or fills up, at whichever step of the run.
//!
//! Each case holds a run at a step, proves the freeze where there is one (a second FIFREEZE is refused, the
//! writer beside it stands still), does one thing to it, and then asserts the same: the writer goes on within
//! the window and one second, the run ends as it must, every started `pre_freeze` has its `post_thaw`, and
//! nothing is left behind. How long the writer stood still in each case is printed.

use std::fmt;
use std::time::Duration;

use hestner_tests::booted::Hierarchy;
use hestner_tests::stage::{Stage, Start, Step, WINDOW};
use hestner_tests::units::Unit;
use hestner_tests::writer::InFlight;
use hestner_tests::{clock, is_root_or_skips, processes, wait_until};
use nix::sys::signal::Signal;

/// How long after the window the writer may stand still.
const GRACE: Duration = Duration::from_secs(1);
/// For how long a process is stopped: well beyond the window.
const STOPPED: Duration = Duration::from_millis(1_600);
/// How long what a run has left may take to be cleared away.
const CLEARED_WITHIN: Duration = Duration::from_secs(60);

/// What is done to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    KillRunner,
    KillGuard,
    /// As systemd stops it.
    TermGuard,
    KillRunnerAndGuard,
    KillDaemon,
    /// And later goes on.
    StopDaemon,
    /// All of the unit that runs it.
    KillCgroup,
    KillGuardCgroup,
    KillBothCgroups,
    /// And later goes on.
    StopRunner,
    StopGuard,
    Panic,
    /// The hook or command that runs never ends.
    Hang,
    /// No room in the agent's state.
    StateFull,
    /// A thread of the runner waits for the frozen filesystem when it is killed, so that it cannot die.
    KillBlockedRunner,
    /// The same, and it is not killed.
    BlockRunner,
    /// With everything of its unit.
    KillBlockedCgroup,
}

/// How a run may end: with these classes, or well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    Well,
    As(&'static [&'static str]),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    step: Step,
    fault: Fault,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {:?}", self.fault, self.step)
    }
}

impl Case {
    fn ends(self) -> Ends {
        use Fault as F;
        match self.fault {
            F::KillRunner | F::KillRunnerAndGuard | F::KillCgroup | F::KillBothCgroups | F::Panic => {
                Ends::As(&["interrupted"])
            }
            F::KillBlockedRunner | F::KillBlockedCgroup | F::KillDaemon => Ends::As(&["interrupted"]),
            // FIFREEZE has not come back when the window is over: the one thing that nobody can cancel.
            F::KillGuard | F::StopRunner | F::Hang if self.step == Step::Freezing => Ends::As(&["freeze_stuck"]),
            // The runner waits for the guard first; by then the freeze may have come back.
            F::StopGuard if self.step == Step::Freezing => Ends::As(&["guard_lost", "freeze_stuck"]),
            // A guard of hooks gives each step its time, and this was not longer.
            F::StopGuard if self.step.is_held_by_hooks() => Ends::Well,
            F::KillGuard | F::TermGuard | F::KillGuardCgroup | F::StopGuard => Ends::As(&["guard_lost"]),
            // A runner that goes on cannot turn it into a success; where nothing was frozen it may go on.
            F::StopRunner | F::BlockRunner if self.step.is_frozen() => Ends::As(&["freeze_timeout"]),
            F::StopRunner | F::BlockRunner | F::StopDaemon => Ends::Well,
            F::Hang if self.step == Step::Command => Ends::As(&["freeze_timeout"]),
            F::Hang => Ends::As(&["hook_timeout"]),
            F::StateFull => Ends::As(&["state_full"]),
        }
    }

    /// How often `post_thaw` may have been started, for as often as `pre_freeze` was.
    fn posts(self, pres: usize) -> std::ops::RangeInclusive<usize> {
        // A hook that the runner died in is called once more; so is one whose end could not be noted.
        let died_inside = self.step == Step::PostHook && matches!(self.ends(), Ends::As(["interrupted"]));
        let not_noted = self.fault == Fault::StateFull;
        // The runner goes on until it hears of its daemon's end, and may then end the pre hook before that has
        // written its first line.
        let cancelled_early = self.step == Step::Planned && self.fault == Fault::KillDaemon;
        if pres > 0 && (died_inside || not_noted) || cancelled_early { pres..=pres + 1 } else { pres..=pres }
    }
}

/// One filesystem, one way to start runners, and cases one after the other.
struct Lane {
    name: String,
    stage: Stage,
    stalls: Vec<(String, Duration)>,
}

impl Lane {
    fn new(name: &str, filesystem: &str, start: Start) -> Option<Self> {
        let name = format!("{name}-{filesystem}");
        Some(Self { stage: Stage::new(&format!("faults-{name}"), filesystem, start)?, name, stalls: Vec::new() })
    }

    fn all(&mut self, step: Step, faults: &[Fault]) {
        for fault in faults {
            self.case(Case { step, fault: *fault });
        }
    }

    fn case(&mut self, case: Case) {
        let stage = &self.stage;
        let what = format!("{} {case}", self.name);
        println!("{what}");
        stage.forget_logs();
        let begun = clock::monotonic();
        let uid = self.reach(case);
        if case.step.is_frozen() && case.fault != Fault::Panic {
            self.prove_frozen(&what);
        }
        self.inflict(case, &uid);
        self.judge(case, &uid, begun, &what);
    }

    /// Has a run stand at the case's step.
    fn reach(&self, case: Case) -> String {
        let stage = &self.stage;
        match case.fault {
            Fault::Panic => stage.run_until_failpoint(case.step, "panic"),
            Fault::KillBlockedRunner | Fault::BlockRunner | Fault::KillBlockedCgroup => {
                let file = stage.disk.path().join("blocked.data");
                let _ = std::fs::remove_file(&file);
                let uid = stage.run_until_failpoint(case.step, &format!("block {}", file.display()));
                let runner = stage.wait_runner(&uid);
                assert!(processes::has_blocked_thread(runner), "{case}: no thread of the runner is blocked");
                uid
            }
            _ => stage.run_until(case.step),
        }
    }

    fn prove_frozen(&self, what: &str) {
        let (stage, before) = (&self.stage, self.stage.writer.last());
        assert!(stage.disk.is_frozen(), "{what}: a second freeze must be refused");
        clock::let_pass(Duration::from_millis(100));
        assert_eq!(stage.writer.last(), before, "{what}: the writer must stand still");
    }

    fn inflict(&mut self, case: Case, uid: &str) {
        let stage = &mut self.stage;
        let at_failpoint = case.step.failpoint().is_some();
        match case.fault {
            Fault::KillRunner | Fault::KillBlockedRunner => processes::kill(stage.wait_runner(uid)),
            Fault::KillGuard => processes::kill(stage.wait_guard(uid)),
            Fault::TermGuard => processes::send(stage.wait_guard(uid), Signal::SIGTERM),
            Fault::KillRunnerAndGuard => {
                stage.wait_guard(uid);
                kill_at_once(&[stage.guards(uid), vec![stage.wait_runner(uid)]].concat());
            }
            Fault::StopDaemon => {
                let daemon = stage.agent.pid();
                processes::send(daemon, Signal::SIGSTOP);
                if at_failpoint {
                    processes::send(stage.wait_runner(uid), Signal::SIGCONT);
                }
                stage.go_on();
                clock::let_pass(STOPPED);
                processes::send(daemon, Signal::SIGCONT);
            }
            Fault::KillDaemon => stage.agent.kill9(),
            Fault::KillCgroup | Fault::KillBlockedCgroup => assert!(self.kill_unit(Unit::Run), "no runner's unit"),
            Fault::KillGuardCgroup => {
                let guards = stage.units.as_ref().expect("units").pids(Unit::Guard);
                assert!(!guards.is_empty(), "{case}: no guard");
                kill_at_once(&guards);
            }
            Fault::KillBothCgroups => {
                let both = [Unit::Guard, Unit::Run].map(|unit| stage.units.as_ref().expect("units").pids(unit));
                assert!(both.iter().all(|pids| !pids.is_empty()), "{case}: no runner or no guard");
                kill_at_once(&both.concat());
            }
            Fault::StopRunner => {
                let runner = stage.wait_runner(uid);
                processes::send(runner, Signal::SIGSTOP);
                clock::let_pass(STOPPED);
                processes::send(runner, Signal::SIGCONT);
            }
            Fault::BlockRunner => clock::let_pass(STOPPED),
            Fault::StopGuard => {
                let guard = stage.wait_guard(uid);
                processes::send(guard, Signal::SIGSTOP);
                if at_failpoint {
                    processes::send(stage.wait_runner(uid), Signal::SIGCONT);
                }
                clock::let_pass(STOPPED);
                processes::send(guard, Signal::SIGCONT);
            }
            Fault::Panic | Fault::Hang => {}
            Fault::StateFull => stage.fill_state(),
        }
        let stage = &mut self.stage;
        if at_failpoint && let Some(runner) = stage.runner_of(uid) {
            // It was stopped only to hold the moment.
            processes::send(runner.pid, Signal::SIGCONT);
        }
        if case.fault != Fault::Hang {
            stage.go_on();
        }
        if case.fault == Fault::KillDaemon {
            stage.agent.start();
        }
    }

    fn kill_unit(&self, unit: Unit) -> bool {
        self.stage.units.as_ref().expect("units").kill(unit)
    }

    fn judge(&mut self, case: Case, uid: &str, begun: Duration, what: &str) {
        let stage = &self.stage;
        stage.writer.wait_progress(clock::monotonic(), WINDOW + GRACE);
        if case.fault == Fault::StateFull {
            // There is no room before the run is over.
            wait_until("the runner to end", CLEARED_WITHIN, || stage.runner_of(uid).is_none());
            stage.empty_state();
        }
        let stall = stage.writer.longest_stall(begun);
        assert!(stall <= WINDOW + GRACE, "{what}: the writer stood still for {stall:?}");
        let run = stage.wait_ended(uid);
        match case.ends() {
            Ends::Well => assert_eq!(run.text("status"), "success", "{what}: {run:?}"),
            Ends::As(classes) => {
                assert_eq!(run.text("status"), "failed", "{what}: {run:?}");
                assert!(classes.contains(&run.text("error_class")), "{what}: {classes:?} expected: {run:?}");
            }
        }
        stage.go_on();
        if case.fault == Fault::StateFull {
            // What could not be noted is done by the next run.
            stage.agent.snapshot_ok("docs");
        }
        self.assert_nothing_is_left(case, uid, what);
        self.stalls.push((case.to_string(), stall));
    }

    fn assert_nothing_is_left(&self, case: Case, uid: &str, what: &str) {
        let stage = &self.stage;
        if !clock::eventually(CLEARED_WITHIN, || stage.left_by(uid).is_empty()) {
            panic!("{what} left behind: {:#?}", stage.left_by(uid));
        }
        assert!(!stage.disk.is_frozen(), "{what}: still frozen");
        let [pres, posts] = ["pre", "post"].map(|hook| stage.count(uid, hook));
        assert!(pres <= 1, "{what}: pre_freeze ran {pres} times");
        let allowed = case.posts(pres);
        assert!(allowed.contains(&posts), "{what}: {posts} calls of post_thaw for {pres} of pre_freeze");
        let whole = stage.count_ended(uid, "post");
        assert!(whole >= pres || case.fault == Fault::Hang, "{what}: post_thaw did not come to its end");
    }

    /// Has a run whose FIFREEZE waits for a write in flight, which does not end by itself.
    fn reach_freezing(&self) -> (String, InFlight) {
        let stage = &self.stage;
        stage.hold(Step::PreHook);
        let uid = stage.begin();
        stage.wait_held(Step::PreHook, &uid);
        let write = InFlight::begin(stage.disk.path());
        stage.go_on();
        let is_freezing = || stage.freezers().into_iter().any(|pid| processes::system_call(pid) == IOCTL);
        wait_until("FIFREEZE to wait", CLEARED_WITHIN, is_freezing);
        (uid, write)
    }

    fn write_in_flight_that_ends_in_the_window(&mut self) {
        let (uid, write) = self.reach_freezing();
        write.end();
        let run = self.stage.wait_ended(&uid);
        assert_eq!(run.text("status"), "success", "{run:?}");
    }

    /// The write ends only after the window; until then nobody can do anything, and then it is done at once.
    fn in_flight(&mut self, fault: Fault) {
        let case = Case { step: Step::Freezing, fault };
        let what = format!("{} {case}", self.name);
        println!("{what}");
        self.stage.forget_logs();
        let (uid, write) = self.reach_freezing();
        let past = clock::monotonic() + STOPPED;
        self.inflict(case, &uid);
        clock::let_pass(past.saturating_sub(clock::monotonic()));
        let landed = clock::monotonic();
        write.end();
        let went_on = self.stage.writer.wait_progress(landed, WINDOW + GRACE);
        let stall = went_on.saturating_sub(landed);
        assert!(stall <= GRACE, "{what}: {stall:?} from the end of the write to the thaw");
        let run = self.stage.wait_ended(&uid);
        assert_eq!(run.text("status"), "failed", "{what}: {run:?}");
        let Ends::As(classes) = case.ends() else { panic!("{what} must fail") };
        assert!(classes.contains(&run.text("error_class")), "{what}: {classes:?} expected: {run:?}");
        // A run that ended before its freeze had come back leaves the rest to the next one.
        self.stage.agent.snapshot_ok("docs");
        self.assert_nothing_is_left(case, &uid, &what);
        self.stalls.push((case.to_string(), stall));
    }

    /// After all that, a run succeeds.
    fn end(self) {
        let run = self.stage.agent.snapshot_ok("docs");
        assert_eq!(run.text("consistency_achieved"), "application", "{run:?}");
        let longest = self.stalls.iter().map(|(_, stall)| *stall).max().unwrap_or_default();
        println!("{}: {} cases, the writer stood still for {longest:?} at most", self.name, self.stalls.len());
        for (case, stall) in &self.stalls {
            println!("  {:>6} ms  {case}", stall.as_millis());
        }
    }
}

/// Number of ioctl(2), as `/proc/<pid>/syscall` shows it: a freezer makes one call of it, FIFREEZE.
#[cfg(target_arch = "x86_64")]
const IOCTL: Option<i64> = Some(16);
#[cfg(not(target_arch = "x86_64"))]
const IOCTL: Option<i64> = Some(29);

/// None of them sees another one die: a process that is killed while it thaws a btrfs makes the kernel, since
/// 6.2, believe that somebody else has written to it, and force it read-only.
fn kill_at_once(pids: &[i32]) {
    pids.iter().for_each(|pid| processes::send(*pid, Signal::SIGSTOP));
    pids.iter().for_each(|pid| processes::kill(*pid));
}

/// What can be done to a run of processes wherever a guard is at work: in the window, and while hooks hold the
/// service.
const GUARDED: &[Fault] = &[
    Fault::KillRunner,
    Fault::KillGuard,
    Fault::TermGuard,
    Fault::KillRunnerAndGuard,
    Fault::KillDaemon,
    Fault::StopDaemon,
    Fault::StopRunner,
    Fault::StopGuard,
    Fault::StateFull,
];

/// The same where none is.
const OUTSIDE: &[Fault] =
    &[Fault::KillRunner, Fault::KillDaemon, Fault::StopDaemon, Fault::StopRunner, Fault::StateFull];

fn on_processes(name: &str, filesystem: &str, cases: impl FnOnce(&mut Lane)) {
    if !is_root_or_skips(name) {
        return;
    }
    let mut lane = Lane::new(name, filesystem, Start::Processes).expect("needs no control groups");
    cases(&mut lane);
    lane.end();
}

fn before_the_window(filesystem: &str) {
    on_processes("before", filesystem, |lane| {
        lane.all(Step::Planned, OUTSIDE);
        lane.all(Step::Planned, &[Fault::Panic]);
        lane.all(Step::PreHook, GUARDED);
        lane.all(Step::PreHook, &[Fault::Hang]);
        lane.all(Step::Armed, GUARDED);
        lane.all(Step::Armed, &[Fault::Panic]);
    });
}

fn frozen(filesystem: &str) {
    on_processes("frozen", filesystem, |lane| {
        lane.all(Step::Frozen, GUARDED);
        lane.all(Step::Frozen, &[Fault::Panic, Fault::KillBlockedRunner, Fault::BlockRunner]);
    });
}

fn in_the_command(filesystem: &str) {
    on_processes("command", filesystem, |lane| {
        lane.all(Step::Command, GUARDED);
        lane.all(Step::Command, &[Fault::Hang]);
    });
}

fn after_the_command(filesystem: &str) {
    on_processes("taken", filesystem, |lane| {
        lane.all(Step::Taken, GUARDED);
        lane.all(Step::Taken, &[Fault::Panic, Fault::KillBlockedRunner, Fault::BlockRunner]);
    });
}

fn after_the_window(filesystem: &str) {
    on_processes("after", filesystem, |lane| {
        lane.all(Step::Thawed, GUARDED);
        lane.all(Step::Thawed, &[Fault::Panic]);
        lane.all(Step::PostHook, GUARDED);
        lane.all(Step::PostHook, &[Fault::Hang]);
        lane.all(Step::Archive, OUTSIDE);
        lane.all(Step::Archive, &[Fault::Panic]);
    });
}

/// Runner, guard and thaw as units: what dies together is a control group.
fn in_units(filesystem: &str) {
    if !is_root_or_skips("in_units") {
        return;
    }
    for (name, hierarchy) in [("units-v1", Hierarchy::V1), ("units-v2", Hierarchy::V2)] {
        let Some(mut lane) = Lane::new(name, filesystem, Start::Units(hierarchy)) else {
            // Which of the two a machine has is for its kernel's command line to say.
            let strict = std::env::var_os("HESTNER_NOTHING_SKIPPED").is_some();
            assert!(!strict, "{name} needs control groups {hierarchy:?}, and nothing may be skipped here");
            eprintln!("SKIPPED: no control groups {hierarchy:?} on this machine");
            continue;
        };
        for step in [Step::Planned, Step::Archive] {
            lane.all(step, &[Fault::KillCgroup]);
        }
        for step in [Step::PreHook, Step::Armed, Step::Frozen, Step::Command, Step::Taken, Step::Thawed, Step::PostHook]
        {
            lane.all(step, &[Fault::KillCgroup, Fault::KillGuardCgroup, Fault::KillBothCgroups]);
        }
        lane.all(Step::Frozen, &[Fault::KillBlockedCgroup]);
        lane.all(Step::Command, &[Fault::KillRunner, Fault::KillGuard, Fault::KillDaemon, Fault::StopRunner]);
        for step in [Step::Planned, Step::Armed, Step::Frozen, Step::Taken, Step::Thawed, Step::Archive] {
            lane.all(step, &[Fault::Panic]);
        }
        for step in [Step::PreHook, Step::Frozen, Step::Command, Step::PostHook, Step::Archive] {
            lane.all(step, &[Fault::StateFull]);
        }
        for fault in [Fault::StopRunner, Fault::Hang, Fault::KillCgroup] {
            lane.in_flight(fault);
        }
        lane.end();
    }
}

/// While FIFREEZE waits for a write in flight nobody can thaw: it lands when the write ends, and is thawed then.
fn freeze_on_its_way(filesystem: &str) {
    on_processes("in-flight", filesystem, |lane| {
        lane.write_in_flight_that_ends_in_the_window();
        for fault in [Fault::KillRunner, Fault::KillDaemon, Fault::StopRunner, Fault::StopGuard, Fault::Hang] {
            lane.in_flight(fault);
        }
        for fault in [Fault::KillGuard, Fault::KillRunnerAndGuard] {
            lane.in_flight(fault);
        }
    });
}

/// A huge dirty set, made just before the freeze.
fn with_a_huge_dirty_set(filesystem: &str) {
    on_processes("dirty", filesystem, |lane| {
        lane.stage.dirty(120);
        lane.all(Step::Frozen, &[Fault::KillRunner, Fault::KillGuard, Fault::StopRunner]);
        lane.all(Step::Command, &[Fault::KillRunner, Fault::KillRunnerAndGuard, Fault::Hang]);
    });
}

/// Each filesystem is a test of its own for each part of the run.
macro_rules! on_each_filesystem {
    ($($part:ident),+ $(,)?) => {
        $(mod $part {
            #[test]
            fn on_ext4() {
                super::$part("ext4");
            }
            #[test]
            fn on_xfs() {
                super::$part("xfs");
            }
            #[test]
            fn on_btrfs() {
                super::$part("btrfs");
            }
        })+
    };
}

on_each_filesystem!(
    before_the_window,
    frozen,
    in_the_command,
    after_the_command,
    after_the_window,
    in_units,
    freeze_on_its_way,
    with_a_huge_dirty_set,
);
