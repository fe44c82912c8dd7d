//! Indexes, packs by name and size, and the trees of all snapshots.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::index::BlobIndex;
use super::super::open::{Archive, ArchiveError};
use super::super::restore::{Notes, Reader, TreeReader, chain};
use super::super::snapshots;
use super::{Counters, Expected, Packs, Verified, VerifyError, go_on};
use crate::format::index::{Index, IndexedPack};
use crate::format::pack::PackedBlob;
use crate::format::tree::{self, Node, NodeKind};
use crate::format::{BlobKind, FormatError, Id, crypto, pack};
use crate::platform::command::printable;
use crate::storage::{Kind, Object, StorageError};

/// Deepest folder: no restore makes a deeper one, and the paths of a chain without end would take all time.
const DEPTH_MAX: usize = super::super::restore::DEPTH_MAX;
/// How many paths are named for a damaged pack.
const DEPENDANTS_NAMED: usize = 3;

/// What was learned of the repository.
pub(super) struct Structure {
    /// Packs that are there with the size that they must have.
    pub(super) packs: Packs,
    index: BlobIndex,
    roots: Vec<(Id, Id)>,
}

/// Checks the structure. What is wrong becomes a finding; an error is only what keeps it from being looked at.
pub(super) fn check(
    archive: &Archive,
    counters: &Counters,
    cancel: &AtomicBool,
    findings: &mut Notes,
    verified: &mut Verified,
) -> Result<Structure, VerifyError> {
    // In this order: whoever writes beside us puts packs before the index files that name them, and those before the
    // snapshot that needs them.
    let mut roots = Vec::new();
    for (name, _) in archive.storage().list(Kind::Snapshot).map_err(ArchiveError::from)? {
        let id = name.parse::<Id>().map_err(ArchiveError::from)?;
        let read = snapshots::get(archive, &id);
        // Somebody has forgotten it meanwhile.
        if matches!(read, Err(ArchiveError::Storage(StorageError::Missing(_)))) {
            continue;
        }
        if let Some(listed) = finding(read, findings)? {
            roots.push((id, listed.snapshot.tree));
        }
    }
    let (index, packs) = indexes(archive, cancel, findings)?;
    verified.packs = packs.len() as u64;
    verified.snapshots = roots.len() as u64;
    let mut walk = Walk { archive, index: &index, counters, cancel, seen: HashSet::new(), quiet: false };
    walk.all(&roots, &mut |note| findings.add(note), &mut |_, _, _| {})?;
    verified.trees = walk.seen.len() as u64;
    Ok(Structure { packs, index, roots })
}

/// Reads all indexes, and compares what they say with the packs that are there.
fn indexes(archive: &Archive, cancel: &AtomicBool, findings: &mut Notes) -> Result<(BlobIndex, Packs), VerifyError> {
    let names = archive.storage().list(Kind::Index).map_err(ArchiveError::from)?;
    let present: HashMap<Id, u64> = archive
        .storage()
        .list(Kind::Pack)
        .map_err(ArchiveError::from)?
        .into_iter()
        .filter_map(|(name, bytes)| Some((name.parse().ok()?, bytes)))
        .collect();
    let index = BlobIndex::new(present.clone());
    let mut packs = Packs::new();
    let mut wrong = BTreeMap::new();
    for (name, _) in names {
        go_on(cancel)?;
        let object = Object::new(Kind::Index, name.as_str());
        let parsed = archive.read_file(Kind::Index, &name).and_then(|bytes| {
            Index::parse(&bytes).map_err(|source| ArchiveError::Object { object: object.to_string(), source })
        });
        let Some(parsed) = finding(parsed, findings)? else { continue };
        for pack in parsed.packs {
            match expected(&pack, &present) {
                Ok(expected) => {
                    index.add_stored(&pack);
                    if packs.insert(pack.id, expected).is_some_and(|other| other.entries != packs[&pack.id].entries) {
                        findings.add(format!("{object}: another index says otherwise of pack {}", pack.id));
                    }
                }
                Err(reason) => {
                    wrong.entry(pack.id).or_insert(reason);
                }
            }
        }
    }
    for (id, reason) in &wrong {
        findings.add(format!("{}: {reason}", Object::new(Kind::Pack, id.to_hex())));
    }
    Ok((index, packs))
}

/// A damaged or missing object is a finding; anything else ends the work.
fn finding<T>(read: Result<T, ArchiveError>, findings: &mut Notes) -> Result<Option<T>, VerifyError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_of_one_object() => {
            findings.add(chain(&error));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// What a pack must be, if it is there with the right size.
fn expected(pack: &IndexedPack, present: &HashMap<Id, u64>) -> Result<Expected, String> {
    let mut blobs = pack.blobs.clone();
    blobs.sort_unstable_by_key(|blob| blob.offset);
    let mut end = 0;
    for blob in &blobs {
        if u64::from(blob.offset) != end {
            return Err(format!("its index says that blob {} begins at {} and not at {end}", blob.id, blob.offset));
        }
        end += u64::from(blob.length);
    }
    let header: u64 = blobs.iter().map(|blob| if blob.raw_length.is_some() { 41 } else { 37 }).sum();
    let bytes = end + header + (crypto::OVERHEAD_BYTES + pack::LENGTH_BYTES) as u64;
    match present.get(&pack.id) {
        None => Err(format!("it is missing; {} blobs lie in it", blobs.len())),
        Some(&found) if found != bytes => Err(format!("it has {found} bytes instead of {bytes}")),
        Some(_) => Ok(Expected { bytes, entries: digest(&blobs) }),
    }
}

/// What tells lists of a pack's entries apart, in the order of the pack.
pub(super) fn digest(blobs: &[PackedBlob]) -> Id {
    let mut said = Vec::with_capacity(blobs.len() * 45);
    for blob in blobs {
        said.push(u8::from(blob.kind == BlobKind::Tree));
        for number in [blob.offset, blob.length, blob.raw_length.unwrap_or(0)] {
            said.extend_from_slice(&number.to_le_bytes());
        }
        said.extend_from_slice(blob.id.as_bytes());
    }
    Id::of(&said)
}

impl Structure {
    /// Says of each damaged pack which files need it.
    pub(super) fn name_dependants(
        &self,
        archive: &Archive,
        damaged: &BTreeMap<Id, String>,
        cancel: &AtomicBool,
        findings: &mut Notes,
    ) -> Result<(), VerifyError> {
        let mut named: HashMap<Id, Vec<String>> = HashMap::new();
        let counters = Counters::default();
        let mut walk =
            Walk { archive, index: &self.index, counters: &counters, cancel, seen: HashSet::new(), quiet: true };
        walk.all(&self.roots, &mut |_| {}, &mut |kind, id, path| {
            let Some(at) = self.index.find(kind, id).filter(|at| damaged.contains_key(&at.pack)) else { return };
            let paths = named.entry(at.pack).or_default();
            if paths.len() < DEPENDANTS_NAMED {
                paths.push(path());
            }
        })?;
        for (pack, reason) in damaged {
            let paths = named.get(pack).map(|paths| paths.join(", "));
            let paths = paths.unwrap_or_else(|| "no snapshot".to_owned());
            findings.add(format!("{}: {reason}; needed by {paths}", Object::new(Kind::Pack, pack.to_hex())));
        }
        Ok(())
    }
}

/// The begin of a path that may be very long.
fn cut(path: &str) -> String {
    path.chars().take(80).collect()
}

struct Walk<'a> {
    archive: &'a Archive,
    index: &'a BlobIndex,
    counters: &'a Counters,
    cancel: &'a AtomicBool,
    seen: HashSet<Id>,
    /// What is wrong was told before.
    quiet: bool,
}

/// Told of each blob that a tree names, and what needs it.
type OnBlob<'f> = &'f mut dyn FnMut(BlobKind, &Id, &dyn Fn() -> String);

impl Walk<'_> {
    /// Walks every different tree once.
    fn all(
        &mut self,
        roots: &[(Id, Id)],
        on_finding: &mut dyn FnMut(String),
        on_blob: OnBlob<'_>,
    ) -> Result<(), VerifyError> {
        let reader = Reader::new(self.archive, self.index);
        let mut trees = TreeReader::new(&reader);
        for (snapshot, root) in roots {
            let short = snapshot.to_hex().chars().take(8).collect::<String>();
            let mut open = vec![(*root, format!("snapshot {short}:"), 0)];
            while let Some((id, path, depth)) = open.pop() {
                go_on(self.cancel)?;
                if !self.seen.insert(id) {
                    continue;
                }
                self.counters.trees.fetch_add(1, Ordering::Relaxed);
                if depth > DEPTH_MAX {
                    if !self.quiet {
                        on_finding(format!("{}...: folders are deeper than {DEPTH_MAX}", cut(&path)));
                    }
                    continue;
                }
                on_blob(BlobKind::Tree, &id, &|| format!("{path}/"));
                let below = |id, path| open.push((id, path, depth + 1));
                let walked = self.tree(&mut trees, &id, &path, below, on_finding, on_blob);
                match walked {
                    Ok(()) => {}
                    Err(error) if error.is_of_one_object() => {
                        if !self.quiet {
                            on_finding(format!("{path}/: tree {id}: {}", chain(&error)));
                        }
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    fn tree(
        &self,
        trees: &mut TreeReader<'_>,
        id: &Id,
        path: &str,
        mut found: impl FnMut(Id, String),
        on_finding: &mut dyn FnMut(String),
        on_blob: OnBlob<'_>,
    ) -> Result<(), ArchiveError> {
        let bytes = trees.read(id)?;
        let walked = tree::each(&bytes, |node| {
            let below = || format!("{path}/{}", printable(&node.name));
            match &node.kind {
                NodeKind::Folder { subtree } if !self.seen.contains(subtree) => found(*subtree, below()),
                NodeKind::File { content, size } => self.file(&node, content, *size, &below, on_finding, on_blob),
                _ => {}
            }
            true
        });
        walked.map_err(|source: FormatError| ArchiveError::Object { object: format!("tree {id}"), source })
    }

    fn file(
        &self,
        node: &Node,
        content: &[Id],
        size: u64,
        path: &dyn Fn() -> String,
        on_finding: &mut dyn FnMut(String),
        on_blob: OnBlob<'_>,
    ) {
        debug_assert!(matches!(node.kind, NodeKind::File { .. }));
        let mut sum = 0;
        for id in content {
            on_blob(BlobKind::Data, id, path);
            let Some(at) = self.index.find(BlobKind::Data, id) else {
                if !self.quiet {
                    on_finding(format!(
                        "data blob {id}: no index knows it, or its pack is wrong; needed by {}",
                        path()
                    ));
                }
                return;
            };
            sum += u64::from(at.raw_length.unwrap_or(at.length.saturating_sub(crypto::OVERHEAD_BYTES as u32)));
        }
        if sum != size && !self.quiet {
            on_finding(format!("{}: its tree says {size} bytes, and its pieces have {sum}", path()));
        }
    }
}
