//! The runner's side of the worker: starts it, feeds it, listens to it, and ends it.
//!
//! For a stream, the runner makes the pipe and starts the producer under a supervisor of its own. The end
//! of the stream is shown to the engine only after the producer has ended with 0; if it failed, the
//! worker is told to stop first. Runner and worker each hold the write end until then, so that the death of
//! either shows the engine no end.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use hestner_proto::words::{ErrorClass, Phase};
use nix::unistd::Pid;
use tokio::io::BufReader;
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio_util::sync::CancellationToken;

use super::fence::Fence;
use super::hook::{self, Spec};
use super::messages::{Failure, WorkerEvent, WorkerOrder, WorkerTask, receive, send};
use crate::platform::cgroup::Group;
use crate::platform::chain;
use crate::platform::command::{End, Program, Streams};
use crate::platform::files::Lock;
use crate::platform::size::Size;
use crate::policy::ServiceSettings;
use crate::repository::Progress;

/// How long a worker that was asked to stop may take: it has to end the engine and remove what that
/// committed.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// What a worker says while it works.
pub(super) enum Said {
    /// Its repository is open.
    Opened(crate::escrow::RepositoryKey),
    /// How far it is.
    Progress(Phase, Progress),
}

/// A worker at work.
pub(super) struct Worker {
    child: Child,
    orders: Option<ChildStdin>,
    events: BufReader<ChildStdout>,
    /// Where its bounds are kept, if they are.
    group: Option<Group>,
    memory_bytes_max: u64,
}

/// A stream's pipe, and the program that writes into it.
pub(super) struct Producer<'a> {
    settings: &'a ServiceSettings,
    read: OwnedFd,
    write: Option<OwnedFd>,
    timeout: Duration,
    /// Children of this process that have nothing to do with it.
    spare: Vec<Pid>,
}

impl<'a> Producer<'a> {
    pub(super) fn new(settings: &'a ServiceSettings, timeout: Duration, spare: Vec<Pid>) -> Result<Self, Failure> {
        let pipe = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC);
        let (read, write) = pipe.map_err(|e| Failure::of(ErrorClass::ProducerFailed, &e))?;
        Ok(Self { settings, read, write: Some(write), timeout, spare })
    }

    fn spec(&self, write: &OwnedFd) -> Spec {
        Spec {
            argv: self.settings.source.argv.clone(),
            user: String::new(),
            timeout_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
            output_bytes_max: 64 * 1024,
            environment: vec![("HESTNER_SERVICE".to_owned(), self.settings.name.clone())],
            stdout_fd: Some(hook::number_of(write)),
        }
    }
}

/// How a worker's memory is given back. Left alone, glibc takes the biggest piece that was freed, such as a pack, for the
/// size up to which freed memory stays with the process. Another C library does not know the variable.
const MALLOC: (&str, &str) = ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=262144");

impl Worker {
    /// Starts one inside its bounds. It hears of its task only when it is there: it has done nothing before.
    pub(super) async fn start(
        fence: &Fence,
        task: WorkerTask,
        alive: &Lock,
        producer: Option<&Producer<'_>>,
    ) -> Result<Self, Failure> {
        let program = Program::own().arg("worker").env(MALLOC.0, MALLOC.1);
        let mut inherit: Vec<&dyn AsFd> = vec![&**alive];
        let program = match producer {
            Some(Producer { read, write: Some(write), .. }) => {
                inherit.extend([read as &dyn AsFd, write]);
                program
                    .args(["--stream-read".to_owned(), hook::number_of(read).to_string()])
                    .args(["--stream-write".to_owned(), hook::number_of(write).to_string()])
            }
            _ => program,
        };
        let streams = Streams { stderr: std::process::Stdio::inherit(), ..Streams::piped() };
        let mut child =
            program.spawn(streams, End::WithParent, &inherit).map_err(|e| Failure::of(ErrorClass::WorkerKilled, &e))?;
        let (Some(mut orders), Some(events)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::new(ErrorClass::WorkerKilled, "the worker has no standard streams"));
        };
        let group = fence.group(&task.effort).zip(child.id()).and_then(|(group, pid)| {
            let taken_in = group.take_in(pid);
            taken_in.inspect_err(|error| tracing::warn!(event = "worker_limits_off", reason = chain(error))).ok()?;
            Some(group)
        });
        send(&mut orders, &task).await.map_err(|e| Failure::of(ErrorClass::WorkerKilled, &e))?;
        let memory_bytes_max = task.effort.memory_bytes_max;
        Ok(Self { child, orders: Some(orders), events: BufReader::new(events), group, memory_bytes_max })
    }

    /// Listens to its end. What is returned is its last word, or that it had none.
    pub(super) async fn finish(
        mut self,
        stop: &CancellationToken,
        mut producer: Option<Producer<'_>>,
        mut on_said: impl FnMut(Said),
    ) -> Result<WorkerEvent, Failure> {
        let stop_producer = stop.child_token();
        let mut last = None;
        let mut producer_failure = None;
        let Self { child, orders, events, .. } = &mut self;
        let guards = producer.iter().flat_map(|producer| producer.spare.iter().copied());
        let spare: Vec<Pid> = guards.chain(child.id().map(|pid| Pid::from_raw(pid.cast_signed()))).collect();
        {
            let listen = async {
                while let Some(event) = receive(events).await {
                    match event {
                        WorkerEvent::Opened(key) => on_said(Said::Opened(key)),
                        WorkerEvent::Progress { phase, progress } => on_said(Said::Progress(phase, progress)),
                        end => last = Some(end),
                    }
                }
                // The engine is gone before a dead worker can be waited for: from here on the
                // stream may end without being taken for whole.
                let _ = child.wait().await;
                stop_producer.cancel();
            };
            let feed = feed(producer.as_mut(), &stop_producer, stop, orders, &spare);
            let both = async {
                let ((), failure) = tokio::join!(listen, feed);
                producer_failure = failure;
            };
            tokio::pin!(both);
            tokio::select! {
                () = &mut both => {}
                () = stop_and_wait(stop) => {}
            }
        }
        // Whoever still lives is killed.
        drop(orders.take());
        let _ = child.kill().await;
        let ended = match (producer_failure, last) {
            (Some(failure), _) => Err(failure),
            (None, Some(WorkerEvent::Failed(failure))) => Err(failure),
            (None, Some(end)) => Ok(end),
            (None, None) => Err(Failure::new(ErrorClass::WorkerKilled, "the worker ended without a result")),
        };
        ended.map_err(|failure| self.explained(failure))
    }

    /// Whoever was killed does not say why; the control group knows.
    fn explained(&self, failure: Failure) -> Failure {
        if failure.class != ErrorClass::WorkerKilled {
            return failure;
        }
        if self.group.as_ref().is_none_or(|group| group.killed_for_memory() == 0) {
            return failure;
        }
        let most = Size::of_bytes(self.memory_bytes_max);
        let message = format!(
            "the worker was out of memory and was killed: it needed more than the {most} that it may have; raise `memory_max` \
             under [worker] in agent.toml"
        );
        Failure { message, ..failure }
    }
}

async fn stop_and_wait(stop: &CancellationToken) {
    stop.cancelled().await;
    tokio::time::sleep(STOP_GRACE).await;
}

/// Runs the producer, if there is one, and closes or keeps what the worker waits for. Returns why the
/// producer failed.
async fn feed(
    producer: Option<&mut Producer<'_>>,
    stop_producer: &CancellationToken,
    stop: &CancellationToken,
    orders: &mut Option<ChildStdin>,
    spare: &[Pid],
) -> Option<Failure> {
    if let Some(producer) = producer {
        let Some(write) = &producer.write else { return None };
        let ended = hook::run(&producer.spec(write), stop_producer, &[write], spare).await;
        if let (Ok(ended), Some(orders)) = (&ended, orders.as_mut())
            && ended.is_success()
        {
            drop(producer.write.take());
            // A worker that is gone is noticed by its missing result.
            let _ = send(orders, &WorkerOrder::EndOfStream).await;
        } else {
            // The worker calls the engine off when its orders end; only then may the write end be closed.
            drop(orders.take());
            let failure = producer_failure(ended, stop_producer);
            stop_producer.cancelled().await;
            return failure;
        }
    }
    tokio::select! {
        () = stop.cancelled() => {}
        () = stop_producer.cancelled() => {}
    }
    drop(orders.take());
    None
}

fn producer_failure(ended: Result<hook::Ended, hook::HookError>, stopped: &CancellationToken) -> Option<Failure> {
    match ended {
        // The worker ended first, and says why.
        _ if stopped.is_cancelled() => None,
        Ok(ended) => {
            let output = crate::platform::command::printable(&ended.output);
            Some(Failure::new(
                ErrorClass::ProducerFailed,
                format!("the program of the stream {}: {output}", ended.description()),
            ))
        }
        Err(error) => Some(Failure::of(ErrorClass::ProducerFailed, &error)),
    }
}
