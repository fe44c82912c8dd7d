//! restic's repository format, version 2: bytes in, values out, and back.
//!
//! Pure: no file, no network, no clock, and randomness comes in by argument where a value needs it. Every
//! parser takes bytes that somebody else may have written: it has bounds, it fails with a [`FormatError`], and
//! it never panics. What a value leads to is decided elsewhere (`repository`).
//!
//! The format is described at <https://restic.readthedocs.io/en/stable/100_references.html>; where that page is
//! silent, restic 0.14 is the judge, and the tests ask it.
//!
//! | part | for what |
//! | --- | --- |
//! | [`id`], [`blob`] | names of objects and blobs |
//! | [`crypto`], [`key`] | authenticated encryption; the master key behind a password |
//! | [`compress`] | zstd with a bound |
//! | [`config`], [`snapshot`], [`lock`], [`index`] | the JSON files |
//! | [`pack`], [`tree`] | what blobs lie in, and what a folder holds |

pub mod blob;
pub mod compress;
pub mod config;
pub mod crypto;
#[cfg(test)]
mod fuzz;
pub mod id;
pub mod index;
pub mod key;
pub mod lock;
pub mod pack;
pub mod snapshot;
mod text;
pub mod tree;

pub use blob::BlobKind;
pub use id::Id;
pub use text::Timestamp;

/// Bytes that are not what the format says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// They cannot be read.
    #[error("the {what} is damaged: {why}")]
    Damaged {
        /// Which kind of thing.
        what: &'static str,
        /// What is wrong with it. Never holds a secret.
        why: String,
    },
    /// They were changed, or written with another key.
    #[error("the {0} was changed, or written with another key")]
    Forged(&'static str),
    /// The password opens nothing here.
    #[error("the password does not open this key file")]
    WrongPassword,
    /// They ask for more than this program is willing to do.
    #[error("the {what} asks for {asked}, and at most {allowed} is allowed")]
    TooMuch {
        /// Which kind of thing.
        what: &'static str,
        /// What it asks for.
        asked: u64,
        /// What it may.
        allowed: u64,
    },
    /// A version or an algorithm that is not known here.
    #[error("the {what} is of a kind that this program does not know: {which}")]
    Unknown {
        /// Which kind of thing.
        what: &'static str,
        /// What it says it is.
        which: String,
    },
}

impl FormatError {
    pub(crate) fn damaged(what: &'static str, why: impl ToString) -> Self {
        Self::Damaged { what, why: why.to_string() }
    }
}

/// Refuses what is longer than it may be.
fn bounded(what: &'static str, bytes: usize, bytes_max: usize) -> Result<(), FormatError> {
    if bytes > bytes_max {
        return Err(FormatError::TooMuch { what, asked: bytes as u64, allowed: bytes_max as u64 });
    }
    Ok(())
}

/// JSON of a bounded length.
fn from_json<'a, T: serde::Deserialize<'a>>(
    what: &'static str,
    bytes: &'a [u8],
    bytes_max: usize,
) -> Result<T, FormatError> {
    bounded(what, bytes.len(), bytes_max)?;
    serde_json::from_slice(bytes).map_err(|error| FormatError::damaged(what, error))
}

fn to_json<T: serde::Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>, FormatError> {
    serde_json::to_vec(value).map_err(|error| FormatError::damaged(what, error))
}
