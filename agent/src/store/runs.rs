//! The list of runs: what people see, and what a restart has to bring to an end.

use rusqlite::{OptionalExtension as _, Row, params};

use super::waits::{self, Wait};
use super::{Store, StoreError, failed, outbox};

/// How many ended runs are kept for `hestner-agent runs`; the receiver keeps them all.
const RUNS_KEPT: u32 = 1_000;

/// A run, its record as the caller's own text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunRow {
    /// Its id.
    pub run_uid: String,
    /// Its service.
    pub service: String,
    /// What the caller knows of it.
    pub record: String,
}

/// Whether a run had already been brought to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfinished {
    /// It was unfinished and is finished now.
    WasUnfinished,
    /// It was finished before, and nothing was changed or reported.
    WasFinished,
}

impl Store {
    /// Begins a run: its row, the report of it and, if a directive asked for it, that directive's
    /// acceptance; and that it waits for a person, if it does.
    ///
    /// # Errors
    /// When the outbox or the disk has no room; the run must then not be started.
    pub async fn begin_run(
        &self,
        run: RunRow,
        report: Vec<u8>,
        directive_id: Option<String>,
        wait: Option<Wait>,
    ) -> Result<(), StoreError> {
        self.call(move |connection| {
            let transaction = connection.transaction().map_err(failed("begin a run"))?;
            let sql = "INSERT INTO runs (run_uid, service, record) VALUES (?1, ?2, ?3)";
            transaction.execute(sql, params![run.run_uid, run.service, run.record]).map_err(failed("begin a run"))?;
            outbox::append(&transaction, &report)?;
            if let Some(id) = directive_id {
                let sql = "UPDATE inbox SET accepted = 1 WHERE directive_id = ?1";
                transaction.execute(sql, [id]).map_err(failed("begin a run"))?;
            }
            if let Some(wait) = wait {
                waits::begin(&transaction, &run.run_uid, &wait)?;
            }
            transaction.commit().map_err(failed("begin a run"))
        })
        .await
    }

    /// Ends a run, once: its record and the report of it.
    ///
    /// # Errors
    /// When the disk has no room; the caller tries again.
    pub async fn finish_run(&self, run_uid: String, record: String, report: Vec<u8>) -> Result<Unfinished, StoreError> {
        self.call(move |connection| {
            let transaction = connection.transaction().map_err(failed("end a run"))?;
            let sql = "UPDATE runs SET finished = 1, record = ?2 WHERE run_uid = ?1 AND finished = 0";
            if transaction.execute(sql, params![run_uid, record]).map_err(failed("end a run"))? == 0 {
                return Ok(Unfinished::WasFinished);
            }
            outbox::append(&transaction, &report)?;
            waits::end(&transaction, &run_uid)?;
            let sql = "DELETE FROM runs WHERE finished = 1 AND id <= (SELECT max(id) FROM runs) - ?1";
            transaction.execute(sql, [RUNS_KEPT]).map_err(failed("end a run"))?;
            transaction.commit().map_err(failed("end a run"))?;
            Ok(Unfinished::WasUnfinished)
        })
        .await
    }

    /// Runs that were begun and not ended, oldest first; those that wait for a person are not among them.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn unfinished_runs(&self) -> Result<Vec<RunRow>, StoreError> {
        let sql = "SELECT run_uid, service, record FROM runs
             WHERE finished = 0 AND run_uid NOT IN (SELECT run_uid FROM waits) ORDER BY id LIMIT ?1";
        self.list_runs(sql, u32::MAX).await
    }

    /// The newest runs, newest first.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn newest_runs(&self, limit: u32) -> Result<Vec<RunRow>, StoreError> {
        self.list_runs("SELECT run_uid, service, record FROM runs ORDER BY id DESC LIMIT ?1", limit).await
    }

    /// One run.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn run(&self, run_uid: String) -> Result<Option<RunRow>, StoreError> {
        self.call(move |connection| {
            let sql = "SELECT run_uid, service, record FROM runs WHERE run_uid = ?1";
            connection.query_row(sql, [run_uid], read_row).optional().map_err(failed("read a run"))
        })
        .await
    }

    async fn list_runs(&self, sql: &'static str, limit: u32) -> Result<Vec<RunRow>, StoreError> {
        self.call(move |connection| {
            let read = || -> rusqlite::Result<Vec<RunRow>> {
                connection.prepare_cached(sql)?.query_map([limit], read_row)?.collect()
            };
            read().map_err(failed("read the runs"))
        })
        .await
    }
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<RunRow> {
    Ok(RunRow { run_uid: row.get(0)?, service: row.get(1)?, record: row.get(2)? })
}
