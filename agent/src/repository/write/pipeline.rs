//! What all threads of one store share, and the order in which they begin and end.
//!
//! Whoever fails says so once ([`Pipeline::fail`]); everybody else sees it at the next step and stops. A thread
//! that panics counts as a failure.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::ScopedJoinHandle;

use crossbeam_channel::{Sender, bounded};
use rustix::io::Errno;

use crate::format::snapshot::Snapshot;
use crate::format::{Id, Timestamp};

use super::super::errors::EntryErrors;
use super::super::index::BlobIndex;
use super::super::lock::HeldLock;
use super::super::open::{Archive, ArchiveError};
use super::chunk::Cutter;
use super::entry::Names;
use super::gate::{Draft, Ended, Whole};
use super::pack::{self, Filled, Ledger, Packer};
use super::tools::Tools;
use super::work::{self, Batch, Piece, Queues};
use super::{Cancel, Counters, Files, Options, Source, adopt, parent, step, stream, walk};

/// Names of unreadable entries that are kept.
const NAMES_MAX: usize = super::super::UNREADABLE_NAMES_MAX;
/// Batches that wait. One holds some names, and keeps its folder open.
const BATCHES_MAX: usize = 32;
/// Something else stands where an entry was listed. No call on files gives it: what servers and kernels say for themselves
/// (ESTALE) is no entry that went away.
pub(super) const REPLACED: Errno = Errno::CHILD;

/// The store ends: somebody failed or cancelled, and has said so.
#[derive(Debug)]
pub(super) struct Stop;

pub(super) struct Pipeline<'a> {
    pub(super) archive: &'a Archive,
    pub(super) index: BlobIndex,
    pub(super) cutter: Cutter,
    pub(super) data: Packer,
    pub(super) trees: Packer,
    pub(super) names: Names,
    pub(super) ledger: Mutex<Ledger>,
    pub(super) root: Mutex<Option<Id>>,
    /// The longest piece of zeros, once it is stored.
    pub(super) zeros: OnceLock<Id>,
    pub(super) counters: &'a Counters,
    pub(super) level: i32,
    pub(super) started: Timestamp,
    cancel: &'a Cancel,
    live: bool,
    errors: Mutex<EntryErrors>,
    failure: Mutex<Option<ArchiveError>>,
    stopped: AtomicBool,
}

impl Pipeline<'_> {
    /// Whether to go on.
    pub(super) fn check(&self) -> Result<(), Stop> {
        if self.cancel.is_cancelled() {
            return Err(self.fail(ArchiveError::Cancelled));
        }
        if self.stopped.load(Ordering::Acquire) { Err(Stop) } else { Ok(()) }
    }

    /// Ends the store; the first failure is the one that is told.
    pub(super) fn fail(&self, error: ArchiveError) -> Stop {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stopped.store(true, Ordering::Release);
        Stop
    }

    /// An entry could not be read. What is gone or was replaced counts apart in a tree that lives.
    pub(super) fn entry_failed(&self, path: &std::path::Path, error: Errno) {
        let gone = matches!(error, Errno::NOENT | REPLACED | Errno::NOTDIR | Errno::LOOP);
        match error {
            _ if gone && self.live => self.errors.lock().unwrap_or_else(PoisonError::into_inner).vanished += 1,
            REPLACED => self.unreadable(path, &"something else took its place"),
            _ => self.unreadable(path, &error),
        }
    }

    /// An entry could not be read, whatever it was.
    pub(super) fn unreadable(&self, path: &std::path::Path, why: &dyn std::fmt::Display) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.unreadable += 1;
        if errors.names.len() < NAMES_MAX {
            errors.names.push(format!("{} ({why})", path.display()));
        }
    }

    pub(super) fn stored(&self, bytes: u64) {
        self.counters.bytes_stored.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Runs a store up to the gate.
pub(super) fn run(
    archive: &Archive,
    source: Source<'_>,
    options: &Options,
    started: Timestamp,
    lock: &HeldLock,
    cancel: &Cancel,
    counters: &Counters,
) -> Result<(Whole, Draft), ArchiveError> {
    let (index, named) = archive.load_index_files()?;
    let adopted = adopt::adopt(archive, &index, &named, lock, cancel)?;
    drop(named);
    let source = cleaned(source);
    let snapshot = draft(&source, options, started);
    let parent = match source {
        Source::Files(_) => parent::choose(archive, options.parent, &snapshot)?,
        Source::Stream { .. } => None,
    };
    let (closed, to_put) = bounded::<Filled>(0);
    let (emptied, empty) = bounded(options.uploads.get() + 2);
    let pipeline = Pipeline {
        archive,
        index,
        cutter: Cutter::new(archive.config().polynomial),
        data: Packer::new(options.pack_bytes, closed.clone(), empty.clone()),
        trees: Packer::new(options.pack_bytes, closed.clone(), empty),
        names: Names::default(),
        ledger: Mutex::new(Ledger::of(adopted)),
        root: Mutex::default(),
        zeros: OnceLock::new(),
        counters,
        level: options.level,
        started,
        cancel,
        live: matches!(&source, Source::Files(files) if files.live),
        errors: Mutex::default(),
        failure: Mutex::default(),
        stopped: AtomicBool::new(false),
    };
    let parent_id = parent.as_ref().map(|(id, _)| *id);
    std::thread::scope(|scope| {
        let mut uploaders = Uploaders { pipeline: &pipeline, closed: &closed, threads: Vec::new() };
        for _ in 0..options.uploads.get() {
            let (to_put, emptied, pipeline) = (to_put.clone(), emptied.clone(), &pipeline);
            uploaders.threads.extend(spawn(pipeline, scope, move || pack::upload(pipeline, &to_put, &emptied)));
        }
        // When all uploaders are gone, whoever hands over a pack must notice.
        drop(to_put);
        feed(&pipeline, scope, source, parent.map(|(_, snapshot)| snapshot.tree), options);
        if pipeline.check().is_ok() {
            let _ = pipeline.trees.flush().and_then(|()| pipeline.data.flush());
        }
    });
    let put = pack::finish(&pipeline);
    if let Some(failure) = pipeline.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(failure);
    }
    let root = pipeline.root.into_inner().unwrap_or_else(PoisonError::into_inner);
    let errors = pipeline.errors.into_inner().unwrap_or_else(PoisonError::into_inner);
    let whole = Whole::of(Ended { root, errors }, put?)?;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let draft = Draft {
        snapshot: Snapshot { parent: parent_id, ..snapshot },
        bytes: count(&counters.bytes_done),
        bytes_read: count(&counters.bytes_read),
        files: count(&counters.files_done),
    };
    Ok((whole, draft))
}

/// Starts the workers, feeds them the source, and waits until they are done with it.
fn feed<'scope, 'env: 'scope>(
    pipeline: &'scope Pipeline<'env>,
    scope: &'scope std::thread::Scope<'scope, 'env>,
    source: Source<'_>,
    parent_tree: Option<Id>,
    options: &Options,
) {
    let (batches, batches_in) = bounded::<Batch>(BATCHES_MAX);
    let (pieces, pieces_in) = bounded::<Piece>(options.workers.get());
    let queues = Queues::new(batches_in, pieces, pieces_in);
    let start = |_| {
        let queues = queues.clone();
        spawn(pipeline, scope, move || work::run(pipeline, &queues))
    };
    let workers: Vec<_> = (0..options.workers.get()).filter_map(start).collect();
    let fed = Tools::new(pipeline).and_then(|mut tools| match source {
        Source::Files(files) => {
            // If all workers are gone, handing them a batch must fail and not wait.
            drop(queues);
            walk::walk(pipeline, &mut tools, files, parent_tree, &batches)
        }
        Source::Stream { name, bytes, ended } => {
            let reading = queues.reading();
            let read = stream::read(pipeline, &mut tools, &queues, &name, bytes);
            drop(reading);
            read.and_then(|()| ended().map_err(|why| pipeline.fail(ArchiveError::Stream(why))))
        }
    });
    drop(batches);
    join(pipeline, workers);
    if let Err(Stop) = fed {
        // Whoever stopped has said why; if not, it is said here.
        pipeline.fail(ArchiveError::Broken("the store stopped without a reason".to_owned()));
    }
}

/// The uploaders. They end when this goes, also when the calling thread panics: otherwise it would wait for them and
/// they for it, for ever.
struct Uploaders<'u, 'scope, 'a> {
    pipeline: &'u Pipeline<'a>,
    closed: &'u Sender<Filled>,
    threads: Vec<ScopedJoinHandle<'scope, ()>>,
}

impl Drop for Uploaders<'_, '_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.pipeline.fail(ArchiveError::Broken("a thread of the store panicked".to_owned()));
        }
        for _ in &self.threads {
            // Nobody takes it when an uploader has panicked, which `join` tells.
            let _ = self.closed.send(Filled::default());
        }
        join(self.pipeline, std::mem::take(&mut self.threads));
    }
}

/// Starts a thread; without one, such as when no memory is left, the store fails.
fn spawn<'scope>(
    pipeline: &Pipeline<'_>,
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl FnOnce() + Send + 'scope,
) -> Option<ScopedJoinHandle<'scope, ()>> {
    let steps = step::of_this_thread();
    let work = move || {
        steps.go_on_here();
        work();
    };
    let started = std::thread::Builder::new().name("store".to_owned()).spawn_scoped(scope, work);
    started.map_err(|error| pipeline.fail(ArchiveError::Broken(format!("no thread: {error}")))).ok()
}

fn join(pipeline: &Pipeline<'_>, threads: Vec<ScopedJoinHandle<'_, ()>>) {
    for thread in threads {
        if thread.join().is_err() {
            pipeline.fail(ArchiveError::Broken("a thread of the store panicked".to_owned()));
        }
    }
}

/// Paths without `.`, doubled slashes and slashes at their ends, so that the same source has the same name.
fn cleaned(source: Source<'_>) -> Source<'_> {
    match source {
        Source::Files(files) => {
            let paths = files.paths.iter().map(|path| path.components().collect()).collect();
            Source::Files(Files { paths, ..files })
        }
        stream @ Source::Stream { .. } => stream,
    }
}

/// The snapshot as far as it is known before the source was read; its tree is put in at the gate.
fn draft(source: &Source<'_>, options: &Options, started: Timestamp) -> Snapshot {
    let (paths, excludes) = match source {
        Source::Files(files) => {
            let paths = files.paths.iter().map(|path| path.to_string_lossy().into_owned()).collect();
            (paths, files.exclude.clone())
        }
        Source::Stream { name, .. } => (vec![format!("/{name}")], Vec::new()),
    };
    Snapshot {
        time: started,
        parent: None,
        tree: Id::from_bytes([0; Id::BYTES]),
        paths,
        hostname: options.who.hostname.clone(),
        username: options.who.username.clone(),
        uid: options.who.uid,
        gid: options.who.gid,
        excludes,
        tags: options.tags.clone(),
        original: None,
        program_version: options.program.clone(),
    }
}
