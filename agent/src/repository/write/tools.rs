//! What one thread works with: compressors and buffers, made once; and how a blob is stored with them.

use crate::format::compress::Squeeze;
use crate::format::tree::Node;
use crate::format::{BlobKind, Id};

use super::super::open::{ArchiveError, random};
use super::folder::Folder;
use super::pack::{Sealed, fits};
use super::pipeline::{Pipeline, Stop};
use super::read::Window;

use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Pieces from this size on are tried in samples before they are compressed.
const SAMPLED_BYTES_MIN: usize = 128 * 1024;
const SAMPLE_BYTES: usize = 4 * 1024;
const SAMPLES: usize = 6;
const SAMPLE_LEVEL: i32 = 1;
/// A scratch buffer that grew beyond this for one blob is given back.
const SCRATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Buffers of pieces that a thread keeps.
const BUFFERS_MAX: usize = 2;

/// Compressors and buffers of one thread.
#[derive(Debug)]
pub(super) struct Tools {
    squeeze: Squeeze,
    sampler: Squeeze,
    sample: Vec<u8>,
    compressed: Vec<u8>,
    sealed: Vec<u8>,
    json: Vec<u8>,
    buffers: Vec<Vec<u8>>,
    window: Option<Window>,
}

impl Tools {
    pub(super) fn new(pipeline: &Pipeline<'_>) -> Result<Self, Stop> {
        let squeeze = |level| Squeeze::new(level).map_err(|error| pipeline.fail(error.into()));
        Ok(Self {
            squeeze: squeeze(pipeline.level)?,
            sampler: squeeze(SAMPLE_LEVEL)?,
            sample: Vec::new(),
            compressed: Vec::new(),
            sealed: Vec::new(),
            json: Vec::new(),
            buffers: Vec::new(),
            window: None,
        })
    }

    /// An empty buffer.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_default()
    }

    /// Keeps a buffer for the next.
    pub(super) fn keep_buffer(&mut self, mut buffer: Vec<u8>) {
        if self.buffers.len() < BUFFERS_MAX && buffer.capacity() <= SCRATCH_BYTES_MAX {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }

    /// An empty window over a big file; made when the first is read.
    pub(super) fn take_window(&mut self) -> Window {
        self.window.take().unwrap_or_else(Window::new)
    }

    /// Keeps it for the next file.
    pub(super) fn keep_window(&mut self, window: Window) {
        self.window = window.emptied();
    }

    /// Stores a blob, unless it is stored.
    pub(super) fn store(&mut self, pipeline: &Pipeline<'_>, kind: BlobKind, plain: &[u8]) -> Result<Id, Stop> {
        pipeline.check()?;
        let id = Id::of(plain);
        if !pipeline.index.claim(kind, &id) {
            return Ok(id);
        }
        let raw_length = self.seal(pipeline, kind, plain).map_err(|error| pipeline.fail(error))?;
        let blob = Sealed { kind, id, bytes: &self.sealed, raw_length };
        match kind {
            BlobKind::Data => pipeline.data.add(blob)?,
            BlobKind::Tree => pipeline.trees.add(blob)?,
        }
        for scratch in [&mut self.sealed, &mut self.compressed] {
            if scratch.capacity() > SCRATCH_BYTES_MAX {
                *scratch = Vec::new();
            }
        }
        Ok(id)
    }

    /// Compresses what can be, and seals it; returns the length in the clear if it is compressed.
    fn seal(&mut self, pipeline: &Pipeline<'_>, kind: BlobKind, plain: &[u8]) -> Result<Option<u32>, ArchiveError> {
        if !fits(plain.len()) {
            return Err(ArchiveError::Broken("a folder has more entries than the format can hold".to_owned()));
        }
        let mut text = plain;
        if kind == BlobKind::Tree || self.seems_compressible(plain)? {
            self.squeeze.squeeze(plain, &mut self.compressed)?;
            if self.compressed.len() < plain.len() {
                text = &self.compressed;
            }
        }
        self.sealed.clear();
        pipeline.archive.cipher().seal_into(&random()?, text, &mut self.sealed)?;
        let is_compressed = text.len() < plain.len();
        Ok(u32::try_from(plain.len()).ok().filter(|_| is_compressed))
    }

    /// Tries some samples of a big piece: what is compressed or encrypted already is not worth the time.
    fn seems_compressible(&mut self, plain: &[u8]) -> Result<bool, ArchiveError> {
        if plain.len() < SAMPLED_BYTES_MIN {
            return Ok(true);
        }
        self.sample.clear();
        for sample in plain.chunks(plain.len() / SAMPLES).take(SAMPLES) {
            self.sample.extend_from_slice(sample.get(..SAMPLE_BYTES).unwrap_or(sample));
        }
        self.sampler.squeeze(&self.sample, &mut self.compressed)?;
        Ok(self.compressed.len() * 64 < self.sample.len() * 63)
    }

    /// Brings a node to its folder.
    pub(super) fn bring(
        &mut self,
        pipeline: &Pipeline<'_>,
        folder: &Arc<Folder>,
        slot: usize,
        node: &Node,
    ) -> Result<(), Stop> {
        let mut json = std::mem::take(&mut self.json);
        json.clear();
        node.write(&mut json);
        let brought = folder.bring(pipeline, self, slot, &json);
        if json.capacity() <= SCRATCH_BYTES_MAX {
            self.json = json;
        }
        brought
    }

    /// Brings a file that is done.
    pub(super) fn bring_file(
        &mut self,
        pipeline: &Pipeline<'_>,
        folder: &Arc<Folder>,
        slot: usize,
        node: &Node,
    ) -> Result<(), Stop> {
        pipeline.counters.files_done.fetch_add(1, Ordering::Relaxed);
        self.bring(pipeline, folder, slot, node)
    }
}
