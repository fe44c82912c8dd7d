//! The face's way to our own archive engine ([`super::write`], [`super::restore`], [`super::verify`]).
//!
//! In: a [`Location`] and what to do. Out: the same words that the other archiver gives. The engine blocks and uses
//! threads of its own; each call here runs on a thread that is started for it. It must be a new one: threads see the
//! mounts that their starter saw, and a worker changes what it sees before it stores.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::failpoints::Failpoints;
use super::lock::{HeldLock, Sharing};
use super::open::{Archive, ArchiveError, Who};
use super::restore::{self, Reader};
use super::snapshots;
use super::verify::{self, Extent, VerifyError};
use super::write::{Cancel, Counters, Files, Options, Patterns, Source};
use super::{Input, Job, Location, Progress, RepositoryError, Snapshot, Stored};
use crate::format::Id;
use crate::format::key::Cost;
use crate::platform::clock::{SharedClock, SystemClock};
use crate::platform::files;
use crate::storage::{Folder, Object, Storage};

/// Pause between two tries to get the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(500);
/// How often it is looked how far a store is.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// How long a store of files that was called off may take to end.
const CANCEL_GRACE: Duration = Duration::from_secs(10);
/// A password is some hundred bytes at most.
const PASSWORD_BYTES_MAX: u64 = 16 * 1024;

/// What is needed to open the repository.
#[derive(Clone, Debug)]
struct Place {
    path: PathBuf,
    password_file: PathBuf,
}

impl Place {
    fn of(location: &Location) -> Self {
        Self { path: location.path(), password_file: location.password_file() }
    }

    /// Without the white space around it, as restic reads such a file.
    fn password(&self) -> Result<Zeroizing<Vec<u8>>, RepositoryError> {
        let read = files::read(&self.password_file, PASSWORD_BYTES_MAX).map_err(RepositoryError::OwnFile)?;
        let read = Zeroizing::new(read);
        Ok(Zeroizing::new(read.trim_ascii().to_vec()))
    }

    fn open(&self) -> Result<Archive, RepositoryError> {
        let storage = self.watched(Folder::open(&self.path).map_err(ArchiveError::from)?);
        Archive::open(storage, &self.password()?).map_err(|error| self.named(error))
    }

    fn watched(&self, storage: impl Storage + 'static) -> Arc<dyn Storage> {
        Failpoints::beside(self.password_file.parent().unwrap_or(&self.password_file)).around(Arc::new(storage))
    }

    /// The words of the face for what it has words for.
    fn named(&self, error: ArchiveError) -> RepositoryError {
        match error {
            ArchiveError::WrongPassword(_) => RepositoryError::WrongKey(self.password_file.clone()),
            other => other.into(),
        }
    }
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

/// Makes the repository, and gives its id.
pub(super) async fn make(location: &Location) -> Result<String, RepositoryError> {
    let place = Place::of(location);
    on_a_thread(move || {
        let storage = place.watched(Folder::create(&place.path).map_err(ArchiveError::from)?);
        let (who, password) = (Who::this_process(), place.password()?);
        let made = Archive::make(storage, &password, Cost::default(), &who, clock().as_ref());
        Ok(made.map_err(|error| place.named(error))?.config().id.clone())
    })
    .await
}

/// The repository's id.
pub(super) async fn id(location: &Location) -> Result<String, RepositoryError> {
    let place = Place::of(location);
    on_a_thread(move || Ok(place.open()?.config().id.clone())).await
}

/// Every snapshot.
pub(super) async fn snapshots(location: &Location) -> Result<Vec<Snapshot>, RepositoryError> {
    let place = Place::of(location);
    on_a_thread(move || {
        let listed = snapshots::list(&place.open()?)?;
        let told = |listed: snapshots::Listed| Snapshot {
            id: listed.id.to_hex(),
            time: listed.time(),
            run_uid: listed.run_uid().to_owned(),
            service: listed.service().to_owned(),
        };
        Ok(listed.into_iter().map(told).collect())
    })
    .await
}

/// Removes every snapshot of a run, and the locks of dead processes. The data that only they used stays until
/// somebody prunes.
pub(super) async fn forget_run(location: &Location, run_uid: &str) -> Result<(), RepositoryError> {
    let (place, run_uid, give_up) = (Place::of(location), run_uid.to_owned(), give_up(location));
    on_a_thread(move || {
        let archive = place.open()?;
        let _lock = locked(&archive, give_up)?;
        let listed = snapshots::with_tag(&archive, &snapshots::run_tag(&run_uid))?;
        let ids: Vec<Id> = listed.into_iter().map(|listed| listed.id).collect();
        Ok(snapshots::forget(&archive, &ids)?)
    })
    .await
}

/// Shared: a removed file of a snapshot harms nobody, and only prune removes data.
fn locked(archive: &Archive, give_up: Instant) -> Result<HeldLock, RepositoryError> {
    loop {
        match HeldLock::take(archive, Sharing::Shared, &Who::this_process(), &clock()) {
            Err(ArchiveError::Locked(_)) if Instant::now() < give_up => std::thread::sleep(LOCK_PAUSE),
            other => return Ok(other?),
        }
    }
}

/// For whoever only reads: a place that takes nothing more, such as a disk that is mounted read-only, is read without a
/// lock.
fn locked_to_read(archive: &Archive, give_up: Instant) -> Result<Option<HeldLock>, RepositoryError> {
    match locked(archive, give_up) {
        Err(RepositoryError::Archive(ArchiveError::Storage(error))) => {
            tracing::warn!(event = "read_without_lock", %error);
            Ok(None)
        }
        other => other.map(Some),
    }
}

/// `restic unlock` asks whether a lock's process lives by sending it SIGHUP, which must not end us.
fn outlive_unlock() {
    // Once heard by anybody the signal ends nothing; if it cannot be, it is as before.
    let _ = signal(SignalKind::hangup());
}

fn give_up(location: &Location) -> Instant {
    Instant::now() + Duration::from_secs(location.lock_wait_seconds)
}

/// Stores a job. `stream` is where an [`Input::Stream`] is read from; `ended_well` says whether its producer did, and
/// is asked after its last byte.
pub(super) async fn store(
    location: &Location,
    job: &Job,
    stream: Option<OwnedFd>,
    ended_well: Arc<AtomicBool>,
    cancelled: impl Future<Output = ()>,
    mut on_progress: impl FnMut(Progress),
) -> Result<Stored, RepositoryError> {
    outlive_unlock();
    let (cancel, counters) = (Cancel::default(), Arc::new(Counters::default()));
    let storing = {
        let (place, job, give_up) = (Place::of(location), job.clone(), give_up(location));
        let (cancel, counters) = (cancel.clone(), Arc::clone(&counters));
        on_a_thread(move || {
            let archive = place.open()?;
            loop {
                let stream = stream.as_ref().map(OwnedFd::try_clone).transpose();
                let stream = stream.map_err(|e| RepositoryError::Surprise(format!("no descriptor is left: {e}")))?;
                let source = source(&job, stream, Arc::clone(&ended_well))?;
                // The lock is taken before anything is read, so that a stream is whole at the next try.
                match archive.store(source, &options(&job), &clock(), &cancel, &counters) {
                    Err(ArchiveError::Locked(_)) if Instant::now() < give_up && !cancel.is_cancelled() => {
                        std::thread::sleep(LOCK_PAUSE);
                    }
                    other => return other.map_err(RepositoryError::from),
                }
            }
        })
    };
    tokio::pin!(storing, cancelled);
    let stored = loop {
        tokio::select! {
            stored = &mut storing => break stored?,
            () = &mut cancelled => {
                cancel.cancel();
                // If it was faster, its snapshot is removed like any of a failed run. One that waits for its stream
                // cannot be called.
                let grace = if matches!(job.input, Input::Files { .. }) { CANCEL_GRACE } else { LOOK_PAUSE };
                let _ = tokio::time::timeout(grace, storing).await;
                return Err(RepositoryError::Cancelled);
            }
            () = tokio::time::sleep(LOOK_PAUSE) => on_progress(progress(&counters)),
        }
    };
    all_there(&location.path(), &stored.objects)?;
    Ok(Stored {
        snapshot_id: stored.snapshot.to_hex(),
        bytes_read: stored.bytes,
        bytes_stored: 0,
        files: stored.files,
        vanished: stored.vanished,
    })
}

/// What was put must still be there: somebody may have pruned beside us in spite of our lock.
fn all_there(repository: &Path, objects: &[(Object, u64)]) -> Result<(), RepositoryError> {
    let is_there = |(object, bytes): &&(Object, u64)| {
        repository.join(object.path()).metadata().is_ok_and(|metadata| metadata.len() == *bytes)
    };
    match objects.iter().find(|object| !is_there(object)) {
        None => Ok(()),
        Some((object, _)) => Err(RepositoryError::Surprise(format!("{object} was stored and is gone"))),
    }
}

fn options(job: &Job) -> Options {
    let tags = vec![snapshots::run_tag(&job.run_uid), snapshots::service_tag(&job.service)];
    Options { tags, ..Options::new(Who::this_process()) }
}

fn source(job: &Job, stream: Option<OwnedFd>, ended_well: Arc<AtomicBool>) -> Result<Source<'static>, RepositoryError> {
    match (&job.input, stream) {
        (Input::Files { paths, exclude, one_file_system, live }, _) => {
            check_paths(paths, exclude, *one_file_system)?;
            Ok(Source::Files(Files {
                paths: paths.clone(),
                exclude: exclude.clone(),
                one_file_system: *one_file_system,
                skip_caches: false,
                live: *live,
            }))
        }
        (Input::Stream { file_name }, Some(stream)) => Ok(Source::Stream {
            name: file_name.clone(),
            bytes: Box::new(File::from(stream)),
            ended: Box::new(move || match ended_well.load(Ordering::Acquire) {
                true => Ok(()),
                false => Err("whoever produced it is gone".to_owned()),
            }),
        }),
        (Input::Stream { .. }, None) => Err(RepositoryError::Surprise("the stream has no descriptor".to_owned())),
    }
}

/// Refuses what would be left out in silence although somebody named it.
fn check_paths(paths: &[PathBuf], exclude: &[String], one_file_system: bool) -> Result<(), RepositoryError> {
    let patterns = Patterns::new(exclude);
    if let Some(path) = paths.iter().find(|path| path.ancestors().any(|above| patterns.leave_out(above))) {
        let reason = format!("the path {} of the source is left out by `exclude`", path.display());
        return Err(RepositoryError::Surprise(reason));
    }
    let above = |path: &PathBuf| paths.iter().find(|other| *other != path && path.starts_with(other));
    let nested = paths.iter().find_map(|path| Some((path, above(path)?))).filter(|_| one_file_system);
    match nested {
        None => Ok(()),
        Some((path, above)) => Err(RepositoryError::Surprise(format!(
            "{} lies below {}, which with `one_file_system` may not lead there: make it a service of its own",
            path.display(),
            above.display()
        ))),
    }
}

/// Nobody counts the source beforehand, so that nothing is known of the whole.
fn progress(counters: &Counters) -> Progress {
    Progress {
        bytes_done: counters.bytes_done.load(Ordering::Relaxed),
        files_done: counters.files_done.load(Ordering::Relaxed),
        ..Progress::default()
    }
}

/// Writes a snapshot's tree below `target`; every byte is checked against its name before it is written.
pub(super) async fn restore(location: &Location, id: &str, target: &Path) -> Result<Vec<String>, RepositoryError> {
    outlive_unlock();
    let (place, id, target, give_up) = (Place::of(location), id.to_owned(), target.to_owned(), give_up(location));
    on_a_thread(move || {
        let archive = place.open()?;
        let _lock = locked_to_read(&archive, give_up)?;
        let listed = snapshots::get(&archive, &parsed(&id)?)?;
        let index = archive.load_index()?;
        let (options, counters) = (restore::Options::default(), restore::Counters::default());
        let reader = Reader::new(&archive, &index);
        let restored =
            restore::restore(&reader, listed.snapshot.tree, &target, &options, &counters, &AtomicBool::default())?;
        let restore::Notes { count, mut first } = restored.warnings;
        let more = count.saturating_sub(first.len() as u64);
        first.extend((more > 0).then(|| format!("and {more} more like these")));
        Ok(first)
    })
    .await
}

/// Looks whether the snapshot is there, and reads every byte of the repository back.
pub(super) async fn verify(location: &Location, id: &str) -> Result<(), RepositoryError> {
    outlive_unlock();
    let (place, id, give_up) = (Place::of(location), id.to_owned(), give_up(location));
    on_a_thread(move || {
        let archive = place.open()?;
        let _lock = locked_to_read(&archive, give_up)?;
        snapshots::get(&archive, &parsed(&id)?)?;
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let verified =
            verify::verify(&archive, Extent::All, threads, &verify::Counters::default(), &AtomicBool::default());
        verified.map(drop).map_err(|error| match error {
            VerifyError::Archive(error) => error.into(),
            other => RepositoryError::Damaged(other),
        })
    })
    .await
}

fn parsed(id: &str) -> Result<Id, RepositoryError> {
    id.parse().map_err(|error| RepositoryError::Archive(ArchiveError::Format(error)))
}

/// Runs what blocks on a thread of its own. A caller that goes away does not end it.
async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RepositoryError> + Send + 'static,
) -> Result<T, RepositoryError> {
    let (done, result) = oneshot::channel();
    let thread = std::thread::Builder::new().name("archive".to_owned()).spawn(move || {
        // Nobody waits any more when it cannot be said.
        let _ = done.send(work());
    });
    thread.map_err(|error| RepositoryError::Surprise(format!("no thread: {error}")))?;
    result.await.unwrap_or_else(|_| Err(RepositoryError::Surprise("the archive engine broke off".to_owned())))
}
