//! Windows: pieces of files that are fetched together, and how a worker writes them.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::Counters;
use super::blobs::unknown;
use super::file::{Base, Growing, holds, write_sparse};
use super::folder::Hands;
use super::report::{Context, Trouble, chain};
use crate::format::{BlobKind, Id};
use crate::repository::index::Location;

/// Bytes in the clear of a window, unless one piece alone has more.
const WINDOW_BYTES: u64 = 8 * 1024 * 1024;
/// Parts of files in a window.
const WINDOW_PARTS: usize = 512;
/// Longest range of a pack that is read at once, unless one blob alone is longer.
const RANGE_BYTES: u64 = 4 * 1024 * 1024;
/// What lies between two blobs is read along with them, if it is no more than this: less than what asking again
/// costs.
const GAP_BYTES: u64 = 64 * 1024;

/// Some pieces of a file.
pub(super) struct Part {
    file: Arc<Growing>,
    pieces: Range<usize>,
    offset: u64,
}

/// What a worker takes at once.
#[derive(Default)]
pub(super) struct Window {
    parts: Vec<Part>,
    bytes: u64,
}

/// Fills windows.
#[derive(Default)]
pub(super) struct Filler(Window);

impl Filler {
    /// Puts a file into windows; `send` gets those that are full.
    pub(super) fn add(
        &mut self,
        file: &Arc<Growing>,
        mut send: impl FnMut(Window) -> Result<(), Trouble>,
    ) -> Result<(), Trouble> {
        let (mut begin, mut offset, mut next) = (0, 0, 0);
        for (at, (_, length)) in file.content.iter().enumerate() {
            let length = u64::from(*length);
            if self.0.bytes > 0 && self.0.bytes + length > WINDOW_BYTES {
                self.push(file, begin..at, offset);
                (begin, offset) = (at, next);
                send(std::mem::take(&mut self.0))?;
            }
            self.0.bytes += length;
            next += length;
        }
        self.push(file, begin..file.content.len(), offset);
        if self.0.parts.len() >= WINDOW_PARTS {
            send(std::mem::take(&mut self.0))?;
        }
        Ok(())
    }

    fn push(&mut self, file: &Arc<Growing>, pieces: Range<usize>, offset: u64) {
        // One without pieces belongs to an empty file, which a worker finishes like others.
        if !pieces.is_empty() || file.content.is_empty() {
            file.owe();
            self.0.parts.push(Part { file: Arc::clone(file), pieces, offset });
        }
    }

    /// What is left.
    pub(super) fn rest(self) -> Option<Window> {
        (!self.0.parts.is_empty()).then_some(self.0)
    }
}

impl Part {
    /// Each piece with its place in the file.
    fn pieces(&self) -> impl Iterator<Item = (u64, Id, u32)> {
        let mut next = self.offset;
        self.file.content.get(self.pieces.clone()).unwrap_or_default().iter().map(move |&(id, length)| {
            let offset = next;
            next += u64::from(length);
            (offset, id, length)
        })
    }

    /// Which of its pieces are not there yet.
    fn missing(&self, hands: &mut Hands, context: &Context<'_>) -> Result<Vec<(u64, Id, u32)>, Trouble> {
        let file = match self.file.base(hands, context)? {
            Base::Nothing => return Ok(self.pieces().collect()),
            Base::Same => {
                self.pieces().for_each(|(_, _, length)| keep(length, context));
                return Ok(Vec::new());
            }
            Base::Bytes(file) => file,
        };
        let mut buffer = Vec::new();
        let mut missing = Vec::new();
        for (offset, id, length) in self.pieces() {
            context.go_on()?;
            match holds(&file, offset, &id, length, &mut buffer) {
                true => keep(length, context),
                false => missing.push((offset, id, length)),
            }
        }
        Ok(missing)
    }
}

fn keep(length: u32, context: &Context<'_>) {
    Counters::add(&context.counters.bytes_kept, length.into());
    Counters::add(&context.counters.bytes_done, length.into());
}

/// Compares, fetches, writes and finishes what is in a window.
pub(super) fn work(window: Window, hands: &mut Hands, context: &Context<'_>) -> Result<(), Trouble> {
    let mut wanted = Vec::new();
    let mut jobs = Vec::with_capacity(window.parts.len());
    for part in window.parts {
        context.go_on()?;
        let missing = match part.missing(hands, context) {
            Ok(missing) => missing,
            Err(Trouble::Entry(reason)) => {
                part.file.fail(&reason, context);
                Vec::new()
            }
            Err(fatal) => return Err(fatal),
        };
        wanted.extend(missing.iter().map(|(_, id, _)| *id));
        jobs.push((part, missing));
    }
    let fetched = fetch(wanted, context)?;
    for (part, missing) in jobs {
        context.go_on()?;
        let open = match write(&part.file, missing, &fetched, hands, context) {
            Ok(open) => open,
            Err(Trouble::Entry(reason)) => {
                part.file.fail(&reason, context);
                None
            }
            Err(fatal) => return Err(fatal),
        };
        part.file.settle(open, hands, context)?;
    }
    Ok(())
}

/// Writes pieces; what can be had is written even if another cannot, so that it need not be fetched again and can
/// be rescued by hand.
fn write(
    file: &Growing,
    missing: Vec<(u64, Id, u32)>,
    fetched: &HashMap<Id, Result<Vec<u8>, String>>,
    hands: &mut Hands,
    context: &Context<'_>,
) -> Result<Option<OwnedFd>, Trouble> {
    let mut open = None;
    for (offset, id, length) in missing {
        match fetched.get(&id) {
            Some(Ok(bytes)) if bytes.len() == length as usize => {
                let part = match open.take() {
                    Some(part) => part,
                    None => file.part(hands)?,
                };
                let written = write_sparse(&part, offset, bytes, file.is_new());
                written.map_err(|errno| Trouble::of("write", file.path(), errno))?;
                open = Some(part);
                Counters::add(&context.counters.bytes_done, length.into());
            }
            Some(Ok(_)) => file.fail(&format!("data blob {id} is not as long as its index says"), context),
            Some(Err(reason)) => file.fail(reason, context),
            None => file.fail(&format!("data blob {id} was not fetched"), context),
        }
    }
    Ok(open)
}

/// Blobs, out of as few ranges of packs as may be. A blob that cannot be had has the reason in its place.
fn fetch(mut wanted: Vec<Id>, context: &Context<'_>) -> Result<HashMap<Id, Result<Vec<u8>, String>>, Trouble> {
    wanted.sort_unstable();
    wanted.dedup();
    let mut fetched = HashMap::with_capacity(wanted.len());
    let mut places = Vec::with_capacity(wanted.len());
    for id in wanted {
        match context.blobs.find(BlobKind::Data, &id) {
            Some(at) => places.push((at, id)),
            None => {
                fetched.insert(id, Err(chain(&unknown(BlobKind::Data, &id))));
            }
        }
    }
    places.sort_unstable_by_key(|(at, _)| (at.pack, at.offset));
    for range in ranges(&places) {
        context.go_on()?;
        fetch_range(places.get(range).unwrap_or_default(), &mut fetched, context)?;
    }
    Ok(fetched)
}

fn end(at: &Location) -> u64 {
    u64::from(at.offset) + u64::from(at.length)
}

/// Which neighbours are read at once.
fn ranges(places: &[(Location, Id)]) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (number, (at, _)) in places.iter().enumerate() {
        if let Some(last) = ranges.last_mut() {
            let (first, before) = (&places[last.start].0, &places[number - 1].0);
            let is_near = u64::from(at.offset) <= end(before) + GAP_BYTES;
            if first.pack == at.pack && is_near && end(at) - u64::from(first.offset) <= RANGE_BYTES {
                last.end = number + 1;
                continue;
            }
        }
        ranges.push(number..number + 1);
    }
    ranges
}

fn fetch_range(
    places: &[(Location, Id)],
    fetched: &mut HashMap<Id, Result<Vec<u8>, String>>,
    context: &Context<'_>,
) -> Result<(), Trouble> {
    let Some((first, _)) = places.first() else { return Ok(()) };
    let begin = u64::from(first.offset);
    let length = places.iter().map(|(at, _)| end(at)).max().unwrap_or(begin) - begin;
    let bytes = match context.blobs.read(&first.pack, begin, length).map_err(Trouble::of_archive) {
        Ok(bytes) => bytes,
        Err(Trouble::Entry(reason)) => {
            fetched.extend(places.iter().map(|(_, id)| (*id, Err(reason.clone()))));
            return Ok(());
        }
        Err(fatal) => return Err(fatal),
    };
    Counters::add(&context.counters.bytes_fetched, length);
    for (at, id) in places {
        let from = (at.offset - first.offset) as usize;
        let sealed = bytes.get(from..from + at.length as usize).unwrap_or_default().to_vec();
        let opened = context.blobs.open(id, at, sealed);
        fetched.insert(*id, opened.map_err(|error| format!("data blob {id}: {}", chain(&error))));
    }
    Ok(())
}
