//! A run as the receiver keeps and shows it, and the rule that decides which report may change it.
//!
//! In: what an agent reported. Out: a [`Run`] with every number and text bounded. A finished run is never
//! changed by a later or repeated report, so order and repetition of reports cannot matter.

use std::collections::BTreeSet;

use hestner_proto::v1;
use hestner_proto::words::{ErrorClass, RunStatus};
use serde::Serialize;
use utoipa::ToSchema;

use super::times;

/// Longest id of a run, in bytes.
pub const RUN_UID_BYTES_MAX: usize = 64;
/// Most runs that one report may declare expired.
pub const EXPIRED_RUNS_MAX: usize = 10_000;
/// An agent keeps half of this.
const LOG_TAIL_BYTES_MAX: usize = 16 * 1024;
const TEXT_BYTES_MAX: usize = 4 * 1024;
const LIST_ITEMS_MAX: usize = 100;
/// All texts of a list together.
const LIST_BYTES_MAX: usize = 16 * 1024;

/// One execution.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Run {
    /// The receiver's row.
    pub id: i64,
    /// The agent's id of the run; none while it is queued.
    pub run_uid: Option<String>,
    /// The server.
    pub server_id: i64,
    /// The service.
    pub service: String,
    /// The directive that asked for it; none for cron runs and those asked for on the host.
    pub directive_id: Option<String>,
    /// The policy in force.
    pub policy_id: Option<i64>,
    /// `manual` or `cron`.
    pub kind: String,
    /// `volume`, `db` or `full`; empty while queued.
    pub scope: String,
    /// `backup` or `snapshot`; empty while queued.
    pub job_type: String,
    /// `queued`, `running`, `success` or `failed`.
    pub status: String,
    /// Last phase reached.
    pub phase: String,
    /// Why it failed: a stable code; empty otherwise.
    pub error_class: String,
    /// Why it failed, in words.
    pub error_message: String,
    /// What to do about it; empty unless it failed.
    pub next_step: String,
    /// When the centre asked for it, RFC 3339.
    pub queued_at: Option<String>,
    /// When it began, by the host's clock, RFC 3339.
    pub started_at: Option<String>,
    /// When it ended, by the host's clock, RFC 3339.
    pub finished_at: Option<String>,
    /// When the receiver last heard of it, RFC 3339.
    pub received_at: String,
    /// Least consistency asked for.
    pub consistency_requested: String,
    /// Consistency reached.
    pub consistency_achieved: String,
    /// How long the service was frozen, milliseconds.
    pub freeze_ms: i64,
    /// How long it took, milliseconds.
    pub duration_ms: i64,
    /// Bytes read from the source.
    pub bytes_read: i64,
    /// Bytes added to the repository.
    pub bytes_stored: i64,
    /// Size of the artifact when restored, bytes.
    pub size_bytes: i64,
    /// Files in the artifact.
    pub files: i64,
    /// Entries that could not be read.
    pub unreadable: i64,
    /// Entries that vanished while they were read.
    pub vanished: i64,
    /// SHA-256 of the artifact's root object.
    pub checksum: String,
    /// Where the artifact lies.
    pub artifact_url: String,
    /// When it was read back, RFC 3339.
    pub verified_at: Option<String>,
    /// The destination's name.
    pub destination: String,
    /// Size of the repository after the run, bytes.
    pub repository_bytes: i64,
    /// The repository.
    pub repository_id: String,
    /// When retention removed its artifact, RFC 3339.
    pub expired_at: Option<String>,
    /// How far a running run is; from memory, so it may be missing.
    pub progress: Option<Progress>,
    /// Only where one run is shown.
    #[serde(flatten)]
    #[schema(value_type = RunDetails)]
    pub details: Option<RunDetails>,
}

/// The long texts of a run, each at most 16 KiB. Listings leave them out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct RunDetails {
    /// The first of the unreadable entries.
    #[schema(required = false)]
    pub unreadable_names: Vec<String>,
    /// Last lines of hooks and archiver.
    #[schema(required = false)]
    pub log_tail: String,
    /// Remarks that did not make it fail.
    #[schema(required = false)]
    pub warnings: Vec<String>,
}

/// How far a running run is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Progress {
    /// The phase.
    pub phase: String,
    /// Bytes read so far.
    pub bytes_done: u64,
    /// Bytes in all; 0 while unknown.
    pub bytes_total: u64,
    /// Files read so far.
    pub files_done: u64,
    /// Files in all; 0 while unknown.
    pub files_total: u64,
    /// Estimate; 0 while unknown.
    pub seconds_remaining: u32,
    /// Smoothed; 0 while unknown.
    pub bytes_per_second: u64,
}

impl From<v1::Progress> for Progress {
    fn from(p: v1::Progress) -> Self {
        Self {
            phase: cut(p.phase, 64),
            bytes_done: p.bytes_done,
            bytes_total: p.bytes_total,
            files_done: p.files_done,
            files_total: p.files_total,
            seconds_remaining: p.seconds_remaining,
            bytes_per_second: p.bytes_per_second,
        }
    }
}

/// A run as an agent reported it, bounded and checked. Times in milliseconds, 0 for none.
#[derive(Clone, Debug, PartialEq)]
pub struct ReportedRun {
    /// What is shown; ids, times and receipt are not filled in.
    pub run: Run,
    /// Where it stands.
    pub status: RunStatus,
    /// Its long texts.
    pub details: RunDetails,
    /// The agent's id of it.
    pub run_uid: String,
    /// The directive it answers.
    pub directive_id: Option<String>,
    /// When it began.
    pub started_at_ms: i64,
    /// When it ended.
    pub finished_at_ms: i64,
    /// When it was read back.
    pub verified_at_ms: i64,
    /// Runs whose artifacts retention removed, each once.
    pub expired_runs: BTreeSet<String>,
}

/// Cuts `text` to at most `bytes_max` bytes at a character's edge.
pub fn cut(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        let mut end = bytes_max;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

/// Keeps the end of `text`: of a log the last lines matter.
fn cut_front(text: String, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text;
    }
    let mut start = text.len() - bytes_max;
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

/// SQLite holds signed numbers; nothing real is larger than its largest.
pub fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The first texts of a list, as many as fit.
fn texts(list: Vec<String>) -> Vec<String> {
    let mut room = LIST_BYTES_MAX;
    let mut kept = Vec::new();
    for text in list.into_iter().take(LIST_ITEMS_MAX) {
        let text = cut(text, TEXT_BYTES_MAX.min(room));
        room -= text.len();
        kept.push(text);
        if room == 0 {
            break;
        }
    }
    kept
}

impl ReportedRun {
    /// Bounds and checks a reported run.
    ///
    /// # Errors
    /// A sentence, when the run has no id or a status this receiver does not know.
    pub fn from_wire(run: v1::Run) -> Result<Self, String> {
        let status: RunStatus = run.status.parse().map_err(|error| format!("run `{}`: {error}", run.run_uid))?;
        if !(1..=RUN_UID_BYTES_MAX).contains(&run.run_uid.len()) {
            return Err(format!("a run without an id, or with one longer than {RUN_UID_BYTES_MAX} bytes"));
        }
        if run.expired_runs.len() > EXPIRED_RUNS_MAX {
            return Err(format!("run `{}`: more than {EXPIRED_RUNS_MAX} expired runs", run.run_uid));
        }
        let (started_at_ms, finished_at_ms) = (run.started_at_ms.max(0), run.finished_at_ms.max(0));
        let verified_at_ms = run.verified_at_ms.max(0);
        // Only the last word on a finished run counts, so a running one carries no error.
        let failed = status == RunStatus::Failed;
        Ok(Self {
            status,
            run_uid: run.run_uid,
            directive_id: Some(run.directive_id).filter(|id| !id.is_empty()),
            started_at_ms,
            finished_at_ms,
            verified_at_ms,
            expired_runs: run.expired_runs.into_iter().filter(|uid| uid.len() <= RUN_UID_BYTES_MAX).collect(),
            details: RunDetails {
                unreadable_names: texts(run.unreadable_names),
                log_tail: cut_front(run.log_tail, LOG_TAIL_BYTES_MAX),
                warnings: texts(run.warnings),
            },
            run: Run {
                service: cut(run.service, 256),
                policy_id: Some(run.policy_id).filter(|id| *id != 0),
                kind: cut(run.kind, 32),
                scope: cut(run.scope, 32),
                job_type: cut(run.job_type, 32),
                status: status.to_string(),
                phase: cut(run.phase, 32),
                error_class: if failed { cut(run.error_class, 64) } else { String::new() },
                error_message: if failed { cut(run.error_message, TEXT_BYTES_MAX) } else { String::new() },
                consistency_requested: cut(run.consistency_requested, 32),
                consistency_achieved: cut(run.consistency_achieved, 32),
                freeze_ms: number(run.freeze_ms),
                duration_ms: number(run.duration_ms),
                bytes_read: number(run.bytes_read),
                bytes_stored: number(run.bytes_stored),
                size_bytes: number(run.size_bytes),
                files: number(run.files),
                unreadable: number(run.unreadable),
                vanished: number(run.vanished),
                checksum: cut(run.checksum, 128),
                artifact_url: cut(run.artifact_url, TEXT_BYTES_MAX),
                destination: cut(run.destination, 256),
                repository_bytes: number(run.repository_bytes),
                repository_id: cut(run.repository_id, 128),
                ..Run::default()
            },
        })
    }
}

/// Whether a report may change what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merge {
    /// The stored run stays as it is.
    Keep,
    /// The report takes its place.
    Replace,
}

/// The rule for a report about a run that is already stored.
pub fn merge(stored: RunStatus, reported: RunStatus) -> Merge {
    match (stored, reported) {
        (RunStatus::Success | RunStatus::Failed, _) | (RunStatus::Running, RunStatus::Queued) => Merge::Keep,
        (RunStatus::Queued | RunStatus::Running, _) => Merge::Replace,
    }
}

/// What a person should do about a failed run; empty for a class this receiver does not know.
pub fn next_step(error_class: &str) -> String {
    error_class.parse::<ErrorClass>().map(|class| class.next_step().to_owned()).unwrap_or_default()
}

/// A time that may be missing, as it is shown.
pub fn shown(ms: Option<i64>) -> Option<String> {
    ms.filter(|ms| *ms > 0).map(times::rfc3339)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_run_is_never_changed() {
        for stored in [RunStatus::Success, RunStatus::Failed] {
            for reported in RunStatus::ALL {
                assert_eq!(merge(stored, *reported), Merge::Keep);
            }
        }
        assert_eq!(merge(RunStatus::Running, RunStatus::Queued), Merge::Keep);
        assert_eq!(merge(RunStatus::Queued, RunStatus::Success), Merge::Replace);
    }

    #[test]
    fn a_report_of_any_size_is_cut_to_its_bounds() {
        let wire = v1::Run {
            run_uid: "u".into(),
            status: "failed".into(),
            log_tail: "é".repeat(LOG_TAIL_BYTES_MAX),
            error_message: "é".repeat(TEXT_BYTES_MAX),
            unreadable_names: vec!["n".into(); 10_000],
            warnings: vec!["é".repeat(TEXT_BYTES_MAX); 10_000],
            size_bytes: u64::MAX,
            started_at_ms: i64::MIN,
            ..v1::Run::default()
        };
        let reported = ReportedRun::from_wire(wire).expect("fine otherwise");
        let RunDetails { unreadable_names, log_tail, warnings } = reported.details;
        assert!(log_tail.len() <= LOG_TAIL_BYTES_MAX && reported.run.error_message.len() <= TEXT_BYTES_MAX);
        assert_eq!(unreadable_names.len(), LIST_ITEMS_MAX);
        assert_eq!(warnings.iter().map(String::len).sum::<usize>(), LIST_BYTES_MAX);
        assert_eq!((reported.run.size_bytes, reported.started_at_ms), (i64::MAX, 0));
    }

    #[test]
    fn more_expired_runs_than_a_host_can_have_are_refused_and_repetitions_count_once() {
        let wire = |expired_runs| v1::Run {
            run_uid: "u".into(),
            status: "success".into(),
            expired_runs,
            ..v1::Run::default()
        };
        assert!(ReportedRun::from_wire(wire(vec![String::new(); EXPIRED_RUNS_MAX + 1])).is_err());
        let reported = ReportedRun::from_wire(wire(vec!["a".into(), "a".into(), "x".repeat(65)])).expect("fine");
        assert_eq!(reported.expired_runs, BTreeSet::from(["a".to_owned()]));
    }

    #[test]
    fn a_status_of_a_newer_agent_is_refused_by_name() {
        let wire = v1::Run { run_uid: "u".into(), status: "paused".into(), ..v1::Run::default() };
        assert!(ReportedRun::from_wire(wire).expect_err("unknown").contains("`paused`"));
    }
}
