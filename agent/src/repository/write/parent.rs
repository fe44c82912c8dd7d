//! The parent snapshot: unchanged files are recognised from it without being read.
//!
//! A parent that cannot be read is no failure: every file is read then. Trees are fetched in windows of their
//! packs, because neighbours are asked for soon.

use std::collections::VecDeque;
use std::sync::Arc;

use rustix::fs::Stat;

use crate::format::snapshot::Snapshot;
use crate::format::tree::{self, NodeKind};
use crate::format::{BlobKind, Id, Timestamp};
use crate::storage::{Kind, Object};

use super::super::index::Location;
use super::super::open::{Archive, ArchiveError};
use super::Parent;
use super::entry::time;
use super::pipeline::Pipeline;

const WINDOW_BYTES: u64 = 1024 * 1024;
const WINDOWS_MAX: usize = 8;

/// The parent of a new snapshot.
pub(super) fn choose(
    archive: &Archive,
    wanted: Parent,
    new: &Snapshot,
) -> Result<Option<(Id, Snapshot)>, ArchiveError> {
    let read = |name: &str| archive.read_file(Kind::Snapshot, name).and_then(|bytes| Ok(Snapshot::parse(&bytes)?));
    match wanted {
        Parent::ForceRead => Ok(None),
        Parent::Snapshot(id) => match read(&id.to_hex()) {
            Ok(snapshot) => Ok(Some((id, snapshot))),
            Err(error) => {
                tracing::warn!(event = "parent_unreadable", parent = %id, %error);
                Ok(None)
            }
        },
        Parent::Newest => {
            let mut newest: Option<(Id, Snapshot)> = None;
            for (name, _) in archive.storage().list(Kind::Snapshot)? {
                let (Ok(id), Ok(snapshot)) = (name.parse(), read(&name)) else { continue };
                let same = snapshot.hostname == new.hostname && snapshot.paths == new.paths;
                if same && newest.as_ref().is_none_or(|(_, best)| best.time < snapshot.time) {
                    newest = Some((id, snapshot));
                }
            }
            Ok(newest)
        }
    }
}

/// What the parent knows of a folder.
#[derive(Debug)]
pub(super) struct Known(Vec<KnownEntry>);

#[derive(Debug)]
struct KnownEntry {
    name: Box<[u8]>,
    what: What,
}

#[derive(Debug)]
enum What {
    File { size: u64, mtime: Timestamp, ctime: Timestamp, inode: u64, content: Box<[Id]> },
    Folder(Id),
}

impl Known {
    fn find(&self, name: &[u8]) -> Option<&What> {
        let at = self.0.binary_search_by(|entry| (*entry.name).cmp(name)).ok()?;
        self.0.get(at).map(|entry| &entry.what)
    }

    /// The tree of a folder in it.
    pub(super) fn subtree(&self, name: &[u8]) -> Option<Id> {
        match self.find(name)? {
            What::Folder(id) => Some(*id),
            What::File { .. } => None,
        }
    }

    /// The pieces of a file that is as it was, if all of them are stored.
    pub(super) fn unchanged(&self, name: &[u8], stat: &Stat, pipeline: &Pipeline<'_>) -> Option<Vec<Id>> {
        let What::File { size, mtime, ctime, inode, content } = self.find(name)? else { return None };
        let same = u64::try_from(stat.st_size) == Ok(*size)
            && time(stat.st_mtime, stat.st_mtime_nsec) == *mtime
            && time(stat.st_ctime, stat.st_ctime_nsec) == *ctime
            && stat.st_ino == *inode;
        // A blob that was only claimed in this run may still fail, and then there is no snapshot either.
        let stored = || content.iter().all(|id| pipeline.index.contains(BlobKind::Data, id));
        (same && stored()).then(|| content.to_vec())
    }
}

/// Reads trees of the parent.
pub(super) struct Reader<'p, 'a> {
    pipeline: &'p Pipeline<'a>,
    windows: VecDeque<Window>,
}

struct Window {
    pack: Id,
    start: u64,
    bytes: Vec<u8>,
}

impl<'p, 'a> Reader<'p, 'a> {
    pub(super) fn new(pipeline: &'p Pipeline<'a>) -> Self {
        Self { pipeline, windows: VecDeque::new() }
    }

    /// What the parent knows of a folder; nothing if its tree cannot be had.
    pub(super) fn known(&mut self, tree: Option<Id>) -> Option<Arc<Known>> {
        let id = tree?;
        let at = self.pipeline.index.find(BlobKind::Tree, &id)?;
        match self.read(&id, &at) {
            Ok(known) => Some(Arc::new(known)),
            Err(error) => {
                tracing::warn!(event = "parent_tree_unreadable", tree = %id, %error);
                None
            }
        }
    }

    fn read(&mut self, id: &Id, at: &Location) -> Result<Known, ArchiveError> {
        let sealed = self.fetch(at)?;
        let plain = self.pipeline.archive.open_blob(id, at, sealed)?;
        let mut entries = Vec::new();
        tree::each(&plain, |node| {
            let what = match node.kind {
                NodeKind::File { size, content } => What::File {
                    size,
                    mtime: node.mtime,
                    ctime: node.ctime,
                    inode: node.inode,
                    content: content.into(),
                },
                NodeKind::Folder { subtree } => What::Folder(subtree),
                _ => return true,
            };
            entries.push(KnownEntry { name: node.name.into(), what });
            true
        })?;
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Known(entries))
    }

    fn fetch(&mut self, at: &Location) -> Result<Vec<u8>, ArchiveError> {
        let (offset, end) = (u64::from(at.offset), u64::from(at.offset) + u64::from(at.length));
        let within = |window: &Window| {
            window.pack == at.pack && window.start <= offset && end <= window.start + window.bytes.len() as u64
        };
        if let Some(found) = self.windows.iter().position(within) {
            if let Some(window) = self.windows.remove(found) {
                self.windows.push_front(window);
            }
        } else {
            let start = offset - offset % WINDOW_BYTES;
            let pack_end = self.pipeline.index.pack_bytes(&at.pack).unwrap_or(end);
            let stop = (start + WINDOW_BYTES).max(end).min(pack_end);
            let object = Object::new(Kind::Pack, at.pack.to_hex());
            let bytes = self.pipeline.archive.storage().get_range(&object, start, stop - start)?;
            self.windows.truncate(WINDOWS_MAX - 1);
            self.windows.push_front(Window { pack: at.pack, start, bytes });
        }
        let window = self.windows.front().filter(|window| within(window));
        let slice = window.and_then(|window| {
            let from = usize::try_from(offset - window.start).ok()?;
            window.bytes.get(from..from + at.length as usize)
        });
        slice.map(<[u8]>::to_vec).ok_or_else(|| ArchiveError::Broken("a window of a pack is too short".to_owned()))
    }
}
