//! The runner's own notes of each run: what it is about to make, which hooks it began, how it ended.
//!
//! One folder a run, `STATE/runs/<run id>`: `plan.json` (written and synced before anything is done),
//! `begun-<n>` and `released-<n>` (hook claims, made with `O_EXCL`), `release-ended-<n>`, `held` (from here
//! on containers may be held and filesystems frozen) and `let-go` (nothing is any more), `freeze.journal`,
//! `hold.journal` and `hook.journal` (the guards' own), `result.json` (the end of the run; until it is there the run has not succeeded),
//! `remarks.json` (what was done for the run without its runner), `expired` (retention removed the
//! artifact), `settled` (nothing is left to do). Three locks: `alive` is held
//! for as long as any process of the run lives (the runner, its hooks, its worker and the archiver inherit
//! the open file), `thawing` by whoever releases what the run has left held, `begun-N` by the supervisor of a
//! `pre_freeze` while it runs.
//!
//! Recovery reads these notes and nothing else; names are never guessed.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::hook::Spec;
use super::messages::Finished;
use crate::freeze::Intent;
use crate::platform::files::{self, FileError, Lock};
use crate::policy::HookSettings;
use crate::repository::Location;

/// A note or a result is some kilobytes; hooks with long argument lists make it longer.
const NOTE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Folders of runs that are settled and hold no artifact any more are kept up to this number.
const FOLDERS_KEPT: usize = 500;

/// Sentences that are kept of what was done for a run without its runner.
const REMARKS_MAX: usize = 50;

/// What the folder of a run is called until it is locked.
const UNBORN: &str = ".new-";

/// Whether a text is a run's id in its one spelling (RFC 9562, lower case with hyphens). Ids become names of folders,
/// snapshots and tags: one that can be spelled in several ways would be several runs.
pub fn is_run_id(text: &str) -> bool {
    uuid::Uuid::parse_str(text).is_ok_and(|id| id.to_string() == text)
}

/// What a run is about to make and to call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Note {
    /// The service.
    pub service: String,
    /// The repository that may get a snapshot.
    pub location: Location,
    /// What will be held, frozen and made for the point. Missing in notes that are older than this field.
    #[serde(default)]
    pub intent: Intent,
    /// Hooks, in order.
    pub hooks: Vec<HookNote>,
}

/// What recovery has to know of a hook.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HookNote {
    /// Its name.
    pub name: String,
    /// What releases it when the run broke off: `freeze_failed`, or `post_thaw`.
    pub release: Vec<String>,
    /// The user to run it as.
    pub user: String,
    /// How long each of its commands may take.
    pub timeout_ms: u64,
    /// How much of its output is kept.
    pub output_bytes_max: usize,
}

impl HookNote {
    /// What a supervisor runs for a command of this hook.
    pub fn spec(&self, argv: &[String], run_uid: &str, service: &str) -> Spec {
        let environment = [("RUN_UID", run_uid), ("SERVICE", service), ("HOOK", &self.name)];
        Spec {
            argv: argv.to_vec(),
            user: self.user.clone(),
            timeout_ms: self.timeout_ms,
            output_bytes_max: self.output_bytes_max,
            environment: environment.map(|(name, value)| (format!("HESTNER_{name}"), value.to_owned())).to_vec(),
            stdout_fd: None,
        }
    }
}

impl From<&HookSettings> for HookNote {
    fn from(hook: &HookSettings) -> Self {
        let release = if hook.freeze_failed.is_empty() { &hook.post_thaw } else { &hook.freeze_failed };
        Self {
            name: hook.name.clone(),
            release: release.clone(),
            user: hook.user.clone(),
            timeout_ms: u64::try_from(hook.timeout.as_millis()).unwrap_or(u64::MAX),
            output_bytes_max: hook.output_bytes_max,
        }
    }
}

/// The folder of all runs.
#[derive(Clone, Debug)]
pub struct Ledger(PathBuf);

/// The notes of one run.
#[derive(Clone, Debug)]
pub struct RunFolder(PathBuf);

impl Ledger {
    /// The ledger of an agent whose state lies in `state_dir`.
    pub fn of(state_dir: &Path) -> Self {
        Self(state_dir.join("runs"))
    }

    /// The notes of a run, whether they exist or not.
    pub fn run(&self, run_uid: &str) -> RunFolder {
        RunFolder(self.0.join(run_uid))
    }

    /// Begins the notes of a run, with the lock that says that it lives. `None`: there are some already.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn begin(&self, run_uid: &str) -> Result<Option<(RunFolder, Lock)>, FileError> {
        files::private_folder(&self.0)?;
        let folder = self.run(run_uid);
        if folder.0.exists() {
            return Ok(None);
        }
        // Under a name that recovery passes over until the lock is held: what it finds unlocked is dead.
        let unborn = RunFolder(self.0.join(format!("{UNBORN}{run_uid}")));
        files::remove(&unborn.0)?;
        files::private_folder(&unborn.0)?;
        let lock = unborn.lock_alive()?;
        // Made while there is room: on a full disk it could not be, and nobody would dare to release.
        drop(unborn.lock_thawing()?);
        files::rename(&unborn.0, &folder.0)?;
        Ok(lock.map(|lock| (folder, lock)))
    }

    /// Takes the lock of a service. `None`: another run of it goes on.
    ///
    /// # Errors
    /// When the lock file cannot be made.
    pub fn lock_service(&self, service: &str) -> Result<Option<Lock>, FileError> {
        let folder = self.0.join(".services");
        files::private_folder(&folder)?;
        files::try_lock(&folder.join(service))
    }

    /// Runs with something left to do.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn unsettled(&self) -> Result<Vec<String>, FileError> {
        Ok(self.run_uids()?.into_iter().filter(|uid| !self.run(uid).is_settled()).collect())
    }

    /// Every run that has notes, oldest first (a UUIDv7 begins with its time).
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn run_uids(&self) -> Result<Vec<String>, FileError> {
        let entries = match std::fs::read_dir(&self.0) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(files::failed("list", &self.0))?,
        };
        let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
        let mut uids: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
        uids.sort();
        Ok(uids)
    }

    /// Removes the notes of old runs that hold no artifact: all but the newest `FOLDERS_KEPT`.
    ///
    /// # Errors
    /// When a folder cannot be listed or removed.
    pub fn tidy(&self) -> Result<(), FileError> {
        let uids = self.run_uids()?;
        let surplus = uids.len().saturating_sub(FOLDERS_KEPT);
        for uid in &uids[..surplus] {
            let run = self.run(uid);
            if run.is_settled() && !run.offers_artifact() {
                files::remove(&run.0)?;
            }
        }
        Ok(())
    }
}

impl RunFolder {
    /// Takes the lock that says that the run lives. `None`: a process of it still does.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn lock_alive(&self) -> Result<Option<Lock>, FileError> {
        files::try_lock(&self.0.join("alive"))
    }

    /// Takes the lock of whoever releases what the run left held. `None`: somebody does.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn lock_thawing(&self) -> Result<Option<Lock>, FileError> {
        files::try_lock(&self.0.join("thawing"))
    }

    /// Whether a process of the run lives.
    pub fn is_alive(&self) -> bool {
        self.0.exists() && !matches!(self.lock_alive(), Ok(Some(_)))
    }

    /// Writes down what the run is about to make.
    ///
    /// # Errors
    /// When the disk has no room; then nothing may be begun.
    pub fn write_note(&self, note: &Note) -> Result<(), FileError> {
        files::write(&self.0.join("plan.json"), &serde_json::to_vec(note).unwrap_or_default(), 0o600)
    }

    /// What the run was about to make; `None` if it never came so far.
    ///
    /// # Errors
    /// When the note is there and cannot be read.
    pub fn note(&self) -> Result<Option<Note>, FileError> {
        self.read("plan.json")
    }

    /// The folder itself; the guard keeps its record of what it froze in it.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Adds to what is told of the run when it is settled: what was done for it without its runner.
    ///
    /// # Errors
    /// When the disk has no room.
    pub fn add_remarks(&self, remarks: &[String]) -> Result<(), FileError> {
        let mut all = self.remarks();
        let known = all.len();
        for remark in remarks {
            // What fails at every start is told once.
            if all.len() < REMARKS_MAX && !all.contains(remark) {
                all.push(remark.clone());
            }
        }
        if all.len() == known {
            return Ok(());
        }
        files::write(&self.0.join("remarks.json"), &serde_json::to_vec(&all).unwrap_or_default(), 0o600)
    }

    /// What was done for the run without its runner, as sentences. One that cannot be read tells nothing.
    pub fn remarks(&self) -> Vec<String> {
        self.read("remarks.json").ok().flatten().unwrap_or_default()
    }

    /// Writes down that containers may be held and filesystems frozen from here on. False: it says so.
    ///
    /// # Errors
    /// When the disk has no room; then nothing may be held.
    pub fn mark_held(&self) -> Result<bool, FileError> {
        files::create_new(&self.0.join("held"), b"")
    }

    /// Writes down that nothing is held or frozen any more.
    ///
    /// # Errors
    /// When the disk has no room; whoever settles then looks once more.
    pub fn mark_let_go(&self) -> Result<bool, FileError> {
        files::create_new(&self.0.join("let-go"), b"")
    }

    /// Whether something may be held or frozen.
    pub fn may_hold(&self) -> bool {
        self.0.join("held").exists() && !self.0.join("let-go").exists()
    }

    /// Claims the beginning of a hook. False: it was claimed before.
    ///
    /// # Errors
    /// When the disk has no room; then the hook must not be begun.
    pub fn claim_begin(&self, hook: usize) -> Result<bool, FileError> {
        files::create_new(&self.0.join(format!("begun-{hook}")), b"")
    }

    /// Takes the lock of a hook's `pre_freeze`, which its supervisor inherits and nobody else keeps. `None`: it has not
    /// come to its end.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn lock_begun(&self, hook: usize) -> Result<Option<Lock>, FileError> {
        files::try_lock(&self.0.join(format!("begun-{hook}")))
    }

    /// Whether somebody has claimed the release of a hook.
    pub fn was_released(&self, hook: usize) -> bool {
        self.0.join(format!("released-{hook}")).exists()
    }

    /// Whether a hook was begun.
    pub fn was_begun(&self, hook: usize) -> bool {
        self.0.join(format!("begun-{hook}")).exists()
    }

    /// Claims the release of a hook. False: it was claimed before.
    ///
    /// # Errors
    /// When the disk has no room.
    pub fn claim_release(&self, hook: usize) -> Result<bool, FileError> {
        files::create_new(&self.0.join(format!("released-{hook}")), b"")
    }

    /// Writes down that a release has run to its end.
    ///
    /// # Errors
    /// When the disk has no room; recovery then runs the release once more.
    pub fn release_ended(&self, hook: usize) -> Result<bool, FileError> {
        files::create_new(&self.0.join(format!("release-ended-{hook}")), b"")
    }

    /// Whether a release is owed: it was never claimed, or whoever claimed it died before its end.
    pub fn owes_release(&self, hook: usize) -> bool {
        self.was_begun(hook) && !self.0.join(format!("release-ended-{hook}")).exists()
    }

    /// Whether the run is between its first `pre_freeze` and its last release: something is or may be held.
    pub fn holds(&self) -> bool {
        let begun = |i: &usize| self.was_begun(*i);
        self.may_hold() || (0..).take_while(begun).any(|i| self.owes_release(i))
    }

    /// Writes the run's end. From here on it counts.
    ///
    /// # Errors
    /// When the disk has no room.
    pub fn write_result(&self, finished: &Finished) -> Result<(), FileError> {
        files::write(&self.0.join("result.json"), &serde_json::to_vec_pretty(finished).unwrap_or_default(), 0o600)
    }

    /// The run's end, if it has come.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn result(&self) -> Result<Option<Finished>, FileError> {
        self.read("result.json")
    }

    /// Writes down that nothing is left to do.
    ///
    /// # Errors
    /// When the disk has no room; it is then settled once more at the next start.
    pub fn settle(&self) -> Result<(), FileError> {
        files::create_new(&self.0.join("settled"), b"").map(drop)
    }

    /// Writes down that retention removed the artifact.
    ///
    /// # Errors
    /// When the disk has no room; the artifact is then offered, and found to be gone.
    pub fn mark_expired(&self) -> Result<(), FileError> {
        files::create_new(&self.0.join("expired"), b"").map(drop)
    }

    /// Whether retention removed the artifact.
    pub fn is_expired(&self) -> bool {
        self.0.join("expired").exists()
    }

    /// Whether the run ended as success and its artifact was not removed. A result that cannot be read
    /// offers nothing.
    pub fn offers_artifact(&self) -> bool {
        let result = self.result().ok().flatten();
        result.is_some_and(|finished| finished.record.snapshot_id().is_some()) && !self.is_expired()
    }

    fn is_settled(&self) -> bool {
        self.0.join("settled").exists()
    }

    fn read<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Result<Option<T>, FileError> {
        let path = self.0.join(name);
        let bytes = match files::read(&path, NOTE_BYTES_MAX) {
            Err(error) if error.is_missing() => return Ok(None),
            other => other?,
        };
        let wrong = |error: serde_json::Error| files::failed("understand", &path)(error.into());
        serde_json::from_slice(&bytes).map(Some).map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_id_has_one_spelling() {
        assert!(is_run_id("0198c0de-0000-7000-8000-00000000000a"));
        for other in
            ["", "a", "/etc/passwd", "../x", "0198C0DE-0000-7000-8000-00000000000A", "0198c0de00007000800000000000000a"]
        {
            assert!(!is_run_id(other), "{other}");
        }
    }

    #[test]
    fn release_is_owed_until_it_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let (run, _alive) = Ledger::of(folder.path()).begin("a").unwrap().unwrap();
        assert!(!run.owes_release(0));
        assert!(run.claim_begin(0).unwrap());
        assert!(run.owes_release(0));
        assert!(run.claim_release(0).unwrap());
        assert!(!run.claim_release(0).unwrap());
        assert!(run.owes_release(0), "its runner may have died in the middle");
        run.release_ended(0).unwrap();
        assert!(!run.owes_release(0));
    }

    #[test]
    fn run_begins_once_and_stays_unsettled_until_it_says_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::of(folder.path());
        let (run, alive) = ledger.begin("a").unwrap().unwrap();
        assert!(run.is_alive());
        drop(alive);
        assert!(!run.is_alive());
        assert!(ledger.begin("a").unwrap().is_none());
        assert_eq!(ledger.unsettled().unwrap(), ["a"]);
        run.settle().unwrap();
        assert!(ledger.unsettled().unwrap().is_empty());
    }

    #[test]
    fn run_is_released_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (run, _alive) = Ledger::of(folder.path()).begin("a").unwrap().unwrap();
        let held = run.lock_thawing().unwrap();
        assert!(held.is_some() && run.lock_thawing().unwrap().is_none());
        drop(held);
        assert!(run.lock_thawing().unwrap().is_some());
    }

    #[test]
    fn run_holds_its_service_from_the_first_hook_to_the_last_release_and_while_it_is_frozen() {
        let folder = tempfile::tempdir().unwrap();
        let (run, _alive) = Ledger::of(folder.path()).begin("a").unwrap().unwrap();
        assert!(!run.holds());
        run.claim_begin(0).unwrap();
        run.claim_begin(1).unwrap();
        run.mark_held().unwrap();
        run.claim_release(1).unwrap();
        run.release_ended(1).unwrap();
        run.claim_release(0).unwrap();
        assert!(run.holds(), "a release goes on, and something is frozen");
        run.release_ended(0).unwrap();
        assert!(run.holds(), "something is frozen");
        run.mark_let_go().unwrap();
        assert!(!run.holds());
    }

    #[test]
    fn service_is_locked_by_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::of(folder.path());
        let held = ledger.lock_service("docs").unwrap();
        assert!(held.is_some());
        assert!(ledger.lock_service("docs").unwrap().is_none());
        assert!(ledger.lock_service("other").unwrap().is_some());
    }
}
