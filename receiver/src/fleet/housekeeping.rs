//! The task that keeps sessions and directives in step with the store.
//!
//! Every second it wakes sessions for directives that another process or an earlier life of this one left
//! behind; every 30 seconds it ends directives whose time is over. Each step reads first and takes no write
//! lock when there is nothing to do. A failed step is tried again at the next tick.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::{Error, Fleet};
use crate::lifecycle::{Drain, Pulse};
use crate::platform::causes::chain;

const WAKE_INTERVAL: Duration = Duration::from_secs(1);
/// In ticks of [`WAKE_INTERVAL`].
const EXPIRY_TICKS: u64 = 30;

/// The task.
#[derive(Debug)]
pub struct Housekeeping {
    fleet: Fleet,
}

impl Housekeeping {
    /// Housekeeping of a fleet; the task is not started.
    pub fn new(fleet: Fleet) -> Self {
        Self { fleet }
    }

    /// Works until the drain.
    pub async fn run(self, mut pulse: Pulse, drain: Drain) {
        let mut ticks = tokio::time::interval(WAKE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for tick in 0_u64.. {
            // Cancel-safe: neither future holds anything that is lost.
            tokio::select! {
                _ = pulse.rest(ticks.tick()) => {}
                () = drain.begun() => return,
            }
            if let Err(error) = self.step(tick).await {
                tracing::warn!(
                    event = "housekeeping_failed",
                    component = "housekeeping",
                    error = chain(&error),
                    "trying again at the next tick"
                );
            }
        }
    }

    async fn step(&self, tick: u64) -> Result<(), Error> {
        for server in self.fleet.store.servers_with_undelivered(self.fleet.clock.now_ms()).await? {
            self.fleet.sessions.wake(server);
        }
        if tick.is_multiple_of(EXPIRY_TICKS) {
            self.fleet.expire_directives().await?;
        }
        Ok(())
    }
}
