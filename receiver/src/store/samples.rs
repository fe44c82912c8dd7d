//! Minute samples of servers: what heartbeats leave behind.
//!
//! Heartbeats are never written one by one; a flush brings many servers' minutes in one transaction.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::{During as _, Result, Store, Tx};
use crate::model::range::Range;
use crate::model::server::{Minute, Point};
use crate::model::{ServerId, times};

fn point(row: &SqliteRow, bucket_minutes: i64) -> Point {
    Point {
        at: times::rfc3339(row.get::<i64, _>("bucket") * bucket_minutes * 60_000),
        load1: row.get("load1"),
        load5: row.get("load5"),
        load15: row.get("load15"),
        cpu_busy: row.get("cpu_busy"),
        memory_total_bytes: row.get("memory_total_bytes"),
        memory_used_bytes: row.get::<f64, _>("memory_used_bytes") as i64,
        disk_total_bytes: row.get("disk_total_bytes"),
        disk_used_bytes: row.get::<f64, _>("disk_used_bytes") as i64,
        network_received_bytes: row.get("network_received_bytes"),
        network_sent_bytes: row.get("network_sent_bytes"),
        uptime_seconds: row.get("uptime_seconds"),
        runs_active: row.get("runs_active"),
        outbox_reports: row.get("outbox_reports"),
    }
}

impl Tx {
    /// Writes a minute, joined with what an earlier flush wrote of the same minute.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn put_minute(&mut self, server: ServerId, m: &Minute) -> Result<()> {
        sqlx::query(
            "INSERT INTO server_samples (server_id, minute, heartbeats, load1, load5, load15, cpu_busy,
                 memory_total_bytes, memory_used_bytes, disk_total_bytes, disk_used_bytes, network_received_bytes,
                 network_sent_bytes, uptime_seconds, runs_active, outbox_reports)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
             ON CONFLICT (server_id, minute) DO UPDATE SET
                 load1 = (load1 * heartbeats + excluded.load1 * excluded.heartbeats) / (heartbeats + excluded.heartbeats),
                 load5 = (load5 * heartbeats + excluded.load5 * excluded.heartbeats) / (heartbeats + excluded.heartbeats),
                 load15 = (load15 * heartbeats + excluded.load15 * excluded.heartbeats) / (heartbeats + excluded.heartbeats),
                 cpu_busy = (cpu_busy * heartbeats + excluded.cpu_busy * excluded.heartbeats) / (heartbeats + excluded.heartbeats),
                 memory_used_bytes = excluded.memory_used_bytes, disk_used_bytes = excluded.disk_used_bytes,
                 memory_total_bytes = excluded.memory_total_bytes, disk_total_bytes = excluded.disk_total_bytes,
                 network_received_bytes = excluded.network_received_bytes,
                 network_sent_bytes = excluded.network_sent_bytes, uptime_seconds = excluded.uptime_seconds,
                 runs_active = excluded.runs_active, outbox_reports = excluded.outbox_reports,
                 heartbeats = heartbeats + excluded.heartbeats",
        )
        .bind(server.0)
        .bind(m.minute)
        .bind(m.heartbeats)
        .bind(m.average(m.load1))
        .bind(m.average(m.load5))
        .bind(m.average(m.load15))
        .bind(m.average(m.cpu_busy))
        .bind(m.memory_total_bytes)
        .bind(m.average(m.memory_used_bytes) as i64)
        .bind(m.disk_total_bytes)
        .bind(m.average(m.disk_used_bytes) as i64)
        .bind(m.network_received_bytes)
        .bind(m.network_sent_bytes)
        .bind(m.uptime_seconds)
        .bind(m.runs_active)
        .bind(m.outbox_reports)
        .execute(self.connection())
        .await
        .during("write a sample")?;
        Ok(())
    }

    /// Notes when a server was last heard of.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn seen(&mut self, server: ServerId, at_ms: i64) -> Result<()> {
        sqlx::query("UPDATE servers SET last_seen_ms = max(coalesce(last_seen_ms, 0), ?2) WHERE id = ?1")
            .bind(server.0)
            .bind(at_ms)
            .execute(self.connection())
            .await
            .during("note when a server was seen")?;
        Ok(())
    }

    /// Removes samples of minutes before `minute`.
    ///
    /// # Errors
    /// When the rows cannot be removed.
    pub async fn forget_samples_before(&mut self, minute: i64) -> Result<()> {
        sqlx::query("DELETE FROM server_samples WHERE minute < ?1")
            .bind(minute)
            .execute(self.connection())
            .await
            .during("remove old samples")?;
        Ok(())
    }
}

impl Store {
    /// A server's series over a range that ends at `now_ms`, oldest bucket first.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn series(&self, server: ServerId, range: Range, now_ms: i64) -> Result<Vec<Point>> {
        // A bare column beside max() is taken from the row that holds the maximum: the last minute's counters
        // (https://sqlite.org/lang_select.html#bareagg).
        let rows = sqlx::query(
            "SELECT minute / ?3 AS bucket, max(minute) AS last,
                 sum(load1 * heartbeats) / sum(heartbeats) AS load1, sum(load5 * heartbeats) / sum(heartbeats) AS load5,
                 sum(load15 * heartbeats) / sum(heartbeats) AS load15,
                 sum(cpu_busy * heartbeats) / sum(heartbeats) AS cpu_busy,
                 avg(memory_used_bytes) AS memory_used_bytes, avg(disk_used_bytes) AS disk_used_bytes,
                 memory_total_bytes, disk_total_bytes, network_received_bytes, network_sent_bytes, uptime_seconds,
                 runs_active, outbox_reports
             FROM server_samples WHERE server_id = ?1 AND minute >= ?2 AND minute < ?2 + ?4
             GROUP BY bucket ORDER BY bucket",
        )
        .bind(server.0)
        .bind(range.first_minute(now_ms))
        .bind(range.bucket_minutes())
        .bind(range.minutes())
        .fetch_all(&self.readers)
        .await
        .during("read a series")?;
        Ok(rows.iter().map(|row| point(row, range.bucket_minutes())).collect())
    }
}
