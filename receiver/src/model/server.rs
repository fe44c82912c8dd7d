//! Servers, their services and their series, as the receiver keeps and shows them.
//!
//! [`Minute`] is the accumulator of heartbeats: averages of what goes up and down, the last value of what
//! only counts. Everything else here is a form that REST shows.

use hestner_proto::v1;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::policy::Policy;
use super::range::Range;
use super::run::{Run, number};

/// A company.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Company {
    /// The row.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// `active` or `suspended`.
    pub status: String,
    /// Fingerprint of the recovery key that hosts compare at enrolment.
    pub recovery_fingerprint: String,
    /// RFC 3339.
    pub created_at: String,
}

/// What stands between a server and the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServerStatus {
    /// It has an open session.
    Online,
    /// It has none.
    Offline,
    /// Its report numbers forked; it is kept out until it is enrolled anew.
    Quarantined,
    /// Its identity was taken back.
    Revoked,
}

/// A server.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Server {
    /// The row.
    pub id: i64,
    /// Its company.
    pub company_id: i64,
    /// A name for people.
    pub name: String,
    /// `online`, `offline`, `quarantined` or `revoked`.
    pub status: ServerStatus,
    /// Environment, such as `production`.
    pub env: Option<String>,
    /// Region or data centre.
    pub region: Option<String>,
    /// Free labels.
    #[schema(value_type = Object)]
    pub labels: serde_json::Value,
    /// Version of its agent.
    pub agent_version: String,
    /// Whether daemon and runner have separate privileges on the host.
    pub separated: bool,
    /// RFC 3339.
    pub enrolled_at: String,
    /// When it was last heard of, RFC 3339.
    pub last_seen_at: Option<String>,
    /// The agent's clock minus the receiver's at its last hello.
    pub clock_skew_ms: Option<i64>,
    /// Host facts of the last inventory.
    pub host: Host,
    /// Names of the destinations it defines.
    pub destinations: Vec<String>,
    /// When the last inventory came, RFC 3339.
    pub inventory_at: Option<String>,
}

/// Services that an inventory may name.
pub const SERVICES_MAX: usize = 5_000;
/// Grants that an inventory may name.
const GRANTS_MAX: usize = 50_000;
/// Destinations that an inventory may name.
const DESTINATIONS_MAX: usize = 100;

/// What an inventory has too much of, if it does. One host must not be able to hold the writer for long.
pub fn inventory_mistake(inventory: &v1::Inventory) -> Option<String> {
    let lists = [
        ("services", inventory.services.len(), SERVICES_MAX),
        ("grants", inventory.grants.len(), GRANTS_MAX),
        ("destinations", inventory.destinations.len(), DESTINATIONS_MAX),
    ];
    let too_long = lists.into_iter().find(|(_, count, max)| count > max);
    too_long.map(|(what, count, max)| format!("{count} {what}; {max} is the most"))
}

/// Host facts.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct Host {
    /// As the host says.
    pub hostname: String,
    /// Operating system.
    pub os: String,
    /// Kernel's version.
    pub kernel: String,
    /// Such as `x86_64`.
    pub architecture: String,
    /// Logical processors.
    pub cpus: i64,
    /// Memory.
    pub memory_bytes: i64,
}

/// Something that runs or lives on a server.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Service {
    /// The row; the same for as long as server and name are.
    pub id: i64,
    /// The server.
    pub server_id: i64,
    /// Its name.
    pub name: String,
    /// `files`, `command`, `systemd`, `docker` or `host`.
    pub runtime: String,
    /// Its version, if it has one.
    pub version: String,
    /// `ok`, `degraded`, `failed`, `stopped` or `unknown`.
    pub health: String,
    /// Best consistency a snapshot can reach; empty when it is not set up for snapshots.
    pub consistency: String,
    /// What the host allows.
    pub grants: Vec<Grant>,
}

/// What a host allows for one service and verb.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Grant {
    /// The verb.
    pub verb: String,
    /// `deny`, `confirm` or `allow`.
    pub value: String,
}

/// One point of a series: the average over a bucket; counters as last seen in it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Point {
    /// Begin of the bucket, RFC 3339.
    pub at: String,
    /// Load averages.
    pub load1: f64,
    /// Over 5 minutes.
    pub load5: f64,
    /// Over 15 minutes.
    pub load15: f64,
    /// Busy share of all cores, 0 to 1.
    pub cpu_busy: f64,
    /// Memory there is.
    pub memory_total_bytes: i64,
    /// Memory in use.
    pub memory_used_bytes: i64,
    /// Disk there is.
    pub disk_total_bytes: i64,
    /// Disk in use.
    pub disk_used_bytes: i64,
    /// Counter since boot.
    pub network_received_bytes: i64,
    /// Counter since boot.
    pub network_sent_bytes: i64,
    /// Since boot.
    pub uptime_seconds: i64,
    /// Runs going on.
    pub runs_active: i64,
    /// Reports the agent still holds.
    pub outbox_reports: i64,
}

/// A server at a glance.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Overview {
    /// The server.
    pub server: Server,
    /// The range that was asked for.
    pub range: Range,
    /// Width of a bucket.
    pub bucket_seconds: i64,
    /// Buckets with data, oldest first.
    pub series: Vec<Point>,
    /// The newest run.
    pub last_run: Option<Run>,
    /// The policy that is due next.
    pub next_policy: Option<Policy>,
}

/// Heartbeats of one server in one minute.
#[derive(Clone, Debug, Default, PartialEq)]
#[expect(missing_docs, reason = "fields as on the wire; averages are kept as sums until they are stored")]
pub struct Minute {
    /// Minutes since the Unix epoch.
    pub minute: i64,
    /// How many heartbeats it holds.
    pub heartbeats: i64,
    pub load1: f64,
    pub load5: f64,
    pub load15: f64,
    pub cpu_busy: f64,
    pub memory_used_bytes: f64,
    pub disk_used_bytes: f64,
    pub memory_total_bytes: i64,
    pub disk_total_bytes: i64,
    pub network_received_bytes: i64,
    pub network_sent_bytes: i64,
    pub uptime_seconds: i64,
    pub runs_active: i64,
    pub outbox_reports: i64,
}

impl Minute {
    /// An empty one.
    pub fn new(minute: i64) -> Self {
        Self { minute, ..Self::default() }
    }

    /// Takes in a heartbeat. Numbers that are none count as 0: one bad gauge must not spoil a series.
    pub fn add(&mut self, beat: &v1::Heartbeat) {
        let finite = |value: f64| if value.is_finite() { value.max(0.0) } else { 0.0 };
        self.heartbeats += 1;
        self.load1 += finite(beat.load1);
        self.load5 += finite(beat.load5);
        self.load15 += finite(beat.load15);
        self.cpu_busy += finite(beat.cpu_busy).min(1.0);
        self.memory_used_bytes += number(beat.memory_used_bytes) as f64;
        self.disk_used_bytes += number(beat.disk_used_bytes) as f64;
        self.memory_total_bytes = number(beat.memory_total_bytes);
        self.disk_total_bytes = number(beat.disk_total_bytes);
        self.network_received_bytes = number(beat.network_received_bytes);
        self.network_sent_bytes = number(beat.network_sent_bytes);
        self.uptime_seconds = number(beat.uptime_seconds);
        self.runs_active = i64::from(beat.runs_active);
        self.outbox_reports = number(beat.outbox_reports);
    }

    /// The average of a gauge whose sum is `sum`.
    pub fn average(&self, sum: f64) -> f64 {
        if self.heartbeats == 0 { 0.0 } else { sum / self.heartbeats as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_that_is_no_number_does_not_spoil_the_minute() {
        let mut minute = Minute::new(1);
        minute.add(&v1::Heartbeat { load1: f64::NAN, cpu_busy: f64::INFINITY, ..Default::default() });
        minute.add(&v1::Heartbeat { load1: 2.0, cpu_busy: 7.0, memory_used_bytes: 10, ..Default::default() });
        assert_eq!(minute.average(minute.load1), 1.0);
        assert_eq!(minute.average(minute.cpu_busy), 0.5);
        assert_eq!(minute.average(minute.memory_used_bytes), 5.0);
    }
}
