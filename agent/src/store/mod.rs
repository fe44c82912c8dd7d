//! The daemon's one SQLite file: outbox, inbox, schedule state and the list of runs.
//!
//! WAL with `synchronous = FULL`: what a call has returned from is on disk. The store never knows what
//! the bytes of a report mean; it numbers them, keeps them until they are acknowledged, and gives them back
//! in order. A change of a run and the report of it are one transaction, so that neither is ever without
//! the other.
//!
//! Format: `PRAGMA user_version` counts `MIGRATIONS`. Limits: [`OUTBOX_REPORTS_MAX`] reports. Recovery:
//! SQLite's own; a file that fails `quick_check` is not used and has to be moved away by a person, because
//! it may hold reports that nobody else has.

mod inbox;
mod outbox;
mod runs;
mod schedule;
mod waits;

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, TransactionBehavior};

pub use inbox::Outcome;
pub use outbox::{Entry, OUTBOX_REPORTS_MAX, look};
pub use runs::{RunRow, Unfinished};
pub use waits::{Wait, WaitRow};

/// One statement batch a version, in order; never changed once released.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE outbox (seq INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL) STRICT;
    CREATE TABLE inbox (
        directive_id TEXT PRIMARY KEY,
        received_at_ms INTEGER NOT NULL,
        expires_at_ms INTEGER NOT NULL,
        accepted INTEGER,
        code TEXT NOT NULL DEFAULT '',
        message TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE TABLE schedule (service TEXT PRIMARY KEY, last_due_ms INTEGER NOT NULL) STRICT;
    CREATE TABLE runs (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        run_uid TEXT NOT NULL UNIQUE,
        service TEXT NOT NULL,
        finished INTEGER NOT NULL DEFAULT 0,
        record TEXT NOT NULL
    ) STRICT;
    CREATE INDEX runs_unfinished ON runs (finished) WHERE finished = 0;
",
    "
    CREATE TABLE waits (
        run_uid TEXT PRIMARY KEY REFERENCES runs (run_uid) ON DELETE CASCADE,
        verb TEXT NOT NULL,
        since_ms INTEGER NOT NULL,
        expires_at_ms INTEGER NOT NULL,
        confirmed INTEGER NOT NULL DEFAULT 0
    ) STRICT;
",
];

/// The first SQLite without the WAL-reset corruption bug (<https://sqlite.org/wal.html#walresetbug>).
const SQLITE_VERSION_MIN: i32 = 3_051_003;

/// An operation on the store that failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite refused.
    #[error("cannot {operation} in the agent's store")]
    Sqlite {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: rusqlite::Error,
    },
    /// The file cannot be used.
    #[error("the agent's store {path} cannot be used: {reason}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The bound on reports is met.
    #[error("the outbox holds {OUTBOX_REPORTS_MAX} reports that the receiver has not acknowledged")]
    OutboxFull,
    /// The thread that works on the store ended.
    #[error("the agent is stopping")]
    Stopping,
}

impl StoreError {
    /// Whether there is no room, on disk or in the outbox.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Sqlite { source, .. } => source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            Self::OutboxFull => true,
            _ => false,
        }
    }
}

/// Names the operation of a failed call.
fn failed(operation: &'static str) -> impl FnOnce(rusqlite::Error) -> StoreError {
    move |source| StoreError::Sqlite { operation, source }
}

/// The store. Clones share one connection: there is one writer.
#[derive(Clone, Debug)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
    epoch: Arc<str>,
}

impl Store {
    /// Opens the file, or makes it with the given epoch.
    ///
    /// # Errors
    /// When the file cannot be opened or is damaged, or the linked SQLite is too old.
    pub fn open(path: &Path, new_epoch: &str) -> Result<Self, StoreError> {
        if rusqlite::version_number() < SQLITE_VERSION_MIN {
            let reason = format!("SQLite {} has a bug that can corrupt it; 3.51.3 is needed", rusqlite::version());
            return Err(StoreError::Unusable { path: path.to_owned(), reason });
        }
        // It may hold an open repository's key: SQLite alone would make it readable by everybody.
        let made = std::fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        made.map_err(|error| StoreError::Unusable { path: path.to_owned(), reason: error.to_string() })?;
        let mut connection = Connection::open(path).map_err(failed("open the file"))?;
        prepare(&connection).map_err(failed("set up the file"))?;
        let check: String =
            connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(failed("check the file"))?;
        if check != "ok" {
            return Err(StoreError::Unusable { path: path.to_owned(), reason: check });
        }
        migrate(&mut connection, path)?;
        let epoch = keep_epoch(&connection, new_epoch).map_err(failed("read the epoch"))?;
        Ok(Self { connection: Arc::new(Mutex::new(connection)), epoch: epoch.into() })
    }

    /// Random number of this file: with a report's number it names the report.
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Runs one operation on a thread of its own, because each commit waits for the disk.
    ///
    /// # Errors
    /// Those of the operation.
    pub async fn call<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.connection);
        let work = move || operation(&mut connection.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(work).await.map_err(|_| StoreError::Stopping)?
    }
}

fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(std::time::Duration::from_secs(10))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    // The cache of a spool that is read once and in order has no use beyond this (KiB, negative by SQLite's rule).
    connection.pragma_update(None, "cache_size", -512)?;
    connection.pragma_update(None, "foreign_keys", true)
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let found: usize =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(failed("read the version"))?;
    let Some(missing) = MIGRATIONS.get(found..) else {
        let reason = format!("it was written by a newer agent (format {found}, this agent knows {})", MIGRATIONS.len());
        return Err(StoreError::Unusable { path: path.to_owned(), reason });
    };
    for (step, batch) in missing.iter().enumerate() {
        let migrated = (|| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(batch)?;
            transaction.pragma_update(None, "user_version", found + step + 1)?;
            transaction.commit()
        })();
        migrated.map_err(failed("migrate the file"))?;
    }
    Ok(())
}

fn keep_epoch(connection: &Connection, new_epoch: &str) -> rusqlite::Result<String> {
    connection.execute("INSERT OR IGNORE INTO meta (key, value) VALUES ('epoch', ?1)", [new_epoch])?;
    connection.query_row("SELECT value FROM meta WHERE key = 'epoch'", [], |row| row.get(0))
}

#[cfg(test)]
mod tests;
