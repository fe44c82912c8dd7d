//! Whether the daemon runs, whether it is separated from what has privileges, and what earlier runs left.

use std::path::Path;
use std::time::Duration;

use super::{Check, Level, Subject};
use crate::control::{self, Answer, Request};
use crate::platform::chain;
use crate::platform::command::{Limits, Program};
use crate::run::ledger::Ledger;
use crate::run::thaw;
use crate::status::Status;

/// How long the daemon may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long systemctl may take, in seconds.
const SYSTEMCTL_SECONDS: u64 = 15;
/// Units that give a run its privileges, and its thaw.
const UNITS: &[&str] = &["hestner-run.socket", "hestner-guard.socket", "hestner-thaw.socket"];

/// What the daemon says of itself, or why it says nothing.
pub(super) async fn ask(socket: &Path) -> Result<Status, String> {
    let asked = async {
        let mut conversation = control::ask(socket, &Request::Status).await.map_err(|error| chain(&error))?;
        match conversation.next().await.map_err(|error| chain(&error))? {
            Some(Answer::Status(status)) => Ok(*status),
            Some(Answer::Refused { message, .. }) => Err(message),
            _ => Err("the daemon answered something else than was asked".to_owned()),
        }
    };
    let answered = tokio::time::timeout(ANSWER_TIMEOUT, asked).await;
    answered.unwrap_or_else(|_| Err(format!("the daemon did not answer within {} s", ANSWER_TIMEOUT.as_secs())))
}

pub(super) async fn checks(subject: &Subject, status: &Result<Status, String>) -> Vec<Check> {
    let mut found = vec![daemon(subject, status)];
    if let Ok(status) = status {
        found.extend(separation(status).await);
        found.push(limits(status));
        found.extend(waiting(status));
    }
    found.extend(left(subject));
    found
}

fn daemon(subject: &Subject, status: &Result<Status, String>) -> Check {
    let socket = subject.socket.display().to_string();
    match status {
        Ok(status) if status.version == env!("CARGO_PKG_VERSION") => {
            Check::ok("daemon", socket, format!("version {} runs", status.version))
        }
        Ok(status) => {
            let own = env!("CARGO_PKG_VERSION");
            let message = format!("version {} runs, and the installed one is {own}", status.version);
            let next_step = "restart the daemon (`systemctl restart hestner-agent`)";
            Check::ok("daemon", socket, message).but(Level::Warning, "daemon_outdated", next_step)
        }
        Err(error) => {
            let next_step = "start it (`systemctl start hestner-agent`): without it nothing is scheduled or told";
            Check::ok("daemon", socket, error).but(Level::Problem, "daemon_unreachable", next_step)
        }
    }
}

async fn separation(status: &Status) -> Vec<Check> {
    if !status.separated {
        let message = "off: the part that listens to the centre runs as the same user as hooks and archiver, and nothing \
            else thaws a service when that user's processes are ended together";
        let next_step = "install the units (the package brings them) and start the agent as `hestner-agent.service`";
        let check = Check::ok("separation", "", message);
        return vec![check.but(Level::Warning, "separation_off", next_step)];
    }
    let mut found = Vec::new();
    for unit in UNITS {
        let program = Program::new("systemctl").args(["is-active", unit]);
        let state = match program.run(b"", Limits::seconds(SYSTEMCTL_SECONDS)).await {
            Ok(output) if output.status.success() => continue,
            Ok(output) => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            Err(error) => chain(&error),
        };
        let check = Check::ok("separation", *unit, format!("the unit is not active: {state}"));
        let next_step = format!("`systemctl enable --now {unit}`");
        found.push(check.but(Level::Problem, "unit_inactive", next_step));
    }
    if found.is_empty() {
        found.push(Check::ok("separation", "", "on: daemon, runs, guard and thaw are units of their own"));
    }
    found
}

/// Whether the kernel keeps what `[worker]` says.
fn limits(status: &Status) -> Check {
    if status.worker_limits_off.is_empty() {
        return Check::ok("limits", "", "the bounds of [worker] are kept");
    }
    let next_step = "start the agent by its units on a host with the control group's controllers, and see that \
        `hestner-run@.service` hands them on (`systemctl show -p DelegateControllers`); or set the keys to 0";
    Check::ok("limits", "", &status.worker_limits_off).but(Level::Warning, "worker_limits_off", next_step)
}

fn waiting(status: &Status) -> Option<Check> {
    let message = match status.runs_waiting {
        0 => return None,
        1 => "a run waits until somebody confirms it".to_owned(),
        n => format!("{n} runs wait until somebody confirms them"),
    };
    let next_step = "`hestner-agent confirm --list` shows what waits";
    Some(Check::ok("confirmations", "", message).but(Level::Warning, "runs_waiting", next_step))
}

/// What earlier runs left frozen, held or made.
fn left(subject: &Subject) -> Vec<Check> {
    let state_dir = &subject.host.state_dir;
    let ledger = Ledger::of(state_dir);
    let (unsettled, holding) = match (ledger.unsettled(), thaw::holding(state_dir)) {
        (Ok(unsettled), Ok(holding)) => (unsettled, holding),
        (Err(error), _) | (_, Err(error)) => {
            let next_step = "look at the state folder's permissions and disk";
            return vec![Check::ok("left", "", chain(&error)).but(Level::Problem, "state_unusable", next_step)];
        }
    };
    let mut found = Vec::new();
    for run_uid in unsettled {
        if ledger.run(&run_uid).is_alive() {
            found.push(Check::ok("left", run_uid, "the run goes on"));
            continue;
        }
        found.push(match holding.iter().find(|holding| holding.run_uid == run_uid) {
            Some(held) => {
                let message = format!("the run died, and service `{}` may still be frozen or held by it", held.service);
                let check = Check::ok("left", run_uid, message);
                check.but(Level::Problem, "left_held", "run `hestner-agent thaw` now; it is safe at any time")
            }
            None => {
                let check = Check::ok("left", run_uid, "the run died, and what it made is not removed yet");
                let next_step =
                    "the next run does it, and so does a restart of the daemon; its log says what is in the way";
                check.but(Level::Warning, "left_unsettled", next_step)
            }
        });
    }
    if found.is_empty() {
        found.push(Check::ok("left", "", "nothing is left frozen, held or made by an earlier run"));
    }
    found
}
