//! Servers, their inventory and their services.
//!
//! A service's row keeps its id for as long as server and name are the same; one that an inventory no
//! longer names is marked gone, not removed, because runs and policies point at it by name; only the longest gone
//! are removed where they are thousands.

use std::collections::{BTreeMap, BTreeSet};

use hestner_proto::v1;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::{During as _, Result, Store, Tx};
use crate::model::run::{cut, number, shown};
use crate::model::server::{Grant, Host, SERVICES_MAX, Server, ServerStatus, Service};
use crate::model::{CompanyId, ServerId, times};

/// What a session and enrolment need to know of a server.
#[derive(Clone, Debug)]
pub struct Standing {
    /// The server.
    pub id: ServerId,
    /// Its company.
    pub company: CompanyId,
    /// `active`, `quarantined` or `revoked`.
    pub status: String,
    /// SHA-256 of the key that speaks for it.
    pub spki_sha256: String,
    /// SHA-256 of the key a renewal announced.
    pub next_spki_sha256: Option<String>,
    /// Hash of the stored inventory.
    pub inventory_hash: Option<String>,
    /// When its present key was enrolled.
    pub enrolled_at_ms: i64,
}

/// Servers a listing returns at most.
pub const SERVERS_MAX: i64 = 1000;
/// Longest hash of an inventory, in bytes; SHA-256 as hex has 64.
const HASH_BYTES_MAX: usize = 128;

fn standing(row: &SqliteRow) -> Standing {
    Standing {
        id: ServerId(row.get("id")),
        company: CompanyId(row.get("company_id")),
        status: row.get("status"),
        spki_sha256: row.get("spki_sha256"),
        next_spki_sha256: row.get("next_spki_sha256"),
        inventory_hash: row.get("inventory_hash"),
        enrolled_at_ms: row.get("enrolled_at_ms"),
    }
}

/// Online or offline is not in the row; whoever knows the sessions fills it in.
fn server(row: &SqliteRow) -> Server {
    let json = |column: &str| serde_json::from_str(row.get::<&str, _>(column)).unwrap_or_default();
    Server {
        id: row.get("id"),
        company_id: row.get("company_id"),
        name: row.get("name"),
        status: match row.get::<&str, _>("status") {
            "quarantined" => ServerStatus::Quarantined,
            "revoked" => ServerStatus::Revoked,
            _ => ServerStatus::Offline,
        },
        env: row.get("env"),
        region: row.get("region"),
        labels: json("labels_json"),
        agent_version: row.get("agent_version"),
        separated: row.get("separated"),
        enrolled_at: times::rfc3339(row.get("enrolled_at_ms")),
        last_seen_at: shown(row.get("last_seen_ms")),
        clock_skew_ms: row.get("clock_skew_ms"),
        host: Host {
            hostname: row.get("hostname"),
            os: row.get("os"),
            kernel: row.get("kernel"),
            architecture: row.get("architecture"),
            cpus: row.get("cpus"),
            memory_bytes: row.get("memory_bytes"),
        },
        destinations: serde_json::from_str(row.get::<&str, _>("destinations_json")).unwrap_or_default(),
        inventory_at: shown(row.get("inventory_at_ms")),
    }
}

impl Tx {
    /// The server that a key speaks for.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn server_of_key(&mut self, spki_sha256: &str) -> Result<Option<Standing>> {
        let row = sqlx::query("SELECT * FROM servers WHERE spki_sha256 = ?1 OR next_spki_sha256 = ?1")
            .bind(spki_sha256)
            .fetch_optional(self.connection())
            .await
            .during("look up a key")?;
        Ok(row.as_ref().map(standing))
    }

    /// A server, inside this transaction.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn standing(&mut self, id: ServerId) -> Result<Option<Standing>> {
        let row = sqlx::query("SELECT * FROM servers WHERE id = ?1")
            .bind(id.0)
            .fetch_optional(self.connection())
            .await
            .during("read a server")?;
        Ok(row.as_ref().map(standing))
    }

    /// Adds a server.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn add_server(
        &mut self,
        company: CompanyId,
        name: &str,
        spki_sha256: &str,
        agent_version: &str,
        now_ms: i64,
    ) -> Result<ServerId> {
        sqlx::query_scalar(
            "INSERT INTO servers (company_id, name, hostname, spki_sha256, agent_version, enrolled_at_ms)
             VALUES (?1, ?2, ?2, ?3, ?4, ?5) RETURNING id",
        )
        .bind(company.0)
        .bind(name)
        .bind(spki_sha256)
        .bind(agent_version)
        .bind(now_ms)
        .fetch_one(self.connection())
        .await
        .map(ServerId)
        .during("add a server")
    }

    /// Gives a server to another key, at once; a quarantine ends with it.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn rekey_server(&mut self, id: ServerId, spki_sha256: &str, now_ms: i64) -> Result<()> {
        sqlx::query(
            "UPDATE servers SET spki_sha256 = ?2, next_spki_sha256 = NULL, enrolled_at_ms = ?3, status = 'active'
             WHERE id = ?1",
        )
        .bind(id.0)
        .bind(spki_sha256)
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("re-enrol a server")?;
        Ok(())
    }

    /// Notes the key of a renewed certificate; the old one holds until the new one has spoken. Changes nothing at a
    /// server that is shut out.
    ///
    /// # Errors
    /// When the row cannot be written, also when another server has the key.
    pub async fn announce_key(&mut self, id: ServerId, spki_sha256: &str) -> Result<()> {
        sqlx::query("UPDATE servers SET next_spki_sha256 = ?2 WHERE id = ?1 AND status = 'active'")
            .bind(id.0)
            .bind(spki_sha256)
            .execute(self.connection())
            .await
            .during("note a renewed key")?;
        Ok(())
    }

    /// Takes in a hello. A key that a renewal announced becomes the only one now.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn greet(&mut self, id: ServerId, spki_sha256: &str, hello: &v1::Hello, now_ms: i64) -> Result<()> {
        sqlx::query(
            "UPDATE servers SET agent_version = ?3, separated = ?4, clock_skew_ms = ?5, last_seen_ms = ?6,
                 next_spki_sha256 = CASE WHEN next_spki_sha256 = ?2 THEN NULL ELSE next_spki_sha256 END,
                 spki_sha256 = ?2
             WHERE id = ?1",
        )
        .bind(id.0)
        .bind(spki_sha256)
        .bind(cut(hello.agent_version.clone(), 64))
        .bind(hello.separated)
        .bind(hello.now_ms.saturating_sub(now_ms))
        .bind(now_ms)
        .execute(self.connection())
        .await
        .during("take in a hello")?;
        Ok(())
    }

    /// Sets a server's status.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn set_server_status(&mut self, id: ServerId, status: &'static str) -> Result<()> {
        sqlx::query("UPDATE servers SET status = ?2 WHERE id = ?1")
            .bind(id.0)
            .bind(status)
            .execute(self.connection())
            .await
            .during("set a server's status")?;
        Ok(())
    }

    /// Replaces a server's inventory.
    ///
    /// # Errors
    /// When the rows cannot be written.
    pub async fn replace_inventory(&mut self, id: ServerId, inventory: &v1::Inventory, now_ms: i64) -> Result<()> {
        self.set_host(id, inventory, now_ms).await?;
        sqlx::query("UPDATE services SET gone_at_ms = ?2 WHERE server_id = ?1 AND gone_at_ms IS NULL")
            .bind(id.0)
            .bind(now_ms)
            .execute(self.connection())
            .await
            .during("mark services")?;
        // Each name once, as the last entry has it.
        let services: BTreeMap<&str, _> = inventory.services.iter().map(|s| (s.name.as_str(), s)).collect();
        for service in services.into_values() {
            self.put_service(id, service).await?;
        }
        self.forget_gone_services(id).await?;
        sqlx::query("DELETE FROM server_grants WHERE server_id = ?1")
            .bind(id.0)
            .execute(self.connection())
            .await
            .during("forget grants")?;
        let grants: BTreeMap<_, _> = inventory.grants.iter().map(|g| ((&g.service, &g.verb), g)).collect();
        for grant in grants.into_values() {
            sqlx::query(
                "INSERT OR REPLACE INTO server_grants (server_id, service, verb, value) VALUES (?1, ?2, ?3, ?4)",
            )
            .bind(id.0)
            .bind(cut(grant.service.clone(), 256))
            .bind(cut(grant.verb.clone(), 32))
            .bind(cut(grant.value.clone(), 32))
            .execute(self.connection())
            .await
            .during("store a grant")?;
        }
        Ok(())
    }

    /// Bounds a host that names its services anew each time.
    async fn forget_gone_services(&mut self, id: ServerId) -> Result<()> {
        sqlx::query(
            "DELETE FROM services WHERE id IN (SELECT id FROM services WHERE server_id = ?1 AND gone_at_ms IS NOT NULL
                 ORDER BY gone_at_ms DESC, id DESC LIMIT -1 OFFSET ?2)",
        )
        .bind(id.0)
        .bind(SERVICES_MAX as i64)
        .execute(self.connection())
        .await
        .during("forget services that are long gone")?;
        Ok(())
    }

    async fn set_host(&mut self, id: ServerId, inventory: &v1::Inventory, now_ms: i64) -> Result<()> {
        let host = inventory.host.clone().unwrap_or_default();
        let destinations: BTreeSet<String> = inventory.destinations.iter().map(|name| cut(name.clone(), 256)).collect();
        let destinations: Vec<String> = destinations.into_iter().collect();
        sqlx::query(
            "UPDATE servers SET inventory_hash = ?2, inventory_at_ms = ?3, hostname = ?4, os = ?5, kernel = ?6,
                 architecture = ?7, cpus = ?8, memory_bytes = ?9, destinations_json = ?10
             WHERE id = ?1",
        )
        .bind(id.0)
        .bind(cut(inventory.hash.clone(), HASH_BYTES_MAX))
        .bind(now_ms)
        .bind(cut(host.hostname, 256))
        .bind(cut(host.os, 256))
        .bind(cut(host.kernel, 256))
        .bind(cut(host.architecture, 64))
        .bind(i64::from(host.cpus))
        .bind(number(host.memory_bytes))
        .bind(serde_json::Value::from(destinations).to_string())
        .execute(self.connection())
        .await
        .during("store host facts")?;
        Ok(())
    }

    async fn put_service(&mut self, id: ServerId, service: &v1::Service) -> Result<()> {
        sqlx::query(
            "INSERT INTO services (server_id, name, runtime, version, health, consistency)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (server_id, name) DO UPDATE SET runtime = excluded.runtime, version = excluded.version,
                 health = excluded.health, consistency = excluded.consistency, gone_at_ms = NULL",
        )
        .bind(id.0)
        .bind(cut(service.name.clone(), 256))
        .bind(cut(service.runtime.clone(), 32))
        .bind(cut(service.version.clone(), 256))
        .bind(cut(service.health.clone(), 32))
        .bind(cut(service.consistency.clone(), 32))
        .execute(self.connection())
        .await
        .during("store a service")?;
        Ok(())
    }
}

impl Store {
    /// A server's standing, without waiting for the writer.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn standing(&self, id: ServerId) -> Result<Option<Standing>> {
        let row = sqlx::query("SELECT * FROM servers WHERE id = ?1")
            .bind(id.0)
            .fetch_optional(&self.readers)
            .await
            .during("read a server")?;
        Ok(row.as_ref().map(standing))
    }

    /// A server's company; `None` when there is no such server.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn company_of_server(&self, id: ServerId) -> Result<Option<CompanyId>> {
        let company = sqlx::query_scalar("SELECT company_id FROM servers WHERE id = ?1")
            .bind(id.0)
            .fetch_optional(&self.readers)
            .await
            .during("read a server")?;
        Ok(company.map(CompanyId))
    }

    /// A server.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn server(&self, id: ServerId) -> Result<Option<Server>> {
        let row = sqlx::query("SELECT * FROM servers WHERE id = ?1")
            .bind(id.0)
            .fetch_optional(&self.readers)
            .await
            .during("read a server")?;
        Ok(row.as_ref().map(server))
    }

    /// Servers by id, at most [`SERVERS_MAX`]: of one company or of all, with `search` in name or hostname.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn servers(&self, company: Option<CompanyId>, filter: &ServerFilter) -> Result<Vec<Server>> {
        let rows = sqlx::query(
            "SELECT * FROM servers
             WHERE (?1 IS NULL OR company_id = ?1)
               AND (?2 IS NULL OR instr(lower(name), lower(?2)) > 0 OR instr(lower(hostname), lower(?2)) > 0)
               AND (?3 IS NULL OR env = ?3) AND (?4 IS NULL OR region = ?4)
             ORDER BY id LIMIT ?5",
        )
        .bind(company.map(|id| id.0))
        .bind(&filter.search)
        .bind(&filter.env)
        .bind(&filter.region)
        .bind(SERVERS_MAX)
        .fetch_all(&self.readers)
        .await
        .during("list servers")?;
        Ok(rows.iter().map(server).collect())
    }

    /// Servers that may not have a session.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn shut_out(&self) -> Result<Vec<(ServerId, String)>> {
        let rows = sqlx::query("SELECT id, status FROM servers WHERE status <> 'active'")
            .fetch_all(&self.readers)
            .await
            .during("list servers that are shut out")?;
        Ok(rows.iter().map(|row| (ServerId(row.get(0)), row.get(1))).collect())
    }

    /// Services that the last inventory named, with their grants, by name.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn services(&self, id: ServerId) -> Result<Vec<Service>> {
        let rows = sqlx::query("SELECT * FROM services WHERE server_id = ?1 AND gone_at_ms IS NULL ORDER BY name")
            .bind(id.0)
            .fetch_all(&self.readers)
            .await
            .during("list services")?;
        let grants = sqlx::query("SELECT service, verb, value FROM server_grants WHERE server_id = ?1")
            .bind(id.0)
            .fetch_all(&self.readers)
            .await
            .during("list grants")?;
        let granted = |name: &str| {
            let own = grants.iter().filter(|row| row.get::<&str, _>(0) == name);
            own.map(|row| Grant { verb: row.get(1), value: row.get(2) }).collect()
        };
        Ok(rows.iter().map(|row| service(row, granted(row.get("name")))).collect())
    }
}

fn service(row: &SqliteRow, grants: Vec<Grant>) -> Service {
    Service {
        id: row.get("id"),
        server_id: row.get("server_id"),
        name: row.get("name"),
        runtime: row.get("runtime"),
        version: row.get("version"),
        health: row.get("health"),
        consistency: row.get("consistency"),
        grants,
    }
}

/// What a listing of servers is narrowed to; the empty one shows all.
#[derive(Clone, Debug, Default)]
pub struct ServerFilter {
    /// Part of name or hostname, in any case.
    pub search: Option<String>,
    /// Environment.
    pub env: Option<String>,
    /// Region.
    pub region: Option<String>,
}
