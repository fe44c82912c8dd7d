//! One hook under a supervisor process of its own.
//!
//! The supervisor (`hestner-agent hook`) reads what to run from its standard input, becomes the reaper of
//! everything the hook starts, bounds its output, and ends only when no process of the hook is left:
//! after its exit, at its timeout, or when its input closes because the runner died. The hook runs as its
//! own user; the supervisor does not, so that a hook cannot end its supervisor.
//!
//! It never decides what a failed hook means, and it is given no secret.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::process::Stdio;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Child;
use tokio_util::sync::CancellationToken;

use crate::platform::command::{CommandError, End, Program, Streams};
use crate::platform::process::{self, RunAs};

/// How long the processes of a hook may take to end after SIGTERM, before SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// How long to try to end processes that do not even die of SIGKILL (blocked inside the kernel).
const KILL_GIVE_UP: Duration = Duration::from_secs(10);
/// Pause between two rounds of SIGKILL, while the kernel ends what the last round hit.
const KILL_PAUSE: Duration = Duration::from_millis(10);
/// A spec with long arguments.
const SPEC_BYTES_MAX: u64 = 1024 * 1024;

/// What a supervisor runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The user to run as; the supervisor's own if it is empty.
    pub user: String,
    /// When everything is killed.
    pub timeout_ms: u64,
    /// How much output is kept.
    pub output_bytes_max: usize,
    /// Variables of its environment: what it may want to know of the run.
    pub environment: Vec<(String, String)>,
    /// The number of an inherited descriptor that becomes its standard output instead of being captured.
    pub stdout_fd: Option<i32>,
}

/// How a hook ended. Nothing of it is running any more, unless `survivors` says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Its exit code; `None` if it was killed or never started.
    pub exit_code: Option<i32>,
    /// Why it could not be started; empty otherwise.
    pub start_error: String,
    /// Whether it met its timeout.
    pub timed_out: bool,
    /// Whether it was stopped from outside.
    pub stopped: bool,
    /// Processes that not even SIGKILL ended.
    pub survivors: usize,
    /// The first bytes of its output.
    pub output: Vec<u8>,
}

impl Ended {
    /// Whether it ended with 0 and left nothing behind.
    pub fn is_success(&self) -> bool {
        self.exit_code == Some(0) && !self.timed_out && !self.stopped && self.survivors == 0
    }

    /// Whether its program ran at all.
    pub fn was_started(&self) -> bool {
        self.start_error.is_empty()
    }

    /// What happened, for a message.
    pub fn description(&self) -> String {
        match self.exit_code {
            _ if self.survivors > 0 => format!("left {} processes that cannot be killed", self.survivors),
            _ if !self.start_error.is_empty() => format!("could not be started: {}", self.start_error),
            _ if self.timed_out => "did not end in time; everything it started was killed".to_owned(),
            _ if self.stopped => "was stopped; everything it started was killed".to_owned(),
            Some(code) => format!("ended with exit code {code}"),
            None => "was killed by a signal".to_owned(),
        }
    }
}

/// Runs a hook under a new supervisor. `stop` ends it early; `spare` are children of this process that have
/// nothing to do with it.
///
/// # Errors
/// When the supervisor cannot be started or dies without an answer; what the hook had started is then
/// killed here.
pub async fn run(
    spec: &Spec,
    stop: &CancellationToken,
    inherit: &[&dyn AsFd],
    spare: &[Pid],
) -> Result<Ended, HookError> {
    Waiting::start(inherit)?.run(spec, stop, spare).await
}

/// A supervisor that was not told yet what to run: its own start takes longer than many a command. It ends
/// when it is dropped.
#[derive(Debug)]
pub struct Waiting(Child);

impl Waiting {
    /// Starts it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(inherit: &[&dyn AsFd]) -> Result<Self, HookError> {
        let streams = Streams { stderr: Stdio::inherit(), ..Streams::piped() };
        Ok(Self(Program::own().arg("hook").spawn(streams, End::ByItself, inherit)?))
    }

    /// Its process: to be spared when descendants are killed.
    pub fn pid(&self) -> Option<Pid> {
        self.0.id().map(|pid| Pid::from_raw(pid.cast_signed()))
    }

    /// Runs a hook under it, as [`run`] does.
    ///
    /// # Errors
    /// As [`run`].
    pub async fn run(self, spec: &Spec, stop: &CancellationToken, spare: &[Pid]) -> Result<Ended, HookError> {
        let Self(mut child) = self;
        let (mut input, mut answer) = (child.stdin.take(), child.stdout.take());
        let mut line = serde_json::to_vec(spec).unwrap_or_default();
        line.push(b'\n');
        if let Some(input) = &mut input {
            input.write_all(&line).await.map_err(HookError::Pipe)?;
        }
        let mut text = Vec::new();
        let finished = async {
            if let Some(answer) = &mut answer {
                answer.read_to_end(&mut text).await?;
            }
            child.wait().await
        };
        let stopping = async {
            stop.cancelled().await;
            drop(input.take());
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = finished => { ended.map_err(HookError::Pipe)?; }
            () = stopping => {}
        }
        if let Ok(ended) = serde_json::from_slice(&text) {
            return Ok(ended);
        }
        // The supervisor was killed: what it had started is ours now (this process is a subreaper too).
        let give_up = tokio::time::Instant::now() + KILL_GIVE_UP;
        while process::signal_descendants(Signal::SIGKILL, spare) && tokio::time::Instant::now() < give_up {
            tokio::time::sleep(KILL_PAUSE).await;
        }
        Err(HookError::SupervisorDied)
    }
}

/// A hook that could not be supervised.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The supervisor could not be started.
    #[error(transparent)]
    Start(#[from] CommandError),
    /// It could not be spoken to.
    #[error("cannot talk to the hook's supervisor")]
    Pipe(#[source] io::Error),
    /// It was killed.
    #[error("the hook's supervisor was killed; everything the hook had started was killed as well")]
    SupervisorDied,
}

/// The supervisor process: reads a [`Spec`] from standard input, writes an [`Ended`] to standard output.
///
/// # Errors
/// When its standard streams or the kernel's interfaces cannot be used.
pub fn supervise() -> io::Result<()> {
    process::become_subreaper()?;
    process::keep_descriptors_from_children()?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    let children = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    // Its runner needed it not, or is gone.
    let Some(spec) = read_spec()? else { return Ok(()) };
    let ended = Supervisor { spec: &spec, children, output: None, kept: Vec::new(), main: None, exit: None }.run();
    let mut stdout = io::stdout().lock();
    stdout.write_all(&serde_json::to_vec(&ended)?)?;
    stdout.flush()
}

/// Reads up to the first line's end and not a byte further: what comes after is only its closing. `None`: it
/// was closed without a word.
fn read_spec() -> io::Result<Option<Spec>> {
    let mut line = Vec::new();
    for byte in io::stdin().lock().take(SPEC_BYTES_MAX).bytes() {
        match byte? {
            b'\n' => return Ok(Some(serde_json::from_slice(&line)?)),
            other => line.push(other),
        }
    }
    if line.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

struct Supervisor<'a> {
    spec: &'a Spec,
    children: SignalFd,
    output: Option<OwnedFd>,
    kept: Vec<u8>,
    main: Option<Pid>,
    exit: Option<Option<i32>>,
}

/// Why the supervisor stopped waiting.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Woken {
    MainEnded,
    Deadline,
    RunnerGone,
}

impl Supervisor<'_> {
    fn run(mut self) -> Ended {
        if let Err(error) = self.start() {
            return Ended { start_error: error.to_string(), ..Ended::default() };
        }
        let why = self.wait(Duration::from_millis(self.spec.timeout_ms), true);
        // A hook that has ended leaves nothing; one that has not gets a moment to end by itself.
        if why != Woken::MainEnded {
            process::signal_descendants(Signal::SIGTERM, &[]);
            self.wait(TERM_GRACE, false);
        }
        let survivors = self.kill_all();
        self.drain_output();
        Ended {
            exit_code: self.exit.flatten(),
            start_error: String::new(),
            timed_out: why == Woken::Deadline,
            stopped: why == Woken::RunnerGone,
            survivors,
            output: self.kept,
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let (program, arguments) = self.spec.argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let run_as = match self.spec.user.as_str() {
            "" => None,
            name => Some(RunAs::lookup(name)?),
        };
        let base = Program::new(program).args(arguments);
        let program = self.spec.environment.iter().fold(base, |p, (name, value)| p.env(name, value));
        let mut command = program.prepare();
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        command.stdin(Stdio::null()).stderr(write.try_clone()?);
        match self.spec.stdout_fd {
            Some(fd) => command.stdout(std::fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}"))?),
            None => command.stdout(write),
        };
        process::detach(&mut command, run_as);
        // A belt for the case that the supervisor itself is killed; another user would clear it before.
        process::die_with_parent(&mut command);
        self.main = Some(Pid::from_raw(command.spawn()?.id().cast_signed()));
        nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
        self.output = Some(read);
        Ok(())
    }

    /// Waits for the hook's own process, the end of the time, or the runner's death.
    #[expect(clippy::disallowed_methods, reason = "a process without a runtime measures its own deadline")]
    fn wait(&mut self, time: Duration, runner_matters: bool) -> Woken {
        let deadline = std::time::Instant::now() + time;
        loop {
            self.reap();
            if self.exit.is_some() {
                return Woken::MainEnded;
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Woken::Deadline;
            }
            if self.poll(left, runner_matters) && runner_matters {
                return Woken::RunnerGone;
            }
        }
    }

    /// Sleeps until something happens; takes output. True: the runner is gone.
    fn poll(&mut self, time: Duration, watch_runner: bool) -> bool {
        let stdin = io::stdin();
        let timeout = PollTimeout::try_from(time.min(Duration::from_secs(60))).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(self.children.as_fd(), PollFlags::POLLIN)];
        if watch_runner {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        if let Some(output) = &self.output {
            fds.push(PollFd::new(output.as_fd(), PollFlags::POLLIN));
        }
        // An interrupted poll is one without events.
        let _ = poll(&mut fds, timeout);
        let woken = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| !r.is_empty());
        let runner_gone = watch_runner && fds.get(1).is_some_and(woken);
        let _ = self.children.read_signal();
        self.drain_output();
        runner_gone
    }

    fn reap(&mut self) -> bool {
        let main = self.main;
        let mut exit = None;
        let none_left = process::reap_all(|pid, status| {
            if Some(pid) == main {
                exit = Some(match status {
                    WaitStatus::Exited(_, code) => Some(code),
                    _ => None,
                });
            }
        });
        self.exit = self.exit.or(exit);
        none_left
    }

    /// Kills until the kernel says that there is no child left. Returns how many could not be killed.
    #[expect(clippy::disallowed_methods, reason = "a process without a runtime measures its own deadline")]
    fn kill_all(&mut self) -> usize {
        let give_up = std::time::Instant::now() + KILL_GIVE_UP;
        loop {
            // The kernel knows at once that there is nobody left; to find somebody, all of /proc is read.
            if self.reap() {
                return 0;
            }
            process::signal_descendants(Signal::SIGKILL, &[]);
            if std::time::Instant::now() >= give_up {
                return process::descendants(nix::unistd::getpid()).len().max(1);
            }
            self.poll(KILL_PAUSE, false);
        }
    }

    /// Takes what there is: keeps the first bytes, drops the rest, so that a hook never blocks on its output.
    fn drain_output(&mut self) {
        let mut chunk = [0; 64 * 1024];
        // Bounded, so that a hook that writes without end cannot keep the supervisor from its deadline.
        for _ in 0..64 {
            let Some(output) = &self.output else { return };
            match nix::unistd::read(output, &mut chunk) {
                Ok(0) => self.output = None,
                Ok(read) => {
                    let room = self.spec.output_bytes_max.saturating_sub(self.kept.len());
                    self.kept.extend_from_slice(&chunk[..read.min(room)]);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// Number of a descriptor, for a [`Spec`].
pub fn number_of(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
