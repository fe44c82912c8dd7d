//! Where artifacts are kept: one repository in restic's format per server, destination and encryption mode.
//!
//! The face is [`Repository`]: open or make, store, list, forget, restore, verify. What goes in is a
//! [`Job`], what comes out a [`Stored`] or a [`RepositoryError`] with a stable class; progress goes to a callback.
//!
//! Behind it stands the archive engine: [`place`] (where objects lie), [`open`] (a repository and its objects),
//! [`index`], [`lock`], [`write`](mod@write), [`restore`], [`verify`], [`snapshots`]; `own` takes the face's calls
//! there. Stock restic is driven for one thing only, which nobody needs for a backup or a restore: [`prune`] removes
//! data that no snapshot uses.
//!
//! Who may run beside whom (restic's lock files hold them apart across machines and tools; the service
//! lock of a run holds apart two runs of one service here):
//!
//! | | store | prune | forget | restore, verify |
//! | --- | --- | --- | --- | --- |
//! | store | yes | no, waits for the lock | yes | yes |
//! | prune | no, waits | no, waits | no, waits | no, waits |
//! | forget | yes | no, waits | yes | yes |
//! | restore, verify | yes | no, waits | yes | yes |
//!
//! Forgetting removes a snapshot's one file and no data, so that it harms nobody beside it. Locks of this host whose
//! process is gone are removed by whoever takes one.
//!
//! The commit gate: a snapshot is written only from what was read, stored and read back as a whole (`write`). Nothing
//! partial is ever counted or offered.

mod errors;
pub mod failpoints;
pub mod index;
pub mod keys;
mod location;
pub mod lock;
pub mod open;
mod own;
pub mod place;
pub mod progress;
pub mod prune;
mod reading;
pub mod recovery;
pub mod restore;
pub mod retention;
pub mod snapshots;
pub mod verify;
pub mod write;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use chrono::{DateTime, Utc};
use hestner_proto::words::Phase;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use toml_example::TomlExample;

use self::verify::{Extent, Verified};
use crate::escrow::RepositoryKey;
use crate::platform::{chain, files};
use crate::policy::How;

pub use errors::{EntryErrors, RepositoryError};
pub use location::{Location, Mode};

/// Pause between two looks whether another run of this host is done with the keys.
const KEYS_PAUSE: Duration = Duration::from_millis(100);
/// How many unreadable entries are named.
pub const UNREADABLE_NAMES_MAX: usize = 20;

/// Settings of repositories.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The restic program, version 0.14 or later. It only removes data that no snapshot uses any more; nothing else
    /// needs it.
    #[toml_example(default = "/usr/bin/restic")]
    pub restic: PathBuf,
    /// Where restic keeps copies of indexes while it removes data; `cache` in the state folder if it is empty.
    #[toml_example(default = "")]
    pub cache_dir: PathBuf,
    /// Once chose between two archivers; not read any more.
    #[serde(rename = "archiver")]
    #[toml_example(skip)]
    pub retired_archiver: Option<String>,
    /// How long to wait for another user of the repository before a run fails.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "10m")]
    pub lock_wait: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            restic: "/usr/bin/restic".into(),
            cache_dir: PathBuf::new(),
            retired_archiver: None,
            lock_wait: Duration::from_secs(600),
        }
    }
}

/// What to store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The run; its tag in the repository.
    pub run_uid: String,
    /// The service; a tag as well.
    pub service: String,
    /// The data.
    pub input: Input,
    /// How it is read and written.
    #[serde(default)]
    pub how: How,
}

/// The data of a [`Job`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// Folders and files.
    Files {
        /// What to read.
        paths: Vec<PathBuf>,
        /// What to leave out.
        exclude: Vec<String>,
        /// Do not go into filesystems mounted below.
        one_file_system: bool,
        /// A tree that lives while it is read: entries may vanish.
        live: bool,
    },
    /// A program's output, under a name.
    Stream {
        /// The name.
        file_name: String,
    },
}

/// What was stored, and read back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Id of the snapshot: SHA-256 of its file.
    pub snapshot_id: String,
    /// Bytes of all files in it.
    pub bytes_read: u64,
    /// Added to the repository.
    pub bytes_stored: u64,
    /// Files in the artifact.
    pub files: u64,
    /// Entries that went away while a live tree was read.
    pub vanished: u64,
    /// Bytes of all that is in the repository now.
    pub repository_bytes: u64,
}

/// A snapshot in the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// When it was taken.
    pub time: DateTime<Utc>,
    /// The run it belongs to; empty for one that is not Hestner's.
    pub run_uid: String,
    /// The service.
    pub service: String,
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Done so far.
    pub bytes_done: u64,
    /// 0 while unknown.
    pub bytes_total: u64,
    /// Done so far.
    pub files_done: u64,
    /// 0 while unknown.
    pub files_total: u64,
    /// 0 while unknown.
    pub seconds_remaining: u32,
    /// Smoothed; 0 while unknown.
    #[serde(default)]
    pub bytes_per_second: u64,
}

/// A repository at its place.
#[derive(Clone, Debug)]
pub struct Repository {
    location: Location,
}

impl Repository {
    /// The repository at a location. Nothing is touched yet.
    pub fn at(location: Location) -> Self {
        Self { location }
    }

    /// Whether it is there. Looks only, without its password.
    ///
    /// # Errors
    /// When its destination cannot be asked.
    pub async fn exists(&self) -> Result<bool, RepositoryError> {
        own::exists(&self.location).await
    }

    /// Opens the repository, or makes it: password, repository, and the wrapped key beside it.
    ///
    /// # Errors
    /// When the destination is missing or cannot be written, or when a repository that was here before is gone: an
    /// unmounted disk must not make us start a new one in its place.
    pub async fn open_or_make(&self, recovery_recipient: &str) -> Result<RepositoryKey, RepositoryError> {
        self.opened_or_made(recovery_recipient).await.map_err(|error| error.own_below(&self.location.keys))
    }

    async fn opened_or_made(&self, recovery_recipient: &str) -> Result<RepositoryKey, RepositoryError> {
        let (location, password_file) = (&self.location, self.location.password_file());
        if let Some(folder) = location.destination.folder().filter(|folder| !folder.is_dir()) {
            return Err(RepositoryError::NoFolder(folder.to_owned()));
        }
        let _alone = self.alone_with_keys().await?;
        let known = files::read(&location.id_file(), 1024).ok();
        let is_known = known.is_some();
        let exists = own::exists(location).await?;
        let id = match (exists, known) {
            (false, Some(_)) => return Err(RepositoryError::Gone(location.place())),
            (true, None) if !password_file.exists() => return Err(RepositoryError::NoPassword(password_file)),
            (true, Some(id)) => String::from_utf8_lossy(&id).into_owned(),
            (true, None) => own::id(location).await?,
            (false, None) => {
                keys::make_password(&password_file)?;
                own::make(location).await?
            }
        };
        let key = keys::escrow(&password_file, location.mode, recovery_recipient)?;
        let key = RepositoryKey { repository_id: id, destination: location.destination.name.clone(), key };
        own::lay_beside(location, &key).await?;
        if !is_known {
            files::write(&location.id_file(), key.repository_id.as_bytes(), 0o600)?;
        }
        Ok(key)
    }

    /// Two first runs at once would make two passwords, or two keys of which restic may try the wrong one.
    async fn alone_with_keys(&self) -> Result<files::Lock, RepositoryError> {
        files::private_folder(&self.location.keys)?;
        let path = self.location.id_file().with_extension("lock");
        let give_up = Instant::now() + Duration::from_secs(self.location.lock_wait_seconds);
        loop {
            match files::try_lock(&path)? {
                Some(lock) => return Ok(lock),
                None if Instant::now() < give_up => tokio::time::sleep(KEYS_PAUSE).await,
                None => return Err(RepositoryError::Locked("another run that opens it for the first time".to_owned())),
            }
        }
    }

    /// Stores a job, and returns only what is whole: every byte read, every object durable at its place and read back
    /// from there.
    /// `stream` is where a [`Input::Stream`] is read from; `cancelled` ends it when it completes. Locks of dead
    /// processes are cleared first; one that does not go with ours is waited for.
    /// `ended_well` is true as soon as the stream's producer has: an end before that is none.
    ///
    /// # Errors
    /// Whatever kept it from being whole; there is no snapshot then. Only one that was cancelled may have been faster.
    pub async fn store(
        &self,
        job: &Job,
        stream: (Option<OwnedFd>, Arc<AtomicBool>),
        cancelled: impl Future<Output = ()>,
        on_progress: impl FnMut(Phase, Progress),
    ) -> Result<Stored, RepositoryError> {
        own::store(&self.location, job, stream, cancelled, on_progress).await
    }

    /// Every snapshot.
    ///
    /// # Errors
    /// When the repository cannot be opened.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, RepositoryError> {
        own::snapshots(&self.location).await
    }

    /// Removes whatever snapshot carries a run's tag, and the locks of dead processes.
    ///
    /// # Errors
    /// When the repository cannot be opened or another user holds it.
    pub async fn forget_run(&self, run_uid: &str) -> Result<(), RepositoryError> {
        match own::forget_run(&self.location, run_uid).await {
            // One that was there before is on a disk that is not mounted now, with whatever it holds.
            Err(error) if error.is_no_repository() => match self.location.is_known() {
                true => Err(RepositoryError::Gone(self.location.place())),
                false => Ok(()),
            },
            other => other,
        }
    }

    /// Removes snapshots that retention no longer keeps, and the data that only they used. Returns why that data is
    /// still there, if it is: also when `cancelled` completes, and restic was asked to end.
    ///
    /// # Errors
    /// When the repository cannot be opened or another user holds it.
    pub async fn expire(
        &self,
        ids: &[String],
        cancelled: impl Future<Output = ()>,
    ) -> Result<Option<String>, RepositoryError> {
        own::forget(&self.location, ids).await?;
        let pruned = prune::of_host(&self.location, cancelled).await;
        Ok(pruned.err().map(|error| format!("the data of removed artifacts stays: {}", chain(&error))))
    }

    /// Bytes that all objects of the repository have; 0 where there is none.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub async fn size_bytes(&self) -> Result<u64, RepositoryError> {
        match own::size_bytes(&self.location).await {
            Err(error) if error.is_no_repository() => Ok(0),
            other => other,
        }
    }

    /// Writes a snapshot's tree below `target`. Returns what this user or filesystem could not set, as sentences.
    ///
    /// # Errors
    /// When anything could not be written as it was stored. Called again, it goes on with what is missing.
    pub async fn restore(
        &self,
        snapshot_id: &str,
        target: &Path,
        on_progress: impl FnMut(Progress),
    ) -> Result<Vec<String>, RepositoryError> {
        own::restore(&self.location, snapshot_id, target, on_progress).await
    }

    /// Looks whether a snapshot is there, checks the structure of the whole repository, and reads so much of its data
    /// back.
    ///
    /// # Errors
    /// When anything is damaged.
    pub async fn verify(
        &self,
        snapshot_id: &str,
        extent: Extent,
        on_progress: impl FnMut(Progress),
    ) -> Result<Verified, RepositoryError> {
        own::verify(&self.location, snapshot_id, extent, on_progress).await
    }
}
