//! What a backup may cost: the words of `[worker]` and `[service.worker]`, what a policy of the centre may ask for,
//! and the sum of the three, which travels with a run's plan to the worker.
//!
//! A service's own words replace the host's. A policy's wishes come last: it may choose compression within the host's
//! floor and what is read, and it may lower the priority; it can neither raise it nor touch memory, CPU and threads.

use hestner_proto::words::Priority;
use serde::{Deserialize, Serialize};
use toml_example::TomlExample;

use crate::platform::size::Size;

/// The last of all at the CPU (nice(1)).
const NICE_MAX: i32 = 19;
/// The last of all within `best_effort` (ioprio_set(2)).
const IO_LEVEL_MAX: u8 = 7;
/// zstd's highest level that needs no more memory to read back.
pub const COMPRESSION_LEVEL_MAX: i32 = 19;
/// The password alone takes half of it: scrypt with the cost that restic's keys have.
const MEMORY_BYTES_MIN: u64 = 64 << 20;
/// More than any machine has.
const THREADS_MAX: usize = 1024;
/// The same, in hundredths of a core.
const CPU_PERCENT_MAX: u32 = 100 * 1024;
/// What `low` means at least.
const LOW_NICE: i32 = 15;

/// What a backup may cost.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerSettings {
    /// How much others go before it at the CPU: 0 (not at all) to 19 (everybody).
    #[toml_example(default = 10)]
    pub nice: i32,
    /// Who goes first at the disk, where the disk's scheduler asks for it (`bfq`, `mq-deadline`): `none` (as
    /// `nice` has it), `best_effort`, or `idle` (only when nobody else wants the disk).
    #[toml_example(default = "best_effort")]
    pub io_class: IoClass,
    /// Within `best_effort`: 0 (first) to 7 (last).
    #[toml_example(default = 7)]
    pub io_level: u8,
    /// Memory that it may take, such as "512 MiB"; 0: as much as there is. Whoever needs more is killed, and the
    /// run fails by name. Kept by a control group, so only where runs are units (`hestner-agent doctor` says so).
    #[toml_example(default = "512 MiB")]
    pub memory_max: Size,
    /// CPU time that it may take, in percent of one core: 150 is one and a half; 0: as much as there is. Kept by a
    /// control group as well; the unit must hand on `cpu` (docs/operations.md).
    #[toml_example(default = 0)]
    pub cpu_percent_max: u32,
    /// Threads that read and compress; 0: one a core.
    #[toml_example(default = 0)]
    pub threads: usize,
    /// How hard it compresses: 1 to 19. Each step costs more CPU and stores less.
    #[toml_example(default = 2)]
    pub compression_level: i32,
    /// Read every file, also those that look as they did in the snapshot before.
    #[toml_example(default = false)]
    pub force_read: bool,
    /// Leave out what lies in folders with a `CACHEDIR.TAG`.
    #[toml_example(default = false)]
    pub skip_caches: bool,
}

impl Default for WorkerSettings {
    fn default() -> Self {
        Self {
            nice: 10,
            io_class: IoClass::BestEffort,
            io_level: 7,
            memory_max: Size::of_mebibytes(512),
            cpu_percent_max: 0,
            threads: 0,
            compression_level: 2,
            force_read: false,
            skip_caches: false,
        }
    }
}

/// What a backup of this service may cost, where that is another than `[worker]` says.
#[derive(Clone, Debug, Default, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct ServiceWorkerSettings {
    /// As `nice` of `[worker]`.
    #[toml_example(default = 10)]
    pub nice: Option<i32>,
    /// As `io_class` of `[worker]`.
    #[toml_example(default = "best_effort")]
    pub io_class: Option<IoClass>,
    /// As `io_level` of `[worker]`.
    #[toml_example(default = 7)]
    pub io_level: Option<u8>,
    /// As `memory_max` of `[worker]`.
    #[toml_example(default = "512 MiB")]
    pub memory_max: Option<Size>,
    /// As `cpu_percent_max` of `[worker]`.
    #[toml_example(default = 0)]
    pub cpu_percent_max: Option<u32>,
    /// As `threads` of `[worker]`.
    #[toml_example(default = 0)]
    pub threads: Option<usize>,
    /// As `compression_level` of `[worker]`.
    #[toml_example(default = 2)]
    pub compression_level: Option<i32>,
    /// As `force_read` of `[worker]`.
    #[toml_example(default = false)]
    pub force_read: Option<bool>,
    /// As `skip_caches` of `[worker]`.
    #[toml_example(default = false)]
    pub skip_caches: Option<bool>,
}

/// Classes of I/O priority (ioprio_set(2)).
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum IoClass {
    /// Whatever the kernel makes of `nice`.
    None,
    /// By level.
    #[default]
    BestEffort,
    /// When nobody else wants the disk.
    Idle,
}

/// What a policy of the centre asks for; where it says nothing, the host's settings stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Wishes {
    /// zstd's level.
    pub compression_level: Option<i32>,
    /// A word of [`Priority`]; as text, so that an unknown one is refused by name.
    pub priority: Option<String>,
    /// Read every file.
    pub force_read: Option<bool>,
    /// Leave out what lies in folders with a `CACHEDIR.TAG`.
    pub skip_caches: Option<bool>,
}

/// What one backup may cost, and how it is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effort {
    /// 0 to 19.
    pub nice: i32,
    /// Who goes first at the disk.
    pub io_class: IoClass,
    /// Within [`IoClass::BestEffort`]: 0 to 7.
    pub io_level: u8,
    /// 0: as much as there is.
    pub memory_bytes_max: u64,
    /// In percent of one core; 0: as much as there is.
    pub cpu_percent_max: u32,
    /// How it is made.
    pub how: How,
}

/// How a source is read and written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct How {
    /// Threads that read and compress; 0: one a core.
    pub threads: usize,
    /// zstd's level.
    pub compression_level: i32,
    /// Read every file.
    pub force_read: bool,
    /// Leave out what lies in folders with a `CACHEDIR.TAG`.
    pub skip_caches: bool,
}

impl Default for How {
    fn default() -> Self {
        WorkerSettings::default().effort().how
    }
}

impl WorkerSettings {
    /// What work on a repository may cost that is for no service, such as the removal of remains.
    pub fn effort(&self) -> Effort {
        Effort {
            nice: self.nice,
            io_class: self.io_class,
            io_level: self.io_level,
            memory_bytes_max: self.memory_max.bytes(),
            cpu_percent_max: self.cpu_percent_max,
            how: How {
                threads: self.threads,
                compression_level: self.compression_level,
                force_read: self.force_read,
                skip_caches: self.skip_caches,
            },
        }
    }

    /// What a backup of a service may cost.
    pub fn effort_for(&self, service: &ServiceWorkerSettings, wishes: Option<&Wishes>) -> Effort {
        let own = service.over(self).effort();
        match wishes {
            Some(wishes) => wishes.on(own),
            None => own,
        }
    }

    /// Every mistake, each as one sentence.
    pub fn mistakes(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut bound = |key: &str, value: i64, least: i64, most: i64| {
            if !(least..=most).contains(&value) {
                found.push(format!("`{key}` must be {least} to {most}, not {value}"));
            }
        };
        bound("nice", self.nice.into(), 0, NICE_MAX.into());
        bound("io_level", self.io_level.into(), 0, IO_LEVEL_MAX.into());
        bound("compression_level", self.compression_level.into(), 1, COMPRESSION_LEVEL_MAX.into());
        bound("threads", i64::try_from(self.threads).unwrap_or(i64::MAX), 0, THREADS_MAX as i64);
        bound("cpu_percent_max", self.cpu_percent_max.into(), 0, CPU_PERCENT_MAX.into());
        if (1..MEMORY_BYTES_MIN).contains(&self.memory_max.bytes()) {
            let least = Size::of_bytes(MEMORY_BYTES_MIN);
            found.push(format!("`memory_max` must be 0 or at least {least}, not {}", self.memory_max));
        }
        found
    }
}

impl ServiceWorkerSettings {
    fn over(&self, host: &WorkerSettings) -> WorkerSettings {
        WorkerSettings {
            nice: self.nice.unwrap_or(host.nice),
            io_class: self.io_class.unwrap_or(host.io_class),
            io_level: self.io_level.unwrap_or(host.io_level),
            memory_max: self.memory_max.unwrap_or(host.memory_max),
            cpu_percent_max: self.cpu_percent_max.unwrap_or(host.cpu_percent_max),
            threads: self.threads.unwrap_or(host.threads),
            compression_level: self.compression_level.unwrap_or(host.compression_level),
            force_read: self.force_read.unwrap_or(host.force_read),
            skip_caches: self.skip_caches.unwrap_or(host.skip_caches),
        }
    }

    /// Every mistake in what is written here, each as one sentence.
    pub fn mistakes(&self) -> Vec<String> {
        self.over(&WorkerSettings::default()).mistakes()
    }
}

impl Wishes {
    fn on(&self, mut own: Effort) -> Effort {
        match self.priority.as_deref().map(str::parse) {
            Some(Ok(Priority::Low)) => own.give_way(LOW_NICE, IoClass::BestEffort),
            Some(Ok(Priority::Idle)) => own.give_way(NICE_MAX, IoClass::Idle),
            // The gate refuses words that it does not know.
            Some(Ok(Priority::Normal) | Err(_)) | None => {}
        }
        own.how.compression_level = self.compression_level.unwrap_or(own.how.compression_level);
        own.how.force_read = self.force_read.unwrap_or(own.how.force_read);
        own.how.skip_caches = self.skip_caches.unwrap_or(own.how.skip_caches);
        own
    }
}

impl Effort {
    /// Goes behind others at least so far; never before them.
    fn give_way(&mut self, nice: i32, io_class: IoClass) {
        self.nice = self.nice.max(nice);
        if self.io_class != IoClass::Idle {
            (self.io_class, self.io_level) = (io_class, IO_LEVEL_MAX);
        }
    }

    /// For people, as one line.
    pub fn line(&self) -> String {
        let mut parts = vec![format!("nice {}", self.nice)];
        parts.extend(match self.io_class {
            IoClass::None => None,
            IoClass::BestEffort => Some(format!("I/O best_effort {}", self.io_level)),
            IoClass::Idle => Some("I/O idle".to_owned()),
        });
        if self.memory_bytes_max > 0 {
            parts.push(format!("at most {} of memory", Size::of_bytes(self.memory_bytes_max)));
        }
        if self.cpu_percent_max > 0 {
            parts.push(format!("at most {} % of a core", self.cpu_percent_max));
        }
        if self.how.threads > 0 {
            parts.push(format!("{} threads", self.how.threads));
        }
        parts.push(format!("compression level {}", self.how.compression_level));
        parts.extend(self.how.force_read.then(|| "every file is read".to_owned()));
        parts.extend(self.how.skip_caches.then(|| "without folders that have a CACHEDIR.TAG".to_owned()));
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(priority: &str) -> Wishes {
        Wishes { priority: Some(priority.to_owned()), ..Wishes::default() }
    }

    #[test]
    fn every_mistake_of_the_worker_is_named() {
        let bad = WorkerSettings {
            nice: -1,
            io_level: 8,
            memory_max: Size::of_mebibytes(8),
            cpu_percent_max: u32::MAX,
            threads: 2000,
            compression_level: 20,
            ..WorkerSettings::default()
        };
        let found = bad.mistakes().join("\n");
        for key in ["nice", "io_level", "memory_max", "cpu_percent_max", "threads", "compression_level"] {
            assert!(found.contains(&format!("`{key}` must be")), "{key} in\n{found}");
        }
        assert_eq!(WorkerSettings::default().mistakes(), Vec::<String>::new());
        let unlimited = WorkerSettings { memory_max: Size::default(), ..WorkerSettings::default() };
        assert_eq!(unlimited.mistakes(), Vec::<String>::new());
    }

    #[test]
    fn service_has_its_own_word_and_the_hosts_where_it_is_silent() {
        let host = WorkerSettings { nice: 5, threads: 1, ..WorkerSettings::default() };
        let service = ServiceWorkerSettings { threads: Some(2), force_read: Some(true), ..Default::default() };
        let effort = host.effort_for(&service, None);
        assert_eq!((effort.nice, effort.how.threads, effort.how.force_read), (5, 2, true));
    }

    #[test]
    fn policy_lowers_priority_and_never_raises_it() {
        let host = WorkerSettings::default();
        let after = |host: &WorkerSettings, word: &str| {
            let effort = host.effort_for(&ServiceWorkerSettings::default(), Some(&wishes(word)));
            (effort.nice, effort.io_class, effort.io_level)
        };
        assert_eq!(after(&host, "normal"), (10, IoClass::BestEffort, 7));
        assert_eq!(after(&host, "low"), (15, IoClass::BestEffort, 7));
        assert_eq!(after(&host, "idle"), (19, IoClass::Idle, 7));
        assert_eq!(after(&host, "realtime"), (10, IoClass::BestEffort, 7));
        let last = WorkerSettings { nice: 19, io_class: IoClass::Idle, ..WorkerSettings::default() };
        for word in ["normal", "low", "idle"] {
            assert_eq!(after(&last, word), (19, IoClass::Idle, 7), "{word}");
        }
    }

    #[test]
    fn policy_file_of_an_older_agent_wishes_nothing() {
        let text = r#"{"policy_id": 1, "service": "docs", "cron": "", "time_zone": "UTC", "retention_days": 1,
            "retention_count": 1, "destination": "local", "encryption_enabled": true, "misfire": "skip"}"#;
        let policy: crate::policy::Policy = serde_json::from_str(text).unwrap();
        assert_eq!(policy.wishes, Wishes::default());
    }

    #[test]
    fn policy_touches_neither_memory_nor_cpu_nor_threads() {
        let host = WorkerSettings { threads: 3, cpu_percent_max: 50, ..WorkerSettings::default() };
        let all =
            Wishes { compression_level: Some(9), force_read: Some(true), skip_caches: Some(true), ..wishes("idle") };
        let effort = host.effort_for(&ServiceWorkerSettings::default(), Some(&all));
        assert_eq!((effort.memory_bytes_max, effort.cpu_percent_max, effort.how.threads), (512 << 20, 50, 3));
        let how = How { threads: 3, compression_level: 9, force_read: true, skip_caches: true };
        assert_eq!(effort.how, how);
    }
}
