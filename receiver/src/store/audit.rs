//! The audit log: who did what, chained by hash.
//!
//! Each row's hash covers the row and the hash before it, so a row that is changed, taken out or put in
//! later breaks the chain from there on. It does not stop somebody who rewrites the whole file; a hash that
//! is kept elsewhere does. Rows are written only inside the transaction of what they tell of.

use sqlx::Row as _;

use super::{During as _, Result, Store, Tx};
use crate::model::CompanyId;

/// A row to be written.
#[derive(Clone, Debug)]
pub struct Entry {
    /// When.
    pub at_ms: i64,
    /// Who, as [`crate::model::Actor`] writes itself.
    pub actor: String,
    /// Whose data; none for the receiver's own.
    pub company: Option<CompanyId>,
    /// What was done, such as `company_added`.
    pub action: &'static str,
    /// To what, such as `company:3`.
    pub subject: String,
    /// The particulars; never a secret.
    pub details: serde_json::Value,
}

/// What stands between a chain that holds and one that does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// So many rows, each with the hash it must have, and the last of the hashes.
    Whole {
        /// How many.
        rows: u64,
        /// The last hash; kept elsewhere, it proves that nothing was rewritten.
        last_hash: String,
    },
    /// The first row that does not fit.
    Broken {
        /// The row.
        id: i64,
    },
}

/// Hash of the row before the first.
const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Fields are joined as a JSON array, so that no two rows have one text.
fn hash(
    previous: &str,
    at_ms: i64,
    actor: &str,
    company: Option<i64>,
    action: &str,
    subject: &str,
    details: &str,
) -> String {
    let text = serde_json::json!([previous, at_ms, actor, company, action, subject, details]).to_string();
    hestner_proto::sha256::hex(text.as_bytes())
}

impl Tx {
    /// Appends a row to the chain.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn append_audit(&mut self, entry: Entry) -> Result<()> {
        let previous: Option<String> = sqlx::query_scalar("SELECT hash FROM audit ORDER BY id DESC LIMIT 1")
            .fetch_optional(self.connection())
            .await
            .during("read the audit log")?;
        let previous = previous.unwrap_or_else(|| GENESIS.to_owned());
        let details = entry.details.to_string();
        let company = entry.company.map(|id| id.0);
        let hash = hash(&previous, entry.at_ms, &entry.actor, company, entry.action, &entry.subject, &details);
        sqlx::query(
            "INSERT INTO audit (at_ms, actor, company_id, action, subject, details_json, previous_hash, hash)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )
        .bind(entry.at_ms)
        .bind(&entry.actor)
        .bind(company)
        .bind(entry.action)
        .bind(&entry.subject)
        .bind(&details)
        .bind(&previous)
        .bind(&hash)
        .execute(self.connection())
        .await
        .during("write the audit log")?;
        Ok(())
    }
}

impl Store {
    /// Recomputes the whole chain.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn verify_audit(&self) -> Result<Verdict> {
        let mut previous = GENESIS.to_owned();
        let (mut rows, mut last_id) = (0, 0_i64);
        loop {
            // In pages: the log only grows.
            let page = sqlx::query("SELECT * FROM audit WHERE id > ?1 ORDER BY id LIMIT 500")
                .bind(last_id)
                .fetch_all(&self.readers)
                .await
                .during("read the audit log")?;
            if page.is_empty() {
                return Ok(Verdict::Whole { rows, last_hash: previous });
            }
            for row in page {
                let id: i64 = row.get("id");
                let expected = hash(
                    &previous,
                    row.get("at_ms"),
                    row.get("actor"),
                    row.get("company_id"),
                    row.get("action"),
                    row.get("subject"),
                    row.get("details_json"),
                );
                let stored: String = row.get("hash");
                if stored != expected || row.get::<String, _>("previous_hash") != previous {
                    return Ok(Verdict::Broken { id });
                }
                (previous, last_id, rows) = (stored, id, rows + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Actor;

    async fn with_three_rows() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        for name in ["a", "b", "c"] {
            let change = store.change(Actor::Cli("test".into()), 7).await.expect("begun");
            change.commit(None, "tried", name.into(), serde_json::json!({"n": 1})).await.expect("committed");
        }
        (folder, store)
    }

    #[tokio::test]
    async fn a_chain_that_nobody_touched_verifies() {
        let (_folder, store) = with_three_rows().await;
        assert!(matches!(store.verify_audit().await, Ok(Verdict::Whole { rows: 3, .. })));
    }

    #[tokio::test]
    async fn a_row_that_is_changed_or_taken_out_is_found() {
        for (statement, broken) in [
            ("UPDATE audit SET actor = 'cli:other' WHERE id = 2", 2),
            ("UPDATE audit SET company_id = 1 WHERE id = 1", 1),
            ("DELETE FROM audit WHERE id = 2", 3),
        ] {
            let (_folder, store) = with_three_rows().await;
            sqlx::query(statement).execute(&store.writer).await.expect("changed");
            assert_eq!(store.verify_audit().await.expect("read"), Verdict::Broken { id: broken }, "{statement}");
        }
    }
}
