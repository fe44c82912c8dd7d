//! A file on its way: what stands there already, the part file it grows in, and its end.
//!
//! No descriptor is kept between two steps, so that their number does not grow with the files in work.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::Counters;
use super::attributes::{Attributes, Thing};
use super::folder::{Folder, Hands};
use super::links::First;
use super::report::{Context, Trouble};
use super::special;
use crate::format::Id;

/// Runs of zeros of at least this length, on such a boundary, become holes.
const HOLE_BYTES: usize = 4096;
static ZEROS: [u8; HOLE_BYTES] = [0; HOLE_BYTES];

/// What stands at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// Nobody looked yet.
    Unknown,
    /// Nothing that is of use.
    Nothing,
    /// A part file; whether this restore made it, so that nothing in it needs to be compared.
    Part { is_new: bool },
    /// A file under the final name.
    Final,
    /// A file under the final name that has other names as well, and the right content: it was compared as a
    /// whole, because a file that others share is never changed in place.
    Same,
}

/// What pieces are compared with.
pub(super) enum Base {
    Nothing,
    /// Everything is right.
    Same,
    Bytes(File),
}

/// A file of the tree.
pub(super) struct Growing {
    pub(super) folder: Arc<Folder>,
    pub(super) name: Box<[u8]>,
    pub(super) size: u64,
    /// Its pieces, and how long each is.
    pub(super) content: Vec<(Id, u32)>,
    attributes: Attributes,
    first: Option<Arc<First>>,
    stand: Mutex<Stand>,
    /// Windows that have a part of it, and the walk while it makes them.
    owed: AtomicUsize,
    has_failed: AtomicBool,
}

fn failed_at<'a>(operation: &'static str, path: impl Fn() -> String + 'a) -> impl Fn(Errno) -> Trouble + 'a {
    move |errno| Trouble::of(operation, path(), errno)
}

impl Growing {
    /// One file more that its folder waits for. The caller owes it one [`Self::settle`].
    pub(super) fn new(
        folder: &Arc<Folder>,
        name: Box<[u8]>,
        size: u64,
        content: Vec<(Id, u32)>,
        attributes: Attributes,
        first: Option<Arc<First>>,
    ) -> Arc<Self> {
        folder.retain();
        Arc::new(Self {
            folder: Arc::clone(folder),
            name,
            size,
            content,
            attributes,
            first,
            stand: Mutex::new(Stand::Unknown),
            owed: AtomicUsize::new(1),
            has_failed: AtomicBool::new(false),
        })
    }

    pub(super) fn path(&self) -> String {
        self.folder.path_of(&self.name)
    }

    pub(super) fn owe(&self) {
        self.owed.fetch_add(1, Ordering::Relaxed);
    }

    fn stand(&self) -> MutexGuard<'_, Stand> {
        self.stand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some of it cannot be had. The first reason is told.
    pub(super) fn fail(&self, reason: &str, context: &Context<'_>) {
        if !self.has_failed.swap(true, Ordering::AcqRel) {
            context.fail(format!("{}: {reason}", self.path()));
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Acquire)
    }

    /// What its pieces are compared with.
    pub(super) fn base(&self, hands: &mut Hands, context: &Context<'_>) -> Result<Base, Trouble> {
        let failed = failed_at("open", || self.path());
        let mut stand = self.stand();
        if self.folder.is_fresh && *stand == Stand::Unknown {
            *stand = Stand::Nothing;
        }
        if matches!(*stand, Stand::Nothing | Stand::Part { is_new: true }) {
            return Ok(Base::Nothing);
        }
        let at = hands.reach(&self.folder).map_err(&failed)?;
        if *stand == Stand::Unknown {
            *stand = self.look(&at, context)?;
        }
        let opened = match *stand {
            Stand::Part { is_new: false } => open_file(&at, self.folder.part_name(&self.name).as_bytes()),
            Stand::Final => open_file(&at, &self.name),
            Stand::Same => return Ok(Base::Same),
            _ => return Ok(Base::Nothing),
        };
        match opened {
            Ok(file) => Ok(Base::Bytes(file)),
            // Its mode keeps this user from reading it: it is written anew.
            Err(Errno::ACCESS | Errno::PERM) => {
                *stand = Stand::Nothing;
                Ok(Base::Nothing)
            }
            Err(errno) => Err(failed(errno)),
        }
    }

    fn look(&self, at: &OwnedFd, context: &Context<'_>) -> Result<Stand, Trouble> {
        let regular = |name: &[u8]| -> Option<Stat> {
            let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
            (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(stat)
        };
        if regular(self.folder.part_name(&self.name).as_bytes()).is_some_and(|stat| stat.st_nlink == 1) {
            return Ok(Stand::Part { is_new: false });
        }
        match regular(&self.name) {
            Some(stat) if stat.st_nlink == 1 => Ok(Stand::Final),
            Some(stat) if stat.st_size.cast_unsigned() == self.size && self.is_same(at, context)? => Ok(Stand::Same),
            _ => Ok(Stand::Nothing),
        }
    }

    fn is_same(&self, at: &OwnedFd, context: &Context<'_>) -> Result<bool, Trouble> {
        let Ok(file) = open_file(at, &self.name) else { return Ok(false) };
        let mut offset = 0;
        let mut buffer = Vec::new();
        for (id, length) in &self.content {
            context.go_on()?;
            if !holds(&file, offset, id, *length, &mut buffer) {
                return Ok(false);
            }
            offset += u64::from(*length);
        }
        Ok(true)
    }

    /// The part file, to write to.
    pub(super) fn part(&self, hands: &mut Hands) -> Result<OwnedFd, Trouble> {
        let failed = failed_at("make", || self.path());
        let at = hands.reach(&self.folder).map_err(&failed)?;
        let part = self.folder.part_name(&self.name);
        let mut stand = self.stand();
        if *stand == Stand::Final {
            rustix::fs::renameat(&at, &*self.name, &at, &part).map_err(&failed)?;
            *stand = Stand::Part { is_new: false };
        }
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        if let Stand::Part { .. } = *stand {
            match rustix::fs::openat(&at, &part, flags | OFlags::NONBLOCK, Mode::empty()) {
                Err(Errno::ACCESS | Errno::PERM) => {
                    // It was read; so it is ours, and only its mode is in the way.
                    let held = rustix::fs::openat(
                        &at,
                        &part,
                        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                        Mode::empty(),
                    );
                    let held = held.map_err(&failed)?;
                    let ours = Mode::RUSR | Mode::WUSR;
                    rustix::fs::chmod(super::attributes::own_descriptor(&held), ours).map_err(&failed)?;
                    return rustix::fs::openat(&at, &part, flags, Mode::empty()).map_err(&failed);
                }
                opened => return opened.map_err(&failed),
            }
        }
        if !self.folder.is_fresh {
            special::clear(&at, part.as_bytes()).map_err(&failed)?;
        }
        let new = flags | OFlags::CREATE | OFlags::EXCL;
        let made = rustix::fs::openat(&at, &part, new, Mode::RUSR | Mode::WUSR).map_err(&failed)?;
        *stand = Stand::Part { is_new: true };
        Ok(made)
    }

    /// Whether what is not written reads as zeros.
    pub(super) fn is_new(&self) -> bool {
        *self.stand() == Stand::Part { is_new: true }
    }

    /// One window, or the walk, is through with it. The last one gives it its attributes and its name.
    pub(super) fn settle(
        &self,
        open: Option<OwnedFd>,
        hands: &mut Hands,
        context: &Context<'_>,
    ) -> Result<(), Trouble> {
        if self.owed.fetch_sub(1, Ordering::AcqRel) != 1 {
            return Ok(());
        }
        let ended = match self.has_failed() {
            true => Err(Trouble::Entry(String::new())),
            false => self.finish(open, hands, context),
        };
        let is_whole = match ended {
            Ok(()) => {
                Counters::add(&context.counters.files_done, 1);
                true
            }
            Err(Trouble::Entry(reason)) => {
                // Told already if it failed before.
                if !self.has_failed.swap(true, Ordering::AcqRel) {
                    context.fail(reason);
                }
                false
            }
            Err(fatal) => return Err(fatal),
        };
        if let Some(first) = &self.first {
            first.end(is_whole, hands, context)?;
        }
        self.folder.release(hands, context)
    }

    fn finish(&self, open: Option<OwnedFd>, hands: &mut Hands, context: &Context<'_>) -> Result<(), Trouble> {
        let path = || self.path();
        let failed = failed_at("finish", path);
        if *self.stand() == Stand::Unknown {
            // It is empty, so that no piece of it was looked at.
            self.base(hands, context)?;
        }
        let stand = *self.stand();
        let mut file = match (stand, open) {
            (Stand::Final | Stand::Same, _) => {
                let at = hands.reach(&self.folder).map_err(&failed)?;
                open_file(&at, &self.name).map_err(&failed)?.into()
            }
            (_, Some(open)) => open,
            (_, None) => self.part(hands)?,
        };
        let length = |file: &OwnedFd| rustix::fs::fstat(file).map(|stat| stat.st_size.cast_unsigned());
        if length(&file).map_err(&failed)? != self.size {
            if stand == Stand::Final {
                file = self.part(hands)?;
            }
            rustix::fs::ftruncate(&file, self.size).map_err(&failed)?;
        }
        self.attributes.apply(&Thing::Open(&file), context, &path)?;
        if let Stand::Part { .. } = *self.stand() {
            let at = hands.reach(&self.folder).map_err(&failed)?;
            let part = self.folder.part_name(&self.name);
            special::take_place(&at, part.as_bytes(), &self.name).map_err(&failed)?;
        }
        Ok(())
    }
}

/// Opens a regular file to read, and nothing else: a pipe must not hold us up.
fn open_file(at: &OwnedFd, name: &[u8]) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(at, name, flags, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file.into()),
        _ => Err(Errno::INVAL),
    }
}

/// Whether a piece stands where it belongs.
pub(super) fn holds(file: &File, offset: u64, id: &Id, length: u32, buffer: &mut Vec<u8>) -> bool {
    buffer.resize(length as usize, 0);
    file.read_exact_at(buffer, offset).is_ok() && Id::of(buffer) == *id
}

/// Writes a piece; runs of zeros are left out, or become holes where something stood.
pub(super) fn write_sparse(file: &OwnedFd, offset: u64, bytes: &[u8], is_new: bool) -> Result<(), Errno> {
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let is_hole = is_zero(bytes, offset, at);
        while at < bytes.len() && is_zero(bytes, offset, at) == is_hole {
            at += block(bytes, offset, at);
        }
        let run = bytes.get(start..at).unwrap_or_default();
        let begin = offset + start as u64;
        match (is_hole, is_new) {
            (true, true) => {}
            (true, false) => dig(file, begin, run)?,
            (false, _) => write_all(file, begin, run)?,
        }
    }
    Ok(())
}

/// Bytes to the next boundary.
fn block(bytes: &[u8], offset: u64, at: usize) -> usize {
    let beyond = usize::try_from((offset + at as u64) % HOLE_BYTES as u64).unwrap_or(0);
    (HOLE_BYTES - beyond).min(bytes.len() - at)
}

fn is_zero(bytes: &[u8], offset: u64, at: usize) -> bool {
    let length = block(bytes, offset, at);
    bytes.get(at..at + length) == ZEROS.get(..length)
}

fn dig(file: &OwnedFd, begin: u64, run: &[u8]) -> Result<(), Errno> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, mode, begin, run.len() as u64) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => write_all(file, begin, run),
        dug => dug,
    }
}

fn write_all(file: &OwnedFd, mut begin: u64, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, begin) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => {
                begin += written as u64;
                bytes = bytes.get(written..).unwrap_or_default();
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
