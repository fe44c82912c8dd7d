//! Brings to an end what earlier runs left open: at the start of every runner, by the ledger's notes.
//!
//! For each run that is not settled and of which no process lives: what it has left held ([`super::thaw`]),
//! what it made for its point, whatever the repository holds of it, and the locks of its dead archiver. A run
//! that never wrote a result gets one: `failed`, `interrupted`.

use std::time::Duration;

use hestner_proto::words::{ErrorClass, RunKind};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::archive::Worker;
use super::ledger::{Ledger, Note, RunFolder};
use super::messages::{Finished, Work, WorkerEvent, WorkerTask};
use super::plan::Host;
use super::thaw;
use crate::freeze;
use crate::guard;
use crate::platform::chain;
use crate::platform::clock::Clock;
use crate::platform::files::{FileError, Lock};
use crate::report::RunRecord;
use crate::repository::Location;

/// How long to wait for the last process of a run whose runner died. The longest is a hook on its way
/// through SIGTERM and SIGKILL.
const ALIVE_WAIT: Duration = Duration::from_secs(120);
const ALIVE_PAUSE: Duration = Duration::from_millis(100);
/// How long the removal of one run's remains may take before it is left for the next time.
const FORGET_TIMEOUT: Duration = Duration::from_secs(300);

/// For whom earlier runs are settled.
#[derive(Clone, Copy)]
pub(super) enum For<'a> {
    /// For the daemon: those whose ends it wants to know are waited for.
    Daemon { run_uids: &'a [String] },
    /// For a run that is about to begin: only earlier ones of its own service are waited for.
    Run { run_uid: &'a str, service: &'a str },
}

/// Settles every run but the one it is for. What cannot be settled now is left for the next time.
///
/// # Errors
/// When the ledger cannot be read.
pub(super) async fn settle_all(host: &Host, whom: For<'_>, clock: &dyn Clock) -> Result<(), FileError> {
    let ledger = Ledger::of(&host.state_dir);
    for run_uid in ledger.unsettled()? {
        let folder = ledger.run(&run_uid);
        let wait = match whom {
            For::Daemon { run_uids } => run_uids.contains(&run_uid),
            For::Run { run_uid: own, .. } if own == run_uid => continue,
            // An owed release must not fall into the middle of the next run of the same service.
            For::Run { service, .. } => folder.note().ok().flatten().is_some_and(|note| note.service == service),
        };
        let Some(alive) = lock_when_dead(&folder, wait).await? else { continue };
        match settle(host, &run_uid, &folder, &alive, clock).await {
            Ok(true) => tracing::info!(event = "run_settled", run_id = run_uid),
            Ok(false) => tracing::warn!(event = "run_not_settled", run_id = run_uid),
            Err(error) => tracing::warn!(event = "run_not_settled", run_id = run_uid, error = %error),
        }
    }
    ledger.tidy()
}

async fn lock_when_dead(folder: &RunFolder, wait: bool) -> Result<Option<Lock>, FileError> {
    let give_up = Instant::now() + if wait { ALIVE_WAIT } else { Duration::ZERO };
    loop {
        let lock = folder.lock_alive()?;
        if lock.is_some() || Instant::now() >= give_up {
            return Ok(lock);
        }
        tokio::time::sleep(ALIVE_PAUSE).await;
    }
}

async fn settle(
    host: &Host,
    run_uid: &str,
    folder: &RunFolder,
    alive: &Lock,
    clock: &dyn Clock,
) -> Result<bool, FileError> {
    let note = folder.note()?;
    let result = folder.result()?;
    // What holds the service comes first: filesystems, containers, hooks.
    let thawed = thaw::release_dead(run_uid, folder, alive).await?;
    for trouble in &thawed.troubles {
        tracing::error!(event = "not_released", run_id = run_uid, error = trouble);
    }
    if thawed.is_stuck {
        guard::client::go_on_thawing(&host.guard);
    }
    let mut clean = thawed.is_free;
    let is_success = result.as_ref().is_some_and(|f| f.record.snapshot_id().is_some());
    if let Some(note) = &note {
        if let Err(error) = freeze::remove_made(&note.intent, &host.freeze).await {
            tracing::warn!(event = "point_not_removed", run_id = run_uid, error = chain(&error));
            clean = false;
        }
        if !is_success {
            clean &= forget(host, &note.location, run_uid, alive).await;
        }
    }
    if result.is_none() {
        let mut finished = interrupted(run_uid, note.as_ref(), clock);
        finished.record.warnings = folder.remarks();
        folder.write_result(&finished)?;
    }
    if clean {
        folder.settle()?;
    }
    Ok(clean)
}

/// The result of a run that has none.
pub fn interrupted(run_uid: &str, note: Option<&Note>, clock: &dyn Clock) -> Finished {
    let now = clock.now_ms();
    let started = started_at_ms(run_uid).unwrap_or(now);
    let service = note.map(|n| n.service.clone()).unwrap_or_default();
    let mut record = RunRecord::queued(run_uid.to_owned(), String::new(), service, RunKind::Manual, started);
    if let Some(note) = note {
        record.destination.clone_from(&note.location.destination.name);
    }
    record.fail(ErrorClass::Interrupted, "daemon, runner or machine stopped while the run went on", now);
    Finished { record, repository_key: None }
}

/// A UUIDv7 begins with the time it was made.
fn started_at_ms(run_uid: &str) -> Option<i64> {
    let (seconds, nanos) = uuid::Uuid::parse_str(run_uid).ok()?.get_timestamp()?.to_unix();
    i64::try_from(seconds * 1000 + u64::from(nanos / 1_000_000)).ok()
}

/// Removes whatever the repository holds of a run. False: it could not be done now.
pub(super) async fn forget(host: &Host, location: &Location, run_uid: &str, alive: &Lock) -> bool {
    let work = Work::Forget { run_uid: run_uid.to_owned() };
    let task = WorkerTask { location: location.clone(), effort: host.worker.effort(), work };
    let stop = CancellationToken::new();
    let removal = async {
        let worker = Worker::start(&host.fence, task, alive, None).await?;
        worker.finish(&stop, None, |_| {}).await
    };
    match tokio::time::timeout(FORGET_TIMEOUT, removal).await {
        Ok(Ok(WorkerEvent::Removed { .. })) => true,
        Ok(Err(failure)) => {
            tracing::warn!(event = "remains_not_removed", run_id = run_uid, error_class = %failure.class, error = failure.message);
            false
        }
        _ => false,
    }
}
