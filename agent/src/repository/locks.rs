//! Locks that dead processes left in a repository.
//!
//! `restic unlock` (0.14) tests whether a lock's process lives by sending it SIGHUP: on a host where the
//! number has been given to somebody else since, that ends an innocent process, and the lock stays (tried). So a lock is judged here: it is
//! stale when it was made on this host and its process is gone or is another program by now. Locks of
//! other hosts are never touched.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::RepositoryError;
use super::lock::is_archiver;
use super::restic::{LockFile, Restic};
use crate::platform::files;

/// How long a process may take to die of a SIGKILL that was already sent.
const DYING_WAIT: Duration = Duration::from_secs(3);
const DYING_PAUSE: Duration = Duration::from_millis(50);

pub(super) async fn clear_stale(engine: &Restic, repository: &Path) -> Result<(), RepositoryError> {
    let folder = repository.join("locks");
    let entries = std::fs::read_dir(&folder).map_err(files::failed("list", &folder))?;
    let ids: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    if ids.is_empty() {
        return Ok(());
    }
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    for id in ids {
        // A lock that went away meanwhile was not stale.
        let Ok(lock) = engine.lock(&id).await else { continue };
        if becomes_stale(&lock, &host, engine.program_name()).await {
            files::remove(&folder.join(&id))?;
            tracing::warn!(event = "stale_lock_removed", pid = lock.pid);
        }
    }
    Ok(())
}

/// A process that was just killed is still there for a moment, so that one that lives is looked at again.
async fn becomes_stale(lock: &LockFile, host: &str, program: &str) -> bool {
    let give_up = Instant::now() + DYING_WAIT;
    loop {
        if is_stale(lock, host, program) {
            return true;
        }
        if lock.hostname != host || Instant::now() >= give_up {
            return false;
        }
        tokio::time::sleep(DYING_PAUSE).await;
    }
}

fn is_stale(lock: &LockFile, host: &str, program: &str) -> bool {
    lock.hostname == host && !is_archiver(lock.pid, program)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(hostname: &str, pid: i32) -> LockFile {
        LockFile { hostname: hostname.into(), pid }
    }

    #[test]
    fn lock_of_a_number_that_another_program_has_now_is_stale() {
        let other = std::os::unix::process::parent_id().cast_signed();
        assert!(is_stale(&lock("here", other), "here", "restic"));
    }

    #[test]
    fn lock_of_our_own_engine_is_not_taken_for_a_stranger_s() {
        let own = std::process::id().cast_signed();
        assert!(!is_stale(&lock("here", own), "here", "restic"));
    }

    #[test]
    fn lock_of_another_host_is_never_stale() {
        assert!(!is_stale(&lock("elsewhere", i32::MAX), "here", "restic"));
        assert!(is_stale(&lock("here", i32::MAX), "here", "restic"));
    }
}
