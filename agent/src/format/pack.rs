//! Packs: sealed blobs one after the other, then a sealed header, then the header's length.
//!
//! The length is 4 bytes, little-endian. An entry of the header is the kind (0 data, 1 tree, 2 and 3 the same
//! but compressed), the stored length, for compressed ones the length in the clear, and the id. Where a blob
//! begins is the sum of the lengths before it.

use super::crypto::{Cipher, NONCE_BYTES, OVERHEAD_BYTES};
use super::{BlobKind, FormatError, Id};

const WHAT: &str = "pack header";
/// Bytes that hold the header's length.
pub const LENGTH_BYTES: usize = 4;
/// Longest header that restic (0.14) reads, sealed.
pub const HEADER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Entries after which a pack is closed, however small it is: its header stays far below the limit.
pub const BLOBS_MAX: usize = 100_000;

/// A blob in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedBlob {
    /// What it holds.
    pub kind: BlobKind,
    /// Its name.
    pub id: Id,
    /// Where it begins, in bytes from the pack's start.
    pub offset: u32,
    /// Its length as it is stored: compressed or not, and sealed.
    pub length: u32,
    /// Its length in the clear, if it is compressed.
    pub raw_length: Option<u32>,
}

/// The end of a pack that holds `blobs`: the sealed header and its length.
///
/// # Errors
/// As [`Cipher::seal`].
pub fn footer(cipher: &Cipher, nonce: &[u8; NONCE_BYTES], blobs: &[PackedBlob]) -> Result<Vec<u8>, FormatError> {
    let mut plain = Vec::with_capacity(blobs.len() * 41);
    for blob in blobs {
        let kind = match blob.kind {
            BlobKind::Data => 0,
            BlobKind::Tree => 1,
        };
        plain.push(if blob.raw_length.is_some() { kind + 2 } else { kind });
        plain.extend_from_slice(&blob.length.to_le_bytes());
        if let Some(raw) = blob.raw_length {
            plain.extend_from_slice(&raw.to_le_bytes());
        }
        plain.extend_from_slice(blob.id.as_bytes());
    }
    let mut sealed = cipher.seal(nonce, &plain)?;
    let length = u32::try_from(sealed.len()).unwrap_or(u32::MAX);
    sealed.extend_from_slice(&length.to_le_bytes());
    Ok(sealed)
}

/// How long the sealed header is, from a pack's last four bytes.
///
/// # Errors
/// When it cannot be so long.
pub fn header_length(last: [u8; LENGTH_BYTES], pack_bytes: u64) -> Result<u32, FormatError> {
    let length = u32::from_le_bytes(last);
    super::bounded(WHAT, length as usize, HEADER_BYTES_MAX)?;
    if (length as usize) < OVERHEAD_BYTES || u64::from(length) + LENGTH_BYTES as u64 > pack_bytes {
        return Err(FormatError::damaged(WHAT, format!("it cannot have {length} bytes")));
    }
    Ok(length)
}

/// The blobs of a pack of `pack_bytes`, from its sealed header.
///
/// # Errors
/// When it does not open, or speaks of more or fewer bytes than there are.
pub fn parse(cipher: &Cipher, header: Vec<u8>, pack_bytes: u64) -> Result<Vec<PackedBlob>, FormatError> {
    super::bounded(WHAT, header.len(), HEADER_BYTES_MAX)?;
    let data_bytes = pack_bytes.checked_sub((header.len() + LENGTH_BYTES) as u64);
    let data_bytes = data_bytes.ok_or_else(|| FormatError::damaged(WHAT, "it is longer than its pack"))?;
    let plain = cipher.open(WHAT, header)?;
    entries(&plain, data_bytes)
}

fn entries(plain: &[u8], data_bytes: u64) -> Result<Vec<PackedBlob>, FormatError> {
    let mut rest = plain;
    let mut blobs = Vec::new();
    let mut offset = 0_u32;
    while let Some((&kind, after)) = rest.split_first() {
        rest = after;
        let length = u32::from_le_bytes(*take(&mut rest)?);
        let (kind, compressed) = match kind {
            0 => (BlobKind::Data, false),
            1 => (BlobKind::Tree, false),
            2 => (BlobKind::Data, true),
            3 => (BlobKind::Tree, true),
            other => return Err(FormatError::Unknown { what: WHAT, which: format!("blob type {other}") }),
        };
        let raw_length = if compressed { Some(u32::from_le_bytes(*take(&mut rest)?)) } else { None };
        let id = Id::from_bytes(*take(&mut rest)?);
        if (length as usize) < OVERHEAD_BYTES {
            return Err(FormatError::damaged(WHAT, "a blob is too short to be sealed"));
        }
        blobs.push(PackedBlob { kind, id, offset, length, raw_length });
        offset = offset.checked_add(length).ok_or_else(|| FormatError::damaged(WHAT, "blobs of more than 4 GiB"))?;
    }
    if u64::from(offset) != data_bytes {
        return Err(FormatError::damaged(WHAT, format!("it speaks of {offset} bytes, and there are {data_bytes}")));
    }
    Ok(blobs)
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Result<&'a [u8; N], FormatError> {
    let (taken, after) = rest.split_first_chunk().ok_or_else(|| FormatError::damaged(WHAT, "it ends too early"))?;
    *rest = after;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::crypto::KEY_BYTES;

    fn blobs() -> Vec<PackedBlob> {
        let blob =
            |kind, n: u8, offset, length, raw_length| PackedBlob { kind, id: Id::of(&[n]), offset, length, raw_length };
        vec![
            blob(BlobKind::Data, 1, 0, 100, None),
            blob(BlobKind::Tree, 2, 100, 40, None),
            blob(BlobKind::Data, 3, 140, 50, Some(1000)),
            blob(BlobKind::Tree, 4, 190, 60, Some(70)),
        ]
    }

    #[test]
    fn header_reads_back() {
        let cipher = Cipher::new(&[5; KEY_BYTES]).unwrap();
        let footer = footer(&cipher, &[1; 16], &blobs()).unwrap();
        let (header, last) = footer.split_last_chunk::<4>().unwrap();
        let pack_bytes = 250 + footer.len() as u64;
        assert_eq!(header_length(*last, pack_bytes).unwrap() as usize, header.len());
        assert_eq!(parse(&cipher, header.to_vec(), pack_bytes).unwrap(), blobs());
        assert!(parse(&cipher, header.to_vec(), pack_bytes + 1).is_err());
        assert!(parse(&cipher, header.to_vec(), 10).is_err());
    }

    #[test]
    fn length_that_cannot_be_is_refused() {
        assert!(header_length([255; 4], u64::MAX).is_err());
        assert!(header_length(31_u32.to_le_bytes(), 1000).is_err());
        assert!(header_length(100_u32.to_le_bytes(), 103).is_err());
        assert!(header_length(100_u32.to_le_bytes(), 104).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn no_header_makes_it_panic(plain: Vec<u8>, bytes: u32) {
            let _ = entries(&plain, bytes.into());
        }
    }
}
