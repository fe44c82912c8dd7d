//! Reading back what was put, before a snapshot says that it is there.
//!
//! In: objects and their sizes. Out: nothing, or the first one that its place does not give back as it was written. In
//! restic's format an object outside of `keys` and `config` is named by the SHA-256 of its bytes
//! (<https://restic.readthedocs.io/en/stable/100_references.html>), so this needs no key.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::format::{FormatError, Id};
use crate::storage::Object;

use super::super::open::{Archive, ArchiveError};
use super::{Cancel, Counters};

/// Reads objects back, so many at a time, as their place has them.
pub(super) fn read_back(
    archive: &Archive,
    objects: &[(Object, u64)],
    threads: usize,
    cancel: &Cancel,
    counters: &Counters,
) -> Result<(), ArchiveError> {
    counters.bytes_to_read_back.store(objects.iter().map(|(_, bytes)| bytes).sum(), Ordering::Relaxed);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let read = || {
        while let Some((object, bytes)) = objects.get(next.fetch_add(1, Ordering::Relaxed)) {
            if cancel.is_cancelled() {
                return Err(ArchiveError::Cancelled);
            }
            if failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            one(archive, object, *bytes).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            counters.bytes_read_back.fetch_add(*bytes, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(read)).collect();
        let ended = threads.into_iter().map(|thread| {
            let panicked = |_| Err(ArchiveError::Broken("a thread that read back panicked".to_owned()));
            thread.join().unwrap_or_else(panicked)
        });
        // All of them have ended before the first failure is told.
        ended.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Reads one object back.
pub(super) fn one(archive: &Archive, object: &Object, bytes: u64) -> Result<(), ArchiveError> {
    let there = archive.storage().read_back(object, bytes)?;
    if there.len() as u64 == bytes && Id::of(&there).to_hex() == object.name {
        return Ok(());
    }
    Err(ArchiveError::Object { object: object.to_string(), source: FormatError::Forged("object") })
}
