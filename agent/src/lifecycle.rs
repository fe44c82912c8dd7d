//! How the process lives: its tasks, and how it stops.
//!
//! Every long task is started through [`Tasks`]. One that ends before it was asked to, or panics, brings
//! the whole process down with an error instead of leaving a daemon that does half its work. Stopping is
//! one signal to all tasks and a deadline; a second signal cuts the deadline short.
//!
//! One that neither ends nor goes on is found by its [`Pulse`]: the watchdog calls, and whoever rests
//! answers. The service manager hears that the process lives only while all have answered, or are at work
//! for no longer than [`STUCK_AFTER`].

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long tasks may take to end after the signal to stop.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// A task that is at work for longer without coming to rest is stuck. Nothing that a daemon waits for away
/// from its rest takes half as long: commands, Docker and the receiver have timeouts of their own.
pub const STUCK_AFTER: Duration = Duration::from_secs(150);
/// How many times the watchdog calls within the time that the service manager grants.
const CALLS_PER_WATCHDOG: u32 = 3;

/// Tells a task that it should come to an end.
pub type Drain = CancellationToken;

/// The tasks of the process.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    drain: Drain,
    failed: Arc<Mutex<Option<&'static str>>>,
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
        let Some(granted) = granted else { return self.drain.cancelled().await };
        let mut ticks = tokio::time::interval(granted / CALLS_PER_WATCHDOG);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.drain.cancelled() => return,
                _ = ticks.tick() => {}
            }
            match self.register.call() {
                none if none.is_empty() => alive(),
                stuck => tracing::error!(event = "task_stuck", tasks = ?stuck),
            }
        }
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

    /// Waits for SIGTERM, SIGINT or the failure of a task, calls `stopping`, then waits for all tasks to end.
    ///
    /// # Errors
    /// [`Unclean`], when anything but an orderly stop happened.
    pub async fn run_until_stopped(self, stopping: impl FnOnce()) -> Result<(), Unclean> {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
            () = self.drain.cancelled() => {}
        }
        tracing::info!(event = "draining");
        stopping();
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
        assert!(matches!(tasks.run_until_stopped(|| {}).await, Err(Unclean::TaskEnded("fragile"))));
    }

    #[tokio::test(start_paused = true)]
    async fn task_that_ignores_the_drain_meets_the_deadline() {
        let tasks = Tasks::default();
        tasks.spawn("deaf", std::future::pending());
        tasks.drain().cancel();
        assert!(matches!(tasks.run_until_stopped(|| {}).await, Err(Unclean::Deadline)));
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
        tasks.drain().cancel();
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

    #[tokio::test(start_paused = true)]
    async fn watchdog_falls_silent_when_a_task_that_rests_is_never_polled() {
        let tasks = Tasks::default();
        let (alive, heard) = signs();
        let mut starved = tasks.pulse("starved");
        // It rests, but whoever should drive it does not.
        let mut rest = Box::pin(async move { starved.rest(std::future::pending::<()>()).await });
        assert!(tokio::time::timeout(Duration::from_secs(1), &mut rest).await.is_err());
        tasks.spawn("watchdog", tasks.clone().watch_over(GRANTED, alive));
        tokio::time::sleep(STUCK_AFTER + Duration::from_secs(20)).await;
        heard();
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert_eq!(heard(), 0);
        drop(rest);
    }
}
