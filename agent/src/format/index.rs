//! Index files: which blob lies where in which pack.

use std::fmt;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::compress::FILE_BYTES_MAX;
use super::crypto::OVERHEAD_BYTES;
use super::pack::PackedBlob;
use super::{BlobKind, FormatError, Id, from_json, to_json};

const WHAT: &str = "index";
/// Blobs after which a new index file is begun; as restic has it.
pub const BLOBS_MAX: usize = 50_000;

/// A pack and its blobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexedPack {
    /// The pack.
    pub id: Id,
    /// What lies in it.
    pub blobs: Vec<PackedBlob>,
}

/// An index file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Index files that this one stands in place of.
    pub supersedes: Vec<Id>,
    /// Packs.
    pub packs: Vec<IndexedPack>,
}

#[derive(Serialize, Deserialize)]
struct BlobJson {
    id: Id,
    #[serde(rename = "type")]
    kind: BlobKind,
    offset: u32,
    length: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uncompressed_length: Option<u32>,
}

#[derive(Serialize, Deserialize)]
struct PackJson {
    id: Id,
    #[serde(deserialize_with = "blobs")]
    blobs: Vec<BlobJson>,
}

#[derive(Serialize, Deserialize)]
struct IndexJson {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    supersedes: Option<Vec<Id>>,
    packs: Vec<PackJson>,
}

/// Takes memory as the blobs come; `null` is an empty list, as Go has it.
fn blobs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<BlobJson>, D::Error> {
    struct Blobs;
    impl<'de> Visitor<'de> for Blobs {
        type Value = Vec<BlobJson>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("blobs")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut found = Vec::new();
            while let Some(blob) = seq.next_element()? {
                found.push(blob);
            }
            Ok(found)
        }
    }
    deserializer.deserialize_any(Blobs)
}

impl Index {
    /// From its JSON.
    ///
    /// # Errors
    /// When it is damaged, or speaks of blobs that cannot be.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let json: IndexJson = from_json(WHAT, bytes, FILE_BYTES_MAX)?;
        let packs = json.packs.into_iter().map(pack).collect::<Result<_, _>>()?;
        Ok(Self { supersedes: json.supersedes.unwrap_or_default(), packs })
    }

    /// As JSON.
    ///
    /// # Errors
    /// Never, in truth.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let blob = |blob: &PackedBlob| BlobJson {
            id: blob.id,
            kind: blob.kind,
            offset: blob.offset,
            length: blob.length,
            uncompressed_length: blob.raw_length,
        };
        let packs = self.packs.iter();
        let packs = packs.map(|pack| PackJson { id: pack.id, blobs: pack.blobs.iter().map(blob).collect() });
        let supersedes = (!self.supersedes.is_empty()).then(|| self.supersedes.clone());
        to_json(WHAT, &IndexJson { supersedes, packs: packs.collect() })
    }
}

/// Longest blob, as it is stored and in the clear: pieces of files have 8 MiB at most, the tree of a folder with a
/// million entries some 350, and none is longer than a tree may be.
const BLOB_BYTES_MAX: u32 = (super::tree::TREE_BYTES_MAX + OVERHEAD_BYTES) as u32;

fn pack(json: PackJson) -> Result<IndexedPack, FormatError> {
    let blob = |blob: BlobJson| {
        if (blob.length as usize) < OVERHEAD_BYTES || blob.offset.checked_add(blob.length).is_none() {
            return Err(FormatError::damaged(WHAT, format!("{:?} cannot lie where it says", blob.id)));
        }
        let raw_length = blob.uncompressed_length.filter(|&length| length > 0);
        if blob.length.max(raw_length.unwrap_or(0)) > BLOB_BYTES_MAX {
            return Err(FormatError::damaged(WHAT, format!("{:?} is longer than any blob may be", blob.id)));
        }
        Ok(PackedBlob { kind: blob.kind, id: blob.id, offset: blob.offset, length: blob.length, raw_length })
    };
    Ok(IndexedPack { id: json.id, blobs: json.blobs.into_iter().map(blob).collect::<Result<_, _>>()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> Index {
        let blob = |n: u8, offset, raw_length| PackedBlob {
            kind: if n == 1 { BlobKind::Data } else { BlobKind::Tree },
            id: Id::of(&[n]),
            offset,
            length: 50,
            raw_length,
        };
        let pack = IndexedPack { id: Id::of(b"pack"), blobs: vec![blob(1, 0, None), blob(2, 50, Some(99))] };
        Index { supersedes: vec![Id::of(b"old")], packs: vec![pack] }
    }

    #[test]
    fn index_reads_back() {
        assert_eq!(Index::parse(&index().to_bytes().unwrap()).unwrap(), index());
        let empty = Index::parse(br#"{"packs":[]}"#).unwrap();
        assert_eq!(empty, Index::default());
        let null = format!(r#"{{"supersedes":null,"packs":[{{"id":"{}","blobs":null}}]}}"#, Id::of(b"x"));
        assert!(Index::parse(null.as_bytes()).unwrap().packs[0].blobs.is_empty());
    }

    #[test]
    fn blob_that_cannot_be_is_refused() {
        let text = String::from_utf8(index().to_bytes().unwrap()).unwrap();
        for (from, to) in
            [("\"length\":50", "\"length\":31"), ("\"offset\":50", "\"offset\":4294967295"), ("tree", "leaf")]
        {
            assert!(text.contains(from));
            assert!(Index::parse(text.replace(from, to).as_bytes()).is_err(), "{to}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, at in 0_usize..400, to: u8) {
            let _ = Index::parse(&bytes);
            let mut mutated = index().to_bytes().unwrap();
            let length = mutated.len();
            mutated[at % length] = to;
            let _ = Index::parse(&mutated);
        }
    }
}
