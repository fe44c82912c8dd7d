//! `restore` and `verify`: they read the runner's ledger and the repository, and need no daemon.
//!
//! Only the artifact of a run that ended as `success` is offered. What root types on the host is the
//! host's own decision, so no grant is asked for.

use std::path::Path;

use hestner_proto::words::ErrorClass;
use serde_json::json;

use super::{Complaint, output};
use crate::daemon::settings::Settings;
use crate::platform::chain;
use crate::platform::files;
use crate::report::RunRecord;
use crate::repository::{Repository, RepositoryError};
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
    check_target(target)?;
    eprintln!(
        "restoring {} of service {} to {}",
        output::bytes(artifact.run.size_bytes),
        artifact.run.service,
        target.display()
    );
    let restored = artifact.repository.restore(&artifact.snapshot_id, target).await;
    let warnings = restored.map_err(|e| complaint(&e))?;
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

/// What is restored must not mix with what is there, and must not follow a symlink somewhere else.
pub(super) fn check_target(target: &Path) -> Result<(), Complaint> {
    let next = "name a folder that does not exist yet or is empty";
    let bad = |reason: String| Complaint::mend("bad_target", reason, next);
    match target.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            files::private_folder(target).map_err(|e| bad(chain(&e)))
        }
        Err(error) => Err(bad(format!("cannot look at {}: {error}", target.display()))),
        Ok(metadata) if !metadata.is_dir() => Err(bad(format!("{} is not a folder", target.display()))),
        Ok(_) => match target.read_dir().map(|mut entries| entries.next().is_none()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(bad(format!("{} is not empty", target.display()))),
            Err(error) => Err(bad(format!("cannot list {}: {error}", target.display()))),
        },
    }
}

pub(super) async fn verify(settings: &Settings, run_uid: &str, as_json: bool) -> Result<(), Complaint> {
    let artifact = find(settings, run_uid)?;
    eprintln!("reading the whole repository back; this takes as long as reading it does");
    artifact.repository.verify(&artifact.snapshot_id).await.map_err(|error| match error.class() {
        ErrorClass::ArchiverFailed => Complaint::of_class(ErrorClass::VerifyFailed, chain(&error)),
        _ => complaint(&error),
    })?;
    if as_json {
        output::json(&json!({"run_uid": run_uid, "snapshot_id": artifact.snapshot_id, "verified": true}));
    } else {
        output::line(&format!("run {run_uid} is whole: every stored byte was read back"));
    }
    Ok(())
}
