//! What a child process is born with, and how a whole tree of them is ended.
//!
//! One of two modules with `unsafe` code: `pre_exec` runs between fork and exec, where only
//! async-signal-safe calls are allowed (signal-safety(7)); every closure here makes plain system calls and
//! neither allocates nor locks. And what a process may set for itself, such as who goes first at the disk.

#![expect(unsafe_code, reason = "pre_exec, descriptors by number and ioprio_set have no safe interface")]

use std::collections::HashMap;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid};

/// A user as a child process takes it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunAs {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Every group of the user.
    pub groups: Vec<u32>,
}

impl RunAs {
    /// Looks a user up by name.
    ///
    /// # Errors
    /// When the user database cannot be read or has no such user (`ENOENT`).
    pub fn lookup(name: &str) -> Result<Self, Errno> {
        let user = nix::unistd::User::from_name(name)?.ok_or(Errno::ENOENT)?;
        let c_name = std::ffi::CString::new(name).map_err(|_| Errno::EINVAL)?;
        let groups = nix::unistd::getgrouplist(&c_name, user.gid)?;
        Ok(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw(), groups: groups.iter().map(|g| g.as_raw()).collect() })
    }
}

/// Does something as the user that owns a folder, if this process is root and the folder is another
/// user's: what root wrote there by itself could be led elsewhere by a symlink of theirs.
///
/// # Errors
/// When the folder cannot be looked at or the user not be taken on; then nothing was done.
pub fn as_owner_of<T>(folder: &Path, work: impl FnOnce() -> T) -> std::io::Result<T> {
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            let back = nix::unistd::seteuid(Uid::from_raw(0)).and_then(|()| nix::unistd::setegid(Gid::from_raw(0)));
            if back.is_err() {
                // Never seen: the saved user id is root's. To go on as somebody else would be worse.
                std::process::abort();
            }
        }
    }
    let metadata = folder.symlink_metadata()?;
    let (uid, gid) = (metadata.uid(), metadata.gid());
    if uid == 0 || !nix::unistd::geteuid().is_root() {
        return Ok(work());
    }
    let _back = Back;
    nix::unistd::setegid(Gid::from_raw(gid))?;
    nix::unistd::seteuid(Uid::from_raw(uid))?;
    Ok(work())
}

/// Makes the child die with the thread that started it: no orphan goes on after its parent was killed.
pub fn die_with_parent(command: &mut std::process::Command) {
    let parent = nix::unistd::getpid();
    let set = move || {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the call above took effect.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
    };
    // SAFETY: prctl(2) and getppid(2) are plain system calls; nothing allocates or locks.
    unsafe {
        command.pre_exec(set);
    }
}

/// Lets the child inherit a descriptor that is close-on-exec here.
pub fn inherit(command: &mut std::process::Command, fd: BorrowedFd<'_>) {
    let raw: RawFd = fd.as_raw_fd();
    let set = move || {
        // SAFETY: the descriptor is open in the parent and so in the child of its fork.
        let fd = unsafe { BorrowedFd::borrow_raw(raw) };
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map(drop).map_err(Into::into)
    };
    // SAFETY: fcntl(2) is async-signal-safe.
    unsafe {
        command.pre_exec(set);
    }
}

/// Puts the child into a session of its own, and makes it another user if one is given.
pub fn detach(command: &mut std::process::Command, run_as: Option<RunAs>) {
    let groups: Vec<Gid> = run_as.iter().flat_map(|u| &u.groups).map(|g| Gid::from_raw(*g)).collect();
    let set = move || {
        nix::unistd::setsid()?;
        if let Some(user) = &run_as {
            nix::unistd::setgroups(&groups)?;
            nix::unistd::setgid(Gid::from_raw(user.gid))?;
            nix::unistd::setuid(Uid::from_raw(user.uid))?;
        }
        Ok(())
    };
    // SAFETY: plain system calls on values made before the fork.
    unsafe {
        command.pre_exec(set);
    }
}

/// Marks every descriptor above the standard three close-on-exec, so that children get none of them.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn keep_descriptors_from_children() -> std::io::Result<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let Some(raw) = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else { continue };
        if raw > 2 {
            // SAFETY: only the flag of the descriptor is set; one that is closed by now answers EBADF.
            let fd = unsafe { BorrowedFd::borrow_raw(raw) };
            let _ = fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        }
    }
    Ok(())
}

/// Takes over a descriptor that the parent process has handed down by number, and keeps it from children.
///
/// # Errors
/// When no descriptor of that number is open.
pub fn adopt(raw: RawFd) -> std::io::Result<OwnedFd> {
    // SAFETY: the number is only used for fcntl, which answers EBADF for one that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, the parent gave it to this process alone, and it is taken over once, at start.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Who goes first at a disk (ioprio_set(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoPriority {
    /// By level: 0 (first) to 7 (last).
    BestEffort(u8),
    /// When nobody else wants the disk.
    Idle,
}

impl IoPriority {
    /// The class in the top three of 16 bits, the level in the others (`linux/ioprio.h`).
    fn number(self) -> nix::libc::c_int {
        match self {
            Self::BestEffort(level) => 2 << 13 | nix::libc::c_int::from(level.min(7)),
            Self::Idle => 3 << 13,
        }
    }
}

/// Puts this thread, and those that it starts from here on, behind others at the disk.
///
/// # Errors
/// When the kernel refuses.
pub fn set_io_priority(priority: IoPriority) -> Result<(), Errno> {
    /// `IOPRIO_WHO_PROCESS`; with 0 it means the thread that calls.
    const WHO_PROCESS: nix::libc::c_int = 1;
    // SAFETY: ioprio_set(2) takes three numbers and touches no memory; no crate here has a safe interface to it.
    let done = unsafe { nix::libc::syscall(nix::libc::SYS_ioprio_set, WHO_PROCESS, 0, priority.number()) };
    Errno::result(done).map(drop)
}

/// Puts this thread, and those that it starts from here on, behind others at the CPU: 0 to 19. One that is further
/// behind already stays there, because going forward again is not everybody's right.
///
/// # Errors
/// When the kernel refuses.
pub fn give_way(nice: i32) -> Result<(), Errno> {
    let failed = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error());
    let now = rustix::process::getpriority_process(None).map_err(failed)?;
    if nice <= now { Ok(()) } else { rustix::process::setpriority_process(None, nice).map_err(failed) }
}

/// Makes orphans of this process's descendants its own children instead of init's.
///
/// # Errors
/// Never on Linux since 3.4.
pub fn become_subreaper() -> Result<(), Errno> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// Every living descendant of `ancestor`, in no order.
pub fn descendants(ancestor: Pid) -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|e| e.file_name().to_str().and_then(|n| n.parse::<i32>().ok())) {
        if let Some(Stat { parent, .. }) = Stat::of(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut queue = vec![ancestor.as_raw()];
    while let Some(pid) = queue.pop() {
        for child in children.remove(&pid).unwrap_or_default() {
            if lives(child) {
                found.push(Pid::from_raw(child));
            }
            queue.push(child);
        }
    }
    found
}

struct Stat {
    parent: i32,
    zombie: bool,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold spaces and parentheses of its own; the last one ends it.
        let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
        let zombie = matches!(fields.next()?, "Z" | "X");
        Some(Self { parent: fields.next()?.parse().ok()?, zombie })
    }
}

/// Whether anything of a process still runs. One whose first thread has ended looks like a zombie while
/// its other threads go on.
fn lives(pid: i32) -> bool {
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    Stat::of(pid).is_some_and(|stat| !stat.zombie || threads() > 1)
}

/// Sends a signal to every descendant of this process but those in `spare` (and their descendants). False:
/// there is none.
pub fn signal_descendants(signal: Signal, spare: &[Pid]) -> bool {
    let spared: Vec<Pid> = spare.iter().flat_map(|pid| descendants(*pid)).chain(spare.iter().copied()).collect();
    let hit: Vec<Pid> = descendants(nix::unistd::getpid()).into_iter().filter(|pid| !spared.contains(pid)).collect();
    for pid in &hit {
        // It may have ended by itself meanwhile.
        let _ = kill(*pid, signal);
    }
    !hit.is_empty()
}

/// Collects every child that has ended. True when there is no child left at all.
pub fn reap_all(mut on_exit: impl FnMut(Pid, WaitStatus)) -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return false,
            Ok(status) => {
                if let Some(pid) = status.pid() {
                    on_exit(pid, status);
                }
            }
            Err(Errno::EINTR) => {}
            Err(_) => return true,
        }
    }
}

/// When a process began, in seconds of the clock as it is now. `None`: it does not live, or cannot be looked at.
pub fn began_at(pid: i32) -> Option<i64> {
    if !lives(pid) {
        return None;
    }
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name in brackets may hold anything; the 22nd field of proc(5) is the 20th after it.
    let ticks: i64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    let system = std::fs::read_to_string("/proc/stat").ok()?;
    let booted: i64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(booted + ticks / a_second)
}

/// Whether a process lives and runs the program of that name (as the kernel shows it, 15 bytes). One that
/// has ended and was not waited for yet does not live.
pub fn is_running_as(pid: i32, name: &str) -> bool {
    if !lives(pid) {
        return false;
    }
    let comm = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("comm"));
    comm.is_ok_and(|comm| comm.trim_end() == name)
}
