//! `thaw`: releases what runs have left frozen, paused or quiesced, and says what it did for whom.
//!
//! For people, for `ExecStopPost` of the units, for the guard when it has struck, and for package scripts
//! that wait before an upgrade. Needs neither the daemon nor an identity, and only as much of the settings
//! as can be understood. Where there is nothing to do it says so and ends with 0.

use std::future::poll_fn;
use std::path::Path;
use std::task::Poll;
use std::time::Duration;

use hestner_proto::words::ErrorClass;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::{Complaint, output};
use crate::daemon::settings::Settings;
use crate::platform::chain;
use crate::platform::files::FileError;
use crate::platform::trust;
use crate::run::thaw::{self, Holding, Thawed};

const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// What was asked for.
#[derive(Clone, Copy)]
pub(super) struct How {
    pub(super) wait_seconds: Option<u64>,
    pub(super) quiet: bool,
    pub(super) json: bool,
}

pub(super) async fn run(config: &Path, how: How) -> Result<(), Complaint> {
    // Whoever could have written the settings must not say what is thawed; the usual place is root's own.
    let (settings, mut distrusted) = match Settings::salvage(config) {
        Ok(settings) => (settings, None),
        Err(error) => (Settings::default(), Some(error)),
    };
    let unreadable = |e: FileError| Complaint::mend("ledger_unreadable", chain(&e), "run the command as root");
    // The notes of its runs say what is run as this user.
    match trust::check(&settings.state_dir) {
        Err(error) if !error.is_missing() => {
            let message = format!("the state folder is not believed: {}", chain(&error));
            return Err(Complaint::of_class(ErrorClass::UnsafePermissions, message));
        }
        _ => {}
    }
    let give_up = Instant::now() + Duration::from_secs(how.wait_seconds.unwrap_or_default());
    let mut all: Vec<Thawed> = Vec::new();
    let mut ending = Ending::heard();
    loop {
        let round = thaw::thaw_all(&settings.state_dir).await.map_err(unreadable)?;
        // Nothing is said before: where it is said to may be frozen.
        if let Some(error) = distrusted.take() {
            eprintln!("hestner-agent: {error}\n  the usual state folder was looked at");
        }
        for thawed in round {
            remember(&mut all, thawed, how.json);
        }
        let holding = thaw::holding(&settings.state_dir).map_err(unreadable)?;
        let is_over = holding.is_empty() || Instant::now() >= give_up;
        if is_over || ending.comes_within(LOOK_PAUSE).await {
            return end(&all, &holding, how);
        }
    }
}

/// SIGINT, SIGTERM and SIGHUP: heard at any time, and heeded between two rounds. A process that is killed
/// while it thaws a btrfs leaves that read-only (seen with Linux 6.18), and one that ends inside a hook has
/// it run once more.
struct Ending(Vec<Signal>);

impl Ending {
    fn heard() -> Self {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        // One that cannot be heard ends the process, as it always did.
        Self(kinds.into_iter().filter_map(|kind| signal(kind).ok()).collect())
    }

    /// Waits so long; true: it came, or had come before.
    async fn comes_within(&mut self, time: Duration) -> bool {
        let come = poll_fn(|context| {
            let is_there = |signal: &mut Signal| signal.poll_recv(context).is_ready();
            if self.0.iter_mut().any(is_there) { Poll::Ready(()) } else { Poll::Pending }
        });
        tokio::time::timeout(time, come).await.is_ok()
    }
}

/// Keeps what was done, and says it to people at once: the next hook may take its time.
fn remember(all: &mut Vec<Thawed>, thawed: Thawed, as_json: bool) {
    let at = all.iter().position(|other| other.run_uid == thawed.run_uid);
    let earlier = at.map(|at| all.remove(at)).unwrap_or_default();
    let new = |now: &[String], before: &[String]| -> Vec<String> {
        now.iter().filter(|text| !before.contains(text)).cloned().collect()
    };
    let (did, troubles) = (new(&thawed.did, &earlier.did), new(&thawed.troubles, &earlier.troubles));
    if !as_json {
        let name = format!("run {} of service `{}`", thawed.run_uid, thawed.service);
        did.iter().for_each(|text| output::line(&format!("{name}: {text}")));
        troubles.iter().for_each(|text| eprintln!("{name}: {text}"));
    }
    // A trouble of an earlier round that did not come back is none any more.
    all.push(Thawed { did: [earlier.did, did].concat(), ..thawed });
}

fn end(all: &[Thawed], holding: &[Holding], how: How) -> Result<(), Complaint> {
    let done: Vec<&Thawed> = all.iter().filter(|t| !t.did.is_empty() || !t.troubles.is_empty()).collect();
    if how.json {
        output::json(&json!({"runs": done, "holding": holding}));
    } else if done.is_empty() && holding.is_empty() && !how.quiet {
        output::line("nothing is held");
    }
    let names = |runs: &mut dyn Iterator<Item = (&String, &String)>| {
        runs.map(|(run, service)| format!("run {run} of service `{service}`")).collect::<Vec<_>>().join(", ")
    };
    // A run that goes as it should holds its service for good reason; whoever waits wants to know.
    let left: Vec<&Holding> = holding.iter().filter(|h| how.wait_seconds.is_some() || !h.is_alive).collect();
    if !left.is_empty() {
        let message = format!("still held: {}", names(&mut left.iter().map(|h| (&h.run_uid, &h.service))));
        return Err(failed("still_held", message));
    }
    let troubled: Vec<&&Thawed> = done.iter().filter(|t| !t.troubles.is_empty()).collect();
    if !troubled.is_empty() {
        let message = format!("not all went well: {}", names(&mut troubled.iter().map(|t| (&t.run_uid, &t.service))));
        return Err(failed("not_released_well", message));
    }
    Ok(())
}

fn failed(code: &str, message: String) -> Complaint {
    Complaint {
        message,
        next_step: "read the lines above; `hestner-agent thaw` can be run again at any time".to_owned(),
        code: code.to_owned(),
        exit: super::EXIT_FAILED,
    }
}
