//! `agent.toml`: the sum of what the modules declare, read whole or not at all.
//!
//! Unknown keys are refused, every mistake is named at once, and a file that somebody else could have
//! written is not believed. Reading has no effect.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_proto::words::ErrorClass;
use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml_example::TomlExample;

use crate::guard::client::Start;
use crate::identity::{IdentityError, Server};
use crate::platform::trust::{self, Distrust};
use crate::policy::{
    COMPRESSION_LEVEL_MAX, DAEMON_FOLDER, DestinationSettings, Floor, ServiceSettings, WorkerSettings, check_name,
};
use crate::run::fence::Fence;
use crate::run::messages::Failure;
use crate::run::plan::Host;
// Under names of their own: the generator of the commented file knows a type by its last name only.
use crate::freeze::Settings as FreezeSettings;
use crate::heartbeat::Settings as HeartbeatSettings;
use crate::inventory::Settings as InventorySettings;
use crate::repository::Settings as RepositorySettings;
use crate::session::Settings as SessionSettings;
use crate::storage::Limits as StorageLimits;

/// Where the settings lie if nobody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/hestner/agent.toml";
const SETTINGS_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// All of `agent.toml`, as the sum of what the modules declare.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "a section is described by its own type, and once in the generated file")]
pub struct Settings {
    /// Where the agent keeps its identity, outbox, runs and keys.
    #[toml_example(default = "/var/lib/hestner-agent")]
    pub state_dir: PathBuf,
    /// The local socket that the command line talks to.
    #[toml_example(default = "/run/hestner-agent/control.sock")]
    pub socket: PathBuf,
    /// What the centre may ask for. Root's own file; see `hestner-agent grants --help`.
    #[toml_example(default = "/etc/hestner/grants.toml")]
    pub grants: PathBuf,
    #[toml_example(nesting)]
    pub receiver: SessionSettings,
    #[toml_example(nesting)]
    pub repository: RepositorySettings,
    #[toml_example(nesting)]
    pub freeze: FreezeSettings,
    #[toml_example(nesting)]
    pub floor: Floor,
    #[toml_example(nesting)]
    pub worker: WorkerSettings,
    #[toml_example(nesting)]
    pub storage: StorageLimits,
    #[toml_example(nesting)]
    pub limits: Limits,
    #[toml_example(nesting)]
    pub inventory: InventorySettings,
    #[toml_example(nesting)]
    pub heartbeat: HeartbeatSettings,
    #[toml_example(nesting)]
    pub log: Log,
    #[serde(rename = "destination")]
    #[toml_example(nesting)]
    pub destinations: Vec<DestinationSettings>,
    #[serde(rename = "service")]
    #[toml_example(nesting)]
    pub services: Vec<ServiceSettings>,
}

/// Bounds on runs.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Runs at the same time; of one service there is never more than one.
    #[toml_example(default = 1)]
    pub concurrent_runs: usize,
    /// Runs that wait for their turn; more are refused as `busy`.
    #[toml_example(default = 20)]
    pub waiting_runs: usize,
    /// How long a run may take before it is stopped and fails.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "12h")]
    pub run_time_max: Duration,
    /// How long a run that the grants want confirmed waits for `hestner-agent confirm`, and how long a
    /// confirmed one may wait for its turn.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "24h")]
    pub confirm_expires: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            concurrent_runs: 1,
            waiting_runs: 20,
            run_time_max: Duration::from_secs(12 * 3600),
            confirm_expires: Duration::from_secs(24 * 3600),
        }
    }
}

/// The log.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// `text` or `json`.
    #[toml_example(default = "text")]
    pub format: LogFormat,
    /// What is logged, such as `info` or `hestner_agent=debug`.
    #[toml_example(default = "info")]
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: "info".to_owned() }
    }
}

/// Forms of the log.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/hestner-agent".into(),
            socket: "/run/hestner-agent/control.sock".into(),
            grants: "/etc/hestner/grants.toml".into(),
            receiver: SessionSettings::default(),
            repository: RepositorySettings::default(),
            freeze: FreezeSettings::default(),
            floor: Floor::default(),
            worker: WorkerSettings::default(),
            storage: StorageLimits::default(),
            limits: Limits::default(),
            inventory: InventorySettings::default(),
            heartbeat: HeartbeatSettings::default(),
            log: Log::default(),
            destinations: Vec::new(),
            services: Vec::new(),
        }
    }
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file is missing, or somebody else could have written it.
    #[error("the settings file {path} is not believed: {source}")]
    Distrust {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Distrust,
    },
    /// The file is not there.
    #[error("there is no settings file {0}")]
    Missing(PathBuf),
    /// The file cannot be understood.
    #[error("the settings file {path} cannot be understood:\n{reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, column and what is wrong.
        reason: String,
    },
    /// The file says what cannot be.
    #[error("the settings file {path} has mistakes:\n  - {}", .mistakes.join("\n  - "))]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// Every one of them.
        mistakes: Vec<String>,
    },
}

impl SettingsError {
    /// Stable class.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Distrust { .. } => ErrorClass::UnsafePermissions,
            _ => ErrorClass::SettingsInvalid,
        }
    }
}

impl Settings {
    /// Reads a file.
    ///
    /// # Errors
    /// [`SettingsError`], with every mistake at once.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let distrust = |source: Distrust| match source.is_missing() {
            true => SettingsError::Missing(path.to_owned()),
            false => SettingsError::Distrust { path: path.to_owned(), source },
        };
        let path_absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let text = trust::read_text(&path_absolute, SETTINGS_BYTES_MAX).map_err(distrust)?;
        Self::parse(path, &text)
    }

    /// What is needed to thaw, of a file that may have mistakes elsewhere: a service must not stay frozen
    /// because of a slip in a setting. Everything else is as if nothing were written.
    ///
    /// # Errors
    /// When somebody else could have written the file, or it is no TOML at all.
    pub fn salvage(path: &Path) -> Result<Self, SettingsError> {
        let whole = match Self::read(path) {
            Err(SettingsError::Missing(_)) => return Ok(Self::default()),
            Err(SettingsError::Mistakes { .. }) => None,
            other => Some(other?),
        };
        if let Some(whole) = whole {
            return Ok(whole);
        }
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let distrust = |source| SettingsError::Distrust { path: path.clone(), source };
        let text = trust::read_text(&path, SETTINGS_BYTES_MAX).map_err(distrust)?;
        let table: toml::Table = text.parse().unwrap_or_default();
        let only = |key: &str| {
            let part = toml::Table::from_iter([(key.to_owned(), table.get(key)?.clone())]);
            Self::deserialize(toml::Value::Table(part)).ok()
        };
        let base = Self::default();
        Ok(Self {
            state_dir: only("state_dir").map_or(base.state_dir.clone(), |s| s.state_dir),
            freeze: only("freeze").map_or(base.freeze.clone(), |s| s.freeze),
            inventory: only("inventory").map_or(base.inventory.clone(), |s| s.inventory),
            ..base
        })
    }

    fn parse(path: &Path, text: &str) -> Result<Self, SettingsError> {
        let syntax =
            |error: toml::de::Error| SettingsError::Syntax { path: path.to_owned(), reason: error.to_string() };
        let mistakes = match toml::from_str::<Self>(text) {
            Ok(settings) => match settings.mistakes() {
                none if none.is_empty() => return Ok(settings.shared()),
                mistakes => mistakes,
            },
            // The first one is known; whoever mends the file wants them all.
            Err(first) => mistakes_of_form(text).filter(|all| !all.is_empty()).ok_or_else(|| syntax(first))?,
        };
        Err(SettingsError::Mistakes { path: path.to_owned(), mistakes })
    }

    /// Gives each part what it shares with another.
    fn shared(mut self) -> Self {
        self.freeze.docker_socket.clone_from(&self.inventory.docker_socket);
        self.freeze.points = self.state_dir.join("points");
        self
    }

    fn mistakes(&self) -> Vec<String> {
        let mut found = self.freeze.mistakes();
        for (key, path) in [
            ("state_dir", &self.state_dir),
            ("socket", &self.socket),
            ("grants", &self.grants),
            ("repository.restic", &self.repository.restic),
        ] {
            if !path.is_absolute() {
                found.push(format!("`{key}` must be an absolute path, not `{}`", path.display()));
            }
        }
        for (key, address) in
            [("address", &self.receiver.address), ("enrolment_address", &self.receiver.enrolment_address)]
        {
            let port = address
                .rsplit_once(':')
                .and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>().ok())?);
            if port.is_none() {
                found.push(format!("`receiver.{key}` must read host:port, not `{address}`"));
            }
        }
        found.extend(self.worker.mistakes().into_iter().map(|reason| format!("[worker]: {reason}")));
        found.extend(self.storage.mistakes().into_iter().map(|reason| format!("[storage]: {reason}")));
        if !(1..=COMPRESSION_LEVEL_MAX).contains(&self.floor.compression_level_max) {
            found.push(format!("`floor.compression_level_max` must be 1 to {COMPRESSION_LEVEL_MAX}"));
        }
        if self.limits.concurrent_runs == 0 {
            found.push("`limits.concurrent_runs` must be at least 1".to_owned());
        }
        if self.limits.confirm_expires.is_zero() {
            found.push("`limits.confirm_expires` must be longer than 0".to_owned());
        }
        if self.inventory.interval < Duration::from_secs(1) || self.heartbeat.sample_interval < Duration::from_secs(1) {
            found.push("`inventory.interval` and `heartbeat.sample_interval` must be at least 1s".to_owned());
        }
        for (i, destination) in self.destinations.iter().enumerate() {
            let name = &destination.name;
            found.extend(check_name(name).err().map(|reason| format!("destination `{name}`: {reason}")));
            found.extend(destination.mistakes().into_iter().map(|reason| format!("destination `{name}`: {reason}")));
            if self.destinations[..i].iter().any(|other| other.name == *name) {
                found.push(format!("destination `{name}` is defined twice"));
            }
        }
        for (i, service) in self.services.iter().enumerate() {
            found.extend(service.mistakes(&self.destinations));
            if !service.point.containers.is_empty() && self.inventory.docker_socket.as_os_str().is_empty() {
                found.push(format!(
                    "service `{}`: point: `containers` need `docker_socket` under [inventory]",
                    service.name
                ));
            }
            if self.services[..i].iter().any(|other| other.name == service.name) {
                found.push(format!("service `{}` is defined twice", service.name));
            }
        }
        found
    }

    /// The user that the daemon runs as: the owner of its folder. `None`: there is none yet, or others could
    /// have made it.
    pub fn daemon_user(&self) -> Option<u32> {
        trust::check(&self.state_dir).ok()?;
        let metadata = self.state_dir.join(DAEMON_FOLDER).symlink_metadata().ok()?;
        metadata.is_dir().then(|| metadata.uid())
    }

    /// What a run needs of the settings and the identity.
    ///
    /// # Errors
    /// When the host is not enrolled.
    pub fn host(&self) -> Result<Host, Failure> {
        trust::check(&self.state_dir).map_err(|e| Failure::of(ErrorClass::UnsafePermissions, &e))?;
        let server = Server::read(&self.state_dir).map_err(|error| match &error {
            IdentityError::Distrust(_) => Failure::of(ErrorClass::UnsafePermissions, &error),
            _ => Failure::of(ErrorClass::SettingsInvalid, &error),
        })?;
        Ok(self.host_of(server.server_id, server.recovery_recipient))
    }

    /// The same without an identity, for who only looks.
    pub fn host_to_look_at(&self) -> Host {
        self.host_of(0, String::new())
    }

    fn host_of(&self, server_id: i64, recovery_recipient: String) -> Host {
        Host {
            state_dir: self.state_dir.clone(),
            settings_file: DEFAULT_PATH.into(),
            guard: Start::Process { config: DEFAULT_PATH.into() },
            grants: self.grants.clone(),
            services: self.services.clone(),
            destinations: self.destinations.clone(),
            floor: self.floor.clone(),
            worker: self.worker.clone(),
            storage: self.storage.clone(),
            fence: Fence::default(),
            freeze: self.freeze.clone(),
            repository: self.repository.clone(),
            run_time_max: self.limits.run_time_max,
            server_id,
            recovery_recipient,
        }
    }
}

/// Every key or block that cannot be understood, each by itself. `None`: the text is no TOML at all.
fn mistakes_of_form(text: &str) -> Option<Vec<String>> {
    let (spans, values) = (DeTable::parse(text).ok()?, text.parse::<toml::Table>().ok()?);
    let mut found = Vec::new();
    for (key, value) in spans.get_ref() {
        let name = key.get_ref().to_string();
        let whole = values.get(&name)?;
        for (at, part) in parts(key.span().start, value.get_ref(), whole) {
            let piece = toml::Table::from_iter([(name.clone(), part)]);
            if let Err(error) = Settings::deserialize(toml::Value::Table(piece)) {
                let line = text[..at].matches('\n').count() + 1;
                found.push(format!("line {line}: {}", error.message()));
            }
        }
    }
    Some(found)
}

/// Takes a value apart: a section into its keys, a list of blocks into its blocks.
fn parts(at: usize, spans: &DeValue<'_>, whole: &toml::Value) -> Vec<(usize, toml::Value)> {
    match (spans, whole) {
        (DeValue::Table(spans), toml::Value::Table(section)) => {
            let one = |(key, value): (&String, &toml::Value)| {
                let at = spans.iter().find(|(k, _)| k.get_ref() == key).map_or(at, |(k, _)| k.span().start);
                (at, toml::Value::Table(toml::Table::from_iter([(key.clone(), value.clone())])))
            };
            section.iter().map(one).collect()
        }
        (DeValue::Array(spans), toml::Value::Array(blocks)) => {
            let one = |(span, block): (&toml::Spanned<DeValue<'_>>, &toml::Value)| {
                (span.span().start, toml::Value::Array(vec![block.clone()]))
            };
            spans.iter().zip(blocks).map(one).collect()
        }
        _ => vec![(at, whole.clone())],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        Settings::parse(Path::new("agent.toml"), text)
    }

    /// `UPDATE_GOLDEN=1` writes the file anew.
    #[test]
    fn commented_default_file_is_generated_from_the_doc_comments() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/agent.toml");
        let expected = format!(
            "# Settings of hestner-agent. Generated from the program: every value below is the default, and the\n\
             # blocks [[destination]] and [[service]] are examples.\n\n{}",
            Settings::toml_example()
        );
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            crate::platform::files::write(Path::new(path), expected.as_bytes(), 0o644).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap_or_default(), expected, "run with UPDATE_GOLDEN=1");
        parse(&expected).unwrap();
    }

    #[test]
    fn every_mistake_is_named_at_once() {
        let error = parse(
            "state_dir = \"relative\"\n[worker]\nnice = 20\nmemory_max = 1000\n[storage]\ntries_max = 0\n[floor]\ncompression_level_max = 0\n[limits]\nconcurrent_runs = 0\n[[destination]]\nname = \"a b\"\nkind = \"folder\"\npath = \"x\"\n\
             [[service]]\nname = \"s\"\ndestination = \"nowhere\"\nsource = { kind = \"files\" }\n\
             [[service]]\nname = \"t\"\ndestination = \"a b\"\nsource = { kind = \"command\", argv = [\"dump\"], file_name = \"a/b\", paths = [\"/x\"] }\n\
             hook = [{ name = \"h\", timeout = \"0s\" }]\nworker = { compression_level = 20 }\n",
        )
        .unwrap_err()
        .to_string();
        for part in [
            "`state_dir` must be an absolute path",
            "[worker]: `nice` must be 0 to 19, not 20",
            "[worker]: `memory_max` must be 0 or at least 64 MiB, not 1 kB",
            "[storage]: `tries_max`",
            "`floor.compression_level_max` must be 1 to 19",
            "service `t`: worker: `compression_level` must be 1 to 19, not 20",
            "concurrent_runs",
            "destination `a b`: a name has",
            "`path` must be absolute",
            "destination `nowhere` is not defined",
            "needs `paths`",
            "absolute path, not `dump`",
            "`file_name` without `/`",
            "belong to a source of kind `files`",
            "neither `pre_freeze` nor `post_thaw`",
            "`timeout` must be longer than 0",
        ] {
            assert!(error.contains(part), "{part} is not in:\n{error}");
        }
    }

    #[test]
    fn every_key_that_cannot_be_understood_is_named_with_its_line() {
        let text = "no_such = 1\n[floor]\nretention_dyas = 1\nretention_count = \"x\"\n[[destination]]\nname = \"d\"\nkind = \"floppy\"\npath = \"/x\"\n";
        let error = parse(text).unwrap_err().to_string();
        for part in [
            "line 1: unknown field `no_such`",
            "line 3: unknown field `retention_dyas`",
            "line 4: invalid type",
            "floppy",
        ] {
            assert!(error.contains(part), "{part} is not in:\n{error}");
        }
    }

    #[test]
    fn unknown_key_is_refused_with_its_line() {
        let error = parse("state_dir = \"/x\"\nstate_dri = \"/y\"\n").unwrap_err().to_string();
        assert!(error.contains("state_dri") && error.contains("line 2"), "{error}");
    }
}
