//! Packs on their way: filled by all workers, closed when they are big enough, and put by the uploaders.
//!
//! A worker that closes a pack hands it over while it holds the packer, so that only one closed pack a kind waits:
//! whoever wants to add meanwhile waits too, and memory stays bounded. Index files are written as packs were put,
//! so that a run that is broken off leaves what the next one can use.

use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender};

use crate::format::crypto::OVERHEAD_BYTES;
use crate::format::index::{BLOBS_MAX as INDEX_BLOBS_MAX, Index, IndexedPack};
use crate::format::pack::{BLOBS_MAX, PackedBlob, footer};
use crate::format::{BlobKind, Id};
use crate::storage::{Kind, Object};

use super::super::open::{ArchiveError, random};
use super::gate::Put;
use super::pipeline::{Pipeline, Stop};
use super::prove;

/// A pack is closed when it is at least so big, as restic has it.
pub(super) const PACK_BYTES: usize = 16 * 1024 * 1024;
/// Room for what comes with the blob that closes it.
const PACK_ROOM: usize = 1024 * 1024;
/// An index file is written after so many packs, so that half a gigabyte is the most that the next run must read to
/// take in what a crash left.
const INDEX_PACKS_MAX: usize = 32;

/// A closed pack without its footer.
#[derive(Debug, Default)]
pub(super) struct Filled {
    bytes: Vec<u8>,
    blobs: Vec<PackedBlob>,
}

/// Fills packs of one kind.
#[derive(Debug)]
pub(super) struct Packer {
    current: Mutex<Filled>,
    bytes_min: usize,
    closed: Sender<Filled>,
    empty: Receiver<Vec<u8>>,
}

/// A sealed blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sealed<'b> {
    pub(super) kind: BlobKind,
    pub(super) id: Id,
    pub(super) bytes: &'b [u8],
    pub(super) raw_length: Option<u32>,
}

impl Packer {
    pub(super) fn new(bytes_min: usize, closed: Sender<Filled>, empty: Receiver<Vec<u8>>) -> Self {
        Self { current: Mutex::default(), bytes_min, closed, empty }
    }

    /// Adds a blob; waits while the uploaders are behind.
    pub(super) fn add(&self, blob: Sealed<'_>) -> Result<(), Stop> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.bytes.capacity() == 0 {
            current.bytes = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(self.bytes_min + PACK_ROOM));
        }
        let (Ok(offset), Ok(length)) = (u32::try_from(current.bytes.len()), u32::try_from(blob.bytes.len())) else {
            return Err(Stop);
        };
        current.bytes.reserve_exact(blob.bytes.len());
        current.bytes.extend_from_slice(blob.bytes);
        let Sealed { kind, id, raw_length, .. } = blob;
        current.blobs.push(PackedBlob { kind, id, offset, length, raw_length });
        if current.bytes.len() >= self.bytes_min || current.blobs.len() >= BLOBS_MAX {
            self.closed.send(std::mem::take(&mut current)).map_err(|_| Stop)?;
        }
        Ok(())
    }

    /// Hands over what is there, however little.
    pub(super) fn flush(&self) -> Result<(), Stop> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.blobs.is_empty() {
            return Ok(());
        }
        self.closed.send(std::mem::take(&mut current)).map_err(|_| Stop)
    }
}

/// What was put.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    objects: Vec<(Object, u64)>,
    unindexed: Vec<IndexedPack>,
}

impl Ledger {
    /// With packs that were there before and must be named.
    pub(super) fn of(unindexed: Vec<IndexedPack>) -> Self {
        Self { objects: Vec::new(), unindexed }
    }
}

/// Puts packs until there are no more. Runs in a thread of its own.
pub(super) fn upload(pipeline: &Pipeline<'_>, closed: &Receiver<Filled>, empty: &Sender<Vec<u8>>) {
    while let Ok(filled) = closed.recv() {
        // A pack without blobs is the end.
        if filled.blobs.is_empty() {
            return;
        }
        if pipeline.check().is_err() {
            // Whoever waits to hand over a pack is let go.
            continue;
        }
        match put(pipeline, filled) {
            Ok(mut buffer) => {
                buffer.clear();
                let _ = empty.try_send(buffer);
            }
            Err(error) => drop(pipeline.fail(error)),
        }
    }
}

fn put(pipeline: &Pipeline<'_>, filled: Filled) -> Result<Vec<u8>, ArchiveError> {
    let Filled { mut bytes, blobs } = filled;
    let end = footer(pipeline.archive.cipher(), &random()?, &blobs)?;
    bytes.reserve_exact(end.len());
    bytes.extend_from_slice(&end);
    let id = Id::of(&bytes);
    let object = Object::new(Kind::Pack, id.to_hex());
    pipeline.archive.storage().put(&object, &bytes)?;
    prove::read_back(pipeline.archive, &object, bytes.len() as u64)?;
    pipeline.stored(bytes.len() as u64);
    let full = {
        let mut ledger = pipeline.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.objects.push((object, bytes.len() as u64));
        ledger.unindexed.push(IndexedPack { id, blobs });
        let blobs: usize = ledger.unindexed.iter().map(|pack| pack.blobs.len()).sum();
        let is_full = ledger.unindexed.len() >= INDEX_PACKS_MAX || blobs >= INDEX_BLOBS_MAX;
        is_full.then(|| std::mem::take(&mut ledger.unindexed))
    };
    if let Some(packs) = full {
        put_index(pipeline, packs)?;
    }
    Ok(bytes)
}

fn put_index(pipeline: &Pipeline<'_>, packs: Vec<IndexedPack>) -> Result<(), ArchiveError> {
    let index = Index { supersedes: Vec::new(), packs };
    let (object, size) = pipeline.archive.write_file(Kind::Index, &index.to_bytes()?)?;
    prove::read_back(pipeline.archive, &object, size)?;
    pipeline.stored(size);
    pipeline.ledger.lock().unwrap_or_else(PoisonError::into_inner).objects.push((object, size));
    Ok(())
}

/// Writes the last index file, when all uploaders have ended. After a failure this only serves the next run.
pub(super) fn finish(pipeline: &Pipeline<'_>) -> Result<Put, ArchiveError> {
    let packs = std::mem::take(&mut pipeline.ledger.lock().unwrap_or_else(PoisonError::into_inner).unindexed);
    if !packs.is_empty() {
        put_index(pipeline, packs)?;
    }
    let objects = std::mem::take(&mut pipeline.ledger.lock().unwrap_or_else(PoisonError::into_inner).objects);
    Ok(Put { objects })
}

/// How long a blob of a kind may be so that its sealed length still fits the format.
pub(super) fn fits(length: usize) -> bool {
    u32::try_from(length + OVERHEAD_BYTES).is_ok()
}
