//! The commit gate: what a snapshot is made of, and the only place that writes one.
//!
//! [`Whole`] has no constructor but [`Whole::of`], which takes the proofs by value.

use std::collections::HashMap;

use crate::format::Id;
use crate::format::snapshot::Snapshot;
use crate::storage::{Kind, Object};

use super::super::errors::EntryErrors;
use super::super::lock::HeldLock;
use super::super::open::{Archive, ArchiveError};
use super::super::place;
use super::{Cancel, Stored, prove};

/// Everything that was put before the snapshot: made by the uploaders once all of them ended well.
#[derive(Debug)]
pub(super) struct Put {
    pub(super) objects: Vec<(Object, u64)>,
}

/// A source that ended: the root of what was read, and what could not be.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) root: Option<Id>,
    pub(super) errors: EntryErrors,
}

/// A source that was read as a whole, and is stored as a whole.
#[derive(Debug)]
pub(super) struct Whole {
    tree: Id,
    vanished: u64,
    objects: Vec<(Object, u64)>,
}

impl Whole {
    /// From a source that ended and everything that was put.
    pub(super) fn of(ended: Ended, put: Put) -> Result<Self, ArchiveError> {
        if ended.errors.unreadable > 0 {
            return Err(ArchiveError::Unreadable(ended.errors));
        }
        // Without an error every folder was finished; if not, this program is wrong.
        let tree = ended.root.ok_or_else(|| ArchiveError::Broken("the source did not come to an end".to_owned()))?;
        Ok(Self { tree, vanished: ended.errors.vanished, objects: put.objects })
    }
}

/// What the snapshot says beside its tree, and what is told of it.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) snapshot: Snapshot,
    pub(super) bytes: u64,
    pub(super) bytes_read: u64,
    pub(super) files: u64,
}

/// Writes the snapshot, and reads it back as well.
pub(super) fn commit(
    archive: &Archive,
    whole: Whole,
    draft: Draft,
    lock: &HeldLock,
    cancel: &Cancel,
) -> Result<Stored, ArchiveError> {
    let Draft { mut snapshot, bytes, bytes_read, files } = draft;
    snapshot.tree = whole.tree;
    let plain = snapshot.to_bytes()?;
    let bytes_before = all_there(archive, &whole.objects)?;
    if !lock.is_held() {
        return Err(ArchiveError::LockLost);
    }
    if cancel.is_cancelled() {
        return Err(ArchiveError::Cancelled);
    }
    // A snapshot whose put failed would be whole if it is there, but nobody would know of it.
    let (object, size) = archive.write_file_or_withdraw(Kind::Snapshot, &plain)?;
    prove::read_back(archive, &object, size).inspect_err(|_| archive.withdraw(&object))?;
    let id = object.name.parse()?;
    let mut objects = whole.objects;
    objects.push((object, size));
    let parent = snapshot.parent;
    let (tree, vanished, repository_bytes) = (whole.tree, whole.vanished, bytes_before + size);
    Ok(Stored { snapshot: id, tree, parent, bytes, bytes_read, files, vanished, objects, repository_bytes })
}

/// What was put must still be there: somebody may have pruned beside us in spite of our lock. Gives the bytes of all
/// that is.
fn all_there(archive: &Archive, objects: &[(Object, u64)]) -> Result<u64, ArchiveError> {
    let mut there = HashMap::new();
    for kind in place::STORED {
        there.extend(archive.storage().list(kind)?.into_iter().map(|(name, bytes)| (Object::new(kind, name), bytes)));
    }
    match objects.iter().find(|(object, bytes)| there.get(object) != Some(bytes)) {
        None => Ok(there.values().sum()),
        Some((object, _)) => Err(ArchiveError::Broken(format!("{object} was stored and is gone"))),
    }
}
