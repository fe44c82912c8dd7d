//! What is mounted where, and in which btrfs subvolume a path lies.
//!
//! Reads `/proc/self/mountinfo` and inode numbers; it changes nothing.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::files::{self, FileError};

/// The mounts of this process.
const MOUNTINFO: &str = "/proc/self/mountinfo";
/// A btrfs subvolume's root has this inode number
/// (<https://btrfs.readthedocs.io/en/latest/btrfs-subvolume.html>).
const SUBVOLUME_ROOT_INODE: u64 = 256;

/// One line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// Type of the filesystem, such as `btrfs`.
    pub kind: String,
}

/// The mounts that this process sees.
#[derive(Clone, Debug, Default)]
pub struct Mounts(Vec<Mount>);

impl Mounts {
    /// Reads them.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn read() -> Result<Self, FileError> {
        std::fs::read_to_string(MOUNTINFO)
            .map(|text| Self::parse(&text))
            .map_err(files::failed("read", Path::new(MOUNTINFO)))
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse_mount).collect())
    }

    /// The mount that holds a path: the longest one above it, the latest of equals.
    pub fn holding(&self, path: &Path) -> Option<&Mount> {
        self.0.iter().filter(|mount| path.starts_with(&mount.point)).max_by_key(|mount| mount.point.as_os_str().len())
    }

    /// Mounts strictly below a path.
    pub fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a Mount> {
        self.0.iter().filter(move |mount| mount.point.starts_with(path) && mount.point != path)
    }
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let point = before.split(' ').nth(4)?;
    let kind = after.split(' ').next()?;
    Some(Mount { point: PathBuf::from(unescape(point)), kind: kind.to_owned() })
}

/// Undoes the kernel's `\040` for a space, `\011`, `\012` and `\134`.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// The root of the btrfs subvolume that holds a path; `None` when the path is not on btrfs.
///
/// # Errors
/// When the path cannot be reached.
pub fn subvolume_of(path: &Path, mounts: &Mounts) -> Result<Option<PathBuf>, FileError> {
    let real = path.canonicalize().map_err(files::failed("find", path))?;
    let Some(mount) = mounts.holding(&real).filter(|mount| mount.kind == "btrfs") else { return Ok(None) };
    for folder in real.ancestors().take_while(|folder| folder.starts_with(&mount.point)) {
        if folder.symlink_metadata().map_err(files::failed("look at", folder))?.ino() == SUBVOLUME_ROOT_INODE {
            return Ok(Some(folder.to_owned()));
        }
    }
    Ok(None)
}

/// Whether a folder is the root of a btrfs subvolume.
pub fn is_subvolume(folder: &Path) -> bool {
    let is_root = folder.symlink_metadata().is_ok_and(|metadata| metadata.ino() == SUBVOLUME_ROOT_INODE);
    let on_btrfs =
        nix::sys::statfs::statfs(folder).is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::BTRFS_SUPER_MAGIC);
    is_root && on_btrfs
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
        40 22 0:30 /a /srv/with\\040space rw,relatime shared:1 - btrfs /dev/loop0 rw\n\
        41 40 0:31 / /srv/with\\040space/deep rw - tmpfs tmpfs rw\n";

    #[test]
    fn longest_mount_above_holds_a_path() {
        let mounts = Mounts::parse(EXAMPLE);
        let kind = |path: &str| mounts.holding(Path::new(path)).map(|m| m.kind.clone());
        assert_eq!(kind("/srv/with space/x").as_deref(), Some("btrfs"));
        assert_eq!(kind("/srv/with space/deep/x").as_deref(), Some("tmpfs"));
        assert_eq!(kind("/srv/with spaces").as_deref(), Some("ext4"));
        assert_eq!(mounts.below(Path::new("/srv")).count(), 2);
    }
}
