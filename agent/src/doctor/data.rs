//! Whether what is to be stored can be read, and where it goes can be written: services, destinations, restic.

use std::path::Path;
use std::time::Duration;

use hestner_proto::words::{Consistency, ErrorClass};

use super::{Check, Level};
use crate::gate;
use crate::platform::command::{Limits as CommandLimits, Program};
use crate::platform::trust;
use crate::platform::{chain, files};
use crate::policy::{DestinationSettings, Policies, ServiceSettings};
use crate::repository::{Location, Mode, Repository};
use crate::run::messages::Failure;
use crate::run::plan::{Host, programs};
use crate::storage::Limits;

/// How long a destination behind a network may keep silent, in seconds.
const REMOTE_SECONDS: u64 = 15;
/// With less room than this a run cannot even store one pack (16 MiB at most).
const DESTINATION_FREE_BYTES_MIN: u64 = 16 * 1024 * 1024;
/// Less room than this at a destination is worth a warning.
const DESTINATION_FREE_BYTES_WANTED: u64 = 1024 * 1024 * 1024;
/// The oldest restic that works.
const RESTIC_MIN: (u32, u32) = (0, 14);
/// How long `restic version` may take, in seconds.
const RESTIC_SECONDS: u64 = 15;

pub(super) async fn checks(host: &Host) -> Vec<Check> {
    let mut found = Vec::new();
    for settings in &host.destinations {
        found.push(match settings.folder() {
            Some(path) => folder(&settings.name, path),
            None => remote(settings, host).await,
        });
    }
    found.push(restic(&host.repository.restic).await);
    for settings in &host.services {
        // One cause, one finding: a program that is not believed was named already.
        if programs(settings, host).iter().all(|program| trust::check(program).is_ok()) {
            found.push(service(settings, host).await);
        }
        found.extend(policy(settings, host));
    }
    found
}

/// Asks a destination behind a network whether this server's repository is there.
async fn remote(settings: &DestinationSettings, host: &Host) -> Check {
    let mut location =
        Location::new(settings, Mode::Encrypted, host.server_id, &host.state_dir, &host.repository, &host.storage);
    location.limits = Limits { tries_max: 1, stall_max: Duration::from_secs(REMOTE_SECONDS), ..location.limits };
    let place = location.place();
    let check = |message: String| Check::ok("destination", &settings.name, message);
    match Repository::at(location).exists().await {
        Ok(true) => check(format!("{place} answers, and holds this server's repository")),
        Ok(false) => check(format!("{place} answers, and holds no repository of this server yet")),
        Err(error) => check(format!("{place}: {}", chain(&error))).but(
            Level::Problem,
            error.class().as_str(),
            "look at its network, its credentials and the server's own log",
        ),
    }
}

fn folder(name: &str, path: &Path) -> Check {
    let check = |message: String| Check::ok("destination", name, message);
    let shown = path.display();
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => {
            let next_step = "name a folder under [[destination]] in agent.toml";
            return check(format!("{shown} is no folder")).but(Level::Problem, "destination_missing", next_step);
        }
        Err(error) => {
            let next_step = "make the folder, or mount what belongs there";
            let message = format!("{shown} cannot be looked at: {error}");
            return check(message).but(Level::Problem, "destination_missing", next_step);
        }
    }
    if let Err(errno) = nix::unistd::access(path, nix::unistd::AccessFlags::W_OK) {
        let next_step = "give it to root, and look whether the disk is mounted read-only";
        let message = format!("{shown} cannot be written: {}", errno.desc());
        return check(message).but(Level::Problem, "destination_not_writable", next_step);
    }
    match files::free_bytes(path) {
        Ok(free) if free < DESTINATION_FREE_BYTES_MIN => {
            let class = ErrorClass::DestinationFull;
            let message = format!("{shown} has {} KiB left", free / 1024);
            check(message).but(Level::Problem, class.as_str(), class.next_step())
        }
        Ok(free) if free < DESTINATION_FREE_BYTES_WANTED => {
            let message = format!("{shown} has {} MiB left", free / 1024 / 1024);
            check(message).but(Level::Warning, "destination_nearly_full", ErrorClass::DestinationFull.next_step())
        }
        Ok(free) => check(format!("{shown} can be written and has {} GiB left", free / 1024 / 1024 / 1024)),
        Err(error) => {
            let next_step = ErrorClass::RepositoryUnavailable.next_step();
            check(chain(&error)).but(Level::Problem, ErrorClass::RepositoryUnavailable.as_str(), next_step)
        }
    }
}

/// A warning at most: without it everything is stored and restored, and nothing is removed.
async fn restic(path: &Path) -> Check {
    let shown = path.display().to_string();
    let next_step = "install restic 0.14 or later, or name it under [repository] in agent.toml: without it the data \
                     of removed artifacts stays where it is";
    let failed =
        |message: String| Check::ok("restic", &shown, message).but(Level::Warning, "restic_unusable", next_step);
    if let Err(error) = trust::check(path) {
        return failed(chain(&error));
    }
    let output = match Program::new(path).arg("version").run(b"", CommandLimits::seconds(RESTIC_SECONDS)).await {
        Ok(output) if output.status.success() => output,
        Ok(output) => return failed(format!("`restic version` ended with {}: {}", output.status, output.complaint())),
        Err(error) => return failed(chain(&error)),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    match version(&text) {
        Some(found) if found >= RESTIC_MIN => Check::ok("restic", &shown, format!("version {}.{}", found.0, found.1)),
        Some(found) => failed(format!("version {}.{} is too old", found.0, found.1)),
        None => failed("it does not say its version as restic does".to_owned()),
    }
}

/// Major and minor number of `restic 0.14.0 compiled with ...`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("restic ")?.split_whitespace().next()?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

async fn service(settings: &ServiceSettings, host: &Host) -> Check {
    let (reached, reasons) = match host.reach(settings).await {
        Ok(reach) => reach,
        Err(failure) => return Check::failure("service", &settings.name, &failure),
    };
    let because = if reasons.is_empty() { String::new() } else { format!("; {}", reasons.join("; ")) };
    if reached < settings.consistency {
        let asked = settings.consistency;
        let message = format!("it asks for consistency `{asked}` and reaches only `{reached}` here{because}");
        return Check::failure("service", &settings.name, &Failure::new(ErrorClass::PointFailed, message));
    }
    let best = if reached == Consistency::Application { String::new() } else { because };
    Check::ok("service", &settings.name, format!("it reaches consistency `{reached}`{best}"))
}

/// A policy in force that the settings do not allow any more makes every run fail.
fn policy(settings: &ServiceSettings, host: &Host) -> Option<Check> {
    let name = &settings.name;
    match Policies::of(&host.state_dir).load(name) {
        Ok(None) => None,
        Ok(Some(policy)) => {
            let refusal = gate::check_policy(&policy, &host.destinations, &host.floor).err()?;
            Some(Check::failure("policy", name, &refusal.into()))
        }
        Err(error) => {
            let failure = Failure::of(ErrorClass::SettingsInvalid, &error);
            let check = Check::failure("policy", name, &failure);
            Some(Check { next_step: "put the policy again at the receiver".to_owned(), ..check })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restics_version_is_read_as_it_prints_it() {
        assert_eq!(version("restic 0.14.0 compiled with go1.19.8 on linux/amd64\n"), Some((0, 14)));
        assert_eq!(version("restic 0.18.1-dev (compiled manually)\n"), Some((0, 18)));
        assert_eq!(version("busybox 1.2"), None);
    }
}
