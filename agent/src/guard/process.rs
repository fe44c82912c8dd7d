//! The guard process: one thread that waits in poll(2) for whatever comes first.
//!
//! In: one runner's orders, its death (pidfd, or the socket's end), signals, the freezers' answers, the
//! threads' reports, the deadline. Out: FITHAW, the record, one answer, and `hestner-agent thaw` when the
//! window ended otherwise than by the runner's order.
//!
//! Between freeze and thaw it opens nothing, logs nothing and writes to no file but single bytes of the
//! record: a log may end on the disk that is frozen. All its memory is locked.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;

use super::arming::Ready;
use super::client::{ARM_MAX, HELD_MAX};
use super::filesystem::{Filesystem, Freezer, Happened, Reports};
use super::freezer::Returned;
use super::journal::{Journal, Outcome, State};
use super::link::{Link, connect_to};
use super::messages::{Answer, Arm, Fault, Order};
use crate::platform::command::Program;
use crate::platform::fsfreeze::monotonic;
use crate::platform::process;

/// How long whoever connects may take to say what to watch.
const FIRST_ORDER_MAX: Duration = Duration::from_secs(10);
/// A freeze or a thaw that has not come back so long after the window is called stuck: before the runner loses
/// its patience, so that it hears why.
const STUCK_AFTER: Duration = Duration::from_millis(150);
/// How long the thaw unit may take to be started before the guard lets go of its socket.
const THAW_START_MAX: Duration = Duration::from_secs(1);

/// Pause between two looks when poll(2) itself fails.
const BLIND_PAUSE: Duration = Duration::from_millis(1);

/// How the guard starts `hestner-agent thaw` when it struck.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ThawStart {
    /// As a process that outlives it, with this settings file.
    Process {
        /// The settings file.
        config: PathBuf,
    },
    /// By connecting to the socket of its unit.
    Socket(PathBuf),
}

/// The guard process; its standard input is the socket to the runner. Returns when the window is over.
///
/// # Errors
/// When its socket cannot be used, or its other end is somebody else's.
pub fn run(thaw: ThawStart) -> io::Result<()> {
    let mut link = Link::new(UnixStream::from(process::adopt(0)?))?;
    process::keep_descriptors_from_children()?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        mask.add(signal);
    }
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let (order, fds) = first_order(&mut link)?;
    let run_uid = order.run_uid.clone();
    let ready = match Ready::make(order, fds, matches!(thaw, ThawStart::Socket(_))) {
        Ok(ready) => ready,
        Err(fault) => {
            tracing::warn!(event = "guard_not_armed", %run_uid, ?fault);
            // A runner that is gone needs no answer.
            let _ = link.send(&Answer::Ended(fault));
            return Ok(());
        }
    };
    let mut guard = Guard::new(link, signals, thaw, ready);
    let end = guard.watch();
    guard.let_go();
    match end {
        End::Confirmed => tracing::info!(event = "guard_thawed", %run_uid),
        End::Before => tracing::info!(event = "guard_left_before_the_window", %run_uid),
        End::Otherwise(cause) => tracing::warn!(event = "guard_ended_the_window", %run_uid, ?cause),
    }
    Ok(())
}

/// Reads the first order and the descriptors that come with it.
fn first_order(link: &mut Link) -> io::Result<(Arm, Vec<OwnedFd>)> {
    let mut fds = Vec::new();
    let end = monotonic() + FIRST_ORDER_MAX;
    loop {
        match link.next::<Order>()? {
            Some(Order::Arm(arm)) => return Ok((arm, fds)),
            Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "the first order is to arm")),
            None => {}
        }
        let left = end.saturating_sub(monotonic());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if left.is_zero() || poll(&mut [PollFd::new(link.as_fd(), PollFlags::POLLIN)], timeout) == Ok(0) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        link.fill_with_descriptors(&mut fds)?;
    }
}

/// Why a window ends otherwise than by the runner's order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cause {
    /// It could not be had; the runner is told and lives.
    Failed(Fault),
    Deadline,
    RunnerGone,
    Stopped,
    Stuck(PathBuf),
}

/// How the guard's work ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Confirmed,
    /// Nothing was held or frozen yet.
    Before,
    Otherwise(Cause),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// Getting ready; whoever goes now leaves nothing behind.
    Arming,
    /// Ready.
    Armed,
    /// The freezers are told.
    Freezing,
    /// Everything is frozen.
    Frozen,
    /// The runner ordered the thaw.
    Thawing,
    /// Being thawed for another reason, since then.
    Ending { cause: Cause, since: Duration },
}

struct Guard {
    link: Link,
    /// Becomes readable when the runner has died.
    runner: OwnedFd,
    is_runner_gone: bool,
    signals: SignalFd,
    journal: Journal,
    filesystems: Vec<Filesystem>,
    reports: Reports,
    thaw: ThawStart,
    /// Held so that the unit finds its connection open.
    thaw_unit: Option<UnixStream>,
    window: Duration,
    begun: Option<Duration>,
    /// Of the window, or of the arming.
    deadline: Option<Duration>,
    synced: usize,
    was_armed: bool,
    phase: Phase,
}

impl Guard {
    fn new(link: Link, signals: SignalFd, thaw: ThawStart, ready: Ready) -> Self {
        let Ready { window, runner, journal, filesystems, reports } = ready;
        Self {
            link,
            runner,
            is_runner_gone: false,
            signals,
            journal,
            filesystems,
            reports,
            thaw,
            thaw_unit: None,
            window,
            begun: None,
            deadline: None,
            synced: 0,
            was_armed: false,
            phase: Phase::Arming,
        }
    }

    /// Waits for whatever comes and acts on it, until the window is over.
    fn watch(&mut self) -> End {
        self.deadline = Some(monotonic() + ARM_MAX);
        for filesystem in &self.filesystems {
            filesystem.sync(self.window / 4);
        }
        loop {
            if let Some(end) = self.progress() {
                return end;
            }
            let woken = self.wait().unwrap_or_else(|_| self.cannot_wait());
            if woken.signal && matches!(self.signals.read_signal(), Ok(Some(_))) {
                self.strike(Cause::Stopped);
            }
            self.is_runner_gone |= woken.runner;
            for (filesystem, woken) in self.filesystems.iter_mut().zip(woken.freezers) {
                if woken {
                    filesystem.hear_freezer();
                }
            }
            self.hear_reports();
            if woken.link {
                self.link.fill();
            }
            // Before its last orders: what a dead runner ordered is not begun any more.
            if self.is_runner_gone || self.link.is_closed() {
                self.strike(Cause::RunnerGone);
            }
            self.obey();
            if self.deadline.is_some_and(|deadline| monotonic() >= deadline) {
                self.deadline_passed();
            }
        }
    }

    /// A guard that cannot wait cannot guard: it ends, asking over and over.
    fn cannot_wait(&mut self) -> Woken {
        self.strike(Cause::Stopped);
        std::thread::sleep(BLIND_PAUSE);
        Woken { freezers: self.filesystems.iter().map(Filesystem::awaits_freezer).collect(), ..Woken::default() }
    }

    /// Does what can be done now that something has changed. `Some`: it is over.
    fn progress(&mut self) -> Option<End> {
        match &self.phase {
            Phase::Arming => self.arm(),
            Phase::Freezing => self.frozen_or_failed(),
            Phase::Armed | Phase::Frozen | Phase::Thawing | Phase::Ending { .. } => {}
        }
        let all_ended = self.filesystems.iter().all(Filesystem::has_ended);
        match self.phase.clone() {
            Phase::Thawing if all_ended => self.confirm().or_else(|| self.progress()),
            Phase::Ending { cause, .. } if all_ended => Some(self.finish(cause)),
            _ => None,
        }
    }

    fn arm(&mut self) {
        let is_ready = self.filesystems.iter().all(|filesystem| filesystem.freezer == Freezer::Ready);
        if is_ready && self.synced == self.filesystems.len() {
            self.phase = Phase::Armed;
            self.was_armed = true;
            self.deadline = None;
            // The end of a runner that is gone is seen at its descriptor.
            let _ = self.link.send(&Answer::Armed);
        } else if self.filesystems.iter().any(|filesystem| filesystem.freezer == Freezer::Died) {
            self.strike(Cause::Failed(Fault::failed("start a freezer", "it ended by itself")));
        }
    }

    fn obey(&mut self) {
        while matches!(self.phase, Phase::Armed | Phase::Freezing | Phase::Frozen) {
            match self.link.next::<Order>() {
                Ok(None) => return,
                Ok(Some(Order::Begin { given_ns })) => {
                    self.begin(given_ns);
                    let _ = self.link.send(&Answer::Begun);
                }
                Ok(Some(Order::Renew { given_ns, window_ms })) if self.filesystems.is_empty() => {
                    self.renew(given_ns, Duration::from_millis(window_ms));
                }
                Ok(Some(Order::Freeze { given_ns })) if self.phase == Phase::Armed => self.freeze(given_ns),
                Ok(Some(Order::Thaw)) => self.thaw_by_order(),
                // A runner that says what it must not say has lost its way.
                Ok(Some(_)) | Err(_) => self.strike(Cause::RunnerGone),
            }
        }
    }

    fn begin(&mut self, given_ns: u64) {
        if self.begun.is_none() {
            self.renew(given_ns, self.window);
        }
    }

    fn renew(&mut self, given_ns: u64, window: Duration) {
        // An order that lay around while this process was stopped has used up its window.
        let given = Duration::from_nanos(given_ns).min(monotonic());
        // One that was given after the end of the step before does not make up for it.
        if self.deadline.is_some_and(|deadline| given >= deadline) {
            return self.strike(Cause::Deadline);
        }
        self.begun.get_or_insert(given);
        self.window = window.min(HELD_MAX);
        self.deadline = Some(given + self.window);
        // Without it recovery beside a stopped guard is earlier or later; this one then finds that it was.
        let _ = self.journal.set_deadline(given + self.window);
    }

    fn freeze(&mut self, given_ns: u64) {
        self.begin(given_ns);
        if self.deadline.is_some_and(|deadline| monotonic() >= deadline) {
            return;
        }
        self.phase = Phase::Freezing;
        for filesystem in &mut self.filesystems {
            filesystem.freeze();
        }
    }

    /// Looks at the freezers' answers.
    fn frozen_or_failed(&mut self) {
        let fault = self.filesystems.iter().find_map(|Filesystem { path, freezer, .. }| match freezer {
            Freezer::Returned(Returned { result: Err(errno), .. }) => Some(freeze_fault(path, *errno)),
            Freezer::Died => Some(Fault::failed(format!("freeze {}", path.display()), "its freezer was killed")),
            _ => None,
        });
        if let Some(fault) = fault {
            return self.strike(Cause::Failed(fault));
        }
        if self.filesystems.iter().all(|filesystem| matches!(filesystem.freezer, Freezer::Returned(_))) {
            self.phase = Phase::Frozen;
            let _ = self.link.send(&Answer::Frozen);
        }
    }

    fn thaw_by_order(&mut self) {
        let not_frozen = self.filesystems.iter().find(|filesystem| !matches!(filesystem.freezer, Freezer::Returned(_)));
        if let Some(Filesystem { path, .. }) = not_frozen {
            let fault = Fault::NotFrozen { mount: path.clone() };
            return self.strike(Cause::Failed(fault));
        }
        self.phase = Phase::Thawing;
        self.filesystems.iter_mut().for_each(Filesystem::end);
    }

    fn hear_reports(&mut self) {
        while let Some(report) = self.reports.next() {
            let Some(filesystem) = self.filesystems.get_mut(report.index) else { continue };
            match report.what {
                Happened::Synced(took) if took < self.window / 4 => self.synced += 1,
                Happened::Synced(took) => {
                    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
                    let mount = filesystem.path.clone();
                    let fault = Fault::SlowSync { mount, took_ms: ms(took), limit_ms: ms(self.window / 4) };
                    self.strike(Cause::Failed(fault));
                }
                Happened::SyncFailed(errno) => {
                    let step = format!("write out {}", filesystem.path.display());
                    self.strike(Cause::Failed(Fault::failed(step, errno.desc())));
                }
                what @ (Happened::Thawed(_) | Happened::NotFrozen) => {
                    filesystem.thaw = Some(what);
                    // What somebody else froze stays noted as theirs. An error is no matter: recovery would
                    // find it not frozen anyhow.
                    if self.journal.state(report.index).is_ok_and(State::may_be_frozen) {
                        let _ = self.journal.set_state(report.index, State::Thawed);
                    }
                }
            }
        }
    }

    /// The window ends for another reason than the runner's order: everything is thawed at once.
    fn strike(&mut self, cause: Cause) {
        let since = monotonic();
        match (&self.phase, &cause) {
            // The runner, which was to be told of a failure, is gone: what is owed is now the guard's matter.
            (Phase::Ending { cause: Cause::Failed(_), since }, Cause::RunnerGone | Cause::Stopped) => {
                self.phase = Phase::Ending { cause, since: *since };
                return;
            }
            (Phase::Ending { .. }, _) => return,
            _ => {}
        }
        self.phase = Phase::Ending { cause, since };
        self.deadline = Some(since + STUCK_AFTER);
        // Their last word first: what a freezer has said by now is not to be guessed.
        for filesystem in &mut self.filesystems {
            if filesystem.awaits_freezer() {
                filesystem.hear_freezer();
            }
            filesystem.end();
        }
    }

    fn deadline_passed(&mut self) {
        match &self.phase {
            Phase::Arming => {
                let slow = "it was not ready in time; is a disk overloaded?";
                self.strike(Cause::Failed(Fault::failed("get ready", slow)));
            }
            Phase::Ending { cause: Cause::Stuck(_), .. } => self.deadline = None,
            Phase::Ending { since, .. } => {
                let stuck = self.filesystems.iter().find(|filesystem| !filesystem.has_ended());
                let Some(Filesystem { path, .. }) = stuck else { return };
                let (path, since) = (path.clone(), *since);
                self.deadline = None;
                let cause = Cause::Stuck(path);
                // Told now, and not when it lands, which may be never.
                self.tell(&cause);
                self.phase = Phase::Ending { cause, since };
            }
            _ => self.strike(Cause::Deadline),
        }
    }

    /// The runner's order is carried out: was everything frozen until then?
    fn confirm(&mut self) -> Option<End> {
        let now = monotonic();
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.strike(Cause::Deadline);
            return None;
        }
        // Recovery took this guard for lost, and has let go what it was to watch.
        if !matches!(self.journal.outcome(), Ok(Outcome::Open)) {
            self.strike(Cause::Stopped);
            return None;
        }
        let failed = self.filesystems.iter().find_map(|Filesystem { path, thaw, .. }| match thaw {
            Some(Happened::Thawed(_)) => None,
            _ => Some(Fault::ThawedByOthers { mount: path.clone() }),
        });
        if let Some(fault) = failed {
            self.strike(Cause::Failed(fault));
            return None;
        }
        let called = self.filesystems.iter().filter_map(|filesystem| match filesystem.freezer {
            Freezer::Returned(Returned { called, .. }) => Some(called),
            _ => None,
        });
        let thawed = self.filesystems.iter().filter_map(|filesystem| match filesystem.thaw {
            Some(Happened::Thawed(at)) => Some(at),
            _ => None,
        });
        let from = called.min().or(self.begun).unwrap_or(now);
        let frozen = thawed.max().unwrap_or(now).saturating_sub(from);
        // Recovery would find nothing frozen anyhow.
        let _ = self.journal.set_outcome(Outcome::Ordered);
        let _ = self.link.send(&Answer::Thawed { frozen_ns: u64::try_from(frozen.as_nanos()).unwrap_or(u64::MAX) });
        Some(End::Confirmed)
    }

    /// Everything is thawed for another reason.
    fn finish(&mut self, cause: Cause) -> End {
        if matches!(cause, Cause::RunnerGone | Cause::Stopped) && !self.was_armed {
            return End::Before;
        }
        if !matches!(cause, Cause::Stuck(_)) {
            self.tell(&cause);
        }
        End::Otherwise(cause)
    }

    /// Writes down how the window ended, tells the runner, and starts what brings the rest to an end.
    fn tell(&mut self, cause: &Cause) {
        let window_ms = u64::try_from(self.window.as_millis()).unwrap_or(u64::MAX);
        let (outcome, fault) = match cause {
            Cause::Failed(fault) => (Outcome::Failed, fault.clone()),
            Cause::Deadline => (Outcome::Deadline, Fault::Deadline { window_ms }),
            Cause::RunnerGone => (Outcome::RunnerGone, Fault::RunnerGone),
            Cause::Stopped => (Outcome::Stopped, Fault::Stopped),
            Cause::Stuck(mount) => (Outcome::Stuck, Fault::Stuck { mount: mount.clone() }),
        };
        // A record that cannot be written must not keep anybody from being told.
        let _ = self.journal.set_outcome(outcome);
        // For a stopped runner it waits in the socket.
        let _ = self.link.send(&Answer::Ended(fault));
        if outcome.is_struck() {
            self.start_thaw();
        }
    }

    fn start_thaw(&mut self) {
        let started = match &self.thaw {
            ThawStart::Socket(path) => connect_to(path).map(|socket| self.thaw_unit = Some(socket)),
            ThawStart::Process { config } => {
                let mut command = Program::own().arg("--config").arg(config).arg("thaw").prepare();
                command.stdin(Stdio::null()).stdout(Stdio::null());
                process::detach(&mut command, None);
                // It outlives this process, so nobody here waits for it.
                command.spawn().map(drop)
            }
        };
        if let Err(error) = started {
            // Nothing is frozen any more; what is owed is brought to an end at the daemon's next start.
            tracing::error!(event = "thaw_not_started", error = %error);
        }
    }

    /// Waits until the thaw unit has taken its connection, then goes.
    fn let_go(&mut self) {
        self.filesystems.iter_mut().for_each(Filesystem::reap);
        if let Some(socket) = &self.thaw_unit {
            let timeout = PollTimeout::try_from(THAW_START_MAX).unwrap_or(PollTimeout::MAX);
            // Whatever it says: it has been started.
            let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout);
        }
    }

    fn wait(&self) -> io::Result<Woken> {
        let mut fds = Vec::with_capacity(4 + self.filesystems.len());
        // What has ended already would wake us over and over.
        let mut unless = |is_over: bool, fd| {
            (!is_over).then(|| {
                fds.push(PollFd::new(fd, PollFlags::POLLIN));
                fds.len() - 1
            })
        };
        unless(false, self.reports.as_fd());
        let signal = unless(false, self.signals.as_fd());
        let runner = unless(self.is_runner_gone, self.runner.as_fd());
        let link = unless(self.link.is_closed(), self.link.as_fd());
        let freezers = self.filesystems.iter().map(|f| unless(!f.awaits_freezer(), f.freezer_fd()));
        let freezers: Vec<Option<usize>> = freezers.collect();
        let timeout = self.deadline.map(|deadline| TimeSpec::from(deadline.saturating_sub(monotonic())));
        match ppoll(&mut fds, timeout, None) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => return Ok(Woken::default()),
            Err(errno) => return Err(errno.into()),
        }
        let woken = |at: Option<usize>| at.is_some_and(|at| fds[at].any() == Some(true));
        Ok(Woken {
            signal: woken(signal),
            runner: woken(runner),
            link: woken(link),
            freezers: freezers.into_iter().map(woken).collect(),
        })
    }
}

/// Who has something to say.
#[derive(Default)]
struct Woken {
    signal: bool,
    runner: bool,
    link: bool,
    freezers: Vec<bool>,
}

fn freeze_fault(path: &Path, errno: nix::errno::Errno) -> Fault {
    match errno {
        nix::errno::Errno::EBUSY => Fault::Busy { mount: path.to_owned() },
        nix::errno::Errno::EOPNOTSUPP => Fault::NotSupported { mount: path.to_owned() },
        errno => Fault::failed(format!("freeze {}", path.display()), errno.desc()),
    }
}
