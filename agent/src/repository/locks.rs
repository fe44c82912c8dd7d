//! Locks that dead processes left in a repository.
//!
//! `restic unlock` tests whether a lock's process lives by sending it SIGHUP: on a host where the number
//! has been given to somebody else since, that ends an innocent process. So a lock is judged here: it is
//! stale when it was made on this host and its process is gone or is another program by now. Locks of
//! other hosts are never touched.

use std::path::Path;

use super::RepositoryError;
use super::restic::{LockFile, Restic};
use crate::platform::{files, process};

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
        if is_stale(&lock, &host, engine.program_name()) {
            files::remove(&folder.join(&id))?;
            tracing::warn!(event = "stale_lock_removed", pid = lock.pid);
        }
    }
    Ok(())
}

fn is_stale(lock: &LockFile, host: &str, program: &str) -> bool {
    let alive = || ["restic", program].iter().any(|name| process::is_running_as(lock.pid, name));
    lock.hostname == host && !alive()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(hostname: &str, pid: i32) -> LockFile {
        LockFile { hostname: hostname.into(), pid }
    }

    #[test]
    fn lock_of_a_number_that_another_program_has_now_is_stale() {
        let own = std::process::id().cast_signed();
        assert!(is_stale(&lock("here", own), "here", "restic"));
    }

    #[test]
    fn lock_of_another_host_is_never_stale() {
        assert!(!is_stale(&lock("elsewhere", i32::MAX), "here", "restic"));
        assert!(is_stale(&lock("here", i32::MAX), "here", "restic"));
    }
}
