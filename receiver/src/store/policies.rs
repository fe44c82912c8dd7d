//! Snapshot policies: one a server and service, with where it stands on the host.
//!
//! A policy names its newest directive; an answer to an older one changes nothing. When a server gets a new agent,
//! which knows no policies, all of them are sent again.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::directives::{Kind, NewDirective};
use super::{During as _, Result, Store, Tx};
use crate::model::policy::{POLICY_WAITS_MS, Policy, PolicyInput, PolicyState};
use crate::model::report::Outcome;
use crate::model::{ServerId, times};

fn policy(row: &SqliteRow) -> Policy {
    let text = |column: &str| Some(row.get::<String, _>(column)).filter(|text| !text.is_empty());
    Policy {
        id: row.get("id"),
        server_id: ServerId(row.get("server_id")),
        input: PolicyInput {
            service: row.get("service"),
            cron: row.get("cron"),
            time_zone: row.get("time_zone"),
            retention_days: row.get("retention_days"),
            retention_count: row.get("retention_count"),
            destination: row.get("destination"),
            encryption_enabled: row.get("encryption_enabled"),
            misfire: row.get("misfire"),
            compression_level: row.get("compression_level"),
            priority: row.get("priority"),
            force_read: row.get("force_read"),
            skip_caches: row.get("skip_caches"),
        },
        state: match row.get::<&str, _>("state") {
            "applied" => PolicyState::Applied,
            "refused" => PolicyState::Refused,
            _ => PolicyState::Pending,
        },
        refusal_code: text("refusal_code"),
        refusal_message: text("refusal_message"),
        directive_id: row.get("directive_id"),
        updated_at: times::rfc3339(row.get("updated_at_ms")),
        next_run_at: None,
    }
}

impl Tx {
    /// Adds or replaces the policy of a service; it waits for the host's answer to `directive_id`.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn put_policy(
        &mut self,
        server: ServerId,
        input: &PolicyInput,
        directive_id: &str,
        now_ms: i64,
    ) -> Result<Policy> {
        let row = sqlx::query(
            "INSERT INTO snapshot_policies (server_id, service, cron, time_zone, retention_days, retention_count,
                 destination, encryption_enabled, misfire, state, directive_id, updated_at_ms, compression_level,
                 priority, force_read, skip_caches)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'pending', ?10, ?11, ?12, ?13, ?14, ?15)
             ON CONFLICT (server_id, service) DO UPDATE SET cron = excluded.cron, time_zone = excluded.time_zone,
                 retention_days = excluded.retention_days, retention_count = excluded.retention_count,
                 destination = excluded.destination, encryption_enabled = excluded.encryption_enabled,
                 misfire = excluded.misfire, state = 'pending', refusal_code = '', refusal_message = '',
                 directive_id = excluded.directive_id, updated_at_ms = excluded.updated_at_ms,
                 compression_level = excluded.compression_level, priority = excluded.priority,
                 force_read = excluded.force_read, skip_caches = excluded.skip_caches
             RETURNING *",
        )
        .bind(server.0)
        .bind(&input.service)
        .bind(&input.cron)
        .bind(&input.time_zone)
        .bind(input.retention_days)
        .bind(input.retention_count)
        .bind(&input.destination)
        .bind(input.encryption_enabled)
        .bind(&input.misfire)
        .bind(directive_id)
        .bind(now_ms)
        .bind(input.compression_level)
        .bind(&input.priority)
        .bind(input.force_read)
        .bind(input.skip_caches)
        .fetch_one(self.connection())
        .await
        .during("put a policy")?;
        Ok(policy(&row))
    }

    /// Sends all policies of a server again: its agent is a new one and knows none.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn reissue_policies(
        &mut self,
        server: ServerId,
        now_ms: i64,
        mut fresh_id: impl FnMut() -> String,
    ) -> Result<()> {
        let rows = sqlx::query("SELECT * FROM snapshot_policies WHERE server_id = ?1 ORDER BY id")
            .bind(server.0)
            .fetch_all(self.connection())
            .await
            .during("list policies")?;
        for known in rows.iter().map(policy) {
            let id = fresh_id();
            self.supersede_policies(server, &known.input.service, now_ms).await?;
            self.add_directive(&NewDirective {
                id: &id,
                server,
                kind: Kind::Policy,
                service: &known.input.service,
                verb: "",
                created_at_ms: now_ms,
                expires_at_ms: now_ms + POLICY_WAITS_MS,
            })
            .await?;
            self.put_policy(server, &known.input, &id, now_ms).await?;
        }
        Ok(())
    }

    /// Stores the host's answer, if it is to the newest directive of a policy.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn answer_policy(&mut self, server: ServerId, outcome: &Outcome) -> Result<()> {
        sqlx::query(
            "UPDATE snapshot_policies SET state = ?3, refusal_code = ?4, refusal_message = ?5
             WHERE server_id = ?1 AND directive_id = ?2",
        )
        .bind(server.0)
        .bind(&outcome.directive_id)
        .bind(if outcome.accepted { "applied" } else { "refused" })
        .bind(if outcome.accepted { "" } else { &outcome.code })
        .bind(if outcome.accepted { "" } else { &outcome.message })
        .execute(self.connection())
        .await
        .during("store a policy's state")?;
        Ok(())
    }
}

impl Store {
    /// A server's policies, by service.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn policies(&self, server: ServerId) -> Result<Vec<Policy>> {
        let rows = sqlx::query("SELECT * FROM snapshot_policies WHERE server_id = ?1 ORDER BY service LIMIT 5000")
            .bind(server.0)
            .fetch_all(&self.readers)
            .await
            .during("list policies")?;
        Ok(rows.iter().map(policy).collect())
    }
}
