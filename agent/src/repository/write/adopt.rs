//! Packs that a writer put and no index file names, because it died before: they are taken into the index, so that
//! nothing is stored twice that is stored already.
//!
//! Only where nobody else works: a pack of somebody who lives is named by that writer soon, and two index files that
//! name one pack are no good. Each pack is read as a whole and must hash to its name, since no run has read it back.
//! That costs reading what the dead writer had put since its last index file, half a gigabyte at most, and once: the
//! first index file of this run names them.

use std::collections::HashSet;

use crate::format::index::IndexedPack;
use crate::format::{FormatError, Id};
use crate::storage::{Kind, Object};

use super::super::index::BlobIndex;
use super::super::lock::HeldLock;
use super::super::open::{Archive, ArchiveError};
use super::{Cancel, prove};

/// Most packs that are taken in by one run: two dead writers' worth. Others wait for the next, or for a prune.
const PACKS_MAX: usize = 64;
/// A pack that is bigger is none of ours, and none that restic makes.
const PACK_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// Takes unnamed packs into the index, which was loaded out of `named` files; returns those that an index file must
/// still name.
pub(super) fn adopt(
    archive: &Archive,
    index: &BlobIndex,
    named: &HashSet<String>,
    lock: &HeldLock,
    cancel: &Cancel,
) -> Result<Vec<IndexedPack>, ArchiveError> {
    if index.unnamed().is_empty() || !lock.is_alone()? {
        return Ok(Vec::new());
    }
    // Somebody may have ended well since the index was loaded. Whoever began since has no pack in our listing.
    for (late, _) in archive.storage().list(Kind::Index)?.into_iter().filter(|(name, _)| !named.contains(name)) {
        archive.add_index_file(index, &late)?;
    }
    let mut adopted = Vec::new();
    for (id, bytes) in index.unnamed().into_iter().take(PACKS_MAX) {
        if cancel.is_cancelled() {
            return Err(ArchiveError::Cancelled);
        }
        match read(archive, id, bytes) {
            Ok(pack) => {
                index.add_stored(&pack);
                adopted.push(pack);
            }
            // It is left as it is, and what it should hold is stored anew.
            Err(error) if error.is_of_one_object() => {
                tracing::warn!(event = "unnamed_pack_unusable", pack = %id, %error);
            }
            Err(error) => return Err(error),
        }
    }
    if !adopted.is_empty() {
        tracing::info!(event = "packs_adopted", packs = adopted.len());
    }
    Ok(adopted)
}

/// Reads a pack as a whole.
fn read(archive: &Archive, id: Id, bytes: u64) -> Result<IndexedPack, ArchiveError> {
    let object = Object::new(Kind::Pack, id.to_hex());
    let wrong = |source| ArchiveError::Object { object: object.to_string(), source };
    if bytes > PACK_BYTES_MAX {
        return Err(wrong(FormatError::TooMuch { what: "pack", asked: bytes, allowed: PACK_BYTES_MAX }));
    }
    let end = archive.pack_end(&object, bytes)?;
    match prove::is_named_by_its_bytes(archive, &object, bytes)? {
        true => Ok(IndexedPack { id, blobs: end.blobs }),
        false => Err(wrong(FormatError::Damaged { what: "pack", why: "its hash is not its name".to_owned() })),
    }
}
