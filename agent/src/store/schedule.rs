//! When each service's schedule last came due, so that a restart neither repeats nor forgets a time.

use rusqlite::{OptionalExtension as _, params};

use super::{Store, StoreError, failed};

impl Store {
    /// The last due time that was acted upon, in milliseconds since the epoch.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn last_due(&self, service: String) -> Result<Option<i64>, StoreError> {
        self.call(move |connection| {
            let sql = "SELECT last_due_ms FROM schedule WHERE service = ?1";
            connection.query_row(sql, [service], |row| row.get(0)).optional().map_err(failed("read the schedule"))
        })
        .await
    }

    /// Writes down that a due time was acted upon. Called before the run is started: a crash in between
    /// leaves a missed run, which is reported, and never a doubled one.
    ///
    /// # Errors
    /// When the disk has no room.
    pub async fn set_last_due(&self, service: String, due_ms: i64) -> Result<(), StoreError> {
        self.call(move |connection| {
            let sql = "INSERT INTO schedule (service, last_due_ms) VALUES (?1, ?2)
                       ON CONFLICT (service) DO UPDATE SET last_due_ms = max(last_due_ms, excluded.last_due_ms)";
            connection.execute(sql, params![service, due_ms]).map(drop).map_err(failed("write the schedule"))
        })
        .await
    }

    /// Forgets a due time: a clock that was wrong wrote it.
    ///
    /// # Errors
    /// When the disk has no room.
    pub async fn forget_last_due(&self, service: String) -> Result<(), StoreError> {
        self.call(move |connection| {
            let sql = "DELETE FROM schedule WHERE service = ?1";
            connection.execute(sql, [service]).map(drop).map_err(failed("write the schedule"))
        })
        .await
    }
}
