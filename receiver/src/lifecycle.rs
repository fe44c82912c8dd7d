//! Starting tasks, noticing when one ends that should not, and stopping in good order.
//!
//! [`Tasks`] starts them; a long-lived task that ends before the drain, or any task that panics, asks for
//! the whole process to stop, because a receiver that looks alive without its writer is worse than one
//! that restarts. [`Drain`] is the signal to stop; [`Tasks::finish`] waits, with a deadline.
//! A task that neither ends nor goes on is found by its [`Pulse`]: the watchdog calls, and whoever rests answers.
//! The service manager hears that the process lives only while all have answered, or are at work for no
//! longer than [`STUCK_AFTER`].

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Longest time from the signal to stop until the process ends regardless.
pub const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// A task that is at work for longer without coming to rest is stuck.
pub const STUCK_AFTER: Duration = Duration::from_secs(150);
/// How many times the watchdog calls within the time that the service manager grants.
const CALLS_PER_WATCHDOG: u32 = 3;

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
    register: Arc<Register>,
}

/// Who has answered the watchdog's calls.
#[derive(Debug, Default)]
struct Register {
    calls: watch::Sender<u64>,
    tasks: Mutex<Vec<Entry>>,
}

#[derive(Debug)]
struct Entry {
    name: &'static str,
    /// The call that it has answered last.
    answered: u64,
    at: Instant,
}

impl Register {
    /// Calls everybody. Returns who has not answered the last call and is at work for too long.
    fn call(&self) -> Vec<&'static str> {
        let last = *self.calls.borrow();
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let stuck = tasks.iter().filter(|task| task.answered < last && task.at.elapsed() > STUCK_AFTER);
        let stuck = stuck.map(|task| task.name).collect();
        drop(tasks);
        self.calls.send_modify(|call| *call += 1);
        stuck
    }
}

/// A long task's sign of life.
#[derive(Debug)]
pub struct Pulse {
    register: Arc<Register>,
    calls: watch::Receiver<u64>,
    place: usize,
}

impl Pulse {
    /// Waits at the place where the task has nothing else to do, and answers the watchdog meanwhile. Cancel-safe
    /// where `until` is.
    pub async fn rest<T>(&mut self, until: impl Future<Output = T>) -> T {
        let mut until = std::pin::pin!(until);
        loop {
            self.answer();
            tokio::select! {
                came = &mut until => {
                    self.answer();
                    return came;
                }
                () = self.called() => {}
            }
        }
    }

    /// Answers the watchdog's next call: for loops that wait for several things at once. Cancel-safe.
    pub async fn called(&mut self) {
        if self.calls.changed().await.is_err() {
            // Nobody calls any more: the process stops.
            std::future::pending::<()>().await;
        }
        self.answer();
    }

    fn answer(&self) {
        let call = *self.calls.borrow();
        let mut tasks = self.register.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = tasks.get_mut(self.place) {
            (entry.answered, entry.at) = (call, Instant::now());
        }
    }
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

    /// The sign of life of a long task.
    pub fn pulse(&self, name: &'static str) -> Pulse {
        let calls = self.register.calls.subscribe();
        let mut tasks = self.register.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.push(Entry { name, answered: *calls.borrow(), at: Instant::now() });
        Pulse { register: Arc::clone(&self.register), calls, place: tasks.len() - 1 }
    }

    /// Calls `alive` several times within `granted`, while all who have a pulse answer; until the drain.
    /// `None`: nobody wants to hear it.
    pub async fn watch_over(self, granted: Option<Duration>, alive: impl Fn() + Send) {
        let Some(granted) = granted else { return self.drain.begun().await };
        let mut ticks = tokio::time::interval(granted / CALLS_PER_WATCHDOG);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.drain.begun() => return,
                _ = ticks.tick() => {}
            }
            match self.register.call() {
                none if none.is_empty() => alive(),
                stuck => {
                    tracing::error!(event = "task_stuck", component = "lifecycle", tasks = ?stuck, "tasks do not go on")
                }
            }
        }
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

    const GRANTED: Option<Duration> = Some(Duration::from_secs(30));

    /// A sign of life, and how many of them there were since the last question.
    fn signs() -> (impl Fn() + Send + 'static, impl Fn() -> usize) {
        let count = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        let alive = move || {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        };
        (alive, move || count.swap(0, std::sync::atomic::Ordering::Relaxed))
    }

    #[tokio::test(start_paused = true)]
    async fn watchdog_hears_of_life_while_tasks_rest_or_work_for_a_while() {
        let tasks = Tasks::default();
        let (alive, heard) = signs();
        let (mut resting, mut working) = (tasks.pulse("resting"), tasks.pulse("working"));
        tasks.spawn("resting", async move { resting.rest(std::future::pending()).await });
        tasks.spawn("working", async move {
            loop {
                working.rest(tokio::time::sleep(Duration::from_secs(1))).await;
                tokio::time::sleep(STUCK_AFTER / 2).await;
            }
        });
        tasks.spawn("watchdog", tasks.clone().watch_over(GRANTED, alive));
        for minute in 0..60 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert!(heard() >= 5, "a word every 10 s, also in minute {minute}");
        }
        tasks.drain().begin();
    }

    #[tokio::test(start_paused = true)]
    async fn watchdog_falls_silent_when_one_of_the_tasks_is_stuck() {
        let tasks = Tasks::default();
        let (alive, heard) = signs();
        let (mut resting, mut stuck) = (tasks.pulse("resting"), tasks.pulse("stuck"));
        tasks.spawn("resting", async move { resting.rest(std::future::pending()).await });
        tasks.spawn("stuck", async move {
            stuck.rest(tokio::time::sleep(Duration::from_secs(60))).await;
            std::future::pending::<()>().await;
        });
        tasks.spawn("watchdog", tasks.clone().watch_over(GRANTED, alive));
        tokio::time::sleep(Duration::from_secs(60) + STUCK_AFTER).await;
        assert!(heard() > 0);
        tokio::time::sleep(Duration::from_secs(15)).await;
        heard();
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert_eq!(heard(), 0, "it lives, and half of it does not work");
    }
}
