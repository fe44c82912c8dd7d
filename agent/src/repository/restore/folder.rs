//! Folders below the target: how they are reached, and when they are finished.
//!
//! A folder is reached from the target by one `openat` a name, each refusing symlinks. Few are held open, so that
//! the number of descriptors does not grow with the tree. A folder gets its attributes when everything in it is
//! finished, whoever finishes the last of it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::Counters;
use super::attributes::{Attributes, Thing};
use super::report::{Context, Trouble};
use crate::format::Id;
use crate::platform::command::printable;

/// Deepest folder; a path of the kernel's has no more names.
pub(in crate::repository) const DEPTH_MAX: usize = 2048;
/// Folders that a thread holds open.
const OPEN_MAX: usize = 16;
/// How part files' names begin, before the number of [`Folder::salt`].
pub(super) const PART_PREFIX: &str = ".hestner-part-";

/// A folder below the target, or the target itself.
pub(super) struct Folder {
    parent: Option<Arc<Folder>>,
    name: Box<[u8]>,
    attributes: Option<Attributes>,
    /// It was made by this restore: nothing was in it.
    pub(super) is_fresh: bool,
    pub(super) depth: usize,
    /// A number with which no name in its tree looks like a part file's.
    pub(super) salt: AtomicUsize,
    /// What is not finished in it.
    pending: AtomicUsize,
}

impl Folder {
    pub(super) fn target() -> Arc<Self> {
        Arc::new(Self {
            parent: None,
            name: Box::default(),
            attributes: None,
            is_fresh: false,
            depth: 0,
            salt: AtomicUsize::new(0),
            pending: AtomicUsize::new(1),
        })
    }

    /// Makes a folder, or takes one that is there. The caller owes it a [`Self::release`].
    pub(super) fn make(
        parent: &Arc<Self>,
        name: Box<[u8]>,
        attributes: Attributes,
        hands: &mut Hands,
        context: &Context<'_>,
    ) -> Result<Arc<Self>, Trouble> {
        let path = || parent.path_of(&name);
        if parent.depth >= DEPTH_MAX {
            return Err(Trouble::Entry(format!("{}: folders are too deep", path())));
        }
        let at = hands.reach(parent).map_err(|errno| Trouble::of("open the folder of", path(), errno))?;
        let private = Mode::RWXU;
        let made = rustix::fs::mkdirat(&at, &*name, private);
        let is_fresh = match made {
            Ok(()) => true,
            Err(Errno::EXIST) => take(&at, &name, context).map_err(|errno| Trouble::of("make", path(), errno))?,
            Err(errno) => return Err(Trouble::of("make", path(), errno)),
        };
        parent.retain();
        Ok(Arc::new(Self {
            parent: Some(Arc::clone(parent)),
            depth: parent.depth + 1,
            salt: AtomicUsize::new(0),
            pending: AtomicUsize::new(1),
            attributes: Some(attributes),
            name,
            is_fresh,
        }))
    }

    /// Something in it is yet to be finished.
    pub(super) fn retain(&self) {
        self.pending.fetch_add(1, Ordering::Relaxed);
    }

    /// Something in it is finished. After the last it gets its attributes, and its own folder is told.
    pub(super) fn release(self: &Arc<Self>, hands: &mut Hands, context: &Context<'_>) -> Result<(), Trouble> {
        let mut folder = Arc::clone(self);
        while folder.pending.fetch_sub(1, Ordering::AcqRel) == 1 {
            let Some(parent) = folder.parent.clone() else { break };
            let finished = folder.finish(&parent, hands, context);
            context.survive(finished)?;
            folder = parent;
        }
        Ok(())
    }

    fn finish(&self, parent: &Arc<Self>, hands: &mut Hands, context: &Context<'_>) -> Result<(), Trouble> {
        let Some(attributes) = &self.attributes else { return Ok(()) };
        let path = || parent.path_of(&self.name);
        let failed = |errno| Trouble::of("open", path(), errno);
        let at = hands.reach(parent).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&at, &*self.name, flags, Mode::empty()).map_err(failed)?;
        attributes.apply(&Thing::Open(&opened), context, &path)?;
        Counters::add(&context.counters.others_done, 1);
        Ok(())
    }

    /// The name of the part file of a file in it: always the same, so that the next restore finds it.
    pub(super) fn part_name(&self, name: &[u8]) -> String {
        let digits = Id::of(name).to_hex();
        format!("{PART_PREFIX}{}-{}", self.salt.load(Ordering::Relaxed), digits.get(..24).unwrap_or_default())
    }

    /// An entry's path in the snapshot, for people.
    pub(super) fn path_of(&self, name: &[u8]) -> String {
        let mut names = vec![name];
        let mut folder = Some(self);
        while let Some(at) = folder.filter(|at| at.parent.is_some()) {
            names.push(&at.name);
            folder = at.parent.as_deref();
        }
        names.reverse();
        format!("/{}", printable(&names.join(&b'/')))
    }
}

/// Takes a folder that is there. Anything else in its place gives way: it is removed, not followed. Whether it is
/// made anew.
fn take(at: &OwnedFd, name: &[u8], context: &Context<'_>) -> Result<bool, Errno> {
    let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        rustix::fs::unlinkat(at, name, AtFlags::empty())?;
        rustix::fs::mkdirat(at, name, Mode::RWXU)?;
        return Ok(true);
    }
    if !context.is_root && stat.st_mode & 0o700 != 0o700 {
        // An earlier restore gave it its mode already.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(at, name, flags, Mode::empty())?;
        rustix::fs::chmod(
            super::attributes::own_descriptor(&folder),
            Mode::from_raw_mode(stat.st_mode & 0o7777 | 0o700),
        )?;
    }
    Ok(false)
}

/// A thread's open folders.
pub(super) struct Hands {
    target: Rc<OwnedFd>,
    /// The last used at the end.
    open: VecDeque<(Arc<Folder>, Rc<OwnedFd>)>,
}

impl Hands {
    pub(super) fn new(target: Rc<OwnedFd>) -> Self {
        Self { target, open: VecDeque::new() }
    }

    /// A descriptor of a folder, good for `*at` calls only.
    pub(super) fn reach(&mut self, folder: &Arc<Folder>) -> Result<Rc<OwnedFd>, Errno> {
        let mut steps = Vec::new();
        let mut from = folder;
        let mut at = loop {
            if let Some(found) = self.open.iter().rev().find(|(open, _)| Arc::ptr_eq(open, from)) {
                break Rc::clone(&found.1);
            }
            match &from.parent {
                None => break Rc::clone(&self.target),
                Some(parent) => {
                    steps.push(from);
                    from = parent;
                }
            }
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for step in steps.into_iter().rev() {
            at = Rc::new(rustix::fs::openat(&at, &*step.name, flags, Mode::empty())?);
            if self.open.len() >= OPEN_MAX {
                self.open.pop_front();
            }
            self.open.push_back((Arc::clone(step), Rc::clone(&at)));
        }
        Ok(at)
    }
}
