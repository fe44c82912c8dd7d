//! The two system calls that freeze and thaw a filesystem, and a handle on a process by descriptor.
//!
//! The other module with `unsafe` code: the calls have no safe interface. Nothing here retries, decides or
//! remembers; whoever calls FIFREEZE may wait for as long as the kernel likes, and nobody can cancel it.

#![expect(unsafe_code, reason = "FIFREEZE, FITHAW and pidfd_open(2) have no safe interface")]

use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` of linux/fs.h; the argument is not looked at.
mod raw {
    nix::ioctl_readwrite!(fifreeze, b'X', 119, nix::libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, nix::libc::c_int);
}

/// Freezes the filesystem that holds an open file or folder. Waits until every write in flight has ended.
///
/// # Errors
/// `EBUSY`: it is frozen already, by somebody else. `EOPNOTSUPP`: it cannot be frozen. `EPERM`: no
/// `CAP_SYS_ADMIN`.
pub fn freeze(on: impl AsFd) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: the descriptor is open for the length of the call, and the argument points to an int.
    unsafe { raw::fifreeze(on.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Thaws the filesystem that holds an open file or folder. Waits while a freeze on its way flushes.
///
/// # Errors
/// `EINVAL`: it is not frozen, which is also the answer while a freeze on its way waits for a write.
pub fn thaw(on: impl AsFd) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: as above.
    unsafe { raw::fithaw(on.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// A descriptor of this very process that becomes readable when all of it has ended (pidfd_open(2)).
///
/// # Errors
/// When the kernel is older than 5.3, or no descriptor is left.
pub fn own_pidfd() -> Result<OwnedFd, Errno> {
    // SAFETY: a plain system call on numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    let fd = RawFd::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made it for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Time since boot without sleep (`CLOCK_MONOTONIC`): the same for every process of this machine.
pub fn monotonic() -> Duration {
    // It cannot fail: the clock exists on every Linux.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_pidfd_is_not_readable_while_we_live() {
        let pidfd = own_pidfd().unwrap();
        let mut poll = [nix::poll::PollFd::new(pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO).unwrap(), 0);
    }

    #[test]
    fn what_was_never_frozen_cannot_be_thawed() {
        let folder = std::fs::File::open("/proc").unwrap();
        assert!(thaw(&folder).is_err());
    }
}
