//! All that a host may tell the centre durably, as one enum.
//!
//! A security reviewer reads this file to know what leaves the machine in reports. Encoding is the wire's
//! (`hestner.v1.Report`); the outbox sees only the bytes.

use hestner_proto::v1;
use hestner_proto::words::{Consistency, ErrorClass, Phase, RunKind, RunStatus, Scope};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use crate::escrow::{EscrowedKey, RepositoryKey};

/// Longest log tail of a run, in bytes.
pub const LOG_TAIL_BYTES_MAX: usize = 8 * 1024;

/// A report.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// A run began or ended.
    Run(Box<RunRecord>),
    /// A directive was taken or refused.
    DirectiveOutcome {
        /// Which.
        directive_id: String,
        /// Why it was refused; `None`: it was taken.
        refusal: Option<(String, String)>,
    },
    /// What the server used in an hour.
    Usage(Usage),
    /// The key of a repository, for the day when the host is gone.
    RepositoryKey(RepositoryKey),
}

/// Counters of one hour.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Beginning of the hour.
    pub hour_start_ms: i64,
    /// How much of it was observed.
    pub observed_seconds: u32,
    /// Processor time of the whole machine.
    pub cpu_core_seconds: f64,
    /// Used memory, integrated over time.
    pub memory_byte_seconds: f64,
    /// Used disk at the end.
    pub disk_used_bytes: u64,
    /// Sent by all interfaces.
    pub network_sent_bytes: u64,
}

/// All that is known of a run: the line in `runs`, the file in the runner's ledger, the report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// UUIDv7, made by the agent.
    pub run_uid: String,
    /// Empty for a cron run and for one asked for on the host.
    pub directive_id: String,
    /// The service.
    pub service: String,
    /// Who asked.
    pub kind: RunKind,
    /// What it covers.
    pub scope: Scope,
    /// `snapshot` when a point in time was taken, else `backup`.
    pub job_type: String,
    /// Where it stands.
    pub status: RunStatus,
    /// Last phase reached.
    pub phase: Option<Phase>,
    /// Why it failed.
    pub error_class: Option<ErrorClass>,
    /// The same as a sentence.
    pub error_message: String,
    /// When it began.
    pub started_at_ms: i64,
    /// When it ended; 0 until then.
    pub finished_at_ms: i64,
    /// The least that the settings ask for.
    pub consistency_requested: Consistency,
    /// What was reached; `none` until the point is taken.
    pub consistency_achieved: Consistency,
    /// From the end of the last `pre_freeze` to the point in time being taken.
    pub freeze_ms: u64,
    /// From begin to end.
    pub duration_ms: u64,
    /// Read from the source.
    pub bytes_read: u64,
    /// Added to the repository.
    pub bytes_stored: u64,
    /// Size of the artifact when restored.
    pub size_bytes: u64,
    /// Files in the artifact.
    pub files: u64,
    /// Entries that could not be read.
    pub unreadable: u64,
    /// Entries of a live tree that went away while it was read.
    pub vanished: u64,
    /// The first of the unreadable entries.
    pub unreadable_names: Vec<String>,
    /// SHA-256 of the artifact's root object.
    pub checksum: String,
    /// `restic:<destination>/<snapshot id>`; empty unless `success`.
    pub artifact_url: String,
    /// When what was stored had been read back; 0: it was not.
    pub verified_at_ms: i64,
    /// Name of the destination.
    pub destination: String,
    /// Size of the whole repository after the run.
    pub repository_bytes: u64,
    /// restic's id of the repository.
    pub repository_id: String,
    /// Last lines of hooks and archiver.
    pub log_tail: String,
    /// The policy in force; 0: none.
    pub policy_id: i64,
    /// Remarks that do not make the run fail.
    pub warnings: Vec<String>,
    /// Runs whose artifacts retention removed.
    pub expired_runs: Vec<String>,
}

impl RunRecord {
    /// A run that has just been asked for.
    pub fn queued(run_uid: String, directive_id: String, service: String, kind: RunKind, started_at_ms: i64) -> Self {
        Self {
            run_uid,
            directive_id,
            service,
            kind,
            scope: Scope::Volume,
            job_type: "backup".to_owned(),
            status: RunStatus::Queued,
            phase: None,
            error_class: None,
            error_message: String::new(),
            started_at_ms,
            finished_at_ms: 0,
            consistency_requested: Consistency::None,
            consistency_achieved: Consistency::None,
            freeze_ms: 0,
            duration_ms: 0,
            bytes_read: 0,
            bytes_stored: 0,
            size_bytes: 0,
            files: 0,
            unreadable: 0,
            vanished: 0,
            unreadable_names: Vec::new(),
            checksum: String::new(),
            artifact_url: String::new(),
            verified_at_ms: 0,
            destination: String::new(),
            repository_bytes: 0,
            repository_id: String::new(),
            log_tail: String::new(),
            policy_id: 0,
            warnings: Vec::new(),
            expired_runs: Vec::new(),
        }
    }

    /// Ends the run as failed.
    pub fn fail(&mut self, class: ErrorClass, message: impl Into<String>, now_ms: i64) {
        self.status = RunStatus::Failed;
        self.error_class = Some(class);
        self.error_message = message.into();
        self.artifact_url.clear();
        self.checksum.clear();
        self.verified_at_ms = 0;
        self.end(now_ms);
    }

    /// Writes down when it ended.
    pub fn end(&mut self, now_ms: i64) {
        self.finished_at_ms = now_ms;
        self.duration_ms = now_ms.saturating_sub(self.started_at_ms).max(0).unsigned_abs();
    }

    /// Id of the artifact in its repository, if there is one.
    pub fn snapshot_id(&self) -> Option<&str> {
        let (_, id) = self.artifact_url.rsplit_once('/')?;
        (self.status == RunStatus::Success).then_some(id)
    }

    fn to_wire(&self) -> v1::Run {
        v1::Run {
            run_uid: self.run_uid.clone(),
            directive_id: self.directive_id.clone(),
            service: self.service.clone(),
            kind: self.kind.to_string(),
            scope: self.scope.to_string(),
            job_type: self.job_type.clone(),
            status: self.status.to_string(),
            phase: self.phase.map(|p| p.to_string()).unwrap_or_default(),
            error_class: self.error_class.map(|c| c.to_string()).unwrap_or_default(),
            error_message: self.error_message.clone(),
            started_at_ms: self.started_at_ms,
            finished_at_ms: self.finished_at_ms,
            consistency_requested: self.consistency_requested.to_string(),
            consistency_achieved: self.consistency_achieved.to_string(),
            freeze_ms: self.freeze_ms,
            duration_ms: self.duration_ms,
            bytes_read: self.bytes_read,
            bytes_stored: self.bytes_stored,
            size_bytes: self.size_bytes,
            files: self.files,
            unreadable: self.unreadable,
            vanished: self.vanished,
            unreadable_names: self.unreadable_names.clone(),
            checksum: self.checksum.clone(),
            artifact_url: self.artifact_url.clone(),
            verified_at_ms: self.verified_at_ms,
            destination: self.destination.clone(),
            repository_bytes: self.repository_bytes,
            repository_id: self.repository_id.clone(),
            log_tail: self.log_tail.clone(),
            policy_id: self.policy_id,
            warnings: self.warnings.clone(),
            expired_runs: self.expired_runs.clone(),
        }
    }
}

impl Report {
    /// The bytes for the outbox.
    pub fn encode(&self, recorded_at_ms: i64) -> Vec<u8> {
        use v1::report::Body;
        let body = match self {
            Self::Run(record) => Body::Run(record.to_wire()),
            Self::DirectiveOutcome { directive_id, refusal } => {
                let (code, message) = refusal.clone().unwrap_or_default();
                Body::DirectiveOutcome(v1::DirectiveOutcome {
                    directive_id: directive_id.clone(),
                    accepted: refusal.is_none(),
                    code,
                    message,
                })
            }
            Self::Usage(usage) => Body::Usage(v1::Usage {
                hour_start_ms: usage.hour_start_ms,
                observed_seconds: usage.observed_seconds,
                cpu_core_seconds: usage.cpu_core_seconds,
                memory_byte_seconds: usage.memory_byte_seconds,
                disk_used_bytes: usage.disk_used_bytes,
                network_sent_bytes: usage.network_sent_bytes,
            }),
            Self::RepositoryKey(key) => Body::RepositoryKey(v1::RepositoryKey {
                repository_id: key.repository_id.clone(),
                destination: key.destination.clone(),
                key: Some(match &key.key {
                    EscrowedKey::Wrapped(bytes) => v1::repository_key::Key::Wrapped(bytes.clone()),
                    EscrowedKey::Open(password) => v1::repository_key::Key::Open(password.clone()),
                }),
            }),
        };
        v1::Report { recorded_at_ms, body: Some(body) }.encode_to_vec()
    }

    /// The mark of the repository's key that a report of the outbox carries; `None` when it carries none.
    pub fn key_mark(encoded: &[u8]) -> Option<String> {
        let v1::report::Body::RepositoryKey(key) = v1::Report::decode(encoded).ok()?.body? else { return None };
        Some(match key.key? {
            v1::repository_key::Key::Wrapped(bytes) => EscrowedKey::Wrapped(bytes).mark(),
            v1::repository_key::Key::Open(password) => EscrowedKey::Open(password).mark(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_run_offers_no_artifact() {
        let mut run = RunRecord::queued("u".into(), String::new(), "docs".into(), RunKind::Manual, 1_000);
        run.artifact_url = "restic:local/abc".into();
        run.status = RunStatus::Success;
        assert_eq!(run.snapshot_id(), Some("abc"));
        run.fail(ErrorClass::VerifyFailed, "it differs", 3_500);
        assert_eq!((run.snapshot_id(), run.duration_ms), (None, 2_500));
    }
}
