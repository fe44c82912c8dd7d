//! How the process lives: its tasks, and how it stops.
//!
//! Every long task is started through [`Tasks`]. One that ends before it was asked to, or panics, brings
//! the whole process down with an error instead of leaving a daemon that does half its work. Stopping is
//! one signal to all tasks and a deadline; a second signal cuts the deadline short.

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long tasks may take to end after the signal to stop.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Tells a task that it should come to an end.
pub type Drain = CancellationToken;

/// The tasks of the process.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    drain: Drain,
    failed: Arc<Mutex<Option<&'static str>>>,
}

/// Why the process did not stop in good order.
#[derive(Debug, thiserror::Error)]
pub enum Unclean {
    /// A task ended although nobody had asked it to.
    #[error("the task `{0}` ended unexpectedly")]
    TaskEnded(&'static str),
    /// Tasks were still at work when the deadline passed.
    #[error("tasks were still at work {} s after the signal to stop", DRAIN_DEADLINE.as_secs())]
    Deadline,
    /// A second signal came.
    #[error("a second signal cut the orderly stop short")]
    SecondSignal,
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[from] io::Error),
}

impl Tasks {
    /// What a task has to watch.
    pub fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// Starts a task that must go on until the drain.
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let tasks = self.clone();
        let running = tokio::spawn(task);
        self.tracker.spawn(async move {
            let ended = running.await;
            if !tasks.drain.is_cancelled() || ended.is_err() {
                tracing::error!(event = "task_ended", task = name, error = ?ended.err());
                tasks.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(name);
                tasks.drain.cancel();
            }
        });
    }

    /// Starts a task that may end by itself, such as the care of one connection.
    #[expect(clippy::disallowed_methods, reason = "the one place that spawns")]
    pub fn spawn_ending(&self, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.tracker.track_future(task));
    }

    /// Waits for SIGTERM, SIGINT or the failure of a task, then for all tasks to end.
    ///
    /// # Errors
    /// [`Unclean`], when anything but an orderly stop happened.
    pub async fn run_until_stopped(self) -> Result<(), Unclean> {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = self.drain.cancelled() => {}
        }
        tracing::info!(event = "draining");
        self.drain.cancel();
        self.tracker.close();
        tokio::select! {
            () = self.tracker.wait() => {}
            () = tokio::time::sleep(DRAIN_DEADLINE) => return Err(Unclean::Deadline),
            _ = term.recv() => return Err(Unclean::SecondSignal),
            _ = int.recv() => return Err(Unclean::SecondSignal),
        }
        match *self.failed.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(name) => Err(Unclean::TaskEnded(name)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn process_stops_loudly_when_a_task_panics() {
        let tasks = Tasks::default();
        let drain = tasks.drain();
        tasks.spawn("steady", async move { drain.cancelled().await });
        tasks.spawn("fragile", async { panic!("as planned") });
        assert!(matches!(tasks.run_until_stopped().await, Err(Unclean::TaskEnded("fragile"))));
    }

    #[tokio::test(start_paused = true)]
    async fn task_that_ignores_the_drain_meets_the_deadline() {
        let tasks = Tasks::default();
        tasks.spawn("deaf", std::future::pending());
        tasks.drain().cancel();
        assert!(matches!(tasks.run_until_stopped().await, Err(Unclean::Deadline)));
    }
}
