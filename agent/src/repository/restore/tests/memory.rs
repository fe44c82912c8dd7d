//! Blobs in memory, for trees that no honest program writes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::format::tree::{self, Node, NodeKind};
use crate::format::{BlobKind, FormatError, Timestamp};
use crate::repository::index::Location;
use crate::repository::open::ArchiveError;
use crate::storage::{Kind, Object, StorageError};

/// One pack, whose blobs are not sealed but only as long as if they were.
#[derive(Default)]
pub(super) struct Memory {
    bytes: Vec<u8>,
    places: HashMap<(BlobKind, Id), Location>,
    /// Reads so far, and after how many the place fails; 0 is never.
    pub(super) reads: AtomicU64,
    pub(super) reads_max: u64,
    /// Becomes true after so many reads; 0 is never.
    pub(super) cancel: AtomicBool,
    pub(super) cancel_after: u64,
    /// Which read panics; 0 is none.
    pub(super) panic_at: u64,
}

const SEAL: [u8; 32] = [0; 32];

impl Memory {
    pub(super) fn pack() -> Id {
        Id::of(b"the pack")
    }

    pub(super) fn add(&mut self, kind: BlobKind, plain: &[u8]) -> Id {
        let id = Id::of(plain);
        let (offset, length) = (u32::try_from(self.bytes.len()).unwrap(), u32::try_from(plain.len() + 32).unwrap());
        self.bytes.extend_from_slice(&SEAL);
        self.bytes.extend_from_slice(plain);
        self.places.insert((kind, id), Location { pack: Self::pack(), offset, length, raw_length: None });
        id
    }

    pub(super) fn tree(&mut self, nodes: Vec<Node>) -> Id {
        let bytes = tree::to_bytes(nodes);
        self.add(BlobKind::Tree, &bytes)
    }

    pub(super) fn file(&mut self, name: &str, content: &[u8]) -> Node {
        let pieces = content.chunks(1000).map(|piece| self.add(BlobKind::Data, piece)).collect();
        node(name, NodeKind::File { size: content.len() as u64, content: pieces })
    }

    pub(super) fn forget(&mut self, kind: BlobKind, id: &Id) {
        self.places.remove(&(kind, *id));
    }

    pub(super) fn damage(&mut self, kind: BlobKind, id: &Id) {
        let at = self.places[&(kind, *id)].offset as usize;
        self.bytes[at + 32] ^= 1;
    }

    pub(super) fn restore(&self, tree: Id, target: &Path) -> Result<Restored, RestoreError> {
        let options = Options { threads: 2, ..Options::default() };
        restore(self, tree, target, &options, &Counters::default(), &self.cancel)
    }
}

pub(super) fn node(name: &str, kind: NodeKind) -> Node {
    Node {
        name: name.as_bytes().to_vec(),
        kind,
        mode: 0o755,
        mtime: Timestamp { seconds: 1_000_000, nanos: 5 },
        atime: Timestamp::default(),
        ctime: Timestamp::default(),
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        user: String::new(),
        group: String::new(),
        inode: 0,
        device_id: 0,
        links: 1,
        attributes: Vec::new(),
    }
}

pub(super) fn folder(name: &str, subtree: Id) -> Node {
    node(name, NodeKind::Folder { subtree })
}

pub(super) fn symlink(name: &str, target: &str) -> Node {
    node(name, NodeKind::Symlink { target: target.as_bytes().to_vec() })
}

impl Blobs for Memory {
    fn find(&self, kind: BlobKind, id: &Id) -> Option<Location> {
        self.places.get(&(kind, *id)).copied()
    }

    fn pack_bytes(&self, _: &Id) -> Option<u64> {
        Some(self.bytes.len() as u64)
    }

    fn read(&self, pack: &Id, offset: u64, length: u64) -> Result<Vec<u8>, ArchiveError> {
        let object = || Object::new(Kind::Pack, pack.to_hex());
        let reads = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
        if reads == self.cancel_after {
            self.cancel.store(true, Ordering::Relaxed);
        }
        assert!(reads != self.panic_at, "read {reads} was asked to panic");
        if self.reads_max > 0 && reads > self.reads_max {
            let reason = "asked to".to_owned();
            return Err(StorageError::Failed { operation: "get", what: object().to_string(), reason }.into());
        }
        let part = self.bytes.get(offset as usize..(offset + length) as usize);
        part.map(<[u8]>::to_vec).ok_or_else(|| StorageError::Missing(object()).into())
    }

    fn open(&self, id: &Id, at: &Location, sealed: Vec<u8>) -> Result<Vec<u8>, ArchiveError> {
        match sealed.get(32..) {
            Some(plain) if Id::of(plain) == *id => Ok(plain.to_vec()),
            _ => Err(ArchiveError::Object { object: format!("data/{}", at.pack), source: FormatError::Forged("blob") }),
        }
    }
}
