//! restic's lock files, kept by ourselves: written before the work, written anew while it lasts, removed at its
//! end.
//!
//! Whoever wants a shared lock respects an exclusive one, and the other way round; both write their own first and
//! look second, so that of two who come at once at least one sees the other. A lock of this host whose process is
//! gone, or is another program by now, is removed. Locks of other hosts are never judged.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::format::lock::Lock;
use crate::platform::clock::SharedClock;
use crate::platform::process;
use crate::storage::{Kind, Object};

use super::open::{Archive, ArchiveError, Who, timestamp};

/// restic takes a lock for stale after 30 minutes, and refreshes its own every 5.
const BELIEVED_SECONDS: i64 = 30 * 60;
/// How often ours is refreshed.
const REFRESH_EVERY: Duration = Duration::from_secs(300);
/// How often our lock's removal is tried: one that stays hinders whoever wants to prune.
const REMOVALS: usize = 3;
/// How far two readings of the clock may lie apart.
const CLOCK_SECONDS: i64 = 5;
/// After so many failed tries in a row our lock may look stale to others.
const FAILURES_MAX: u32 = 4;

/// A lock of ours; gone when it is dropped.
#[derive(Debug)]
pub struct HeldLock {
    archive: Archive,
    object: Arc<Mutex<Object>>,
    lost: Arc<AtomicBool>,
    stop: Option<mpsc::Sender<()>>,
    refresher: Option<JoinHandle<()>>,
}

/// Whether others may hold a lock beside ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Readers and writers.
    Shared,
    /// Whoever removes.
    Exclusive,
}

impl HeldLock {
    /// Takes a lock.
    ///
    /// # Errors
    /// [`ArchiveError::Locked`] when somebody else's does not go with it; otherwise when the place fails.
    pub fn take(archive: &Archive, sharing: Sharing, who: &Who, clock: &SharedClock) -> Result<Self, ArchiveError> {
        refuse_conflicts(archive, sharing, who, clock, None)?;
        let (object, _) = write(archive, sharing, who, clock)?;
        let mut held = Self {
            archive: archive.clone(),
            object: Arc::new(Mutex::new(object.clone())),
            lost: Arc::default(),
            stop: None,
            refresher: None,
        };
        // From here on it is removed again if anything fails.
        refuse_conflicts(archive, sharing, who, clock, Some(&object.name))?;
        held.keep(sharing, who.clone(), clock.clone())?;
        Ok(held)
    }

    /// Whether it could be kept so far: refreshed in time, and removed by nobody.
    pub fn is_held(&self) -> bool {
        !self.lost.load(Ordering::Acquire) && is_there(&self.archive, &self.object)
    }

    /// Whether there is no lock but this one: nobody else works here now.
    ///
    /// # Errors
    /// When the locks cannot be listed.
    pub fn is_alone(&self) -> Result<bool, ArchiveError> {
        let locks = self.archive.storage().list(Kind::Lock)?;
        let own = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(locks.iter().all(|(name, _)| *name == own.name))
    }

    fn keep(&mut self, sharing: Sharing, who: Who, clock: SharedClock) -> Result<(), ArchiveError> {
        let (stop, stopped) = mpsc::channel();
        let (archive, object, lost) = (self.archive.clone(), self.object.clone(), self.lost.clone());
        let refresh = move || {
            let mut failures = 0;
            while stopped.recv_timeout(REFRESH_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                // Somebody took it for stale, and may have pruned since.
                if !is_there(&archive, &object) {
                    lost.store(true, Ordering::Release);
                }
                match write(&archive, sharing, &who, &clock) {
                    Ok((new, _)) => {
                        failures = 0;
                        let old = std::mem::replace(&mut *object.lock().unwrap_or_else(PoisonError::into_inner), new);
                        if let Err(error) = archive.storage().remove(&old) {
                            // It will be taken for stale; the new one counts.
                            tracing::warn!(event = "old_lock_stays", %error);
                        }
                    }
                    Err(error) => {
                        failures += 1;
                        tracing::warn!(event = "lock_not_refreshed", %error, failures);
                        if failures >= FAILURES_MAX {
                            lost.store(true, Ordering::Release);
                        }
                    }
                }
            }
        };
        let thread = std::thread::Builder::new().name("lock".to_owned()).spawn(refresh);
        self.refresher = Some(thread.map_err(|error| ArchiveError::Broken(format!("no thread: {error}")))?);
        self.stop = Some(stop);
        Ok(())
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.refresher.take() {
            let _ = thread.join();
        }
        let object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..REMOVALS {
            match self.archive.storage().remove(&object) {
                Ok(()) => return,
                // Our process will be gone, and then it is stale to whoever looks on this host.
                Err(error) => tracing::warn!(event = "lock_stays", %error),
            }
        }
    }
}

fn write(archive: &Archive, sharing: Sharing, who: &Who, clock: &SharedClock) -> Result<(Object, u64), ArchiveError> {
    let lock = Lock {
        time: timestamp(clock.as_ref()),
        exclusive: sharing == Sharing::Exclusive,
        hostname: who.hostname.clone(),
        username: who.username.clone(),
        pid: std::process::id().cast_signed(),
        uid: Some(who.uid),
        gid: Some(who.gid),
    };
    archive.write_file_or_withdraw(Kind::Lock, &lock.to_bytes()?)
}

fn refuse_conflicts(
    archive: &Archive,
    sharing: Sharing,
    who: &Who,
    clock: &SharedClock,
    own: Option<&str>,
) -> Result<(), ArchiveError> {
    let now = timestamp(clock.as_ref()).seconds;
    for (name, _) in archive.storage().list(Kind::Lock)? {
        if own == Some(&name) {
            continue;
        }
        let lock = match archive.read_file(Kind::Lock, &name) {
            Ok(bytes) => Lock::parse(&bytes)?,
            // It was removed since it was listed.
            Err(ArchiveError::Storage(crate::storage::StorageError::Missing(_))) => continue,
            Err(error) => return Err(error),
        };
        if is_stale(&lock, &who.hostname, now) {
            archive.storage().remove(&Object::new(Kind::Lock, name))?;
            tracing::warn!(event = "stale_lock_removed", pid = lock.pid);
        } else if lock.exclusive || sharing == Sharing::Exclusive {
            return Err(ArchiveError::Locked(format!("process {} on {}", lock.pid, lock.hostname)));
        }
    }
    Ok(())
}

/// A listing that cannot be had says nothing against it.
fn is_there(archive: &Archive, object: &Mutex<Object>) -> bool {
    let name = object.lock().unwrap_or_else(PoisonError::into_inner).name.clone();
    archive.storage().list(Kind::Lock).map_or(true, |locks| locks.iter().any(|(other, _)| *other == name))
}

/// Whether its process was one of this host and is none any more. Another machine can have the same name, and what is
/// removed under an exclusive lock is removed from under us as well: such a lock is judged only when its holder has not
/// refreshed it for as long as restic itself believes one.
fn is_stale(lock: &Lock, host: &str, now: i64) -> bool {
    let is_silent = now.saturating_sub(lock.time.seconds) > BELIEVED_SECONDS;
    lock.hostname == host && (!lock.exclusive || is_silent) && !is_held_by(lock.pid, lock.time.seconds)
}

/// Whether the process that made a lock at that time lives. A program of another name may be a restic that somebody has
/// renamed; it has the number from somebody else only if it began after the lock.
fn is_held_by(pid: i32, made_at: i64) -> bool {
    is_archiver(pid) || process::began_at(pid).is_some_and(|began| began <= made_at + CLOCK_SECONDS)
}

/// Whether a process lives and is an archiver: ours, or a restic.
fn is_archiver(pid: i32) -> bool {
    let own = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    ["restic", own.trim_end()].iter().any(|name| process::is_running_as(pid, name))
}
