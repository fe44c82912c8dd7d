//! Entries that are no folders: looked at, and read if they changed.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, FileType, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use crate::format::tree::NodeKind;
use crate::format::{BlobKind, Id};

use super::chunk::{BYTES_LOOK, BYTES_MAX, BYTES_MIN};
use super::entry::{attributes, attributes_at, file_type, node, open_at, path_of};
use super::pipeline::{Pipeline, REPLACED, Stop};
use super::step::step;
use super::tools::Tools;
use super::work::{Batch, BigFile, Listed, Piece, Queues};

/// Room for files of the kernel's, which do not say how long they are.
const KERNEL_FILE_BYTES: usize = 4096;

/// What is read ahead of the cuts, unless a piece is longer: twice what is looked at, so that little is moved.
const WINDOW_BYTES: usize = 2 * BYTES_LOOK;

/// How storing an entry ended that did not stop everything.
type Entry<T> = Result<Result<T, Errno>, Stop>;

/// Stores the entries of a batch.
pub(super) fn batch(pipeline: &Pipeline<'_>, tools: &mut Tools, queues: &Queues, batch: &Batch) -> Result<(), Stop> {
    for listed in &batch.entries {
        pipeline.check()?;
        let mut stored = match listed.kind {
            FileType::RegularFile => file(pipeline, tools, queues, batch, listed)?,
            _ => other(pipeline, tools, batch, listed)?,
        };
        // It is no file any more.
        if stored == Err(Errno::LOOP) && listed.kind == FileType::RegularFile {
            stored = other(pipeline, tools, batch, listed)?;
        }
        if let Err(error) = stored {
            pipeline.entry_failed(&path_of(&batch.folder.path, &listed.name), error);
            batch.folder.bring(pipeline, tools, listed.slot, &[])?;
        }
    }
    Ok(())
}

/// A link, a device or a pipe. A file or folder that has come in its place meanwhile counts as replaced.
fn other(pipeline: &Pipeline<'_>, tools: &mut Tools, batch: &Batch, listed: &Listed) -> Entry<()> {
    let folder = batch.handle.as_fd();
    let looked = step().and_then(|()| rustix::fs::statat(folder, listed.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW));
    let looked = looked.and_then(|stat| {
        let kind = match file_type(&stat) {
            FileType::Symlink => {
                step()?;
                let target = rustix::fs::readlinkat(folder, listed.name.as_slice(), Vec::new())?;
                NodeKind::Symlink { target: target.into_bytes() }
            }
            FileType::BlockDevice => NodeKind::BlockDevice { device: stat.st_rdev },
            FileType::CharacterDevice => NodeKind::CharDevice { device: stat.st_rdev },
            FileType::Fifo => NodeKind::Fifo,
            _ => return Err(REPLACED),
        };
        let attributes = attributes_at(folder, &listed.name).map_err(|error| {
            let is_there = rustix::fs::statat(folder, listed.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW).is_ok();
            // Without `/proc` it seems gone and is not.
            if error == Errno::NOENT && is_there { Errno::NOSYS } else { error }
        });
        Ok((stat, kind, attributes?))
    });
    let (stat, kind, attributes) = match looked {
        Ok(looked) => looked,
        Err(error) => return Ok(Err(error)),
    };
    if is_elsewhere(batch, &stat) {
        return batch.folder.bring(pipeline, tools, listed.slot, &[]).map(Ok);
    }
    let node = node(&listed.name, &stat, kind, attributes, &pipeline.names);
    tools.bring(pipeline, &batch.folder, listed.slot, &node).map(Ok)
}

fn is_elsewhere(batch: &Batch, stat: &Stat) -> bool {
    batch.device.is_some_and(|device| device != stat.st_dev)
}

fn file(pipeline: &Pipeline<'_>, tools: &mut Tools, queues: &Queues, batch: &Batch, listed: &Listed) -> Entry<()> {
    let opened = open_at(batch.handle.as_fd(), &listed.name, OFlags::empty()).and_then(|file| {
        step()?;
        let stat = rustix::fs::fstat(&file)?;
        match file_type(&stat) {
            FileType::RegularFile => Ok((attributes(file.as_fd())?, file, stat)),
            _ => Err(REPLACED),
        }
    });
    let (attributes, file, stat) = match opened {
        Ok(opened) => opened,
        Err(error) => return Ok(Err(error)),
    };
    if is_elsewhere(batch, &stat) {
        return batch.folder.bring(pipeline, tools, listed.slot, &[]).map(Ok);
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let make = |size, content, attributes| {
        node(&listed.name, &stat, NodeKind::File { size, content }, attributes, &pipeline.names)
    };
    let unchanged = batch.known.as_ref().and_then(|known| known.unchanged(&listed.name, &stat, pipeline));
    if let Some(content) = unchanged {
        pipeline.counters.bytes_done.fetch_add(size, Ordering::Relaxed);
        let node = make(size, content, attributes);
        return tools.bring_file(pipeline, &batch.folder, listed.slot, &node).map(Ok);
    }
    if size <= BYTES_MIN as u64 {
        let mut buffer = tools.buffer();
        let read = read_small(file.as_fd(), &mut buffer, size);
        let stored = match read {
            Ok(true) => small(pipeline, tools, &buffer).map(Ok),
            Ok(false) => Ok(Err(Errno::FBIG)),
            Err(error) => Ok(Err(error)),
        };
        let length = buffer.len() as u64;
        tools.keep_buffer(buffer);
        match stored? {
            Ok(content) => {
                let node = make(length, content, attributes);
                return tools.bring_file(pipeline, &batch.folder, listed.slot, &node).map(Ok);
            }
            // It has grown since it was looked at.
            Err(Errno::FBIG) => drop(rustix::fs::seek(&file, SeekFrom::Start(0))),
            Err(error) => return Ok(Err(error)),
        }
    }
    let reading = queues.reading();
    let big = BigFile::new(batch.folder.clone(), listed.slot);
    let has_holes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512) < size;
    let read = pieces(pipeline, tools, queues, &big, &mut Sparse { file: file.as_fd(), has_holes, size })?;
    drop(reading);
    match read {
        Ok(size) => big.end(pipeline, tools, make(size, Vec::new(), attributes)).map(Ok),
        Err(error) => Ok(Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))),
    }
}

fn small(pipeline: &Pipeline<'_>, tools: &mut Tools, bytes: &[u8]) -> Result<Vec<Id>, Stop> {
    count_read(pipeline, bytes.len());
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    Ok(vec![tools.store(pipeline, BlobKind::Data, bytes)?])
}

fn count_read(pipeline: &Pipeline<'_>, bytes: usize) {
    pipeline.counters.bytes_done.fetch_add(bytes as u64, Ordering::Relaxed);
    pipeline.counters.bytes_read.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// Reads a file that should have `size` bytes. False: it is longer than one piece may be. What has exactly the
/// bytes that it had when it was looked at is not asked for more; files of the kernel's say 0 and have some.
fn read_small(file: BorrowedFd<'_>, buffer: &mut Vec<u8>, size: u64) -> Result<bool, Errno> {
    let expected = usize::try_from(size).unwrap_or(0);
    buffer.reserve(expected.max(KERNEL_FILE_BYTES));
    loop {
        step()?;
        let end = rustix::io::retry_on_intr(|| rustix::io::read(file, spare_capacity(buffer)))? == 0;
        if end || (expected > 0 && buffer.len() == expected) {
            return Ok(true);
        }
        if buffer.len() > BYTES_MIN {
            return Ok(false);
        }
        buffer.reserve(KERNEL_FILE_BYTES);
    }
}

/// Bytes to be cut.
pub(super) trait Bytes {
    /// Some more; 0 is the end.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize>;

    /// Skips what is known to be zeros without reading it, a multiple of the longest piece; returns its length.
    fn skip_zeros(&mut self) -> io::Result<u64> {
        Ok(0)
    }
}

fn size_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

/// A file that may have holes.
struct Sparse<'f> {
    file: BorrowedFd<'f>,
    has_holes: bool,
    size: u64,
}

impl Bytes for Sparse<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        step()?;
        Ok(rustix::io::retry_on_intr(|| rustix::io::read(self.file, &mut *into))?)
    }

    fn skip_zeros(&mut self) -> io::Result<u64> {
        if !self.has_holes {
            return Ok(0);
        }
        step()?;
        let at = rustix::fs::tell(self.file)?;
        let data = match rustix::fs::seek(self.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // There is no data any more, up to where it ends now: it may have been cut meanwhile.
            Err(Errno::NXIO) => self.size.min(size_of(self.file)?).max(at),
            Err(error) => return Err(error.into()),
        };
        let zeros = (data - at) / BYTES_MAX as u64 * BYTES_MAX as u64;
        rustix::fs::seek(self.file, SeekFrom::Start(at + zeros))?;
        Ok(zeros)
    }
}

/// Cuts what there is into pieces and stores them; returns how many bytes there were.
pub(super) fn pieces(
    pipeline: &Pipeline<'_>,
    tools: &mut Tools,
    queues: &Queues,
    file: &Arc<BigFile>,
    source: &mut dyn Bytes,
) -> Result<io::Result<u64>, Stop> {
    let mut window = tools.take_window();
    let cut = cut(pipeline, tools, queues, file, source, &mut window);
    tools.keep_window(window);
    cut
}

fn cut(
    pipeline: &Pipeline<'_>,
    tools: &mut Tools,
    queues: &Queues,
    file: &Arc<BigFile>,
    source: &mut dyn Bytes,
    window: &mut Window,
) -> Result<io::Result<u64>, Stop> {
    let mut total = 0_u64;
    loop {
        pipeline.check()?;
        if window.known().is_empty() {
            match source.skip_zeros() {
                Ok(zeros) => total += zero_pieces(pipeline, tools, file, zeros)?,
                Err(error) => return Ok(Err(error)),
            }
        }
        let length = match next_cut(pipeline, source, window) {
            Ok(0) => return Ok(Ok(total)),
            Ok(length) => length,
            Err(error) => return Ok(Err(error)),
        };
        let piece = window.known().get(..length).unwrap_or_default();
        total += length as u64;
        count_read(pipeline, length);
        let number = file.begin_piece();
        if queues.wants_pieces() {
            let mut bytes = tools.buffer();
            bytes.extend_from_slice(piece);
            if let Err(refused) = queues.hand_out(Piece { file: file.clone(), number, bytes }) {
                refused.store(pipeline, tools)?;
            }
        } else {
            let id = tools.store(pipeline, BlobKind::Data, piece)?;
            file.end_piece(pipeline, tools, number, id)?;
        }
        window.consume(length);
    }
}

/// Length of the next piece at the window's start; 0 at the end.
fn next_cut(pipeline: &Pipeline<'_>, source: &mut dyn Bytes, window: &mut Window) -> io::Result<usize> {
    for wanted in [BYTES_LOOK, BYTES_MAX] {
        let is_end = window.fill(wanted, source)?;
        if let Some(length) = pipeline.cutter.cut(window.known(), is_end) {
            return Ok(length);
        }
    }
    // Not reached: what is as long as a piece may be is cut.
    Ok(window.known().len().min(BYTES_MAX))
}

/// Pieces of a hole: all the same one, which is made once.
fn zero_pieces(pipeline: &Pipeline<'_>, tools: &mut Tools, file: &BigFile, zeros: u64) -> Result<u64, Stop> {
    for _ in 0..zeros / BYTES_MAX as u64 {
        pipeline.check()?;
        let id = match pipeline.zeros.get() {
            Some(id) => *id,
            None => {
                let id = tools.store(pipeline, BlobKind::Data, &vec![0; BYTES_MAX])?;
                *pipeline.zeros.get_or_init(|| id)
            }
        };
        let number = file.begin_piece();
        file.end_piece(pipeline, tools, number, id)?;
        pipeline.counters.bytes_done.fetch_add(BYTES_MAX as u64, Ordering::Relaxed);
    }
    Ok(zeros)
}

/// A part of a file, some of which was not cut yet. It grows for a long piece.
#[derive(Debug)]
pub(super) struct Window {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Window {
    pub(super) fn new() -> Self {
        // Zeroed memory costs nothing before it is touched.
        Self { bytes: vec![0; WINDOW_BYTES], start: 0, end: 0 }
    }

    /// Empty, for the next file; one that grew is given back.
    pub(super) fn emptied(self) -> Option<Self> {
        (self.bytes.len() == WINDOW_BYTES).then_some(Self { start: 0, end: 0, ..self })
    }

    fn known(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    fn consume(&mut self, length: usize) {
        self.start += length;
    }

    /// Reads until so many bytes are known. True: the end comes first.
    fn fill(&mut self, wanted: usize, source: &mut dyn Bytes) -> io::Result<bool> {
        if self.start + wanted > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            self.bytes.resize(self.bytes.len().max(wanted), 0);
        }
        while self.end - self.start < wanted {
            let room = self.bytes.get_mut(self.end..self.start + wanted).unwrap_or_default();
            match source.read(room)? {
                0 => return Ok(true),
                read => self.end += read,
            }
        }
        Ok(false)
    }
}
