//! Repositories' sizes and the append-only cost ledger.
//!
//! With SQLite the single writer is the lock of (server, day): between reading what is booked and booking
//! the rest nobody else can write. PostgreSQL will need `pg_advisory_xact_lock` or `SELECT .. FOR UPDATE`.

use rust_decimal::Decimal;
use sqlx::Row as _;
use tokio_stream::StreamExt as _;

use super::{During as _, Error, Result, Store, Tx};
use crate::model::cost::{Booking, LedgerRow};
use crate::model::{ServerId, times};

/// Rows a month's listing returns at most: a run every five minutes.
pub const ROWS_MAX: usize = 10_000;

fn amount(text: &str) -> Result<Decimal> {
    text.parse().map_err(|_| Error::Unreadable { what: "decimal amount", text: text.to_owned() })
}

impl Tx {
    /// Notes what a repository holds. Reports come in their order, so the last word is the newest. One of the same
    /// destination and mode that it has replaced is dropped: nobody can write to it any more, and nobody should pay
    /// for it. The mode, encrypted or not, is told by how its key was escrowed.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn put_repository(
        &mut self,
        server: ServerId,
        repository_id: &str,
        destination: &str,
        bytes: i64,
        as_of_ms: i64,
    ) -> Result<()> {
        sqlx::query(
            "DELETE FROM repositories WHERE server_id = ?1 AND destination = ?3 AND repository_id <> ?2 AND
                 (SELECT k.open IS NULL FROM repository_keys k WHERE k.server_id = ?1 AND k.repository_id = ?2) IS
                 (SELECT k.open IS NULL FROM repository_keys k
                  WHERE k.server_id = ?1 AND k.repository_id = repositories.repository_id)",
        )
        .bind(server.0)
        .bind(repository_id)
        .bind(destination)
        .execute(self.connection())
        .await
        .during("drop a replaced repository")?;
        sqlx::query(
            "INSERT INTO repositories (server_id, repository_id, destination, bytes, as_of_ms) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (server_id, repository_id) DO UPDATE SET destination = excluded.destination,
                 bytes = excluded.bytes, as_of_ms = excluded.as_of_ms",
        )
        .bind(server.0)
        .bind(repository_id)
        .bind(destination)
        .bind(bytes)
        .bind(as_of_ms)
        .execute(self.connection())
        .await
        .during("note a repository's size")?;
        Ok(())
    }

    /// What all repositories of a server hold, capped at 9 PB: an absurd report must not overflow the sum and
    /// with it stop the host's reports for ever.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn stored_bytes(&mut self, server: ServerId) -> Result<i64> {
        sqlx::query_scalar("SELECT CAST(min(total(bytes), 9.0e15) AS INTEGER) FROM repositories WHERE server_id = ?1")
            .bind(server.0)
            .fetch_one(self.connection())
            .await
            .during("sum up repositories")
    }

    /// What is booked for a server, day and source in a currency.
    ///
    /// # Errors
    /// When the rows cannot be read.
    pub async fn booked(&mut self, server: ServerId, ref_date: &str, source: &str, currency: &str) -> Result<Decimal> {
        let rows: Vec<String> = sqlx::query_scalar(
            "SELECT amount FROM cost_ledger WHERE server_id = ?1 AND ref_date = ?2 AND source = ?3 AND currency = ?4",
        )
        .bind(server.0)
        .bind(ref_date)
        .bind(source)
        .bind(currency)
        .fetch_all(self.connection())
        .await
        .during("read a day's ledger")?;
        // Summed here, because SQLite would sum as floating point.
        rows.iter().map(|text| amount(text)).sum()
    }

    /// Books a row for a run.
    ///
    /// # Errors
    /// When the row cannot be written, also when the run has one.
    pub async fn book(
        &mut self,
        server: ServerId,
        run_uid: &str,
        source: &str,
        booking: &Booking,
        metadata: &serde_json::Value,
        now_ms: i64,
    ) -> Result<()> {
        sqlx::query(
            "INSERT INTO cost_ledger (server_id, ref_date, amount, source, run_uid, metadata_json, booked_at_ms, currency)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )
        .bind(server.0)
        .bind(&booking.ref_date)
        .bind(booking.amount.to_string())
        .bind(source)
        .bind(run_uid)
        .bind(metadata.to_string())
        .bind(now_ms)
        .bind(&booking.currency)
        .execute(self.connection())
        .await
        .during("book a run")?;
        Ok(())
    }
}

impl Store {
    /// A server's ledger rows with `from <= ref_date < until`, oldest first, and whether there are more than
    /// [`ROWS_MAX`].
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn ledger(&self, server: ServerId, from: &str, until: &str) -> Result<(Vec<LedgerRow>, bool)> {
        let rows = sqlx::query(
            "SELECT * FROM cost_ledger WHERE server_id = ?1 AND ref_date >= ?2 AND ref_date < ?3
             ORDER BY ref_date, id LIMIT ?4",
        )
        .bind(server.0)
        .bind(from)
        .bind(until)
        .bind(ROWS_MAX as i64 + 1)
        .fetch_all(&self.readers)
        .await
        .during("read the ledger")?;
        let shown = rows.iter().take(ROWS_MAX).map(|row| {
            Ok(LedgerRow {
                id: row.get("id"),
                server_id: row.get("server_id"),
                ref_date: row.get("ref_date"),
                amount: amount(row.get("amount"))?,
                currency: row.get("currency"),
                source: row.get("source"),
                run_uid: row.get("run_uid"),
                metadata: serde_json::from_str(row.get("metadata_json")).unwrap_or_default(),
                booked_at: times::rfc3339(row.get("booked_at_ms")),
            })
        });
        Ok((shown.collect::<Result<_>>()?, rows.len() > ROWS_MAX))
    }

    /// Hands every ledger row with `from <= ref_date < until` to `each`, as source, currency and amount, one by one:
    /// a month may have more rows than should be held at once.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn each_amount(
        &self,
        server: ServerId,
        from: &str,
        until: &str,
        mut each: impl FnMut(&str, &str, Decimal),
    ) -> Result<()> {
        let mut rows = sqlx::query(
            "SELECT source, currency, amount FROM cost_ledger WHERE server_id = ?1 AND ref_date >= ?2 AND ref_date < ?3",
        )
        .bind(server.0)
        .bind(from)
        .bind(until)
        .fetch(&self.readers);
        while let Some(row) = rows.next().await {
            let row = row.during("sum up the ledger")?;
            each(row.get("source"), row.get("currency"), amount(row.get("amount"))?);
        }
        Ok(())
    }
}
