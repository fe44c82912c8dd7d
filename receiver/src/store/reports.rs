//! The memory of reports: which numbers of which outbox are committed, and with what content.
//!
//! Also the small reports that are one row each: usage and repository keys (`keys` reads those back).

use sqlx::Row as _;

use super::{During as _, Result, Tx};
use crate::model::ServerId;
use crate::model::report::{EscrowedKey, NumberedReport, RepositoryKey, Unreadable, Usage};

/// Unreadable reports that are kept of one server: the newest. Each may be as large as a message.
const UNREADABLE_KEPT: i64 = 100;

/// What the store knows of a report's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing: it is noted now.
    First,
    /// The same report.
    Again,
    /// Another report: its hash as hex, and the address it came from.
    Fork {
        /// SHA-256 of the stored body.
        sha256: String,
        /// The session it came over.
        peer: String,
    },
}

impl Tx {
    /// Notes a report's number and hash, unless they are known.
    ///
    /// # Errors
    /// When the row cannot be read or written.
    pub async fn note_report(
        &mut self,
        server: ServerId,
        report: &NumberedReport,
        peer: &str,
        now_ms: i64,
    ) -> Result<Seen> {
        let known = sqlx::query("SELECT sha256, peer FROM reports WHERE server_id = ?1 AND epoch = ?2 AND seq = ?3")
            .bind(server.0)
            .bind(&report.epoch)
            .bind(report.seq)
            .fetch_optional(self.connection())
            .await
            .during("look up a report")?;
        if let Some(row) = known {
            let sha256: Vec<u8> = row.get(0);
            let same = sha256 == report.sha256;
            return Ok(if same { Seen::Again } else { Seen::Fork { sha256: hex::encode(sha256), peer: row.get(1) } });
        }
        sqlx::query(
            "INSERT INTO reports (server_id, epoch, seq, sha256, peer, received_at_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )
        .bind(server.0)
        .bind(&report.epoch)
        .bind(report.seq)
        .bind(&report.sha256)
        .bind(peer)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("note a report")?;
        Ok(Seen::First)
    }

    /// Moves the acknowledged number of an outbox up to the first gap, and returns it; 0 for none.
    ///
    /// # Errors
    /// When the rows cannot be read or written.
    pub async fn advance_ack(&mut self, server: ServerId, epoch: &str) -> Result<i64> {
        let before: Option<i64> =
            sqlx::query_scalar("SELECT acked_seq FROM report_epochs WHERE server_id = ?1 AND epoch = ?2")
                .bind(server.0)
                .bind(epoch)
                .fetch_optional(self.connection())
                .await
                .during("read an acknowledged number")?;
        let before = before.unwrap_or(0);
        // The first number above `before` that has no successor, if the one after `before` is there.
        let after: Option<i64> = sqlx::query_scalar(
            "SELECT min(seq) FROM reports r WHERE server_id = ?1 AND epoch = ?2 AND seq > ?3
               AND EXISTS (SELECT 1 FROM reports WHERE server_id = ?1 AND epoch = ?2 AND seq = ?3 + 1)
               AND NOT EXISTS (SELECT 1 FROM reports n WHERE n.server_id = ?1 AND n.epoch = ?2 AND n.seq = r.seq + 1)",
        )
        .bind(server.0)
        .bind(epoch)
        .bind(before)
        .fetch_one(self.connection())
        .await
        .during("look for the first gap")?;
        let acked = after.unwrap_or(before);
        if acked > before {
            sqlx::query(
                "INSERT INTO report_epochs (server_id, epoch, acked_seq) VALUES (?1, ?2, ?3)
                 ON CONFLICT (server_id, epoch) DO UPDATE SET acked_seq = excluded.acked_seq",
            )
            .bind(server.0)
            .bind(epoch)
            .bind(acked)
            .execute(self.connection())
            .await
            .during("note an acknowledged number")?;
        }
        Ok(acked)
    }

    /// Keeps a report that could not be read, and forgets the oldest of many.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn put_unreadable(
        &mut self,
        server: ServerId,
        report: &NumberedReport,
        unreadable: &Unreadable,
        now_ms: i64,
    ) -> Result<()> {
        sqlx::query(
            "INSERT INTO unreadable_reports (server_id, epoch, seq, why, body, received_at_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        )
        .bind(server.0)
        .bind(&report.epoch)
        .bind(report.seq)
        .bind(&unreadable.why)
        .bind(&unreadable.body)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("keep an unreadable report")?;
        sqlx::query(
            "DELETE FROM unreadable_reports WHERE id IN
                 (SELECT id FROM unreadable_reports WHERE server_id = ?1 ORDER BY id DESC LIMIT -1 OFFSET ?2)",
        )
        .bind(server.0)
        .bind(UNREADABLE_KEPT)
        .execute(self.connection())
        .await
        .during("forget unreadable reports")?;
        Ok(())
    }

    /// Stores an hour's usage. The first word on an hour stays: the ledger may already rest on it.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn put_usage(&mut self, server: ServerId, usage: &Usage, now_ms: i64) -> Result<()> {
        sqlx::query(
            "INSERT INTO usage_hours (server_id, hour_start_ms, observed_seconds, cpu_core_seconds, memory_byte_seconds,
                 disk_used_bytes, network_sent_bytes, received_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (server_id, hour_start_ms) DO NOTHING",
        )
        .bind(server.0)
        .bind(usage.hour_start_ms)
        .bind(usage.observed_seconds)
        .bind(usage.cpu_core_seconds)
        .bind(usage.memory_byte_seconds)
        .bind(usage.disk_used_bytes)
        .bind(usage.network_sent_bytes)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("store usage")?;
        Ok(())
    }

    /// Stores a repository's key, the latest one.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn put_repository_key(&mut self, server: ServerId, key: &RepositoryKey, now_ms: i64) -> Result<()> {
        let (wrapped, open) = match &key.key {
            EscrowedKey::Wrapped(bytes) => (Some(bytes.as_slice()), None),
            EscrowedKey::Open(text) => (None, Some(text.as_str())),
        };
        sqlx::query(
            "INSERT INTO repository_keys (server_id, repository_id, destination, wrapped, open, received_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (server_id, repository_id) DO UPDATE SET destination = excluded.destination,
                 wrapped = excluded.wrapped, open = excluded.open, received_at_ms = excluded.received_at_ms",
        )
        .bind(server.0)
        .bind(&key.repository_id)
        .bind(&key.destination)
        .bind(wrapped)
        .bind(open)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("store a repository's key")?;
        Ok(())
    }
}
