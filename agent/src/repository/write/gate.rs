//! The commit gate: what a snapshot is made of, and the only place that writes one.
//!
//! [`Whole`] has no constructor but [`Whole::of`], and [`Proven`] none but [`Whole::read_back`]; each takes its proofs
//! by value.

use std::collections::HashSet;

use crate::format::Id;
use crate::format::snapshot::Snapshot;
use crate::storage::{Kind, Object};

use super::super::errors::EntryErrors;
use super::super::lock::HeldLock;
use super::super::open::{Archive, ArchiveError};
use super::{Cancel, Counters, Stored, prove};

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

/// A source that was read as a whole, and stored as a whole, and that its place gives back as it was put.
#[derive(Debug)]
pub(super) struct Proven(Whole);

impl Whole {
    /// Reads everything back that was put.
    pub(super) fn read_back(
        self,
        archive: &Archive,
        threads: usize,
        cancel: &Cancel,
        counters: &Counters,
    ) -> Result<Proven, ArchiveError> {
        prove::read_back(archive, &self.objects, threads, cancel, counters)?;
        Ok(Proven(self))
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
    Proven(whole): Proven,
    draft: Draft,
    lock: &HeldLock,
    cancel: &Cancel,
) -> Result<Stored, ArchiveError> {
    let Draft { mut snapshot, bytes, bytes_read, files } = draft;
    snapshot.tree = whole.tree;
    let plain = snapshot.to_bytes()?;
    let before: HashSet<String> = names(archive)?.collect();
    if !lock.is_held() {
        return Err(ArchiveError::LockLost);
    }
    if cancel.is_cancelled() {
        return Err(ArchiveError::Cancelled);
    }
    let (object, size) = match archive.write_file(Kind::Snapshot, &plain) {
        Ok(written) => written,
        Err(error) => {
            withdraw(archive, &plain, &before);
            return Err(error);
        }
    };
    if let Err(error) = prove::one(archive, &object, size) {
        withdrawn(archive, &object);
        return Err(error);
    }
    let id = object.name.parse()?;
    let mut objects = whole.objects;
    objects.push((object, size));
    let parent = snapshot.parent;
    Ok(Stored { snapshot: id, tree: whole.tree, parent, bytes, bytes_read, files, vanished: whole.vanished, objects })
}

fn names(archive: &Archive) -> Result<impl Iterator<Item = String>, ArchiveError> {
    Ok(archive.storage().list(Kind::Snapshot)?.into_iter().map(|(name, _)| name))
}

/// After a put that failed the object may be there all the same. The snapshot would be whole, but nobody would
/// know of it; it is removed where that is allowed.
fn withdraw(archive: &Archive, plain: &[u8], before: &HashSet<String>) {
    let Ok(now) = names(archive) else { return };
    for name in now.filter(|name| !before.contains(name)) {
        if archive.read_file(Kind::Snapshot, &name).is_ok_and(|found| found == plain) {
            withdrawn(archive, &Object::new(Kind::Snapshot, name.as_str()));
        }
    }
}

fn withdrawn(archive: &Archive, snapshot: &Object) {
    let removed = archive.storage().remove(snapshot);
    tracing::warn!(event = "snapshot_withdrawn", snapshot = %snapshot.name, removed = removed.is_ok());
}
