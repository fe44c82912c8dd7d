//! The walk over a snapshot's trees: folders are entered depth first, what is no file is made at once, and files
//! are put into windows for the workers.
//!
//! Of a folder that is open only the subfolders yet to be entered are held, never all of its nodes.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;

use super::Counters;
use super::attributes::Attributes;
use super::blobs::{TreeReader, unknown};
use super::file::Growing;
use super::folder::{Folder, Hands, PART_PREFIX};
use super::links::{Links, Place};
use super::report::{Context, RestoreError, Trouble, chain};
use super::special;
use super::window::{Filler, Window};
use crate::format::crypto::OVERHEAD_BYTES;
use crate::format::tree::{self, Node, NodeKind};
use crate::format::{BlobKind, Id};
use crate::platform::command::printable;

/// Longest piece of a file that is taken; restic's and ours have at most 8 MiB. It bounds what a worker holds.
const PIECE_BYTES_MAX: u32 = 64 * 1024 * 1024;

/// Which of a folder's entries are wanted.
#[derive(Clone)]
enum Wanted {
    Everything,
    /// Those on the way to these of the included paths.
    TowardsSome(Vec<usize>),
}

struct Subfolder {
    name: Box<[u8]>,
    tree: Id,
    attributes: Attributes,
    wanted: Wanted,
}

struct Level {
    folder: Arc<Folder>,
    subfolders: std::vec::IntoIter<Subfolder>,
}

/// Entries that may stand in folders which were met before, beside [`REPEATS_MAX`] times all others.
const REPEATED_MIN: u64 = 2_000;
/// How often a folder may stand in the tree, on average: what is mounted twice in a source does.
const REPEATS_MAX: u64 = 8;

/// Counts entries of folders that stand in the tree more than once. A tree that names one folder twice, which names
/// another twice, and so on, is small to store and without end to restore.
#[derive(Default)]
struct Repeats {
    /// The first bytes of the trees met so far: enough to tell them apart, and a quarter of their memory.
    met: HashSet<u64>,
    new: u64,
    repeated: u64,
}

impl Repeats {
    /// Whether a tree was met before.
    fn meet(&mut self, tree: &Id) -> bool {
        let begin = tree.as_bytes().first_chunk().copied().unwrap_or_default();
        !self.met.insert(u64::from_le_bytes(begin))
    }

    /// One entry of it.
    fn count(&mut self, is_repeated: bool) -> Result<(), Trouble> {
        let counter = if is_repeated { &mut self.repeated } else { &mut self.new };
        *counter += 1;
        match self.repeated > REPEATED_MIN.saturating_add(self.new.saturating_mul(REPEATS_MAX)) {
            true => Err(Trouble::Fatal(RestoreError::Endless { entries: self.new + self.repeated, new: self.new })),
            false => Ok(()),
        }
    }
}

struct Walk<'w, 'a> {
    context: &'w Context<'a>,
    hands: &'w mut Hands,
    trees: TreeReader<'w>,
    links: Links,
    filler: Filler,
    windows: Sender<Window>,
    include: Vec<Include>,
    repeats: Repeats,
}

struct Include {
    path: String,
    names: Vec<Vec<u8>>,
    is_found: bool,
}

/// Walks everything below a root tree, and returns when every window is given to the workers.
pub(super) fn walk(
    context: &Context<'_>,
    hands: &mut Hands,
    tree: Id,
    include: &[PathBuf],
    windows: Sender<Window>,
) -> Result<(), Trouble> {
    let include: Vec<Include> = include.iter().map(|path| included(path)).collect::<Result<_, _>>()?;
    let wanted = match include.iter().all(|include| !include.names.is_empty()) && !include.is_empty() {
        true => Wanted::TowardsSome((0..include.len()).collect()),
        false => Wanted::Everything,
    };
    let trees = TreeReader::new(context.blobs);
    let (links, filler, repeats) = (Links::default(), Filler::default(), Repeats::default());
    let mut walk = Walk { context, hands, trees, links, filler, windows, include, repeats };
    let target = Folder::target();
    let mut levels = vec![walk.enter(target, tree, wanted)?];
    while let Some(level) = levels.last_mut() {
        context.go_on()?;
        let Some(sub) = level.subfolders.next() else {
            level.folder.release(walk.hands, context)?;
            levels.pop();
            continue;
        };
        match Folder::make(&level.folder, sub.name, sub.attributes, walk.hands, context) {
            Ok(folder) => levels.push(walk.enter(folder, sub.tree, sub.wanted)?),
            other => context.survive(other.map(drop))?,
        }
    }
    if let Some(window) = std::mem::take(&mut walk.filler).rest() {
        walk.send(window)?;
    }
    match walk.include.iter().find(|include| !include.is_found && !include.names.is_empty()) {
        Some(missing) => Err(Trouble::Fatal(RestoreError::NotFound(missing.path.clone()))),
        None => Ok(()),
    }
}

/// A path as names below the root; what is not a plain path is refused.
fn included(path: &Path) -> Result<Include, Trouble> {
    use std::path::Component;
    let shown = printable(path.as_os_str().as_bytes());
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => names.push(name.as_bytes().to_vec()),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(Trouble::Fatal(RestoreError::NotFound(shown))),
        }
    }
    Ok(Include { path: shown, names, is_found: false })
}

impl Walk<'_, '_> {
    /// Restores what a folder holds, except its subfolders.
    fn enter(&mut self, folder: Arc<Folder>, tree: Id, wanted: Wanted) -> Result<Level, Trouble> {
        let mut subfolders = Vec::new();
        let entered = self.entries(&folder, &tree, &wanted, &mut subfolders);
        self.context.survive(entered)?;
        Ok(Level { folder, subfolders: subfolders.into_iter() })
    }

    fn entries(
        &mut self,
        folder: &Arc<Folder>,
        id: &Id,
        wanted: &Wanted,
        subfolders: &mut Vec<Subfolder>,
    ) -> Result<(), Trouble> {
        let damaged = |reason: String| Trouble::Entry(format!("{}: tree {id}: {reason}", folder.path_of(b"")));
        let bytes = self.trees.read(id).map_err(|error| match Trouble::of_archive(error) {
            Trouble::Entry(reason) => damaged(reason),
            fatal => fatal,
        })?;
        folder.salt.store(salt(&bytes), Ordering::Relaxed);
        let is_repeated = self.repeats.meet(id);
        let mut last: Option<Vec<u8>> = None;
        let mut hindered = Ok(());
        let walked = tree::each(&bytes, |node| {
            // Two entries of one name would be written over each other; all writers sort.
            if last.as_ref().is_some_and(|last| *last >= node.name) {
                hindered = Err(damaged(format!("{:?} is not in order", printable(&node.name))));
                return false;
            }
            last = Some(node.name.clone());
            let done = self.repeats.count(is_repeated).and_then(|()| self.entry(folder, node, wanted, subfolders));
            hindered = self.context.survive(done);
            hindered.is_ok()
        });
        hindered?;
        walked.map_err(|error| damaged(chain(&error)))
    }

    fn entry(
        &mut self,
        folder: &Arc<Folder>,
        mut node: Node,
        wanted: &Wanted,
        subfolders: &mut Vec<Subfolder>,
    ) -> Result<(), Trouble> {
        self.context.go_on()?;
        let Some(wanted) = self.wanted(folder, &node, wanted) else { return Ok(()) };
        let attributes = Attributes::take(&mut node);
        if let NodeKind::Folder { subtree } = node.kind {
            subfolders.push(Subfolder { name: node.name.into(), tree: subtree, attributes, wanted });
            return Ok(());
        }
        let first = match self.links.place(folder, &node) {
            Place::First(first) => first,
            Place::Another(first) => return first.join(folder, node.name.into(), self.hands, self.context),
        };
        if let NodeKind::File { size, content } = node.kind {
            let pieces = self.pieces(folder, &node.name, size, &content);
            let (pieces, reason) = match pieces {
                Ok(pieces) => (pieces, None),
                Err(reason) => (Vec::new(), Some(reason)),
            };
            let file = Growing::new(folder, node.name.into(), size, pieces, attributes, first);
            return self.file(&file, reason);
        }
        let made = special::make(folder, &node.name, &node.kind, &attributes, self.hands, self.context);
        if let Some(first) = first {
            first.end(matches!(made, Ok(true)), self.hands, self.context)?;
        }
        made.map(drop)
    }

    /// Whether an entry is wanted, and what of it.
    fn wanted(&mut self, folder: &Folder, node: &Node, wanted: &Wanted) -> Option<Wanted> {
        let Wanted::TowardsSome(candidates) = wanted else { return Some(Wanted::Everything) };
        let mut on_the_way = Vec::new();
        let mut is_whole = false;
        for &number in candidates {
            let Some(include) = self.include.get_mut(number) else { continue };
            if include.names.get(folder.depth) != Some(&node.name) {
                continue;
            }
            if include.names.len() == folder.depth + 1 {
                include.is_found = true;
                is_whole = true;
            } else {
                on_the_way.push(number);
            }
        }
        match (is_whole, on_the_way.is_empty()) {
            (true, _) => {
                // What lies below it is found with it, if it is there at all; that is not looked for.
                for number in on_the_way {
                    self.include.get_mut(number).into_iter().for_each(|include| include.is_found = true);
                }
                Some(Wanted::Everything)
            }
            (false, true) => None,
            (false, false) => matches!(node.kind, NodeKind::Folder { .. }).then_some(Wanted::TowardsSome(on_the_way)),
        }
    }

    /// A file's pieces with their lengths, which the index knows.
    fn pieces(&self, folder: &Folder, name: &[u8], size: u64, content: &[Id]) -> Result<Vec<(Id, u32)>, String> {
        let mut pieces = Vec::with_capacity(content.len());
        let mut sum = 0;
        for id in content {
            let at = self.context.blobs.find(BlobKind::Data, id);
            let at = at.ok_or_else(|| chain(&unknown(BlobKind::Data, id)))?;
            let length = at.raw_length.unwrap_or(at.length.saturating_sub(OVERHEAD_BYTES as u32));
            if length > PIECE_BYTES_MAX {
                return Err(format!("data blob {id} has {length} bytes, more than any writer makes"));
            }
            // An empty one says nothing, and a list of them would be without end.
            if length > 0 {
                pieces.push((*id, length));
            }
            sum += u64::from(length);
        }
        if sum != size {
            let path = folder.path_of(name);
            return Err(format!("the tree says that {path} has {size} bytes, and its pieces have {sum}"));
        }
        Ok(pieces)
    }

    fn file(&mut self, file: &Arc<Growing>, reason: Option<String>) -> Result<(), Trouble> {
        Counters::add(&self.context.counters.files_found, 1);
        match reason {
            Some(reason) => file.fail(&reason, self.context),
            None => {
                Counters::add(&self.context.counters.bytes_found, file.size);
                let (context, windows) = (self.context, &self.windows);
                self.filler.add(file, |window| send(context, windows, window))?;
            }
        }
        file.settle(None, self.hands, self.context)
    }

    fn send(&self, window: Window) -> Result<(), Trouble> {
        send(self.context, &self.windows, window)
    }
}

/// Waits while every worker has enough to do.
fn send(context: &Context<'_>, windows: &Sender<Window>, window: Window) -> Result<(), Trouble> {
    context.go_on()?;
    // Without a worker all of them ended early, and one of them said why.
    windows.send(window).map_err(|_| Trouble::Fatal(RestoreError::Cancelled))
}

/// The first number with which no name in a tree looks like a part file's.
fn salt(tree: &[u8]) -> usize {
    // What is no UTF-8 is no tree either.
    let text = std::str::from_utf8(tree).unwrap_or_default();
    if !text.contains(PART_PREFIX) {
        return 0;
    }
    (0..1000).find(|number| !text.contains(&format!("{PART_PREFIX}{number}-"))).unwrap_or(1000)
}
