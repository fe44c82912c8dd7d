//! One filesystem of a window, seen from the guard: its freezer process and a thread of its own.
//!
//! Everything that may wait for the kernel is away from the guard's main thread: FIFREEZE in the freezer,
//! `syncfs` and FITHAW in the thread, which is started before the window. The thread takes one success of
//! FITHAW at most, and believes EINVAL only once the freezer has returned or died: while FIFREEZE waits for
//! a write in flight, the kernel says EINVAL and freezes afterwards.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use nix::errno::Errno;

use super::freezer::{self, Returned};
use super::journal::Journal;
use crate::platform::command::Program;
use crate::platform::{fsfreeze, process};

/// Tries to have little left to write out.
const SYNC_TRIES: u32 = 5;
/// Pause between two tries to thaw what is still on its way; the first ones are short.
const THAW_PAUSE_MIN: Duration = Duration::from_micros(200);
const THAW_PAUSE_MAX: Duration = Duration::from_millis(10);
/// A freeze may be on the way.
const ON_ITS_WAY: u8 = 0;
/// The freezer has returned or died, and may have frozen.
const LANDED: u8 = 1;
/// The freezer has not frozen, and never will.
const NOT_OURS: u8 = 2;
/// Enough for a thread that only makes system calls; all of it is locked in memory.
const STACK_BYTES: usize = 128 * 1024;

/// What a filesystem's thread has to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Report {
    /// Which filesystem.
    pub index: usize,
    /// What happened.
    pub what: Happened,
}

/// What happened in a filesystem's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Happened {
    /// It was written out; so long took the fastest try.
    Synced(Duration),
    /// It could not be written out.
    SyncFailed(Errno),
    /// Its FITHAW returned 0, at that time of `CLOCK_MONOTONIC`.
    Thawed(Duration),
    /// It is not frozen, and nobody of ours is on the way to freeze it.
    NotFrozen,
}

/// How far the freezer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freezer {
    /// It is being started.
    Starting,
    /// It waits for its order.
    Ready,
    /// It has its order.
    Told,
    /// FIFREEZE returned.
    Returned(Returned),
    /// It is dead without an answer.
    Died,
}

enum Job {
    Sync { limit: Duration },
    Thaw,
}

/// A filesystem of the window.
#[derive(Debug)]
pub(super) struct Filesystem {
    /// A folder on it, as the runner names it.
    pub path: PathBuf,
    /// How far its freezer is.
    pub freezer: Freezer,
    /// How its thaw went; `None`: it has not ended.
    pub thaw: Option<Happened>,
    thaw_ordered: bool,
    was_told: bool,
    child: Child,
    socket: UnixStream,
    /// How far the freezer is, for the thread: one of the three below.
    settled: Arc<AtomicU8>,
    jobs: SyncSender<Job>,
}

/// Where the threads report to: a channel, and a socket that wakes the main thread's poll(2).
#[derive(Clone, Debug)]
pub(super) struct Reporter {
    reports: SyncSender<Report>,
    wake: Arc<UnixStream>,
}

/// The main thread's end.
#[derive(Debug)]
pub(super) struct Reports {
    reports: Receiver<Report>,
    wake: UnixStream,
}

/// Makes both ends, with room for all that `filesystems` threads can report.
///
/// # Errors
/// When no descriptor is left.
pub(super) fn reports(filesystems: usize) -> io::Result<(Reporter, Reports)> {
    let (sender, receiver) = sync_channel(2 * filesystems + 1);
    let (wake, woken) = UnixStream::pair()?;
    woken.set_nonblocking(true)?;
    Ok((Reporter { reports: sender, wake: Arc::new(wake) }, Reports { reports: receiver, wake: woken }))
}

impl Reporter {
    fn say(&self, index: usize, what: Happened) {
        // The main thread is gone only with the whole process.
        let _ = self.reports.send(Report { index, what });
        let _ = (&*self.wake).write(&[0]);
    }
}

impl Reports {
    /// The next report, if there is one.
    pub(super) fn next(&mut self) -> Option<Report> {
        let mut drained = [0; 64];
        while matches!((&self.wake).read(&mut drained), Ok(64)) {}
        self.reports.try_recv().ok()
    }
}

impl AsFd for Reports {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Filesystem {
    /// Starts its freezer and its thread. Nothing is frozen.
    ///
    /// # Errors
    /// When one of them cannot be started.
    pub(super) fn start(
        index: usize,
        path: &Path,
        folder: OwnedFd,
        journal: &Journal,
        reporter: Reporter,
    ) -> io::Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        let record = journal.share()?;
        let number = |fd: &OwnedFd| fd.as_raw_fd().to_string();
        let mut command = Program::own()
            .arg("freezer")
            .args(["--mount", &number(&folder), "--journal", &number(&record)])
            .args(["--offset", &journal.state_offset(index).to_string()])
            .prepare();
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
        // Without its guard nobody would thaw what it freezes.
        process::die_with_parent(&mut command);
        process::inherit(&mut command, folder.as_fd());
        process::inherit(&mut command, record.as_fd());
        let child = command.spawn()?;
        let (jobs, waiting) = sync_channel(2);
        let settled = Arc::new(AtomicU8::new(ON_ITS_WAY));
        let thread = Thread { index, folder, settled: Arc::clone(&settled), reporter };
        std::thread::Builder::new()
            .name(format!("filesystem-{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || thread.run(&waiting))?;
        Ok(Self {
            path: path.to_owned(),
            freezer: Freezer::Starting,
            thaw: None,
            thaw_ordered: false,
            was_told: false,
            child,
            socket,
            settled,
            jobs,
        })
    }

    /// Has it written out, until that takes less than `limit`; reports [`Happened::Synced`].
    pub(super) fn sync(&self, limit: Duration) {
        let _ = self.jobs.try_send(Job::Sync { limit });
    }

    /// Tells the freezer to freeze.
    pub(super) fn freeze(&mut self) {
        if self.freezer == Freezer::Ready {
            // A freezer that is dead is noticed by its end of the socket.
            let _ = (&self.socket).write_all(&[freezer::GO]);
            self.freezer = Freezer::Told;
            self.was_told = true;
        }
    }

    /// Hears what the freezer says. Called when its socket is readable.
    pub(super) fn hear_freezer(&mut self) {
        let mut bytes = [0; Returned::BYTES];
        // What it says is written in one piece, which a local stream socket does not tear.
        self.freezer = match (&self.socket).read(&mut bytes) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Ok(1) if self.freezer == Freezer::Starting => Freezer::Ready,
            Ok(Returned::BYTES) if self.freezer == Freezer::Told => Freezer::Returned(Returned::of_bytes(bytes)),
            _ => Freezer::Died,
        };
        let settled = match self.freezer {
            Freezer::Starting | Freezer::Ready | Freezer::Told => ON_ITS_WAY,
            Freezer::Returned(Returned { result: Err(_), .. }) => NOT_OURS,
            Freezer::Died if !self.was_told => NOT_OURS,
            Freezer::Returned(_) | Freezer::Died => LANDED,
        };
        self.settled.store(settled, Ordering::SeqCst);
    }

    /// Whether the freezer has something to say, or may have.
    pub(super) fn awaits_freezer(&self) -> bool {
        matches!(self.freezer, Freezer::Starting | Freezer::Ready | Freezer::Told)
    }

    /// The freezer's end of the socket.
    pub(super) fn freezer_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sees to it that it is not frozen by us: a freezer that has not frozen yet never will, and what is
    /// frozen, or may be, is thawed. What somebody else froze is left alone.
    pub(super) fn end(&mut self) {
        if self.awaits_freezer() {
            // Inside FIFREEZE it dies only when that returns; then its end of the socket closes.
            let _ = self.child.kill();
        }
        let failed = matches!(self.freezer, Freezer::Returned(Returned { result: Err(_), .. }));
        let may_be_frozen = self.was_told && !failed;
        if may_be_frozen && !self.thaw_ordered {
            self.thaw_ordered = true;
            let _ = self.jobs.try_send(Job::Thaw);
        }
    }

    /// Whether nothing of ours is frozen here or on the way to be.
    pub(super) fn has_ended(&self) -> bool {
        // A freezer that was killed inside FIFREEZE may still freeze until it is dead.
        !self.was_told || !self.awaits_freezer() && (self.thaw.is_some() || !self.thaw_ordered)
    }

    /// Collects the freezer, which has ended or is about to.
    pub(super) fn reap(&mut self) {
        // It waits only for a process that has closed its socket already or was killed.
        let _ = self.child.kill();
        let _ = self.child.try_wait();
    }
}

struct Thread {
    index: usize,
    folder: OwnedFd,
    settled: Arc<AtomicU8>,
    reporter: Reporter,
}

impl Thread {
    fn run(&self, jobs: &Receiver<Job>) {
        while let Ok(job) = jobs.recv() {
            let what = match job {
                Job::Sync { limit } => self.sync(limit),
                Job::Thaw => self.thaw(),
            };
            self.reporter.say(self.index, what);
        }
    }

    fn sync(&self, limit: Duration) -> Happened {
        let mut fastest = Duration::MAX;
        for _ in 0..SYNC_TRIES {
            let begin = fsfreeze::monotonic();
            if let Err(errno) = nix::unistd::syncfs(&self.folder) {
                return Happened::SyncFailed(errno);
            }
            fastest = fastest.min(fsfreeze::monotonic().saturating_sub(begin));
            if fastest < limit {
                break;
            }
        }
        Happened::Synced(fastest)
    }

    fn thaw(&self) -> Happened {
        let mut pause = THAW_PAUSE_MIN;
        loop {
            // Asked before the call: a freeze may land between the two.
            let settled = self.settled.load(Ordering::SeqCst);
            if settled == NOT_OURS {
                return Happened::NotFrozen;
            }
            match fsfreeze::thaw(&self.folder) {
                Ok(()) => return Happened::Thawed(fsfreeze::monotonic()),
                Err(Errno::EINVAL) if settled == LANDED => return Happened::NotFrozen,
                // Whatever else it says: as long as it may be frozen there is nothing better to do.
                Err(_) => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(THAW_PAUSE_MAX);
        }
    }
}
