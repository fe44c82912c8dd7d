//! The index in memory: which blobs are stored, and where.
//!
//! A blob takes 48 bytes and two to four slots of 4 bytes in a table: 56 to 64 bytes in all. Entries are kept
//! in blocks that never move, so that growing never holds two copies of them. The table is split by the first
//! byte of the id, each part behind a lock of its own.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use crate::format::index::IndexedPack;
use crate::format::pack::PackedBlob;
use crate::format::{BlobKind, Id};

const SHARDS: usize = 64;
const BLOCK_ENTRIES: usize = 256;
/// The pack's number of a blob that is on its way.
const PENDING: u32 = u32::MAX >> 1;
const TREE_BIT: u32 = 1 << 31;

/// Where a blob lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// In which pack.
    pub pack: Id,
    /// Bytes from its start.
    pub offset: u32,
    /// Bytes as stored.
    pub length: u32,
    /// Bytes in the clear, if it is compressed.
    pub raw_length: Option<u32>,
}

#[derive(Clone, Copy)]
struct Entry {
    id: Id,
    /// Number of the pack, with [`TREE_BIT`] for trees.
    pack: u32,
    offset: u32,
    length: u32,
    /// 0: not compressed.
    raw_length: u32,
}

#[derive(Default)]
struct Shard {
    blocks: Vec<Vec<Entry>>,
    /// Number of an entry plus one; 0 is free. Its length is a power of two.
    slots: Vec<u32>,
    count: usize,
}

/// The index of a repository.
pub struct BlobIndex {
    shards: Vec<Mutex<Shard>>,
    packs: RwLock<Vec<Id>>,
    /// Packs that are there, and their sizes.
    present: HashMap<Id, u64>,
}

impl std::fmt::Debug for BlobIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlobIndex").field("blobs", &self.len()).finish()
    }
}

impl BlobIndex {
    /// An empty one, over packs that are there.
    pub fn new(present: HashMap<Id, u64>) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, packs: RwLock::default(), present }
    }

    /// How many blobs it knows.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).count).sum()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes in what an index file says of a pack, if the pack is there and long enough.
    pub fn add_stored(&self, pack: &IndexedPack) {
        let end = pack.blobs.iter().map(|blob| u64::from(blob.offset) + u64::from(blob.length)).max();
        if self.present.get(&pack.id).is_none_or(|&bytes| end.unwrap_or(0) > bytes) {
            return;
        }
        let number = {
            let mut packs = self.packs.write().unwrap_or_else(PoisonError::into_inner);
            packs.push(pack.id);
            u32::try_from(packs.len() - 1).unwrap_or(PENDING)
        };
        if number >= PENDING {
            return;
        }
        for PackedBlob { kind, id, offset, length, raw_length } in pack.blobs.iter().copied() {
            let entry = Entry { id, pack: tagged(number, kind), offset, length, raw_length: raw_length.unwrap_or(0) };
            self.shard(&id).insert(entry);
        }
    }

    /// Whether a blob is stored, or is on its way. One that is neither counts as on its way from now on: whoever
    /// is told so must store it, and no second one is.
    pub fn claim(&self, kind: BlobKind, id: &Id) -> bool {
        let entry = Entry { id: *id, pack: tagged(PENDING, kind), offset: 0, length: 0, raw_length: 0 };
        self.shard(id).insert(entry)
    }

    /// Whether a blob is stored or on its way.
    pub fn contains(&self, kind: BlobKind, id: &Id) -> bool {
        self.shard(id).find(kind, id).is_some()
    }

    /// Where a blob lies that was stored when the index was loaded.
    pub fn find(&self, kind: BlobKind, id: &Id) -> Option<Location> {
        let entry = self.shard(id).find(kind, id)?;
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        let pack = *packs.get((entry.pack & !TREE_BIT) as usize)?;
        let raw_length = (entry.raw_length > 0).then_some(entry.raw_length);
        Some(Location { pack, offset: entry.offset, length: entry.length, raw_length })
    }

    /// Packs that were there when the index was loaded, and that no index file speaks of, with their sizes, in the
    /// order of their names.
    pub fn unnamed(&self) -> Vec<(Id, u64)> {
        let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        let named: HashSet<&Id> = packs.iter().collect();
        let unnamed = self.present.iter().filter(|(id, _)| !named.contains(id));
        let mut unnamed: Vec<_> = unnamed.map(|(id, bytes)| (*id, *bytes)).collect();
        unnamed.sort_unstable();
        unnamed
    }

    /// Size of a pack that was there when the index was loaded.
    pub fn pack_bytes(&self, pack: &Id) -> Option<u64> {
        self.present.get(pack).copied()
    }

    fn shard(&self, id: &Id) -> MutexGuard<'_, Shard> {
        lock(&self.shards[usize::from(id.as_bytes()[0]) % SHARDS])
    }
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn tagged(pack: u32, kind: BlobKind) -> u32 {
    match kind {
        BlobKind::Data => pack,
        BlobKind::Tree => pack | TREE_BIT,
    }
}

impl Shard {
    fn entry(&self, number: usize) -> Option<&Entry> {
        self.blocks.get(number / BLOCK_ENTRIES)?.get(number % BLOCK_ENTRIES)
    }

    /// The slot of a blob, or the free one where it belongs.
    fn slot(&self, pack: u32, id: &Id) -> Option<usize> {
        let mask = self.slots.len().checked_sub(1)?;
        let mut at = hash(id) & mask;
        loop {
            let number = *self.slots.get(at)? as usize;
            let same = |entry: &Entry| entry.id == *id && (entry.pack ^ pack) & TREE_BIT == 0;
            if number == 0 || self.entry(number - 1).is_some_and(same) {
                return Some(at);
            }
            at = (at + 1) & mask;
        }
    }

    fn find(&self, kind: BlobKind, id: &Id) -> Option<Entry> {
        let number = self.slots[self.slot(tagged(0, kind), id)?] as usize;
        self.entry(number.checked_sub(1)?).copied()
    }

    /// Whether it is new.
    fn insert(&mut self, entry: Entry) -> bool {
        // At most half of the slots are taken.
        if self.count * 2 >= self.slots.len() {
            self.grow();
        }
        let Some(slot) = self.slot(entry.pack, &entry.id) else { return false };
        if self.slots[slot] != 0 {
            return false;
        }
        if self.count.is_multiple_of(BLOCK_ENTRIES) {
            self.blocks.push(Vec::with_capacity(BLOCK_ENTRIES));
        }
        if let Some(block) = self.blocks.last_mut() {
            block.push(entry);
        }
        self.count += 1;
        self.slots[slot] = u32::try_from(self.count).unwrap_or(u32::MAX);
        true
    }

    fn grow(&mut self) {
        let length = (self.slots.len() * 2).max(16);
        self.slots = vec![0; length];
        for number in 0..self.count {
            let Some(&Entry { id, .. }) = self.entry(number) else { continue };
            let mut at = hash(&id) & (length - 1);
            while self.slots[at] != 0 {
                at = (at + 1) & (length - 1);
            }
            self.slots[at] = u32::try_from(number + 1).unwrap_or(u32::MAX);
        }
    }
}

/// An id is a hash already; its first byte chose the shard.
fn hash(id: &Id) -> usize {
    let b = id.as_bytes();
    u32::from_le_bytes([b[1], b[2], b[3], b[4]]) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(n: u32) -> Id {
        Id::of(&n.to_le_bytes())
    }

    #[test]
    fn every_blob_is_claimed_once_and_kinds_are_apart() {
        let index = BlobIndex::new(HashMap::new());
        for n in 0..20_000 {
            assert!(index.claim(BlobKind::Data, &numbered(n)));
            assert!(!index.claim(BlobKind::Data, &numbered(n)));
        }
        assert!(!index.contains(BlobKind::Tree, &numbered(5)));
        assert!(index.claim(BlobKind::Tree, &numbered(5)));
        assert_eq!(index.len(), 20_001);
        assert!((0..20_000).all(|n| index.contains(BlobKind::Data, &numbered(n))));
        assert_eq!(index.find(BlobKind::Data, &numbered(5)), None);
        assert!(!index.contains(BlobKind::Data, &numbered(20_000)));
    }

    #[test]
    fn two_threads_never_claim_the_same_blob() {
        let index = BlobIndex::new(HashMap::new());
        let claimed = |_| (0..5000).filter(|&n| index.claim(BlobKind::Data, &numbered(n))).count();
        let total: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|n| scope.spawn(move || claimed(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(total, 5000);
    }

    #[test]
    fn pack_that_is_missing_or_cut_short_counts_as_not_stored() {
        let blob =
            |n, offset| PackedBlob { kind: BlobKind::Data, id: numbered(n), offset, length: 40, raw_length: None };
        let pack = |name: &[u8], n| IndexedPack { id: Id::of(name), blobs: vec![blob(n, 0), blob(n + 1, 40)] };
        let index = BlobIndex::new(HashMap::from([(Id::of(b"whole"), 80), (Id::of(b"short"), 79)]));
        for (name, n) in [(&b"whole"[..], 0), (b"short", 10), (b"missing", 20)] {
            index.add_stored(&pack(name, n));
        }
        assert_eq!(index.find(BlobKind::Data, &numbered(1)).unwrap().offset, 40);
        assert_eq!(index.len(), 2);
    }

    #[test]
    fn an_entry_takes_48_bytes() {
        assert_eq!(size_of::<Entry>(), 48);
    }
}
