//! zstd, with a bound on what comes out; and how files outside packs are wrapped.

use std::fmt;

use zstd::bulk::{Compressor, Decompressor};

use super::FormatError;

/// First byte of a compressed file outside packs.
const COMPRESSED: u8 = 2;
/// Longest file outside packs in the clear. An index of restic's has about 10 MB.
pub const FILE_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Level for files outside packs.
const FILE_LEVEL: i32 = 3;

/// Compresses piece after piece with one context.
pub struct Squeeze(Compressor<'static>);

impl fmt::Debug for Squeeze {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Squeeze")
    }
}

impl Squeeze {
    /// With a level of zstd's: 1 (fast) to 19.
    ///
    /// # Errors
    /// When there is no memory for its tables.
    pub fn new(level: i32) -> Result<Self, FormatError> {
        Compressor::new(level).map(Self).map_err(|error| FormatError::damaged("compressor", error))
    }

    /// Puts `plain`, compressed, in place of what `out` holds.
    ///
    /// # Errors
    /// When zstd fails, which it does only without memory.
    pub fn squeeze(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), FormatError> {
        out.clear();
        out.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        self.0.compress_to_buffer(plain, out).map_err(|error| FormatError::damaged("compressor", error))?;
        Ok(())
    }
}

/// Bytes out of zstd, exactly `length` of them.
///
/// # Errors
/// When it is no zstd, or is shorter or longer.
pub fn expand(what: &'static str, compressed: &[u8], length: usize) -> Result<Vec<u8>, FormatError> {
    let plain = expand_at_most(what, compressed, length)?;
    if plain.len() != length {
        return Err(FormatError::damaged(what, format!("it has {} bytes instead of {length}", plain.len())));
    }
    Ok(plain)
}

fn expand_at_most(what: &'static str, compressed: &[u8], bytes_max: usize) -> Result<Vec<u8>, FormatError> {
    let damaged = |error| FormatError::damaged(what, error);
    // What the frame says of its length is a stranger's word; memory is taken as the bytes come.
    let claimed = Decompressor::upper_bound(compressed).unwrap_or(bytes_max);
    if claimed <= bytes_max && claimed <= compressed.len().saturating_mul(64).max(1024 * 1024) {
        return Decompressor::new().and_then(|mut d| d.decompress(compressed, claimed)).map_err(damaged);
    }
    let mut plain = Vec::new();
    let reader = zstd::stream::Decoder::with_buffer(compressed).map_err(damaged)?;
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    std::io::Read::read_to_end(&mut std::io::Read::take(reader, limit), &mut plain).map_err(damaged)?;
    super::bounded(what, plain.len(), bytes_max)?;
    Ok(plain)
}

/// A file outside packs (index, snapshot, lock) before it is sealed.
///
/// # Errors
/// As [`Squeeze::squeeze`].
pub fn wrap_file(plain: &[u8]) -> Result<Vec<u8>, FormatError> {
    let mut compressed = Vec::new();
    Squeeze::new(FILE_LEVEL)?.squeeze(plain, &mut compressed)?;
    compressed.insert(0, COMPRESSED);
    Ok(compressed)
}

/// A file outside packs after it was opened: JSON as it is, or compressed.
///
/// # Errors
/// When it is neither, or is longer than [`FILE_BYTES_MAX`].
pub fn unwrap_file(what: &'static str, bytes: Vec<u8>) -> Result<Vec<u8>, FormatError> {
    match bytes.split_first() {
        Some((b'{' | b'[', _)) => super::bounded(what, bytes.len(), FILE_BYTES_MAX).map(|()| bytes),
        Some((&COMPRESSED, compressed)) => expand_at_most(what, compressed, FILE_BYTES_MAX),
        Some((first, _)) => Err(FormatError::Unknown { what, which: format!("first byte {first}") }),
        None => Err(FormatError::damaged(what, "it is empty")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_reads_back_whether_it_is_compressed_or_not() {
        assert_eq!(unwrap_file("x", wrap_file(b"{\"a\":1}").unwrap()).unwrap(), b"{\"a\":1}");
        assert_eq!(unwrap_file("x", b"{}".to_vec()).unwrap(), b"{}");
        assert!(unwrap_file("x", vec![1, 2, 3]).is_err());
        assert!(unwrap_file("x", vec![]).is_err());
    }

    #[test]
    fn bomb_is_refused_before_it_fills_the_memory() {
        let mut bomb = Vec::new();
        Squeeze::new(19).unwrap().squeeze(&vec![0; 64 << 20], &mut bomb).unwrap();
        assert!(bomb.len() < 10_000);
        assert!(matches!(expand("x", &bomb, 1 << 20), Err(FormatError::TooMuch { .. })));
        assert_eq!(expand("x", &bomb, 64 << 20).unwrap().len(), 64 << 20);
    }
}
