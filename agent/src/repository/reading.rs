//! Restoring from an open repository and verifying it, in the face's words: for runs of this host, and for whoever has
//! nothing but the repository and its key. The calls block, and take no lock.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::RepositoryError;
use super::open::Archive;
use super::restore::{self, Reader};
use super::snapshots;
use super::verify::{self, Extent, Verified, VerifyError};
use crate::format::Id;

/// Writes a snapshot's tree below `target`. Returns what this user or filesystem could not set, as sentences.
pub(super) fn restore(
    archive: &Archive,
    id: &Id,
    target: &Path,
    counters: &restore::Counters,
    cancel: &AtomicBool,
) -> Result<Vec<String>, RepositoryError> {
    let listed = snapshots::get(archive, id)?;
    let index = archive.load_index()?;
    let (options, reader) = (restore::Options::default(), Reader::new(archive, &index));
    let restored = restore::restore(&reader, listed.snapshot.tree, target, &options, counters, cancel)?;
    let restore::Notes { count, mut first } = restored.warnings;
    let more = count.saturating_sub(first.len() as u64);
    first.extend((more > 0).then(|| format!("and {more} more like these")));
    Ok(first)
}

/// Looks at the structure, and reads so much of the data back.
pub(super) fn verify(
    archive: &Archive,
    extent: Extent,
    counters: &verify::Counters,
    cancel: &AtomicBool,
) -> Result<Verified, RepositoryError> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    verify::verify(archive, extent, threads, counters, cancel).map_err(|error| match error {
        VerifyError::Archive(error) => error.into(),
        VerifyError::Cancelled => RepositoryError::Cancelled,
        damaged @ VerifyError::Damaged(_) => RepositoryError::Damaged(damaged),
    })
}
