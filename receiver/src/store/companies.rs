//! Companies, join tokens and API keys.
//!
//! Secrets are kept as SHA-256 only: they are 192 random bits, so a slow hash would protect nothing more.

use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::{During as _, Result, Store, Tx};
use crate::model::server::Company;
use crate::model::{CompanyId, Scope, ServerId, times};

/// A company as enrolment needs it.
#[derive(Clone, Debug)]
pub struct CompanyRow {
    /// The row.
    pub id: CompanyId,
    /// Whether it is active.
    pub active: bool,
    /// The recovery key.
    pub recovery_recipient: String,
    /// Its fingerprint.
    pub recovery_fingerprint: String,
}

/// A join token's row.
#[derive(Clone, Debug)]
pub struct TokenRow {
    /// The row.
    pub id: i64,
    /// The company it enrols into.
    pub company: CompanyId,
    /// The server it is bound to.
    pub server: Option<ServerId>,
    /// SHA-256 of the secret, as hex.
    pub secret_sha256: String,
    /// When it ends.
    pub expires_at_ms: i64,
    /// The key that used it, and the server it became.
    pub used: Option<(String, ServerId)>,
}

/// An API key's row.
#[derive(Clone, Debug)]
pub struct ApiKeyRow {
    /// What it opens.
    pub scope: Scope,
    /// SHA-256 of the secret, as hex.
    pub secret_sha256: String,
}

fn company(row: &SqliteRow) -> Company {
    Company {
        id: row.get("id"),
        name: row.get("name"),
        status: row.get("status"),
        recovery_fingerprint: row.get("recovery_fingerprint"),
        created_at: times::rfc3339(row.get("created_at_ms")),
    }
}

fn token(row: &SqliteRow) -> TokenRow {
    let used: Option<(String, i64)> =
        row.get::<Option<String>, _>("used_spki_sha256").zip(row.get::<Option<i64>, _>("used_server_id"));
    TokenRow {
        id: row.get("id"),
        company: CompanyId(row.get("company_id")),
        server: row.get::<Option<i64>, _>("server_id").map(ServerId),
        secret_sha256: row.get("secret_sha256"),
        expires_at_ms: row.get("expires_at_ms"),
        used: used.map(|(key, server)| (key, ServerId(server))),
    }
}

impl Tx {
    /// Adds a company; `None` when the name is taken.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn add_company(
        &mut self,
        name: &str,
        recipient: &str,
        fingerprint: &str,
        now_ms: i64,
    ) -> Result<Option<CompanyId>> {
        let row = sqlx::query(
            "INSERT INTO companies (name, recovery_recipient, recovery_fingerprint, created_at_ms)
             VALUES (?1, ?2, ?3, ?4) ON CONFLICT (name) DO NOTHING RETURNING id",
        )
        .bind(name)
        .bind(recipient)
        .bind(fingerprint)
        .bind(now_ms)
        .fetch_optional(self.connection())
        .await
        .during("add a company")?;
        Ok(row.map(|row| CompanyId(row.get(0))))
    }

    /// Puts another recovery key in the place of a company's.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn set_recovery_key(&mut self, id: CompanyId, recipient: &str, fingerprint: &str) -> Result<()> {
        sqlx::query("UPDATE companies SET recovery_recipient = ?2, recovery_fingerprint = ?3 WHERE id = ?1")
            .bind(id.0)
            .bind(recipient)
            .bind(fingerprint)
            .execute(self.connection())
            .await
            .during("change a recovery key")?;
        Ok(())
    }

    /// The company, inside this transaction.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn company(&mut self, id: CompanyId) -> Result<Option<CompanyRow>> {
        let row = sqlx::query("SELECT * FROM companies WHERE id = ?1")
            .bind(id.0)
            .fetch_optional(self.connection())
            .await
            .during("read a company")?;
        Ok(row.map(|row| CompanyRow {
            id,
            active: row.get::<String, _>("status") == "active",
            recovery_recipient: row.get("recovery_recipient"),
            recovery_fingerprint: row.get("recovery_fingerprint"),
        }))
    }

    /// Adds a join token.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn add_token(
        &mut self,
        company: CompanyId,
        server: Option<ServerId>,
        secret_sha256: &str,
        now_ms: i64,
        expires_at_ms: i64,
    ) -> Result<i64> {
        sqlx::query_scalar(
            "INSERT INTO join_tokens (company_id, server_id, secret_sha256, created_at_ms, expires_at_ms)
             VALUES (?1, ?2, ?3, ?4, ?5) RETURNING id",
        )
        .bind(company.0)
        .bind(server.map(|id| id.0))
        .bind(secret_sha256)
        .bind(now_ms)
        .bind(expires_at_ms)
        .fetch_one(self.connection())
        .await
        .during("add a join token")
    }

    /// A join token.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn token(&mut self, id: i64) -> Result<Option<TokenRow>> {
        let row = sqlx::query("SELECT * FROM join_tokens WHERE id = ?1")
            .bind(id)
            .fetch_optional(self.connection())
            .await
            .during("read a join token")?;
        Ok(row.as_ref().map(token))
    }

    /// Notes that a token was used.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn use_token(&mut self, id: i64, spki_sha256: &str, server: ServerId, now_ms: i64) -> Result<()> {
        sqlx::query("UPDATE join_tokens SET used_at_ms = ?2, used_spki_sha256 = ?3, used_server_id = ?4 WHERE id = ?1")
            .bind(id)
            .bind(now_ms)
            .bind(spki_sha256)
            .bind(server.0)
            .execute(self.connection())
            .await
            .during("use a join token")?;
        Ok(())
    }

    /// Adds an API key.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn add_api_key(&mut self, scope: Scope, label: &str, secret_sha256: &str, now_ms: i64) -> Result<i64> {
        let company = match scope {
            Scope::All => None,
            Scope::Company(id) => Some(id.0),
        };
        sqlx::query_scalar(
            "INSERT INTO api_keys (company_id, label, secret_sha256, created_at_ms) VALUES (?1, ?2, ?3, ?4) RETURNING id",
        )
        .bind(company)
        .bind(label)
        .bind(secret_sha256)
        .bind(now_ms)
        .fetch_one(self.connection())
        .await
        .during("add an API key")
    }
}

impl Store {
    /// A join token, without waiting for the writer.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn token(&self, id: i64) -> Result<Option<TokenRow>> {
        let row = sqlx::query("SELECT * FROM join_tokens WHERE id = ?1")
            .bind(id)
            .fetch_optional(&self.readers)
            .await
            .during("read a join token")?;
        Ok(row.as_ref().map(token))
    }

    /// The companies that `scope` covers, by id; at most 1,000.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn companies(&self, scope: Scope) -> Result<Vec<Company>> {
        let only = match scope {
            Scope::All => None,
            Scope::Company(id) => Some(id.0),
        };
        let rows = sqlx::query("SELECT * FROM companies WHERE ?1 IS NULL OR id = ?1 ORDER BY id LIMIT 1000")
            .bind(only)
            .fetch_all(&self.readers)
            .await
            .during("list companies")?;
        Ok(rows.iter().map(company).collect())
    }

    /// An API key that was not taken back.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn api_key(&self, id: i64) -> Result<Option<ApiKeyRow>> {
        let row = sqlx::query("SELECT company_id, secret_sha256 FROM api_keys WHERE id = ?1 AND revoked_at_ms IS NULL")
            .bind(id)
            .fetch_optional(&self.readers)
            .await
            .during("read an API key")?;
        Ok(row.map(|row| ApiKeyRow {
            scope: row.get::<Option<i64>, _>(0).map_or(Scope::All, |id| Scope::Company(CompanyId(id))),
            secret_sha256: row.get(1),
        }))
    }
}
