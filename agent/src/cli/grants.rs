//! `hestner-agent grants`: root's own file, edited on the host and nowhere else.

use hestner_proto::words::{ErrorClass, GrantValue, Verb};
use serde_json::json;

use super::{Complaint, output};
use crate::daemon::settings::Settings;
use crate::gate;
use crate::platform::chain;
use crate::platform::files;
use crate::policy::{HOST, check_name};
use crate::run::plan::read_grants;

pub(super) fn list(settings: &Settings, as_json: bool) -> Result<(), Complaint> {
    let grants = read_grants(&settings.grants).map_err(|f| Complaint::of_class(f.class, f.message))?;
    let mut names: Vec<&str> = settings.services.iter().map(|s| s.name.as_str()).collect();
    names.extend(grants.iter().map(|(service, ..)| service));
    if !names.contains(&HOST) {
        names.push(HOST);
    }
    names.sort_unstable();
    names.dedup();
    if as_json {
        let rows = names.iter().flat_map(|service| Verb::ALL.iter().map(move |verb| (service, *verb)));
        let rows: Vec<_> = rows
            .map(|(service, verb)| json!({"service": service, "verb": verb, "value": grants.get(service, verb)}))
            .collect();
        output::json(&rows);
        return Ok(());
    }
    let header: Vec<String> = Verb::ALL.iter().map(|verb| format!("{verb:<9}")).collect();
    output::line(&format!("{:<20} {}", "SERVICE", header.join(" ")));
    for service in names {
        let values: Vec<String> = Verb::ALL.iter().map(|verb| format!("{:<9}", grants.get(service, *verb))).collect();
        output::line(&format!("{service:<20} {}", values.join(" ").trim_end()));
    }
    Ok(())
}

pub(super) fn set(settings: &Settings, service: &str, verb: Verb, value: GrantValue) -> Result<(), Complaint> {
    check_name(service).map_err(|reason| {
        Complaint::mend("bad_name", format!("`{service}`: {reason}"), "name a service of agent.toml")
    })?;
    let mut grants = read_grants(&settings.grants).map_err(|f| Complaint::of_class(f.class, f.message))?;
    if value != GrantValue::Deny && service != HOST && !settings.services.iter().any(|s| s.name == service) {
        let message = format!("the settings name no service `{service}`");
        return Err(Complaint::of_class(ErrorClass::UnknownService, message));
    }
    grants.set(service, verb, value);
    let written = files::write(&settings.grants, gate::render_grants(&grants).as_bytes(), 0o644);
    written.map_err(|e| {
        Complaint::mend("grants_not_written", chain(&e), "run the command as root; the folder must exist")
    })?;
    output::line(&format!("{service}: {verb} is {value}"));
    Ok(())
}
