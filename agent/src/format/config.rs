//! The config file: version, id, and the polynomial of restic's chunker.
//!
//! We cut with another algorithm, but stock restic reads the polynomial when it writes into the same
//! repository, and refuses one that is not irreducible. It also seeds our own cutting, so that the sizes of
//! pieces tell nobody which known file was stored.

use serde::{Deserialize, Serialize};

use super::{FormatError, from_json, to_json};

const WHAT: &str = "config";
const BYTES_MAX: usize = 64 * 1024;
/// The version that we write and read.
pub const VERSION: u32 = 2;
/// Degree of the polynomial.
const DEGREE: u32 = 53;

/// A repository's config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The repository's id: 64 hex digits.
    pub id: String,
    /// A polynomial over GF(2), a bit a coefficient; irreducible, of degree 53.
    pub polynomial: u64,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    id: String,
    chunker_polynomial: String,
}

impl Config {
    /// A new repository's. `random` is asked for numbers until one is irreducible: about 27 times.
    ///
    /// # Errors
    /// What `random` fails with.
    pub fn make<E>(id: [u8; 32], mut random: impl FnMut() -> Result<u64, E>) -> Result<Self, E> {
        loop {
            let candidate = (random()? & ((1 << DEGREE) - 1)) | (1 << DEGREE) | 1;
            if is_irreducible(candidate) {
                return Ok(Self { id: hex::encode(id), polynomial: candidate });
            }
        }
    }

    /// From its JSON.
    ///
    /// # Errors
    /// When it is damaged or of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let stored: Stored = from_json(WHAT, bytes, BYTES_MAX)?;
        if stored.version != VERSION {
            return Err(FormatError::Unknown { what: WHAT, which: format!("version {}", stored.version) });
        }
        let id: super::Id = stored.id.parse()?;
        let polynomial =
            u64::from_str_radix(&stored.chunker_polynomial, 16).map_err(|error| FormatError::damaged(WHAT, error))?;
        Ok(Self { id: id.to_hex(), polynomial })
    }

    /// As JSON.
    ///
    /// # Errors
    /// Never, in truth.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let stored =
            Stored { version: VERSION, id: self.id.clone(), chunker_polynomial: format!("{:x}", self.polynomial) };
        to_json(WHAT, &stored)
    }
}

/// Rabin's test for a degree that is a prime: f is irreducible if x^(2^degree) = x (mod f), unless f is a
/// product of distinct linear factors, of which there are only two.
fn is_irreducible(f: u64) -> bool {
    const X: u64 = 2;
    let mut power = X;
    for _ in 0..DEGREE {
        power = multiply(power, power, f);
    }
    power == X
}

/// a * b mod f, for a and b of a lower degree than f's 53.
fn multiply(a: u64, b: u64, f: u64) -> u64 {
    let mut product = 0;
    for bit in (0..DEGREE).rev() {
        product <<= 1;
        if product >> DEGREE & 1 == 1 {
            product ^= f;
        }
        if b >> bit & 1 == 1 {
            product ^= a;
        }
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polynomials_of_restics_own_tests_are_told_apart() {
        // Two of restic's chunker that are irreducible, and what they become with a bit changed.
        for good in [0x3D_A335_8B4D_C173_u64, 0x25_B468_838D_CB75] {
            assert!(is_irreducible(good), "{good:x}");
            assert!(!is_irreducible(good ^ 1), "{good:x}");
        }
        assert!(!is_irreducible(1 << DEGREE | 1));
    }

    #[test]
    fn config_reads_back_and_another_version_is_refused() {
        let mut seed = 1_u64;
        let random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            Ok::<_, FormatError>(seed >> 7)
        };
        let config = Config::make([9; 32], random).unwrap();
        assert_eq!(config.polynomial >> DEGREE, 1);
        let bytes = config.to_bytes().unwrap();
        assert_eq!(Config::parse(&bytes).unwrap(), config);
        let one = String::from_utf8(bytes).unwrap().replace("\"version\":2", "\"version\":1");
        assert!(matches!(Config::parse(one.as_bytes()), Err(FormatError::Unknown { .. })));
    }
}
