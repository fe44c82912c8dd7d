//! A filesystem by an open folder and by what names it in the record.
//!
//! Guard and runner hold open folders and hand them over; only recovery has to find a filesystem again, and
//! takes nothing else for it: something else may be mounted there by now.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::platform::mounts::Mounts;

/// One filesystem as the record names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mounted {
    /// A folder on it.
    pub path: PathBuf,
    /// `st_dev` of that folder.
    pub device: u64,
    /// `major:minor` of mountinfo (on btrfs another number than `st_dev`); empty if it is not known.
    pub superblock: String,
}

impl Mounted {
    /// Opens a folder on this very filesystem: the one that was named, or, when something else lies there
    /// by now, wherever else it is mounted.
    ///
    /// # Errors
    /// `ENODEV`: it is mounted nowhere that this process sees.
    pub(super) fn open(&self) -> io::Result<OwnedFd> {
        if let Ok(fd) = open_folder(&self.path)
            && device_of(fd.as_fd())? == self.device
        {
            return Ok(fd);
        }
        let mounts = Mounts::read().map_err(|e| e.source)?;
        let elsewhere = mounts.iter().filter(|mount| mount.device.to_string() == self.superblock);
        // Something else may be mounted over it.
        elsewhere
            .filter_map(|mount| open_folder(&mount.point).ok())
            .find(|fd| superblock_of(fd) == self.superblock)
            .ok_or_else(|| Errno::ENODEV.into())
    }

    /// Whether two are one.
    pub(super) fn is(&self, other: &Self) -> bool {
        let is_known = !self.superblock.is_empty();
        self.device == other.device || is_known && self.superblock == other.superblock
    }
}

/// Opens a folder to freeze or thaw what it is on.
///
/// # Errors
/// When it cannot be opened.
pub(super) fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map(OwnedFd::from)
}

/// `st_dev` of an open folder.
///
/// # Errors
/// When it cannot be looked at.
pub(super) fn device_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(File::from(fd.try_clone_to_owned()?).metadata()?.dev())
}

/// `major:minor` of the superblock that holds an open folder, by the mounts that this process sees. Empty if
/// the folder was opened where the mounts are others.
pub(super) fn superblock_of(fd: impl AsFd) -> String {
    let told = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let fdinfo = told(&format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd()));
    let Some(id) = fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim) else {
        return String::new();
    };
    let mounts = told("/proc/self/mountinfo");
    let mut lines = mounts.lines().map(|line| line.split(' '));
    lines
        .find_map(|mut fields| (fields.next() == Some(id)).then(|| fields.nth(1).unwrap_or_default().to_owned()))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblock_is_found_by_the_open_folder() {
        let fd = open_folder(Path::new("/proc")).unwrap();
        assert!(superblock_of(&fd).contains(':'));
    }

    #[test]
    fn filesystem_is_found_again_and_nothing_else_is_taken_for_it() {
        let fd = open_folder(Path::new("/proc")).unwrap();
        let device = device_of(fd.as_fd()).unwrap();
        let mounted = |path: &str, device, superblock: &str| Mounted {
            path: path.into(),
            device,
            superblock: superblock.to_owned(),
        };
        assert!(mounted("/proc", device, "").open().is_ok());
        // Its mount point is another's now; by its superblock it is found all the same.
        let moved = mounted("/dev", device, &superblock_of(&fd)).open().unwrap();
        assert_eq!(device_of(moved.as_fd()).unwrap(), device);
        let error = mounted("/proc", device + 1, "9999:9999").open().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENODEV as i32));
    }
}
