//! Whether what decides here could have been written by others: grants, programs, the state folder.
//!
//! The same checks as a run makes, each finding by itself instead of the first one only.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use hestner_proto::words::{ErrorClass, GrantValue, Verb};

use super::{Check, Level};
use crate::platform::trust::{self, Distrust};
use crate::platform::{chain, files};
use crate::policy::{DAEMON_FOLDER, HOST, ServiceSettings};
use crate::run::plan::{Host, programs, read_grants};

/// Less room than this, and the next few runs may not be written down.
const STATE_FREE_BYTES_WANTED: u64 = 100 * 1024 * 1024;
/// What belongs to the runner beside the daemon's own folder.
const RUNNERS_PARTS: &[&str] = &["runs", "keys", "cache", "server.json"];

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let mut found = grants(host);
    found.extend(all_programs(host));
    found.extend(state(host));
    found
}

fn grants(host: &Host) -> Vec<Check> {
    let path = host.grants.display();
    let grants = match read_grants(&host.grants) {
        Ok(grants) => grants,
        // Nothing is granted then, whatever stands in it.
        Err(failure) => return vec![Check::failure("grants", "", &failure)],
    };
    if !host.grants.exists() {
        let missing = Check::ok("grants", "", format!("there is no grants file {path}: nothing may be asked for"));
        let next_step = "`hestner-agent grants allow SERVICE snapshot`";
        return vec![missing.but(Level::Warning, "grants_missing", next_step)];
    }
    let mut found = vec![Check::ok("grants", "", format!("{path} is believed"))];
    for service in host.services.iter().filter(|s| grants.get(&s.name, Verb::Snapshot) == GrantValue::Deny) {
        let name = &service.name;
        let denied =
            Check::ok("grants", name, format!("`snapshot` of service `{name}` is denied: every run is refused"));
        let next_step = format!("`hestner-agent grants allow {name} snapshot`, if it should be allowed");
        found.push(denied.but(Level::Warning, "snapshot_denied", next_step));
    }
    let known = |name: &str| name == HOST || host.services.iter().any(|s| s.name == name);
    let unknown: BTreeSet<&str> = grants.iter().map(|(name, ..)| name).filter(|name| !known(name)).collect();
    for name in unknown {
        let message = format!("the grants name service `{name}`, which the settings do not");
        let next_step = "mend the name in the grants, or name the service in agent.toml";
        found.push(Check::ok("grants", name, message).but(Level::Warning, "grants_for_nothing", next_step));
    }
    found
}

fn all_programs(host: &Host) -> Vec<Check> {
    let of_services = host.services.iter().flat_map(|service| programs(service, host));
    let all: BTreeSet<PathBuf> = of_services.collect();
    let bad: Vec<Check> = all.iter().filter_map(|path| program(path, &host.services, host)).collect();
    if !bad.is_empty() {
        return bad;
    }
    let message = format!("all {} programs, and every folder above them, can be changed by root only", all.len());
    vec![Check::ok("programs", "", message)]
}

/// `None`: nothing is wrong with it.
fn program(path: &Path, services: &[ServiceSettings], host: &Host) -> Option<Check> {
    let error = trust::check(path).err()?;
    let using = services.iter().filter(|service| programs(service, host).iter().any(|p| p == path));
    let using: Vec<&str> = using.map(|service| service.name.as_str()).collect();
    let message = format!("used by {}: {}", using.join(", "), chain(&error));
    let check = Check::ok("programs", path.display().to_string(), message);
    Some(match error.is_missing() {
        true => check.but(Level::Problem, "program_missing", "install it, or mend its path in agent.toml"),
        false => distrusted(check),
    })
}

fn distrusted(check: Check) -> Check {
    let class = ErrorClass::UnsafePermissions;
    check.but(Level::Problem, class.as_str(), class.next_step())
}

fn state(host: &Host) -> Vec<Check> {
    let folder = &host.state_dir;
    let check = |message: String| Check::ok("state", folder.display().to_string(), message);
    match trust::check(folder) {
        Ok(()) => {}
        Err(error) if error.is_missing() => {
            let next_step = "enrol the host with `hestner-agent enroll`";
            return vec![check("it does not exist".to_owned()).but(Level::Problem, "state_missing", next_step)];
        }
        Err(error) => return vec![distrusted(check(chain(&error)))],
    }
    let mut found = vec![room(folder, check("there is room in it".to_owned()))];
    found.extend(split(folder).into_iter().map(|error| distrusted(check(error))));
    if found.len() == 1 {
        found.push(check("each part of it belongs to whom it should".to_owned()));
    }
    found
}

fn room(folder: &Path, check: Check) -> Check {
    let next_step = ErrorClass::StateFull.next_step();
    match files::free_bytes(folder) {
        Ok(free) if free >= STATE_FREE_BYTES_WANTED => check,
        Ok(free) => {
            let level = if free < crate::run::runner::STATE_FREE_BYTES_MIN { Level::Problem } else { Level::Warning };
            let message = format!("{} MiB are left in it", free / 1024 / 1024);
            Check { message, ..check }.but(level, ErrorClass::StateFull.as_str(), next_step)
        }
        Err(error) => {
            let class = ErrorClass::StateUnusable;
            Check { message: chain(&error), ..check }.but(Level::Problem, class.as_str(), class.next_step())
        }
    }
}

/// The daemon's folder is the daemon's; all else is not, and nobody else looks into either.
fn split(folder: &Path) -> Vec<String> {
    let mut wrong = Vec::new();
    for name in RUNNERS_PARTS.iter().copied().chain([DAEMON_FOLDER]) {
        let path = folder.join(name);
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.mode() & 0o077 != 0 && !metadata.is_symlink() {
            let mode = metadata.mode() & 0o7777;
            wrong.push(format!("{} has mode {mode:04o}; nobody but its owner may use it", path.display()));
        }
        if metadata.is_symlink() {
            wrong.push(format!("{} is a symlink; it must lie in the state folder itself", path.display()));
        } else if name != DAEMON_FOLDER && !trust::is_trusted_user(metadata.uid()) {
            wrong.push(Distrust::Owner { path, owner: metadata.uid() }.to_string());
        }
    }
    wrong
}
