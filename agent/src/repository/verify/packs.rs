//! Packs read as a whole: hash, header, and every blob.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use hestner_proto::sha256::Hasher;

use super::super::index::Location;
use super::super::open::{Archive, ArchiveError, PackEnd};
use super::super::restore::chain;
use super::structure::digest;
use super::{Counters, Extent, Packs, VerifyError, go_on};
use crate::format::pack::PackedBlob;
use crate::format::{FormatError, Id};
use crate::storage::{Kind, Object};

/// Bytes of a pack that are held at once, unless one blob alone is longer.
const READ_BYTES: u64 = 4 * 1024 * 1024;

/// Which packs are read, and their sizes. The seed orders them; that order is the same on every machine.
pub(super) fn choose(packs: &Packs, extent: Extent) -> Vec<(Id, u64)> {
    let all: u64 = packs.values().map(|pack| pack.bytes).sum();
    let (bytes, seed) = match extent {
        Extent::Structure => return Vec::new(),
        Extent::All => (u64::MAX, 0),
        Extent::Bytes { bytes, seed } => (bytes, seed),
        // An estimate of how much is enough; rounded up.
        Extent::Percent { percent, seed } => ((all as f64 * percent.clamp(0.0, 100.0) / 100.0).ceil() as u64, seed),
    };
    let place = |id: &Id| Id::of(&[&seed.to_le_bytes()[..], id.as_bytes()].concat());
    let mut ordered: Vec<_> = packs.iter().map(|(id, pack)| (place(id), *id, pack.bytes)).collect();
    ordered.sort_unstable();
    let mut sum = 0_u64;
    let wanted = ordered.into_iter().take_while(|(_, _, size)| {
        let is_wanted = sum < bytes;
        sum = sum.saturating_add(*size);
        is_wanted
    });
    wanted.map(|(_, id, size)| (id, size)).collect()
}

/// Reads packs; returns what is wrong with which.
pub(super) fn read(
    archive: &Archive,
    packs: &Packs,
    chosen: &[(Id, u64)],
    threads: usize,
    counters: &Counters,
    cancel: &AtomicBool,
) -> Result<BTreeMap<Id, String>, VerifyError> {
    let next = AtomicUsize::new(0);
    let damaged = Mutex::new(BTreeMap::new());
    let work = || -> Result<(), VerifyError> {
        while let Some((id, bytes)) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
            go_on(cancel)?;
            let reason = match pack_at(archive, packs, id, *bytes) {
                Ok(()) => None,
                Err(error) if error.is_of_one_object() => Some(chain(&error)),
                Err(error) => return Err(error.into()),
            };
            counters.bytes_done.fetch_add(*bytes, Ordering::Relaxed);
            if let Some(reason) = reason {
                damaged.lock().unwrap_or_else(PoisonError::into_inner).insert(*id, reason);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..threads.max(1)).map(|_| scope.spawn(work)).collect();
        let own = work();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(ArchiveError::Broken("a reader of packs failed".to_owned()).into()))
        })?;
        own
    })?;
    Ok(damaged.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Reads one pack, each byte once (but for its header), and checks all of it.
fn pack_at(archive: &Archive, packs: &Packs, id: &Id, bytes: u64) -> Result<(), ArchiveError> {
    let object = Object::new(Kind::Pack, id.to_hex());
    let wrong = |source| ArchiveError::Object { object: object.to_string(), source };
    let damaged = |why: &str| wrong(FormatError::Damaged { what: "pack", why: why.to_owned() });
    let part = |offset, length| archive.storage().get_range(&object, offset, length);
    let PackEnd { blobs, header, last } = archive.pack_end(&object, bytes)?;
    if packs.get(id).is_none_or(|expected| expected.entries != digest(&blobs)) {
        return Err(damaged("its header is not what the index says of it"));
    }
    let mut hasher = Hasher::default();
    let mut rest = blobs.as_slice();
    while let Some(first) = rest.first() {
        let group = group(rest);
        let (now, later) = rest.split_at(group);
        let length: u64 = now.iter().map(|blob| u64::from(blob.length)).sum();
        let stored = part(first.offset.into(), length)?;
        hasher.update(&stored);
        let mut sealed = stored.as_slice();
        for blob in now {
            let (this, after) =
                sealed.split_at_checked(blob.length as usize).ok_or_else(|| damaged("it is too short"))?;
            check_blob(archive, id, blob, this)?;
            sealed = after;
        }
        rest = later;
    }
    hasher.update(&header);
    hasher.update(&last);
    match Id::from_bytes(hasher.finish()) == *id {
        true => Ok(()),
        false => Err(damaged("its hash is not its name")),
    }
}

/// How many of the blobs are read at once.
fn group(blobs: &[PackedBlob]) -> usize {
    let mut sum = 0;
    let fits = |blob: &&PackedBlob| {
        sum += u64::from(blob.length);
        sum <= READ_BYTES
    };
    blobs.iter().take_while(fits).count().max(1)
}

fn check_blob(archive: &Archive, pack: &Id, blob: &PackedBlob, sealed: &[u8]) -> Result<(), ArchiveError> {
    let at = Location { pack: *pack, offset: blob.offset, length: blob.length, raw_length: blob.raw_length };
    archive.open_blob(&blob.id, &at, sealed.to_vec()).map(drop).map_err(|error| match error {
        ArchiveError::Object { source, .. } => {
            ArchiveError::Object { object: format!("blob {} in pack {pack}", blob.id), source }
        }
        other => other,
    })
}
