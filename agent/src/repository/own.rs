//! The face's way to the archive engine ([`super::write`], [`super::restore`], [`super::verify`]).
//!
//! In: a [`Location`] and what to do. Out: the face's words. The engine blocks and uses threads of its own; each call
//! here runs on a thread that is started for it. It must be a new one: threads see the
//! mounts that their starter saw, and a worker changes what it sees before it stores.

use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hestner_proto::words::Phase;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::failpoints::Failpoints;
use super::lock::{HeldLock, Sharing};
use super::open::{Archive, ArchiveError, Who};
use super::progress::Watch;
use super::restore;
use super::verify::{self, Extent, Verified};
use super::write::{Cancel, Counters, Files, Options, Parent, Patterns, Source};
use super::{Input, Job, Location, Progress, RepositoryError, Snapshot, Stored, keys, place, reading, snapshots};
use crate::escrow::RepositoryKey;
use crate::format::Id;
use crate::format::key::Cost;
use crate::platform::clock::{SharedClock, SystemClock};
use crate::platform::files;
use crate::storage::{Kind, Storage, StorageError};

/// Pause between two tries to get the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(500);
/// How often it is looked how far a store is.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// How long a store that was called off may take to end.
const CANCEL_GRACE: Duration = Duration::from_secs(10);

/// What is needed to open the repository.
#[derive(Clone, Debug)]
struct Place(Location);

impl Place {
    fn of(location: &Location) -> Self {
        Self(location.clone())
    }

    /// Without the white space around it, as restic reads such a file.
    fn password(&self) -> Result<Zeroizing<Vec<u8>>, RepositoryError> {
        let read = files::read(&self.0.password_file(), keys::KEY_BYTES_MAX).map_err(RepositoryError::OwnFile)?;
        let read = Zeroizing::new(read);
        Ok(Zeroizing::new(read.trim_ascii().to_vec()))
    }

    fn storage(&self) -> Result<Arc<dyn Storage>, RepositoryError> {
        let Location { destination, limits, .. } = &self.0;
        let storage = place::open(destination, &self.0.name(), limits).map_err(ArchiveError::from)?;
        Ok(self.watched(storage))
    }

    fn open(&self) -> Result<Archive, RepositoryError> {
        let archive = Archive::open(self.storage()?, &self.password()?).map_err(|error| self.named(error))?;
        let known = files::read(&self.0.id_file(), keys::KEY_BYTES_MAX).ok();
        match known {
            Some(id) if id != archive.config().id.as_bytes() => {
                let place = self.0.place();
                Err(RepositoryError::Surprise(format!("the repository at {place} is another one than before")))
            }
            _ => Ok(archive),
        }
    }

    /// With the moments at which tests break it.
    fn watched(&self, storage: Box<dyn Storage>) -> Arc<dyn Storage> {
        Failpoints::beside(&self.0.keys).around(storage.into())
    }

    /// The words of the face for what it has words for.
    fn named(&self, error: ArchiveError) -> RepositoryError {
        match error {
            ArchiveError::WrongPassword(_) => RepositoryError::WrongKey(self.0.password_file()),
            other => other.into(),
        }
    }
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

/// The repository's password.
pub(super) fn password(location: &Location) -> Result<Zeroizing<Vec<u8>>, RepositoryError> {
    Place::of(location).password()
}

/// Whether there is a repository.
pub(super) async fn exists(location: &Location) -> Result<bool, RepositoryError> {
    let place = Place::of(location);
    on_a_thread(move || match place::open(&place.0.destination, &place.0.name(), &place.0.limits) {
        Err(StorageError::NoRoot(_)) => Ok(false),
        Err(error) => Err(ArchiveError::from(error).into()),
        Ok(storage) => Ok(!storage.list(Kind::Config).map_err(ArchiveError::from)?.is_empty()),
    })
    .await
}

/// Makes the repository, and gives its id.
pub(super) async fn make(location: &Location) -> Result<String, RepositoryError> {
    let place = Place::of(location);
    on_a_thread(move || {
        let Location { destination, limits, .. } = &place.0;
        let storage = place::create(destination, &place.0.name(), limits).map_err(ArchiveError::from)?;
        let (who, password) = (Who::this_process(), place.password()?);
        let made = Archive::make(place.watched(storage), &password, Cost::default(), &who, clock().as_ref());
        Ok(made.map_err(|error| place.named(error))?.config().id.clone())
    })
    .await
}

/// Lays the wrapped key beside the repository.
pub(super) async fn lay_beside(location: &Location, key: &RepositoryKey) -> Result<(), RepositoryError> {
    let (place, key) = (Place::of(location), key.clone());
    on_a_thread(move || keys::lay_beside(place.storage()?.as_ref(), &key)).await
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

/// Removes snapshots. The data that only they used stays until somebody prunes.
pub(super) async fn forget(location: &Location, ids: &[String]) -> Result<(), RepositoryError> {
    let (place, give_up) = (Place::of(location), give_up(location));
    let ids: Vec<Id> = ids.iter().map(|id| parsed(id)).collect::<Result<_, _>>()?;
    on_a_thread(move || {
        let archive = place.open()?;
        let _lock = locked(&archive, give_up)?;
        Ok(snapshots::forget(&archive, &ids)?)
    })
    .await
}

/// Bytes that all objects have.
pub(super) async fn size_bytes(location: &Location) -> Result<u64, RepositoryError> {
    let place = Place::of(location);
    on_a_thread(move || Ok(place::stored_bytes(place.storage()?.as_ref()).map_err(ArchiveError::from)?)).await
}

/// Removes every snapshot of a run, and the locks of dead processes. The data that only they used stays until
/// somebody prunes.
pub(super) async fn forget_run(location: &Location, run_uid: &str) -> Result<(), RepositoryError> {
    let (place, run_uid, give_up) = (Place::of(location), run_uid.to_owned(), give_up(location));
    let put_only = location.destination.put_only;
    on_a_thread(move || {
        let archive = place.open()?;
        let _lock = locked(&archive, give_up)?;
        let listed = snapshots::with_tag(&archive, &snapshots::run_tag(&run_uid))?;
        let ids: Vec<Id> = listed.into_iter().map(|listed| listed.id).collect();
        match snapshots::forget(&archive, &ids) {
            // It will not be allowed the next time either. What stays is whole, and never offered.
            Err(error) if put_only => {
                tracing::warn!(event = "snapshot_of_failed_run_stays", run_id = run_uid, %error);
                Ok(())
            }
            forgotten => Ok(forgotten?),
        }
    })
    .await
}

/// Shared: a removed file of a snapshot harms nobody, and only prune removes data.
pub(super) fn locked(archive: &Archive, give_up: Instant) -> Result<HeldLock, RepositoryError> {
    loop {
        match HeldLock::take(archive, Sharing::Shared, &Who::this_process(), &clock()) {
            Err(ArchiveError::Locked(_)) if Instant::now() < give_up => std::thread::sleep(LOCK_PAUSE),
            other => return Ok(other?),
        }
    }
}

/// For whoever only reads: a place that takes nothing more, such as a disk that is mounted read-only, is read without a
/// lock.
pub(super) fn locked_to_read(archive: &Archive, give_up: Instant) -> Result<Option<HeldLock>, RepositoryError> {
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
    (stream, ended_well): (Option<OwnedFd>, Arc<AtomicBool>),
    cancelled: impl Future<Output = ()>,
    mut on_progress: impl FnMut(Phase, Progress),
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
                let source = source(&job, stream, Arc::clone(&ended_well), &cancel)?;
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
    let (mut watch, begun) = (Watch::new(Arc::clone(&counters), files(job)), Instant::now());
    tokio::pin!(storing, cancelled);
    let stored = loop {
        tokio::select! {
            stored = &mut storing => break stored?,
            () = &mut cancelled => {
                cancel.cancel();
                // If it was faster, its snapshot is removed like any of a failed run. A call to the storage that hangs
                // cannot be called off: this process ends around it, and the next run clears its lock.
                let _ = tokio::time::timeout(CANCEL_GRACE, storing).await;
                return Err(RepositoryError::Cancelled);
            }
            () = tokio::time::sleep(LOOK_PAUSE) => {
                let phase = if counters.is_at_the_gate() { Phase::Verify } else { Phase::Archive };
                on_progress(phase, watch.look(begun.elapsed()));
            }
        }
    };
    Ok(Stored {
        snapshot_id: stored.snapshot.to_hex(),
        bytes_read: stored.bytes,
        bytes_stored: stored.objects.iter().map(|(_, bytes)| bytes).sum(),
        files: stored.files,
        vanished: stored.vanished,
        repository_bytes: stored.repository_bytes,
    })
}

fn options(job: &Job) -> Options {
    let tags = vec![snapshots::run_tag(&job.run_uid), snapshots::service_tag(&job.service)];
    let base = Options::new(Who::this_process());
    Options {
        tags,
        parent: if job.how.force_read { Parent::ForceRead } else { Parent::default() },
        level: job.how.compression_level,
        workers: NonZeroUsize::new(job.how.threads).unwrap_or(base.workers),
        ..base
    }
}

/// The source, if it is a tree.
fn files(job: &Job) -> Option<Files> {
    let Input::Files { paths, exclude, one_file_system, live } = &job.input else { return None };
    Some(Files {
        paths: paths.clone(),
        exclude: exclude.clone(),
        one_file_system: *one_file_system,
        skip_caches: job.how.skip_caches,
        live: *live,
    })
}

fn source(
    job: &Job,
    stream: Option<OwnedFd>,
    ended_well: Arc<AtomicBool>,
    cancel: &Cancel,
) -> Result<Source<'static>, RepositoryError> {
    match (&job.input, stream) {
        (Input::Files { paths, exclude, one_file_system, .. }, _) => {
            check_paths(paths, exclude, *one_file_system)?;
            Ok(Source::Files(files(job).unwrap_or_default()))
        }
        (Input::Stream { file_name }, Some(stream)) => Ok(Source::Stream {
            name: file_name.clone(),
            bytes: Box::new(
                cancel
                    .interruptible(stream)
                    .map_err(|e| RepositoryError::Surprise(format!("no descriptor is left: {e}")))?,
            ),
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

/// Writes a snapshot's tree below `target`; every byte is checked against its name before it is written.
pub(super) async fn restore(
    location: &Location,
    id: &str,
    target: &Path,
    on_progress: impl FnMut(Progress),
) -> Result<Vec<String>, RepositoryError> {
    outlive_unlock();
    let (place, id, target, give_up) = (Place::of(location), id.to_owned(), target.to_owned(), give_up(location));
    let counters = Arc::new(restore::Counters::default());
    let counted = Arc::clone(&counters);
    let restoring = on_a_thread(move || {
        let archive = place.open()?;
        let _lock = locked_to_read(&archive, give_up)?;
        reading::restore(&archive, &parsed(&id)?, &target, &counters, &AtomicBool::default())
    });
    watched(restoring, || restore_progress(&counted), on_progress).await
}

/// The walk is only a little ahead of the writing, so that nothing is known of the whole.
fn restore_progress(counters: &restore::Counters) -> Progress {
    Progress {
        bytes_done: counters.bytes_done.load(Ordering::Relaxed),
        files_done: counters.files_done.load(Ordering::Relaxed),
        ..Progress::default()
    }
}

/// Tells how far something is while it goes on, and how far it came.
async fn watched<T>(work: impl Future<Output = T>, look: impl Fn() -> Progress, mut tell: impl FnMut(Progress)) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => {
                tell(look());
                return done;
            }
            () = tokio::time::sleep(LOOK_PAUSE) => tell(look()),
        }
    }
}

/// Looks whether the snapshot is there, and reads so much of the repository back.
pub(super) async fn verify(
    location: &Location,
    id: &str,
    extent: Extent,
    on_progress: impl FnMut(Progress),
) -> Result<Verified, RepositoryError> {
    outlive_unlock();
    let (place, id, give_up) = (Place::of(location), id.to_owned(), give_up(location));
    let counters = Arc::new(verify::Counters::default());
    let counted = Arc::clone(&counters);
    let verifying = on_a_thread(move || {
        let archive = place.open()?;
        let _lock = locked_to_read(&archive, give_up)?;
        snapshots::get(&archive, &parsed(&id)?)?;
        reading::verify(&archive, extent, &counters, &AtomicBool::default())
    });
    let progress = || Progress {
        bytes_done: counted.bytes_done.load(Ordering::Relaxed),
        bytes_total: counted.bytes_total.load(Ordering::Relaxed),
        ..Progress::default()
    };
    watched(verifying, progress, on_progress).await
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

#[cfg(test)]
mod tests;
