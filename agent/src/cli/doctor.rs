//! `hestner-agent doctor`: what is wrong on this host and what to do, a line a check.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde_json::json;

use super::{Complaint, EXIT_FAILED, output};
use crate::daemon::settings::{Settings, SettingsError};
use crate::doctor::{self, Check, Level, Subject};
use crate::platform::clock::SystemClock;
use crate::run::messages::Failure;

/// Exit 0 without problems; warnings are none.
pub(super) async fn run(
    config: &Path,
    settings: Result<Settings, SettingsError>,
    as_json: bool,
) -> Result<(), Complaint> {
    if let Ok(settings) = &settings {
        refuse_strangers(settings)?;
    }
    let checks = match settings {
        Ok(settings) => examine(config, settings).await,
        // Everything else stands in them.
        Err(error) => vec![Check::failure(
            "settings",
            config.display().to_string(),
            &Failure::new(error.class(), error.to_string()),
        )],
    };
    let count = |level: Level| checks.iter().filter(|check| check.level == level).count();
    let (problems, warnings) = (count(Level::Problem), count(Level::Warning));
    if as_json {
        output::json(&json!({ "problems": problems, "warnings": warnings, "checks": checks }));
    } else {
        checks.iter().for_each(show);
        output::line(&format!("problems: {problems}, warnings: {warnings}, checks: {}", checks.len()));
    }
    match doctor::worst(&checks) {
        Level::Problem => Err(Complaint {
            message: format!("problems found on this host: {problems}"),
            next_step: "mend what is marked `problem`; each says what to do".to_owned(),
            code: "problems_found".to_owned(),
            exit: EXIT_FAILED,
        }),
        Level::Ok | Level::Warning => Ok(()),
    }
}

/// Whoever may not look into the state would find fault with what is only closed to them.
fn refuse_strangers(settings: &Settings) -> Result<(), Complaint> {
    let own = nix::unistd::geteuid();
    match settings.state_dir.metadata().map(|metadata| metadata.uid()) {
        Ok(owner) if own.is_root() || owner == own.as_raw() => Ok(()),
        Ok(_) => Err(Complaint::mend("not_root", "only root can look at all of this host", "run the command as root")),
        // It is not there: that is a finding.
        Err(_) => Ok(()),
    }
}

async fn examine(config: &Path, settings: Settings) -> Vec<Check> {
    let config = std::path::absolute(config).unwrap_or_else(|_| config.to_owned());
    let subject = Subject {
        host: settings.host_to_look_at().started_with(&config, None),
        socket: settings.socket.clone(),
        receiver: settings.receiver.clone(),
    };
    let shown = subject.host.settings_file.display().to_string();
    let mut checks = vec![Check::ok("settings", shown, "every line of it is understood and believed")];
    checks.extend(doctor::examine(&subject, &SystemClock).await);
    checks
}

fn show(check: &Check) {
    let level = match check.level {
        Level::Ok => "ok",
        Level::Warning => "warning",
        Level::Problem => "problem",
    };
    let space = if check.subject.is_empty() { "" } else { " " };
    output::line(&format!("{level:<8} {}{space}{}: {}", check.check, check.subject, check.message));
    if check.level != Level::Ok {
        output::line(&format!("         next: {}\n         code: {}", check.next_step, check.code));
    }
}
