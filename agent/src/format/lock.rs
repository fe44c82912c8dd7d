//! Lock files: who uses a repository now.

use serde::{Deserialize, Serialize};

use super::text::Timestamp;
use super::{FormatError, from_json, to_json};

const WHAT: &str = "lock";
const BYTES_MAX: usize = 64 * 1024;

/// A lock. restic takes one for stale that is older than 30 minutes, so whoever holds one writes it again and
/// again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    /// When it was written.
    pub time: Timestamp,
    /// Nobody else may hold one.
    #[serde(default)]
    pub exclusive: bool,
    /// Where its process runs.
    #[serde(default)]
    pub hostname: String,
    /// As whom.
    #[serde(default)]
    pub username: String,
    /// Its process.
    #[serde(default)]
    pub pid: i32,
    /// As whom, as a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// With which group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
}

impl Lock {
    /// From its JSON.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        from_json(WHAT, bytes, BYTES_MAX)
    }

    /// As JSON.
    ///
    /// # Errors
    /// Never, in truth.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        to_json(WHAT, self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_reads_back_and_restics_is_read() {
        let restics = br#"{"time":"2024-05-06T07:08:09Z","exclusive":true,"hostname":"h","username":"u","pid":7,"uid":0,"gid":0}"#;
        let lock = Lock::parse(restics).unwrap();
        assert!(lock.exclusive && lock.pid == 7 && lock.uid == Some(0));
        assert_eq!(Lock::parse(&lock.to_bytes().unwrap()).unwrap(), lock);
    }
}
