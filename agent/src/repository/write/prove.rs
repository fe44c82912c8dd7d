//! Reading back what was put, before anything says that it is there.
//!
//! In: an object and its size. Out: nothing, or that its place does not give it back as it was written. In restic's
//! format an object outside of `keys` and `config` is named by the SHA-256 of its bytes
//! (<https://restic.readthedocs.io/en/stable/100_references.html>), so this needs no key.

use crate::format::{FormatError, Id};
use crate::storage::Object;

use super::super::open::{Archive, ArchiveError};

/// Reads an object back, as its place has it. One that is not as it was written is removed where that is allowed, so
/// that nobody takes it for stored.
pub(super) fn read_back(archive: &Archive, object: &Object, bytes: u64) -> Result<(), ArchiveError> {
    if is_named_by_its_bytes(archive, object, bytes)? {
        return Ok(());
    }
    tracing::error!(event = "object_differs", %object);
    archive.withdraw(object);
    Err(ArchiveError::Object { object: object.to_string(), source: FormatError::Forged("object") })
}

/// Whether the place has so many bytes of an object, and their hash is its name.
pub(super) fn is_named_by_its_bytes(archive: &Archive, object: &Object, bytes: u64) -> Result<bool, ArchiveError> {
    let seen = archive.storage().read_back(object, bytes)?;
    Ok(seen.bytes == bytes && Id::from_bytes(seen.sha256).to_hex() == object.name)
}
