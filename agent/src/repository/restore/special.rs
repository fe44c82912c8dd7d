//! Symlinks, devices, pipes and sockets; and how a new entry takes the place of an old one.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::Counters;
use super::attributes::{Attributes, Thing};
use super::folder::{Folder, Hands};
use super::report::{Context, Trouble};
use crate::format::tree::NodeKind;

/// Makes an entry that is no file and no folder. Whether it is there: a device that this user may not make is told
/// as a warning.
pub(super) fn make(
    folder: &Arc<Folder>,
    name: &[u8],
    kind: &NodeKind,
    attributes: &Attributes,
    hands: &mut Hands,
    context: &Context<'_>,
) -> Result<bool, Trouble> {
    let path = || folder.path_of(name);
    let at = hands.reach(folder).map_err(|errno| Trouble::of("open the folder of", path(), errno))?;
    if folder.is_fresh || !stands(&at, name, kind) {
        match put(folder, &at, name, |at, name| make_at(at, name, kind)) {
            Ok(()) => {}
            Err(Errno::PERM | Errno::ACCESS) if !matches!(kind, NodeKind::Symlink { .. }) => {
                context.warn(format!("{}: this user may not make a device, pipe or socket", path()));
                return Ok(false);
            }
            Err(errno) => return Err(Trouble::of("make", path(), errno)),
        }
    }
    attributes.apply(&Thing::Named(&at, name), context, &path)?;
    Counters::add(&context.counters.others_done, 1);
    Ok(true)
}

fn special_of(kind: &NodeKind) -> Option<(FileType, u64)> {
    match kind {
        NodeKind::BlockDevice { device } => Some((FileType::BlockDevice, *device)),
        NodeKind::CharDevice { device } => Some((FileType::CharacterDevice, *device)),
        NodeKind::Fifo => Some((FileType::Fifo, 0)),
        NodeKind::Socket => Some((FileType::Socket, 0)),
        NodeKind::Symlink { .. } | NodeKind::File { .. } | NodeKind::Folder { .. } => None,
    }
}

fn make_at(at: &OwnedFd, name: &[u8], kind: &NodeKind) -> Result<(), Errno> {
    match (kind, special_of(kind)) {
        (NodeKind::Symlink { target }, _) => rustix::fs::symlinkat(target, at, name),
        (_, Some((file_type, device))) => rustix::fs::mknodat(at, name, file_type, Mode::RUSR | Mode::WUSR, device),
        _ => Err(Errno::INVAL),
    }
}

/// Whether it is there already.
fn stands(at: &OwnedFd, name: &[u8], kind: &NodeKind) -> bool {
    if let NodeKind::Symlink { target } = kind {
        return rustix::fs::readlinkat(at, name, Vec::new()).is_ok_and(|found| found.as_bytes() == target);
    }
    let Ok(stat) = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) else { return false };
    let has_device = matches!(kind, NodeKind::BlockDevice { .. } | NodeKind::CharDevice { .. });
    special_of(kind).is_some_and(|(file_type, device)| {
        FileType::from_raw_mode(stat.st_mode) == file_type && (!has_device || stat.st_rdev == device)
    })
}

/// Makes an entry under its name. If something stands there it is made beside, and takes the place in one step.
pub(super) fn put(
    folder: &Folder,
    at: &OwnedFd,
    name: &[u8],
    make: impl Fn(&OwnedFd, &[u8]) -> Result<(), Errno>,
) -> Result<(), Errno> {
    match make(at, name) {
        Err(Errno::EXIST) => {}
        made => return made,
    }
    let part = folder.part_name(name);
    clear(at, part.as_bytes())?;
    make(at, part.as_bytes())?;
    take_place(at, part.as_bytes(), name)
}

/// Gives a part its final name. An empty folder in its way is removed; one that holds something is not.
pub(super) fn take_place(at: &OwnedFd, part: &[u8], name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::renameat(at, part, at, name) {
        Err(Errno::ISDIR) => {
            rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR)?;
            rustix::fs::renameat(at, part, at, name)
        }
        renamed => renamed,
    }
}

/// Removes what an earlier restore left.
pub(super) fn clear(at: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::unlinkat(at, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR),
        removed => removed,
    }
}
