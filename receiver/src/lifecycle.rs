//! Starting tasks, noticing when one ends that should not, and stopping in good order.
//!
//! [`Tasks`] starts them; a long-lived task that ends before the drain, or any task that panics, asks for
//! the whole process to stop, because a receiver that looks alive without its writer is worse than one
//! that restarts. [`Drain`] is the signal to stop; [`Tasks::finish`] waits, with a deadline.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Longest time from the signal to stop until the process ends regardless.
pub const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// The signal to stop. Cheap to clone; all clones are one signal.
#[derive(Clone, Debug, Default)]
pub struct Drain(CancellationToken);

impl Drain {
    /// Asks everybody to stop.
    pub fn begin(&self) {
        self.0.cancel();
    }

    /// Waits until somebody asked to stop. Cancel-safe.
    pub async fn begun(&self) {
        self.0.cancelled().await;
    }

    /// Whether somebody asked to stop.
    pub fn has_begun(&self) -> bool {
        self.0.is_cancelled()
    }
}

/// Starts and watches tasks. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    drain: Drain,
    broken: Arc<Mutex<Option<&'static str>>>,
}

/// Reports the end of a task also when it panics, because it does so in its `Drop`.
struct Watch {
    name: &'static str,
    may_end: bool,
    tasks: Tasks,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let unexpected = std::thread::panicking() || !(self.may_end || self.tasks.drain.has_begun());
        if unexpected {
            tracing::error!(
                event = "task_ended",
                component = "lifecycle",
                task = self.name,
                "a task ended that must not; stopping"
            );
            if let Ok(mut broken) = self.tasks.broken.lock() {
                broken.get_or_insert(self.name);
            }
            self.tasks.drain.begin();
        }
    }
}

impl Tasks {
    /// Tasks that stop with `drain`.
    pub fn new(drain: Drain) -> Self {
        Self { drain, ..Self::default() }
    }

    /// The signal to stop.
    pub fn drain(&self) -> &Drain {
        &self.drain
    }

    /// Starts a task that lives until the drain. If it ends earlier the process stops.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, false, task);
    }

    /// Starts a task that may end by itself, such as one connection. Only its panic stops the process.
    pub fn spawn_passing(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, true, task);
    }

    fn start(&self, name: &'static str, may_end: bool, task: impl Future<Output = ()> + Send + 'static) {
        let watch = Watch { name, may_end, tasks: self.clone() };
        self.tracker.spawn(async move {
            let _watch = watch;
            task.await;
        });
    }

    /// Waits until all tasks have ended, at most [`DRAIN_TIME_MAX`], or until `cut_short` is done.
    ///
    /// # Errors
    /// The name of the task that ended before its time, if one did.
    pub async fn finish(&self, cut_short: impl Future<Output = ()>) -> Result<(), &'static str> {
        self.tracker.close();
        tokio::select! {
            () = self.tracker.wait() => {}
            () = tokio::time::sleep(DRAIN_TIME_MAX) => {
                tracing::warn!(event = "drain_deadline", component = "lifecycle", tasks = self.tracker.len(), "stopping although tasks still run");
            }
            () = cut_short => tracing::warn!(event = "drain_cut_short", component = "lifecycle", "stopping at once"),
        }
        let broken = self.broken.lock().map(|broken| *broken).unwrap_or(Some("unknown"));
        broken.map_or(Ok(()), Err)
    }
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// When the handlers cannot be set.
pub async fn asked_to_stop() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lasting_task_that_ends_stops_the_others_and_is_named() {
        let tasks = Tasks::default();
        let drain = tasks.drain().clone();
        tasks.spawn("waits", async move { drain.begun().await });
        tasks.spawn("ends", async {});
        assert_eq!(tasks.finish(std::future::pending()).await, Err("ends"));
    }

    #[tokio::test]
    async fn a_passing_task_may_end_but_not_panic() {
        let tasks = Tasks::default();
        tasks.spawn_passing("ends", async {});
        tokio::task::yield_now().await;
        assert!(!tasks.drain().has_begun());
        tasks.spawn_passing("panics", async { panic!("on purpose") });
        assert_eq!(tasks.finish(std::future::pending()).await, Err("panics"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_hangs_is_left_behind_at_the_deadline() {
        let tasks = Tasks::default();
        tasks.spawn("hangs", std::future::pending());
        tasks.drain().begin();
        assert_eq!(tasks.finish(std::future::pending()).await, Ok(()));
    }
}
