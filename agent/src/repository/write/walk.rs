//! The walk: folders are listed, sorted, and their entries handed to the workers in batches.
//!
//! A folder is opened by name in the folder above it and never through a link, so that nobody can lead the walk
//! elsewhere meanwhile; only the way to a path that an operator named may have links. The source's paths stand in
//! the snapshot with all folders above them, as restic has it. Sockets are left out, as restic does.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::Sender;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::format::Id;
use crate::format::tree::NodeKind;

use super::super::open::ArchiveError;
use super::entry::{attributes, file_type, node, open_at, path_of};
use super::folder::{Above, Folder};
use super::parent::{Known, Reader};
use super::pipeline::{Pipeline, Stop};
use super::step::step;
use super::tools::Tools;
use super::work::{Batch, Listed};
use super::{Files, Patterns};

/// Deepest folder: no restore makes a deeper one. One descriptor is held for each level.
const DEPTH_MAX: usize = super::super::restore::DEPTH_MAX;
const BATCH_ENTRIES: usize = 32;
pub(super) const LISTING_BYTES: usize = 32 * 1024;
pub(super) const CACHE_TAG: &[u8] = b"CACHEDIR.TAG";
/// How such a file must begin, <https://bford.info/cachedir/>.
const CACHE_SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// The source's paths, and the folders above them.
#[derive(Debug, Default)]
struct Named {
    /// It is a path of the source itself; what is below is found by walking.
    is_target: bool,
    below: BTreeMap<Vec<u8>, Named>,
}

/// A folder that is being walked.
struct Frame {
    folder: Arc<Folder>,
    handle: Arc<OwnedFd>,
    known: Option<Arc<Known>>,
    device: Option<u64>,
    /// Backwards, so that the next is at the end.
    listed: Vec<Listed>,
    batch: Vec<Listed>,
    /// Of a folder above the source's paths: nothing but them is in it.
    named: BTreeMap<Vec<u8>, Named>,
}

struct Walk<'w, 'p, 'a> {
    pipeline: &'p Pipeline<'a>,
    tools: &'w mut Tools,
    batches: &'w Sender<Batch>,
    reader: Reader<'p, 'a>,
    exclude: Patterns,
    one_file_system: bool,
    skip_caches: bool,
    targets: HashSet<PathBuf>,
    /// Those of them that were not there at the beginning; they are counted.
    missing: HashSet<PathBuf>,
    buffer: Vec<MaybeUninit<u8>>,
    frames: Vec<Frame>,
}

/// Walks all paths of a source.
pub(super) fn walk(
    pipeline: &Pipeline<'_>,
    tools: &mut Tools,
    files: Files,
    parent: Option<Id>,
    batches: &Sender<Batch>,
) -> Result<(), Stop> {
    let Files { paths, exclude, one_file_system, skip_caches, live: _ } = files;
    let root = name(&paths).map_err(|error| pipeline.fail(error))?;
    let mut missing = HashSet::new();
    for path in &paths {
        // A path that is not there is an error in a tree that lives, too: somebody named it.
        if let Err(error) = step().and_then(|()| rustix::fs::lstat(path)) {
            pipeline.unreadable(path, &error);
            missing.insert(path.clone());
        }
    }
    let mut walk = Walk {
        pipeline,
        tools,
        batches,
        reader: Reader::new(pipeline),
        exclude: Patterns::new(&exclude),
        one_file_system,
        skip_caches,
        targets: paths.into_iter().collect(),
        missing,
        buffer: vec![MaybeUninit::uninit(); LISTING_BYTES],
        frames: Vec::new(),
    };
    walk.begin(root, parent)?;
    walk.go()
}

/// The tree of the paths' names.
fn name(paths: &[PathBuf]) -> Result<Named, ArchiveError> {
    let mut root = Named::default();
    for path in paths {
        let mut at = &mut root;
        let mut components = path.components();
        if components.next() != Some(Component::RootDir) {
            return Err(ArchiveError::Broken(format!("the path {} is not absolute", path.display())));
        }
        for component in components {
            let Component::Normal(name) = component else {
                return Err(ArchiveError::Broken(format!("the path {} has a `..` in it", path.display())));
            };
            at = at.below.entry(name.as_bytes().to_vec()).or_default();
        }
        at.is_target = true;
    }
    Ok(root)
}

impl Walk<'_, '_, '_> {
    fn begin(&mut self, root: Named, parent: Option<Id>) -> Result<(), Stop> {
        let path = PathBuf::from("/");
        let known = self.reader.known(parent);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = step().and_then(|()| rustix::fs::open("/", flags, Mode::empty()));
        let opened = opened.and_then(|h| Ok((rustix::fs::fstat(&h)?, h)));
        let (stat, handle) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.pipeline.unreadable(&path, &error);
                return Ok(());
            }
        };
        let listed = if root.is_target { self.list(&handle, &path) } else { Ok(self.of_names(&root, &path)) };
        match listed {
            Ok(listed) => {
                let named = if root.is_target { BTreeMap::new() } else { root.below };
                self.enter(path, None, handle, known, &stat, listed, named)
            }
            Err(error) => {
                self.pipeline.unreadable(&path, &error);
                Ok(())
            }
        }
    }

    /// Goes on until all folders are done. The walk keeps its own stack: a tree may be deeper than a thread's.
    fn go(&mut self) -> Result<(), Stop> {
        while let Some(frame) = self.frames.last_mut() {
            self.pipeline.check()?;
            let Some(listed) = frame.listed.pop() else {
                self.flush()?;
                self.frames.pop();
                continue;
            };
            match frame.named.remove(&listed.name) {
                Some(named) if !named.is_target => self.enter_named(listed, named)?,
                _ if listed.kind == FileType::Directory => self.enter_folder(listed)?,
                _ if listed.kind == FileType::Unknown => self.look(listed)?,
                _ => {
                    frame.batch.push(listed);
                    if frame.batch.len() >= BATCH_ENTRIES {
                        self.flush()?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Hands the batch of the folder on top to the workers.
    fn flush(&mut self) -> Result<(), Stop> {
        let Some(frame) = self.frames.last_mut() else { return Ok(()) };
        if frame.batch.is_empty() {
            return Ok(());
        }
        let batch = Batch {
            folder: frame.folder.clone(),
            handle: frame.handle.clone(),
            known: frame.known.clone(),
            device: frame.device,
            entries: std::mem::take(&mut frame.batch),
        };
        // All workers are gone only if all of them panicked.
        self.batches.send(batch).map_err(|_| Stop)
    }

    /// An entry whose kind its listing does not say.
    fn look(&mut self, mut listed: Listed) -> Result<(), Stop> {
        let Some(frame) = self.frames.last_mut() else { return Ok(()) };
        let stat = rustix::fs::statat(&frame.handle, listed.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
        match step().and(stat) {
            Ok(stat) if file_type(&stat) == FileType::Directory => self.enter_folder(listed),
            Ok(stat) if file_type(&stat) == FileType::Socket => {
                let folder = frame.folder.clone();
                folder.bring(self.pipeline, self.tools, listed.slot, &[])
            }
            Ok(stat) => {
                listed.kind = file_type(&stat);
                frame.batch.push(listed);
                Ok(())
            }
            Err(error) => self.failed(&listed, error),
        }
    }

    fn failed(&mut self, listed: &Listed, error: Errno) -> Result<(), Stop> {
        let Some(frame) = self.frames.last() else { return Ok(()) };
        let folder = frame.folder.clone();
        let path = path_of(&folder.path, &listed.name);
        // Somebody named it: then it is no matter that it lives.
        match self.targets.contains(&path) {
            true if self.missing.contains(&path) => {}
            true => self.pipeline.unreadable(&path, &error),
            false => self.pipeline.entry_failed(&path, error),
        }
        folder.bring(self.pipeline, self.tools, listed.slot, &[])
    }

    fn enter_folder(&mut self, listed: Listed) -> Result<(), Stop> {
        let Some(frame) = self.frames.last() else { return Ok(()) };
        let path = path_of(&frame.folder.path, &listed.name);
        if self.frames.len() > DEPTH_MAX {
            self.pipeline.unreadable(&path, &format_args!("folders are deeper than {DEPTH_MAX}"));
            let folder = frame.folder.clone();
            return folder.bring(self.pipeline, self.tools, listed.slot, &[]);
        }
        let (home, is_target) = (frame.device, self.targets.contains(&path));
        let opened = open_at(frame.handle.as_fd(), &listed.name, OFlags::DIRECTORY);
        let opened = opened.and_then(|handle| step().and_then(|()| Ok((rustix::fs::fstat(&handle)?, handle))));
        let entered = opened.and_then(|(stat, handle)| {
            // What is mounted there stands in the snapshot as an empty folder, as restic has it.
            let elsewhere = !is_target && home.is_some_and(|device| device != stat.st_dev);
            let entries = if elsewhere { Vec::new() } else { self.list(&handle, &path)? };
            Ok((stat, attributes(handle.as_fd())?, handle, entries))
        });
        match entered {
            Ok((stat, attributes, handle, entries)) => {
                let known = self.known_below(&listed.name);
                self.enter(path, Some((listed, attributes)), handle, known, &stat, entries, BTreeMap::new())
            }
            Err(error) => self.failed(&listed, error),
        }
    }

    /// A folder above the source's paths: a link there is followed, and nothing else of it is taken.
    fn enter_named(&mut self, listed: Listed, named: Named) -> Result<(), Stop> {
        let Some(frame) = self.frames.last() else { return Ok(()) };
        let path = path_of(&frame.folder.path, &listed.name);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&frame.handle, listed.name.as_slice(), flags, Mode::empty());
        let opened = step().and(opened);
        let opened = opened.and_then(|handle| Ok((rustix::fs::fstat(&handle)?, attributes(handle.as_fd())?, handle)));
        match opened {
            Ok((stat, attributes, handle)) => {
                let known = self.known_below(&listed.name);
                let entries = self.of_names(&named, &path);
                self.enter(path, Some((listed, attributes)), handle, known, &stat, entries, named.below)
            }
            Err(error) => {
                self.pipeline.unreadable(&path, &error);
                let folder = frame.folder.clone();
                folder.bring(self.pipeline, self.tools, listed.slot, &[])
            }
        }
    }

    fn known_below(&mut self, name: &[u8]) -> Option<Arc<Known>> {
        let subtree = self.frames.last()?.known.as_ref()?.subtree(name);
        self.reader.known(subtree)
    }

    #[expect(clippy::too_many_arguments, reason = "a folder is what all of these say of it")]
    fn enter(
        &mut self,
        path: PathBuf,
        above: Option<(Listed, Vec<crate::format::tree::Attribute>)>,
        handle: OwnedFd,
        known: Option<Arc<Known>>,
        stat: &Stat,
        listed: Vec<Listed>,
        named: BTreeMap<Vec<u8>, Named>,
    ) -> Result<(), Stop> {
        let home = self.frames.last().and_then(|frame| frame.device);
        // The first folder that is a path of the source says which filesystem is its home.
        let device = (self.one_file_system && (named.is_empty() || home.is_some()))
            .then(|| if self.targets.contains(&path) { stat.st_dev } else { home.unwrap_or(stat.st_dev) });
        let above = above.zip(self.frames.last()).map(|((listed, attributes), frame)| {
            let kind = NodeKind::Folder { subtree: Id::from_bytes([0; Id::BYTES]) };
            let node = node(&listed.name, stat, kind, attributes, &self.pipeline.names);
            Above { folder: frame.folder.clone(), slot: listed.slot, node }
        });
        let folder = Folder::new(path, above, listed.len());
        if listed.is_empty() {
            return folder.close_empty(self.pipeline, self.tools);
        }
        let handle = Arc::new(handle);
        self.frames.push(Frame { folder, handle, known, device, listed, batch: Vec::new(), named });
        Ok(())
    }

    /// The names below a folder above the source's paths, sorted backwards.
    fn of_names(&self, named: &Named, path: &Path) -> Vec<Listed> {
        let names = named.below.keys().filter(|name| !self.exclude.leave_out(&path_of(path, name)));
        let mut found: Vec<_> =
            names.map(|name| Listed { slot: 0, name: name.clone(), kind: FileType::Unknown }).collect();
        number(&mut found);
        found
    }

    /// The entries of a folder that are to be stored, sorted backwards.
    fn list(&mut self, handle: &OwnedFd, path: &Path) -> Result<Vec<Listed>, Errno> {
        let mut found = Vec::new();
        let mut entries = RawDir::new(handle, &mut self.buffer);
        step()?;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let (name, kind) = (entry.file_name().to_bytes(), entry.file_type());
            if name != b"." && name != b".." && kind != FileType::Socket {
                found.push(Listed { slot: 0, name: name.to_vec(), kind });
            }
        }
        if self.skip_caches && found.iter().any(|entry| entry.name == CACHE_TAG) && has_cache_tag(handle) {
            found.retain(|entry| entry.name == CACHE_TAG);
        }
        if !self.exclude.is_empty() {
            found.retain(|entry| !self.exclude.leave_out(&path.join(OsStr::from_bytes(&entry.name))));
        }
        number(&mut found);
        Ok(found)
    }
}

/// Sorts entries, says which is where in the tree, and turns them round.
fn number(entries: &mut [Listed]) {
    entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    for (slot, entry) in entries.iter_mut().enumerate() {
        entry.slot = slot;
    }
    entries.reverse();
}

pub(super) fn has_cache_tag(folder: &OwnedFd) -> bool {
    let read = open_at(folder.as_fd(), CACHE_TAG, OFlags::empty()).and_then(|file| {
        let mut begin = [0_u8; CACHE_SIGNATURE.len()];
        let read = rustix::io::read(&file, &mut begin)?;
        Ok(begin.get(..read) == Some(CACHE_SIGNATURE))
    });
    // One that cannot be read is met again as an entry.
    read.unwrap_or(false)
}
