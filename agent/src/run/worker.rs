//! The worker process: everything that touches a repository during a run.
//!
//! `hestner-agent worker` reads one [`WorkerTask`] from its standard input, says [`WorkerEvent`]s on its
//! standard output, and ends. It is short-lived, so that its memory is given back, and it is cancelled by
//! closing its input. For a stream it holds the write end until the runner says that the producer ended
//! well: whoever is killed first, the engine is never shown the end of a stream that was cut off.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hestner_proto::words::{ErrorClass, Phase};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::io::BufReader;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::messages::{Failure, Work, WorkerEvent, WorkerOrder, WorkerTask, receive, send};
use crate::freeze::Bind;
use crate::platform::process::{self, IoPriority};
use crate::policy::{Effort, IoClass};
use crate::repository::failpoints::Failpoints;
use crate::repository::{Job, Progress, Repository, RepositoryError};

/// Progress is said at most so often.
const PROGRESS_PAUSE: Duration = Duration::from_millis(500);
/// Events that wait for the runner; a runner that does not read holds the worker up and loses nothing.
const EVENTS_WAITING: usize = 64;

/// The two ends of a stream's pipe, as the runner handed them down.
#[derive(Debug)]
pub struct StreamEnds {
    /// What is stored.
    pub read: OwnedFd,
    /// Held so that the engine sees no end before the producer has ended well.
    pub write: OwnedFd,
}

/// The worker process.
///
/// # Errors
/// When it cannot read its task or say its result.
pub async fn run(stream: Option<StreamEnds>) -> io::Result<()> {
    let mut input = BufReader::new(pipe::Receiver::from_owned_fd(io::stdin().as_fd().try_clone_to_owned()?)?);
    let mut output = pipe::Sender::from_owned_fd(io::stdout().as_fd().try_clone_to_owned()?)?;
    let task: WorkerTask = receive(&mut input).await.ok_or(io::ErrorKind::UnexpectedEof)?;
    // Threads that are started from here on inherit it.
    give_way(&task.effort);
    let failpoints = Failpoints::beside(&task.location.keys);
    let repository = Repository::at(task.location);
    let last = match task.work {
        Work::Store { job, binds, keep, recovery_recipient } => {
            failpoints.begin("store");
            let store = Store { repository, failpoints, job, binds, keep, recovery_recipient };
            store.run(input, &mut output, stream).await?
        }
        Work::Forget { run_uid } => {
            failpoints.begin("forget");
            let forgotten = repository.forget_run(&run_uid).await;
            removed(&repository, forgotten.map(|()| None)).await
        }
        Work::Expire { snapshot_ids } => {
            failpoints.begin("expire");
            let called_off = async { while receive::<WorkerOrder>(&mut input).await.is_some() {} };
            removed(&repository, expire(&repository, &failpoints, &snapshot_ids, called_off).await).await
        }
    };
    send(&mut output, &last).await
}

async fn expire(
    repository: &Repository,
    failpoints: &Failpoints,
    snapshot_ids: &[String],
    called_off: impl Future<Output = ()>,
) -> Result<Option<String>, RepositoryError> {
    tokio::pin!(called_off);
    tokio::select! {
        reached = failpoints.at("expire") => reached?,
        () = &mut called_off => return Err(RepositoryError::Cancelled),
    }
    repository.expire(snapshot_ids, called_off).await
}

/// A backup that goes before others is better than none, so that a kernel or a fence that refuses is only told.
fn give_way(effort: &Effort) {
    let at_the_disk = match effort.io_class {
        IoClass::None => None,
        IoClass::BestEffort => Some(IoPriority::BestEffort(effort.io_level)),
        IoClass::Idle => Some(IoPriority::Idle),
    };
    let done = process::give_way(effort.nice).and(at_the_disk.map_or(Ok(()), process::set_io_priority));
    if let Err(error) = done {
        tracing::warn!(event = "priority_not_set", %error);
    }
}

async fn removed(repository: &Repository, result: Result<Option<String>, RepositoryError>) -> WorkerEvent {
    let warning = match result {
        Ok(warning) => warning,
        Err(error) => return WorkerEvent::Failed(failure(&error)),
    };
    match repository.size_bytes().await {
        Ok(repository_bytes) => WorkerEvent::Removed { repository_bytes, warning },
        Err(error) => WorkerEvent::Failed(failure(&error)),
    }
}

/// Shows snapshots in the place of the originals, to this process and its children only: the view ends
/// with them, so that nothing can stay mounted. What must stay as it is (the repository, our own state) is
/// laid over it again.
fn enter_view(binds: &[Bind], keep: &[PathBuf]) -> io::Result<()> {
    if binds.is_empty() {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&Path>, "/", None::<&Path>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&Path>)?;
    let hidden = keep.iter().filter(|path| binds.iter().any(|bind| path.starts_with(&bind.to)));
    let kept: Vec<(&PathBuf, File)> = hidden.map(|path| Ok((path, File::open(path)?))).collect::<io::Result<_>>()?;
    for Bind { from, to } in binds {
        mount(Some(from), to, None::<&Path>, MsFlags::MS_BIND, None::<&Path>)?;
    }
    for (path, folder) in &kept {
        let open = format!("/proc/self/fd/{}", folder.as_raw_fd());
        mount(Some(open.as_str()), *path, None::<&Path>, MsFlags::MS_BIND, None::<&Path>)?;
    }
    Ok(())
}

struct Store {
    repository: Repository,
    failpoints: Failpoints,
    job: Job,
    binds: Vec<Bind>,
    keep: Vec<PathBuf>,
    recovery_recipient: String,
}

impl Store {
    /// Forwards events while the work goes on; the last event is returned.
    async fn run(
        self,
        mut input: BufReader<pipe::Receiver>,
        output: &mut pipe::Sender,
        stream: Option<StreamEnds>,
    ) -> io::Result<WorkerEvent> {
        let (events, mut waiting) = mpsc::channel(EVENTS_WAITING);
        let (read, mut write) = stream.map(|ends| (ends.read, ends.write)).unzip();
        let ended_well = Arc::new(AtomicBool::new(false));
        let ends_well = Arc::clone(&ended_well);
        let cancelled = async {
            while let Some(WorkerOrder::EndOfStream) = receive(&mut input).await {
                // Before the end can be seen.
                ends_well.store(true, Ordering::Release);
                // The only other holders are the runner, which closes its own, and the producer, which ended.
                drop(write.take());
            }
        };
        let work = self.work((read, ended_well), cancelled, events);
        tokio::pin!(work);
        loop {
            tokio::select! {
                Some(event) = waiting.recv() => send(output, &event).await?,
                last = &mut work => {
                    while let Ok(event) = waiting.try_recv() {
                        send(output, &event).await?;
                    }
                    return Ok(last.unwrap_or_else(WorkerEvent::Failed));
                }
            }
        }
    }

    async fn work(
        &self,
        stream: (Option<OwnedFd>, Arc<AtomicBool>),
        cancelled: impl Future<Output = ()>,
        events: mpsc::Sender<WorkerEvent>,
    ) -> Result<WorkerEvent, Failure> {
        let key = self.repository.open_or_make(&self.recovery_recipient).await.map_err(|e| failure(&e))?;
        enter_view(&self.binds, &self.keep).map_err(|e| Failure::of(ErrorClass::PointFailed, &e))?;
        // A receiver that is gone is noticed by whoever writes to it.
        let _ = events.send(WorkerEvent::Opened(key)).await;
        self.store(stream, cancelled, events).await.map_err(|e| failure(&e))
    }

    async fn store(
        &self,
        stream: (Option<OwnedFd>, Arc<AtomicBool>),
        cancelled: impl Future<Output = ()>,
        events: mpsc::Sender<WorkerEvent>,
    ) -> Result<WorkerEvent, RepositoryError> {
        tokio::pin!(cancelled);
        tokio::select! {
            reached = self.failpoints.at("store") => reached?,
            () = &mut cancelled => return Err(RepositoryError::Cancelled),
        }
        let mut say = Throttle { events, next: Instant::now() };
        let on_progress = |phase, progress| say.progress(phase, progress);
        let stored = self.repository.store(&self.job, stream, cancelled, on_progress).await?;
        self.failpoints.at("stored").await?;
        Ok(WorkerEvent::Stored(stored))
    }
}

struct Throttle {
    events: mpsc::Sender<WorkerEvent>,
    next: Instant,
}

impl Throttle {
    fn progress(&mut self, phase: Phase, progress: Progress) {
        if Instant::now() >= self.next {
            self.next = Instant::now() + PROGRESS_PAUSE;
            // A line of progress that finds no room is no loss; the next one says more.
            let _ = self.events.try_send(WorkerEvent::Progress { phase, progress });
        }
    }
}

fn failure(error: &RepositoryError) -> Failure {
    let mut failure = Failure::of(error.class(), error);
    if let RepositoryError::Unreadable(entries) = error {
        failure.unreadable = entries.unreadable;
        failure.unreadable_names.clone_from(&entries.names);
    }
    failure
}
