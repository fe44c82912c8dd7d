//! What the settings say of this host, for the inventory and for people: services with the consistency
//! each can reach, destinations, grants.
//!
//! Read anew each time, so that an edit of the files is seen without a restart.

use std::path::PathBuf;

use hestner_proto::v1;
use hestner_proto::words::{Consistency, GrantValue, Verb};

use super::settings::Settings;
use crate::freeze::PointPlan;
use crate::inventory::Known;
use crate::policy::{ServiceSettings, SourceKind};
use crate::run::plan::read_grants;

/// What the inventory tells of the settings, read anew each time.
pub(super) async fn known(fallback: Settings, path: PathBuf) -> Known {
    let settings = Settings::read(&path).unwrap_or(fallback);
    let mut services = Vec::new();
    for service in &settings.services {
        services.push((service.clone(), reach(service, &settings).await));
    }
    let grants = read_grants(&settings.grants).unwrap_or_default();
    let grant = |(service, verb, value): (&str, Verb, GrantValue)| v1::Grant {
        service: service.to_owned(),
        verb: verb.to_string(),
        value: value.to_string(),
    };
    Known {
        services,
        destinations: settings.destinations.iter().map(|d| d.name.clone()).collect(),
        grants: grants.iter().map(grant).collect(),
    }
}

/// The best consistency that a service can reach here; empty when its source cannot be reached at all.
pub(super) async fn reach(service: &ServiceSettings, settings: &Settings) -> String {
    if service.source.kind == SourceKind::Command {
        return Consistency::Application.to_string();
    }
    let source = &service.source;
    match PointPlan::of(&source.paths, &source.exclude, "inventory", &settings.freeze).await {
        Ok(point) => point.consistency(service.quiesces()).to_string(),
        Err(_) => String::new(),
    }
}
