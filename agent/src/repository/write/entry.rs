//! An entry's metadata as the format keeps it: times, owners with their names, extended attributes.
//!
//! Everything is asked of an open file, or by name in an open folder without following a link, so that nobody can
//! lead a question elsewhere meanwhile.

use std::collections::HashMap;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::step::step;
use crate::format::Timestamp;
use crate::format::tree::{Attribute, Node, NodeKind};

/// Names of users and groups, each looked up once. Whoever has none has the empty one.
#[derive(Debug, Default)]
pub(super) struct Names {
    users: RwLock<HashMap<u32, String>>,
    groups: RwLock<HashMap<u32, String>>,
}

impl Names {
    pub(super) fn user(&self, uid: u32) -> String {
        cached(&self.users, uid, || {
            let user = nix::unistd::User::from_uid(uid.into()).ok().flatten();
            user.map(|user| user.name).unwrap_or_default()
        })
    }

    pub(super) fn group(&self, gid: u32) -> String {
        cached(&self.groups, gid, || {
            let group = nix::unistd::Group::from_gid(gid.into()).ok().flatten();
            group.map(|group| group.name).unwrap_or_default()
        })
    }
}

fn cached(cache: &RwLock<HashMap<u32, String>>, id: u32, look_up: impl FnOnce() -> String) -> String {
    if let Some(name) = cache.read().unwrap_or_else(PoisonError::into_inner).get(&id) {
        return name.clone();
    }
    let name = look_up();
    cache.write().unwrap_or_else(PoisonError::into_inner).insert(id, name.clone());
    name
}

/// A node of what `stat` says.
pub(super) fn node(name: &[u8], stat: &Stat, kind: NodeKind, attributes: Vec<Attribute>, names: &Names) -> Node {
    let mtime = time(stat.st_mtime, stat.st_mtime_nsec);
    #[allow(clippy::useless_conversion, reason = "it is the same on some")]
    let links: u64 = match kind {
        NodeKind::Folder { .. } | NodeKind::Fifo | NodeKind::Socket => 0,
        _ => stat.st_nlink.into(),
    };
    Node {
        name: name.to_vec(),
        kind,
        mode: stat.st_mode & 0o7777,
        mtime,
        // As restic without `--with-atime`: a folder that was only read must not become another one.
        atime: mtime,
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        uid: stat.st_uid,
        gid: stat.st_gid,
        user: names.user(stat.st_uid),
        group: names.group(stat.st_gid),
        inode: stat.st_ino,
        device_id: stat.st_dev,
        links,
        attributes,
    }
}

/// A time of the kernel's. Some filesystems give nanoseconds that are none.
pub(super) fn time(seconds: i64, nanos: impl TryInto<u32>) -> Timestamp {
    Timestamp { seconds, nanos: nanos.try_into().unwrap_or(0).min(999_999_999) }
}

/// How a path that an operator named looks; links on the way to it are followed, it itself is not.
pub(super) fn path_of(folder: &Path, name: &[u8]) -> PathBuf {
    folder.join(std::ffi::OsStr::from_bytes(name))
}

/// Opens a file or folder in a folder: never through a link, without touching its time of access where that is
/// allowed, and without waiting for the other end of what turns out to be a pipe.
pub(super) fn open_at(folder: BorrowedFd<'_>, name: &[u8], more: OFlags) -> Result<std::os::fd::OwnedFd, Errno> {
    step()?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC | more;
    match rustix::fs::openat(folder, name, flags | OFlags::NONBLOCK | OFlags::NOATIME, Mode::empty()) {
        // Only the owner may ask for the time to be left alone.
        Err(Errno::PERM) => rustix::fs::openat(folder, name, flags | OFlags::NONBLOCK, Mode::empty()),
        // Somebody holds a lease on the file; it is given up when asked for.
        Err(Errno::WOULDBLOCK) => rustix::fs::openat(folder, name, flags, Mode::empty()),
        opened => opened,
    }
}

/// What kind of entry a mode says.
pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// The extended attributes of an open file.
pub(super) fn attributes(file: BorrowedFd<'_>) -> Result<Vec<Attribute>, Errno> {
    all(|buffer| rustix::fs::flistxattr(file, buffer), |name, buffer| rustix::fs::fgetxattr(file, name, buffer))
}

/// The extended attributes of what cannot be opened: a link, a device, a pipe.
pub(super) fn attributes_at(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<Attribute>, Errno> {
    let path = path_of(Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())), name);
    all(
        |buffer| rustix::fs::llistxattr(&path, buffer),
        |attribute, buffer| rustix::fs::lgetxattr(&path, attribute, buffer),
    )
}

fn all(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&[u8], &mut [u8]) -> Result<usize, Errno>,
) -> Result<Vec<Attribute>, Errno> {
    let names = match whole(&list) {
        // The filesystem has none.
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        names => names?,
    };
    let mut found = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        match whole(|buffer| get(name, buffer)) {
            Ok(value) => found.push(Attribute { name: name.to_vec(), value }),
            // It went away meanwhile.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Bytes of a call that wants a buffer that is big enough; the kernel's limit is 64 KiB.
fn whole(call: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    step()?;
    let mut small = [0_u8; 512];
    match call(&mut small) {
        Ok(length) => return Ok(small.get(..length).unwrap_or_default().to_vec()),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error),
    }
    let mut big = vec![0_u8; 64 * 1024];
    let length = call(&mut big)?;
    big.truncate(length);
    Ok(big)
}
