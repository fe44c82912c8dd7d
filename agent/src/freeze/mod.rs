//! The point in time: what kind a source can have, how it is taken, and how it is undone again.
//!
//! ```text
//! hold containers ─▶ freeze filesystems ─▶ take the point ─▶ thaw ─▶ let containers go ─▶ open ─▶ remove
//!   containers        (the guard does)      btrfs │ lvm │ zfs │ reflink │ the operator's own
//! ```
//!
//! [`PointPlan`] is data: what will be held, frozen, taken and made. What is made or held stands in its
//! [`Intent`], which the caller writes down *before* anything is done, so that a restart undoes it by that
//! note and never by guessing names. Whatever is held or frozen has a guard, whose word a point needs to
//! count. Snapshots of btrfs, LVM and ZFS are atomic by themselves, and nothing is frozen around them; a
//! btrfs snapshot and a reflink copy would hang if it were.
//!
//! [`Frozen`] means that the service is quiesced; only a value of it can take the point, and only its thaw
//! gives a [`Point`].

mod btrfs;
mod containers;
mod error;
mod hook_guard;
mod lvm;
mod own;
mod plan;
mod protected;
mod reflink;
mod view;
mod zfs;

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_proto::words::Consistency;
use nix::unistd::Pid;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use toml_example::TomlExample;

pub use btrfs::Snapshot;
pub use error::PointError;
pub use hook_guard::HookGuard;
pub use plan::{Bind, Intent, Made, PointPlan, programs, why_not_frozen};
pub use protected::Protected;

use crate::guard::client::{FROZEN_MAX, Guard, Start, Watch};
use crate::hook::Waiting;
use crate::platform::{failpoint, files};
use crate::policy::Hold;
use containers::Held;
use own::Call;
use plan::Taker;

/// Settings of the point in time.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// How long a filesystem may be frozen and a container paused; then they are thawed and the run fails.
    /// 30 seconds at most.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "7s")]
    pub window: Duration,
    /// The btrfs program.
    #[toml_example(default = "/usr/bin/btrfs")]
    pub btrfs: PathBuf,
    /// LVM's programs.
    #[toml_example(default = "/usr/sbin/lvs")]
    pub lvs: PathBuf,
    /// Makes LVM snapshots.
    #[toml_example(default = "/usr/sbin/lvcreate")]
    pub lvcreate: PathBuf,
    /// Removes them.
    #[toml_example(default = "/usr/sbin/lvremove")]
    pub lvremove: PathBuf,
    /// Continues a volume that a killed `lvcreate` has left suspended.
    #[toml_example(default = "/usr/sbin/dmsetup")]
    pub dmsetup: PathBuf,
    /// The ZFS program.
    #[toml_example(default = "/usr/sbin/zfs")]
    pub zfs: PathBuf,
    /// Mounts snapshots of LVM and ZFS, read-only.
    #[toml_example(default = "/usr/bin/mount")]
    pub mount: PathBuf,
    /// Unmounts them.
    #[toml_example(default = "/usr/bin/umount")]
    pub umount: PathBuf,
    /// GNU cp, for copies that share blocks.
    #[toml_example(default = "/usr/bin/cp")]
    pub cp: PathBuf,
    /// Docker's socket: the one that the inventory has.
    #[serde(skip)]
    pub docker_socket: PathBuf,
    /// Where snapshots are mounted to be read: a folder of the agent's state.
    #[serde(skip)]
    pub points: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(7),
            btrfs: "/usr/bin/btrfs".into(),
            lvs: "/usr/sbin/lvs".into(),
            lvcreate: "/usr/sbin/lvcreate".into(),
            lvremove: "/usr/sbin/lvremove".into(),
            dmsetup: "/usr/sbin/dmsetup".into(),
            zfs: "/usr/sbin/zfs".into(),
            mount: "/usr/bin/mount".into(),
            umount: "/usr/bin/umount".into(),
            cp: "/usr/bin/cp".into(),
            docker_socket: PathBuf::new(),
            points: PathBuf::new(),
        }
    }
}

impl Settings {
    /// Every mistake, each as one sentence.
    pub fn mistakes(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.window.is_zero() || self.window > FROZEN_MAX {
            found.push(format!(
                "`freeze.window` must be longer than 0 and at most {} s: nothing may be frozen for longer",
                FROZEN_MAX.as_secs()
            ));
        }
        for (key, path) in [
            ("btrfs", &self.btrfs),
            ("lvs", &self.lvs),
            ("lvcreate", &self.lvcreate),
            ("lvremove", &self.lvremove),
            ("dmsetup", &self.dmsetup),
            ("zfs", &self.zfs),
            ("mount", &self.mount),
            ("umount", &self.umount),
            ("cp", &self.cp),
        ] {
            if !path.is_absolute() {
                found.push(format!("`freeze.{key}` must be an absolute path, not `{}`", path.display()));
            }
        }
        found
    }
}

/// What holding and freezing need from the run.
#[derive(Clone, Copy)]
pub struct Arming<'a> {
    /// The run.
    pub run_uid: &'a str,
    /// The run's folder: the guards' journals and the claims of containers lie in it.
    pub folder: &'a Path,
    /// What every process of the run inherits, so that it is known to live. Guards do not.
    pub alive: &'a (dyn AsFd + Sync),
    /// How a guard is had.
    pub start: &'a Start,
    /// The guard of what hooks hold, if they do.
    pub hook_guard: Option<&'a HookGuard>,
    /// Calls it off.
    pub stop: &'a CancellationToken,
}

/// The journals of a run's guards, whether they exist or not: of the one for frozen filesystems, of the one for
/// held containers, and of the one for what hooks hold. Recovery reads each of them.
pub fn journals(folder: &Path) -> Vec<PathBuf> {
    [FREEZE_JOURNAL, HOLD_JOURNAL, HOOK_JOURNAL].map(|name| folder.join(name)).to_vec()
}

const FREEZE_JOURNAL: &str = "freeze.journal";
const HOLD_JOURNAL: &str = "hold.journal";
const HOOK_JOURNAL: &str = "hook.journal";

/// A service that is quiesced: its `pre_freeze` hooks have all ended well, its containers are held, its
/// filesystems frozen, as far as the plan says so.
///
/// There may be two guards of its own: containers that are stopped may be down for minutes, a filesystem must not be
/// frozen for longer than seconds.
#[derive(Debug)]
pub struct Frozen {
    plan: PointPlan,
    folder: PathBuf,
    alive: OwnedFd,
    held: Held,
    was_taken: bool,
    /// The guard of hooks, where it is a child of ours.
    hook_guard: Option<Pid>,
    /// Of the operator's command: its own start would cost more of the window than many a command.
    supervisor: Option<Waiting>,
    /// Watches the containers.
    hold_guard: Option<Guard>,
    /// Watches the filesystems.
    freeze_guard: Option<Guard>,
}

/// What was held and frozen without a break, and the point in it, if one was taken.
#[derive(Debug)]
pub struct Point {
    plan: PointPlan,
    alive: OwnedFd,
    held: Held,
    was_taken: bool,
    frozen: Option<Duration>,
}

/// Holds and freezes what the plan says. Called when the last `pre_freeze` has ended well, and nowhere
/// else. On an error everything is released again before it returns.
///
/// # Errors
/// When something cannot be held or frozen.
pub async fn freeze(plan: &PointPlan, arming: Arming<'_>) -> Result<Frozen, PointError> {
    let alive = arming.alive.as_fd().try_clone_to_owned().map_err(files::failed("keep open", arming.folder))?;
    let mut frozen = Frozen {
        plan: plan.clone(),
        folder: arming.folder.to_owned(),
        alive,
        held: Held::default(),
        was_taken: false,
        hook_guard: arming.hook_guard.and_then(HookGuard::pid),
        supervisor: None,
        hold_guard: None,
        freeze_guard: None,
    };
    match frozen.begin(arming).await {
        Ok(()) => Ok(frozen),
        Err(error) => {
            // Why it began to be released is what matters; what cannot be released is left in the notes.
            let _ = frozen.thaw().await;
            Err(error)
        }
    }
}

impl Frozen {
    async fn begin(&mut self, arming: Arming<'_>) -> Result<(), PointError> {
        let Arming { stop, hook_guard, .. } = arming;
        let step = |limit| hook_guard.map_or(Ok(()), |guard| guard.step(limit));
        step(self.plan.armed_within())?;
        tokio::select! {
            armed = self.arm(arming) => armed?,
            () = stop.cancelled() => return Err(PointError::Stopped { in_doubt: false }),
        }
        step(self.plan.held_within())?;
        if let Some(guard) = &mut self.hold_guard {
            let limit = self.plan.window();
            self.held = self.plan.containers.prepare(&self.folder, limit).await?;
            guard.begin().await?;
            if let Some(other) = self.freeze_guard.as_mut().filter(|_| self.plan.hold == Some(Hold::Pause)) {
                // One window for both: nobody stays paused because a filesystem may still be frozen.
                other.begin().await?;
            }
            tokio::select! {
                held = self.plan.containers.hold(&self.folder, limit, &mut self.held) => held?,
                _ = guard.struck() => return Err(PointError::HeldTooLong { limit, in_doubt: false }),
                () = stop.cancelled() => return Err(PointError::Stopped { in_doubt: false }),
            }
            self.check_ends()?;
            self.write_out(stop).await?;
        }
        if let Some(guard) = &mut self.freeze_guard {
            failpoint::at("armed");
            guard.freeze().await?;
        }
        Ok(())
    }

    /// Everything is ready before anything is held, so that writing out dirty pages and starting processes
    /// costs no downtime.
    async fn arm(&mut self, arming: Arming<'_>) -> Result<(), PointError> {
        let plan = &self.plan;
        if matches!(plan.taker, Taker::Own(_)) {
            self.supervisor = Some(Waiting::start(&[&self.alive])?);
        }
        let watch = |journal: &str, mounts: &[PathBuf], window| Watch {
            run_uid: arming.run_uid.to_owned(),
            journal: arming.folder.join(journal),
            mounts: mounts.to_vec(),
            window,
        };
        if !plan.mounts.is_empty() {
            let watch = watch(FREEZE_JOURNAL, &plan.mounts, plan.window);
            self.freeze_guard = Some(Guard::arm(arming.start, watch).await?);
        }
        if !plan.containers.running.is_empty() {
            let watch = watch(HOLD_JOURNAL, &[], plan.window());
            self.hold_guard = Some(Guard::arm(arming.start, watch).await?);
        }
        Ok(())
    }

    /// Once more what containers have written while they stopped: else FIFREEZE would do it, in the window.
    async fn write_out(&mut self, stop: &CancellationToken) -> Result<(), PointError> {
        let limit = self.plan.window();
        let (Some(guard), Some(Hold::Stop), false) =
            (&mut self.hold_guard, self.plan.hold, self.plan.mounts.is_empty())
        else {
            return Ok(());
        };
        let mounts = self.plan.mounts.clone();
        // Blocking, and nothing is frozen yet: whoever waits here keeps nobody from a thaw.
        let writing = tokio::task::spawn_blocking(move || {
            mounts.iter().try_for_each(|mount| {
                let folder = std::fs::File::open(mount).map_err(files::failed("open", mount))?;
                nix::unistd::syncfs(folder).map_err(|errno| files::failed("write out", mount)(errno.into()))
            })
        });
        tokio::select! {
            written = writing => Ok(written.unwrap_or(Ok(()))?),
            _ = guard.struck() => Err(PointError::HeldTooLong { limit, in_doubt: false }),
            () = stop.cancelled() => Err(PointError::Stopped { in_doubt: false }),
        }
    }

    /// A container that had to be killed has not closed its files.
    fn check_ends(&self) -> Result<(), PointError> {
        let reached = self.plan.reached(!self.held.killed.is_empty());
        match self.held.killed.first() {
            Some(name) if reached < self.plan.least => Err(PointError::Killed { name: name.clone(), reached }),
            _ => Ok(()),
        }
    }

    /// Takes the point. What hangs is ended when the window is over, or `stop` is cancelled. Afterwards
    /// [`Self::thaw`] is owed, also after an error.
    ///
    /// # Errors
    /// When it could not be taken; what was made before is removed by the caller's note of the plan.
    pub async fn take(&mut self, settings: &Settings, stop: &CancellationToken) -> Result<(), PointError> {
        let plan = self.plan.clone();
        let ended = CancellationToken::new();
        let spare = self.guards();
        let call = Call { stop: &ended, alive: None, spare: &spare };
        let taking = take(&plan, settings, self.supervisor.take(), call);
        tokio::pin!(taking);
        // The command of an operator is ended with all that it started; a program of ours is killed, and
        // the kernel may still be at what it was asked for.
        let is_supervised = matches!(plan.taker, Taker::Own(_));
        let error = tokio::select! {
            taken = &mut taking => {
                self.was_taken = taken.is_ok();
                return taken;
            }
            () = self.struck() => PointError::HeldTooLong { limit: plan.window(), in_doubt: !is_supervised },
            () = stop.cancelled() => PointError::Stopped { in_doubt: !is_supervised },
        };
        ended.cancel();
        // Nobody waits for a frozen filesystem until a command has ended; how it ends is only a consequence.
        let thawing = async {
            match self.freeze_guard.take() {
                Some(guard) => guard.thaw().await.map(drop),
                None => Ok(()),
            }
        };
        if is_supervised {
            let (_, thawed) = tokio::join!(taking, thawing);
            thawed?;
        } else {
            thawing.await?;
            // Before any hook is released; what cannot be done now is tried again with the removal.
            let _ = resume_volumes(&plan.intent()).await;
        }
        Err(error)
    }

    /// Guards that are children of ours: to be spared when descendants are killed.
    pub fn guards(&self) -> Vec<Pid> {
        let guards = [&self.hold_guard, &self.freeze_guard].into_iter().flatten().filter_map(Guard::pid);
        guards.chain(self.hook_guard).collect()
    }

    /// Completes when a guard or its deadline has ended the window: the point does not count any more.
    /// Never, when nothing is held or frozen. Cancel-safe, as [`Guard::struck`] is.
    pub async fn struck(&mut self) {
        tokio::select! {
            () = struck(&mut self.hold_guard) => {}
            () = struck(&mut self.freeze_guard) => {}
        }
    }

    /// Thaws, lets containers go, and says whether the point counts.
    ///
    /// # Errors
    /// When a guard has not confirmed that everything was held until now, or a container cannot be let go.
    /// Whatever can be released is.
    pub async fn thaw(self) -> Result<Point, PointError> {
        let thawed = match self.freeze_guard {
            Some(guard) => Some(guard.thaw().await),
            None => None,
        };
        let let_go = self.plan.containers.let_go(&self.folder, &self.held).await;
        // Its guard last: who died before could not have let them go.
        let held = match self.hold_guard {
            Some(guard) => Some(guard.thaw().await),
            None => None,
        };
        let (thawed, held) = (thawed.transpose()?, held.transpose()?);
        let_go?;
        let frozen = thawed.or(held).map(|verdict| verdict.frozen);
        Ok(Point { plan: self.plan, alive: self.alive, held: self.held, was_taken: self.was_taken, frozen })
    }
}

async fn struck(guard: &mut Option<Guard>) {
    match guard {
        Some(guard) => drop(guard.struck().await),
        None => std::future::pending().await,
    }
}

async fn take(
    plan: &PointPlan,
    settings: &Settings,
    supervisor: Option<Waiting>,
    call: Call<'_>,
) -> Result<(), PointError> {
    match &plan.taker {
        Taker::Live => {}
        Taker::Btrfs(snapshots) => btrfs::take(snapshots, settings).await?,
        Taker::Lvm(snapshots) => {
            for snapshot in snapshots {
                snapshot.take(settings).await?;
            }
        }
        Taker::Zfs(snapshots) => {
            for snapshot in snapshots {
                snapshot.take(settings).await?;
            }
        }
        Taker::Reflink(copies) => {
            for copy in copies {
                copy.take(settings, plan.downtime_max).await?;
            }
        }
        Taker::Own(commands) => {
            let waiting = supervisor.map_or_else(|| Waiting::start(&[]), Ok)?;
            commands.take(call, waiting, plan.window).await?;
        }
    }
    Ok(())
}

impl Point {
    /// How long filesystems were frozen, or containers held where none was, as the guard measured it.
    pub fn frozen(&self) -> Option<Duration> {
        self.frozen
    }

    /// What was reached: less than planned when a container had to be killed, and nothing when the point was
    /// not taken.
    pub fn consistency(&self) -> Consistency {
        if self.was_taken { self.plan.reached(!self.held.killed.is_empty()) } else { Consistency::None }
    }

    /// What people may want to know of how it was taken.
    pub fn remarks(&self) -> Vec<String> {
        let killed = |name: &String| format!("container {name} did not end within its stop timeout and was killed");
        self.held.remarks.iter().cloned().chain(self.held.killed.iter().map(killed)).collect()
    }

    /// Makes it readable: mounts a snapshot, runs the operator's `after_command`. Called after the service
    /// was released: nothing waits for it.
    ///
    /// # Errors
    /// When it cannot be read, or is no copy of the source.
    pub async fn open(&self, settings: &Settings, stop: &CancellationToken) -> Result<(), PointError> {
        match &self.plan.taker {
            Taker::Live | Taker::Btrfs(_) | Taker::Reflink(_) => {}
            Taker::Lvm(snapshots) => {
                for snapshot in snapshots {
                    snapshot.view.open(settings).await?;
                }
            }
            Taker::Zfs(snapshots) => {
                for snapshot in snapshots {
                    snapshot.view.open(settings).await?;
                }
            }
            Taker::Own(commands) => {
                commands.after(Call { stop, alive: Some(&self.alive), spare: &[] }).await?;
                own::check_readable(&self.plan.binds)?;
            }
        }
        Ok(())
    }

    /// Whether the point still holds what it held: an LVM snapshot that ran full does not.
    ///
    /// # Errors
    /// When it does not.
    pub async fn check(&self, settings: &Settings) -> Result<(), PointError> {
        let Taker::Lvm(snapshots) = &self.plan.taker else { return Ok(()) };
        for snapshot in snapshots {
            snapshot.check(settings).await?;
        }
        Ok(())
    }

    /// Removes what was made for it.
    ///
    /// # Errors
    /// When something cannot be removed; it stays in the caller's note and is tried again at the next start.
    pub async fn remove(self, settings: &Settings) -> Result<(), PointError> {
        remove_made(&self.plan.intent(), settings).await
    }
}

/// Removes what was made, by the note of it; what is not there is fine. All is tried.
///
/// # Errors
/// The first thing that is there and cannot be removed, or whose place is not there to look into.
pub async fn remove_made(intent: &Intent, settings: &Settings) -> Result<(), PointError> {
    let mut first = Ok(());
    for made in intent.made.iter().rev() {
        let removed = match made {
            Made::Btrfs(snapshot) => btrfs::remove(snapshot, settings).await,
            Made::Lvm(snapshot) => snapshot.remove(settings).await,
            Made::Zfs(snapshot) => snapshot.remove(settings).await,
            Made::Copies(place) => place.remove(),
            Made::Own(commands) => commands.remove().await,
        };
        first = first.and(removed);
    }
    first
}

/// Lets go what a run has held: volumes that a killed program has left suspended, and containers by the claims in
/// the run's folder; those that were not running before stay as they are. Idempotent, and right also after a
/// reboot.
///
/// # Errors
/// When something cannot be let go; all is tried.
pub async fn resume_held(folder: &Path, intent: &Intent) -> Result<(), PointError> {
    let resumed = resume_volumes(intent).await;
    resumed.and(intent.containers.recover(folder).await)
}

async fn resume_volumes(intent: &Intent) -> Result<(), PointError> {
    let mut first = Ok(());
    for made in &intent.made {
        if let Made::Lvm(snapshot) = made {
            first = first.and(snapshot.resume().await);
        }
    }
    first
}
