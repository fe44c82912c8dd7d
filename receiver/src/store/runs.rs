//! Runs: one row an execution, whoever asked for it.
//!
//! A run asked for by the centre begins as a row without `run_uid`; the agent's first report binds it.

use hestner_proto::words::{ErrorClass, RunKind, RunStatus};
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::{During as _, Error, Result, Store, Tx};
use crate::model::run::{ReportedRun, Run, RunDetails, next_step, shown};
use crate::model::{ServerId, times};

/// What the merge rule needs of a stored run.
#[derive(Clone, Debug)]
pub struct StoredRun {
    /// The row.
    pub id: i64,
    /// Where it stands.
    pub status: RunStatus,
    /// Why it failed, if it did.
    pub error_class: String,
    /// The agent's id of it.
    pub run_uid: Option<String>,
}

/// What a listing of runs is narrowed to.
#[derive(Clone, Debug, Default)]
pub struct RunFilter {
    /// Of this service only.
    pub service: Option<String>,
    /// In this status only.
    pub status: Option<String>,
    /// Older than this row only.
    pub before: Option<i64>,
    /// At most so many.
    pub limit: i64,
}

fn list(row: &SqliteRow, column: &str) -> Vec<String> {
    serde_json::from_str(row.get::<&str, _>(column)).unwrap_or_default()
}

fn run(row: &SqliteRow) -> Run {
    let error_class: String = row.get("error_class");
    Run {
        id: row.get("id"),
        run_uid: row.get("run_uid"),
        server_id: row.get("server_id"),
        service: row.get("service"),
        directive_id: row.get("directive_id"),
        policy_id: row.get("policy_id"),
        kind: row.get("kind"),
        scope: row.get("scope"),
        job_type: row.get("job_type"),
        status: row.get("status"),
        phase: row.get("phase"),
        next_step: next_step(&error_class),
        error_class,
        error_message: row.get("error_message"),
        queued_at: shown(row.get("queued_at_ms")),
        started_at: shown(row.get("started_at_ms")),
        finished_at: shown(row.get("finished_at_ms")),
        received_at: times::rfc3339(row.get("received_at_ms")),
        consistency_requested: row.get("consistency_requested"),
        consistency_achieved: row.get("consistency_achieved"),
        freeze_ms: row.get("freeze_ms"),
        duration_ms: row.get("duration_ms"),
        bytes_read: row.get("bytes_read"),
        bytes_stored: row.get("bytes_stored"),
        size_bytes: row.get("size_bytes"),
        files: row.get("files"),
        unreadable: row.get("unreadable"),
        vanished: row.get("vanished"),
        checksum: row.get("checksum"),
        artifact_url: row.get("artifact_url"),
        verified_at: shown(row.get("verified_at_ms")),
        destination: row.get("destination"),
        repository_bytes: row.get("repository_bytes"),
        repository_id: row.get("repository_id"),
        expired_at: shown(row.get("expired_at_ms")),
        progress: None,
        details: None,
    }
}

fn whole_run(row: &SqliteRow) -> Run {
    let details = RunDetails {
        unreadable_names: list(row, "unreadable_names_json"),
        log_tail: row.get("log_tail"),
        warnings: list(row, "warnings_json"),
    };
    Run { details: Some(details), ..run(row) }
}

fn stored(row: &SqliteRow) -> Result<StoredRun> {
    let status: &str = row.get("status");
    let status = status.parse().map_err(|_| Error::Unreadable { what: "run status", text: status.to_owned() })?;
    Ok(StoredRun { id: row.get("id"), status, error_class: row.get("error_class"), run_uid: row.get("run_uid") })
}

impl Tx {
    /// Adds a run that the centre asks for.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn add_queued_run(
        &mut self,
        server: ServerId,
        service: &str,
        directive_id: &str,
        now_ms: i64,
    ) -> Result<i64> {
        sqlx::query_scalar(
            "INSERT INTO snapshot_runs (server_id, directive_id, service, kind, status, queued_at_ms, received_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6) RETURNING id",
        )
        .bind(server.0)
        .bind(directive_id)
        .bind(service)
        .bind(RunKind::Manual.as_str())
        .bind(RunStatus::Queued.as_str())
        .bind(now_ms)
        .fetch_one(self.connection())
        .await
        .during("queue a run")
    }

    /// The server's run of that id.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn run_by_uid(&mut self, server: ServerId, run_uid: &str) -> Result<Option<StoredRun>> {
        let row = sqlx::query("SELECT * FROM snapshot_runs WHERE server_id = ?1 AND run_uid = ?2")
            .bind(server.0)
            .bind(run_uid)
            .fetch_optional(self.connection())
            .await
            .during("read a run")?;
        row.as_ref().map(stored).transpose()
    }

    /// The server's run that answers a directive.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn run_by_directive(&mut self, server: ServerId, directive_id: &str) -> Result<Option<StoredRun>> {
        let row = sqlx::query("SELECT * FROM snapshot_runs WHERE server_id = ?1 AND directive_id = ?2")
            .bind(server.0)
            .bind(directive_id)
            .fetch_optional(self.connection())
            .await
            .during("read a run by its directive")?;
        row.as_ref().map(stored).transpose()
    }

    /// Adds an empty row for a run that only the host knew of.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn add_reported_run(&mut self, server: ServerId, reported: &ReportedRun, now_ms: i64) -> Result<i64> {
        sqlx::query_scalar(
            "INSERT INTO snapshot_runs (server_id, run_uid, service, kind, status, received_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6) RETURNING id",
        )
        .bind(server.0)
        .bind(&reported.run_uid)
        .bind(&reported.run.service)
        .bind(&reported.run.kind)
        .bind(reported.status.as_str())
        .bind(now_ms)
        .fetch_one(self.connection())
        .await
        .during("add a run")
    }

    /// Writes a report over a run's row.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn write_run(&mut self, id: i64, reported: &ReportedRun, now_ms: i64) -> Result<()> {
        let (r, details) = (&reported.run, &reported.details);
        let time = |ms: i64| Some(ms).filter(|ms| *ms > 0);
        sqlx::query(
            "UPDATE snapshot_runs SET run_uid = ?2, policy_id = ?3, service = ?4, kind = ?5, scope = ?6, job_type = ?7,
                 status = ?8, phase = ?9, error_class = ?10, error_message = ?11, started_at_ms = ?12,
                 finished_at_ms = ?13, received_at_ms = ?14, consistency_requested = ?15, consistency_achieved = ?16,
                 freeze_ms = ?17, duration_ms = ?18, bytes_read = ?19, bytes_stored = ?20, size_bytes = ?21,
                 files = ?22, unreadable = ?23, vanished = ?24, unreadable_names_json = ?25, checksum = ?26,
                 artifact_url = ?27, verified_at_ms = ?28, destination = ?29, repository_bytes = ?30,
                 repository_id = ?31, log_tail = ?32, warnings_json = ?33
             WHERE id = ?1",
        )
        .bind(id)
        .bind(&reported.run_uid)
        .bind(r.policy_id)
        .bind(&r.service)
        .bind(&r.kind)
        .bind(&r.scope)
        .bind(&r.job_type)
        .bind(reported.status.as_str())
        .bind(&r.phase)
        .bind(&r.error_class)
        .bind(&r.error_message)
        .bind(time(reported.started_at_ms))
        .bind(time(reported.finished_at_ms))
        .bind(now_ms)
        .bind(&r.consistency_requested)
        .bind(&r.consistency_achieved)
        .bind(r.freeze_ms)
        .bind(r.duration_ms)
        .bind(r.bytes_read)
        .bind(r.bytes_stored)
        .bind(r.size_bytes)
        .bind(r.files)
        .bind(r.unreadable)
        .bind(r.vanished)
        .bind(serde_json::Value::from(details.unreadable_names.clone()).to_string())
        .bind(&r.checksum)
        .bind(&r.artifact_url)
        .bind(time(reported.verified_at_ms))
        .bind(&r.destination)
        .bind(r.repository_bytes)
        .bind(&r.repository_id)
        .bind(&details.log_tail)
        .bind(serde_json::Value::from(details.warnings.clone()).to_string())
        .execute(self.connection())
        .await
        .during("write a run")?;
        Ok(())
    }

    /// Ends a queued run that never became one on the host.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn fail_queued_run(
        &mut self,
        directive_id: &str,
        error_class: &str,
        message: &str,
        now_ms: i64,
    ) -> Result<()> {
        sqlx::query(
            "UPDATE snapshot_runs SET status = 'failed', error_class = ?2, error_message = ?3, finished_at_ms = ?4,
                 received_at_ms = ?4
             WHERE directive_id = ?1 AND status = 'queued'",
        )
        .bind(directive_id)
        .bind(error_class)
        .bind(message)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("end a queued run")?;
        Ok(())
    }

    /// Ends what a server's former agent had taken and will never report. A queued run whose directive is still open
    /// is left to the new agent.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn interrupt_runs(&mut self, server: ServerId, now_ms: i64) -> Result<()> {
        sqlx::query(
            "UPDATE snapshot_runs SET status = 'failed', error_class = ?2, finished_at_ms = ?3, received_at_ms = ?3,
                 error_message = 'the server was enrolled anew before its former agent reported how the run ended'
             WHERE server_id = ?1 AND status IN ('queued', 'running')
               AND NOT (status = 'queued' AND directive_id IN
                   (SELECT id FROM directives WHERE server_id = ?1 AND answered_at_ms IS NULL))",
        )
        .bind(server.0)
        .bind(ErrorClass::Interrupted.as_str())
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("end the runs of a former agent")?;
        Ok(())
    }

    /// Notes that retention removed a run's artifact on the host.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn expire_run(&mut self, server: ServerId, run_uid: &str, now_ms: i64) -> Result<()> {
        sqlx::query(
            "UPDATE snapshot_runs SET expired_at_ms = ?3 WHERE server_id = ?1 AND run_uid = ?2 AND expired_at_ms IS NULL",
        )
        .bind(server.0)
        .bind(run_uid)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("note an expired run")?;
        Ok(())
    }

    /// The run that an idempotency key not older than `since_ms` stands for, with the hash of its request's body.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn run_of_key(&mut self, server: ServerId, key: &str, since_ms: i64) -> Result<Option<(i64, String)>> {
        let row = sqlx::query(
            "SELECT run_id, body_sha256 FROM idempotency_keys WHERE server_id = ?1 AND key = ?2 AND created_at_ms >= ?3",
        )
        .bind(server.0)
        .bind(key)
        .bind(since_ms)
        .fetch_optional(self.connection())
        .await
        .during("read an idempotency key")?;
        Ok(row.map(|row| (row.get(0), row.get(1))))
    }

    /// Notes an idempotency key, and forgets those older than `keep_ms`.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn keep_key(
        &mut self,
        server: ServerId,
        key: &str,
        body_sha256: &str,
        run_id: i64,
        now_ms: i64,
        keep_ms: i64,
    ) -> Result<()> {
        sqlx::query("DELETE FROM idempotency_keys WHERE server_id = ?1 AND created_at_ms < ?2")
            .bind(server.0)
            .bind(now_ms - keep_ms)
            .execute(self.connection())
            .await
            .during("forget idempotency keys")?;
        sqlx::query("INSERT INTO idempotency_keys (server_id, key, body_sha256, run_id, created_at_ms) VALUES (?1, ?2, ?3, ?4, ?5)")
            .bind(server.0)
            .bind(key)
            .bind(body_sha256)
            .bind(run_id)
            .bind(now_ms)
            .execute(self.connection())
            .await
            .during("note an idempotency key")?;
        Ok(())
    }

    /// A run by its row, inside this transaction.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn run(&mut self, server: ServerId, id: i64) -> Result<Option<Run>> {
        let row = sqlx::query("SELECT * FROM snapshot_runs WHERE server_id = ?1 AND id = ?2")
            .bind(server.0)
            .bind(id)
            .fetch_optional(self.connection())
            .await
            .during("read a run")?;
        Ok(row.as_ref().map(whole_run))
    }
}

impl Store {
    /// A server's runs, newest first, without their details: those of 500 runs would be tens of megabytes.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn runs(&self, server: ServerId, filter: &RunFilter) -> Result<Vec<Run>> {
        let rows = sqlx::query(
            "SELECT id, run_uid, server_id, service, directive_id, policy_id, kind, scope, job_type, status, phase,
                 error_class, error_message, queued_at_ms, started_at_ms, finished_at_ms, received_at_ms,
                 consistency_requested, consistency_achieved, freeze_ms, duration_ms, bytes_read, bytes_stored,
                 size_bytes, files, unreadable, vanished, checksum, artifact_url, verified_at_ms, destination,
                 repository_bytes, repository_id, expired_at_ms
             FROM snapshot_runs
             WHERE server_id = ?1 AND (?2 IS NULL OR service = ?2) AND (?3 IS NULL OR status = ?3)
               AND (?4 IS NULL OR id < ?4)
             ORDER BY id DESC LIMIT ?5",
        )
        .bind(server.0)
        .bind(&filter.service)
        .bind(&filter.status)
        .bind(filter.before)
        .bind(filter.limit)
        .fetch_all(&self.readers)
        .await
        .during("list runs")?;
        Ok(rows.iter().map(run).collect())
    }

    /// A server's run by its row or, for a reference that is no number, by `run_uid`: a host that gives its runs
    /// numbers for ids must not be able to hide another one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn run(&self, server: ServerId, reference: &str) -> Result<Option<Run>> {
        let row = sqlx::query(
            "SELECT * FROM snapshot_runs WHERE server_id = ?1 AND (id = ?3 OR (?3 IS NULL AND run_uid = ?2))",
        )
        .bind(server.0)
        .bind(reference)
        .bind(reference.parse::<i64>().ok())
        .fetch_optional(&self.readers)
        .await
        .during("read a run")?;
        Ok(row.as_ref().map(whole_run))
    }

    /// How many runs stand where, over all companies.
    ///
    /// # Errors
    /// When they cannot be counted.
    pub async fn runs_by_status(&self) -> Result<Vec<(String, i64)>> {
        let rows = sqlx::query("SELECT status, count(*) FROM snapshot_runs GROUP BY status")
            .fetch_all(&self.readers)
            .await
            .during("count runs")?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }
}

/// The class of a run whose directive expired before the host took it.
pub const EXPIRED_CLASS: ErrorClass = ErrorClass::Cancelled;
