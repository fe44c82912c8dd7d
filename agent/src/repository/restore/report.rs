//! What goes wrong, and whether it concerns one entry or all.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::{Blobs, Counters};
use crate::repository::open::ArchiveError;

/// How many notes are kept as text.
const NOTES_KEPT: usize = 50;

/// Things to tell: how many, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// How many.
    pub count: u64,
    /// The first fifty, a sentence each.
    pub first: Vec<String>,
}

impl Notes {
    pub(in crate::repository) fn add(&mut self, note: String) {
        self.count += 1;
        if self.first.len() < NOTES_KEPT {
            self.first.push(note);
        }
    }
}

/// A restore that did not end well.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Entries could not be restored.
    #[error("{} entries could not be restored: {}", .failures.count, .failures.first.join("; "))]
    Incomplete {
        /// Which, and why.
        failures: Notes,
        /// What could not be set on others.
        warnings: Notes,
    },
    /// The target cannot be used, or has no room.
    #[error("cannot {operation} {path}")]
    Target {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The repository's place failed.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// There is no such path in the snapshot.
    #[error("the snapshot holds no {0}")]
    NotFound(String),
    /// The same folders stand in it again and again.
    #[error(
        "the snapshot names the same folders again and again: {entries} entries so far, of which {new} are different; \
         no honest program writes such a tree"
    )]
    Endless {
        /// Entries met so far.
        entries: u64,
        /// Of those, entries of folders that were not met before.
        new: u64,
    },
    /// The caller cancelled it.
    #[error("it was cancelled")]
    Cancelled,
}

/// What a step of a restore fails with.
#[derive(Debug)]
pub(super) enum Trouble {
    /// One entry cannot be restored.
    Entry(String),
    /// Nothing more can be restored.
    Fatal(RestoreError),
}

impl Trouble {
    pub(super) fn fatal(operation: &'static str, path: impl Into<String>, error: impl Into<io::Error>) -> Self {
        Self::Fatal(RestoreError::Target { operation, path: path.into(), source: error.into() })
    }

    /// A call on something at the target failed: no room and a broken disk concern all that follows.
    pub(super) fn of(operation: &'static str, path: impl Into<String>, errno: Errno) -> Self {
        match errno {
            Errno::NOSPC | Errno::DQUOT | Errno::ROFS | Errno::IO | Errno::MFILE | Errno::NFILE | Errno::NOMEM => {
                Self::fatal(operation, path, errno)
            }
            _ => Self::Entry(format!("cannot {operation} {}: {}", path.into(), io::Error::from(errno))),
        }
    }

    /// A blob could not be had: an object that is missing, damaged or cannot be read concerns whoever needs it.
    pub(super) fn of_archive(error: ArchiveError) -> Self {
        if error.is_of_one_object() { Self::Entry(chain(&error)) } else { Self::Fatal(error.into()) }
    }
}

/// An error and what is behind it, as one sentence.
pub(in crate::repository) fn chain(error: &dyn std::error::Error) -> String {
    crate::platform::chain(error)
}

/// What all threads of a restore share.
pub(super) struct Context<'a> {
    pub(super) blobs: &'a dyn Blobs,
    pub(super) counters: &'a Counters,
    cancel: &'a AtomicBool,
    /// Some thread ended early.
    aborted: AtomicBool,
    told: Mutex<Told>,
    /// Whether the kernel lets this process do what only root may.
    pub(super) is_root: bool,
}

#[derive(Default)]
struct Told {
    failures: Notes,
    warnings: Notes,
    fatal: Option<RestoreError>,
}

impl<'a> Context<'a> {
    pub(super) fn new(blobs: &'a dyn Blobs, counters: &'a Counters, cancel: &'a AtomicBool) -> Self {
        let is_root = rustix::process::geteuid().is_root();
        Self { blobs, counters, cancel, aborted: AtomicBool::new(false), told: Mutex::default(), is_root }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asked at every entry, window and piece.
    pub(super) fn go_on(&self) -> Result<(), Trouble> {
        if self.cancel.load(Ordering::Relaxed) || self.aborted.load(Ordering::Relaxed) {
            return Err(Trouble::Fatal(RestoreError::Cancelled));
        }
        Ok(())
    }

    pub(super) fn warn(&self, warning: String) {
        self.told().warnings.add(warning);
    }

    pub(super) fn fail(&self, failure: String) {
        self.told().failures.add(failure);
    }

    /// Notes an entry's trouble and goes on; what concerns all is passed on.
    pub(super) fn survive(&self, done: Result<(), Trouble>) -> Result<(), Trouble> {
        match done {
            Err(Trouble::Entry(failure)) => {
                self.fail(failure);
                Ok(())
            }
            other => other,
        }
    }

    /// The first cause is kept; others follow from it.
    pub(super) fn abort(&self, trouble: Trouble) {
        let error = match trouble {
            Trouble::Fatal(error) => error,
            Trouble::Entry(failure) => return self.fail(failure),
        };
        self.aborted.store(true, Ordering::Relaxed);
        let mut told = self.told();
        // A thread that was told to stop says no more than that.
        let known = told.fatal.as_ref().is_some_and(|known| !matches!(known, RestoreError::Cancelled));
        if !known {
            told.fatal = Some(error);
        }
    }

    pub(super) fn end(&self, walked: Result<(), Trouble>) -> Result<(), RestoreError> {
        if let Err(trouble) = walked {
            self.abort(trouble);
        }
        let mut told = self.told();
        if let Some(fatal) = told.fatal.take() {
            return Err(fatal);
        }
        if told.failures.count > 0 {
            let (failures, warnings) = (std::mem::take(&mut told.failures), std::mem::take(&mut told.warnings));
            return Err(RestoreError::Incomplete { failures, warnings });
        }
        Ok(())
    }

    pub(super) fn warnings(&self) -> Notes {
        self.told().warnings.clone()
    }
}
