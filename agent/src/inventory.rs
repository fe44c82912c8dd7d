//! What is on this host: facts, systemd units, containers, and the services of the settings.
//!
//! Looks now and then, by asking `systemctl` and whoever may talk to Docker, and publishes a message only when
//! its hash has changed. It reads no customer's data and changes nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bollard::Docker;
use bollard::query_parameters::ListContainersOptionsBuilder;
use hestner_proto::{sha256, v1};
use prost::Message as _;
use serde::Deserialize;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};
use tokio::sync::watch;
use toml_example::TomlExample;

use crate::lifecycle::{Drain, Pulse};
use crate::platform::command::{Limits, Program};
use crate::policy::{HOST, ServiceSettings, SourceKind};
use crate::status::Container;

/// How long Docker may take to answer, in seconds: its daemon restarts, its socket stays.
const DOCKER_SECONDS: u64 = 10;
/// How long systemctl may take, in seconds.
const SYSTEMCTL_SECONDS: u64 = 15;
/// Most services of one kind that are told; a host with more has other problems.
const SERVICES_MAX: usize = 2_000;

/// Settings of the inventory.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// How often to look.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "15m")]
    pub interval: Duration,
    /// Docker's socket; empty: do not look for containers.
    #[toml_example(default = "/var/run/docker.sock")]
    pub docker_socket: PathBuf,
    /// Whether to list systemd's services.
    #[toml_example(default = true)]
    pub systemd: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(900), docker_socket: "/var/run/docker.sock".into(), systemd: true }
    }
}

/// What the inventory is told by its owner.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The settings' services, each with the best consistency it can reach.
    pub services: Vec<(ServiceSettings, String)>,
    /// Names of destinations.
    pub destinations: Vec<String>,
    /// What is granted.
    pub grants: Vec<v1::Grant>,
    /// Containers of this host.
    pub containers: Vec<Container>,
}

/// The task.
pub struct Inventory<F> {
    /// Its settings.
    pub settings: Settings,
    /// Reads settings and grants anew at each look.
    pub known: F,
    /// Where the latest inventory is seen.
    pub latest: watch::Sender<Option<Arc<v1::Inventory>>>,
}

impl<F, R> Inventory<F>
where
    F: Fn() -> R + Send,
    R: Future<Output = Known> + Send,
{
    /// Runs until the drain.
    pub async fn run(self, mut pulse: Pulse, drain: Drain) {
        let mut ticks = tokio::time::interval(self.settings.interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = drain.cancelled() => return,
                _ = pulse.rest(ticks.tick()) => self.look().await,
            }
        }
    }

    async fn look(&self) {
        let inventory = take((self.known)().await, &self.settings).await;
        self.latest.send_if_modified(|latest| {
            let changed = latest.as_ref().is_none_or(|old| old.hash != inventory.hash);
            if changed {
                *latest = Some(Arc::new(inventory));
            }
            changed
        });
    }
}

/// Takes an inventory.
pub async fn take(known: Known, settings: &Settings) -> v1::Inventory {
    let mut services: Vec<v1::Service> =
        known.services.iter().map(|(service, consistency)| own(service, consistency)).collect();
    if !services.iter().any(|s| s.name == HOST) {
        let service = |name: &str| v1::Service {
            name: name.into(),
            runtime: "host".into(),
            health: "ok".into(),
            ..Default::default()
        };
        services.push(service(HOST));
    }
    if settings.systemd {
        services.extend(systemd().await);
    }
    services.extend(known.containers.into_iter().map(told));
    // One name, one service: what the settings name comes first and wins.
    let mut by_name = BTreeMap::new();
    for service in services {
        by_name.entry(service.name.clone()).or_insert(service);
    }
    let mut inventory = v1::Inventory {
        hash: String::new(),
        host: Some(host()),
        services: by_name.into_values().collect(),
        grants: known.grants,
        destinations: known.destinations,
    };
    inventory.hash = sha256::hex(&inventory.encode_to_vec());
    inventory
}

fn own(service: &ServiceSettings, consistency: &str) -> v1::Service {
    let runtime = match service.source.kind {
        _ if service.name == HOST => "host",
        SourceKind::Files => "files",
        SourceKind::Command => "command",
    };
    v1::Service {
        name: service.name.clone(),
        runtime: runtime.to_owned(),
        version: String::new(),
        health: if consistency.is_empty() { "failed" } else { "ok" }.to_owned(),
        consistency: consistency.to_owned(),
    }
}

fn host() -> v1::Host {
    let specifics =
        RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()).with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(specifics).ok();
    v1::Host {
        hostname: System::host_name().unwrap_or_default(),
        os: System::long_os_version().unwrap_or_default(),
        kernel: System::kernel_version().unwrap_or_default(),
        architecture: System::cpu_arch(),
        cpus: system.as_ref().map_or(0, |s| u32::try_from(s.cpus().len()).unwrap_or(u32::MAX)),
        memory_bytes: system.as_ref().map_or(0, System::total_memory),
    }
}

async fn systemd() -> Vec<v1::Service> {
    let program =
        Program::new("systemctl").args(["list-units", "--type=service", "--all", "--no-pager", "--output=json"]);
    match program.run(b"", Limits::seconds(SYSTEMCTL_SECONDS)).await {
        Ok(output) if output.status.success() => parse_units(&output.stdout),
        // No systemd here: a container, perhaps.
        _ => Vec::new(),
    }
}

fn parse_units(json: &[u8]) -> Vec<v1::Service> {
    #[derive(Deserialize)]
    struct Unit {
        unit: String,
        load: String,
        active: String,
        sub: String,
    }
    let units: Vec<Unit> = serde_json::from_slice(json).unwrap_or_default();
    let loaded = units.into_iter().filter(|unit| unit.load == "loaded");
    let service = |unit: Unit| v1::Service {
        health: match (unit.active.as_str(), unit.sub.as_str()) {
            ("active", _) => "ok",
            ("failed", _) => "failed",
            ("activating" | "reloading" | "deactivating", _) => "degraded",
            ("inactive", _) => "stopped",
            _ => "unknown",
        }
        .to_owned(),
        name: unit.unit,
        runtime: "systemd".to_owned(),
        ..Default::default()
    };
    loaded.map(service).take(SERVICES_MAX).collect()
}

/// Docker's containers, as whoever may talk to its socket sees them.
pub async fn containers(settings: &Settings) -> Vec<Container> {
    if settings.docker_socket.as_os_str().is_empty() || !settings.docker_socket.exists() {
        return Vec::new();
    }
    let listed = async {
        let socket = settings.docker_socket.to_string_lossy();
        let docker = Docker::connect_with_unix(&socket, DOCKER_SECONDS, bollard::API_DEFAULT_VERSION)?
            .negotiate_version()
            .await?;
        docker.list_containers(Some(ListContainersOptionsBuilder::default().all(true).build())).await
    };
    // A socket that answers nothing must not hold up the rest.
    match tokio::time::timeout(Duration::from_secs(2 * DOCKER_SECONDS), listed).await {
        Ok(Ok(containers)) => containers.into_iter().take(SERVICES_MAX).map(container).collect(),
        Ok(Err(error)) => {
            tracing::warn!(event = "docker_not_readable", error = %error);
            Vec::new()
        }
        Err(_) => {
            tracing::warn!(event = "docker_not_readable", error = "no answer in time");
            Vec::new()
        }
    }
}

fn container(summary: bollard::models::ContainerSummary) -> Container {
    let name = summary.names.and_then(|names| names.into_iter().next()).unwrap_or_default();
    let state = summary.state.map(|s| s.to_string()).unwrap_or_default();
    let status = summary.status.unwrap_or_default();
    let health = match state.as_str() {
        "running" if status.contains("unhealthy") => "failed",
        "running" => "ok",
        "paused" | "restarting" => "degraded",
        "exited" | "created" | "dead" => "stopped",
        _ => "unknown",
    };
    Container {
        name: name.trim_start_matches('/').to_owned(),
        image: summary.image.unwrap_or_default(),
        health: health.to_owned(),
    }
}

fn told(container: Container) -> v1::Service {
    v1::Service {
        name: container.name,
        runtime: "docker".to_owned(),
        version: container.image,
        health: container.health,
        consistency: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_told_with_their_health() {
        let json = br#"[{"unit":"ssh.service","load":"loaded","active":"active","sub":"running","description":"x"},
            {"unit":"db.service","load":"loaded","active":"failed","sub":"failed","description":"x"},
            {"unit":"gone.service","load":"not-found","active":"inactive","sub":"dead","description":"x"}]"#;
        let units: Vec<_> = parse_units(json).into_iter().map(|s| (s.name, s.health)).collect();
        assert_eq!(
            units,
            [("ssh.service".to_owned(), "ok".to_owned()), ("db.service".to_owned(), "failed".to_owned())]
        );
        assert!(parse_units(b"Failed to connect to bus").is_empty());
    }

    #[tokio::test]
    async fn hash_changes_with_the_content_and_only_with_it() {
        let settings = Settings { systemd: false, docker_socket: PathBuf::new(), ..Settings::default() };
        let first = take(Known::default(), &settings).await;
        assert_eq!(take(Known::default(), &settings).await.hash, first.hash);
        let known = Known { destinations: vec!["local".into()], ..Known::default() };
        assert_ne!(take(known, &settings).await.hash, first.hash);
    }
}
