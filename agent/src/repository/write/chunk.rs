//! Where a file is cut: a gear hash over its bytes, so that an insertion moves few cuts.
//!
//! The table is built once a repository, out of the config's polynomial: whoever sees the sizes of pieces cannot
//! tell which known file they are of.

use std::borrow::Cow;

use fastcdc::v2020::{Normalization, cut_gear, get_gear_with_seed, select_masks};

use crate::format::blob::CHUNK_BYTES_MAX;

/// Files up to this size are one piece.
pub(super) const BYTES_MIN: usize = 512 * 1024;
const BYTES_AVERAGE: usize = 1024 * 1024;
/// How much is looked at first: most cuts lie before.
pub(super) const BYTES_LOOK: usize = 2 * 1024 * 1024;
pub(super) const BYTES_MAX: usize = CHUNK_BYTES_MAX;

/// Finds cuts.
#[derive(Debug)]
pub(super) struct Cutter {
    gear: Cow<'static, [u64]>,
    gear_shifted: Cow<'static, [u64]>,
    mask_small: u64,
    mask_large: u64,
}

impl Cutter {
    pub(super) fn new(polynomial: u64) -> Self {
        // The polynomial's bits are spread over the whole word.
        let seed = polynomial.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let (gear, gear_shifted) = get_gear_with_seed(seed);
        let (mask_small, mask_large) = select_masks(BYTES_AVERAGE, Normalization::Level1);
        Self { gear, gear_shifted, mask_small, mask_large }
    }

    /// Length of the first piece of `bytes`, of which there are more unless `is_end`. `None`: more must be known.
    pub(super) fn cut(&self, bytes: &[u8], is_end: bool) -> Option<usize> {
        let (small, large) = (self.mask_small, self.mask_large);
        let (_, length) = cut_gear(
            bytes,
            BYTES_MIN,
            BYTES_AVERAGE,
            BYTES_MAX,
            small,
            large,
            small << 1,
            large << 1,
            &self.gear,
            &self.gear_shifted,
        );
        // A cut at the end of what is known, short of the limit, is no cut.
        (is_end || length < bytes.len() || length >= BYTES_MAX).then_some(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize, mut seed: u64) -> Vec<u8> {
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed.to_le_bytes()
        };
        let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next).take(length / 8 + 1).flatten().collect();
        bytes.truncate(length);
        bytes
    }

    fn pieces(bytes: &[u8]) -> Vec<&[u8]> {
        let cutter = Cutter::new(0x3D_A335_8B4D_C173);
        let (mut rest, mut found) = (bytes, Vec::new());
        while !rest.is_empty() {
            let look = |n: usize| cutter.cut(&rest[..n.min(rest.len())], n >= rest.len());
            let length = look(BYTES_LOOK).or_else(|| look(BYTES_MAX)).unwrap();
            found.push(&rest[..length]);
            rest = &rest[length..];
        }
        found
    }

    #[test]
    fn pieces_keep_their_bounds_and_an_insertion_moves_few() {
        let before = noise(40 << 20, 1);
        let mut after = before.clone();
        after.splice(15_000_000..15_000_000, *b"inserted");
        let (a, b) = (pieces(&before), pieces(&after));
        assert!(a.len() > 15 && a.len() < 60, "{}", a.len());
        assert!(a[..a.len() - 1].iter().all(|piece| (BYTES_MIN..=BYTES_MAX).contains(&piece.len())));
        let shared = b.iter().filter(|piece| a.contains(piece)).count();
        assert!(shared + 4 >= a.len(), "{shared} of {}", a.len());
    }

    #[test]
    fn what_is_known_first_does_not_change_the_cut() {
        let bytes = noise(9 << 20, 3);
        let cutter = Cutter::new(5);
        let whole = cutter.cut(&bytes, false).unwrap();
        for known in [BYTES_LOOK, 3 << 20, BYTES_MAX] {
            assert!(cutter.cut(&bytes[..known], false).is_none_or(|length| length == whole));
        }
        assert_eq!(cutter.cut(&bytes[..100], true), Some(100));
    }
}
