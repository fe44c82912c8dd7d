//! Commands that ask the daemon.

use hestner_proto::words::RunStatus;
use serde_json::json;

use super::output::{self, Far, ProgressLine};
use super::{Complaint, EXIT_FAILED};
use crate::control::{self, Answer, ControlError, Conversation, Request};
use crate::daemon::settings::Settings;
use crate::platform::chain;
use crate::report::RunRecord;
use crate::status::Status;

pub(super) async fn ask(settings: &Settings, request: Request) -> Result<Conversation, Complaint> {
    control::ask(&settings.socket, &request).await.map_err(complaint)
}

fn complaint(error: ControlError) -> Complaint {
    Complaint::mend(
        "daemon_unreachable",
        chain(&error),
        "start it (`hestner-agent run`, or its unit), and run this command as root",
    )
}

pub(super) async fn next(conversation: &mut Conversation) -> Result<Answer, Complaint> {
    match conversation.next().await.map_err(complaint)? {
        Some(Answer::Refused { code, message, next_step }) => {
            let exit = code.parse().map_or(super::EXIT_MEND, |class: hestner_proto::words::ErrorClass| {
                if class.needs_operator() { super::EXIT_MEND } else { EXIT_FAILED }
            });
            Err(Complaint { message, next_step, code, exit })
        }
        Some(answer) => Ok(answer),
        None => Err(complaint(ControlError::Broken)),
    }
}

pub(super) fn unexpected() -> Complaint {
    Complaint::mend(
        "version_mismatch",
        "the daemon answered something else than was asked",
        "restart the daemon: it is of another version",
    )
}

pub(super) async fn status(settings: &Settings, as_json: bool) -> Result<(), Complaint> {
    let Answer::Status(status) = next(&mut ask(settings, Request::Status).await?).await? else {
        return Err(unexpected());
    };
    if as_json {
        output::json(&status);
    } else {
        print_status(&status);
    }
    Ok(())
}

fn print_status(status: &Status) {
    output::line(&format!("hestner-agent {}", status.version));
    output::line(&format!("  server       {} of company {}", status.server_id, status.company_id));
    let link = if status.connected {
        "connected".to_owned()
    } else {
        format!("not connected: {}", status.disconnected_because)
    };
    output::line(&format!("  receiver     {link}"));
    output::line(&format!("  outbox       {} reports wait", status.outbox_reports));
    let waiting = match status.runs_waiting {
        0 => String::new(),
        n => format!(", {n} waiting to be confirmed (`hestner-agent confirm --list`)"),
    };
    output::line(&format!("  runs         {} going on{waiting}", status.runs_active));
    let separation = if status.separated { "on" } else { "off: daemon and runner run as the same user" };
    output::line(&format!("  separation   {separation}"));
    if !status.worker_limits_off.is_empty() {
        output::line(&format!("  limits       off: {}", status.worker_limits_off));
    }
    for service in &status.services {
        let cron = if service.cron.is_empty() { "no schedule" } else { &service.cron };
        let reach = if service.consistency.is_empty() { "its source cannot be reached" } else { &service.consistency };
        output::line(&format!(
            "  service      {}: consistency {reach}, to {}, {cron}",
            service.name, service.destination
        ));
    }
    for repository in &status.repositories {
        output::line(&format!("  repository   {} ({}): {}", repository.destination, repository.mode, repository.path));
    }
    for problem in &status.problems {
        output::line(&format!("  problem      {problem}"));
    }
}

pub(super) async fn runs(settings: &Settings, limit: u32, as_json: bool) -> Result<(), Complaint> {
    let Answer::Runs(runs) = next(&mut ask(settings, Request::Runs { limit }).await?).await? else {
        return Err(unexpected());
    };
    if as_json {
        output::json(&runs);
    } else {
        output::runs(&runs);
    }
    Ok(())
}

pub(super) async fn plan(settings: &Settings, service: String, as_json: bool) -> Result<(), Complaint> {
    match next(&mut ask(settings, Request::Plan { service }).await?).await? {
        Answer::Plan(lines) if as_json => output::json(&lines),
        Answer::Plan(lines) => lines.iter().for_each(|l| output::line(l)),
        Answer::Ended(record) => return Err(failed(&record)),
        _ => return Err(unexpected()),
    }
    Ok(())
}

pub(super) async fn snapshot(
    settings: &Settings,
    service: String,
    detach: bool,
    as_json: bool,
) -> Result<(), Complaint> {
    let mut conversation = ask(settings, Request::Snapshot { service }).await?;
    let Answer::Started { run_uid } = next(&mut conversation).await? else { return Err(unexpected()) };
    if detach {
        if as_json {
            output::json(&json!({ "run_uid": &run_uid }));
        } else {
            output::line(&format!("run {run_uid} was started; `hestner-agent runs` shows its end"));
        }
        // One that needs nobody does not wait, and says so.
        let mut waits = ask(settings, Request::Wait { run_uid }).await?;
        if let Ok(Answer::Waiting(runs)) = next(&mut waits).await {
            ProgressLine::new(false).wait(&runs);
        }
        return Ok(());
    }
    let mut progress = ProgressLine::new(!as_json);
    let record = loop {
        match next(&mut conversation).await {
            Ok(Answer::Progress { phase, bytes, files, seconds_remaining, bytes_per_second }) => {
                progress.show(&Far { phase, bytes, files, seconds_remaining, bytes_per_second })
            }
            Ok(Answer::Waiting(runs)) => progress.wait(&runs),
            Ok(Answer::Ended(record)) => break record,
            Ok(_) => {}
            Err(complaint) => {
                progress.end();
                return Err(complaint);
            }
        }
    };
    progress.end();
    if as_json {
        output::json(&record);
    } else {
        output::run(&record);
    }
    if record.status == RunStatus::Success { Ok(()) } else { Err(failed(&record)) }
}

fn failed(record: &RunRecord) -> Complaint {
    let message = format!("the run of service `{}` failed: {}", record.service, record.error_message);
    match record.error_class {
        Some(class) => Complaint::of_class(class, message),
        None => Complaint {
            message,
            next_step: "read the run's log tail".to_owned(),
            code: "failed".to_owned(),
            exit: EXIT_FAILED,
        },
    }
}
