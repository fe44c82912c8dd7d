//! What the agent says of itself to people on the host: the answers of the control socket.
//!
//! Plain data. It is filled by the daemon and printed by the command line; field names are a contract
//! with scripts (`--json`).

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
    /// Whether daemon and runner are separate units with separate privileges.
    pub separated: bool,
    /// Reports that the receiver has not acknowledged yet.
    pub outbox_reports: u64,
    /// Runs that go on.
    pub runs_active: usize,
    /// Services that the settings name.
    pub services: Vec<ServiceStatus>,
    /// Repositories that these services use.
    pub repositories: Vec<RepositoryStatus>,
    /// What keeps runs from working, as sentences.
    pub problems: Vec<String>,
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
