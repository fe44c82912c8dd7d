//! Where artifacts are kept: one repository in restic's format per server, destination and encryption mode.
//!
//! The face is [`Repository`]: open or make, store, list, forget, read back, restore, verify. What goes in is a
//! [`Job`], what comes out a [`Stored`] or a [`RepositoryError`] with a stable class; progress goes to a callback.
//!
//! Behind it stands an engine of our own: [`open`] (a repository and its objects), [`index`], [`lock`],
//! [`write`](mod@write), [`restore`], [`verify`], [`snapshots`], reached through `own`. It restores and verifies, and
//! stores if the settings say so; otherwise stock restic stores (`restic`), which prunes in any case. Nobody outside
//! of this module knows which.
//!
//! Who may run beside whom (restic's lock files hold them apart across machines and tools; the service
//! lock of a run holds apart two runs of one service here):
//!
//! | | store | forget, prune | restore, verify | clear stale locks |
//! | --- | --- | --- | --- | --- |
//! | store | yes | no, waits for the lock | yes | yes |
//! | forget, prune | no, waits | no, waits | no, waits | yes |
//! | restore, verify | yes | no, waits | yes | yes |
//!
//! Our engine removes the snapshot of a failed run beside others: the file alone goes, and no data.
//!
//! The commit gate: the engine writes a snapshot only from what is whole. restic writes its snapshot even when it could not read everything (exit code 3), so
//! [`Repository::store`] removes such a snapshot before it returns, and recovery removes it if this process
//! died in between. Nothing partial is ever counted or offered.

mod contents;
mod errors;
pub mod failpoints;
pub mod index;
mod keys;
pub mod lock;
mod locks;
pub mod open;
mod own;
pub mod place;
mod restic;
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
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use toml_example::TomlExample;

use crate::escrow::RepositoryKey;
use crate::platform::files;
use crate::policy::DestinationSettings;

pub use contents::Contents;
pub use errors::{EntryErrors, RepositoryError};

/// How many unreadable entries are named.
pub const UNREADABLE_NAMES_MAX: usize = 20;

/// Who reads a source and writes it into the repository. The format is the same.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Archiver {
    /// Stock restic.
    #[default]
    Restic,
    /// Our own engine.
    Hestner,
}

/// Settings of repositories.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Who stores: `restic`, or `hestner`, the engine of its own, which can be tried out. Either reads what the other
    /// wrote.
    #[toml_example(default = "restic")]
    pub archiver: Archiver,
    /// The restic program; version 0.14 or later.
    #[toml_example(default = "/usr/bin/restic")]
    pub restic: PathBuf,
    /// Where restic keeps copies of indexes; `cache` in the state folder if it is empty.
    #[toml_example(default = "")]
    pub cache_dir: PathBuf,
    /// How long to wait for another user of the repository before a run fails.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "10m")]
    pub lock_wait: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            archiver: Archiver::default(),
            restic: "/usr/bin/restic".into(),
            cache_dir: PathBuf::new(),
            lock_wait: Duration::from_secs(600),
        }
    }
}

/// Who holds the repository's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The host, and the company by its recovery key.
    Encrypted,
    /// The centre as well.
    Open,
}

impl Mode {
    /// As it is written in names.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Encrypted => "encrypted",
            Self::Open => "open",
        }
    }
}

/// All that is needed to find and open a repository; it travels to the worker and into the run's ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Location {
    /// Name of the destination.
    pub destination: String,
    /// The destination's folder.
    pub folder: PathBuf,
    /// Who holds the key.
    pub mode: Mode,
    /// The server whose repository it is.
    pub server_id: i64,
    /// The folder of password files.
    pub keys: PathBuf,
    /// Who stores.
    #[serde(default)]
    pub archiver: Archiver,
    /// The restic program.
    pub restic: PathBuf,
    /// restic's cache.
    pub cache: PathBuf,
    /// How long to wait for another user's lock, in seconds.
    pub lock_wait_seconds: u64,
}

impl Location {
    /// The repository of a server at one destination.
    pub fn new(
        destination: &DestinationSettings,
        mode: Mode,
        server_id: i64,
        state_dir: &Path,
        settings: &Settings,
    ) -> Self {
        let cache = match settings.cache_dir.as_os_str().is_empty() {
            true => state_dir.join("cache"),
            false => settings.cache_dir.clone(),
        };
        Self {
            destination: destination.name.clone(),
            folder: destination.path.clone(),
            mode,
            server_id,
            keys: state_dir.join("keys"),
            archiver: settings.archiver,
            restic: settings.restic.clone(),
            cache,
            lock_wait_seconds: settings.lock_wait.as_secs(),
        }
    }

    /// The repository's own folder.
    pub fn path(&self) -> PathBuf {
        self.folder.join(format!("server-{}-{}", self.server_id, self.mode.as_str()))
    }

    /// The file with its password.
    pub fn password_file(&self) -> PathBuf {
        self.keys.join(format!("{}-{}.password", self.destination, self.mode.as_str()))
    }

    fn id_file(&self) -> PathBuf {
        self.keys.join(format!("{}-{}.id", self.destination, self.mode.as_str()))
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

/// What was stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Id of the snapshot: SHA-256 of its file.
    pub snapshot_id: String,
    /// Read from the source.
    pub bytes_read: u64,
    /// Added to the repository; known when it was read back.
    pub bytes_stored: u64,
    /// Files in the artifact.
    pub files: u64,
    /// Entries that went away while a live tree was read.
    pub vanished: u64,
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
}

/// A repository at its place.
#[derive(Clone, Debug)]
pub struct Repository {
    location: Location,
    engine: restic::Restic,
}

impl Repository {
    /// The repository at a location. Nothing is touched yet.
    pub fn at(location: Location) -> Self {
        let engine = restic::Restic::new(&location);
        Self { location, engine }
    }

    /// Opens the repository, or makes it: password, repository, and the wrapped key beside it.
    ///
    /// # Errors
    /// When the destination's folder is missing or cannot be written, or when a repository that was here
    /// before is gone: an unmounted disk must not make us start a new one in its place.
    pub async fn open_or_make(&self, recovery_recipient: &str) -> Result<RepositoryKey, RepositoryError> {
        self.opened_or_made(recovery_recipient).await.map_err(|error| error.own_below(&self.location.keys))
    }

    async fn opened_or_made(&self, recovery_recipient: &str) -> Result<RepositoryKey, RepositoryError> {
        let Location { folder, .. } = &self.location;
        if !folder.is_dir() {
            return Err(RepositoryError::NoFolder(folder.clone()));
        }
        let known = files::read(&self.location.id_file(), 1024).ok();
        let exists = self.location.path().join("config").exists();
        match (exists, known) {
            (false, Some(_)) => return Err(RepositoryError::Gone(self.location.path())),
            (true, None) if !self.location.password_file().exists() => {
                return Err(RepositoryError::NoPassword(self.location.password_file()));
            }
            (true, Some(id)) => {
                let key = self.key(&String::from_utf8_lossy(&id), recovery_recipient)?;
                keys::lay_beside(&self.location.path(), &key)?;
                return Ok(key);
            }
            (true, None) => {}
            (false, None) => {
                keys::make_password(&self.location.password_file())?;
                self.clear_unfinished()?;
                match self.location.archiver {
                    Archiver::Restic => self.engine.init().await?,
                    Archiver::Hestner => drop(own::make(&self.location).await?),
                }
            }
        }
        let id = match self.location.archiver {
            Archiver::Restic => self.engine.id().await?,
            Archiver::Hestner => own::id(&self.location).await?,
        };
        let key = self.key(&id, recovery_recipient)?;
        keys::lay_beside(&self.location.path(), &key)?;
        files::write(&self.location.id_file(), id.as_bytes(), 0o600)?;
        Ok(key)
    }

    /// A repository whose making was broken off has a key but no config; a second key beside it would open
    /// nothing. What holds data is never touched.
    fn clear_unfinished(&self) -> Result<(), RepositoryError> {
        let path = self.location.path();
        if path.exists() && !self.contents()?.has_data() {
            files::remove(&path)?;
        }
        Ok(())
    }

    fn key(&self, repository_id: &str, recovery_recipient: &str) -> Result<RepositoryKey, RepositoryError> {
        let key = keys::escrow(&self.location.password_file(), self.location.mode, recovery_recipient)?;
        Ok(RepositoryKey {
            repository_id: repository_id.to_owned(),
            destination: self.location.destination.clone(),
            key,
        })
    }

    /// Stores a job, and returns only what is whole: every byte read, every object synced by restic.
    /// `stream` is where a [`Input::Stream`] is read from; `cancelled` ends the archiver at once when it
    /// completes. Locks of dead processes are cleared first; another user's is waited for.
    /// `ended_well` is true as soon as the stream's producer has: an end before that is none.
    ///
    /// # Errors
    /// Whatever kept it from being whole. The snapshot of a partial read is removed before this returns;
    /// if even that failed, the error says so and recovery does it.
    pub async fn store(
        &self,
        job: &Job,
        (stream, ended_well): (Option<OwnedFd>, Arc<AtomicBool>),
        cancelled: impl Future<Output = ()>,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<Stored, RepositoryError> {
        if self.location.archiver == Archiver::Hestner {
            return own::store(&self.location, job, stream, ended_well, cancelled, on_progress).await;
        }
        locks::clear_stale(&self.engine, &self.location.path()).await?;
        tokio::pin!(cancelled);
        let give_up = Instant::now() + Duration::from_secs(self.location.lock_wait_seconds);
        let ended = loop {
            // The archiver takes its lock before it reads, so that a stream is whole at the next try.
            let input = stream.as_ref().map(OwnedFd::try_clone).transpose();
            let input = input.map_err(|e| RepositoryError::Surprise(format!("no descriptor is left: {e}")))?;
            match self.engine.backup(job, input, cancelled.as_mut(), &mut on_progress).await {
                Err(RepositoryError::Locked(_)) if Instant::now() < give_up => tokio::select! {
                    () = tokio::time::sleep(restic::LOCK_PAUSE) => {}
                    () = &mut cancelled => return Err(RepositoryError::Cancelled),
                },
                other => break other?,
            }
        };
        self.gate(job, ended).await
    }

    /// The commit gate.
    async fn gate(&self, job: &Job, ended: restic::Ended) -> Result<Stored, RepositoryError> {
        let live = matches!(job.input, Input::Files { live: true, .. });
        let unreadable = if live { ended.errors.unreadable } else { ended.errors.unreadable + ended.errors.vanished };
        let whole = unreadable == 0 && !(ended.partial && ended.errors.vanished == 0);
        let Some(snapshot_id) = ended.snapshot_id.filter(|_| whole) else {
            if let Err(source) = self.forget_run(&job.run_uid).await {
                return Err(RepositoryError::RemovalOwed { source: Box::new(source) });
            }
            return Err(match unreadable {
                0 => RepositoryError::Surprise("restic did not say that it stored everything".to_owned()),
                _ => RepositoryError::Unreadable(EntryErrors { unreadable, ..ended.errors }),
            });
        };
        Ok(Stored {
            snapshot_id: self.full_id(&job.run_uid, &snapshot_id).await?,
            bytes_read: ended.bytes_read,
            bytes_stored: 0,
            files: ended.files,
            vanished: ended.errors.vanished,
        })
    }

    /// restic reports eight digits; the file's name has them all.
    async fn full_id(&self, run_uid: &str, short: &str) -> Result<String, RepositoryError> {
        let folder = self.location.path().join("snapshots");
        let entries = std::fs::read_dir(&folder).map_err(files::failed("list", &folder))?;
        let mut found =
            entries.flatten().filter_map(|e| e.file_name().into_string().ok()).filter(|name| name.starts_with(short));
        match (found.next(), found.next()) {
            (Some(id), None) => Ok(id),
            _ => Err(RepositoryError::Surprise(format!(
                "the snapshot {short} of run {run_uid} is not in the repository"
            ))),
        }
    }

    /// Every snapshot.
    ///
    /// # Errors
    /// When the repository cannot be opened.
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, RepositoryError> {
        if self.location.archiver == Archiver::Hestner {
            return own::snapshots(&self.location).await;
        }
        self.engine.snapshots().await
    }

    /// Removes whatever snapshot carries a run's tag, after the locks of dead processes.
    ///
    /// # Errors
    /// When the repository cannot be opened or another user holds it.
    pub async fn forget_run(&self, run_uid: &str) -> Result<(), RepositoryError> {
        if !self.location.path().join("config").exists() {
            // One that was there before is on a disk that is not mounted now, with whatever it holds.
            let known = self.location.id_file().exists();
            return if known { Err(RepositoryError::Gone(self.location.path())) } else { Ok(()) };
        }
        if self.location.archiver == Archiver::Hestner {
            return own::forget_run(&self.location, run_uid).await;
        }
        locks::clear_stale(&self.engine, &self.location.path()).await?;
        let of_run =
            |all: Vec<Snapshot>| all.into_iter().filter(|s| s.run_uid == run_uid).map(|s| s.id).collect::<Vec<_>>();
        let ids = of_run(self.snapshots().await?);
        if ids.is_empty() {
            return Ok(());
        }
        self.engine.forget(&ids, restic::Prune::No).await?;
        // Nothing partial may stay, so that the word of another program is not enough.
        match of_run(self.snapshots().await?).is_empty() {
            true => Ok(()),
            false => Err(RepositoryError::Surprise(format!(
                "restic said that it removed {}, and it is still there",
                ids.join(", ")
            ))),
        }
    }

    /// Removes snapshots that retention no longer keeps, and the data that only they used.
    ///
    /// # Errors
    /// When the repository cannot be opened or another user holds it.
    pub async fn expire(&self, ids: &[String]) -> Result<(), RepositoryError> {
        locks::clear_stale(&self.engine, &self.location.path()).await?;
        self.engine.forget(ids, restic::Prune::Yes).await
    }

    /// Which objects the repository holds now.
    ///
    /// # Errors
    /// When a folder of it cannot be listed.
    pub fn contents(&self) -> Result<Contents, RepositoryError> {
        Contents::list(&self.location.path())
    }

    /// Reads back every object that is not in `before`, from the disk and not from the page cache.
    /// Returns how many bytes that was.
    ///
    /// # Errors
    /// [`RepositoryError::Differs`] for an object whose SHA-256 is not its name.
    pub fn read_back(&self, before: &Contents) -> Result<u64, RepositoryError> {
        self.contents()?.read_back_new(before)
    }

    /// Size of the repository on disk, in bytes.
    ///
    /// # Errors
    /// When a folder of it cannot be listed.
    pub fn size_bytes(&self) -> Result<u64, RepositoryError> {
        Ok(self.contents()?.bytes())
    }

    /// Writes a snapshot's tree below `target`. Returns what this user or filesystem could not set, as sentences.
    ///
    /// # Errors
    /// When anything could not be written as it was stored.
    pub async fn restore(&self, snapshot_id: &str, target: &Path) -> Result<Vec<String>, RepositoryError> {
        own::restore(&self.location, snapshot_id, target).await
    }

    /// Reads a snapshot's whole tree and checks the repository's structure and all its data.
    ///
    /// # Errors
    /// When anything is damaged.
    pub async fn verify(&self, snapshot_id: &str) -> Result<(), RepositoryError> {
        own::verify(&self.location, snapshot_id).await
    }
}
