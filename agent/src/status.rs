//! What the agent says of itself to people on the host: the answers of the control socket.
//!
//! Plain data. It is filled by the daemon and printed by the command line; field names are a contract
//! with scripts (`--json`).

use hestner_proto::words::RunKind;
use serde::{Deserialize, Serialize};

/// The daemon's state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// Version of the running daemon.
    pub version: String,
    /// Whether the host has an identity.
    pub enrolled: bool,
    /// 0 while not enrolled.
    pub company_id: i64,
    /// 0 while not enrolled.
    pub server_id: i64,
    /// End of the certificate, in milliseconds since the epoch; 0 while not enrolled.
    pub certificate_expires_at_ms: i64,
    /// Whether a session with the receiver is open.
    pub connected: bool,
    /// Why not, if it is known.
    pub disconnected_because: String,
    /// How far this host's clock was ahead of the receiver's when the session began, in milliseconds;
    /// `null` before the first session.
    #[serde(default)]
    pub clock_skew_ms: Option<i64>,
    /// Fingerprint of the recovery key that was typed on this host, for which keys are wrapped; empty while unknown.
    #[serde(default)]
    pub recovery_fingerprint: String,
    /// Fingerprint of the one that the receiver named last. It is never followed; where it is another one, `problems`
    /// says so.
    #[serde(default)]
    pub recovery_fingerprint_named: String,
    /// Whether daemon and runner are separate units with separate privileges.
    pub separated: bool,
    /// Which bounds of `[worker]` nobody keeps here, and why; empty when all are kept.
    #[serde(default)]
    pub worker_limits_off: String,
    /// Reports that the receiver has not acknowledged yet.
    pub outbox_reports: u64,
    /// Runs that go on.
    pub runs_active: usize,
    /// Runs that wait until a person on the host confirms them.
    pub runs_waiting: usize,
    /// Services that the settings name.
    pub services: Vec<ServiceStatus>,
    /// Repositories that these services use.
    pub repositories: Vec<RepositoryStatus>,
    /// What keeps runs from working, as sentences.
    pub problems: Vec<String>,
}

/// A run that waits until a person on the host confirms it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingRun {
    /// The run.
    pub run_uid: String,
    /// Its service.
    pub service: String,
    /// What it shall do.
    pub verb: String,
    /// Who asked: the schedule, or a person.
    pub kind: RunKind,
    /// The directive, if the centre asked; otherwise empty.
    pub directive_id: String,
    /// Since when it waits, in milliseconds since the epoch.
    pub since_ms: i64,
    /// Until when, in milliseconds since the epoch; then it fails.
    pub expires_at_ms: i64,
}

/// A service of the settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// The best consistency that it can reach here.
    pub consistency: String,
    /// Where its artifacts go by default.
    pub destination: String,
    /// The schedule in force; empty when there is none.
    pub cron: String,
}

/// What only root can see of this host; a runner tells it to the daemon.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Description {
    /// Services of the settings.
    pub services: Vec<Reach>,
    /// Repositories that exist.
    pub repositories: Vec<RepositoryStatus>,
    /// Containers.
    pub containers: Vec<Container>,
    /// Which bounds of `[worker]` nobody keeps here, and why; empty when all are kept.
    #[serde(default)]
    pub worker_limits_off: String,
    /// Fingerprint of the recovery key that was typed on this host; empty where it is not enrolled.
    #[serde(default)]
    pub recovery_fingerprint: String,
    /// What keeps runs from working, as sentences.
    pub problems: Vec<String>,
}

/// The best that a service can reach here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// The service.
    pub name: String,
    /// Its consistency; empty when its source cannot be reached at all.
    pub consistency: String,
    /// Why it is no better, or why there is none, as sentences.
    #[serde(default)]
    pub reasons: Vec<String>,
}

/// A container on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// `ok`, `degraded`, `failed`, `stopped` or `unknown`.
    pub health: String,
}

/// A repository of this server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RepositoryStatus {
    /// Name of the destination.
    pub destination: String,
    /// `encrypted` or `open`.
    pub mode: String,
    /// Where it is, as stock restic's `-r` wants it.
    pub path: String,
    /// File with its password, as stock restic's `--password-file` wants it.
    pub password_file: String,
}
