//! How the host is doing: a sample now and then, and the usage of each hour.
//!
//! Samples are for the session, which sends the latest one as a heartbeat; nothing keeps them. Usage is
//! what costs are computed from, so it is no heartbeat but a numbered report, one an hour, handed to a
//! channel when the hour is over.

use chrono::{DateTime, DurationRound as _, TimeDelta, Utc};
use hestner_proto::v1;
use serde::Deserialize;
use std::time::Duration;
use sysinfo::{DiskRefreshKind, Disks, MemoryRefreshKind, Networks, System};
use tokio::sync::{mpsc, watch};
use toml_example::TomlExample;

use crate::lifecycle::{Drain, Pulse};
use crate::platform::clock::SharedClock;
use crate::report::Usage;

/// Settings of heartbeats.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// How often the host is looked at; the receiver says how often it wants to hear.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "30s")]
    pub sample_interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { sample_interval: Duration::from_secs(30) }
    }
}

/// Looks at the host.
struct Probe {
    system: System,
    disks: Disks,
    networks: Networks,
}

impl Probe {
    fn new() -> Result<Self, sysinfo::Error> {
        Ok(Self {
            system: System::new()?,
            disks: Disks::new_with_refreshed_list_specifics(DiskRefreshKind::nothing().with_storage())?,
            networks: Networks::new_with_refreshed_list()?,
        })
    }

    fn look(&mut self, now: DateTime<Utc>) -> v1::Heartbeat {
        self.system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        self.system.refresh_cpu_usage();
        self.disks.refresh_specifics(true, DiskRefreshKind::nothing().with_storage());
        self.networks.refresh(true);
        let load = System::load_average().ok();
        let (disk_total_bytes, disk_used_bytes) = self.disk_bytes();
        let beyond = || self.networks.iter().filter(|(name, _)| name.as_os_str() != "lo");
        v1::Heartbeat {
            now_ms: now.timestamp_millis(),
            load1: load.as_ref().map_or(0.0, |l| l.one),
            load5: load.as_ref().map_or(0.0, |l| l.five),
            load15: load.as_ref().map_or(0.0, |l| l.fifteen),
            cpu_busy: f64::from(self.system.global_cpu_usage()) / 100.0,
            memory_total_bytes: self.system.total_memory(),
            memory_used_bytes: self.system.used_memory(),
            disk_total_bytes,
            disk_used_bytes,
            network_received_bytes: beyond().map(|(_, n)| n.total_received()).sum(),
            network_sent_bytes: beyond().map(|(_, n)| n.total_transmitted()).sum(),
            uptime_seconds: System::uptime().unwrap_or(0),
            runs_active: 0,
            outbox_reports: 0,
        }
    }

    /// Total and used bytes of all disks; one that is mounted several times counts once.
    fn disk_bytes(&self) -> (u64, u64) {
        let mut seen = std::collections::BTreeSet::new();
        let distinct = self.disks.iter().filter(|disk| seen.insert(disk.name().to_owned()));
        distinct.fold((0, 0), |(total, used), disk| {
            (total + disk.total_space(), used + disk.total_space().saturating_sub(disk.available_space()))
        })
    }
}

/// Adds up the samples of an hour. Pure.
#[derive(Debug)]
struct Meter {
    hour: DateTime<Utc>,
    last: v1::Heartbeat,
    usage: Usage,
}

impl Meter {
    fn begin(first: v1::Heartbeat, now: DateTime<Utc>) -> Self {
        let hour = now.duration_trunc(TimeDelta::hours(1)).unwrap_or(now);
        Self { hour, last: first, usage: Usage { hour_start_ms: hour.timestamp_millis(), ..Usage::default() } }
    }

    /// Takes a sample; returns the usage of an hour that is over.
    fn take(&mut self, sample: v1::Heartbeat, now: DateTime<Utc>, cores: usize) -> Option<Usage> {
        // A clock that jumps adds no usage: more than an hour between samples is nobody's processor time.
        let milliseconds = sample.now_ms.saturating_sub(self.last.now_ms).clamp(0, 3_600_000);
        let seconds = milliseconds as f64 / 1000.0;
        self.usage.observed_seconds += u32::try_from((milliseconds + 500) / 1000).unwrap_or(0);
        self.usage.cpu_core_seconds += sample.cpu_busy * seconds * cores as f64;
        self.usage.memory_byte_seconds += sample.memory_used_bytes as f64 * seconds;
        self.usage.disk_used_bytes = sample.disk_used_bytes;
        // After a reboot the counter begins anew.
        let sent = sample.network_sent_bytes.checked_sub(self.last.network_sent_bytes);
        self.usage.network_sent_bytes += sent.unwrap_or(sample.network_sent_bytes);
        self.last = sample;
        let hour = now.duration_trunc(TimeDelta::hours(1)).unwrap_or(now);
        if hour == self.hour {
            return None;
        }
        let next = Self::begin(sample, now);
        let mut over = std::mem::replace(self, next).usage;
        over.observed_seconds = over.observed_seconds.min(3600);
        Some(over)
    }
}

/// The task.
pub struct Heart {
    /// Its settings.
    pub settings: Settings,
    /// The clock.
    pub clock: SharedClock,
    /// Where the latest look is seen; the session fills in what only it knows.
    pub latest: watch::Sender<v1::Heartbeat>,
    /// Where the usage of each hour goes.
    pub usage: mpsc::Sender<Usage>,
}

impl Heart {
    /// Runs until the drain.
    pub async fn run(self, mut pulse: Pulse, drain: Drain) {
        let mut probe = match Probe::new() {
            Ok(probe) => probe,
            Err(error) => {
                // Without /proc there is nothing to tell; backups go on.
                tracing::error!(event = "host_not_readable", error = %error);
                return pulse.rest(drain.cancelled()).await;
            }
        };
        let now = self.clock.now();
        let mut meter = Meter::begin(probe.look(now), now);
        let mut ticks = tokio::time::interval(self.settings.sample_interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = drain.cancelled() => return,
                _ = pulse.rest(ticks.tick()) => self.beat(&mut probe, &mut meter).await,
            }
        }
    }

    async fn beat(&self, probe: &mut Probe, meter: &mut Meter) {
        let now = self.clock.now();
        let heartbeat = probe.look(now);
        let cores = probe.system.cpus().len().max(1);
        if let Some(usage) = meter.take(heartbeat, now, cores) {
            // The other end is gone only when the daemon stops.
            let _ = self.usage.send(usage).await;
        }
        self.latest.send_replace(heartbeat);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(now: DateTime<Utc>, sent: u64) -> v1::Heartbeat {
        v1::Heartbeat {
            now_ms: now.timestamp_millis(),
            cpu_busy: 0.5,
            memory_used_bytes: 1000,
            network_sent_bytes: sent,
            ..Default::default()
        }
    }

    #[test]
    fn hour_is_reported_once_when_it_is_over() {
        let start: DateTime<Utc> = "2026-05-01T10:00:00Z".parse().unwrap();
        let mut meter = Meter::begin(sample(start, 0), start);
        let mut reported = Vec::new();
        for i in 1..=240_u64 {
            let now = start + TimeDelta::seconds(30 * i as i64);
            reported.extend(meter.take(sample(now, 10 * i), now, 2));
        }
        assert_eq!(reported.len(), 2);
        let first = &reported[0];
        assert_eq!((first.hour_start_ms, first.observed_seconds), (start.timestamp_millis(), 3600));
        assert!((first.cpu_core_seconds - 3600.0).abs() < 1.0, "half of two cores for an hour");
        assert_eq!(first.network_sent_bytes, 1200);
    }

    #[test]
    fn counter_that_began_anew_and_clock_that_jumped_add_no_nonsense() {
        let start: DateTime<Utc> = "2026-05-01T10:00:00Z".parse().unwrap();
        let mut meter = Meter::begin(sample(start, 1_000_000), start);
        let back = start - TimeDelta::minutes(10);
        let usage = meter.take(sample(back, 70), back, 2).expect("another hour");
        assert_eq!((usage.network_sent_bytes, usage.observed_seconds), (70, 0));
    }

    #[test]
    fn this_host_can_be_looked_at() {
        let heartbeat = Probe::new().unwrap().look(DateTime::UNIX_EPOCH);
        assert!(heartbeat.memory_total_bytes > heartbeat.memory_used_bytes && heartbeat.memory_used_bytes > 0);
    }
}
