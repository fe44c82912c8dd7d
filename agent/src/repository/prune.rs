//! Removing what is no longer wanted: snapshots by our own engine, and the data that only they used by stock restic.
//!
//! In: an open repository, what to forget, and the restic program. Out: what went, and how many bytes were freed. It
//! runs where the credentials may delete, which need not be a host that stores: a put-only host never holds them.
//!
//! What goes is chosen before anything is removed ([`choose`]): by id, or by age and number for each service; the newest
//! snapshot of a service never goes. restic takes its own exclusive lock, and waits with us for readers and writers. The
//! repository's password reaches it through memory that has no name in any folder; keys of S3 through the environment
//! of that one process. It stops in good order when the caller cancels.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Utc};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::time::Instant;

use super::open::ArchiveError;
use super::recovery::{Place, Recovered, RecoveryError};
use super::retention::{self, Candidate, Rules};
use super::snapshots::{self, Listed};
use super::{Location, RepositoryError, own, place};
use crate::format::Id;
use crate::platform::command::{CommandError, End, Limits, Program, Streams, printable};
use crate::platform::trust::{self, Distrust};
use crate::policy::{DestinationKind, DestinationSettings};
use crate::storage::{Credentials, SSH, StorageError};

/// Pause between two tries to get the lock; restic itself gives up at once.
const LOCK_PAUSE: Duration = Duration::from_secs(2);
/// Longest line of restic's that is looked at.
const LINE_BYTES_MAX: usize = 1024 * 1024;
/// How long restic may take to end in good order; a runner that is told to stop waits a little longer.
const CANCEL_GRACE: Duration = Duration::from_secs(15);
/// How long `restic version` may take.
const VERSION_SECONDS: u64 = 15;
/// Lines of complaints that are kept for a message.
const COMPLAINTS_KEPT: usize = 20;

/// Removing that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// There is no restic.
    #[error("there is no program {0}")]
    NoRestic(PathBuf),
    /// The program is not believed.
    #[error(transparent)]
    Distrust(Distrust),
    /// A snapshot that was named is not there, or is named by what several begin with.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// The newest of a service stays.
    #[error("snapshot {id} is among the newest of service `{service}`, which never go")]
    Newest {
        /// Its id.
        id: String,
        /// The service.
        service: String,
    },
    /// The place cannot be told to restic.
    #[error("restic cannot be told the path {0}: it has a quote, a backslash or a line's end in it")]
    Path(PathBuf),
    /// Somebody else uses the repository.
    #[error("the repository is used by somebody else: {0}")]
    Locked(String),
    /// restic failed.
    #[error("restic could not prune: {0}")]
    Failed(String),
    /// The caller cancelled it.
    #[error("it was cancelled; what was forgotten is forgotten, and its data goes at the next prune")]
    Cancelled,
    /// restic could not be run.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// Nothing can be handed to it.
    #[error("cannot hand the password to restic")]
    HandOver(#[source] io::Error),
}

impl From<ArchiveError> for PruneError {
    fn from(error: ArchiveError) -> Self {
        Self::Recovery(error.into())
    }
}

impl From<RepositoryError> for PruneError {
    fn from(error: RepositoryError) -> Self {
        match error {
            RepositoryError::Locked(by) => Self::Locked(by),
            other => Self::Recovery(other.into()),
        }
    }
}

impl From<StorageError> for PruneError {
    fn from(error: StorageError) -> Self {
        Self::Recovery(error.into())
    }
}

impl PruneError {
    /// Stable code.
    pub fn code(&self) -> &str {
        match self {
            Self::NoRestic(_) => "restic_missing",
            Self::Distrust(_) => "unsafe_permissions",
            Self::Recovery(error) => error.code(),
            Self::Newest { .. } => "newest_snapshot",
            Self::Path(_) => "place_invalid",
            Self::Locked(_) => "repository_locked",
            Self::Failed(_) | Self::Command(_) | Self::HandOver(_) => "prune_failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// What a person should do next.
    pub fn next_step(&self) -> &str {
        match self {
            Self::NoRestic(_) => "install the package `restic` (0.14 or later), or name the program with --restic",
            Self::Distrust(_) => "give restic to root, or name another",
            Self::Recovery(error) => error.next_step(),
            Self::Newest { .. } => "leave it out; remove the whole repository by hand if nothing of it is wanted",
            Self::Path(_) => "rename the file, or link to it under a plain name",
            Self::Locked(_) => {
                "wait until whoever it is has ended; if that machine is gone for good, `restic unlock` removes locks \
                 that are older than half an hour"
            }
            Self::Failed(_) | Self::Command(_) | Self::HandOver(_) => {
                "read restic's words; the repository is as sound as before, and the command can be repeated"
            }
            Self::Cancelled => "repeat the command",
        }
    }

    /// Whether a person has to mend something before it can work.
    pub fn needs_operator(&self) -> bool {
        match self {
            Self::NoRestic(_) | Self::Distrust(_) | Self::Newest { .. } | Self::Path(_) => true,
            Self::Recovery(error) => error.needs_operator(),
            _ => false,
        }
    }
}

/// What shall go.
#[derive(Clone, Debug, Default)]
pub struct Forget {
    /// These: ids, beginnings of ids, or runs.
    pub named: Vec<String>,
    /// Of each service what these no longer keep; both 0: nothing.
    pub rules: Option<Rules>,
}

/// What is known of snapshots beside what they say.
pub struct Known<'k> {
    /// Whether a snapshot is of a run that ended as success. One that is not counts for nothing, and no rule touches it:
    /// its run may still go on.
    pub is_good: &'k dyn Fn(&Listed) -> bool,
    /// How many of the newest of a service always stay, at least 1: where nobody knows how runs ended, the newest may be
    /// of one that failed after its snapshot.
    pub newest_kept: usize,
    /// The time now: whoever can store can say any time of a snapshot.
    pub now: DateTime<Utc>,
}

/// Chooses what goes, the oldest first. Snapshots without a service are not Hestner's: no rule touches them. Ages count
/// from the newest snapshot of the service, or from now if that is earlier.
///
/// # Errors
/// When a named one is not there, or is among the newest of its service.
pub fn choose(all: &[Listed], forget: &Forget, known: &Known<'_>) -> Result<Vec<Listed>, PruneError> {
    let mut services: BTreeMap<&str, Vec<&Listed>> = BTreeMap::new();
    for listed in all.iter().filter(|listed| !listed.service().is_empty() && (known.is_good)(listed)) {
        services.entry(listed.service()).or_default().push(listed);
    }
    for of_one in services.values_mut() {
        of_one.sort_by_key(|l| std::cmp::Reverse((l.time(), l.id)));
    }
    let newest: BTreeSet<Id> =
        services.values().flat_map(|of_one| of_one.iter().take(known.newest_kept.max(1))).map(|l| l.id).collect();
    let mut gone: BTreeSet<Id> = BTreeSet::new();
    for text in &forget.named {
        let listed = super::recovery::pick(all.to_vec(), text)?;
        if newest.contains(&listed.id) {
            return Err(PruneError::Newest { id: listed.id.to_hex(), service: listed.service().to_owned() });
        }
        gone.insert(listed.id);
    }
    if let Some(rules) = forget.rules {
        for of_one in services.values() {
            let candidates: Vec<Candidate> = of_one.iter().map(|listed| candidate(listed)).collect();
            let Some(now) = candidates.iter().map(|c| c.time.min(known.now)).max() else { continue };
            let expired = retention::expired(candidates, rules, now);
            gone.extend(expired.iter().filter_map(|c| c.snapshot_id.parse::<Id>().ok()));
        }
    }
    // Two of one time: whichever the rules would take, those that count as the newest stay.
    Ok(all.iter().filter(|listed| gone.contains(&listed.id) && !newest.contains(&listed.id)).cloned().collect())
}

fn candidate(listed: &Listed) -> Candidate {
    Candidate { snapshot_id: listed.id.to_hex(), run_uid: listed.run_uid().to_owned(), time: listed.time() }
}

/// Removes snapshots, beside readers and writers: their data stays until [`prune`]. Blocks.
///
/// # Errors
/// When somebody removes data just now, or the place refuses.
pub fn forget(repository: &Recovered, chosen: &[Listed]) -> Result<(), PruneError> {
    if chosen.is_empty() {
        return Ok(());
    }
    let _lock = own::locked(repository.archive(), repository.give_up())?;
    let ids: Vec<Id> = chosen.iter().map(|listed| listed.id).collect();
    Ok(snapshots::forget(repository.archive(), &ids)?)
}

/// Bytes of all that is stored: packs, indexes, snapshots, keys. Blocks.
///
/// # Errors
/// When the place cannot be listed.
pub fn stored_bytes(repository: &Recovered) -> Result<u64, PruneError> {
    Ok(place::stored_bytes(repository.archive().storage().as_ref())?)
}

/// Whether the program is there, and nobody but those who are believed could have changed it.
fn believe(program: &Path) -> Result<(), PruneError> {
    trust::check(program).map_err(|error| match error {
        Distrust::File(error) if error.is_missing() => PruneError::NoRestic(program.to_owned()),
        other => PruneError::Distrust(other),
    })
}

/// Whether the program is there, is believed, and says that it is restic.
///
/// # Errors
/// [`PruneError::NoRestic`], [`PruneError::Distrust`], or what it says instead.
pub async fn check_restic(program: &Path) -> Result<(), PruneError> {
    believe(program)?;
    match Program::new(program).arg("version").run(b"", Limits::seconds(VERSION_SECONDS)).await {
        Ok(output) if output.status.success() && output.stdout.starts_with(b"restic ") => Ok(()),
        Ok(output) => {
            Err(PruneError::Failed(format!("`version` ended with {}: {}", output.status, output.complaint())))
        }
        Err(CommandError::Start { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(PruneError::NoRestic(program.to_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

/// How to run restic.
#[derive(Clone, Debug)]
pub struct How {
    /// The program.
    pub restic: PathBuf,
    /// Where it keeps copies of indexes; `None`: nowhere.
    pub cache: Option<PathBuf>,
}

/// Removes the data that no snapshot uses. Every line that restic says goes to `on_line`. Another user is waited for.
/// When `cancelled` completes, restic is asked to end.
///
/// # Errors
/// When it could not be done, or was cancelled.
pub async fn prune(
    place: &Place,
    repository: &Recovered,
    how: &How,
    cancelled: impl Future<Output = ()>,
    on_line: impl FnMut(&str),
) -> Result<(), PruneError> {
    prune_with(place, (repository.password(), repository.lock_wait()), how, cancelled, on_line).await
}

/// The same on a host that stores there.
pub(super) async fn of_host(location: &Location, cancelled: impl Future<Output = ()>) -> Result<(), PruneError> {
    let how = How { restic: location.restic.clone(), cache: Some(location.cache.clone()) };
    believe(&how.restic)?;
    let place = Place { destination: location.destination.clone(), repository: location.name() };
    let password = own::password(location)?;
    let lock_wait = Duration::from_secs(location.lock_wait_seconds);
    prune_with(&place, (&password, lock_wait), &how, cancelled, |_| {}).await
}

async fn prune_with(
    place: &Place,
    (password, lock_wait): (&[u8], Duration),
    how: &How,
    cancelled: impl Future<Output = ()>,
    mut on_line: impl FnMut(&str),
) -> Result<(), PruneError> {
    let password = in_memory(password).map_err(PruneError::HandOver)?;
    let program = program(place, how)?.arg("--password-file").arg(format!("/proc/self/fd/{}", password.as_raw_fd()));
    let program = program.arg("prune");
    tokio::pin!(cancelled);
    let give_up = Instant::now() + lock_wait;
    loop {
        match run(&program, &password, cancelled.as_mut(), &mut on_line).await {
            Err(PruneError::Locked(_)) if Instant::now() < give_up => tokio::select! {
                () = tokio::time::sleep(LOCK_PAUSE) => {}
                () = &mut cancelled => return Err(PruneError::Cancelled),
            },
            other => return other,
        }
    }
}

async fn run(
    program: &Program,
    password: &File,
    cancelled: impl Future<Output = ()>,
    on_line: &mut impl FnMut(&str),
) -> Result<(), PruneError> {
    let mut child = program.spawn(Streams::piped(), End::WithParent, &[password])?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
    drop(child.stdin.take());
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let follow = async {
        let mut complaints = Vec::new();
        tokio::join!(
            read_lines(stdout, |line| on_line(&printable(line.as_bytes()))),
            read_lines(stderr, |line| {
                if complaints.len() < COMPLAINTS_KEPT {
                    complaints.push(printable(line.as_bytes()));
                }
            }),
        );
        (child.wait().await, complaints.join("; "))
    };
    tokio::pin!(follow);
    let (ended, complaint) = tokio::select! {
        ended = &mut follow => ended,
        () = cancelled => {
            // It removes its lock then; one that does not end is killed with its handle.
            if let Some(pid) = pid {
                let _ = kill(pid, Signal::SIGINT);
            }
            let _ = tokio::time::timeout(CANCEL_GRACE, follow).await;
            return Err(PruneError::Cancelled);
        }
    };
    let status = ended.map_err(|error| PruneError::Failed(format!("it cannot be waited for: {error}")))?;
    if status.success() {
        return Ok(());
    }
    match complaint.contains("already locked") || complaint.contains("unable to create lock") {
        true => Err(PruneError::Locked(complaint)),
        false => Err(PruneError::Failed(format!("{complaint} ({status})"))),
    }
}

/// Reads lines to the end; a longer one than the bound is cut, not kept in memory.
async fn read_lines(stream: Option<impl AsyncRead + Unpin>, mut on_line: impl FnMut(&str)) {
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

/// A file that has no name: whoever gets the descriptor can read it, as often as need be.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"password", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    Ok(file)
}

fn program(place: &Place, how: &How) -> Result<Program, PruneError> {
    let program = Program::new(&how.restic).env("RESTIC_PROGRESS_FPS", "0.2");
    let program = match &how.cache {
        Some(cache) => program.arg("--cache-dir").arg(cache),
        None => program.arg("--no-cache"),
    };
    let Place { destination, repository } = place;
    match destination.kind {
        DestinationKind::Folder => Ok(program.arg("--repo").arg(destination.path.join(repository))),
        DestinationKind::S3 => s3(program, destination, repository),
        DestinationKind::Sftp => sftp(program, destination, repository),
    }
}

fn s3(program: Program, destination: &DestinationSettings, repository: &str) -> Result<Program, PruneError> {
    let bucket = place::bucket(destination, repository);
    let credentials = Credentials::read(&bucket.credentials_file)?;
    let lookup = if bucket.path_style { "path" } else { "dns" };
    let program = program
        .arg("--repo")
        .arg(format!("s3:{}/{}/{}", bucket.endpoint.trim_end_matches('/'), bucket.bucket, bucket.prefix))
        .args(["-o".to_owned(), format!("s3.bucket-lookup={lookup}")])
        .args(["-o".to_owned(), format!("s3.region={}", bucket.region)])
        .env("AWS_ACCESS_KEY_ID", &credentials.access_key_id)
        .env("AWS_SECRET_ACCESS_KEY", &credentials.secret_access_key);
    Ok(match &credentials.session_token {
        Some(token) => program.env("AWS_SESSION_TOKEN", token),
        None => program,
    })
}

fn sftp(program: Program, destination: &DestinationSettings, repository: &str) -> Result<Program, PruneError> {
    let server = place::server(destination, repository);
    let words = std::iter::once(OsString::from(SSH)).chain(server.ssh_arguments());
    let quoted: Result<Vec<String>, PruneError> = words.map(|word| quoted(&word)).collect();
    Ok(program
        .arg("--repo")
        // User and server stand in the command; here they only fill the form.
        .arg(format!("sftp:server:{}", server.path))
        // Options are fields of CSV.
        .args(["-o".to_owned(), format!("\"sftp.command={}\"", quoted?.join(" "))]))
}

/// As restic takes a command apart: it knows quotes, and nothing inside of them. Which character a backslash makes
/// plain differs between its versions, so that none may stand there.
fn quoted(word: &OsString) -> Result<String, PruneError> {
    let text = word.to_str().filter(|text| !text.contains(['"', '\'', '\\']) && !text.contains(char::is_control));
    match text {
        Some(text) => Ok(format!("'{text}'")),
        None => Err(PruneError::Path(word.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Timestamp;
    use crate::format::snapshot::Snapshot;

    const DAY: i64 = 86_400;

    fn listed(number: u8, service: &str, day: i64) -> Listed {
        let tags = if service.is_empty() { Vec::new() } else { vec![snapshots::service_tag(service)] };
        let snapshot = Snapshot {
            time: Timestamp { seconds: day * DAY, nanos: 0 },
            parent: None,
            tree: Id::of(b"tree"),
            paths: Vec::new(),
            hostname: String::new(),
            username: String::new(),
            uid: 0,
            gid: 0,
            excludes: Vec::new(),
            tags,
            original: None,
            program_version: String::new(),
        };
        Listed { id: Id::of(&[number]), snapshot }
    }

    fn known() -> Known<'static> {
        Known { is_good: &|_| true, newest_kept: 1, now: DateTime::<Utc>::MAX_UTC }
    }

    #[test]
    fn snapshots_of_runs_that_did_not_end_well_count_for_nothing_and_are_left_alone() {
        let all = [listed(1, "docs", 1), listed(2, "docs", 2), listed(3, "docs", 3)];
        let forget = Forget { named: Vec::new(), rules: Some(Rules { days: 0, count: 1 }) };
        let ids = |known: &Known<'_>| -> Vec<Id> {
            choose(&all, &forget, known).unwrap().into_iter().map(|l| l.id).collect()
        };
        let newest = Id::of(&[3]);
        let is_good = move |l: &Listed| l.id != newest;
        assert_eq!(ids(&Known { is_good: &is_good, ..known() }), [Id::of(&[1])]);
        assert_eq!(ids(&Known { newest_kept: 2, ..known() }), [Id::of(&[1])], "nobody knows how the newest ended");
    }

    #[test]
    fn snapshot_that_claims_to_be_of_the_future_ends_nothing_younger_than_the_rule() {
        let all = [listed(1, "docs", 1), listed(2, "docs", 99), listed(3, "docs", 36_500)];
        let forget = Forget { named: Vec::new(), rules: Some(Rules { days: 30, count: 0 }) };
        let now = DateTime::from_timestamp(100 * DAY, 0).unwrap();
        let gone = choose(&all, &forget, &Known { now, ..known() }).unwrap();
        assert_eq!(gone.iter().map(|l| l.id).collect::<Vec<_>>(), [Id::of(&[1])]);
    }

    fn chosen(all: &[Listed], named: &[&str], days: u32, count: u32) -> Vec<Id> {
        let rules = (days + count > 0).then_some(Rules { days, count });
        let forget = Forget { named: named.iter().map(ToString::to_string).collect(), rules };
        choose(all, &forget, &known()).unwrap().into_iter().map(|l| l.id).collect()
    }

    #[test]
    fn rules_count_for_each_service_from_its_newest_and_leave_strangers_alone() {
        let all = [
            listed(1, "docs", 1),
            listed(2, "docs", 9),
            listed(3, "docs", 10),
            listed(4, "db", 1),
            listed(5, "db", 2),
            listed(6, "", 0),
            listed(7, "", 1),
        ];
        assert_eq!(chosen(&all, &[], 0, 1), [Id::of(&[1]), Id::of(&[2]), Id::of(&[4])]);
        assert_eq!(chosen(&all, &[], 3, 0), [Id::of(&[1])], "db's are a day apart, however long ago");
        assert!(chosen(&all, &[], 0, 0).is_empty());
    }

    #[test]
    fn named_ones_go_and_the_newest_of_a_service_never_does() {
        let all = [listed(1, "docs", 1), listed(2, "docs", 2), listed(3, "", 3)];
        let hex = |number: u8| Id::of(&[number]).to_hex();
        assert_eq!(chosen(&all, &[&hex(1)[..8], &hex(3)], 0, 0), [Id::of(&[1]), Id::of(&[3])]);
        let refused = choose(&all, &Forget { named: vec![hex(2)], rules: None }, &known()).unwrap_err();
        assert_eq!(refused.code(), "newest_snapshot", "{refused}");
        for unknown in ["", "12345678", &hex(1)[..7], &hex(9)] {
            let error = choose(&all, &Forget { named: vec![unknown.to_owned()], rules: None }, &known()).unwrap_err();
            assert_eq!(error.code(), "unknown_snapshot", "{unknown}");
        }
    }

    #[test]
    fn of_two_at_the_same_time_one_stays() {
        let all = [listed(1, "docs", 5), listed(2, "docs", 5)];
        assert!(chosen(&all, &[], 0, 1).len() <= 1);
    }

    #[test]
    fn commands_for_restic_hold_no_word_that_it_would_take_apart() {
        assert_eq!(quoted(&"/a b,c".into()).unwrap(), "'/a b,c'");
        for hostile in ["a\"b", "a\\b", "a'b", "a\nb"] {
            assert!(quoted(&hostile.into()).is_err(), "{hostile:?}");
        }
    }
}
