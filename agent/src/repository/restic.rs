//! Drives stock restic by its JSON output.
//!
//! Tried on restic 0.14 and handled here: exit code 3 means that it committed although it could not read
//! everything; a missing path beside a good one still exits with 0 (callers look at paths themselves);
//! errors of entries are JSON lines on its error output, sometimes with an errno and sometimes with an
//! empty object; names that are not UTF-8 come with U+FFFD in them; units have no HOME, so the cache
//! folder is always named.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};

use super::UNREADABLE_NAMES_MAX;
use super::errors::{EntryErrors, RepositoryError};
use super::{Input, Job, Location, Progress, Snapshot};
use crate::platform::command::{End, Limits, Output, Program, Streams, printable};
use crate::platform::files;

/// Exit code of a backup that committed although entries could not be read.
const EXIT_PARTIAL: i32 = 3;
/// How long a command that only looks may take.
const LOOK: Limits = Limits { timeout: Duration::from_secs(300), output_bytes_max: 64 * 1024 * 1024 };
/// How long a command that moves data may take; the run's own limit is shorter.
const WORK: Limits = Limits { timeout: Duration::from_secs(48 * 3600), output_bytes_max: 1024 * 1024 };
/// Below so much room restic gets no cache.
const CACHE_FREE_BYTES_MIN: u64 = 4 * 1024 * 1024;
/// Lines of complaints that are kept for a message.
const COMPLAINTS_KEPT: usize = 20;
/// Longest line of restic's that is looked at; a status line names the files in work.
const LINE_BYTES_MAX: usize = 1024 * 1024;
/// Pause between two tries for a lock.
pub(super) const LOCK_PAUSE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug)]
pub(super) struct Restic {
    program: Program,
    program_name: String,
    password_file: PathBuf,
    folder: PathBuf,
    lock_wait: Duration,
}

/// Whether to remove data that nothing uses any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prune {
    No,
    Yes,
}

/// How a backup ended that restic did not call a failure.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// Eight digits.
    pub(super) snapshot_id: Option<String>,
    pub(super) partial: bool,
    pub(super) errors: EntryErrors,
    pub(super) bytes_read: u64,
    pub(super) files: u64,
}

/// A lock file's content, as far as it matters.
#[derive(Debug, Deserialize)]
pub(super) struct LockFile {
    pub(super) hostname: String,
    pub(super) pid: i32,
}

#[derive(Deserialize)]
#[serde(tag = "message_type", rename_all = "snake_case")]
enum Line {
    Status {
        #[serde(default)]
        seconds_remaining: u32,
        #[serde(default)]
        total_files: u64,
        #[serde(default)]
        files_done: u64,
        #[serde(default)]
        total_bytes: u64,
        #[serde(default)]
        bytes_done: u64,
    },
    Summary {
        total_files_processed: u64,
        total_bytes_processed: u64,
        snapshot_id: String,
    },
    Error {
        #[serde(default)]
        error: serde_json::Value,
        #[serde(default)]
        during: String,
        #[serde(default)]
        item: String,
    },
    #[serde(other)]
    Unknown,
}

/// Where restic keeps its cache, if there is room: with none it tries again and again for a quarter of an hour
/// to write there, while all it was asked for is to remove something.
fn cache(folder: &Path) -> Vec<OsString> {
    let room = folder.ancestors().find_map(|above| files::free_bytes(above).ok());
    match room {
        Some(free) if free < CACHE_FREE_BYTES_MIN => vec!["--no-cache".into()],
        _ => vec!["--cache-dir".into(), folder.into()],
    }
}

impl Restic {
    pub(super) fn new(location: &Location) -> Self {
        let program = Program::new(&location.restic)
            .args(["--json", "--repo"])
            .arg(location.path())
            .arg("--password-file")
            .arg(location.password_file())
            .args(cache(&location.cache))
            .env("RESTIC_PROGRESS_FPS", "2");
        // The kernel shows 15 bytes of a program's name.
        let name =
            location.restic.file_name().map(|n| n.to_string_lossy().chars().take(15).collect()).unwrap_or_default();
        Self {
            program,
            program_name: name,
            password_file: location.password_file(),
            folder: location.folder.clone(),
            lock_wait: Duration::from_secs(location.lock_wait_seconds),
        }
    }

    pub(super) fn program_name(&self) -> &str {
        &self.program_name
    }

    pub(super) async fn init(&self) -> Result<(), RepositoryError> {
        self.run("make the repository", &["init"], LOOK).await.map(drop)
    }

    /// The repository's id.
    pub(super) async fn id(&self) -> Result<String, RepositoryError> {
        #[derive(Deserialize)]
        struct Config {
            id: String,
        }
        let output = self.run("open the repository", &["cat", "config"], LOOK).await?;
        parse::<Config>("open the repository", &output.stdout).map(|config| config.id)
    }

    pub(super) async fn lock(&self, id: &str) -> Result<LockFile, RepositoryError> {
        let output = self.run("look at a lock", &["--no-lock", "cat", "lock", id], LOOK).await?;
        parse("look at a lock", &output.stdout)
    }

    pub(super) async fn snapshots(&self) -> Result<Vec<Snapshot>, RepositoryError> {
        #[derive(Deserialize)]
        struct Listed {
            id: String,
            time: DateTime<Utc>,
            #[serde(default)]
            tags: Vec<String>,
        }
        let output = self.run("list snapshots", &["--no-lock", "snapshots"], LOOK).await?;
        let listed: Vec<Listed> = parse("list snapshots", &output.stdout)?;
        let tag =
            |tags: &[String], key: &str| tags.iter().find_map(|t| t.strip_prefix(key)).unwrap_or_default().to_owned();
        let snapshot = |l: Listed| Snapshot {
            run_uid: tag(&l.tags, "run="),
            service: tag(&l.tags, "service="),
            id: l.id,
            time: l.time,
        };
        Ok(listed.into_iter().map(snapshot).collect())
    }

    pub(super) async fn forget(&self, ids: &[String], prune: Prune) -> Result<(), RepositoryError> {
        if ids.is_empty() {
            return Ok(());
        }
        let mut arguments = vec!["forget"];
        if prune == Prune::Yes {
            arguments.push("--prune");
        }
        arguments.extend(ids.iter().map(String::as_str));
        self.run_when_unlocked("remove snapshots", &arguments).await
    }

    /// Backs up, following the JSON lines; `cancelled` kills restic.
    pub(super) async fn backup(
        &self,
        job: &Job,
        stream: Option<OwnedFd>,
        cancelled: impl Future<Output = ()>,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<Ended, RepositoryError> {
        let stdin = stream.map_or_else(Stdio::null, Stdio::from);
        let program = self.backup_program(job);
        let streams = Streams { stdin, stdout: Stdio::piped(), stderr: Stdio::piped() };
        let mut child = program.spawn(streams, End::WithParent, &[])?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let mut ended = Ended::default();
        let mut errors = Errors::default();
        let follow = async {
            tokio::join!(
                read_lines(stdout, |line| match serde_json::from_str(line) {
                    Ok(Line::Status { seconds_remaining, total_files, files_done, total_bytes, bytes_done }) =>
                        on_progress(Progress {
                            bytes_done,
                            bytes_total: total_bytes,
                            files_done,
                            files_total: total_files,
                            seconds_remaining
                        }),
                    Ok(Line::Summary { total_files_processed, total_bytes_processed, snapshot_id }) => {
                        ended.snapshot_id = Some(snapshot_id);
                        ended.bytes_read = total_bytes_processed;
                        ended.files = total_files_processed;
                    }
                    _ => {}
                }),
                read_lines(stderr, |line| errors.take(line)),
            );
            child.wait().await
        };
        let status = tokio::select! {
            status = follow => status,
            () = cancelled => return Err(self.kill(child).await),
        };
        let status = status.map_err(|source| RepositoryError::Surprise(format!("cannot wait for restic: {source}")))?;
        ended.partial = status.code() == Some(EXIT_PARTIAL);
        if !status.success() && !ended.partial {
            return Err(self.explain("store the data", status, &errors.complaints.join("; ")));
        }
        ended.errors = errors.entries;
        Ok(ended)
    }

    /// Only after restic is gone may whoever feeds its input close it: at the end of its input it commits.
    async fn kill(&self, mut child: tokio::process::Child) -> RepositoryError {
        match child.kill().await {
            Ok(()) => RepositoryError::Cancelled,
            Err(source) => RepositoryError::Surprise(format!("cannot kill restic: {source}")),
        }
    }

    fn backup_program(&self, job: &Job) -> Program {
        let tags = format!("run={},service={}", job.run_uid, job.service);
        let program = self.program.clone().args(["backup", "--tag", &tags]);
        match &job.input {
            Input::Files { paths, exclude, one_file_system, .. } => {
                let program = exclude.iter().fold(program, |p, pattern| p.arg("--exclude").arg(pattern));
                let program = if *one_file_system { program.arg("--one-file-system") } else { program };
                program.arg("--").args(paths)
            }
            Input::Stream { file_name } => program.args(["--stdin", "--stdin-filename", file_name]),
        }
    }

    async fn run(
        &self,
        operation: &'static str,
        arguments: &[&str],
        limits: Limits,
    ) -> Result<Output, RepositoryError> {
        let output = self.program.clone().args(arguments).run(b"", limits).await?;
        self.judge(operation, output)
    }

    /// Another user's lock is waited for, because restic itself gives up at once.
    async fn run_when_unlocked(&self, operation: &'static str, arguments: &[&str]) -> Result<(), RepositoryError> {
        let give_up = tokio::time::Instant::now() + self.lock_wait;
        loop {
            match self.run(operation, arguments, WORK).await {
                Err(RepositoryError::Locked(_)) if tokio::time::Instant::now() < give_up => {
                    tokio::time::sleep(LOCK_PAUSE).await
                }
                other => return other.map(drop),
            }
        }
    }

    fn judge(&self, operation: &'static str, output: Output) -> Result<Output, RepositoryError> {
        if output.status.success() {
            Ok(output)
        } else {
            Err(self.explain(operation, output.status, &output.complaint()))
        }
    }

    fn explain(&self, operation: &'static str, status: ExitStatus, complaint: &str) -> RepositoryError {
        use std::os::unix::process::ExitStatusExt as _;
        if let Some(signal) = status.signal() {
            return RepositoryError::Killed { operation, signal };
        }
        if complaint.contains("wrong password or no key found") {
            return RepositoryError::WrongKey(self.password_file.clone());
        }
        if complaint.contains("no space left on device") || complaint.contains("disk quota exceeded") {
            return RepositoryError::Full(self.folder.clone());
        }
        if complaint.contains("already locked") || complaint.contains("unable to create lock") {
            return RepositoryError::Locked(complaint.to_owned());
        }
        RepositoryError::Failed { operation, complaint: complaint.to_owned() }
    }
}

fn parse<T: for<'de> Deserialize<'de>>(operation: &'static str, bytes: &[u8]) -> Result<T, RepositoryError> {
    serde_json::from_slice(bytes)
        .map_err(|error| RepositoryError::Failed { operation, complaint: format!("unexpected output: {error}") })
}

/// Collects what restic complains about.
#[derive(Debug, Default)]
struct Errors {
    entries: EntryErrors,
    seen: std::collections::BTreeSet<String>,
    complaints: Vec<String>,
}

impl Errors {
    fn take(&mut self, line: &str) {
        let Ok(Line::Error { error, during, item }) = serde_json::from_str(line) else {
            if self.complaints.len() < COMPLAINTS_KEPT {
                self.complaints.push(printable(line.as_bytes()));
            }
            return;
        };
        // The scan only estimates; what it stumbles over, archiving stumbles over as well. An entry can be
        // reported twice; past the bound it may be counted twice, never missed.
        let repeated = self.seen.len() < 10_000 && !self.seen.insert(item.clone());
        if during == "scan" && !item.is_empty() {
            self.seen.remove(&item);
            return;
        }
        if repeated {
            return;
        }
        if has_vanished(&error, &item) {
            self.entries.vanished += 1;
        } else {
            self.entries.unreadable += 1;
            if self.entries.names.len() < UNREADABLE_NAMES_MAX {
                self.entries.names.push(printable(item.as_bytes()));
            }
        }
    }
}

/// Whether an entry went away, rather than being there and unreadable. In doubt it was unreadable: a name
/// that is not UTF-8 reaches us with U+FFFD in it and would never be found.
fn has_vanished(error: &serde_json::Value, item: &str) -> bool {
    match error.get("Err").and_then(serde_json::Value::as_i64) {
        Some(errno) => errno == i64::from(nix::libc::ENOENT),
        None if item.contains('\u{FFFD}') => false,
        None => matches!(Path::new(item).symlink_metadata(), Err(e) if e.kind() == std::io::ErrorKind::NotFound),
    }
}

/// Reads lines to the end; a longer one than the bound is cut, not kept in memory.
pub(super) async fn read_lines(stream: Option<impl AsyncRead + Unpin>, mut on_line: impl FnMut(&str)) {
    let Some(stream) = stream else { return };
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        let Ok(available) = reader.fill_buf().await else { return };
        if available.is_empty() {
            break;
        }
        let end = available.iter().position(|b| *b == b'\n');
        let taken = end.map_or(available.len(), |at| at + 1);
        let room = LINE_BYTES_MAX.saturating_sub(line.len());
        line.extend_from_slice(&available[..taken.min(room)]);
        reader.consume(taken);
        if end.is_some() {
            on_line(String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
    }
    if !line.is_empty() {
        on_line(String::from_utf8_lossy(&line).trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(lines: &[&str]) -> EntryErrors {
        let mut errors = Errors::default();
        lines.iter().for_each(|line| errors.take(line));
        errors.entries
    }

    #[test]
    fn entry_with_an_errno_is_judged_by_it() {
        let entries = taken(&[
            r#"{"message_type":"error","error":{"Op":"open","Path":"a","Err":13},"during":"archival","item":"/no/such/a"}"#,
            r#"{"message_type":"error","error":{"Op":"lstat","Path":"b","Err":2},"during":"archival","item":"/etc"}"#,
        ]);
        assert_eq!((entries.unreadable, entries.vanished), (1, 1));
        assert_eq!(entries.names, ["/no/such/a"]);
    }

    #[test]
    fn entry_without_an_errno_vanished_only_if_it_is_not_there_now() {
        let error =
            |item: &str| format!(r#"{{"message_type":"error","error":{{}},"during":"archival","item":"{item}"}}"#);
        let entries = taken(&[&error("/etc"), &error("/no/such/b"), &error("/no/such/\u{FFFD}")]);
        assert_eq!((entries.unreadable, entries.vanished), (2, 1));
    }

    #[test]
    fn entry_that_is_reported_twice_counts_once_and_the_scan_not_at_all() {
        let scan = r#"{"message_type":"error","error":{},"during":"scan","item":"/etc"}"#;
        let archival = r#"{"message_type":"error","error":{},"during":"archival","item":"/etc"}"#;
        assert_eq!(taken(&[scan, archival, archival, scan]).unreadable, 1);
    }

    #[tokio::test]
    async fn line_without_an_end_is_seen_and_a_huge_one_is_cut() {
        let mut seen = Vec::new();
        let long = "x".repeat(LINE_BYTES_MAX + 10);
        read_lines(Some(format!("a\n{long}\nb").as_bytes()), |line| seen.push(line.len())).await;
        assert_eq!(seen, [1, LINE_BYTES_MAX, 1]);
    }
}
