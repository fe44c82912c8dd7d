//! A folder whose entries are being stored: whoever brings the last one stores the tree, and brings the folder to
//! the one above.
//!
//! Entries arrive in any order and lie in the tree in theirs; what is early waits. An entry that is left out is
//! brought as nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::format::BlobKind;
use crate::format::tree::{CLOSING, Node, NodeKind, OPENING, TREE_BYTES_MAX};

use super::super::open::ArchiveError;
use super::pipeline::{Pipeline, Stop};
use super::tools::Tools;

/// A folder.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    above: Option<Above>,
    state: Mutex<Assembly>,
}

#[derive(Debug)]
pub(super) struct Above {
    pub(super) folder: Arc<Folder>,
    pub(super) slot: usize,
    /// The folder's own node; its subtree is put in at the end.
    pub(super) node: Node,
}

/// Nobody could read the tree again.
struct TooLong;

#[derive(Debug)]
struct Assembly {
    json: Vec<u8>,
    next: usize,
    missing: usize,
    early: BTreeMap<usize, Vec<u8>>,
}

impl Folder {
    /// A folder of so many entries. One without any must be [closed](Self::close_empty) at once.
    pub(super) fn new(path: PathBuf, above: Option<Above>, entries: usize) -> Arc<Self> {
        let assembly = Assembly { json: OPENING.to_vec(), next: 0, missing: entries, early: BTreeMap::new() };
        Arc::new(Self { path, above, state: Mutex::new(assembly) })
    }

    /// Brings an entry: its node's JSON, or nothing.
    pub(super) fn bring(
        self: &Arc<Self>,
        pipeline: &Pipeline<'_>,
        tools: &mut Tools,
        slot: usize,
        json: &[u8],
    ) -> Result<(), Stop> {
        match self.take_in(slot, json) {
            Ok(Some(tree)) => self.clone().store(pipeline, tools, tree),
            Ok(None) => Ok(()),
            Err(TooLong) => Err(self.too_long(pipeline)),
        }
    }

    /// Stores a folder without entries.
    pub(super) fn close_empty(self: Arc<Self>, pipeline: &Pipeline<'_>, tools: &mut Tools) -> Result<(), Stop> {
        let tree = [OPENING, CLOSING].concat();
        self.store(pipeline, tools, tree)
    }

    fn too_long(&self, pipeline: &Pipeline<'_>) -> Stop {
        let path = self.path.display();
        pipeline.fail(ArchiveError::Broken(format!("{path} has more entries than one folder of a repository can hold")))
    }

    /// The whole tree, if this was the last entry.
    fn take_in(&self, slot: usize, json: &[u8]) -> Result<Option<Vec<u8>>, TooLong> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        state.missing = state.missing.saturating_sub(1);
        if slot == state.next {
            state.append(json);
            while let Some(json) = state.early.remove(&state.next) {
                state.append(&json);
            }
        } else {
            state.early.insert(slot, json.to_vec());
        }
        if state.json.len() + CLOSING.len() > TREE_BYTES_MAX {
            return Err(TooLong);
        }
        Ok((state.missing == 0).then(|| {
            state.json.extend_from_slice(CLOSING);
            std::mem::take(&mut state.json)
        }))
    }

    fn store(self: Arc<Self>, pipeline: &Pipeline<'_>, tools: &mut Tools, tree: Vec<u8>) -> Result<(), Stop> {
        let (mut folder, mut tree) = (self, tree);
        loop {
            let subtree = tools.store(pipeline, BlobKind::Tree, &tree)?;
            let Some(above) = &folder.above else {
                *pipeline.root.lock().unwrap_or_else(PoisonError::into_inner) = Some(subtree);
                return Ok(());
            };
            let node = Node { kind: NodeKind::Folder { subtree }, ..above.node.clone() };
            let mut json = Vec::with_capacity(512);
            node.write(&mut json);
            let taken = above.folder.take_in(above.slot, &json);
            let Some(whole) = taken.map_err(|TooLong| above.folder.too_long(pipeline))? else { return Ok(()) };
            tree = whole;
            folder = above.folder.clone();
        }
    }
}

impl Assembly {
    fn append(&mut self, json: &[u8]) {
        if !json.is_empty() {
            if self.json.len() > OPENING.len() {
                self.json.push(b',');
            }
            self.json.extend_from_slice(json);
        }
        self.next += 1;
    }
}
