//! Releases what runs have left held, without their runners: `hestner-agent thaw`.
//!
//! For each run with something left to do, in this order: what its guard's journal says is frozen is thawed,
//! held containers are let go, and the hooks that are owed a release get it. Safe at any time and as often
//! as anybody likes. A run whose processes live is touched only where its guard has struck, or is gone, and
//! then only what nobody has claimed; a run that goes as it should is left alone.
//!
//! In: the ledger of a state folder and nothing else: neither an identity nor the services of the settings
//! are needed. It never removes what was made for a point and never writes a result: [`super::settle`] does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::hook::{self, Spec};
use super::ledger::{Ledger, Note, RunFolder};
use crate::freeze;
use crate::guard::recovery::{self, Left};
use crate::platform::chain;
use crate::platform::files::{FileError, Lock};

/// How long to wait for somebody else who releases the same run: hooks may take their time.
const OTHER_WAIT: Duration = Duration::from_secs(120);
/// How long a guard may take to notice that its run is dead. One that is stopped is thawed over when its
/// window is over, which for a frozen filesystem is after half a minute at the latest.
const GUARD_WAIT: Duration = Duration::from_secs(40);
/// How long a `pre_freeze` whose runner is gone, or whose time is over, may take to end with all that it started.
const HOOK_WAIT: Duration = Duration::from_secs(15);
/// How long a runner that may stand still in the middle of a release is waited for.
const STANDING_WAIT: Duration = Duration::from_secs(2);
const OTHER_PAUSE: Duration = Duration::from_millis(50);

/// What was done for one run, and what could not be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Thawed {
    /// The run.
    pub run_uid: String,
    /// Its service.
    pub service: String,
    /// What was done, as sentences.
    pub did: Vec<String>,
    /// What went wrong, as sentences.
    pub troubles: Vec<String>,
    /// Whether nothing of it is held or owed any more, as far as is known; always false of a run that goes
    /// as it should.
    pub is_free: bool,
    /// Whether its processes live.
    pub is_alive: bool,
    /// Whether a freeze of it has not come back from the kernel.
    #[serde(skip)]
    pub is_stuck: bool,
}

/// A run that still holds its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holding {
    /// The run.
    pub run_uid: String,
    /// Its service.
    pub service: String,
    /// Whether its processes live.
    pub is_alive: bool,
}

/// Releases what every run has left held. What cannot be released is in the troubles.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn thaw_all(state_dir: &Path) -> Result<Vec<Thawed>, FileError> {
    let ledger = Ledger::of(state_dir);
    let mut all = Vec::new();
    let mut found = Vec::new();
    // Filesystems of all runs first: nobody waits for another run's hooks.
    for uid in ledger.unsettled()? {
        let by_journal = ByJournal::thaw(ledger.run(&uid).path()).await;
        found.push((uid, by_journal));
    }
    for (uid, by_journal) in found {
        let folder = ledger.run(&uid);
        // The last processes of a runner that is gone end by themselves; then nothing of it is anybody else's.
        let patience = if by_journal.is_runner_gone { HOOK_WAIT } else { Duration::ZERO };
        let released = match lock_within(patience, || folder.lock_alive()).await {
            Ok(alive) => release(&uid, &folder, alive.as_ref(), by_journal).await,
            Err(error) => Err(error),
        };
        // One run whose notes cannot be read must not keep the others held.
        all.push(released.unwrap_or_else(|error| Thawed {
            run_uid: uid,
            troubles: vec![chain(&error)],
            ..Thawed::default()
        }));
    }
    Ok(all)
}

/// Runs that hold their service now: between the first `pre_freeze` and the last release.
///
/// # Errors
/// When the ledger cannot be read.
pub fn holding(state_dir: &Path) -> Result<Vec<Holding>, FileError> {
    let ledger = Ledger::of(state_dir);
    let holding = |uid: String| {
        let folder = ledger.run(&uid);
        let service = folder.note().ok().flatten().map(|note| note.service).unwrap_or_default();
        folder.holds().then(|| Holding { service, is_alive: folder.is_alive(), run_uid: uid })
    };
    Ok(ledger.unsettled()?.into_iter().filter_map(holding).collect())
}

/// Releases what one dead run has left held. `alive`: its lock, which the hooks inherit.
///
/// # Errors
/// When its notes cannot be read or its lock not be taken.
pub(super) async fn release_dead(run_uid: &str, folder: &RunFolder, alive: &Lock) -> Result<Thawed, FileError> {
    let by_journal = ByJournal::thaw(folder.path()).await;
    release(run_uid, folder, Some(alive), by_journal).await
}

async fn release(
    run_uid: &str,
    folder: &RunFolder,
    alive: Option<&Lock>,
    mut by_journal: ByJournal,
) -> Result<Thawed, FileError> {
    let mut thawed = Thawed { run_uid: run_uid.to_owned(), is_alive: alive.is_none(), ..Thawed::default() };
    // Its guard has not noticed yet that it is dead, or is stopped.
    let give_up = Instant::now() + GUARD_WAIT;
    while alive.is_some() && by_journal.is_watched && Instant::now() < give_up {
        tokio::time::sleep(OTHER_PAUSE).await;
        by_journal.again(folder.path()).await;
    }
    by_journal.tell(&mut thawed);
    thawed.is_stuck = by_journal.is_stuck;
    let Some(note) = folder.note()? else {
        // It never came so far as to hold anything.
        thawed.is_free = alive.is_some();
        return Ok(thawed);
    };
    thawed.service.clone_from(&note.service);
    // A hook cannot release what stays frozen, and is not tried in vain: it has one call only. A filesystem
    // that is not there any more keeps nobody from being released.
    if !by_journal.is_stuck && (alive.is_some() || by_journal.struck) {
        // A runner that stands still in a release holds the lock, and must not be waited for: what it has not claimed
        // is released without it.
        let patience = if alive.is_some() { OTHER_WAIT } else { STANDING_WAIT };
        let lock = lock_within(patience, || folder.lock_thawing()).await?;
        if lock.is_some() || alive.is_none() {
            let releasing = Releasing { run_uid, folder, note: &note, alive, lock: lock.as_ref() };
            releasing.run(&mut thawed).await;
            thawed.is_free &= by_journal.troubles.is_empty();
        } else {
            thawed.troubles.push("somebody else has been releasing it for a long time".to_owned());
        }
    }
    let remarks: Vec<String> = thawed.did.iter().chain(&thawed.troubles).cloned().collect();
    if !remarks.is_empty() {
        // What was done counts, whether it can be told later or not.
        if let Err(error) = folder.add_remarks(&remarks) {
            tracing::warn!(event = "remarks_not_kept", run_id = run_uid, error = %error);
        }
    }
    Ok(thawed)
}

struct Releasing<'a> {
    run_uid: &'a str,
    folder: &'a RunFolder,
    note: &'a Note,
    alive: Option<&'a Lock>,
    lock: Option<&'a Lock>,
}

impl Releasing<'_> {
    async fn run(&self, thawed: &mut Thawed) {
        let mut is_free = self.let_containers_go(thawed).await;
        for (i, hook) in self.note.hooks.iter().enumerate().rev() {
            if self.is_ours(i, thawed) {
                let lock = self.wait_for_its_pre_hook(i, thawed).await;
                let spec = hook.spec(&hook.release, self.run_uid, &self.note.service);
                is_free &= self.release_hook((i, &hook.name), &spec, lock.is_some(), thawed).await;
            }
        }
        // Of a run that lives nobody else can say so: it may be about to claim a hook itself.
        thawed.is_free = is_free && self.alive.is_some();
    }

    /// False: something may still be held.
    async fn let_containers_go(&self, thawed: &mut Thawed) -> bool {
        if !self.folder.may_hold() {
            return true;
        }
        if let Err(error) = freeze::resume_held(self.folder.path(), &self.note.intent).await {
            thawed.troubles.push(chain(&error));
            return false;
        }
        // A runner that lives may hold one more before it notices; it says so itself when all are let go.
        match self.alive {
            Some(_) => self.folder.mark_let_go().is_ok(),
            None => true,
        }
    }

    /// Whether the release of a hook is ours to run.
    fn is_ours(&self, hook: usize, thawed: &mut Thawed) -> bool {
        if !self.folder.owes_release(hook) {
            return false;
        }
        if self.alive.is_some() {
            // Claimed before or not: whoever claimed it died before its end, and at least once is the
            // promise then.
            return true;
        }
        self.folder.claim_release(hook).unwrap_or_else(|error| {
            thawed.troubles.push(chain(&error));
            false
        })
    }

    /// A `pre_freeze` that still runs would make its release pointless. One that does not end must not keep the
    /// service for ever.
    ///
    /// The lock is kept until it is released, so that a runner that goes on meanwhile does not begin it. `None`: it has
    /// not ended.
    async fn wait_for_its_pre_hook(&self, hook: usize, thawed: &mut Thawed) -> Option<Lock> {
        let lock = lock_within(HOOK_WAIT, || self.folder.lock_begun(hook)).await.ok().flatten();
        if lock.is_none() {
            let name = &self.note.hooks[hook].name;
            thawed
                .troubles
                .push(format!("hook `{name}` has not ended, is released all the same, and will be once more"));
        }
        lock
    }

    /// False: it is owed as before. `has_ended`: its `pre_freeze` has, so that the release is its last word.
    async fn release_hook(&self, (i, name): (usize, &str), spec: &Spec, has_ended: bool, thawed: &mut Thawed) -> bool {
        if !spec.argv.is_empty() {
            let inherit: Vec<&dyn std::os::fd::AsFd> =
                [self.lock, self.alive].into_iter().flatten().map(|lock| &**lock as &dyn std::os::fd::AsFd).collect();
            let trouble = match hook::run(spec, &CancellationToken::new(), &inherit, &[]).await {
                Ok(ended) if ended.is_success() => None,
                Ok(ended) => Some((ended.was_started(), ended.description())),
                Err(error) => Some((false, chain(&error))),
            };
            match trouble {
                None => thawed.did.push(format!("ran the release of hook `{name}`")),
                Some((ran, what)) => {
                    thawed.troubles.push(format!("release of hook `{name}`: {what}"));
                    if !ran {
                        return false;
                    }
                }
            }
        }
        // A full disk must not keep the other hooks from being released.
        has_ended && self.folder.claim_release(i).and_then(|_| self.folder.release_ended(i)).is_ok()
    }
}

/// What the journals of a run's guards led to.
#[derive(Debug, Default)]
struct ByJournal {
    is_watched: bool,
    is_stuck: bool,
    struck: bool,
    is_runner_gone: bool,
    thawed: Vec<PathBuf>,
    troubles: Vec<String>,
}

impl ByJournal {
    async fn thaw(folder: &Path) -> Self {
        let mut all = Self::default();
        all.again(folder).await;
        all
    }

    async fn again(&mut self, folder: &Path) {
        (self.is_watched, self.is_stuck, self.troubles) = (false, false, Vec::new());
        for journal in freeze::journals(folder).into_iter().filter(|journal| journal.exists()) {
            match thaw_left(journal).await {
                Ok(left) => {
                    self.is_watched |= left.is_watched;
                    self.is_stuck |= !left.stuck.is_empty();
                    self.struck |= left.struck;
                    self.is_runner_gone |= left.is_runner_gone;
                    self.thawed.extend(left.thawed);
                    self.troubles.extend(left.stuck.iter().map(|mount| {
                        format!(
                            "freezing {} is stuck inside the kernel; it is thawed as soon as it lands",
                            mount.display()
                        )
                    }));
                }
                Err(trouble) => self.troubles.push(trouble),
            }
        }
    }

    fn tell(&self, thawed: &mut Thawed) {
        thawed.did.extend(self.thawed.iter().map(|mount| format!("thawed {}", mount.display())));
        thawed.troubles.extend(self.troubles.iter().cloned());
    }
}

/// FITHAW blocks, and may block for long behind a freeze that is under way.
async fn thaw_left(journal: PathBuf) -> Result<Left, String> {
    match tokio::task::spawn_blocking(move || recovery::thaw_left(&journal)).await {
        Ok(Ok(left)) => Ok(left),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err("thawing broke off".to_owned()),
    }
}

/// `None`: somebody else releases this run and does not come to an end.
pub(super) async fn lock_thawing(folder: &RunFolder) -> Result<Option<Lock>, FileError> {
    lock_within(OTHER_WAIT, || folder.lock_thawing()).await
}

/// `None`: somebody held it for all that time.
async fn lock_within(
    time: Duration,
    try_lock: impl Fn() -> Result<Option<Lock>, FileError>,
) -> Result<Option<Lock>, FileError> {
    let give_up = Instant::now() + time;
    loop {
        let lock = try_lock()?;
        if lock.is_some() || Instant::now() >= give_up {
            return Ok(lock);
        }
        tokio::time::sleep(OTHER_PAUSE).await;
    }
}
