//! Hard links: entries of one inode and one content are names of one file.
//!
//! The first name met is restored; others are linked to it once it is finished. An inode's number is a stranger's
//! word, and on a tree that lived while it was read it may have been given away twice: entries with another
//! content are no links of each other. What is held for an inode is dropped when all its names were met.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::folder::{Folder, Hands};
use super::report::{Context, Trouble};
use super::special;
use crate::format::Id;
use crate::format::tree::{Node, NodeKind};

type Name = (Arc<Folder>, Box<[u8]>);

/// The first name of an inode.
pub(super) struct First {
    folder: Arc<Folder>,
    name: Box<[u8]>,
    state: Mutex<State>,
}

enum State {
    /// It is not finished; these wait for it.
    Open(Vec<Name>),
    Finished,
    Failed,
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    device: u64,
    inode: u64,
    content: [u8; 16],
}

/// Inodes of which not all names were met.
#[derive(Default)]
pub(super) struct Links(HashMap<Key, (Arc<First>, u64)>);

/// What a node is among the names of its inode.
pub(super) enum Place {
    /// It has one name, or is the first to be met.
    First(Option<Arc<First>>),
    /// It is another name.
    Another(Arc<First>),
}

impl Links {
    pub(super) fn place(&mut self, folder: &Arc<Folder>, node: &Node) -> Place {
        if node.links < 2 || node.inode == 0 {
            return Place::First(None);
        }
        let key = Key { device: node.device_id, inode: node.inode, content: content(&node.kind) };
        if let Some((first, missing)) = self.0.get_mut(&key) {
            let first = Arc::clone(first);
            *missing -= 1;
            if *missing == 0 {
                self.0.remove(&key);
            }
            return Place::Another(first);
        }
        let state = Mutex::new(State::Open(Vec::new()));
        let first = Arc::new(First { folder: Arc::clone(folder), name: node.name.clone().into(), state });
        self.0.insert(key, (Arc::clone(&first), node.links - 1));
        Place::First(Some(first))
    }
}

/// What tells contents apart.
fn content(kind: &NodeKind) -> [u8; 16] {
    let mut said = Vec::new();
    match kind {
        NodeKind::File { size, content } => {
            said.push(1);
            said.extend_from_slice(&size.to_le_bytes());
            content.iter().for_each(|id| said.extend_from_slice(id.as_bytes()));
        }
        NodeKind::Folder { .. } => said.push(2),
        NodeKind::Symlink { target } => {
            said.push(3);
            said.extend_from_slice(target);
        }
        NodeKind::BlockDevice { device } => said.extend_from_slice(&[&[4], &device.to_le_bytes()[..]].concat()),
        NodeKind::CharDevice { device } => said.extend_from_slice(&[&[5], &device.to_le_bytes()[..]].concat()),
        NodeKind::Fifo => said.push(6),
        NodeKind::Socket => said.push(7),
    }
    Id::of(&said).as_bytes().first_chunk().copied().unwrap_or_default()
}

impl First {
    /// Gives the file one more name, now or when it is finished.
    pub(super) fn join(
        &self,
        folder: &Arc<Folder>,
        name: Box<[u8]>,
        hands: &mut Hands,
        context: &Context<'_>,
    ) -> Result<(), Trouble> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            State::Open(waiting) => {
                folder.retain();
                waiting.push((Arc::clone(folder), name));
                Ok(())
            }
            State::Finished => {
                drop(state);
                self.link(folder, &name, hands)
            }
            State::Failed => {
                drop(state);
                context.fail(self.lost(folder, &name));
                Ok(())
            }
        }
    }

    fn lost(&self, folder: &Folder, name: &[u8]) -> String {
        format!("{}: a hard link of {}, which failed", folder.path_of(name), self.folder.path_of(&self.name))
    }

    /// It is finished, or never will be.
    pub(super) fn end(&self, is_whole: bool, hands: &mut Hands, context: &Context<'_>) -> Result<(), Trouble> {
        let next = if is_whole { State::Finished } else { State::Failed };
        let before = std::mem::replace(&mut *self.state.lock().unwrap_or_else(PoisonError::into_inner), next);
        let State::Open(waiting) = before else { return Ok(()) };
        for (folder, name) in waiting {
            match is_whole {
                true => context.survive(self.link(&folder, &name, hands))?,
                false => context.fail(self.lost(&folder, &name)),
            }
            folder.release(hands, context)?;
        }
        Ok(())
    }

    fn link(&self, folder: &Arc<Folder>, name: &[u8], hands: &mut Hands) -> Result<(), Trouble> {
        let linked = (|| -> Result<(), Errno> {
            let (from, to) = (hands.reach(&self.folder)?, hands.reach(folder)?);
            if is_linked(&from, &self.name, &to, name)? {
                return Ok(());
            }
            special::put(folder, &to, name, |to, name| {
                rustix::fs::linkat(&from, &*self.name, to, name, AtFlags::empty())
            })
        })();
        linked.map_err(|errno| Trouble::of("link", folder.path_of(name), errno))
    }
}

/// Whether both names are of one inode already. Renaming one onto the other would do nothing.
fn is_linked(from: &OwnedFd, name: &[u8], to: &OwnedFd, other: &[u8]) -> Result<bool, Errno> {
    let first = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match rustix::fs::statat(to, other, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok((stat.st_dev, stat.st_ino) == (first.st_dev, first.st_ino)
            && FileType::from_raw_mode(stat.st_mode) != FileType::Directory),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}
