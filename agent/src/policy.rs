//! The words of a snapshot: services, hooks and destinations as the host's settings name them, and the
//! policy as the centre asks for it.
//!
//! Settings are the host's own and believed; a [`Policy`] came over the network and is only a wish until
//! the gate has compared it with the settings. Policies lie as one file a service in a folder, so that the
//! runner can read them without the daemon's database. Nothing here decides anything.

mod destination;
mod effort;
mod point;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_proto::v1;
use hestner_proto::words::{Consistency, GrantValue, Misfire, Scope, Verb};
use serde::{Deserialize, Serialize};
use toml_example::TomlExample;

pub use destination::{DestinationKind, DestinationSettings};
pub use effort::{COMPRESSION_LEVEL_MAX, Effort, How, IoClass, ServiceWorkerSettings, Wishes, WorkerSettings};
pub use point::{Hold, PointKind, PointSettings};

use crate::platform::files::{self, FileError};

/// The built-in service that stands for the whole machine.
pub const HOST: &str = "host";
/// Longest name of a service, a destination or a hook.
const NAME_CHARS_MAX: usize = 64;
/// A command of a hook may take at most so long: whatever it holds has a guard, and a guard has an end.
const HOOK_TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Folder in the state folder that belongs to the daemon's user: lock, store, identity, policies. All else
/// there is the runner's, who takes what lies in this one for a stranger's.
pub const DAEMON_FOLDER: &str = "daemon";
/// A policy file is a few hundred bytes.
const POLICY_BYTES_MAX: u64 = 64 * 1024;

/// Something on this server that can be snapshotted.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "a section is described by its own type, and once in the generated file")]
pub struct ServiceSettings {
    /// Name of the service: letters, digits, `_`, `.` and `-`.
    #[toml_example(default = "docs")]
    pub name: String,
    /// Where its artifacts go when no policy names another destination.
    #[toml_example(default = "local")]
    pub destination: String,
    /// The least consistency a run must reach: `none`, `crash`, `filesystem` or `application`.
    #[serde(default = "no_consistency")]
    #[toml_example(default = "none")]
    pub consistency: Consistency,
    #[toml_example(nesting)]
    pub source: SourceSettings,
    #[serde(default)]
    #[toml_example(nesting)]
    pub point: PointSettings,
    #[serde(default)]
    #[toml_example(nesting)]
    pub worker: ServiceWorkerSettings,
    #[serde(default, rename = "hook")]
    #[toml_example(nesting)]
    pub hooks: Vec<HookSettings>,
}

/// How a service's data is read.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(deny_unknown_fields)]
pub struct SourceSettings {
    /// `files`: folders and files. `command`: the output of a program, such as a database dump.
    #[toml_example(default = "files")]
    pub kind: SourceKind,
    /// For `files`: what to read, as absolute paths.
    #[serde(default)]
    #[toml_example(default = ["/usr/share/doc"])]
    pub paths: Vec<PathBuf>,
    /// For `files`: patterns of what to leave out, as restic's `--exclude` reads them.
    #[serde(default)]
    #[toml_example(default = ["*.tmp"])]
    pub exclude: Vec<String>,
    /// For `files`: do not go into other filesystems mounted below; the run names those it left out.
    #[serde(default)]
    #[toml_example(default = false)]
    pub one_file_system: bool,
    /// For `command`: the program and its arguments.
    #[serde(default)]
    #[toml_example(default = [])]
    pub argv: Vec<String>,
    /// For `command`: the name that its output is stored under.
    #[serde(default)]
    #[toml_example(default = "")]
    pub file_name: String,
}

/// The kinds of [`SourceSettings`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// Folders and files.
    Files,
    /// A program's output.
    Command,
}

/// One pair of commands around the point in time.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(deny_unknown_fields)]
pub struct HookSettings {
    /// Name of the hook, for logs.
    #[toml_example(default = "database")]
    pub name: String,
    /// Prepares the service: program and arguments, no shell. If it fails, no snapshot is taken.
    #[serde(default)]
    #[toml_example(default = ["/usr/local/lib/hestner/pre"])]
    pub pre_freeze: Vec<String>,
    /// Releases the service. Runs for every `pre_freeze` that was started, also for one that failed.
    #[serde(default)]
    #[toml_example(default = ["/usr/local/lib/hestner/post"])]
    pub post_thaw: Vec<String>,
    /// Runs instead of `post_thaw` when the point in time was not reached; `post_thaw` runs if it is empty.
    #[serde(default)]
    #[toml_example(default = [])]
    pub freeze_failed: Vec<String>,
    /// The user that the commands run as; the agent's own if it is empty.
    #[serde(default)]
    #[toml_example(default = "")]
    pub user: String,
    /// How long each command may take, an hour at most; then everything that it started is killed.
    #[serde(default = "hook_timeout", with = "humantime_serde")]
    #[toml_example(default = "30s")]
    pub timeout: Duration,
    /// How much of each command's output is kept; the rest is read and dropped.
    #[serde(default = "hook_output_bytes_max")]
    #[toml_example(default = 65536)]
    pub output_bytes_max: usize,
}

/// What no policy of the centre can go below.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Floor {
    /// Policies must keep artifacts for at least so many days.
    #[toml_example(default = 0)]
    pub retention_days: u32,
    /// Policies must keep at least so many artifacts.
    #[toml_example(default = 1)]
    pub retention_count: u32,
    /// Let a policy switch encryption off, which gives the repository's key to the centre.
    #[toml_example(default = false)]
    pub allow_unencrypted: bool,
    /// Policies may ask for compression up to this level, 1 to 19; the highest take much CPU, and memory.
    #[toml_example(default = 9)]
    pub compression_level_max: i32,
}

impl Default for Floor {
    fn default() -> Self {
        Self { retention_days: 0, retention_count: 1, allow_unencrypted: false, compression_level_max: 9 }
    }
}

fn no_consistency() -> Consistency {
    Consistency::None
}

fn hook_timeout() -> Duration {
    Duration::from_secs(30)
}

fn hook_output_bytes_max() -> usize {
    64 * 1024
}

impl ServiceSettings {
    /// What a run of this service covers.
    pub fn scope(&self) -> Scope {
        match self.source.kind {
            _ if self.name == HOST => Scope::Full,
            SourceKind::Files => Scope::Volume,
            SourceKind::Command => Scope::Db,
        }
    }

    /// Whether hooks prepare the application before the point in time.
    pub fn quiesces(&self) -> bool {
        self.hooks.iter().any(|hook| !hook.pre_freeze.is_empty())
    }

    /// Every mistake in these settings, each as one sentence.
    pub fn mistakes(&self, destinations: &[DestinationSettings]) -> Vec<String> {
        let mut found = Vec::new();
        let mut say = |text: String| found.push(format!("service `{}`: {text}", self.name));
        if let Err(reason) = check_name(&self.name) {
            say(reason);
        }
        if !destinations.iter().any(|d| d.name == self.destination) {
            say(format!("destination `{}` is not defined", self.destination));
        }
        self.source.mistakes().into_iter().for_each(&mut say);
        self.point.mistakes(self.source.kind).into_iter().for_each(&mut say);
        self.worker.mistakes().into_iter().for_each(|reason| say(format!("worker: {reason}")));
        for (i, hook) in self.hooks.iter().enumerate() {
            if self.hooks[..i].iter().any(|other| other.name == hook.name) {
                say(format!("hook `{}` is defined twice", hook.name));
            }
            hook.mistakes().into_iter().for_each(&mut say);
        }
        found
    }
}

impl SourceSettings {
    fn mistakes(&self) -> Vec<String> {
        let mut found = Vec::new();
        match self.kind {
            SourceKind::Files => {
                if self.paths.is_empty() {
                    found.push("a source of kind `files` needs `paths`".to_owned());
                }
                for path in self.paths.iter().filter(|p| !p.is_absolute()) {
                    found.push(format!("path `{}` is not absolute", path.display()));
                }
                if !self.argv.is_empty() || !self.file_name.is_empty() {
                    found.push("`argv` and `file_name` belong to a source of kind `command`".to_owned());
                }
            }
            SourceKind::Command => {
                found.extend(program_mistake("argv", &self.argv));
                if self.argv.is_empty() {
                    found.push("a source of kind `command` needs `argv`".to_owned());
                }
                if self.file_name.is_empty() || self.file_name.contains('/') {
                    found.push("a source of kind `command` needs a `file_name` without `/`".to_owned());
                }
                if !self.paths.is_empty() || !self.exclude.is_empty() || self.one_file_system {
                    found
                        .push("`paths`, `exclude` and `one_file_system` belong to a source of kind `files`".to_owned());
                }
            }
        }
        found
    }
}

impl HookSettings {
    fn mistakes(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let Err(reason) = check_name(&self.name) {
            found.push(format!("hook `{}`: {reason}", self.name));
        }
        for (key, argv) in
            [("pre_freeze", &self.pre_freeze), ("post_thaw", &self.post_thaw), ("freeze_failed", &self.freeze_failed)]
        {
            found.extend(program_mistake(key, argv).map(|reason| format!("hook `{}`: {reason}", self.name)));
        }
        if self.pre_freeze.is_empty() && self.post_thaw.is_empty() {
            found.push(format!("hook `{}` has neither `pre_freeze` nor `post_thaw`", self.name));
        }
        if self.timeout.is_zero() {
            found.push(format!("hook `{}`: `timeout` must be longer than 0", self.name));
        }
        if self.timeout > HOOK_TIMEOUT_MAX {
            found.push(format!("hook `{}`: `timeout` must be at most an hour", self.name));
        }
        found
    }
}

fn program_mistake(key: &str, argv: &[String]) -> Option<String> {
    let program = argv.first()?;
    (!Path::new(program).is_absolute())
        .then(|| format!("the program of `{key}` must be an absolute path, not `{program}`"))
}

/// Checks a name that becomes part of file names and of labels.
///
/// # Errors
/// A sentence that says what a name may look like.
pub fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let good_start = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if good_start && name.len() <= NAME_CHARS_MAX && name.chars().all(allowed) {
        return Ok(());
    }
    Err(format!("a name has 1 to {NAME_CHARS_MAX} letters, digits, `_`, `.` or `-`, and begins with a letter or digit"))
}

/// What the centre asks to be snapshotted when, where to, and how long to keep it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Its row at the receiver.
    pub policy_id: i64,
    /// The service.
    pub service: String,
    /// Five fields; empty: no schedule.
    pub cron: String,
    /// IANA name of the time zone that `cron` is meant in.
    pub time_zone: String,
    /// Keep what is younger than so many days; 0: this rule keeps nothing.
    pub retention_days: u32,
    /// Keep the newest so many; 0: this rule keeps nothing. Both 0: keep everything.
    pub retention_count: u32,
    /// A name that the host must define.
    pub destination: String,
    /// False asks for a key that the centre also holds.
    pub encryption_enabled: bool,
    /// What a missed time leads to, as [`Misfire`] is written.
    pub misfire: String,
    /// What a backup may cost.
    #[serde(default)]
    pub wishes: Wishes,
}

impl From<v1::Policy> for Policy {
    fn from(p: v1::Policy) -> Self {
        Self {
            policy_id: p.policy_id,
            service: p.service,
            cron: p.cron,
            time_zone: p.time_zone,
            retention_days: p.retention_days,
            retention_count: p.retention_count,
            destination: p.destination,
            encryption_enabled: p.encryption_enabled,
            misfire: p.misfire,
            wishes: Wishes {
                compression_level: p.compression_level,
                priority: p.priority,
                force_read: p.force_read,
                skip_caches: p.skip_caches,
            },
        }
    }
}

impl Policy {
    /// What a missed time leads to; an unknown word counts as `skip`, the one that does less.
    pub fn misfire(&self) -> Misfire {
        self.misfire.parse().unwrap_or(Misfire::Skip)
    }
}

/// The folder that holds one policy file a service.
#[derive(Clone, Debug)]
pub struct Policies {
    state_dir: PathBuf,
}

impl Policies {
    /// The policies of an agent whose state lies in `state_dir`.
    pub fn of(state_dir: &Path) -> Self {
        Self { state_dir: state_dir.to_owned() }
    }

    fn folder(&self) -> PathBuf {
        self.state_dir.join(DAEMON_FOLDER).join("policies")
    }

    /// Stores a policy in place of the service's former one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, policy: &Policy) -> Result<(), FileError> {
        files::private_folder(&self.folder())?;
        let text = serde_json::to_vec_pretty(policy).unwrap_or_default();
        files::write(&self.path(&policy.service), &text, 0o600)
    }

    /// The policy of a service.
    ///
    /// # Errors
    /// When the file is there but cannot be read or understood.
    pub fn load(&self, service: &str) -> Result<Option<Policy>, FileError> {
        if check_name(service).is_err() {
            return Ok(None);
        }
        let path = self.path(service);
        // The runner reads it as root, and the daemon's folder is the daemon's.
        let below = path.strip_prefix(&self.state_dir).unwrap_or(&path);
        match files::read_of_stranger(&self.state_dir, below, POLICY_BYTES_MAX) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|e| files::failed("understand", &path)(e.into()))
            }
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Services that have a policy.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn services(&self) -> Result<Vec<String>, FileError> {
        let folder = self.folder();
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(files::failed("list", &folder))?,
        };
        let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
        Ok(names.filter_map(|name| name.strip_suffix(".json").map(str::to_owned)).collect())
    }

    fn path(&self, service: &str) -> PathBuf {
        self.folder().join(format!("{service}.json"))
    }
}

/// The host's permissions: for each service and verb a value, `deny` where nothing is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    entries: std::collections::BTreeMap<(String, Verb), GrantValue>,
}

impl Grants {
    /// The value for one service and one verb.
    pub fn get(&self, service: &str, verb: Verb) -> GrantValue {
        self.entries.get(&(service.to_owned(), verb)).copied().unwrap_or(GrantValue::Deny)
    }

    /// Sets a value.
    pub fn set(&mut self, service: &str, verb: Verb, value: GrantValue) {
        self.entries.insert((service.to_owned(), verb), value);
    }

    /// All that is written, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Verb, GrantValue)> {
        self.entries.iter().map(|((service, verb), value)| (service.as_str(), *verb, *value))
    }
}
