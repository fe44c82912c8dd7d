//! All that is needed to find and open a repository, as data: from the settings to the worker, and into a run's notes,
//! from which it is read again for as long as the run's artifact lives.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Settings, place};
use crate::policy::DestinationSettings;
use crate::storage::Limits;

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
#[serde(from = "Noted")]
pub struct Location {
    /// The destination.
    pub destination: DestinationSettings,
    /// Who holds the key.
    pub mode: Mode,
    /// The server whose repository it is.
    pub server_id: i64,
    /// The folder of password files.
    pub keys: PathBuf,
    /// What a destination behind a network may cost.
    pub limits: Limits,
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
        limits: &Limits,
    ) -> Self {
        let cache = match settings.cache_dir.as_os_str().is_empty() {
            true => state_dir.join("cache"),
            false => settings.cache_dir.clone(),
        };
        Self {
            destination: destination.clone(),
            mode,
            server_id,
            keys: state_dir.join("keys"),
            limits: limits.clone(),
            restic: settings.restic.clone(),
            cache,
            lock_wait_seconds: settings.lock_wait.as_secs(),
        }
    }

    /// The repository's name below its destination.
    pub fn name(&self) -> String {
        format!("server-{}-{}", self.server_id, self.mode.as_str())
    }

    /// Where it is, for people; without secrets.
    pub fn place(&self) -> String {
        place::shown(&self.destination, &self.name())
    }

    /// The file with its password.
    pub fn password_file(&self) -> PathBuf {
        self.keys.join(format!("{}-{}.password", self.destination.name, self.mode.as_str()))
    }

    /// Whether this host has made or opened it before.
    pub fn is_known(&self) -> bool {
        self.id_file().exists()
    }

    pub(super) fn id_file(&self) -> PathBuf {
        self.keys.join(format!("{}-{}.id", self.destination.name, self.mode.as_str()))
    }
}

/// A location as it stands in notes.
#[derive(Deserialize)]
#[serde(untagged)]
#[expect(clippy::large_enum_variant, reason = "it lives for the length of one parse")]
enum Noted {
    Now {
        destination: DestinationSettings,
        mode: Mode,
        server_id: i64,
        keys: PathBuf,
        limits: Limits,
        restic: PathBuf,
        cache: PathBuf,
        lock_wait_seconds: u64,
    },
    /// As it was noted when every destination was a folder.
    Folder {
        destination: String,
        folder: PathBuf,
        mode: Mode,
        server_id: i64,
        keys: PathBuf,
        restic: PathBuf,
        cache: PathBuf,
        lock_wait_seconds: u64,
    },
}

impl From<Noted> for Location {
    fn from(noted: Noted) -> Self {
        match noted {
            Noted::Now { destination, mode, server_id, keys, limits, restic, cache, lock_wait_seconds } => {
                Self { destination, mode, server_id, keys, limits, restic, cache, lock_wait_seconds }
            }
            Noted::Folder { destination, folder, mode, server_id, keys, restic, cache, lock_wait_seconds } => Self {
                destination: DestinationSettings { name: destination, path: folder, ..DestinationSettings::default() },
                mode,
                server_id,
                keys,
                limits: Limits::default(),
                restic,
                cache,
                lock_wait_seconds,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_older_runs_still_lead_to_their_repository() {
        let text = r#"{"destination":"local","folder":"/srv/hestner","mode":"encrypted","server_id":7,
            "keys":"/var/lib/hestner-agent/keys","archiver":"restic","restic":"/usr/bin/restic",
            "cache":"/var/lib/hestner-agent/cache","lock_wait_seconds":600}"#;
        let location: Location = serde_json::from_str(text).unwrap();
        assert_eq!(location.place(), "/srv/hestner/server-7-encrypted");
        assert_eq!(location.password_file(), Path::new("/var/lib/hestner-agent/keys/local-encrypted.password"));
        let now = serde_json::to_string(&location).unwrap();
        assert_eq!(serde_json::from_str::<Location>(&now).unwrap(), location);
    }
}
