//! Where a restore gets its blobs from, and trees read ahead.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::format::{BlobKind, FormatError, Id};
use crate::repository::index::{BlobIndex, Location};
use crate::repository::open::{Archive, ArchiveError};
use crate::storage::{Kind, Object};

/// Bytes of a pack that are read at once for trees: those of neighbouring folders lie beside each other.
const BLOCK_BYTES: u64 = 512 * 1024;
/// Blocks that are kept.
const BLOCKS_KEPT: usize = 16;

/// Blobs of a repository.
pub trait Blobs: Sync {
    /// Where a blob lies.
    fn find(&self, kind: BlobKind, id: &Id) -> Option<Location>;

    /// Size of a pack.
    fn pack_bytes(&self, pack: &Id) -> Option<u64>;

    /// A part of a pack as it is stored.
    ///
    /// # Errors
    /// When it cannot be had.
    fn read(&self, pack: &Id, offset: u64, length: u64) -> Result<Vec<u8>, ArchiveError>;

    /// A blob in the clear, out of its stored bytes; checked against its name.
    ///
    /// # Errors
    /// When it is not what it must be.
    fn open(&self, id: &Id, at: &Location, sealed: Vec<u8>) -> Result<Vec<u8>, ArchiveError>;
}

/// Blobs of an open repository.
#[derive(Debug)]
pub struct Reader<'a> {
    archive: &'a Archive,
    index: &'a BlobIndex,
}

impl<'a> Reader<'a> {
    /// With the index of that repository.
    pub fn new(archive: &'a Archive, index: &'a BlobIndex) -> Self {
        Self { archive, index }
    }
}

impl Blobs for Reader<'_> {
    fn find(&self, kind: BlobKind, id: &Id) -> Option<Location> {
        self.index.find(kind, id)
    }

    fn pack_bytes(&self, pack: &Id) -> Option<u64> {
        self.index.pack_bytes(pack)
    }

    fn read(&self, pack: &Id, offset: u64, length: u64) -> Result<Vec<u8>, ArchiveError> {
        Ok(self.archive.storage().get_range(&Object::new(Kind::Pack, pack.to_hex()), offset, length)?)
    }

    fn open(&self, id: &Id, at: &Location, sealed: Vec<u8>) -> Result<Vec<u8>, ArchiveError> {
        self.archive.open_blob(id, at, sealed)
    }
}

/// A blob that no index knows.
pub(in crate::repository) fn unknown(kind: BlobKind, id: &Id) -> ArchiveError {
    let word = match kind {
        BlobKind::Data => "data blob",
        BlobKind::Tree => "tree",
    };
    let why = "no index knows it, or its pack is not there".to_owned();
    ArchiveError::Object { object: format!("{word} {id}"), source: FormatError::Damaged { what: "index", why } }
}

/// Reads trees, block by block of their packs.
pub struct TreeReader<'a> {
    blobs: &'a dyn Blobs,
    /// Pack, number of the block, bytes; the last used at the end.
    blocks: VecDeque<(Id, u64, Arc<Vec<u8>>)>,
}

impl std::fmt::Debug for TreeReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TreeReader").field("blocks", &self.blocks.len()).finish()
    }
}

impl<'a> TreeReader<'a> {
    /// With nothing read yet.
    pub fn new(blobs: &'a dyn Blobs) -> Self {
        Self { blobs, blocks: VecDeque::new() }
    }

    /// A tree in the clear.
    ///
    /// # Errors
    /// When no index knows it, or it is not what it must be.
    pub fn read(&mut self, id: &Id) -> Result<Vec<u8>, ArchiveError> {
        let at = self.blobs.find(BlobKind::Tree, id).ok_or_else(|| unknown(BlobKind::Tree, id))?;
        let sealed = self.sealed(&at)?;
        self.blobs.open(id, &at, sealed)
    }

    fn sealed(&mut self, at: &Location) -> Result<Vec<u8>, ArchiveError> {
        let (start, length) = (u64::from(at.offset), u64::from(at.length));
        let known = self.blobs.pack_bytes(&at.pack).filter(|&bytes| start + length <= bytes);
        let Some(pack_bytes) = known.filter(|_| length <= BLOCK_BYTES) else {
            return self.blobs.read(&at.pack, start, length);
        };
        let mut sealed = Vec::with_capacity(at.length as usize);
        for number in start / BLOCK_BYTES..=(start + length - 1) / BLOCK_BYTES {
            let block = self.block(&at.pack, number, pack_bytes)?;
            let begin = number * BLOCK_BYTES;
            let from = start.max(begin) - begin;
            let to = (start + length).min(begin + block.len() as u64) - begin;
            let part = usize::try_from(from).ok().zip(usize::try_from(to).ok());
            sealed.extend_from_slice(part.and_then(|(from, to)| block.get(from..to)).unwrap_or_default());
        }
        Ok(sealed)
    }

    fn block(&mut self, pack: &Id, number: u64, pack_bytes: u64) -> Result<Arc<Vec<u8>>, ArchiveError> {
        let known = self.blocks.iter().position(|(p, n, _)| p == pack && *n == number);
        if let Some(entry) = known.and_then(|at| self.blocks.remove(at)) {
            self.blocks.push_back(entry.clone());
            return Ok(entry.2);
        }
        let begin = number * BLOCK_BYTES;
        let block = Arc::new(self.blobs.read(pack, begin, BLOCK_BYTES.min(pack_bytes - begin))?);
        if self.blocks.len() >= BLOCKS_KEPT {
            self.blocks.pop_front();
        }
        self.blocks.push_back((*pack, number, Arc::clone(&block)));
        Ok(block)
    }
}
