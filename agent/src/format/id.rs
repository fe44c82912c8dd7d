//! Names of objects and blobs: SHA-256 of what they hold.
//!
//! A file's name is the hash of the file as it is stored; a blob's name is the hash of what it says in the
//! clear.

use std::fmt;
use std::str::FromStr;

use hestner_proto::sha256;
use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
use serde::ser::{Serialize, Serializer};

use super::FormatError;

/// A SHA-256 hash as a name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id([u8; Id::BYTES]);

impl Id {
    /// Its length in bytes.
    pub const BYTES: usize = 32;

    /// The name of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha256::of(bytes))
    }

    /// An id that was made elsewhere.
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// As restic writes it: 64 hex digits.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Appends the 64 hex digits.
    pub fn write_hex(&self, out: &mut Vec<u8>) {
        let mut digits = [0_u8; 2 * Self::BYTES];
        // The lengths fit each other, so this cannot fail.
        let _ = hex::encode_to_slice(self.0, &mut digits);
        out.extend_from_slice(&digits);
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({})", hex::encode(&self.0[..4]))
    }
}

impl FromStr for Id {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let mut bytes = [0_u8; Self::BYTES];
        hex::decode_to_slice(text, &mut bytes).map_err(|error| FormatError::damaged("id", error))?;
        Ok(Self(bytes))
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

struct Digits;

impl Visitor<'_> for Digits {
    type Value = Id;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("64 hex digits")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Id, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Digits).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_is_sha256_in_hex_and_reads_back() {
        let id = Id::of(b"");
        assert_eq!(id.to_hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(id.to_hex().parse::<Id>().unwrap(), id);
        assert!("e3".parse::<Id>().is_err());
        assert!("zz".repeat(32).parse::<Id>().is_err());
    }
}
