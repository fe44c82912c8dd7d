//! Flushes heartbeats to the store: all servers' minutes in one transaction, once an interval.
//!
//! A store write per heartbeat is the trap that other systems fell into. Inbox: a clock and pings; output:
//! `server_samples` and `last_seen`. What cannot be written goes back to memory, under a bound.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use crate::lifecycle::{Drain, Pulse};
use crate::model::counters::SharedCounters;
use crate::platform::causes::chain;
use crate::platform::clock::SharedClock;
use crate::sessions::{Sessions, Unflushed};
use crate::store::{self, Store};

/// Samples older than this are removed at a flush.
const SAMPLES_KEPT_MINUTES: i64 = 31 * 24 * 60;

/// The task.
pub struct Flusher {
    pings: mpsc::Receiver<oneshot::Sender<()>>,
    store: Store,
    sessions: Sessions,
    interval: Duration,
    clock: SharedClock,
    counters: SharedCounters,
}

/// Asks the task whether it is alive. Cheap to clone.
#[derive(Clone, Debug)]
pub struct FlusherPulse(mpsc::Sender<oneshot::Sender<()>>);

impl FlusherPulse {
    /// A round trip through the task.
    pub async fn ping(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        self.0.send(answer).await.is_ok() && answered.await.is_ok()
    }
}

impl Flusher {
    /// Makes the task and its pulse; the task is not started.
    pub fn new(
        store: Store,
        sessions: Sessions,
        interval: Duration,
        clock: SharedClock,
        counters: SharedCounters,
    ) -> (Self, FlusherPulse) {
        // A few health checks at once at most; more wait.
        let (pulse, pings) = mpsc::channel(4);
        (Self { pings, store, sessions, interval, clock, counters }, FlusherPulse(pulse))
    }

    /// Flushes at every interval, and once more at the drain.
    pub async fn run(mut self, mut pulse: Pulse, drain: Drain) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Cancel-safe: each arm's future holds nothing that is lost.
            tokio::select! {
                () = pulse.called() => {}
                _ = ticks.tick() => self.flush().await,
                Some(answer) = self.pings.recv() => { let _ = answer.send(()); }
                () = drain.begun() => break,
            }
        }
        self.flush().await;
    }

    /// Writes all that waits, in one transaction.
    pub async fn flush(&self) {
        let waiting = self.sessions.take_unflushed();
        if waiting.is_empty() {
            return;
        }
        match self.write(&waiting).await {
            Ok(()) => self.counters.heartbeat_flushes.raise(),
            Err(error) => {
                tracing::warn!(
                    event = "flush_failed",
                    component = "flush",
                    error = chain(&error),
                    "heartbeats stay in memory until the next flush"
                );
                self.counters.samples_dropped.add(self.sessions.put_back(waiting));
            }
        }
    }

    async fn write(&self, waiting: &[Unflushed]) -> store::Result<()> {
        let mut tx = self.store.begin().await?;
        for unflushed in waiting {
            tx.seen(unflushed.server, unflushed.last_seen_ms).await?;
            for minute in &unflushed.minutes {
                tx.put_minute(unflushed.server, minute).await?;
            }
        }
        let now_minute = self.clock.now_ms().div_euclid(60_000);
        tx.forget_samples_before(now_minute - SAMPLES_KEPT_MINUTES).await?;
        tx.commit().await
    }
}
