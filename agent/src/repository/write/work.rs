//! The workers: entries of folders and pieces of big files, from bounded queues.
//!
//! A worker that reads a big file hands pieces to whoever is free, and does one itself when the queue is full, so
//! that workers never wait for each other.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, select_biased};
use rustix::fs::FileType;

use crate::format::tree::{Node, NodeKind};
use crate::format::{BlobKind, Id};

use super::folder::Folder;
use super::parent::Known;
use super::pipeline::{Pipeline, Stop};
use super::read;
use super::tools::Tools;

/// How often a worker without work looks whether others still may have some for it.
const IDLE_LOOK: Duration = Duration::from_millis(2);

/// Entries of one folder.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) folder: Arc<Folder>,
    pub(super) handle: Arc<OwnedFd>,
    pub(super) known: Option<Arc<Known>>,
    /// Entries on other filesystems are left out, if that was asked for.
    pub(super) device: Option<u64>,
    pub(super) entries: Vec<Listed>,
}

/// An entry as its folder lists it.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) slot: usize,
    pub(super) name: Vec<u8>,
    pub(super) kind: FileType,
}

/// A piece of a big file.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) file: Arc<BigFile>,
    pub(super) number: usize,
    pub(super) bytes: Vec<u8>,
}

impl Piece {
    /// Stores it, and leaves its memory to the next.
    pub(super) fn store(self, pipeline: &Pipeline<'_>, tools: &mut Tools) -> Result<(), Stop> {
        let id = tools.store(pipeline, BlobKind::Data, &self.bytes)?;
        tools.keep_buffer(self.bytes);
        self.file.end_piece(pipeline, tools, self.number, id)
    }
}

/// Where work comes from.
#[derive(Clone, Debug)]
pub(super) struct Queues {
    batches: Receiver<Batch>,
    to_pieces: Sender<Piece>,
    pieces: Receiver<Piece>,
    readers: Arc<AtomicUsize>,
}

/// Somebody reads a big file and may hand out pieces.
#[derive(Debug)]
pub(super) struct Reading(Arc<AtomicUsize>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Queues {
    pub(super) fn new(batches: Receiver<Batch>, to_pieces: Sender<Piece>, pieces: Receiver<Piece>) -> Self {
        Self { batches, to_pieces, pieces, readers: Arc::default() }
    }

    pub(super) fn reading(&self) -> Reading {
        self.readers.fetch_add(1, Ordering::AcqRel);
        Reading(self.readers.clone())
    }

    /// Whether there is room for a piece, so that copying one may be worth it.
    pub(super) fn wants_pieces(&self) -> bool {
        !self.to_pieces.is_full()
    }

    /// Hands a piece to whoever is free; gives it back if nobody is.
    pub(super) fn hand_out(&self, piece: Piece) -> Result<(), Piece> {
        self.to_pieces.try_send(piece).map_err(|refused| match refused {
            TrySendError::Full(piece) | TrySendError::Disconnected(piece) => piece,
        })
    }
}

/// Works until the walk has ended and nobody reads any more. Runs in a thread of its own.
pub(super) fn run(pipeline: &Pipeline<'_>, queues: &Queues) {
    let Ok(mut tools) = Tools::new(pipeline) else { return };
    let mut walking = true;
    while walking {
        select_biased! {
            recv(queues.pieces) -> piece => if let Ok(piece) = piece { let _ = piece.store(pipeline, &mut tools); },
            recv(queues.batches) -> batch => match batch {
                // Whoever stopped has said why; what comes after is only taken out of the queue.
                Ok(batch) => { let _ = read::batch(pipeline, &mut tools, queues, &batch); }
                Err(_) => walking = false,
            },
        }
    }
    loop {
        // In this order: a reader hands out its last piece before it ends.
        let nobody_reads = queues.readers.load(Ordering::Acquire) == 0;
        match queues.pieces.try_recv() {
            Ok(piece) => drop(piece.store(pipeline, &mut tools)),
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) if nobody_reads => return,
            Err(TryRecvError::Empty) => {
                if let Ok(piece) = queues.pieces.recv_timeout(IDLE_LOOK) {
                    let _ = piece.store(pipeline, &mut tools);
                }
            }
        }
    }
}

/// A file of several pieces; whoever is last brings it to its folder.
#[derive(Debug)]
pub(super) struct BigFile {
    folder: Arc<Folder>,
    slot: usize,
    state: Mutex<BigState>,
}

#[derive(Debug)]
struct BigState {
    content: Vec<Option<Id>>,
    /// Pieces that are not stored yet, and one for who reads the file.
    open: usize,
    node: Option<Node>,
}

impl BigFile {
    pub(super) fn new(folder: Arc<Folder>, slot: usize) -> Arc<Self> {
        Arc::new(Self { folder, slot, state: Mutex::new(BigState { content: Vec::new(), open: 1, node: None }) })
    }

    pub(super) fn begin_piece(&self) -> usize {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.open += 1;
        state.content.push(None);
        state.content.len() - 1
    }

    pub(super) fn end_piece(
        &self,
        pipeline: &Pipeline<'_>,
        tools: &mut Tools,
        number: usize,
        id: Id,
    ) -> Result<(), Stop> {
        self.settle(pipeline, tools, |state| {
            if let Some(place) = state.content.get_mut(number) {
                *place = Some(id);
            }
        })
    }

    /// The file was read to its end; it is brought with this node when its last piece is stored.
    pub(super) fn end(&self, pipeline: &Pipeline<'_>, tools: &mut Tools, node: Node) -> Result<(), Stop> {
        self.settle(pipeline, tools, |state| state.node = Some(node))
    }

    fn settle(
        &self,
        pipeline: &Pipeline<'_>,
        tools: &mut Tools,
        change: impl FnOnce(&mut BigState),
    ) -> Result<(), Stop> {
        let (node, pieces) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut state);
            state.open -= 1;
            if state.open > 0 {
                return Ok(());
            }
            (state.node.take(), std::mem::take(&mut state.content))
        };
        let (Some(mut node), Some(pieces)) = (node, pieces.into_iter().collect::<Option<Vec<Id>>>()) else {
            return Ok(());
        };
        if let NodeKind::File { content, .. } = &mut node.kind {
            *content = pieces;
        }
        tools.bring_file(pipeline, &self.folder, self.slot, &node)
    }
}
