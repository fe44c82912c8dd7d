//! A person's word for a run that the grants want confirmed: root's own file, used once.
//!
//! `hestner-agent confirm` writes `STATE/runs/.confirmed/<run id>`, where the daemon cannot write; the
//! runner demands it, compares it with what it was asked to do, and takes it into the run's own folder
//! before anything is begun. What was never used is removed when the next one is written.

use std::path::{Path, PathBuf};

use hestner_proto::words::{ErrorClass, Verb};

use super::ledger::is_run_id;
use super::messages::Failure;
use super::runner::state_failure;
use crate::gate::{self, Confirmation};
use crate::platform::chain;
use crate::platform::files::{self, FileError};
use crate::platform::trust;

/// A confirmation is a few hundred bytes.
const CONFIRMATION_BYTES_MAX: u64 = 16 * 1024;
/// Where it lies once its run has begun, in the run's folder.
const USED: &str = "confirmed.json";

/// The folder of confirmations that are not used yet.
#[derive(Clone, Debug)]
pub struct Confirmations {
    runs: PathBuf,
    folder: PathBuf,
}

impl Confirmations {
    /// Those of an agent whose state lies in `state_dir`.
    pub fn of(state_dir: &Path) -> Self {
        let runs = state_dir.join("runs");
        Self { folder: runs.join(".confirmed"), runs }
    }

    /// Writes one down, and removes those that expired unused.
    ///
    /// # Errors
    /// When the ledger is not this user's own, or cannot be written.
    pub fn give(&self, confirmation: &Confirmation, now_ms: i64) -> Result<(), Failure> {
        if !is_run_id(&confirmation.run_uid) {
            return Err(Failure::new(ErrorClass::Refused, format!("`{}` is no id of a run", confirmation.run_uid)));
        }
        let state = self.runs.parent().unwrap_or(&self.runs);
        let ledger = if self.runs.exists() { &self.runs } else { state };
        // Root writes in nobody else's folder: what lies there could lead anywhere.
        trust::check(ledger).map_err(|e| Failure::of(ErrorClass::UnsafePermissions, &e))?;
        files::private_folder(&self.folder).map_err(|e| state_failure(&e))?;
        self.sweep(now_ms);
        let text = serde_json::to_vec_pretty(confirmation).unwrap_or_default();
        files::write(&self.path(&confirmation.run_uid), &text, 0o600).map_err(|e| state_failure(&e))
    }

    /// Takes one back that its run did not need after all.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn withdraw(&self, run_uid: &str) -> Result<(), FileError> {
        files::remove(&self.path(run_uid))
    }

    /// Whether there is one that counts for a run. It stays.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn look(&self, run: (&str, &str, Verb), now_ms: i64) -> Result<(), Failure> {
        Ok(gate::check_confirmation(read(&self.path(run.0))?.as_ref(), run, now_ms)?)
    }

    /// Uses the confirmation of a run, whose folder exists already: it is good for this once.
    ///
    /// # Errors
    /// [`ErrorClass::NotConfirmed`] when there is none that counts, and when others could have written it.
    pub fn take(&self, run: (&str, &str, Verb), now_ms: i64) -> Result<Confirmation, Failure> {
        let path = self.path(run.0);
        let confirmation = read(&path)?;
        gate::check_confirmation(confirmation.as_ref(), run, now_ms)?;
        files::rename(&path, &self.runs.join(run.0).join(USED)).map_err(|e| state_failure(&e))?;
        confirmation.ok_or_else(|| Failure::new(ErrorClass::NotConfirmed, "nobody has confirmed the run"))
    }

    /// Best effort: one that is left has expired and lets nothing happen.
    fn sweep(&self, now_ms: i64) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let expired = read(&entry.path()).ok().flatten().is_none_or(|c| c.expires_at_ms <= now_ms);
            if expired {
                let _ = files::remove(&entry.path());
            }
        }
    }

    fn path(&self, run_uid: &str) -> PathBuf {
        self.folder.join(run_uid)
    }
}

fn read(path: &Path) -> Result<Option<Confirmation>, Failure> {
    let text = match trust::read_text(path, CONFIRMATION_BYTES_MAX) {
        Ok(text) => text,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => {
            let message = format!("the confirmation is not believed: {}", chain(&error));
            return Err(Failure::new(ErrorClass::UnsafePermissions, message));
        }
    };
    let damaged = |e: serde_json::Error| {
        Failure::new(ErrorClass::NotConfirmed, format!("the confirmation {} is damaged: {e}", path.display()))
    };
    serde_json::from_str(&text).map(Some).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    const A: &str = "0198c0de-0000-7000-8000-00000000000a";
    const B: &str = "0198c0de-0000-7000-8000-00000000000b";

    fn confirmation(run_uid: &str, expires_at_ms: i64) -> Confirmation {
        Confirmation {
            run_uid: run_uid.into(),
            service: "docs".into(),
            verb: "snapshot".into(),
            by: "root".into(),
            expires_at_ms,
        }
    }

    fn state() -> tempfile::TempDir {
        // Below /tmp nothing would be believed.
        let state = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for uid in [A, B] {
            files::private_folder(&state.path().join("runs").join(uid)).unwrap();
        }
        state
    }

    #[test]
    fn confirmation_is_used_once_and_stays_with_its_run() {
        let state = state();
        let all = Confirmations::of(state.path());
        let take = |uid| all.take((uid, "docs", Verb::Snapshot), 5).map_err(|f| f.class);
        assert_eq!(take(A), Err(ErrorClass::NotConfirmed));
        all.give(&confirmation(A, 10), 0).unwrap();
        assert_eq!(take(B), Err(ErrorClass::NotConfirmed), "it is another run's");
        assert_eq!(take(A).unwrap().by, "root");
        assert_eq!(take(A), Err(ErrorClass::NotConfirmed), "it was used");
        assert!(state.path().join("runs").join(A).join("confirmed.json").exists());
    }

    #[test]
    fn confirmation_that_others_could_have_written_is_not_believed() {
        let state = state();
        let all = Confirmations::of(state.path());
        all.give(&confirmation(A, 10), 0).unwrap();
        let path = state.path().join("runs/.confirmed").join(A);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        let refused = all.take((A, "docs", Verb::Snapshot), 5).unwrap_err();
        assert_eq!(refused.class, ErrorClass::UnsafePermissions, "{}", refused.message);
    }

    #[test]
    fn next_confirmation_sweeps_what_expired_unused() {
        let state = state();
        let all = Confirmations::of(state.path());
        all.give(&confirmation(A, 10), 0).unwrap();
        all.give(&confirmation(B, 30), 20).unwrap();
        assert!(!state.path().join("runs/.confirmed").join(A).exists());
        all.take((B, "docs", Verb::Snapshot), 25).unwrap();
    }

    #[test]
    fn confirmation_is_written_for_runs_only() {
        let state = state();
        let outside = state.path().join("outside").display().to_string();
        for uid in [outside.as_str(), "../../outside", ""] {
            let refused = Confirmations::of(state.path()).give(&confirmation(uid, 10), 0).unwrap_err();
            assert_eq!(refused.class, ErrorClass::Refused);
        }
        assert!(!state.path().join("outside").exists());
    }
}
