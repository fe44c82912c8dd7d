//! What a dead guard left behind, by its journal and by nothing else.
//!
//! In: the journal. Out: FITHAW on filesystems whose letter says that we began to freeze them, and [`Left`].
//! Never thawed: what was frozen by somebody else, what was never begun, and anything of an earlier life
//! of the machine. A guard that lives and whose window is not over is left alone.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{EINTR, EINVAL};

use super::client::GuardError;
use super::journal::{Journal, Outcome, State, boot_id};
use super::mounted::Mounted;
use crate::platform::files::FileError;
use crate::platform::fsfreeze::{self, monotonic};

/// How long to wait for a freeze of ours that is on its way, by hand and at start.
const LEFT_PATIENCE: Duration = Duration::from_secs(2);
/// After so long a runner that has lost its guard says that the freeze is stuck.
const LOST_PATIENCE: Duration = Duration::from_millis(500);
/// So long it goes on trying all the same; its process seldom lives longer.
const STUCK_PATIENCE: Duration = Duration::from_secs(3600);
/// A guard that is so late is stopped or stuck.
const LATE_AFTER: Duration = Duration::from_millis(500);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(2);

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// A living guard has it in hand and its window is not over; nothing was touched.
    pub is_watched: bool,
    /// The window has ended otherwise than by the runner's order: what is owed may be done beside a runner
    /// that still lives.
    pub struck: bool,
    /// It ended because the runner is gone: its last processes end by themselves.
    pub is_runner_gone: bool,
    /// Thawed by this call.
    pub thawed: Vec<PathBuf>,
    /// Frozen by somebody else; left as they are.
    pub foreign: Vec<PathBuf>,
    /// A freeze of ours is stuck inside the kernel; try again later.
    pub stuck: Vec<PathBuf>,
}

/// Thaws what the journal says that we froze. Blocking, safe at any time, also beside a living guard. A
/// journal that does not exist means that nothing was frozen.
///
/// # Errors
/// When the journal cannot be read, or a filesystem that we froze cannot be found or thawed.
pub fn thaw_left(journal: &Path) -> Result<Left, GuardError> {
    thaw_left_in(journal, &boot_id()?)
}

/// As [`thaw_left`], in that life of the machine.
fn thaw_left_in(path: &Path, boot_id: &str) -> Result<Left, GuardError> {
    let Some(journal) = Journal::open(path)? else { return Ok(Left::default()) };
    if journal.header.boot_id != boot_id {
        // Frozen is a state of the kernel, and that kernel is gone. What is owed is still owed.
        return Ok(Left { struck: true, ..Left::default() });
    }
    let is_over = || -> Result<bool, FileError> {
        let late = journal.deadline()?.is_some_and(|deadline| monotonic() > deadline + LATE_AFTER);
        Ok(late || journal.outcome()? != Outcome::Open)
    };
    if !journal.try_lock()? && !is_over()? {
        return Ok(Left { is_watched: true, ..Left::default() });
    }
    let found = Thawing { journal: &journal, patience: LEFT_PATIENCE, by: Outcome::ByRecovery }
        .run(|index| journal.header.mounts[index].open())?;
    let outcome = journal.outcome()?;
    let is_runner_gone = outcome == Outcome::RunnerGone;
    Ok(Left { is_watched: false, struck: outcome.is_struck(), is_runner_gone, ..found })
}

/// Whether the guard's record says that the window ended otherwise than by the runner's order.
pub fn struck(journal: &Path) -> bool {
    // A record that cannot be read allows nothing.
    let read = || Journal::open(journal).ok()??.outcome().ok();
    read().is_some_and(Outcome::is_struck)
}

/// Thaws by the open folders of a runner that has lost its guard. Blocking. `say_stuck` is called at most once,
/// when a freeze of ours does not come back; after that it goes on trying.
pub(super) fn thaw_lost(journal: &Path, folders: &[OwnedFd], say_stuck: impl FnOnce(PathBuf)) {
    let lost = |patience: Duration| -> Result<Left, GuardError> {
        // Without a record nothing was begun.
        let Some(journal) = Journal::open(journal)? else { return Ok(Left::default()) };
        Thawing { journal: &journal, patience, by: Outcome::ByRunner }.run(|index| {
            let folder = folders.get(index).ok_or(Errno::ENODEV)?;
            folder.try_clone()
        })
    };
    let first = lost(LOST_PATIENCE).map(|left| left.stuck.into_iter().next());
    let last = match first {
        Ok(None) => return,
        Ok(Some(mount)) => {
            say_stuck(mount);
            lost(STUCK_PATIENCE)
        }
        Err(error) => Err(error),
    };
    if last.is_err() && Journal::open(journal).is_err() {
        // Without a record that can be read: better thawed once too often than frozen for ever.
        for folder in folders {
            let _ = fsfreeze::thaw(folder);
        }
    }
}

struct Thawing<'a> {
    journal: &'a Journal,
    patience: Duration,
    /// Who thaws, for the record.
    by: Outcome,
}

impl Thawing<'_> {
    fn run(&self, open: impl Fn(usize) -> io::Result<OwnedFd>) -> Result<Left, GuardError> {
        let mut left = Left::default();
        let end = monotonic() + self.patience;
        let mounts = &self.journal.header.mounts;
        let mut failed = loop {
            // Asked before the states: who has the lock sees the last ones.
            let is_alone = self.journal.try_lock()?;
            left.stuck.clear();
            let mut failed = None;
            for (index, Mounted { path, .. }) in mounts.iter().enumerate() {
                let state = self.journal.state(index)?;
                if state == State::Busy && !left.foreign.contains(path) {
                    left.foreign.push(path.clone());
                }
                if !state.may_be_frozen() {
                    continue;
                }
                let thawed = match open(index).and_then(|folder| Ok(fsfreeze::thaw(folder)?)) {
                    Ok(()) => {
                        left.thawed.push(path.clone());
                        true
                    }
                    Err(error) => match error.raw_os_error() {
                        // Only when its freezer has returned, or nobody is left who could, is it believed.
                        Some(EINVAL) if state == State::Frozen || is_alone => true,
                        Some(EINVAL | EINTR) => {
                            left.stuck.push(path.clone());
                            false
                        }
                        _ => {
                            let step = format!("thaw {}", path.display());
                            failed = Some(GuardError::Failed { step, reason: error.to_string() });
                            false
                        }
                    },
                };
                // The others are thawed whatever becomes of one, or of the record.
                if thawed && let Err(error) = self.journal.set_state(index, State::Thawed) {
                    failed = Some(error.into());
                }
            }
            if left.stuck.is_empty() || monotonic() >= end {
                break failed;
            }
            std::thread::sleep(PAUSE);
        };
        // A window that had begun and of whose end nobody has written ended now.
        if self.journal.deadline()?.is_some() && self.journal.outcome()? == Outcome::Open {
            let noted = self.journal.set_outcome(self.by);
            failed = failed.or(noted.err().map(GuardError::from));
        }
        failed.map_or(Ok(left), Err)
    }
}
