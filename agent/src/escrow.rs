//! A repository's key as it travels to the company: wrapped, or in the clear where the host says so.
//!
//! Plain data, with no way to print what must not be printed. It is made by the repository and told by a
//! report.

use hestner_proto::sha256;
use serde::{Deserialize, Serialize};

/// The key that opens a repository, as the company gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryKey {
    /// restic's id of the repository.
    pub repository_id: String,
    /// Name of the destination.
    pub destination: String,
    /// The key.
    pub key: EscrowedKey,
}

/// How the key travels.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EscrowedKey {
    /// Encrypted for the company's recovery key.
    Wrapped(Vec<u8>),
    /// In the clear, where the host's settings switch encryption off.
    Open(String),
}

impl EscrowedKey {
    /// What tells two keys apart without holding either.
    pub fn mark(&self) -> String {
        match self {
            Self::Wrapped(bytes) => sha256::hex(bytes),
            Self::Open(password) => sha256::hex(format!("open:{password}").as_bytes()),
        }
    }
}

impl std::fmt::Debug for EscrowedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Wrapped(_) => "Wrapped(..)",
            Self::Open(_) => "Open(..)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_key_is_not_printed() {
        let key = RepositoryKey {
            repository_id: "r".into(),
            destination: "d".into(),
            key: EscrowedKey::Open("secret".into()),
        };
        assert!(!format!("{key:?}").contains("secret"));
    }
}
