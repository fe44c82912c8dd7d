//! The embedded SQLite store: every row that must outlive the process.
//!
//! One connection writes, under `BEGIN IMMEDIATE`, and a small pool reads, so that readers never wait for
//! the writer and the writer never for an upgrade (WAL, `synchronous=FULL`). The single writer is also the
//! lock of everything that must not happen twice at once. [`Change`] is a write that a person or the centre
//! causes: it cannot be committed without its audit row. [`Tx`] alone is for what hosts report.
//!
//! No SQL stands outside this module, and it knows nothing of HTTP, gRPC or certificates.

pub mod audit;
pub mod companies;
pub mod directives;
pub mod keys;
pub mod ledger;
pub mod policies;
pub mod reports;
pub mod runs;
pub mod samples;
pub mod servers;

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Sqlite, SqliteConnection, SqlitePool, Transaction};

use crate::model::{Actor, CompanyId};
use crate::platform::files;

/// Name of the database's file in the state folder.
pub const FILE_NAME: &str = "receiver.db";
/// Name of the file that keeps two first starts apart. SQLite's own locks do not: those of a migration end with
/// each statement, and the change to the write-ahead log answers "locked" at once instead of waiting its turn
/// (<https://sqlite.org/c3ref/busy_handler.html>: no busy handler where two would wait for each other).
const LOCK_FILE: &str = "store.lock";
/// Oldest SQLite without the WAL-reset corruption bug (<https://sqlite.org/wal.html#walresetbug>).
const SQLITE_VERSION_MIN: (u32, u32, u32) = (3, 51, 3);
/// Readers at once; more only fight for the same pages.
const READERS_MAX: u32 = 4;
/// How long a write waits for another process (the command line beside a running `serve`).
const BUSY_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a task waits for a connection of this process.
const ACQUIRE_TIME_MAX: Duration = Duration::from_secs(20);

/// A store operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or made.
    #[error("cannot open the store {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        #[source]
        source: sqlx::Error,
    },
    /// The file cannot be made, or made private.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The schema cannot be brought up to date.
    #[error("cannot migrate the store; was it written by a newer receiver?")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// The linked SQLite has a bug that loses data.
    #[error("SQLite {version} is older than 3.51.3, which is the first that does not corrupt its write-ahead log")]
    TooOld {
        /// The version found.
        version: String,
    },
    /// A statement failed.
    #[error("the store could not {operation}")]
    Statement {
        /// What it was to do.
        operation: &'static str,
        /// What SQLite said.
        #[source]
        source: sqlx::Error,
    },
    /// A row holds something this version cannot read.
    #[error("the store holds a {what} that cannot be read: {text}")]
    Unreadable {
        /// What it should be.
        what: &'static str,
        /// What it is.
        text: String,
    },
}

/// SQLite's code for "database or disk is full" (<https://sqlite.org/rescode.html#full>).
const SQLITE_FULL: &str = "13";

impl Error {
    /// Whether there is no room on the disk.
    pub fn is_full(&self) -> bool {
        let source = match self {
            Self::Open { source, .. } | Self::Statement { source, .. } => source,
            Self::Migrate(sqlx::migrate::MigrateError::Execute(source)) => source,
            _ => return false,
        };
        source.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == SQLITE_FULL)
    }
}

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the operation that an error of sqlx belongs to.
trait During<T> {
    fn during(self, operation: &'static str) -> Result<T>;
}

impl<T> During<T> for std::result::Result<T, sqlx::Error> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|source| Error::Statement { operation, source })
    }
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
}

/// A write transaction for what hosts report. Dropped without commit, it never happened.
#[derive(Debug)]
pub struct Tx(Transaction<'static, Sqlite>);

/// A write transaction of a person or the centre; its commit needs an audit row.
#[derive(Debug)]
pub struct Change {
    tx: Tx,
    actor: Actor,
    now_ms: i64,
}

impl Store {
    /// Opens the store in `state_dir`, making and migrating it if need be.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::TooOld`] or [`Error::Migrate`].
    pub async fn open(state_dir: &Path) -> Result<Self> {
        let path = state_dir.join(FILE_NAME);
        // It holds hashes of secrets and escrowed keys; SQLite gives its log files the same mode.
        files::make_private_file(&path)?;
        let _lock = lock(state_dir.join(LOCK_FILE)).await?;
        let opened = |source| Error::Open { path: path.clone(), source };
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIME_MAX);
        let pool = || SqlitePoolOptions::new().acquire_timeout(ACQUIRE_TIME_MAX);
        let writer = pool().max_connections(1).connect_with(options.clone()).await.map_err(opened)?;
        check_version(&writer).await?;
        sqlx::migrate!("./migrations").run(&writer).await.map_err(Error::Migrate)?;
        let readers =
            pool().max_connections(READERS_MAX).connect_with(options.read_only(true)).await.map_err(opened)?;
        Ok(Self { writer, readers })
    }

    /// Begins a write of what a host reported.
    ///
    /// # Errors
    /// When the writer is not free in time.
    pub async fn begin(&self) -> Result<Tx> {
        self.writer.begin_with("BEGIN IMMEDIATE").await.map(Tx).during("begin a write")
    }

    /// Begins a write that `actor` causes.
    ///
    /// # Errors
    /// When the writer is not free in time.
    pub async fn change(&self, actor: Actor, now_ms: i64) -> Result<Change> {
        Ok(Change { tx: self.begin().await?, actor, now_ms })
    }

    /// Closes all connections after a checkpoint.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

async fn lock(path: PathBuf) -> Result<files::Lock> {
    let named = path.clone();
    // Whoever holds it may be a task of this very thread, so waiting for it must not block the thread.
    let locked = tokio::task::spawn_blocking(move || files::lock(&named)).await;
    Ok(locked.map_err(|error| files::Error::Write { path, source: std::io::Error::other(error) }).flatten()?)
}

async fn check_version(pool: &SqlitePool) -> Result<()> {
    let version: String =
        sqlx::query_scalar("SELECT sqlite_version()").fetch_one(pool).await.during("ask its version")?;
    let mut parts = version.split('.').map(|part| part.parse().unwrap_or(0_u32));
    let mut next = || parts.next().unwrap_or(0);
    if (next(), next(), next()) < SQLITE_VERSION_MIN { Err(Error::TooOld { version }) } else { Ok(()) }
}

impl Tx {
    fn connection(&mut self) -> &mut SqliteConnection {
        &mut self.0
    }

    /// Writes that the writer lives, so that the commit is one that needs the disk.
    ///
    /// # Errors
    /// When the row cannot be written.
    pub async fn beat_pulse(&mut self, now_ms: i64) -> Result<()> {
        sqlx::query("UPDATE worker_pulse SET at_ms = ?1")
            .bind(now_ms)
            .execute(self.connection())
            .await
            .during("write its pulse")?;
        Ok(())
    }

    /// Makes everything of this transaction durable.
    ///
    /// # Errors
    /// When the commit fails; then nothing of it happened.
    pub async fn commit(self) -> Result<()> {
        self.0.commit().await.during("commit")
    }
}

impl Change {
    /// When it happens.
    pub fn now_ms(&self) -> i64 {
        self.now_ms
    }

    /// Writes the audit row and commits both.
    ///
    /// # Errors
    /// When either fails; then nothing of it happened.
    pub async fn commit(
        mut self,
        company: Option<CompanyId>,
        action: &'static str,
        subject: String,
        details: serde_json::Value,
    ) -> Result<()> {
        let entry =
            audit::Entry { at_ms: self.now_ms, actor: self.actor.to_string(), company, action, subject, details };
        self.tx.append_audit(entry).await?;
        self.tx.commit().await
    }
}

impl Deref for Change {
    type Target = Tx;
    fn deref(&self) -> &Tx {
        &self.tx
    }
}

impl DerefMut for Change {
    fn deref_mut(&mut self) -> &mut Tx {
        &mut self.tx
    }
}

#[cfg(test)]
mod tests {
    use sqlx::Executor as _;

    use super::*;

    #[tokio::test]
    async fn a_change_that_is_dropped_never_happened() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut change = store.change(Actor::Receiver, 1).await.expect("begun");
        change.add_company("acme", "age1x", "sha256:x", 1).await.expect("inserted");
        drop(change);
        assert_eq!(store.companies(crate::model::Scope::All).await.expect("read").len(), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn first_starts_at_once_make_one_store() {
        for _ in 0..5 {
            let folder = tempfile::tempdir().expect("a folder");
            let mut starts = tokio::task::JoinSet::new();
            for _ in 0..4 {
                let path = folder.path().to_owned();
                starts.spawn(async move { Store::open(&path).await.map(|_| ()) });
            }
            for start in starts.join_all().await {
                start.expect("opened");
            }
        }
    }

    #[tokio::test]
    async fn the_file_and_its_logs_are_readable_by_their_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        tx.add_company("acme", "age1x", "sha256:x", 1).await.expect("inserted");
        tx.commit().await.expect("committed");
        for name in ["receiver.db", "receiver.db-wal"] {
            let mode = std::fs::metadata(folder.path().join(name)).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
    }

    #[tokio::test]
    async fn a_disk_that_is_full_is_told_from_other_failures() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        // SQLite answers the same when its file may not grow as when the disk is full.
        sqlx::query("PRAGMA max_page_count = 1").execute(tx.connection()).await.expect("set");
        let name = "x".repeat(1_000_000);
        let refused = tx.add_company(&name, "age1x", "sha256:x", 1).await.expect_err("no room");
        assert!(refused.is_full(), "{refused:?}");
        let other = store.readers.execute("nonsense").await.during("test").expect_err("no SQL");
        assert!(!other.is_full());
    }

    #[tokio::test]
    async fn the_ledger_cannot_be_changed_or_shortened() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(folder.path()).await.expect("opened");
        let mut tx = store.begin().await.expect("begun");
        for statement in [
            "PRAGMA defer_foreign_keys = ON",
            "INSERT INTO cost_ledger (server_id, ref_date, amount, currency, source, metadata_json, booked_at_ms) VALUES (1, '', '0', 'EUR', '', '', 0)",
        ] {
            sqlx::query(statement).execute(tx.connection()).await.expect("fine");
        }
        for statement in ["UPDATE cost_ledger SET amount = '1'", "DELETE FROM cost_ledger"] {
            let refused = sqlx::query(statement).execute(tx.connection()).await.expect_err("append-only");
            assert!(refused.to_string().contains("append-only"), "{refused}");
        }
    }
}
