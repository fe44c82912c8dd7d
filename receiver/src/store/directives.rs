//! Directives: what the centre asks of hosts, one row each, kept for ever.
//!
//! A directive is open until an outcome or a run answers it, it expires, or a newer policy takes its place.
//! An open one is delivered again at every reconnect; the agent remembers which it has done.

use hestner_proto::v1;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::{During as _, Result, Store, Tx};
use crate::model::report::Outcome;
use crate::model::{CompanyId, ServerId};

/// Directives handed to one session at a time.
const DELIVERED_AT_ONCE_MAX: i64 = 200;

/// What a directive is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A run.
    Run,
    /// A policy.
    Policy,
}

/// A directive to be added.
#[derive(Clone, Copy, Debug)]
pub struct NewDirective<'a> {
    /// A fresh id.
    pub id: &'a str,
    /// Whom it is for.
    pub server: ServerId,
    /// What it is about.
    pub kind: Kind,
    /// The service it is about.
    pub service: &'a str,
    /// Of a run: the verb. Of a policy: empty.
    pub verb: &'a str,
    /// When it was made.
    pub created_at_ms: i64,
    /// When it ends.
    pub expires_at_ms: i64,
}

/// What an answer to a directive met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// The server has no such directive.
    Unknown,
    /// It is the first answer of the host, and is stored.
    First(Kind),
    /// The host had answered; nothing is changed.
    Before,
}

/// A directive that expired.
#[derive(Clone, Debug)]
pub struct Expired {
    /// Its id.
    pub id: String,
    /// Its server.
    pub server: ServerId,
    /// The server's company.
    pub company: CompanyId,
    /// What it was about.
    pub kind: Kind,
}

fn kind(row: &SqliteRow) -> Kind {
    if row.get::<&str, _>("kind") == "policy" { Kind::Policy } else { Kind::Run }
}

/// As it goes over the wire; a policy directive carries the policy's columns.
fn on_wire(row: &SqliteRow) -> v1::Directive {
    use v1::directive::Ask;
    let ask = match kind(row) {
        Kind::Run => Ask::Run(v1::RunRequest { service: row.get("service"), verb: row.get("verb") }),
        Kind::Policy => Ask::Policy(v1::Policy {
            policy_id: row.get("policy_id"),
            service: row.get("service"),
            cron: row.get("cron"),
            time_zone: row.get("time_zone"),
            retention_days: row.get::<Option<u32>, _>("retention_days").unwrap_or_default(),
            retention_count: row.get::<Option<u32>, _>("retention_count").unwrap_or_default(),
            destination: row.get("destination"),
            encryption_enabled: row.get::<Option<bool>, _>("encryption_enabled").unwrap_or(true),
            misfire: row.get("misfire"),
            compression_level: row.get("compression_level"),
            priority: row.get("priority"),
            force_read: row.get("force_read"),
            skip_caches: row.get("skip_caches"),
        }),
    };
    v1::Directive { id: row.get("id"), expires_at_ms: row.get("expires_at_ms"), ask: Some(ask) }
}

impl Tx {
    /// Adds a directive.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn add_directive(&mut self, new: &NewDirective<'_>) -> Result<()> {
        sqlx::query(
            "INSERT INTO directives (id, server_id, kind, service, verb, created_at_ms, expires_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )
        .bind(new.id)
        .bind(new.server.0)
        .bind(if new.kind == Kind::Policy { "policy" } else { "run" })
        .bind(new.service)
        .bind(new.verb)
        .bind(new.created_at_ms)
        .bind(new.expires_at_ms)
        .execute(self.connection())
        .await
        .during("add a directive")?;
        Ok(())
    }

    /// How many run directives of a server are open.
    ///
    /// # Errors
    /// When they cannot be counted.
    pub async fn open_runs(&mut self, server: ServerId) -> Result<i64> {
        sqlx::query_scalar(
            "SELECT count(*) FROM directives WHERE server_id = ?1 AND kind = 'run' AND answered_at_ms IS NULL",
        )
        .bind(server.0)
        .fetch_one(self.connection())
        .await
        .during("count open directives")
    }

    /// Ends open policy directives of a service: a newer one takes their place.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn supersede_policies(&mut self, server: ServerId, service: &str, now_ms: i64) -> Result<()> {
        sqlx::query(
            "UPDATE directives SET answered_at_ms = ?3, answer = 'superseded'
             WHERE server_id = ?1 AND service = ?2 AND kind = 'policy' AND answered_at_ms IS NULL",
        )
        .bind(server.0)
        .bind(service)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("supersede a policy")?;
        Ok(())
    }

    /// Stores a host's answer. The first one stays; what the centre wrote for want of one does not.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn answer_directive(&mut self, server: ServerId, outcome: &Outcome, now_ms: i64) -> Result<Answered> {
        let row = sqlx::query("SELECT kind FROM directives WHERE id = ?1 AND server_id = ?2")
            .bind(&outcome.directive_id)
            .bind(server.0)
            .fetch_optional(self.connection())
            .await
            .during("look up a directive")?;
        let Some(row) = row else { return Ok(Answered::Unknown) };
        let stored = sqlx::query(
            "UPDATE directives SET answered_at_ms = ?2, answer = ?3, code = ?4, message = ?5
             WHERE id = ?1 AND (answered_at_ms IS NULL OR answer IN ('expired', 'superseded'))",
        )
        .bind(&outcome.directive_id)
        .bind(now_ms)
        .bind(if outcome.accepted { "accepted" } else { "refused" })
        .bind(&outcome.code)
        .bind(&outcome.message)
        .execute(self.connection())
        .await
        .during("store an outcome")?;
        Ok(if stored.rows_affected() == 0 { Answered::Before } else { Answered::First(kind(&row)) })
    }

    /// Notes that a run answers its directive, which the server must own.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn directive_became_run(&mut self, server: ServerId, id: &str, now_ms: i64) -> Result<()> {
        sqlx::query(
            "UPDATE directives SET answered_at_ms = ?3, answer = 'accepted'
             WHERE id = ?1 AND server_id = ?2 AND answered_at_ms IS NULL",
        )
        .bind(id)
        .bind(server.0)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("answer a directive by its run")?;
        Ok(())
    }

    /// Ends open directives whose time is over, at most 1,000 at once.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn expire_directives(&mut self, now_ms: i64) -> Result<Vec<Expired>> {
        let rows = sqlx::query(
            "UPDATE directives SET answered_at_ms = ?1, answer = 'expired'
             WHERE id IN (SELECT id FROM directives WHERE answered_at_ms IS NULL AND expires_at_ms <= ?1 LIMIT 1000)
             RETURNING id, server_id, kind, (SELECT company_id FROM servers WHERE servers.id = server_id) AS company_id",
        )
        .bind(now_ms)
        .fetch_all(self.connection())
        .await
        .during("expire directives")?;
        let expired = rows.iter().map(|row| Expired {
            id: row.get("id"),
            server: ServerId(row.get("server_id")),
            company: CompanyId(row.get("company_id")),
            kind: kind(row),
        });
        Ok(expired.collect())
    }

    /// Notes that directives were handed to a session.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn directives_delivered(&mut self, ids: &[String], now_ms: i64) -> Result<()> {
        for id in ids {
            sqlx::query("UPDATE directives SET delivered_at_ms = ?2 WHERE id = ?1 AND delivered_at_ms IS NULL")
                .bind(id)
                .bind(now_ms)
                .execute(self.connection())
                .await
                .during("note a delivery")?;
        }
        Ok(())
    }
}

impl Store {
    /// Whether any directive is to be expired at `now_ms`; asked often, so it takes no write lock.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn any_directive_expired(&self, now_ms: i64) -> Result<bool> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM directives WHERE answered_at_ms IS NULL AND expires_at_ms <= ?1)",
        )
        .bind(now_ms)
        .fetch_one(&self.readers)
        .await
        .during("look for expired directives")
    }

    /// A server's open directives, oldest first.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn open_directives(&self, server: ServerId, now_ms: i64) -> Result<Vec<v1::Directive>> {
        let rows = sqlx::query(
            "SELECT d.*, p.id AS policy_id, p.cron, p.time_zone, p.retention_days, p.retention_count, p.destination,
                 p.encryption_enabled, p.misfire, p.compression_level, p.priority, p.force_read, p.skip_caches
             FROM directives d LEFT JOIN snapshot_policies p ON p.directive_id = d.id
             WHERE d.server_id = ?1 AND d.answered_at_ms IS NULL AND d.expires_at_ms > ?2
               AND (d.kind = 'run' OR p.id IS NOT NULL)
             ORDER BY d.created_at_ms, d.rowid LIMIT ?3",
        )
        .bind(server.0)
        .bind(now_ms)
        .bind(DELIVERED_AT_ONCE_MAX)
        .fetch_all(&self.readers)
        .await
        .during("list open directives")?;
        Ok(rows.iter().map(on_wire).collect())
    }

    /// Servers that have directives nobody delivered yet.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn servers_with_undelivered(&self, now_ms: i64) -> Result<Vec<ServerId>> {
        let rows: Vec<i64> = sqlx::query_scalar(
            "SELECT DISTINCT server_id FROM directives
             WHERE answered_at_ms IS NULL AND delivered_at_ms IS NULL AND expires_at_ms > ?1",
        )
        .bind(now_ms)
        .fetch_all(&self.readers)
        .await
        .during("look for undelivered directives")?;
        Ok(rows.into_iter().map(ServerId).collect())
    }
}
