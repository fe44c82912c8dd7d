//! Proves that a repository holds what its snapshots need.
//!
//! In: an open repository, and how much of its data to read. Out: what was looked at, or everything that is wrong,
//! each finding with the object's name and what depends on it. Nothing is changed. The calls block.
//!
//! - **Structure**: every index parses; every pack that an index speaks of is there, with exactly the size that its
//!   entries and header add up to; every tree of every snapshot opens and hashes to its name; every blob that a tree
//!   names is in an index.
//! - **Data**: each chosen pack hashes to its name, its header is what the indexes say, and every blob in it
//!   decrypts, expands and hashes to its name.
//!
//! Memory: 56 to 64 bytes a blob for the index, some 100 a pack, some 50 a folder, and a few MiB for each thread.

mod packs;
mod structure;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::open::{Archive, ArchiveError};
use super::restore::Notes;
use crate::format::Id;

/// How much data is read.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Extent {
    /// None: structure only.
    Structure,
    /// Whole packs until so many percent of all bytes are reached.
    Percent {
        /// 0 to 100.
        percent: f64,
        /// Random; which packs it chooses. Another one each time covers everything in time.
        seed: u64,
    },
    /// Whole packs until so many bytes are reached.
    Bytes {
        /// At least one pack is read if it is not 0.
        bytes: u64,
        /// As above.
        seed: u64,
    },
    /// Everything.
    All,
}

/// How far it is; others may read it at any time.
#[derive(Debug, Default)]
pub struct Counters {
    /// Trees that were read.
    pub trees: AtomicU64,
    /// Bytes of packs that were read back as a whole.
    pub bytes_done: AtomicU64,
    /// Bytes of packs that are to be read; 0 while unknown.
    pub bytes_total: AtomicU64,
}

/// What was found right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Snapshots.
    pub snapshots: u64,
    /// Different trees in them.
    pub trees: u64,
    /// Packs whose place and size are right.
    pub packs: u64,
    /// Of those, packs that were read as a whole.
    pub packs_read: u64,
    /// Their bytes.
    pub bytes_read: u64,
}

/// A repository that is not whole, or could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Objects are missing or damaged.
    #[error("{} things are wrong: {}", .0.count, .0.first.join("; "))]
    Damaged(Notes),
    /// The repository's place failed.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The caller cancelled it.
    #[error("it was cancelled")]
    Cancelled,
}

/// What the indexes say of a pack.
struct Expected {
    /// Of the whole pack.
    bytes: u64,
    /// Of its entries, so that a header can be compared without holding them.
    entries: Id,
}

/// Packs by id.
type Packs = HashMap<Id, Expected>;

/// Verifies a repository with `threads` readers of packs, at least one.
///
/// # Errors
/// [`VerifyError::Damaged`] with everything that is wrong; otherwise when it could not be looked at to the end.
pub fn verify(
    archive: &Archive,
    extent: Extent,
    threads: usize,
    counters: &Counters,
    cancel: &AtomicBool,
) -> Result<Verified, VerifyError> {
    let mut findings = Notes::default();
    let mut verified = Verified::default();
    let structure = structure::check(archive, counters, cancel, &mut findings, &mut verified)?;
    let chosen = packs::choose(&structure.packs, extent);
    counters.bytes_total.store(chosen.iter().map(|(_, bytes)| bytes).sum(), Ordering::Relaxed);
    let damaged = packs::read(archive, &structure.packs, &chosen, threads, counters, cancel)?;
    verified.packs_read = chosen.len() as u64;
    verified.bytes_read = counters.bytes_done.load(Ordering::Relaxed);
    if !damaged.is_empty() {
        structure.name_dependants(archive, &damaged, cancel, &mut findings)?;
    }
    match findings.count {
        0 => Ok(verified),
        _ => Err(VerifyError::Damaged(findings)),
    }
}

fn go_on(cancel: &AtomicBool) -> Result<(), VerifyError> {
    if cancel.load(Ordering::Relaxed) { Err(VerifyError::Cancelled) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
