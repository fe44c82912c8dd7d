//! The snapshots of an open repository: listed, found by tag, and removed by id.
//!
//! Hestner tags each with its run (`run=...`) and its service (`service=...`). Removing a snapshot removes its one
//! file; the data that only it used stays until somebody prunes.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};

use super::open::{Archive, ArchiveError};
use crate::format::snapshot::Snapshot;
use crate::format::{Id, Timestamp};
use crate::storage::{Kind, Object, StorageError};

/// Begins the tag of the run.
const RUN_TAG: &str = "run=";
/// Begins the tag of the service.
const SERVICE_TAG: &str = "service=";

/// The tag of a run.
pub fn run_tag(run_uid: &str) -> String {
    format!("{RUN_TAG}{run_uid}")
}

/// The tag of a service.
pub fn service_tag(service: &str) -> String {
    format!("{SERVICE_TAG}{service}")
}

/// A snapshot in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// SHA-256 of its file: the file's name.
    pub id: Id,
    /// What it says.
    pub snapshot: Snapshot,
}

impl Listed {
    /// When it was taken. A time that no calendar has is the earliest of all, so that nobody takes it for the newest.
    pub fn time(&self) -> DateTime<Utc> {
        let Timestamp { seconds, nanos } = self.snapshot.time;
        DateTime::from_timestamp(seconds, nanos).unwrap_or(DateTime::<Utc>::MIN_UTC)
    }

    /// The run it belongs to; empty for one that is not Hestner's.
    pub fn run_uid(&self) -> &str {
        self.tag(RUN_TAG)
    }

    /// The service.
    pub fn service(&self) -> &str {
        self.tag(SERVICE_TAG)
    }

    fn tag(&self, key: &str) -> &str {
        self.snapshot.tags.iter().find_map(|tag| tag.strip_prefix(key)).unwrap_or_default()
    }
}

/// Every snapshot, the oldest first.
///
/// # Errors
/// When the place fails, or any snapshot is damaged: a list with one left out would let retention remove the wrong
/// ones. One that is removed while they are listed is left out.
pub fn list(archive: &Archive) -> Result<Vec<Listed>, ArchiveError> {
    let mut found = Vec::new();
    for (name, _) in archive.storage().list(Kind::Snapshot)? {
        match read(archive, &name) {
            Ok(listed) => found.push(listed),
            Err(ArchiveError::Storage(StorageError::Missing(_))) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|listed| (listed.snapshot.time, listed.id));
    Ok(found)
}

/// Every snapshot with a tag, the oldest first.
///
/// # Errors
/// As [`list`].
pub fn with_tag(archive: &Archive, tag: &str) -> Result<Vec<Listed>, ArchiveError> {
    let mut found = list(archive)?;
    found.retain(|listed| listed.snapshot.tags.iter().any(|t| t == tag));
    Ok(found)
}

/// One snapshot.
///
/// # Errors
/// When it is missing or damaged, or the place fails.
pub fn get(archive: &Archive, id: &Id) -> Result<Listed, ArchiveError> {
    read(archive, &id.to_hex())
}

fn read(archive: &Archive, name: &str) -> Result<Listed, ArchiveError> {
    let damaged = |source| ArchiveError::Object { object: Object::new(Kind::Snapshot, name).to_string(), source };
    let id = name.parse::<Id>().map_err(damaged)?;
    let bytes = archive.read_file(Kind::Snapshot, name)?;
    Ok(Listed { id, snapshot: Snapshot::parse(&bytes).map_err(damaged)? })
}

/// Removes snapshots. Those that are not there are fine. Returns when none of them is listed any more.
///
/// # Errors
/// When one cannot be removed; others may be removed then.
pub fn forget(archive: &Archive, ids: &[Id]) -> Result<(), ArchiveError> {
    let names: BTreeSet<String> = ids.iter().map(Id::to_hex).collect();
    for name in &names {
        archive.storage().remove(&Object::new(Kind::Snapshot, name.as_str()))?;
    }
    // Nothing partial may stay, so the word of a place that says it removed something is not enough.
    match archive.storage().list(Kind::Snapshot)?.into_iter().find(|(name, _)| names.contains(name)) {
        None => Ok(()),
        Some((name, _)) => Err(ArchiveError::Broken(format!("snapshots/{name} was removed and is still there"))),
    }
}
