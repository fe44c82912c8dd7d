//! Owner, extended attributes, mode and times, in the order in which the kernel lets them stand: a change of owner
//! clears set-id bits and capabilities, a mode without write keeps its owner from setting attributes, and
//! everything changes times. What is right already is not touched.

use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::report::{Context, Trouble};
use crate::format::Timestamp;
use crate::format::tree::{Attribute, Node};
use crate::platform::command::printable;

/// Longest list of names and longest value that the kernel has.
const XATTR_BYTES_MAX: usize = 64 * 1024;

/// What an entry has beside its content.
#[derive(Clone, Debug)]
pub(super) struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    atime: Timestamp,
    extended: Box<[Attribute]>,
}

impl Attributes {
    /// Of a node, which loses its extended ones.
    pub(super) fn take(node: &mut Node) -> Self {
        Self {
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            atime: node.atime,
            extended: std::mem::take(&mut node.attributes).into_boxed_slice(),
        }
    }
}

/// What gets attributes.
pub(super) enum Thing<'a> {
    /// A file or a folder that is open.
    Open(&'a OwnedFd),
    /// A name in a folder, never followed: symlinks, devices, pipes.
    Named(&'a OwnedFd, &'a [u8]),
}

/// A path to what a descriptor of ours is open on, for calls that take no descriptor of `O_PATH`.
pub(super) fn own_descriptor(fd: &OwnedFd) -> String {
    format!("/proc/thread-self/fd/{}", fd.as_raw_fd())
}

impl Thing<'_> {
    fn stat(&self) -> Result<Stat, Errno> {
        match self {
            Self::Open(fd) => rustix::fs::fstat(fd),
            Self::Named(folder, name) => rustix::fs::statat(folder, *name, AtFlags::SYMLINK_NOFOLLOW),
        }
    }

    fn chown(&self, uid: Option<Uid>, gid: Option<Gid>) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => rustix::fs::fchown(fd, uid, gid),
            Self::Named(folder, name) => rustix::fs::chownat(folder, *name, uid, gid, AtFlags::SYMLINK_NOFOLLOW),
        }
    }

    fn chmod(&self, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode);
        match self {
            Self::Open(fd) => rustix::fs::fchmod(fd, mode),
            Self::Named(folder, name) => {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let held = rustix::fs::openat(folder, *name, flags, Mode::empty())?;
                rustix::fs::chmod(own_descriptor(&held), mode)
            }
        }
    }

    fn set_times(&self, times: &Timestamps) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => rustix::fs::futimens(fd, times),
            Self::Named(folder, name) => rustix::fs::utimensat(folder, *name, times, AtFlags::SYMLINK_NOFOLLOW),
        }
    }

    /// The name is one component, so nothing but the folder's own entry is reached.
    fn named_path(folder: &OwnedFd, name: &[u8]) -> Vec<u8> {
        [own_descriptor(folder).as_bytes(), b"/", name].concat()
    }

    fn list(&self) -> Result<Vec<Vec<u8>>, Errno> {
        let mut small = [0_u8; 1024];
        let listed = self.list_into(&mut small);
        let mut big = Vec::new();
        let names = match listed {
            Err(Errno::RANGE) => {
                big.resize(XATTR_BYTES_MAX, 0);
                let length = self.list_into(&mut big)?;
                big.get(..length)
            }
            listed => small.get(..listed?),
        };
        let names = names.unwrap_or_default().split(|byte| *byte == 0);
        Ok(names.filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
    }

    fn list_into(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Self::Open(fd) => rustix::fs::flistxattr(fd, buffer),
            Self::Named(folder, name) => rustix::fs::llistxattr(Self::named_path(folder, name), buffer),
        }
    }

    fn has(&self, attribute: &Attribute) -> bool {
        // One byte more than expected, so that a longer value is seen.
        let mut buffer = vec![0_u8; (attribute.value.len() + 1).min(XATTR_BYTES_MAX + 1)];
        let got = match self {
            Self::Open(fd) => rustix::fs::fgetxattr(fd, &attribute.name, buffer.as_mut_slice()),
            Self::Named(folder, name) => {
                rustix::fs::lgetxattr(Self::named_path(folder, name), &attribute.name, buffer.as_mut_slice())
            }
        };
        got.is_ok_and(|length| buffer.get(..length) == Some(&attribute.value[..]))
    }

    fn set(&self, attribute: &Attribute) -> Result<(), Errno> {
        let Attribute { name: key, value } = attribute;
        match self {
            Self::Open(fd) => rustix::fs::fsetxattr(fd, key, value, XattrFlags::empty()),
            Self::Named(folder, name) => {
                rustix::fs::lsetxattr(Self::named_path(folder, name), key, value, XattrFlags::empty())
            }
        }
    }

    fn unset(&self, key: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => rustix::fs::fremovexattr(fd, key),
            Self::Named(folder, name) => rustix::fs::lremovexattr(Self::named_path(folder, name), key),
        }
    }
}

/// Whether an attribute that the snapshot does not have is removed. A label of the system's own is not ours to
/// remove.
fn is_removable(name: &[u8], context: &Context<'_>) -> bool {
    name.starts_with(b"user.")
        || name.starts_with(b"system.posix_acl_")
        || name == b"security.capability"
        || context.is_root && name.starts_with(b"trusted.")
}

fn timespec(time: Timestamp) -> Timespec {
    Timespec { tv_sec: time.seconds, tv_nsec: time.nanos.into() }
}

impl Attributes {
    /// Gives them to `thing`; what may not be set is told as a warning.
    pub(super) fn apply(
        &self,
        thing: &Thing<'_>,
        context: &Context<'_>,
        path: &dyn Fn() -> String,
    ) -> Result<(), Trouble> {
        let stat = thing.stat().map_err(|errno| Trouble::of("look at", path(), errno))?;
        let is_symlink = stat.st_mode & 0o170_000 == 0o120_000;
        let mut changed = false;
        let is_owned = (stat.st_uid, stat.st_gid) == (self.uid, self.gid) || {
            changed = true;
            self.own(thing, context, path)?
        };
        changed |= self.extend(thing, context, path)?;
        let mut mode = self.mode & 0o7777;
        if !is_owned && mode & 0o6000 != 0 {
            mode &= !0o6000;
            context.warn(format!("{}: no set-id bits without its owner", path()));
        }
        if !is_symlink && (changed || stat.st_mode & 0o7777 != mode) {
            changed = true;
            thing.chmod(mode).map_err(|errno| Trouble::of("set the mode of", path(), errno))?;
        }
        let is_of_time = (stat.st_mtime, stat.st_mtime_nsec) == (self.mtime.seconds, self.mtime.nanos.into());
        if changed || !is_of_time {
            let times = Timestamps { last_access: timespec(self.atime), last_modification: timespec(self.mtime) };
            thing.set_times(&times).map_err(|errno| Trouble::of("set the times of", path(), errno))?;
        }
        Ok(())
    }

    /// Whether it has its owner and group now.
    fn own(&self, thing: &Thing<'_>, context: &Context<'_>, path: &dyn Fn() -> String) -> Result<bool, Trouble> {
        // The kernel takes the highest number for "leave as it is".
        let (uid, gid) =
            (self.uid != u32::MAX).then_some(self.uid).zip((self.gid != u32::MAX).then_some(self.gid)).unzip();
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        match thing.chown(uid, gid) {
            Ok(()) if uid.is_some() => return Ok(true),
            Ok(()) | Err(Errno::PERM | Errno::INVAL) => {}
            Err(errno) => return Err(Trouble::of("set the owner of", path(), errno)),
        }
        // A group of this user's own may be given without being root; what comes of it is in the warning.
        let group = thing.chown(None, gid);
        let what = if group.is_ok() && gid.is_some() { "owner" } else { "owner and group" };
        context.warn(format!("{}: its {what} ({}:{}) could not be set", path(), self.uid, self.gid));
        Ok(false)
    }

    /// Whether any was changed.
    fn extend(&self, thing: &Thing<'_>, context: &Context<'_>, path: &dyn Fn() -> String) -> Result<bool, Trouble> {
        let present = match thing.list() {
            Ok(present) => present,
            Err(Errno::NOTSUP | Errno::PERM | Errno::ACCESS) => Vec::new(),
            Err(errno) => return Err(Trouble::of("list the attributes of", path(), errno)),
        };
        let mut changed = false;
        let warn = |verb: &str, name: &[u8], errno: Errno| {
            let reason = std::io::Error::from(errno);
            context.warn(format!("{}: cannot {verb} its attribute {}: {reason}", path(), printable(name)));
        };
        for name in present.iter().filter(|name| is_removable(name, context)) {
            if self.extended.iter().all(|attribute| attribute.name != *name) {
                changed = true;
                thing.unset(name).unwrap_or_else(|errno| warn("remove", name, errno));
            }
        }
        for attribute in &self.extended {
            if present.contains(&attribute.name) && thing.has(attribute) {
                continue;
            }
            changed = true;
            thing.set(attribute).unwrap_or_else(|errno| warn("set", &attribute.name, errno));
        }
        Ok(changed)
    }
}
