//! The runner's handle on its guard, and the runner's half of the promise: when the guard is gone, or says
//! nothing beyond the deadline, this process thaws by itself.
//!
//! A thread of its own listens to the guard, so that neither a busy runtime nor another thread that waits for
//! a frozen disk is in the way. In: what to watch. Out: the guard's word, or why there is none.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use nix::unistd::Pid;
use tokio::sync::watch;

use super::journal::boot_id;
use super::link::{self, Link};
use super::messages::{Answer, Arm, Fault, Mount, Order};
use super::mounted::{open_folder, superblock_of};
use super::recovery;
use crate::platform::command::Program;
use crate::platform::files::{self, FileError};
use crate::platform::{fsfreeze, process};

/// Hard ceiling of a window in which filesystems are frozen.
pub const FROZEN_MAX: Duration = Duration::from_secs(30);
/// Hard ceiling of a window in which nothing is frozen, but something else is held.
pub const HELD_MAX: Duration = Duration::from_secs(2 * 3600);

/// How long it may take until everything is written out and a guard is ready.
pub const ARM_MAX: Duration = Duration::from_secs(120);

/// How a guard is had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// As a process of our own, which starts `hestner-agent thaw` with this settings file.
    Process {
        /// The settings file.
        config: PathBuf,
    },
    /// By connecting to the socket of its unit.
    Socket(PathBuf),
}

/// What is to be watched.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The run, for the guard's words to people.
    pub run_uid: String,
    /// Where the guard keeps its record; the file must not exist yet, its folder must be trusted.
    pub journal: PathBuf,
    /// A folder on each filesystem to freeze, no filesystem twice. May be empty: then only the window is
    /// kept.
    pub mounts: Vec<PathBuf>,
    /// How long the window may be, from [`Guard::begin`] or, without it, from [`Guard::freeze`].
    pub window: Duration,
}

/// The guard's word: everything was frozen until the order to thaw, and is thawed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// From the first FIFREEZE to the last FITHAW; without filesystems from the window's begin to its end.
    pub frozen: Duration,
}

/// A window that could not be had, or did not end by the runner's order. Whatever it is, what was frozen is
/// thawed, except as `Stuck` says.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// There is no guard to talk to, or it does not answer.
    #[error("there is no guard: cannot {step}")]
    Unreachable {
        /// What was tried.
        step: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The guard is gone without its word.
    #[error("the guard was lost; what was frozen was thawed without it")]
    Lost,
    /// Somebody else has frozen the filesystem; it was left as it is.
    #[error("{} was frozen already by somebody else and was left as it is", mount.display())]
    Busy {
        /// Where.
        mount: PathBuf,
    },
    /// The window's deadline passed.
    #[error("the frozen window of {} ms was over; everything was thawed", window.as_millis())]
    Deadline {
        /// How long it was.
        window: Duration,
    },
    /// The guard was told to end by somebody else than its runner (a stop of its unit, a reboot).
    #[error("the guard was told to stop; everything was thawed")]
    Stopped,
    /// The kernel has not come back from FIFREEZE. The guard goes on trying to thaw.
    #[error("freezing {} is stuck inside the kernel and nobody can cancel it; it is thawed as soon as it lands", mount.display())]
    Stuck {
        /// Where.
        mount: PathBuf,
    },
    /// There is too much to write out.
    #[error("writing out {} took {} ms, more than the {} ms that are safe before a freeze", mount.display(), took.as_millis(), limit.as_millis())]
    SlowSync {
        /// Where.
        mount: PathBuf,
        /// The fastest of the tries.
        took: Duration,
        /// A quarter of the window.
        limit: Duration,
    },
    /// The filesystem is not ext4, xfs or btrfs, or cannot be frozen.
    #[error("{} is on a filesystem that cannot be frozen (ext4, xfs and btrfs can)", mount.display())]
    NotSupported {
        /// Where.
        mount: PathBuf,
    },
    /// The window was ended before everything was frozen.
    #[error("{} was not frozen yet when the window ended", mount.display())]
    NotFrozen {
        /// Where.
        mount: PathBuf,
    },
    /// Somebody else has thawed it, so that what was taken is no point in time.
    #[error("{} was thawed by somebody else before its time", mount.display())]
    ThawedByOthers {
        /// Where.
        mount: PathBuf,
    },
    /// The window is longer than the ceiling.
    #[error("a window of {} s is longer than the ceiling of {} s", window.as_secs(), ceiling.as_secs())]
    TooLong {
        /// What was asked for.
        window: Duration,
        /// What can be had.
        ceiling: Duration,
    },
    /// The state folder has no room for its record; nothing is frozen.
    #[error("the guard has no room for its record: {reason}")]
    NoRoom {
        /// What it could not write.
        reason: String,
    },
    /// A step of the guard failed; nothing is frozen.
    #[error("the guard could not {step}: {reason}")]
    Failed {
        /// What it tried, as a verb with its object.
        step: String,
        /// Why not.
        reason: String,
    },
    /// The record of the window cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

/// How long connecting, or the first answer of a freshly started guard, may take beyond its own limits.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// How long after the deadline a silent guard is waited for before the runner thaws by itself.
const GRACE: Duration = Duration::from_millis(300);

/// An armed guard. Dropping it ends the window: the guard thaws and starts `hestner-agent thaw`.
#[derive(Debug)]
pub struct Guard {
    orders: UnixStream,
    said: watch::Receiver<Said>,
    /// When this process loses patience, in ns of `CLOCK_MONOTONIC`; 0: no window runs.
    patience_ns: Arc<AtomicU64>,
    /// Wakes the listener: there is a deadline now. Its end tells it that nobody waits any more.
    poke: UnixStream,
    window: Duration,
    pid: Option<Pid>,
}

/// The last thing heard of the guard.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    Armed,
    Begun,
    Frozen,
    Thawed(Verdict),
    Ended(Fault),
}

impl Guard {
    /// Starts a guard and has it make everything ready: the filesystems are written out, the record is on
    /// the disk. Nothing is frozen and no window runs yet.
    ///
    /// # Errors
    /// When it cannot be had in time; nothing was frozen.
    pub async fn arm(start: &Start, watch: Watch) -> Result<Self, GuardError> {
        let Watch { run_uid, journal, mounts, window } = watch;
        let mut named = Vec::new();
        let mut folders = Vec::new();
        for path in mounts {
            let folder = open_folder(&path).map_err(files::failed("open", &path))?;
            named.push(Mount { path, superblock: superblock_of(&folder) });
            folders.push(folder);
        }
        let own = fsfreeze::own_pidfd().map_err(|errno| unreachable("watch this process", errno.into()))?;
        let (socket, child) = reach(start)?;
        let pid = child.as_ref().and_then(|child| i32::try_from(child.id()).ok()).map(Pid::from_raw);
        let link = Link::new(socket).map_err(|e| unreachable("believe who answers", e))?;
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        let order =
            Order::Arm(Arm { run_uid, boot_id: boot_id()?, journal: journal.clone(), mounts: named, window_ms });
        let beside: Vec<BorrowedFd<'_>> = std::iter::once(&own).chain(&folders).map(AsFd::as_fd).collect();
        link.send_with(&order, &beside).map_err(|e| unreachable("tell the guard what to watch", e))?;

        let orders = link.writer().map_err(|e| unreachable("copy a descriptor", e))?;
        let (poke, poked) = UnixStream::pair().map_err(|e| unreachable("make a socket", e))?;
        let (says, said) = watch::channel(Said::Nothing);
        let patience_ns = Arc::new(AtomicU64::new(0));
        let (patience, start) = (Arc::clone(&patience_ns), start.clone());
        let listener = Listener { link, poked, says, patience_ns: patience, folders, journal, child, start };
        // A thread, and no task: it thaws also when everything else of this process waits for a disk.
        std::thread::Builder::new()
            .name("guard".to_owned())
            .spawn(move || listener.run())
            .map_err(|e| unreachable("start a thread", e))?;
        let mut guard = Self { orders, said, patience_ns, poke, window, pid };
        match tokio::time::timeout(ARM_MAX + ANSWER_MAX, guard.hear(|said| *said == Said::Armed)).await {
            Ok(Ok(_)) => Ok(guard),
            Ok(Err(GuardError::Lost)) => {
                Err(unreachable("keep it: it ended at once", io::ErrorKind::BrokenPipe.into()))
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(unreachable("hear that it is armed", io::ErrorKind::TimedOut.into())),
        }
    }

    /// Its process, where it is a child of ours: to be spared when descendants are killed.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// The window begins now: something is about to be held. Freezes nothing.
    ///
    /// # Errors
    /// When the guard is gone.
    pub async fn begin(&mut self) -> Result<(), GuardError> {
        let given_ns = self.start_patience();
        self.order(&Order::Begin { given_ns })?;
        self.hear(|said| *said == Said::Begun).await.map(drop)
    }

    /// Another step begins now, which may take `window`, [`HELD_MAX`] at most; what is left of the step before counts
    /// no more, and one that took too long has ended the window. For a guard without filesystems. Nothing is waited
    /// for: whether every step was in its time is said by [`Self::thaw`].
    ///
    /// # Errors
    /// When the window before has ended already.
    pub fn renew(&self, window: Duration) -> Result<(), GuardError> {
        let now = fsfreeze::monotonic();
        self.patience_ns.store(nanoseconds(now + window + GRACE), Ordering::SeqCst);
        let _ = (&self.poke).write_all(&[0]);
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        self.order(&Order::Renew { given_ns: nanoseconds(now), window_ms })
    }

    /// Freezes all filesystems. The window begins now, if it has not yet. On an error nothing of ours is
    /// frozen any more (but see [`GuardError::Stuck`]), and the guard is gone.
    ///
    /// # Errors
    /// [`GuardError`].
    pub async fn freeze(&mut self) -> Result<(), GuardError> {
        let given_ns = self.start_patience();
        self.order(&Order::Freeze { given_ns })?;
        self.hear(|said| *said == Said::Frozen).await.map(drop)
    }

    /// Whether the window has ended otherwise than by [`Self::thaw`].
    pub fn has_struck(&self) -> bool {
        matches!(&*self.said.borrow(), Said::Ended(_))
    }

    /// Completes when the window has ended otherwise than by [`Self::thaw`], and says why; what was frozen is thawed then
    /// (but see [`GuardError::Stuck`]). Cancel-safe: it only waits, and completes again if asked again.
    pub fn struck(&self) -> impl Future<Output = GuardError> + use<> {
        let mut said = self.said.clone();
        async move {
            // The listener is gone only after its last word.
            match said.wait_for(|said| matches!(said, Said::Ended(_))).await.as_deref() {
                Ok(Said::Ended(fault)) => fault.clone().into(),
                _ => GuardError::Lost,
            }
        }
    }

    /// Orders the thaw and waits for the guard's word.
    ///
    /// # Errors
    /// When the guard does not confirm that everything was frozen until now. What was frozen is thawed all
    /// the same (but see [`GuardError::Stuck`]).
    pub async fn thaw(mut self) -> Result<Verdict, GuardError> {
        // Without a window nothing of ours waits for the guard's silence.
        self.start_patience();
        self.order(&Order::Thaw)?;
        match self.hear(|said| matches!(said, Said::Thawed(_))).await? {
            Said::Thawed(verdict) => Ok(verdict),
            _ => Err(GuardError::Lost),
        }
    }

    /// Starts our own copy of the deadline, if it does not run yet; tells the time.
    fn start_patience(&self) -> u64 {
        let now = fsfreeze::monotonic();
        let patience = nanoseconds(now + self.window + GRACE);
        if self.patience_ns.compare_exchange(0, patience, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            let _ = (&self.poke).write_all(&[0]);
        }
        nanoseconds(now)
    }

    fn order(&self, order: &Order) -> Result<(), GuardError> {
        match (link::send(&self.orders, order), &*self.said.borrow()) {
            (_, Said::Ended(fault)) => Err(fault.clone().into()),
            // A guard that is gone is heard of by the listener, which then thaws; its word is waited for.
            _ => Ok(()),
        }
    }

    async fn hear(&mut self, wanted: impl Fn(&Said) -> bool) -> Result<Said, GuardError> {
        let heard = self.said.wait_for(|said| wanted(said) || matches!(said, Said::Ended(_))).await;
        match heard.map(|said| said.clone()) {
            Ok(Said::Ended(fault)) => Err(fault.into()),
            Ok(said) => Ok(said),
            Err(_) => Err(GuardError::Lost),
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn unreachable(step: &str, source: io::Error) -> GuardError {
    GuardError::Unreachable { step: step.to_owned(), source }
}

/// Connects to a guard, or starts one of our own.
fn reach(start: &Start) -> Result<(UnixStream, Option<Child>), GuardError> {
    match start {
        Start::Socket(path) => {
            let failed = |e| unreachable(&format!("connect to {}", path.display()), e);
            link::connect_to(path).map(|socket| (socket, None)).map_err(failed)
        }
        Start::Process { config } => {
            let (ours, theirs) = UnixStream::pair().map_err(|e| unreachable("make a socket", e))?;
            let mut command = Program::own().arg("--config").arg(config).arg("guard").prepare();
            command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
            // It outlives this process, whose death it waits for.
            process::detach(&mut command, None);
            let child = command.spawn().map_err(|e| unreachable("start a guard", e))?;
            Ok((ours, Some(child)))
        }
    }
}

/// How long a process waits for a freeze that does not come back. One that takes longer is thawed by the next
/// run, or by hand.
const STUCK_SECONDS: &str = "3600";

/// Has a process of its own go on thawing until nothing is held: for a freeze that has not come back when
/// whoever waits for it is about to end. With units the guard's `ExecStopPost` does it.
pub fn go_on_thawing(start: &Start) {
    let Start::Process { config } = start else { return };
    let mut command = Program::own().arg("--config").arg(config).args(["thaw", "--wait", STUCK_SECONDS]).prepare();
    command.stdin(Stdio::null()).stdout(Stdio::null());
    process::detach(&mut command, None);
    // Without it the next run thaws.
    let _ = command.spawn();
}

/// Hears the guard in a thread of its own, and thaws when it is gone or silent.
struct Listener {
    link: Link,
    poked: UnixStream,
    says: watch::Sender<Said>,
    patience_ns: Arc<AtomicU64>,
    folders: Vec<OwnedFd>,
    journal: PathBuf,
    child: Option<Child>,
    start: Start,
}

impl Listener {
    fn run(mut self) {
        if let Some(said) = self.listen() {
            self.says.send_replace(said);
        } else {
            self.link.close();
            let mut is_said = false;
            recovery::thaw_lost(&self.journal, &self.folders, |mount| {
                is_said = true;
                go_on_thawing(&self.start);
                self.says.send_replace(Said::Ended(Fault::Stuck { mount }));
            });
            if !is_said {
                self.says.send_replace(Said::Ended(Fault::Lost));
            }
        }
        if let Some(child) = &mut self.child {
            // Its status does not matter; only that no dead process stays behind.
            let _ = child.wait();
        }
    }

    /// Listens until the guard's last word. `None`: it is gone or silent without one.
    fn listen(&mut self) -> Option<Said> {
        let mut is_dropped = false;
        loop {
            let patience = Duration::from_nanos(self.patience_ns.load(Ordering::SeqCst));
            let left = patience.saturating_sub(fsfreeze::monotonic());
            if !patience.is_zero() && left.is_zero() {
                return None;
            }
            let timeout = (!patience.is_zero()).then(|| TimeSpec::from(left));
            let mut fds = vec![PollFd::new(self.link.as_fd(), PollFlags::POLLIN)];
            if !is_dropped {
                fds.push(PollFd::new(self.poked.as_fd(), PollFlags::POLLIN));
            }
            // An interrupted wait is only a shorter one.
            let _ = ppoll(&mut fds, timeout, None);
            if fds.get(1).is_some_and(|poked| poked.any() == Some(true)) {
                is_dropped = matches!((&self.poked).read(&mut [0; 8]), Ok(0));
                if is_dropped {
                    // Nobody waits for a word any more: the guard hears the end and thaws.
                    self.link.hang_up();
                }
            }
            self.link.fill();
            loop {
                match self.link.next::<Answer>() {
                    Ok(Some(Answer::Armed)) => self.says.send_replace(Said::Armed),
                    Ok(Some(Answer::Begun)) => self.says.send_replace(Said::Begun),
                    Ok(Some(Answer::Frozen)) => self.says.send_replace(Said::Frozen),
                    Ok(Some(Answer::Thawed { frozen_ns })) => return Some(Said::Thawed(Verdict::of_ns(frozen_ns))),
                    Ok(Some(Answer::Ended(fault))) => return Some(Said::Ended(fault)),
                    Ok(None) => break,
                    Err(_) => return None,
                };
            }
            if self.link.is_closed() {
                return None;
            }
        }
    }
}
