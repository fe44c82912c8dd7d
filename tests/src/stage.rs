//! A service on a filesystem that gets frozen, made so that a test can hold a run at any of its steps.
//!
//! In: which filesystem, and how runners come to be. Out: runs that wait at a [`Step`], their processes, and
//! what hooks and commands have noted. The point's command copies the data while the filesystem is frozen, so
//! that what is archived can be compared. All else (state, repository, notes) lies on other filesystems.

use std::path::PathBuf;
use std::time::Duration;

use crate::archiver::{Archiver, Moment};
use crate::booted::Hierarchy;
use crate::clock::{self, wait_for, wait_until};
use crate::mounts::Mounted;
use crate::processes::{self, Process};
use crate::units::Units;
use crate::writer::Writer;
use crate::{Agent, Hook, Run, Service, World, files};

/// How long a frozen window may be.
pub const WINDOW: Duration = Duration::from_secs(1);
/// How long a run may take to come to a step on a busy machine.
const REACHED_WITHIN: Duration = Duration::from_secs(60);
/// How long a run may take to end; a hung hook takes its own time.
const ENDED_WITHIN: Duration = Duration::from_secs(90);

/// Where a run can be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Before the first `pre_freeze`.
    Planned,
    /// In `pre_freeze`.
    PreHook,
    /// The guard is ready, nothing is frozen.
    Armed,
    /// FIFREEZE waits for a write in flight.
    Freezing,
    /// Frozen, before the point's command.
    Frozen,
    /// In the point's command.
    Command,
    /// After it, before the order to thaw.
    Taken,
    /// Thawed, before the first `post_thaw`.
    Thawed,
    /// In `post_thaw`.
    PostHook,
    /// The archiver reads.
    Archive,
}

impl Step {
    /// What the agent calls the step, where it is inside a process of it.
    pub fn failpoint(self) -> Option<&'static str> {
        match self {
            Self::Planned => Some("planned"),
            Self::Armed => Some("armed"),
            Self::Frozen => Some("frozen"),
            Self::Taken => Some("taken"),
            Self::Thawed => Some("thawing"),
            Self::PreHook | Self::Freezing | Self::Command | Self::PostHook | Self::Archive => None,
        }
    }

    /// Where a runner can panic on its way into the step.
    fn panics_at(self) -> Option<&'static str> {
        if self == Self::Archive { Some("archiving") } else { self.failpoint() }
    }

    /// Whether the filesystem is frozen there.
    pub fn is_frozen(self) -> bool {
        matches!(self, Self::Frozen | Self::Command | Self::Taken)
    }

    /// Whether hooks hold the service there, and nothing else does.
    pub fn is_held_by_hooks(self) -> bool {
        matches!(self, Self::PreHook | Self::Thawed | Self::PostHook)
    }

    /// The program of ours that waits there.
    fn gate(self) -> &'static str {
        match self {
            Self::PreHook => "pre",
            Self::Command => "command",
            Self::PostHook => "post",
            other => panic!("no program of the test runs at {other:?}"),
        }
    }
}

/// How runners and guards come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// As processes of the daemon and of each other.
    Processes,
    /// Each in a control group of its own, as units.
    Units(Hierarchy),
}

/// See the module.
pub struct Stage {
    // Fields are dropped in this order; before all of them the filesystem is thawed.
    /// The agent, whose service `docs` lies on the filesystem.
    pub agent: Agent,
    /// Writes to the filesystem all the time.
    pub writer: Writer,
    /// What systemd would do.
    pub units: Option<Units>,
    /// The filesystem that gets frozen.
    pub disk: Mounted,
    /// The filesystem that holds the agent's state.
    pub state_disk: Mounted,
    archiver: Archiver,
    folder: PathBuf,
    _world: World,
}

impl Stage {
    /// Sets it up, with the agent started. `None`: this machine has no such control groups.
    pub fn new(name: &str, filesystem: &str, start: Start) -> Option<Self> {
        let world = World::new(name);
        let folder = world.path().to_owned();
        let disk = Mounted::of_kind(filesystem, &world.at("disk"));
        let state_disk = Mounted::ext4(&world.at("state-disk"), 48);
        files::small_tree(&disk.path().join("data"), 20, 2_000);
        let program = files::write_script(world.at("programs/step"), &script(&folder)).to_string_lossy().into_owned();
        let hook = Hook::new("db").pre(&[&program, "pre"]).post(&[&program, "post"]).timeout("3s");
        let service = Service::files("docs", [disk.path().join("data")])
            .hook(hook)
            .point_line("kind = \"fsfreeze\"")
            .point_line(&format!("read_from = {:?}", folder.join("copy")))
            .point_program("command", &[&program, "command"])
            .point_program("remove_command", &[&program, "remove"]);
        let mut builder = world
            .agent()
            .state(&state_disk.path().join("state"))
            .setting("freeze", &format!("window = \"{}s\"", WINDOW.as_secs()))
            .allowed(service);
        let units = match start {
            Start::Processes => None,
            Start::Units(hierarchy) => {
                let units = Units::start(&world.at("units"), &folder.join("agent/agent.toml"), hierarchy)?;
                builder = builder.runner_socket(&units.runner_socket());
                Some(units)
            }
        };
        let agent = builder.started();
        let archiver = agent.archiver();
        let writer = Writer::start(disk.path());
        Some(Self { agent, writer, units, disk, state_disk, archiver, folder, _world: world })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Starts a run that will wait at a step, and gives its id once it does.
    pub fn run_until(&self, step: Step) -> String {
        match step.failpoint() {
            Some(_) => self.run_until_failpoint(step, "stop"),
            None => {
                self.hold(step);
                let uid = self.begin();
                self.wait_held(step, &uid);
                uid
            }
        }
    }

    /// Starts a run whose runner does `action` at a step inside itself, and gives its id once it stands there.
    pub fn run_until_failpoint(&self, step: Step, action: &str) -> String {
        let name = if action == "panic" { step.panics_at() } else { step.failpoint() };
        let name = name.unwrap_or_else(|| panic!("{step:?} is not inside the runner"));
        let file = files::write(self.agent.state().join("failpoint"), format!("{name} {action}"));
        let uid = self.begin();
        if action == "panic" {
            wait_until("the runner to panic", REACHED_WITHIN, || self.log_has("asked to panic"));
        } else {
            wait_until(&format!("the runner to stop at {name}"), REACHED_WITHIN, || {
                self.runner_of(&uid).is_some_and(|runner| processes::is_stopped(runner.pid))
            });
        }
        std::fs::remove_file(file).expect("the failpoint");
        uid
    }

    /// Starts a run and goes on.
    pub fn begin(&self) -> String {
        let asked = self.agent.cli(&["snapshot", "docs", "--detach", "--json"]).json();
        asked["run_uid"].as_str().unwrap_or_else(|| panic!("no run_uid in {asked}")).to_owned()
    }

    /// From now on runs wait at a step outside of the runner.
    pub fn hold(&self, step: Step) {
        match step {
            Step::Archive => self.archiver.hold_at(Moment::Store),
            step => drop(files::write(self.at(&format!("gate-{}", step.gate())), "")),
        }
    }

    /// Waits until a run stands at such a step.
    pub fn wait_held(&self, step: Step, uid: &str) {
        match step {
            Step::Archive => self.archiver.wait_reached(Moment::Store),
            step => {
                let gate = step.gate();
                wait_until(&format!("the run to be in {gate}"), REACHED_WITHIN, || self.count(uid, gate) > 0);
            }
        }
    }

    /// Nothing waits any more, and runs do not wait from now on.
    pub fn go_on(&self) {
        for gate in ["gate-pre", "gate-command", "gate-post"] {
            let _ = std::fs::remove_file(self.at(gate));
        }
        self.archiver.go_on();
    }

    /// Makes `pre_freeze` leave so many megabytes of dirty pages.
    pub fn dirty(&self, megabytes: u32) {
        files::write(self.at("dirty"), megabytes.to_string());
    }

    /// How often a program of the test was started for a run: `pre`, `command`, `post`, `remove`.
    pub fn count(&self, uid: &str, what: &str) -> usize {
        let line = format!("{uid} {what}");
        files::lines(&self.at("notes.txt")).iter().filter(|l| **l == line).count()
    }

    /// How often it came to its end.
    pub fn count_ended(&self, uid: &str, what: &str) -> usize {
        self.count(uid, &format!("{what} done"))
    }

    fn log_has(&self, text: &str) -> bool {
        let logs = [self.agent.log.clone(), self.at("units/units.log")];
        logs.iter().any(|log| files::lines(log).iter().any(|line| line.contains(text)))
    }

    /// Forgets what the logs said so far.
    pub fn forget_logs(&self) {
        for log in [self.agent.log.clone(), self.at("units/units.log")] {
            if let Ok(file) = std::fs::OpenOptions::new().write(true).open(&log) {
                let _ = file.set_len(0);
            }
        }
    }

    /// Our own processes of that name; daemons and runners of other tests have other settings.
    pub fn parts(&self, word: &str) -> Vec<Process> {
        let config = self.agent.config.to_string_lossy().into_owned();
        let is_ours = |p: &Process| {
            p.argv.first().is_some_and(|program| program.ends_with("hestner-agent"))
                && p.is_part(word)
                && p.names(&config)
        };
        processes::all().into_iter().filter(is_ours).collect()
    }

    /// The runner of a run: it holds the run's lock. The daemon asks other runners for other things.
    pub fn runner_of(&self, uid: &str) -> Option<Process> {
        let lock = self.agent.state().join("runs").join(uid).join("alive");
        self.parts("runner").into_iter().find(|runner| processes::has_open(runner.pid, &lock))
    }

    /// The same, of a run that stands at a step.
    pub fn wait_runner(&self, uid: &str) -> i32 {
        wait_for("the runner", REACHED_WITHIN, || self.runner_of(uid)).pid
    }

    /// The guards of a run: that of the filesystem first, if there is one, then that of the hooks.
    pub fn guards(&self, uid: &str) -> Vec<i32> {
        let folder = self.agent.state().join("runs").join(uid);
        let guards = self.parts("guard");
        let of = |journal: &str| {
            let journal = folder.join(journal);
            guards.iter().find(|guard| processes::has_open(guard.pid, &journal)).map(|guard| guard.pid)
        };
        ["freeze.journal", "hook.journal"].into_iter().filter_map(of).collect()
    }

    /// The guard that matters most at the run's step: of the filesystem, or else of the hooks.
    pub fn wait_guard(&self, uid: &str) -> i32 {
        wait_for("the guard", REACHED_WITHIN, || self.guards(uid).first().copied())
    }

    /// The processes that call FIFREEZE: they hold the guard's record open.
    pub fn freezers(&self) -> Vec<i32> {
        let runs = self.agent.state().join("runs");
        let is_freezer = |p: &Process| p.is_part("freezer") && processes::has_open(p.pid, &runs);
        processes::all().into_iter().filter(is_freezer).map(|p| p.pid).collect()
    }

    /// Waits until a run has ended, as the agent's command line tells it.
    pub fn wait_ended(&self, uid: &str) -> Run {
        wait_for(&format!("run {uid} to end"), ENDED_WITHIN, || {
            let ended = |run: &Run| run.uid() == uid && ["success", "failed"].contains(&run.text("status"));
            let found = self.agent.runs().into_iter().find(ended);
            if found.is_none() {
                clock::let_pass(Duration::from_millis(50));
            }
            found
        })
    }

    /// What should be gone when a run is over, and is not: processes, mounts, the copy, unsettled notes.
    pub fn left_by(&self, uid: &str) -> Vec<String> {
        let mut left = Vec::new();
        for word in ["guard", "hook", "worker", "thaw"] {
            left.extend(self.parts(word).into_iter().map(|p| format!("process {} {:?}", p.pid, p.argv)));
        }
        left.extend(self.freezers().into_iter().map(|pid| format!("freezer {pid}")));
        left.extend(self.runner_of(uid).map(|p| format!("runner {}", p.pid)));
        let program = self.at("programs/step").to_string_lossy().into_owned();
        left.extend(processes::marked(&program).into_iter().map(|p| format!("program {} {:?}", p.pid, p.argv)));
        let mounts = files::lines(std::path::Path::new("/proc/self/mounts"));
        let ours = mounts.iter().filter(|line| line.contains(&*self.folder.to_string_lossy()));
        let known = [self.disk.path(), self.state_disk.path()].map(|path| format!(" {} ", path.display()));
        left.extend(ours.filter(|line| !known.iter().any(|known| line.contains(known))).cloned());
        if self.at("copy/data").exists() {
            left.push("the copy".to_owned());
        }
        if !self.agent.state().join("runs").join(uid).join("settled").exists() {
            left.push("notes that are not settled".to_owned());
        }
        left
    }

    /// Fills the filesystem of the agent's state to the last block, at once and without writing: it is done inside a
    /// frozen window.
    ///
    /// # Panics
    /// When the filesystem cannot be looked at.
    pub fn fill_state(&self) {
        let path = self.state_disk.path().join("filler");
        let filler = std::fs::File::create(path).expect("a file");
        let stat = nix::sys::statvfs::fstatvfs(&filler).expect("a filesystem");
        let mut offset = 0;
        let mut piece = i64::try_from(stat.blocks_free() * stat.fragment_size()).expect("a size");
        while piece >= 1024 {
            match nix::fcntl::fallocate(&filler, nix::fcntl::FallocateFlags::empty(), offset, piece) {
                Ok(()) => offset += piece,
                Err(_) => piece /= 2,
            }
        }
    }

    /// Makes room again.
    pub fn empty_state(&self) {
        let _ = std::fs::remove_file(self.state_disk.path().join("filler"));
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Whoever waits for it, the writer first, can only end then.
        self.disk.thaw();
        self.go_on();
    }
}

/// What hooks and commands run: notes, a gate to wait at, and the work.
fn script(folder: &std::path::Path) -> String {
    format!(
        r#"cd {folder} || exit 9
echo "$HESTNER_RUN_UID $1" >> notes.txt
while [ -e "gate-$1" ]; do sleep 0.02; done
case $1 in
  pre) [ -e dirty ] && head -c "$(cat dirty)M" /dev/zero > disk/dirty ;;
  command) mkdir -p "$HESTNER_READ_FROM" && cp -a "$HESTNER_MOUNT/data" "$HESTNER_READ_FROM/data" || exit 8 ;;
  remove) rm -rf "$HESTNER_READ_FROM" ;;
esac
echo "$HESTNER_RUN_UID $1 done" >> notes.txt"#,
        folder = folder.display(),
    )
}
