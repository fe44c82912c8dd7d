//! Removing data that no snapshot uses any more, by stock `restic prune`: it locks the repository against everybody
//! else, and respects the locks that our own writers and readers keep.
//!
//! In: a [`Location`]. Out: nothing, why it was not done, or what restic complained about. Nothing else needs restic.

use std::time::Duration;

use tokio::time::Instant;

use super::{Location, RepositoryError};
use crate::platform::command::{Limits, Output, Program};
use crate::platform::trust;

/// Pause between two tries to get the lock.
const LOCK_PAUSE: Duration = Duration::from_secs(2);
/// How long it may take; a repository is big and its disk may be slow.
const LIMITS: Limits = Limits { timeout: Duration::from_secs(48 * 3600), output_bytes_max: 1024 * 1024 };

/// Prunes. Another user's lock is waited for, because restic itself gives up at once. Returns why it was not done.
pub(super) async fn run(location: &Location) -> Result<Option<String>, RepositoryError> {
    if !location.restic.exists() {
        let restic = location.restic.display();
        return Ok(Some(format!("{restic} is not installed: the data of removed artifacts stays where it is")));
    }
    trust::check(&location.restic)?;
    let program = Program::new(&location.restic)
        .args(["--repo".into(), location.place(), "--password-file".into()])
        .arg(location.password_file())
        .arg("--cache-dir")
        .arg(&location.cache)
        .arg("prune");
    let give_up = Instant::now() + Duration::from_secs(location.lock_wait_seconds);
    loop {
        match judge(location, &program.clone().run(b"", LIMITS).await?) {
            Err(RepositoryError::Locked(_)) if Instant::now() < give_up => tokio::time::sleep(LOCK_PAUSE).await,
            other => return other.map(|()| None),
        }
    }
}

fn judge(location: &Location, output: &Output) -> Result<(), RepositoryError> {
    use std::os::unix::process::ExitStatusExt as _;
    let complaint = output.complaint();
    if output.status.success() {
        Ok(())
    } else if let Some(signal) = output.status.signal() {
        Err(RepositoryError::Killed { operation: "prune", signal })
    } else if complaint.contains("wrong password or no key found") {
        Err(RepositoryError::WrongKey(location.password_file()))
    } else if complaint.contains("already locked") || complaint.contains("unable to create lock") {
        Err(RepositoryError::Locked(complaint))
    } else {
        Err(RepositoryError::Failed { operation: "prune", complaint })
    }
}
