//! What is mounted where, what lies beneath what, and in which btrfs subvolume a path lies.
//!
//! A filesystem is known by its superblock's device number, as `/proc/self/mountinfo` has it: `st_dev` of a
//! file is another one in every btrfs subvolume. What lies beneath a filesystem (the file behind a loop
//! device, the disks behind a device-mapper volume or an array, the layers of an overlay) is followed to its
//! end, so that "are these two the same in the end" has an answer. It reads `/proc`, `/sys` and inode
//! numbers; it changes nothing.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::files::{self, FileError};

/// The mounts of this process.
const MOUNTINFO: &str = "/proc/self/mountinfo";
/// A btrfs subvolume's root has this inode number
/// (<https://btrfs.readthedocs.io/en/latest/btrfs-subvolume.html>).
const SUBVOLUME_ROOT_INODE: u64 = 256;
/// Block devices by number, with what is behind them (sysfs(5)).
const BLOCK_DEVICES: &str = "/sys/dev/block";
/// Every btrfs, with its devices.
const BTRFS_FILESYSTEMS: &str = "/sys/fs/btrfs";

/// A superblock's or a block device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Major number; 0: no block device of its own.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
}

impl Device {
    fn of(number: u64) -> Self {
        Self { major: nix::sys::stat::major(number), minor: nix::sys::stat::minor(number) }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl std::str::FromStr for Device {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.trim().split_once(':').ok_or(())?;
        Ok(Self { major: major.parse().map_err(drop)?, minor: minor.parse().map_err(drop)? })
    }
}

/// One line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Which folder of the filesystem is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Type of the filesystem, such as `btrfs`.
    pub kind: String,
    /// Its superblock.
    pub device: Device,
    /// What it was mounted from: a block device, a dataset, or just a word.
    pub source: String,
    /// The superblock's options.
    pub options: String,
}

/// The mounts that this process sees.
#[derive(Clone, Debug)]
pub struct Mounts {
    all: Vec<Mount>,
    block_devices: PathBuf,
}

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

    pub(super) fn parse(text: &str) -> Self {
        Self { all: text.lines().filter_map(parse_mount).collect(), block_devices: BLOCK_DEVICES.into() }
    }

    /// The mount that holds a path: the longest one above it, the latest of equals.
    pub fn holding(&self, path: &Path) -> Option<&Mount> {
        self.all.iter().filter(|mount| path.starts_with(&mount.point)).max_by_key(|mount| mount.point.as_os_str().len())
    }

    /// Every mount.
    pub fn iter(&self) -> impl Iterator<Item = &Mount> {
        self.all.iter()
    }

    /// The superblock that holds a path, and every one beneath it down to the hardware. A path that does
    /// not exist counts as the nearest folder above it that does.
    pub fn beneath(&self, path: &Path) -> BTreeSet<Device> {
        let mut found = BTreeSet::new();
        self.dig(path, &mut found);
        found
    }

    fn dig(&self, path: &Path, found: &mut BTreeSet<Device>) {
        let real = path.ancestors().find_map(|folder| folder.canonicalize().ok());
        let Some(mount) = real.as_deref().and_then(|real| self.holding(real)) else { return };
        if !found.insert(mount.device) {
            return;
        }
        // A mount that another one hides still looks like the longest; the file itself knows better.
        if let Some(metadata) = real.as_deref().and_then(|real| real.symlink_metadata().ok()) {
            self.dig_device(Device::of(metadata.dev()), found);
        }
        for layer in overlay_layers(mount) {
            self.dig(&layer, found);
        }
        for device in block_devices(mount) {
            self.dig_device(device, found);
        }
    }

    fn dig_device(&self, device: Device, found: &mut BTreeSet<Device>) {
        // A filesystem directly on a block device has the same number, and is on the list already.
        found.insert(device);
        let folder = self.block_devices.join(device.to_string());
        // A partition has no folder `loop` or `slaves`; the disk above it has.
        let disk = if folder.join("partition").exists() { folder.join("..") } else { folder };
        if let Ok(file) = std::fs::read_to_string(disk.join("loop/backing_file")) {
            self.dig(Path::new(file.trim_end_matches('\n')), found);
        }
        for below in entries(&disk.join("slaves")).into_iter().filter_map(|slave| device_in(&slave)) {
            if !found.contains(&below) {
                self.dig_device(below, found);
            }
        }
        if let Some(whole) = device_in(&disk).filter(|whole| !found.contains(whole)) {
            self.dig_device(whole, found);
        }
    }

    /// Mounts strictly below a path.
    pub fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a Mount> {
        self.all.iter().filter(move |mount| mount.point.starts_with(path) && mount.point != path)
    }
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let (mut before, mut after) = (before.split(' '), after.split(' '));
    Some(Mount {
        device: before.nth(2)?.parse().ok()?,
        root: PathBuf::from(unescape(before.next()?)),
        point: PathBuf::from(unescape(before.next()?)),
        kind: after.next()?.to_owned(),
        source: unescape(after.next().unwrap_or_default()),
        options: after.next().unwrap_or_default().to_owned(),
    })
}

/// Block devices that a filesystem lies on. A btrfs has a number of its own and may have several.
fn block_devices(mount: &Mount) -> Vec<Device> {
    if mount.device.major != 0 {
        return vec![mount.device];
    }
    let Some(source) = block_device(Path::new(&mount.source)) else { return Vec::new() };
    if mount.kind != "btrfs" {
        return vec![source];
    }
    let filesystems = entries(Path::new(BTRFS_FILESYSTEMS)).into_iter();
    let devices = filesystems.map(|fs| entries(&fs.join("devices")).iter().filter_map(|d| device_in(d)).collect());
    devices.into_iter().find(|all: &Vec<Device>| all.contains(&source)).unwrap_or_else(|| vec![source])
}

/// The number of a block device, given by its node.
pub fn block_device(node: &Path) -> Option<Device> {
    let metadata = node.metadata().ok().filter(|m| m.file_type().is_block_device())?;
    Some(Device::of(metadata.rdev()))
}

/// The number that stands in a device's folder of sysfs.
fn device_in(folder: &Path) -> Option<Device> {
    std::fs::read_to_string(folder.join("dev")).ok()?.parse().ok()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Folders that an overlay is made of: what is written to it is written there.
fn overlay_layers(mount: &Mount) -> Vec<PathBuf> {
    if mount.kind != "overlay" {
        return Vec::new();
    }
    let named = mount.options.split(',').filter_map(|option| option.split_once('='));
    let folders = named.filter(|(key, _)| matches!(*key, "lowerdir" | "upperdir" | "workdir"));
    folders.flat_map(|(_, value)| value.split(':')).map(|folder| PathBuf::from(unescape(folder))).collect()
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
        41 40 0:31 / /srv/with\\040space/deep rw - tmpfs tmpfs rw\n\
        42 22 0:32 / /layers rw shared:2 master:3 - overlay overlay rw,lowerdir=/srv/a:/b,upperdir=/c\n";

    #[test]
    fn longest_mount_above_holds_a_path() {
        let mounts = Mounts::parse(EXAMPLE);
        let kind = |path: &str| mounts.holding(Path::new(path)).map(|m| m.kind.clone());
        assert_eq!(kind("/srv/with space/x").as_deref(), Some("btrfs"));
        assert_eq!(kind("/srv/with space/deep/x").as_deref(), Some("tmpfs"));
        assert_eq!(kind("/srv/with spaces").as_deref(), Some("ext4"));
        assert_eq!(mounts.below(Path::new("/srv")).count(), 2);
    }

    #[test]
    fn superblock_source_and_layers_are_read_past_optional_fields() {
        let mounts = Mounts::parse(EXAMPLE);
        let mount = |path: &str| mounts.holding(Path::new(path)).unwrap();
        assert_eq!((mount("/x").device, mount("/x").source.as_str()), (Device { major: 254, minor: 0 }, "/dev/vda"));
        let layers = overlay_layers(mount("/layers/x"));
        assert_eq!(layers, [Path::new("/srv/a"), Path::new("/b"), Path::new("/c")]);
        assert!(overlay_layers(mount("/x")).is_empty());
    }

    #[test]
    fn what_lies_beneath_is_followed_through_volumes_partitions_and_loops() {
        use std::os::unix::fs::symlink;
        let sys = tempfile::tempdir().unwrap();
        let device = |path: &str, number: &str| {
            let folder = sys.path().join("devices").join(path);
            std::fs::create_dir_all(&folder).unwrap();
            crate::platform::files::write(&folder.join("dev"), number.as_bytes(), 0o600).unwrap();
            symlink(&folder, sys.path().join(number)).unwrap();
            folder
        };
        // A volume on a partition of a loop device, whose file lies on 254:0.
        device("dm-3", "253:3");
        device("loop4", "7:4");
        let part = device("loop4/loop4p1", "259:1");
        crate::platform::files::write(&part.join("partition"), b"1\n", 0o600).unwrap();
        std::fs::create_dir_all(sys.path().join("devices/dm-3/slaves")).unwrap();
        symlink(&part, sys.path().join("devices/dm-3/slaves/loop4p1")).unwrap();
        std::fs::create_dir_all(sys.path().join("devices/loop4/loop")).unwrap();
        let file = sys.path().join("devices/loop4/loop/backing_file");
        crate::platform::files::write(&file, b"/no/such/image (deleted)\n", 0o600).unwrap();
        let text = "22 1 254:0 / / rw - ext4 /dev/vda rw\n40 22 253:3 / /usr rw - ext4 /dev/mapper/a rw\n";
        let mounts = Mounts { block_devices: sys.path().to_owned(), ..Mounts::parse(text) };
        let found: Vec<String> = mounts.beneath(Path::new("/usr")).iter().map(Device::to_string).collect();
        for expected in ["253:3", "259:1", "7:4", "254:0"] {
            assert!(found.iter().any(|number| number == expected), "{expected} is not in {found:?}");
        }
    }

    #[test]
    fn path_that_does_not_exist_counts_as_the_folder_above_it() {
        let mounts = Mounts::read().unwrap();
        let root = mounts.beneath(Path::new("/"));
        assert!(!root.is_empty());
        assert_eq!(mounts.beneath(Path::new("/no/such/folder")), root);
    }
}
