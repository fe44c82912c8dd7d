//! The spool of reports: numbered from 1, kept until acknowledged, given back in order.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Transaction, params};

use super::{Store, StoreError, failed};

/// Most reports that wait for the receiver. At one run a minute, which makes three reports, the bound is met
/// after 23 days without it; then new runs are refused (`state_full`), because a result that could not
/// be kept would be a result lost.
pub const OUTBOX_REPORTS_MAX: u64 = 100_000;

/// How long a look waits for the daemon.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);

/// A report and its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Number within the epoch, from 1, without gaps.
    pub seq: u64,
    /// What was appended.
    pub body: Vec<u8>,
}

impl Store {
    /// Appends a report.
    ///
    /// # Errors
    /// [`StoreError::OutboxFull`], or when the disk has no room.
    pub async fn append(&self, body: Vec<u8>) -> Result<u64, StoreError> {
        self.call(move |connection| {
            check_room(connection)?;
            let transaction = connection.transaction().map_err(failed("append a report"))?;
            let seq = append(&transaction, &body)?;
            transaction.commit().map_err(failed("append a report"))?;
            Ok(seq)
        })
        .await
    }

    /// The first `limit` reports after number `after`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn entries_after(&self, after: u64, limit: usize) -> Result<Vec<Entry>, StoreError> {
        self.call(move |connection| {
            let read = || -> rusqlite::Result<Vec<Entry>> {
                let mut statement =
                    connection.prepare_cached("SELECT seq, body FROM outbox WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
                statement
                    .query_map(params![after, limit], |row| Ok(Entry { seq: row.get(0)?, body: row.get(1)? }))?
                    .collect()
            };
            read().map_err(failed("read reports"))
        })
        .await
    }

    /// Forgets every report up to and including `seq`: the receiver has committed them.
    ///
    /// # Errors
    /// When the file cannot be written; the reports are then sent again, which does no harm.
    pub async fn acknowledge(&self, seq: u64) -> Result<(), StoreError> {
        self.call(move |connection| {
            connection.execute("DELETE FROM outbox WHERE seq <= ?1", [seq]).map(drop).map_err(failed("forget reports"))
        })
        .await
    }

    /// Number of the last report that was acknowledged; 0 if none was.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn acknowledged(&self) -> Result<u64, StoreError> {
        self.call(|connection| {
            let sql = "SELECT coalesce((SELECT min(seq) - 1 FROM outbox), (SELECT seq FROM sqlite_sequence WHERE name = 'outbox'), 0)";
            connection.query_row(sql, [], |row| row.get(0)).map_err(failed("read the outbox"))
        })
        .await
    }

    /// Appends a report unless one with the same mark was appended before, acknowledged or not.
    ///
    /// # Errors
    /// When the disk has no room. Not bounded: there is one mark a repository.
    pub async fn append_once(&self, mark: String, body: Vec<u8>) -> Result<(), StoreError> {
        self.call(move |connection| {
            let transaction = connection.transaction().map_err(failed("append a report"))?;
            let sql = "INSERT OR IGNORE INTO meta (key, value) VALUES (?1, '')";
            if transaction.execute(sql, [format!("once:{mark}")]).map_err(failed("append a report"))? == 1 {
                append(&transaction, &body)?;
            }
            transaction.commit().map_err(failed("append a report"))
        })
        .await
    }

    /// How many reports wait.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub async fn waiting(&self) -> Result<u64, StoreError> {
        self.call(|connection| waiting(connection)).await
    }

    /// Whether the outbox could take the reports of one more run.
    ///
    /// # Errors
    /// [`StoreError::OutboxFull`], or when the file cannot be read.
    pub async fn check_room(&self) -> Result<(), StoreError> {
        self.call(|connection| check_room(connection)).await
    }
}

/// Looks into the store of a daemon that may be running: gives each report that waits to `each`, and returns the marks of
/// [`Store::append_once`]. Changes nothing. A mark whose report does not wait any more was acknowledged.
///
/// # Errors
/// When there is no such file, or it cannot be read.
pub fn look(path: &Path, mut each: impl FnMut(&[u8])) -> Result<BTreeSet<String>, StoreError> {
    // Not read-only: a log that the daemon has not written back yet could not be read then.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut read = || -> rusqlite::Result<BTreeSet<String>> {
        let mut connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(LOOK_TIMEOUT)?;
        // One moment: a report that is acknowledged in between is neither lost nor waiting.
        let moment = connection.transaction()?;
        let marks = moment
            .prepare("SELECT substr(key, 6) FROM meta WHERE key LIKE 'once:%'")?
            .query_map([], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        let mut reports = moment.prepare("SELECT body FROM outbox")?;
        let mut rows = reports.query([])?;
        while let Some(row) = rows.next()? {
            each(row.get_ref(0)?.as_blob()?);
        }
        Ok(marks)
    };
    read().map_err(failed("look"))
}

fn waiting(connection: &Connection) -> Result<u64, StoreError> {
    connection.query_row("SELECT count(*) FROM outbox", [], |row| row.get(0)).map_err(failed("count reports"))
}

fn check_room(connection: &Connection) -> Result<(), StoreError> {
    if waiting(connection)? >= OUTBOX_REPORTS_MAX { Err(StoreError::OutboxFull) } else { Ok(()) }
}

/// Appends within a transaction of the caller. Not bounded: the caller has checked before the work began
/// whose result this is.
pub(super) fn append(transaction: &Transaction<'_>, body: &[u8]) -> Result<u64, StoreError> {
    let inserted = transaction.execute("INSERT INTO outbox (body) VALUES (?1)", [body]);
    inserted.map_err(failed("append a report"))?;
    Ok(transaction.last_insert_rowid().unsigned_abs())
}
