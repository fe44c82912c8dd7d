//! Everything a guard makes before it is armed, so that nothing has to be made in the window.
//!
//! In: the runner's order and the descriptors that came with it. Out: [`Ready`], or why not. Nothing is
//! frozen here.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use caps::Capability;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};

use super::client::{FROZEN_MAX, HELD_MAX};
use super::filesystem::{Filesystem, Reports, reports};
use super::journal::{Header, Journal};
use super::messages::{Arm, Fault, MOUNTS_MAX, Mount};
use super::mounted::{Mounted, device_of};
use crate::platform::fsfreeze::monotonic;
use crate::platform::{capabilities, chain, trust};

/// How long a lock that recovery holds for a moment may be waited for.
const LOCK_MAX: Duration = Duration::from_secs(1);

/// What a guard has when it begins to wait.
pub(super) struct Ready {
    /// How long the window may be.
    pub window: Duration,
    /// Becomes readable when the runner has died.
    pub runner: OwnedFd,
    /// The record, on the disk and locked.
    pub journal: Journal,
    /// Each with its freezer and its thread.
    pub filesystems: Vec<Filesystem>,
    /// What the threads say.
    pub reports: Reports,
}

impl Ready {
    /// Makes it. `is_unit`: it starts nothing itself that needs what it may do.
    ///
    /// # Errors
    /// What is refused or cannot be had; whatever was started ends by itself.
    pub(super) fn make(order: Arm, fds: Vec<OwnedFd>, is_unit: bool) -> Result<Self, Fault> {
        let window = checked_window(&order)?;
        let mut fds = fds.into_iter();
        let runner = fds.next().ok_or_else(|| Fault::failed("watch the runner", "its descriptor is missing"))?;
        let folders: Vec<OwnedFd> = fds.collect();
        if folders.len() != order.mounts.len() {
            return Err(Fault::failed("open the filesystems", "their descriptors are missing"));
        }
        let mut mounts: Vec<Mounted> = Vec::new();
        for (mount, folder) in order.mounts.iter().zip(&folders) {
            let mounted = looked_at(mount, folder)?;
            // The second freeze would take the first for somebody else's.
            if mounts.iter().any(|other| mounted.is(other)) {
                return Err(Fault::failed(format!("freeze {} twice", mount.path.display()), "name it once"));
            }
            mounts.push(mounted);
        }
        let may_freeze = !folders.is_empty();
        let journal = new_journal(&order, window, mounts)?;
        avoid_the_oom_killer();
        if is_unit {
            lay_down_capabilities(may_freeze)?;
        }
        let (reporter, reports) = reports(folders.len()).map_err(|e| Fault::failed("make a channel", e))?;
        let mut filesystems = Vec::new();
        for (index, (mount, folder)) in order.mounts.iter().zip(folders).enumerate() {
            let started = Filesystem::start(index, &mount.path, folder, &journal, reporter.clone());
            filesystems.push(started.map_err(|e| Fault::failed("start a freezer", e))?);
        }
        lock_memory(may_freeze)?;
        Ok(Self { window, runner, journal, filesystems, reports })
    }
}

fn checked_window(order: &Arm) -> Result<Duration, Fault> {
    let ceiling = if order.mounts.is_empty() { HELD_MAX } else { FROZEN_MAX };
    let window = Duration::from_millis(order.window_ms);
    if window > ceiling {
        let ceiling_ms = u64::try_from(ceiling.as_millis()).unwrap_or(u64::MAX);
        return Err(Fault::TooLong { window_ms: order.window_ms, ceiling_ms });
    }
    if order.mounts.len() > MOUNTS_MAX {
        return Err(Fault::failed("watch so many filesystems", format!("{MOUNTS_MAX} are the most")));
    }
    Ok(window)
}

fn looked_at(mount: &Mount, folder: &OwnedFd) -> Result<Mounted, Fault> {
    let look = |e: io::Error| Fault::failed(format!("look at {}", mount.path.display()), e);
    let kind = fstatfs(folder).map_err(|e| look(e.into()))?.filesystem_type();
    if ![EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC].contains(&kind) {
        return Err(Fault::NotSupported { mount: mount.path.clone() });
    }
    let device = device_of(folder.as_fd()).map_err(look)?;
    Ok(Mounted { path: mount.path.clone(), device, superblock: mount.superblock.clone() })
}

fn new_journal(order: &Arm, window: Duration, mounts: Vec<Mounted>) -> Result<Journal, Fault> {
    let step = "write its record";
    let failed = |error: &dyn std::error::Error| Fault::failed(step, chain(error));
    let folder = order.journal.parent().unwrap_or(Path::new("/"));
    // Whoever could exchange the record could have anything thawed in recovery.
    trust::check(folder).map_err(|e| failed(&e))?;
    let header = Header::new(order.run_uid.clone(), order.boot_id.clone(), window, mounts);
    let journal = Journal::create(&order.journal, header).map_err(|e| match e.is_full() {
        true => Fault::NoRoom { reason: chain(&e) },
        false => failed(&e),
    })?;
    let end = monotonic() + LOCK_MAX;
    while !journal.try_lock().map_err(|e| failed(&e))? {
        if monotonic() >= end {
            return Err(Fault::failed(step, "somebody else holds its lock"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(journal)
}

fn lock_memory(may_freeze: bool) -> Result<(), Fault> {
    match mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        // Where nothing is frozen, no page of ours can wait for a frozen disk.
        Err(errno) if may_freeze => Err(Fault::failed("lock its memory", errno.desc())),
        _ => Ok(()),
    }
}

/// Freezing needs one capability and locking memory another; a window in which nothing is frozen needs none. Its
/// threads and freezers come after this.
fn lay_down_capabilities(may_freeze: bool) -> Result<(), Fault> {
    let kept: &[Capability] = if may_freeze { &[Capability::CAP_SYS_ADMIN, Capability::CAP_IPC_LOCK] } else { &[] };
    let kept = kept.iter().copied().collect();
    capabilities::keep(&kept).map_err(|error| Fault::failed("lay down capabilities", error))
}

/// Asks the kernel to end somebody else when memory is short. Its unit asks for it as well.
fn avoid_the_oom_killer() {
    let written = std::fs::OpenOptions::new().write(true).open("/proc/self/oom_score_adj").and_then(|mut file| {
        use std::io::Write as _;
        file.write_all(b"-1000")
    });
    if let Err(error) = written {
        // A belt only; without privilege it cannot be had.
        tracing::debug!(event = "oom_score_not_set", error = %error);
    }
}
