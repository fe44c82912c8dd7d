//! The guard of what hooks hold: each step of a run that is held by its hooks has a time of its own, and whoever
//! stands still in one is not waited for.
//!
//! In: how long the next step may take. Out: whether every step ended in its time. When one does not, or the
//! runner is gone, the guard has `hestner-agent thaw` release the hooks, also beside a runner that was stopped
//! and lives. It freezes nothing and knows no hook.

use std::path::Path;
use std::time::Duration;

use nix::unistd::Pid;

use super::{HOOK_JOURNAL, PointError};
use crate::guard::client::{Guard, GuardError, Start, Watch};

/// How long it may take from the last release until the guard has agreed.
const END_MAX: Duration = Duration::from_secs(5);

/// A guard that runs. Dropping it has the hooks released by `hestner-agent thaw`.
#[derive(Debug)]
pub struct HookGuard(Guard);

impl HookGuard {
    /// Has one, before the first `pre_freeze`, which is the first step and may take `limit`.
    ///
    /// # Errors
    /// When there is no guard: then nothing may be held.
    pub async fn arm(run_uid: &str, folder: &Path, start: &Start, limit: Duration) -> Result<Self, PointError> {
        let journal = folder.join(HOOK_JOURNAL);
        let watch = Watch { run_uid: run_uid.to_owned(), journal, mounts: Vec::new(), window: limit };
        let mut guard = Guard::arm(start, watch).await?;
        guard.begin().await?;
        Ok(Self(guard))
    }

    /// Another step begins, which may take `limit`.
    ///
    /// # Errors
    /// When the one before took longer than its own, so that the hooks are being released.
    pub fn step(&self, limit: Duration) -> Result<(), GuardError> {
        self.0.renew(limit)
    }

    /// Completes when a step took too long, or the guard is gone. Cancel-safe, as [`Guard::struck`] is.
    pub fn struck(&self) -> impl Future<Output = GuardError> + use<> {
        self.0.struck()
    }

    /// Whether it has struck, or is gone.
    pub fn has_struck(&self) -> bool {
        self.0.has_struck()
    }

    /// Its process, where it is a child of ours: to be spared when descendants are killed.
    pub fn pid(&self) -> Option<Pid> {
        self.0.pid()
    }

    /// Every hook is released.
    ///
    /// # Errors
    /// When the guard does not confirm that every step ended in its time.
    pub async fn end(self) -> Result<(), GuardError> {
        self.0.renew(END_MAX)?;
        self.0.thaw().await.map(drop)
    }
}
