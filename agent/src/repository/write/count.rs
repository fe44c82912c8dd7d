//! How big a source is: a walk that only looks, beside the one that stores, so that there is a whole to be a part of.
//!
//! It leaves out what the store leaves out, opens nothing but folders, and is nobody's business when it fails: a source
//! that cannot be counted has no known size, and what cannot be read is the store's to say.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, FileType, OFlags, RawDir};
use rustix::io::Errno;

use super::entry::{file_type, open_at, path_of};
use super::walk::{CACHE_TAG, LISTING_BYTES, has_cache_tag};
use super::{Files, Patterns};

/// What a source holds, as far as it was counted.
#[derive(Debug, Default)]
pub struct Totals {
    bytes: AtomicU64,
    files: AtomicU64,
    is_whole: AtomicBool,
    stop: AtomicBool,
}

impl Totals {
    /// Bytes and files, as soon as all of it was counted.
    pub fn known(&self) -> Option<(u64, u64)> {
        let is_whole = self.is_whole.load(Ordering::Acquire);
        is_whole.then(|| (self.bytes.load(Ordering::Relaxed), self.files.load(Ordering::Relaxed)))
    }

    /// Nobody needs it any more.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Frame {
    handle: OwnedFd,
    path: PathBuf,
    folders: Vec<Vec<u8>>,
}

struct Count<'c> {
    totals: &'c Totals,
    exclude: Patterns,
    skip_caches: bool,
    one_file_system: bool,
    buffer: Vec<MaybeUninit<u8>>,
    targets: HashSet<&'c Path>,
}

/// Counts a source until it is done or told to stop. An entry that cannot be looked at is left out.
pub fn count(files: &Files, totals: &Totals) {
    let mut count = Count {
        totals,
        exclude: Patterns::new(&files.exclude),
        skip_caches: files.skip_caches,
        one_file_system: files.one_file_system,
        buffer: vec![MaybeUninit::uninit(); LISTING_BYTES],
        targets: files.paths.iter().map(PathBuf::as_path).collect(),
    };
    for path in &files.paths {
        // What lies below another path of the source is met there.
        let is_met = path.ancestors().skip(1).any(|above| count.targets.contains(above));
        if !is_met && count.target(path).is_none() {
            return;
        }
    }
    totals.is_whole.store(true, Ordering::Release);
}

impl Count<'_> {
    /// `None`: told to stop.
    fn target(&mut self, path: &Path) -> Option<()> {
        let Ok(stat) = rustix::fs::lstat(path) else { return Some(()) };
        if file_type(&stat) != FileType::Directory {
            self.add(&stat);
            return Some(());
        }
        let device = self.one_file_system.then_some(stat.st_dev);
        let begin = open_at(CWD, path.as_os_str().as_bytes(), OFlags::DIRECTORY);
        let mut frames: Vec<Frame> = begin.and_then(|handle| self.enter(handle, path.to_owned())).into_iter().collect();
        while let Some(frame) = frames.last_mut() {
            if self.totals.stop.load(Ordering::Relaxed) {
                return None;
            }
            let Some(name) = frame.folders.pop() else {
                frames.pop();
                continue;
            };
            let path = path_of(&frame.path, &name);
            let opened = open_at(frame.handle.as_fd(), &name, OFlags::DIRECTORY);
            let opened = opened.and_then(|handle| Ok((rustix::fs::fstat(&handle)?, handle)));
            let home = opened.ok().filter(|(stat, _)| device.is_none_or(|device| device == stat.st_dev));
            frames.extend(home.and_then(|(_, handle)| self.enter(handle, path).ok()));
        }
        Some(())
    }

    fn add(&self, stat: &rustix::fs::Stat) {
        if file_type(stat) == FileType::RegularFile {
            self.totals.files.fetch_add(1, Ordering::Relaxed);
            self.totals.bytes.fetch_add(stat.st_size.cast_unsigned(), Ordering::Relaxed);
        }
    }

    /// Adds the files of a folder, and keeps the names of the folders in it.
    fn enter(&mut self, handle: OwnedFd, path: PathBuf) -> Result<Frame, Errno> {
        let mut listed = Vec::new();
        let mut entries = RawDir::new(&handle, &mut self.buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                listed.push((name.to_vec(), entry.file_type()));
            }
        }
        if self.skip_caches && listed.iter().any(|(name, _)| name == CACHE_TAG) && has_cache_tag(&handle) {
            listed.retain(|(name, _)| name == CACHE_TAG);
        }
        let mut folders = Vec::new();
        for (name, kind) in listed {
            if !self.exclude.is_empty() && self.exclude.leave_out(&path.join(OsStr::from_bytes(&name))) {
                continue;
            }
            match kind {
                FileType::Directory => folders.push(name),
                FileType::RegularFile | FileType::Unknown => {
                    let Ok(stat) = rustix::fs::statat(&handle, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) else {
                        continue;
                    };
                    self.add(&stat);
                    if file_type(&stat) == FileType::Directory {
                        folders.push(name);
                    }
                }
                _ => {}
            }
        }
        Ok(Frame { handle, path, folders })
    }
}
