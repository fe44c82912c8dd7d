//! `restore` and `verify`: they read the runner's ledger and the repository, and need no daemon.
//!
//! Only the artifact of a run that ended as `success` is offered. What root types on the host is the
//! host's own decision, so no grant is asked for.

use std::path::Path;

use hestner_proto::words::ErrorClass;
use serde_json::json;

use super::progress::Following;
use super::{Complaint, output, target as targets};
use crate::daemon::settings::Settings;
use crate::platform::chain;
use crate::platform::files;
use crate::report::RunRecord;
use crate::repository::verify::Extent;
use crate::repository::{Progress, Repository, RepositoryError};
use crate::run::ledger::{Ledger, is_run_id};

struct Artifact {
    run: RunRecord,
    snapshot_id: String,
    repository: Repository,
}

fn find(settings: &Settings, run_uid: &str) -> Result<Artifact, Complaint> {
    if !is_run_id(run_uid) {
        return Err(Complaint::mend(
            "unknown_run",
            format!("`{run_uid}` is not the id of a run"),
            "`hestner-agent runs` lists them",
        ));
    }
    let folder = Ledger::of(&settings.state_dir).run(run_uid);
    let unreadable = |e: files::FileError| Complaint::mend("ledger_unreadable", chain(&e), "run the command as root");
    let (result, note) = (folder.result().map_err(unreadable)?, folder.note().map_err(unreadable)?);
    let Some(run) = result.map(|finished| finished.record) else {
        return Err(Complaint::mend(
            "unknown_run",
            format!("this host knows no ended run {run_uid}"),
            "`hestner-agent runs` lists them",
        ));
    };
    if folder.is_expired() {
        let message = format!("the artifact of run {run_uid} was removed by retention");
        return Err(Complaint::mend("artifact_expired", message, "name a newer run; `hestner-agent runs` lists them"));
    }
    match (run.snapshot_id().map(str::to_owned), note) {
        (Some(snapshot_id), Some(note)) => Ok(Artifact { run, snapshot_id, repository: Repository::at(note.location) }),
        _ => {
            let message = format!(
                "run {run_uid} did not end as success: it has no artifact, and nothing partial is ever offered"
            );
            Err(Complaint::mend("no_artifact", message, "name a run with status `success`"))
        }
    }
}

fn complaint(error: &RepositoryError) -> Complaint {
    Complaint::of_class(error.class(), chain(error))
}

pub(super) async fn restore(settings: &Settings, run_uid: &str, target: &Path, as_json: bool) -> Result<(), Complaint> {
    let artifact = find(settings, run_uid)?;
    let begun = targets::begin(target, &artifact.snapshot_id)?;
    eprintln!(
        "{} {} of service {} to {}",
        if begun.goes_on { "going on with an unfinished restore:" } else { "restoring" },
        output::bytes(artifact.run.size_bytes),
        artifact.run.service,
        target.display()
    );
    let mut following = Following::new();
    let tell = |progress| {
        let (bytes_total, files_total) = (artifact.run.bytes_read, artifact.run.files);
        following.tell("restoring", Progress { bytes_total, files_total, ..progress });
    };
    let restored = artifact.repository.restore(&artifact.snapshot_id, target, tell).await;
    following.end();
    let mut warnings = restored.map_err(|e| complaint(&e))?;
    if let Err(error) = begun.finish() {
        warnings.push(format!("the mark of an unfinished restore stays in the folder: {}", chain(&error)));
    }
    warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    if as_json {
        output::json(&json!({
            "run_uid": run_uid,
            "snapshot_id": artifact.snapshot_id,
            "target": target,
            "verified": true,
            "warnings": warnings,
        }));
    } else {
        output::line(&format!(
            "restored run {run_uid} to {}; every byte was checked before it was written",
            target.display()
        ));
    }
    Ok(())
}

pub(super) async fn verify(settings: &Settings, run_uid: &str, extent: Extent, as_json: bool) -> Result<(), Complaint> {
    let artifact = find(settings, run_uid)?;
    let mut following = Following::new();
    let on_progress = |progress| following.tell("reading back", progress);
    let verified = artifact.repository.verify(&artifact.snapshot_id, extent, on_progress).await;
    following.end();
    let verified = verified.map_err(|error| match error.class() {
        ErrorClass::ArchiverFailed => Complaint::of_class(ErrorClass::VerifyFailed, chain(&error)),
        _ => complaint(&error),
    })?;
    if as_json {
        output::json(&json!({
            "run_uid": run_uid,
            "snapshot_id": artifact.snapshot_id,
            "packs": verified.packs,
            "packs_read": verified.packs_read,
            "bytes_read": verified.bytes_read,
            "verified": true,
        }));
    } else if verified.packs_read == verified.packs {
        output::line(&format!("run {run_uid} is whole: every stored byte was read back"));
    } else {
        output::line(&format!(
            "run {run_uid} is whole as far as it was read: the structure, and {} of {} packs, {}",
            verified.packs_read,
            verified.packs,
            output::bytes(verified.bytes_read)
        ));
    }
    Ok(())
}
