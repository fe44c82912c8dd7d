//! What the settings say of this host, for the inventory and for people: services with the consistency
//! each can reach, destinations, grants, containers.
//!
//! Read anew each time, so that an edit of the files is seen without a restart. What only root can see is
//! asked from a runner ([`describe`] is its side); while none answers, the last description stands.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hestner_proto::v1;
use hestner_proto::words::{GrantValue, Verb};

use super::settings::Settings;
use crate::identity::Server;
use crate::inventory::{self, Known};
use crate::platform::chain;
use crate::policy::ServiceSettings;
use crate::repository::{Location, Mode};
use crate::run::fence::Fence;
use crate::run::launcher::{Launch, Runner};
use crate::run::messages::{Event, Failure, Request};
use crate::run::plan::read_grants;
use crate::status::{Description, Reach, RepositoryStatus};

/// How long a runner may take to describe the host: Docker may be slow to answer.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(45);

/// Knows the settings as they are now, and the host as a runner saw it last.
#[derive(Clone)]
pub(super) struct Knowing {
    settings_path: PathBuf,
    /// Stands in for a file that cannot be read any more.
    at_start: Settings,
    launch: Launch,
    last: Arc<Mutex<Description>>,
}

impl Knowing {
    pub(super) fn new(at_start: Settings, settings_path: PathBuf, launch: Launch) -> Self {
        Self { settings_path, at_start, launch, last: Arc::default() }
    }

    /// The settings, and what keeps the file from being read.
    pub(super) fn settings(&self) -> (Settings, Option<String>) {
        match Settings::read(&self.settings_path) {
            Ok(settings) => (settings, None),
            Err(error) => (self.at_start.clone(), Some(error.to_string())),
        }
    }

    /// What only root can see.
    pub(super) async fn description(&self) -> Description {
        let asked = async {
            let mut runner = Runner::launch(&self.launch, &Request::Describe).await.map_err(|e| chain(&e))?;
            match runner.next().await {
                Some(Event::Described(description)) => Ok(*description),
                _ => Err("the runner that was asked to describe this host ended without an answer".to_owned()),
            }
        };
        let asked = tokio::time::timeout(DESCRIBE_TIMEOUT, asked).await;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match asked.unwrap_or_else(|_| Err("the runner that was asked to describe this host is silent".to_owned())) {
            Ok(description) => {
                last.clone_from(&description);
                description
            }
            Err(error) => {
                tracing::warn!(event = "host_not_described", error);
                let mut description = last.clone();
                description.problems.push(error);
                description
            }
        }
    }

    /// What the inventory tells of the settings.
    pub(super) async fn known(self) -> Known {
        let (settings, _) = self.settings();
        let description = self.description().await;
        let grants = read_grants(&settings.grants).unwrap_or_default();
        let grant = |(service, verb, value): (&str, Verb, GrantValue)| v1::Grant {
            service: service.to_owned(),
            verb: verb.to_string(),
            value: value.to_string(),
        };
        let with_reach = |service: ServiceSettings| {
            let reach = reach_of(&description, &service.name);
            (service, reach)
        };
        Known {
            destinations: settings.destinations.iter().map(|d| d.name.clone()).collect(),
            grants: grants.iter().map(grant).collect(),
            services: settings.services.into_iter().map(with_reach).collect(),
            containers: description.containers,
        }
    }
}

/// The best consistency that a service can reach here; empty when its source cannot be reached at all.
pub(super) fn reach_of(description: &Description, service: &str) -> String {
    let found = description.services.iter().find(|reach| reach.name == service);
    found.map(|reach| reach.consistency.clone()).unwrap_or_default()
}

/// What the daemon may know of this host: looked up by a runner, who can see it.
pub async fn describe(settings: &Result<Settings, Failure>, fence: &Fence) -> Description {
    let settings = match settings {
        Ok(settings) => settings,
        Err(failure) => return Description { problems: vec![failure.message.clone()], ..Description::default() },
    };
    let mut description = Description::default();
    let host = settings.host_to_look_at();
    for service in &settings.services {
        let (consistency, reasons) = match host.reach(service).await {
            Ok((consistency, reasons)) => (consistency.to_string(), reasons),
            Err(failure) => (String::new(), vec![failure.message]),
        };
        description.services.push(Reach { name: service.name.clone(), consistency, reasons });
    }
    if let Ok(server) = Server::read(&settings.state_dir) {
        description.repositories = repositories(settings, server.server_id);
        description.recovery_fingerprint = server.recovery_fingerprint();
    }
    let efforts = settings.services.iter().map(|service| settings.worker.effort_for(&service.worker, None));
    let off = std::iter::once(settings.worker.effort()).chain(efforts).find_map(|effort| fence.off(&effort));
    description.worker_limits_off = off.unwrap_or_default();
    description.containers = inventory::containers(&settings.inventory).await;
    description
}

/// Repositories that exist.
fn repositories(settings: &Settings, server_id: i64) -> Vec<RepositoryStatus> {
    let all = settings.destinations.iter().flat_map(|d| [Mode::Encrypted, Mode::Open].map(|mode| (d, mode)));
    let (state_dir, repository, storage) = (&settings.state_dir, &settings.repository, &settings.storage);
    let located = all.map(|(d, mode)| (mode, Location::new(d, mode, server_id, state_dir, repository, storage)));
    let existing = located.filter(|(_, location)| location.is_known());
    let status = |(mode, location): (Mode, Location)| RepositoryStatus {
        path: location.place(),
        password_file: location.password_file().display().to_string(),
        mode: mode.as_str().to_owned(),
        destination: location.destination.name,
    };
    existing.map(status).collect()
}
