//! Snapshot policies: what is accepted, and when one is due next.
//!
//! The centre checks form only (can the schedule be read, are the numbers in range). Whether the host
//! allows it (its destination, its floor, encryption) is decided on the host and comes back as the state.

use chrono::DateTime;
use croner::parser::{CronParser, Seconds, Year};
use hestner_proto::words::{Misfire, Priority};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{ServerId, times};

/// Longest name of a service or destination, in bytes.
pub const NAME_BYTES_MAX: usize = 200;
/// How long a policy's directive waits for its host.
pub const POLICY_WAITS_MS: i64 = 30 * 24 * 3_600_000;
const CRON_BYTES_MAX: usize = 200;
const RETENTION_MAX: u32 = 36_500;
/// What zstd knows without asking for more memory of whoever reads.
const COMPRESSION_LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

/// What a caller asks for.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PolicyInput {
    /// The service it is about. Where it is left out, the only one of the server that is set up for snapshots.
    #[serde(default)]
    pub service: String,
    /// Five fields, in `time_zone`; empty switches the schedule off.
    #[schema(example = "30 2 * * *")]
    pub cron: String,
    /// IANA name.
    #[serde(default = "utc")]
    #[schema(example = "America/Sao_Paulo", default = "UTC")]
    pub time_zone: String,
    /// Keep what is younger than this; 0 keeps by count only.
    pub retention_days: u32,
    /// Keep at least so many.
    pub retention_count: u32,
    /// A destination's name as the host defines it.
    pub destination: String,
    /// False only where the host's settings allow it.
    pub encryption_enabled: bool,
    /// `skip` or `run_once`.
    #[serde(default = "skip")]
    #[schema(default = "skip")]
    pub misfire: String,
    /// How hard a backup is compressed: 1 to 19, and at most what the host allows. Left out, the host's settings stand.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 19)]
    pub compression_level: Option<i32>,
    /// `normal`, `low` or `idle`: how far a backup goes behind what else the host does. It can only lower what the
    /// host's settings say.
    #[serde(default)]
    #[schema(example = "low")]
    pub priority: Option<String>,
    /// Read every file, also those that look unchanged. Left out, the host's settings stand.
    #[serde(default)]
    pub force_read: Option<bool>,
    /// Leave out what lies in folders with a `CACHEDIR.TAG`. Left out, the host's settings stand.
    #[serde(default)]
    pub skip_caches: Option<bool>,
}

fn utc() -> String {
    "UTC".into()
}

fn skip() -> String {
    Misfire::Skip.to_string()
}

/// Where a policy stands with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PolicyState {
    /// The host has not answered.
    Pending,
    /// The host runs it.
    Applied,
    /// The host refused it; what it ran before goes on.
    Refused,
}

/// A policy as it is stored and shown.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Policy {
    /// The row.
    pub id: i64,
    /// The server.
    #[serde(serialize_with = "server_number")]
    #[schema(value_type = i64)]
    pub server_id: ServerId,
    /// What was asked for.
    #[serde(flatten)]
    pub input: PolicyInput,
    /// Where it stands.
    pub state: PolicyState,
    /// Stable code of the refusal.
    pub refusal_code: Option<String>,
    /// The host's words.
    pub refusal_message: Option<String>,
    /// The directive that carries it.
    pub directive_id: String,
    /// When it was last changed, RFC 3339.
    pub updated_at: String,
    /// When it is due next by the receiver's clock, RFC 3339; none while it is off or refused.
    pub next_run_at: Option<String>,
}

fn server_number<S: serde::Serializer>(id: &ServerId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_i64(id.0)
}

impl Policy {
    /// Fills in when it is due next.
    pub fn due_after(mut self, now_ms: i64) -> Self {
        let next = next_due_ms(&self.input.cron, &self.input.time_zone, now_ms);
        self.next_run_at = next.filter(|_| self.state != PolicyState::Refused).map(times::rfc3339);
        self
    }
}

/// All mistakes of `input`, each a sentence; empty when it can be sent to the host.
pub fn mistakes(input: &PolicyInput) -> Vec<String> {
    let mut found = Vec::new();
    for (field, value) in [("service", &input.service), ("destination", &input.destination)] {
        // Left out, the service is found by whoever knows the server's.
        if field == "service" && value.is_empty() {
            continue;
        }
        if let Err(mistake) = check_name(value) {
            found.push(format!("{field}: {mistake}"));
        }
    }
    if input.time_zone.parse::<chrono_tz::Tz>().is_err() {
        found.push(format!("time_zone: `{}` is no IANA time zone, such as America/Sao_Paulo", cut(&input.time_zone)));
    }
    if input.cron.len() > CRON_BYTES_MAX {
        found.push(format!("cron: longer than {CRON_BYTES_MAX} bytes"));
    } else if !input.cron.is_empty()
        && let Err(mistake) = parse_cron(&input.cron)
    {
        found.push(format!("cron: `{}`: {mistake}", cut(&input.cron)));
    }
    if input.retention_days > RETENTION_MAX {
        found.push(format!("retention_days: at most {RETENTION_MAX}"));
    }
    if input.retention_count > RETENTION_MAX {
        found.push(format!("retention_count: at most {RETENTION_MAX}"));
    }
    if input.retention_days == 0 && input.retention_count == 0 {
        found.push("retention_days and retention_count: one of them must be above 0".to_owned());
    }
    if let Err(mistake) = input.misfire.parse::<Misfire>() {
        found.push(format!("misfire: {mistake}"));
    }
    if let Some(level) = input.compression_level.filter(|level| !COMPRESSION_LEVELS.contains(level)) {
        let (least, most) = (COMPRESSION_LEVELS.start(), COMPRESSION_LEVELS.end());
        found.push(format!("compression_level: {least} to {most}, not {level}"));
    }
    if let Some(Err(mistake)) = input.priority.as_deref().map(str::parse::<Priority>) {
        found.push(format!("priority: {mistake}"));
    }
    found
}

/// Checks the name of a service or destination.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("must not be empty".to_owned());
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(format!("longer than {NAME_BYTES_MAX} bytes"));
    }
    if name.chars().any(char::is_control) {
        return Err("must not hold control characters".to_owned());
    }
    Ok(())
}

fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

fn parse_cron(text: &str) -> Result<croner::Cron, String> {
    if text.split_whitespace().count() != 5 {
        return Err("must have five fields: minute, hour, day of month, month, day of week".to_owned());
    }
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    parser.parse(text).map_err(|error| error.to_string())
}

/// The first time after `after_ms` that the schedule names; none when it is off or never due.
pub fn next_due_ms(cron: &str, time_zone: &str, after_ms: i64) -> Option<i64> {
    let zone: chrono_tz::Tz = time_zone.parse().ok()?;
    let after = DateTime::from_timestamp_millis(after_ms)?.with_timezone(&zone);
    let next = parse_cron(cron).ok()?.find_next_occurrence(&after, false).ok()?;
    Some(next.timestamp_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input() -> PolicyInput {
        PolicyInput {
            service: "docs".into(),
            cron: "30 2 * * *".into(),
            time_zone: "Europe/Berlin".into(),
            retention_days: 30,
            retention_count: 1,
            destination: "local".into(),
            encryption_enabled: true,
            misfire: "skip".into(),
            ..PolicyInput::default()
        }
    }

    #[test]
    fn every_mistake_of_a_policy_is_named_at_once() {
        let bad = PolicyInput {
            service: "a\nb".into(),
            cron: "61 2 * *".into(),
            time_zone: "Mars/Olympus".into(),
            retention_days: 0,
            retention_count: 0,
            destination: "a\nb".into(),
            encryption_enabled: true,
            misfire: "twice".into(),
            compression_level: Some(20),
            priority: Some("realtime".into()),
            ..PolicyInput::default()
        };
        let found = mistakes(&bad).join("\n");
        for field in [
            "service:",
            "cron:",
            "time_zone:",
            "retention_days",
            "destination:",
            "misfire:",
            "compression_level:",
            "priority:",
        ] {
            assert!(found.contains(field), "{field} in\n{found}");
        }
        assert_eq!(mistakes(&input()), Vec::<String>::new());
    }

    #[test]
    fn schedules_that_croner_alone_would_take_are_refused() {
        for cron in ["* * * * * *", "@hourly", "61 * * * *", "* * * *"] {
            assert!(!mistakes(&PolicyInput { cron: cron.into(), ..input() }).is_empty(), "{cron}");
        }
    }

    #[test]
    fn a_schedule_in_the_gap_of_spring_is_due_at_its_end() {
        // 2026-03-29 02:30 does not exist in Berlin; 03:00 CEST is 01:00 UTC.
        let after = DateTime::parse_from_rfc3339("2026-03-29T00:00:00Z").expect("a time").timestamp_millis();
        let due = next_due_ms("30 2 * * *", "Europe/Berlin", after).expect("due");
        assert_eq!(times::rfc3339(due), "2026-03-29T01:00:00.000Z");
    }

    #[test]
    fn a_schedule_that_is_off_is_never_due() {
        assert_eq!(next_due_ms("", "UTC", 0), None);
        assert!(mistakes(&PolicyInput { cron: String::new(), ..input() }).is_empty());
    }
}
