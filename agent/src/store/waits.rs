//! Runs that wait until a person on the host has confirmed them.
//!
//! Kept apart from the list of runs: a wait outlives a restart of the daemon, and a run that waits has begun
//! nothing that a restart would have to bring to an end.

use rusqlite::{Transaction, params};

use super::{Store, StoreError, failed};

/// A wait that begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wait {
    /// What the run shall do.
    pub verb: String,
    /// Since when, in milliseconds since the epoch.
    pub since_ms: i64,
    /// Until when, in milliseconds since the epoch.
    pub expires_at_ms: i64,
}

/// A run that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitRow {
    /// The run.
    pub run_uid: String,
    /// What the caller knows of it.
    pub record: String,
    /// What it waits for.
    pub wait: Wait,
    /// It was confirmed, and has not begun yet.
    pub confirmed: bool,
}

pub(super) fn begin(transaction: &Transaction<'_>, run_uid: &str, wait: &Wait) -> Result<(), StoreError> {
    let sql = "INSERT INTO waits (run_uid, verb, since_ms, expires_at_ms) VALUES (?1, ?2, ?3, ?4)";
    let Wait { verb, since_ms, expires_at_ms } = wait;
    transaction.execute(sql, params![run_uid, verb, since_ms, expires_at_ms]).map_err(failed("begin a wait"))?;
    Ok(())
}

pub(super) fn end(transaction: &Transaction<'_>, run_uid: &str) -> Result<(), StoreError> {
    transaction.execute("DELETE FROM waits WHERE run_uid = ?1", [run_uid]).map_err(failed("end a wait"))?;
    Ok(())
}

impl Store {
    /// Runs that wait, oldest first.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn waits(&self) -> Result<Vec<WaitRow>, StoreError> {
        self.call(|connection| {
            let sql = "SELECT run_uid, record, verb, since_ms, expires_at_ms, confirmed
                 FROM waits JOIN runs USING (run_uid) WHERE finished = 0 ORDER BY id";
            let read = || -> rusqlite::Result<Vec<WaitRow>> {
                let row = |row: &rusqlite::Row<'_>| {
                    let wait = Wait { verb: row.get(2)?, since_ms: row.get(3)?, expires_at_ms: row.get(4)? };
                    Ok(WaitRow { run_uid: row.get(0)?, record: row.get(1)?, wait, confirmed: row.get(5)? })
                };
                connection.prepare_cached(sql)?.query_map([], row)?.collect()
            };
            read().map_err(failed("read what waits"))
        })
        .await
    }

    /// Writes down that a run was confirmed, so that a restart does not ask again.
    ///
    /// # Errors
    /// When the disk has no room.
    pub async fn confirm_wait(&self, run_uid: String) -> Result<(), StoreError> {
        self.call(move |connection| {
            let sql = "UPDATE waits SET confirmed = 1 WHERE run_uid = ?1";
            connection.execute(sql, [run_uid]).map(drop).map_err(failed("confirm a run"))
        })
        .await
    }

    /// Writes down that a run waits no more and is about to begin.
    ///
    /// # Errors
    /// When the disk has no room.
    pub async fn end_wait(&self, run_uid: String) -> Result<(), StoreError> {
        self.call(move |connection| {
            let sql = "DELETE FROM waits WHERE run_uid = ?1";
            connection.execute(sql, [run_uid]).map(drop).map_err(failed("end a wait"))
        })
        .await
    }
}
