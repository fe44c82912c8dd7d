//! When policies come due: cron in the policy's own time zone, as `croner` reads it.
//!
//! The decision ([`Schedule::decide`]) is pure: last time acted upon, now, rules in; what to do out. The task
//! sleeps until the next time, wakes when a policy changes, and looks at the clock at least once a minute,
//! so that a suspended or corrected clock is noticed. The due time is written down before the run is asked
//! for: a crash in between misses a run, which is visible, and never doubles one. Overlap is decided by
//! whoever starts runs.

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::Tz;
use croner::Cron;
use hestner_proto::words::Misfire;
use tokio::sync::{Notify, mpsc};

use crate::lifecycle::{Drain, Pulse};
use crate::platform::clock::SharedClock;
use crate::policy::{Policies, Policy};
use crate::store::{Store, StoreError};

/// The clock is looked at so often, whatever the schedule says.
const LOOK_AT_LEAST: Duration = Duration::from_secs(60);
/// A time that is later than this was missed: the daemon was not running.
const LATE_MAX: TimeDelta = TimeDelta::seconds(90);
/// A last time further ahead than this was written by a clock that was wrong; it is forgotten, or the
/// schedule would stand still until then.
const AHEAD_MAX: TimeDelta = TimeDelta::days(1);
/// The splay is at most this share of the time between two runs.
const SPLAY_SHARE: i32 = 10;
/// The longest splay.
const SPLAY_MAX: TimeDelta = TimeDelta::minutes(5);

/// A policy's schedule that cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    /// The five fields are wrong.
    #[error("`{cron}` is not a schedule of five fields: {reason}")]
    Cron {
        /// What was given.
        cron: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such time zone.
    #[error("`{0}` is not the name of a time zone")]
    Zone(String),
}

/// What a schedule says at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing is due; look again then.
    Wait(Option<DateTime<Utc>>),
    /// This time has come.
    Run(DateTime<Utc>),
    /// This time was missed and is passed over.
    PassOver(DateTime<Utc>),
}

/// A policy's schedule.
#[derive(Clone, Debug)]
pub struct Schedule {
    cron: Cron,
    zone: Tz,
    misfire: Misfire,
    seed: u64,
}

impl Schedule {
    /// Reads a policy's schedule. `None`: it has none. `seed` spreads servers that have the same one.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn of(policy: &Policy, seed: u64) -> Result<Option<Self>, ScheduleError> {
        if policy.cron.is_empty() {
            return Ok(None);
        }
        let wrong = |reason: String| ScheduleError::Cron { cron: policy.cron.clone(), reason };
        if policy.cron.split_whitespace().count() != 5 {
            return Err(wrong("it must have minute, hour, day, month and weekday".to_owned()));
        }
        let cron = Cron::from_str(&policy.cron).map_err(|error| wrong(error.to_string()))?;
        let zone = Tz::from_str(&policy.time_zone).map_err(|_| ScheduleError::Zone(policy.time_zone.clone()))?;
        Ok(Some(Self { cron, zone, misfire: policy.misfire(), seed }))
    }

    /// Decides. `last` is the time that was acted upon last.
    pub fn decide(&self, last: DateTime<Utc>, now: DateTime<Utc>) -> Decision {
        let Some(due) = self.after(last) else { return Decision::Wait(None) };
        let start = due + self.splay(due);
        if start > now {
            return Decision::Wait(Some(start));
        }
        if now - start <= LATE_MAX {
            return Decision::Run(due);
        }
        // Times were missed: act upon the latest of them, once.
        let latest = self.latest_before(due, now);
        match self.misfire {
            Misfire::Skip => Decision::PassOver(latest),
            Misfire::RunOnce => Decision::Run(latest),
        }
    }

    fn after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let next = self.cron.find_next_occurrence(&time.with_timezone(&self.zone), false).ok()?;
        Some(next.with_timezone(&Utc))
    }

    fn latest_before(&self, due: DateTime<Utc>, now: DateTime<Utc>) -> DateTime<Utc> {
        let previous = self.cron.find_previous_occurrence(&now.with_timezone(&self.zone), true);
        previous.map_or(due, |time| time.with_timezone(&Utc).max(due))
    }

    fn splay(&self, due: DateTime<Utc>) -> TimeDelta {
        let period = self.after(due).map_or(SPLAY_MAX, |next| next - due);
        let window = (period / SPLAY_SHARE).min(SPLAY_MAX).num_milliseconds().max(1).unsigned_abs();
        TimeDelta::milliseconds(i64::try_from(self.seed % window).unwrap_or(0))
    }
}

/// The task: looks at the policies of all services, and asks for runs.
pub struct Scheduler {
    /// The server; it spreads servers that have the same schedule.
    pub server_id: i64,
    /// Policies.
    pub policies: Policies,
    /// Where the last due times are kept.
    pub store: Store,
    /// The clock.
    pub clock: SharedClock,
    /// Rung when a policy has changed.
    pub changed: Arc<Notify>,
    /// Where runs are asked for.
    pub wishes: mpsc::Sender<String>,
}

impl Scheduler {
    /// Runs until the drain.
    pub async fn run(self, mut pulse: Pulse, drain: Drain) {
        loop {
            let pause = match self.look().await {
                Ok(pause) => pause,
                Err(error) => {
                    // A store that cannot be written keeps runs from starting; the next look tries again.
                    tracing::error!(event = "schedule_not_kept", error = %error);
                    LOOK_AT_LEAST
                }
            };
            let changed_or_due = async {
                // Whichever comes first; the look is the same.
                let _ = tokio::time::timeout(pause, self.changed.notified()).await;
            };
            tokio::select! {
                () = drain.cancelled() => return,
                () = pulse.rest(changed_or_due) => {}
            }
        }
    }

    /// Acts on every service once; returns how long to sleep.
    async fn look(&self) -> Result<Duration, StoreError> {
        let mut pause = LOOK_AT_LEAST;
        let services = self.policies.services().unwrap_or_else(|error| {
            tracing::error!(event = "policies_not_listed", error = %error);
            Vec::new()
        });
        for service in &services {
            let Some(schedule) = self.schedule_of(service) else { continue };
            pause = pause.min(self.act(service, &schedule).await?);
        }
        Ok(pause)
    }

    fn schedule_of(&self, service: &str) -> Option<Schedule> {
        let policy = match self.policies.load(service) {
            Ok(policy) => policy?,
            Err(error) => {
                tracing::error!(event = "policy_not_read", service, error = %error);
                return None;
            }
        };
        Schedule::of(&policy, seed(self.server_id, service)).unwrap_or_else(|error| {
            tracing::error!(event = "schedule_not_understood", service, error = %error);
            None
        })
    }

    async fn act(&self, service: &str, schedule: &Schedule) -> Result<Duration, StoreError> {
        let now = self.clock.now();
        let known = self.store.last_due(service.to_owned()).await?.and_then(DateTime::from_timestamp_millis);
        // A schedule that is new begins now; a clock that was set back does not repeat what was done.
        let Some(last) = known else {
            self.store.set_last_due(service.to_owned(), now.timestamp_millis()).await?;
            return Ok(Duration::ZERO);
        };
        if last - now > AHEAD_MAX {
            tracing::error!(event = "clock_was_ahead", service, last_due = %last);
            self.store.forget_last_due(service.to_owned()).await?;
            return Ok(Duration::ZERO);
        }
        match schedule.decide(last, now) {
            Decision::Wait(Some(start)) => Ok((start - now).to_std().unwrap_or(Duration::ZERO)),
            Decision::Wait(None) => Ok(LOOK_AT_LEAST),
            Decision::PassOver(due) => {
                tracing::warn!(event = "schedule_missed", service, due = %due);
                self.store.set_last_due(service.to_owned(), due.timestamp_millis()).await?;
                Ok(Duration::ZERO)
            }
            Decision::Run(due) => {
                self.store.set_last_due(service.to_owned(), due.timestamp_millis()).await?;
                // The other end is gone only when the daemon stops.
                let _ = self.wishes.send(service.to_owned()).await;
                Ok(Duration::ZERO)
            }
        }
    }
}

/// Spreads servers that have the same schedule.
fn seed(server_id: i64, service: &str) -> u64 {
    let hash = hestner_proto::sha256::hex(format!("{server_id}/{service}").as_bytes());
    u64::from_str_radix(&hash[..16], 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Wishes;

    fn schedule(cron: &str, zone: &str, misfire: &str) -> Schedule {
        let policy = Policy {
            policy_id: 1,
            service: "docs".into(),
            cron: cron.into(),
            time_zone: zone.into(),
            retention_days: 0,
            retention_count: 0,
            destination: "local".into(),
            encryption_enabled: true,
            misfire: misfire.into(),
            wishes: Wishes::default(),
        };
        Schedule::of(&policy, 0).unwrap().unwrap()
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn time_that_has_come_is_run_once() {
        let s = schedule("0 3 * * *", "UTC", "skip");
        let last = at("2026-05-01T03:00:00Z");
        assert_eq!(s.decide(last, at("2026-05-02T02:59:59Z")), Decision::Wait(Some(at("2026-05-02T03:00:00Z"))));
        assert_eq!(s.decide(last, at("2026-05-02T03:00:01Z")), Decision::Run(at("2026-05-02T03:00:00Z")));
        assert_eq!(
            s.decide(at("2026-05-02T03:00:00Z"), at("2026-05-02T03:00:02Z")),
            Decision::Wait(Some(at("2026-05-03T03:00:00Z")))
        );
    }

    #[test]
    fn missed_times_are_passed_over_or_run_once_never_more() {
        let (last, now) = (at("2026-05-01T03:00:00Z"), at("2026-05-09T12:00:00Z"));
        let latest = at("2026-05-09T03:00:00Z");
        assert_eq!(schedule("0 3 * * *", "UTC", "skip").decide(last, now), Decision::PassOver(latest));
        assert_eq!(schedule("0 3 * * *", "UTC", "run_once").decide(last, now), Decision::Run(latest));
    }

    #[test]
    fn summer_time_neither_drops_nor_doubles_a_run() {
        let s = schedule("30 2 * * *", "Europe/Berlin", "skip");
        // In the night of the spring change there is no 02:30; the run is at 03:00 summer time.
        assert_eq!(s.after(at("2026-03-28T12:00:00Z")), Some(at("2026-03-29T01:00:00Z")));
        // In the night of the autumn change 02:30 comes twice; it runs once.
        let first = s.after(at("2026-10-24T12:00:00Z")).unwrap();
        assert_eq!(first, at("2026-10-25T00:30:00Z"));
        assert_eq!(s.after(first), Some(at("2026-10-26T01:30:00Z")));
    }

    #[test]
    fn clock_that_was_set_back_repeats_nothing() {
        let s = schedule("0 3 * * *", "UTC", "run_once");
        let decision = s.decide(at("2026-05-02T03:00:00Z"), at("2026-05-01T01:00:00Z"));
        assert_eq!(decision, Decision::Wait(Some(at("2026-05-03T03:00:00Z"))));
    }

    #[test]
    fn splay_stays_within_a_tenth_of_the_period() {
        let mut s = schedule("* * * * *", "UTC", "skip");
        for seed in [0, 1, 5_999, 6_000, u64::MAX] {
            s.seed = seed;
            assert!(s.splay(at("2026-05-01T03:00:00Z")) < TimeDelta::seconds(6));
        }
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_its_text() {
        let mut policy = Policy {
            policy_id: 1,
            service: "docs".into(),
            cron: "every day".into(),
            time_zone: "UTC".into(),
            retention_days: 0,
            retention_count: 0,
            destination: "local".into(),
            encryption_enabled: true,
            misfire: "skip".into(),
            wishes: Wishes::default(),
        };
        assert!(Schedule::of(&policy, 0).unwrap_err().to_string().contains("every day"));
        policy.cron = "0 3 * * *".into();
        policy.time_zone = "Mars/Olympus".into();
        assert!(matches!(Schedule::of(&policy, 0), Err(ScheduleError::Zone(_))));
        policy.cron = String::new();
        assert!(Schedule::of(&policy, 0).unwrap().is_none());
    }
}
