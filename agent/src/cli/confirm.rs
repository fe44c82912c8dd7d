//! `hestner-agent confirm`: a person's word on a run that the grants want confirmed.
//!
//! Shows what is asked, writes root's own file for the runner, then tells the daemon. The daemon's word
//! alone lets nothing begin, and what it shows is what is written: the runner compares both with the run.

use std::io::{BufRead as _, IsTerminal as _};

use hestner_proto::words::RunKind;
use serde_json::json;

use super::{Complaint, output, talk};
use crate::control::{Answer, Request};
use crate::daemon::settings::Settings;
use crate::gate::Confirmation;
use crate::platform::chain;
use crate::platform::clock::{Clock as _, SystemClock};
use crate::run::confirmation::Confirmations;
use crate::run::ledger::is_run_id;
use crate::status::WaitingRun;

/// Who logged in, also behind `sudo` (`proc_pid_loginuid(5)`); this value means nobody.
const LOGINUID: &str = "/proc/self/loginuid";
const LOGINUID_NONE: u32 = u32::MAX;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The run.
    #[arg(required_unless_present = "list", conflicts_with = "list")]
    run: Option<String>,
    /// List the runs that wait.
    #[arg(long)]
    list: bool,
    /// End it instead: the run fails as `refused`.
    #[arg(long, conflicts_with = "list")]
    refuse: bool,
    /// Do not ask again on a terminal.
    #[arg(long)]
    yes: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(settings: &Settings, arguments: &Arguments) -> Result<(), Complaint> {
    let Some(run_uid) = &arguments.run else { return list(settings, arguments.json).await };
    if !is_run_id(run_uid) {
        let message = format!("`{run_uid}` is no id of a run");
        return Err(Complaint::mend("unknown_run", message, "`hestner-agent confirm --list` shows what waits"));
    }
    let run = one(settings, Request::Wait { run_uid: run_uid.clone() }).await?;
    // The daemon is not believed: a word for this run must not become one for another, or a path.
    if run.run_uid != *run_uid {
        return Err(talk::unexpected());
    }
    if !arguments.json {
        show(&run);
    }
    let question = if arguments.refuse { "Refuse it?" } else { "Let it begin?" };
    if !arguments.yes && !agrees(question) {
        return Err(Complaint::mend("not_answered", "nothing was done", "the run waits on; answer with `y`"));
    }
    let word = if arguments.refuse { "refused" } else { "confirmed" };
    if arguments.refuse {
        one(settings, Request::Refuse { run_uid: run_uid.clone(), by: who() }).await?;
    } else {
        confirm(settings, &run).await?;
    }
    if arguments.json {
        output::json(&json!({ "run": run, "word": word }));
    } else {
        output::line(&format!("run {run_uid} is {word}; `hestner-agent runs` shows its end"));
    }
    Ok(())
}

async fn confirm(settings: &Settings, run: &WaitingRun) -> Result<(), Complaint> {
    let now_ms = SystemClock.now_ms();
    let expires = i64::try_from(settings.limits.confirm_expires.as_millis()).unwrap_or(i64::MAX);
    let confirmation = Confirmation {
        run_uid: run.run_uid.clone(),
        service: run.service.clone(),
        verb: run.verb.clone(),
        by: who(),
        expires_at_ms: now_ms.saturating_add(expires),
    };
    let all = Confirmations::of(&settings.state_dir);
    all.give(&confirmation, now_ms).map_err(|failure| {
        Complaint::mend(
            failure.class.as_str(),
            failure.message,
            "run the command as root, or as the user that owns the state folder",
        )
    })?;
    let told = one(settings, Request::Confirm { run_uid: run.run_uid.clone() }).await;
    // Confirmed by somebody else a moment ago, its runner may use this file as well as theirs.
    if told.as_ref().is_err_and(|complaint| complaint.code != "run_confirmed") {
        all.withdraw(&run.run_uid)
            .map_err(|e| Complaint::mend("state_unusable", chain(&e), "remove the file; it expires by itself"))?;
    }
    told.map(drop)
}

async fn one(settings: &Settings, request: Request) -> Result<WaitingRun, Complaint> {
    let mut conversation = talk::ask(settings, request).await?;
    let Answer::Waiting(runs) = talk::next(&mut conversation).await? else { return Err(talk::unexpected()) };
    runs.into_iter().next().ok_or_else(talk::unexpected)
}

async fn list(settings: &Settings, as_json: bool) -> Result<(), Complaint> {
    let mut conversation = talk::ask(settings, Request::Waiting).await?;
    let Answer::Waiting(runs) = talk::next(&mut conversation).await? else { return Err(talk::unexpected()) };
    if as_json {
        output::json(&runs);
    } else if runs.is_empty() {
        output::line("no run waits to be confirmed");
    } else {
        runs.iter().for_each(show);
    }
    Ok(())
}

/// A run that waits, whole.
pub(super) fn show(run: &WaitingRun) {
    output::line(&format!("run {}", run.run_uid));
    let rows = [
        ("service", run.service.clone()),
        ("verb", run.verb.clone()),
        ("asked by", asker(run)),
        ("waits since", output::time(run.since_ms)),
        ("until", output::time(run.expires_at_ms)),
    ];
    for (name, value) in rows {
        output::line(&format!("  {name:<12} {value}"));
    }
}

fn asker(run: &WaitingRun) -> String {
    match (run.kind, run.directive_id.as_str()) {
        (RunKind::Cron, _) => "the policy's schedule".to_owned(),
        (RunKind::Manual, "") => "somebody on this host".to_owned(),
        (RunKind::Manual, directive) => format!("the centre, directive {directive}"),
    }
}

/// Asks on a terminal; elsewhere the command itself is the answer.
fn agrees(question: &str) -> bool {
    if !std::io::stdin().is_terminal() {
        return true;
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// Who says it, for the record: the user that logged in, if the kernel knows, and the one this runs as.
fn who() -> String {
    let name = |uid: nix::unistd::Uid| {
        nix::unistd::User::from_uid(uid).ok().flatten().map_or_else(|| format!("user {uid}"), |user| user.name)
    };
    let own = nix::unistd::geteuid();
    let login: Option<u32> = std::fs::read_to_string(LOGINUID).ok().and_then(|text| text.trim().parse().ok());
    match login.filter(|uid| *uid != LOGINUID_NONE && *uid != own.as_raw()) {
        Some(uid) => format!("{} as {}", name(uid.into()), name(own)),
        None => name(own),
    }
}
