//! Directives of the centre: remembered, so that each is done once however often it is delivered.

use rusqlite::params;

use super::{Store, StoreError, failed, outbox};

/// A directive is remembered for so long at most, however late it says that it expires.
const REMEMBERED_MS_MAX: i64 = 60 * 24 * 3600 * 1000;

/// What became of a directive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Whether it was done or begun.
    pub accepted: bool,
    /// Stable code of the refusal; empty when accepted.
    pub code: String,
    /// The refusal as a sentence.
    pub message: String,
}

impl Store {
    /// Remembers a directive. False: it was concluded before. One that was remembered but not concluded is
    /// taken up again.
    ///
    /// # Errors
    /// When the disk has no room; the directive then counts as not delivered.
    pub async fn remember(
        &self,
        directive_id: String,
        received_at_ms: i64,
        expires_at_ms: i64,
    ) -> Result<bool, StoreError> {
        let expires_at_ms = expires_at_ms.min(received_at_ms.saturating_add(REMEMBERED_MS_MAX));
        self.call(move |connection| {
            let sql = "INSERT OR IGNORE INTO inbox (directive_id, received_at_ms, expires_at_ms) VALUES (?1, ?2, ?3)";
            let inserted = connection.execute(sql, params![directive_id, received_at_ms, expires_at_ms]);
            inserted.map_err(failed("remember a directive"))?;
            let sql = "SELECT accepted IS NULL FROM inbox WHERE directive_id = ?1";
            connection.query_row(sql, [directive_id], |row| row.get(0)).map_err(failed("remember a directive"))
        })
        .await
    }

    /// Writes down what became of a directive, with the report of it.
    ///
    /// # Errors
    /// When the disk has no room.
    pub async fn conclude(&self, directive_id: String, outcome: Outcome, report: Vec<u8>) -> Result<(), StoreError> {
        self.call(move |connection| {
            let transaction = connection.transaction().map_err(failed("conclude a directive"))?;
            let sql =
                "UPDATE inbox SET accepted = ?2, code = ?3, message = ?4 WHERE directive_id = ?1 AND accepted IS NULL";
            let changed =
                transaction.execute(sql, params![directive_id, outcome.accepted, outcome.code, outcome.message]);
            if changed.map_err(failed("conclude a directive"))? == 1 {
                outbox::append(&transaction, &report)?;
            }
            transaction.commit().map_err(failed("conclude a directive"))
        })
        .await
    }

    /// Forgets directives that expired before `before_ms`: none of them can be delivered again.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub async fn forget_expired(&self, before_ms: i64) -> Result<usize, StoreError> {
        self.call(move |connection| {
            let deleted = connection.execute("DELETE FROM inbox WHERE expires_at_ms < ?1", [before_ms]);
            deleted.map_err(failed("tidy the inbox"))
        })
        .await
    }
}
