//! Snapshot files.

use serde::{Deserialize, Serialize};

use super::text::Timestamp;
use super::{FormatError, Id, from_json, to_json};

const WHAT: &str = "snapshot";
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// A snapshot. Its own id is the hash of its file as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// When it was taken.
    pub time: Timestamp,
    /// The one before it, from which unchanged files were recognised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Id>,
    /// The root.
    pub tree: Id,
    /// What was asked for.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub paths: Vec<String>,
    /// Where.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// By whom.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub username: String,
    /// By whom, as a number.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uid: u32,
    /// By which group.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gid: u32,
    /// What was left out.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub excludes: Vec<String>,
    /// Labels.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// The one that this is a changed copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original: Option<Id>,
    /// Which program wrote it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub program_version: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Snapshot {
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

    /// As restic 0.14 wrote it.
    const RESTICS: &str = r#"{"time":"2024-05-06T07:08:09.123456789+02:00","tree":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","paths":["/srv"],"hostname":"h","username":"root","tags":null}"#;

    #[test]
    fn restics_snapshot_is_read_and_ours_reads_back() {
        let read = Snapshot::parse(RESTICS.as_bytes()).unwrap();
        assert_eq!(read.time, Timestamp { seconds: 1_714_972_089, nanos: 123_456_789 });
        assert_eq!((read.paths.as_slice(), read.tags.len(), read.parent), (&["/srv".to_owned()][..], 0, None));
        let full = Snapshot { parent: Some(read.tree), tags: vec!["a".into()], uid: 5, ..read };
        assert_eq!(Snapshot::parse(&full.to_bytes().unwrap()).unwrap(), full);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(at in 0..RESTICS.len(), to: u8) {
            let mut mutated = RESTICS.as_bytes().to_vec();
            mutated[at] = to;
            let _ = Snapshot::parse(&mutated);
        }
    }
}
