//! The restore path: a snapshot's tree below a target folder.
//!
//! In: where blobs can be had ([`Blobs`]), the id of a tree, and a folder that exists. Out: the tree below that
//! folder, or an error that says how much is missing and names what and why. The calls block.
//!
//! One thread walks the trees (`walk`): it makes folders, symlinks, devices and pipes at once, and cuts what files
//! need into windows of some 8 MiB. Workers (`window`) take window after window: they compare what is there already,
//! fetch what is missing in ranges of packs, each range once a window, check every piece against its name, and
//! write it. Memory is bounded by the windows in work, whatever the number and size of files; beside them only a
//! folder's own tree, the list of a file's pieces, and hard links whose other names were not met yet are held.
//!
//! **Nothing wrong stands under a final name.** A file grows under a name of its own beside
//! (`.hestner-part-...`), and gets its name when every piece is there, with its attributes. Writing in place
//! would be a little cheaper, but a restore that was killed would leave a file that looks whole and is not. The
//! part file stays when a restore ends early, and the next one compares it piece by piece and goes on from there.
//! A file that has its final name already is compared as well: if nothing differs it is left, otherwise it
//! becomes the part file first.
//!
//! **Nothing outside the target.** Every step goes from an open descriptor of a folder below the target to one
//! name in it, and never through a symlink. What stands in the way is replaced, not followed; only a folder with
//! something in it is not replaced by a file. Trees with names that lead elsewhere, or two entries of one name,
//! are refused.
//!
//! What this user may not set (owners, devices, attributes) is told as a warning. Set-id bits without their
//! owner are never set. Whatever stands in the target but not in the tree stays.

mod attributes;
mod blobs;
mod file;
mod folder;
mod links;
mod report;
mod special;
mod walk;
mod window;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};

pub use blobs::{Blobs, Reader, TreeReader};
pub(super) use folder::DEPTH_MAX;
pub(super) use report::chain;
pub use report::{Notes, RestoreError};

use crate::format::Id;
use folder::Hands;
use report::{Context, Trouble};

/// Workers if nobody says otherwise: beyond that a local disk gains nothing, and each holds a window.
const THREADS_DEFAULT_MAX: usize = 4;
/// Most workers.
const THREADS_MAX: usize = 64;

/// How to restore.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only these paths of the snapshot and what lies below them, such as `/srv/data`; everything if it is empty.
    pub include: Vec<PathBuf>,
    /// Workers; 0 chooses by the machine. Each takes about 16 MiB at most.
    pub threads: usize,
}

/// How far a restore is; others may read it at any time.
#[derive(Debug, Default)]
pub struct Counters {
    /// Files whose size is known so far; the walk is only a little ahead of the writing.
    pub files_found: AtomicU64,
    /// Their bytes.
    pub bytes_found: AtomicU64,
    /// Files that have their final name and attributes.
    pub files_done: AtomicU64,
    /// Bytes that are in place, written or found.
    pub bytes_done: AtomicU64,
    /// Of those, bytes that were there before.
    pub bytes_kept: AtomicU64,
    /// Read from packs.
    pub bytes_fetched: AtomicU64,
    /// Folders, symlinks, devices and pipes.
    pub others_done: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, number: u64) {
        counter.fetch_add(number, Ordering::Relaxed);
    }
}

/// A restore that ended well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of those, bytes that were there before.
    pub bytes_kept: u64,
    /// What this user or this filesystem could not set.
    pub warnings: Notes,
}

/// Restores a tree below `target`, which must be a folder. All of it is on the disk when this returns.
///
/// # Errors
/// [`RestoreError::Incomplete`] when entries could not be restored: every other one was.
/// [`RestoreError::Cancelled`] soon after `cancel` became true. Otherwise what ended it early, such as no room. After
/// any of them it can be called again, and goes on with what is missing.
pub fn restore(
    blobs: &dyn Blobs,
    tree: Id,
    target: &Path,
    options: &Options,
    counters: &Counters,
    cancel: &AtomicBool,
) -> Result<Restored, RestoreError> {
    let failed = |operation: &'static str| {
        move |error: rustix::io::Errno| RestoreError::Target {
            operation,
            path: target.to_string_lossy().into_owned(),
            source: error.into(),
        }
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(target, flags, Mode::empty()).map_err(failed("open"))?;
    let context = Context::new(blobs, counters, cancel);
    let threads = match options.threads {
        0 => std::thread::available_parallelism().map_or(2, usize::from).clamp(2, THREADS_DEFAULT_MAX),
        asked => asked.min(THREADS_MAX),
    };
    let walked = run(&context, &root, tree, options, threads);
    context.end(walked)?;
    // Errors of writing behind come to light here at the latest.
    rustix::fs::syncfs(&root).map_err(failed("sync"))?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    Ok(Restored {
        files: count(&counters.files_done),
        bytes: count(&counters.bytes_done),
        bytes_kept: count(&counters.bytes_kept),
        warnings: context.warnings(),
    })
}

fn run(context: &Context<'_>, root: &OwnedFd, tree: Id, options: &Options, threads: usize) -> Result<(), Trouble> {
    // As many windows wait as are in work.
    let (sender, receiver) = crossbeam_channel::bounded(threads);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let receiver = receiver.clone();
            let worker = move || {
                let worked = hands(root).and_then(|mut hands| {
                    receiver.iter().try_for_each(|window| window::work(window, &mut hands, context))
                });
                if let Err(trouble) = worked {
                    context.abort(trouble);
                }
            };
            let thread = std::thread::Builder::new().name("restore".to_owned()).spawn_scoped(scope, worker);
            if let Err(error) = thread {
                return Err(Trouble::fatal("start a thread for", "restore", error));
            }
        }
        drop(receiver);
        walk::walk(context, &mut hands(root)?, tree, &options.include, sender)
    })
}

fn hands(root: &OwnedFd) -> Result<Hands, Trouble> {
    let root = root.try_clone().map_err(|error| Trouble::fatal("open", "the target", error))?;
    Ok(Hands::new(Rc::new(root)))
}

#[cfg(test)]
pub(super) mod tests;
