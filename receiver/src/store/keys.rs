//! Keys of repositories, read back: for listings without what opens an open one, and one whole, inside of a transaction
//! whose commit needs an audit row.

use base64::Engine as _;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::{Change, During as _, Result, Store};
use crate::model::report::{EscrowedKey, KeptKey, RepositoryKey};
use crate::model::{ServerId, times};

impl Change {
    /// A repository's key.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn repository_key(&mut self, server: ServerId, repository_id: &str) -> Result<Option<RepositoryKey>> {
        let row = sqlx::query("SELECT * FROM repository_keys WHERE server_id = ?1 AND repository_id = ?2")
            .bind(server.0)
            .bind(repository_id)
            .fetch_optional(self.connection())
            .await
            .during("read a repository's key")?;
        Ok(row.map(|row| RepositoryKey {
            repository_id: repository_id.to_owned(),
            destination: row.get("destination"),
            // The table holds exactly one of the two.
            key: match row.get::<Option<Vec<u8>>, _>("wrapped") {
                Some(bytes) => EscrowedKey::Wrapped(bytes),
                None => EscrowedKey::Open(row.get::<Option<String>, _>("open").unwrap_or_default()),
            },
        }))
    }
}

impl Store {
    /// Keys of repositories of one server or of all, without what opens an open one.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn repository_keys(&self, server: Option<ServerId>) -> Result<Vec<KeptKey>> {
        let rows = sqlx::query(
            "SELECT server_id, repository_id, destination, wrapped, received_at_ms FROM repository_keys
             WHERE ?1 IS NULL OR server_id = ?1 ORDER BY server_id, destination, repository_id",
        )
        .bind(server.map(|id| id.0))
        .fetch_all(&self.readers)
        .await
        .during("list repositories' keys")?;
        Ok(rows.iter().map(kept).collect())
    }
}

fn kept(row: &SqliteRow) -> KeptKey {
    let wrapped: Option<Vec<u8>> = row.get("wrapped");
    KeptKey {
        server_id: row.get("server_id"),
        repository_id: row.get("repository_id"),
        destination: row.get("destination"),
        form: if wrapped.is_some() { "wrapped" } else { "open" },
        sha256: wrapped.as_deref().map(hestner_proto::sha256::hex),
        wrapped: wrapped.map(|bytes| base64::engine::general_purpose::STANDARD.encode(bytes)),
        received_at: times::rfc3339(row.get("received_at_ms")),
    }
}
