//! Brings to an end what earlier runs left open: at the start of every runner, by the ledger's notes.
//!
//! For each run that is not settled and of which no process lives: the releases it owes, the snapshots it
//! made for its point, whatever the repository holds of it, and the locks of its dead archiver. A run that
//! never wrote a result gets one: `failed`, `interrupted`.

use std::time::Duration;

use hestner_proto::words::{ErrorClass, RunKind};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::archive::Worker;
use super::hook::{self, Spec};
use super::ledger::{HookNote, Ledger, Note, RunFolder};
use super::messages::{Finished, Work, WorkerEvent};
use super::plan::Host;
use crate::freeze;
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

/// Settles every run but `own`. What cannot be settled now is left for the next time.
///
/// # Errors
/// When the ledger cannot be read.
pub(super) async fn settle_all(host: &Host, own: Option<&str>, wait: bool, clock: &dyn Clock) -> Result<(), FileError> {
    let ledger = Ledger::of(&host.state_dir);
    for run_uid in ledger.unsettled()?.into_iter().filter(|uid| Some(uid.as_str()) != own) {
        let folder = ledger.run(&run_uid);
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
    let mut clean = true;
    if let Some(note) = &note {
        for (i, hook) in note.hooks.iter().enumerate().rev().filter(|(i, _)| folder.owes_release(*i)) {
            release(run_uid, &note.service, i, hook, folder, alive).await?;
        }
        clean &= freeze::remove_snapshots(&note.snapshots, &host.freeze).await.is_ok();
    }
    let is_success = result.as_ref().is_some_and(|f| f.record.snapshot_id().is_some());
    if let Some(note) = note.as_ref().filter(|_| !is_success) {
        clean &= forget(&note.location, run_uid, alive).await;
    }
    if result.is_none() {
        folder.write_result(&interrupted(run_uid, note.as_ref(), clock))?;
    }
    if clean {
        folder.settle()?;
    }
    Ok(clean)
}

async fn release(
    run_uid: &str,
    service: &str,
    i: usize,
    hook: &HookNote,
    folder: &RunFolder,
    alive: &Lock,
) -> Result<(), FileError> {
    // Claimed already or not: whoever claimed it died before its end, and at least once is the promise then.
    folder.claim_release(i)?;
    if !hook.release.is_empty() {
        let spec = Spec {
            argv: hook.release.clone(),
            user: hook.user.clone(),
            timeout_ms: hook.timeout_seconds * 1000,
            output_bytes_max: hook.output_bytes_max,
            environment: [("RUN_UID", run_uid), ("SERVICE", service), ("HOOK", &hook.name)]
                .map(|(name, value)| (format!("HESTNER_{name}"), value.to_owned()))
                .to_vec(),
            stdout_fd: None,
        };
        match hook::run(&spec, &CancellationToken::new(), &[&**alive]).await {
            Ok(ended) if ended.is_success() => {}
            Ok(ended) => tracing::error!(
                event = "owed_release_failed",
                run_id = run_uid,
                hook = hook.name,
                error = ended.description()
            ),
            Err(error) => {
                tracing::error!(event = "owed_release_failed", run_id = run_uid, hook = hook.name, error = %error)
            }
        }
    }
    folder.release_ended(i).map(drop)
}

/// The result of a run that has none.
pub fn interrupted(run_uid: &str, note: Option<&Note>, clock: &dyn Clock) -> Finished {
    let now = clock.now_ms();
    let started = started_at_ms(run_uid).unwrap_or(now);
    let service = note.map(|n| n.service.clone()).unwrap_or_default();
    let mut record = RunRecord::queued(run_uid.to_owned(), String::new(), service, RunKind::Manual, started);
    if let Some(note) = note {
        record.destination.clone_from(&note.location.destination);
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
pub(super) async fn forget(location: &Location, run_uid: &str, alive: &Lock) -> bool {
    let work = Work::Forget { run_uid: run_uid.to_owned() };
    let stop = CancellationToken::new();
    let removal = async {
        let worker = Worker::start(location.clone(), work, alive, None).await?;
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
