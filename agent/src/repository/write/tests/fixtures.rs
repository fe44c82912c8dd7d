//! A repository beside a source, and restic to judge it.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;

use crate::format::key::Cost;
use crate::format::tree::{self, Node, NodeKind};
use crate::format::{BlobKind, Id};
use crate::platform::clock::{SharedClock, SystemClock};
use crate::storage::{Folder, Kind, Object, Storage, StorageError};

use super::super::super::open::{Archive, ArchiveError, Who};
use super::super::{Cancel, Counters, Files, Options, Source, Stored};

const PASSWORD: &str = "secret";
/// A password that costs little: it guards nothing.
const CHEAP: Cost = Cost { log_n: 10, r: 8, p: 1 };

pub(super) struct Place {
    root: tempfile::TempDir,
}

pub(super) fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

impl Place {
    pub(super) fn new() -> Self {
        let place = Self { root: tempfile::tempdir().unwrap() };
        for folder in [place.source(), place.repository()] {
            std::fs::create_dir(folder).unwrap();
        }
        let storage = Arc::new(Folder::open(&place.repository()).unwrap());
        Archive::make(storage, PASSWORD.as_bytes(), CHEAP, &Who::this_process(), clock().as_ref()).unwrap();
        place
    }

    pub(super) fn source(&self) -> PathBuf {
        self.root.path().join("source")
    }

    pub(super) fn repository(&self) -> PathBuf {
        self.root.path().join("repository")
    }

    pub(super) fn folder(&self) -> Folder {
        Folder::open(&self.repository()).unwrap()
    }

    pub(super) fn open(&self) -> Archive {
        self.open_at(Arc::new(self.folder())).unwrap()
    }

    pub(super) fn open_at(&self, storage: Arc<dyn Storage>) -> Result<Archive, ArchiveError> {
        Archive::open(storage, PASSWORD.as_bytes())
    }

    pub(super) fn open_with(&self, password: &[u8]) -> Result<Archive, ArchiveError> {
        Archive::open(Arc::new(self.folder()), password)
    }

    pub(super) fn hooked(
        &self,
        hook: impl Fn(&Object) -> Result<(), StorageError> + Send + Sync + 'static,
    ) -> Arc<Hooked> {
        Arc::new(Hooked { inner: self.folder(), hook: Box::new(hook), before_proof: Box::new(|_| Ok(())) })
    }

    /// A place where something happens to an object after it was put.
    pub(super) fn hooked_before_proof(
        &self,
        hook: impl Fn(&Object) -> Result<(), StorageError> + Send + Sync + 'static,
    ) -> Arc<Hooked> {
        Arc::new(Hooked { inner: self.folder(), hook: Box::new(|_| Ok(())), before_proof: Box::new(hook) })
    }

    pub(super) fn files(&self) -> Files {
        Files { paths: vec![self.source()], ..Files::default() }
    }

    pub(super) fn store(&self) -> Result<Stored, ArchiveError> {
        self.store_in(&self.open())
    }

    pub(super) fn store_in(&self, archive: &Archive) -> Result<Stored, ArchiveError> {
        store(archive, Source::Files(self.files()), &Cancel::default())
    }

    pub(super) fn store_files(&self, files: Files) -> Result<Stored, ArchiveError> {
        store(&self.open(), Source::Files(files), &Cancel::default())
    }

    pub(super) fn store_with(&self, change: impl FnOnce(&mut Options)) -> Result<Stored, ArchiveError> {
        let mut options = Options::new(Who::this_process());
        change(&mut options);
        let (cancel, counters) = (Cancel::default(), Counters::default());
        self.open().store(Source::Files(self.files()), &options, &clock(), &cancel, &counters)
    }

    pub(super) fn snapshots(&self) -> Vec<String> {
        self.folder().list(Kind::Snapshot).unwrap().into_iter().map(|(name, _)| name).collect()
    }

    pub(super) fn newest_but(&self, stored: &Stored) -> String {
        let ours = stored.snapshot.to_hex();
        self.snapshots().into_iter().find(|name| *name != ours).unwrap()
    }

    /// The source's own tree: the folders above it are others' and change.
    pub(super) fn source_tree(&self, stored: &Stored) -> Id {
        let is_source = |node: &Node| node.name == b"source";
        match self.nodes(stored).into_iter().find(is_source).map(|node| node.kind) {
            Some(NodeKind::Folder { subtree }) => subtree,
            other => panic!("the source is {other:?}"),
        }
    }

    /// All nodes of a snapshot.
    pub(super) fn nodes(&self, stored: &Stored) -> Vec<Node> {
        let archive = self.open();
        let index = archive.load_index().unwrap();
        let (mut found, mut queue): (Vec<Node>, Vec<Id>) = (Vec::new(), vec![stored.tree]);
        while let Some(id) = queue.pop() {
            let at = index.find(BlobKind::Tree, &id).unwrap();
            let pack = Object::new(Kind::Pack, at.pack.to_hex());
            let sealed = self.folder().get_range(&pack, at.offset.into(), at.length.into()).unwrap();
            for node in tree::parse(&archive.open_blob(&id, &at, sealed).unwrap()).unwrap() {
                if let NodeKind::Folder { subtree } = node.kind {
                    queue.push(subtree);
                }
                found.push(node);
            }
        }
        found
    }

    #[expect(clippy::disallowed_methods, reason = "restic judges; it ends by itself")]
    fn run(&self, args: &[&str]) -> Output {
        let mut restic = std::process::Command::new("/usr/bin/restic");
        restic.env("RESTIC_PASSWORD", PASSWORD).arg("-r").arg(self.repository()).arg("--no-cache").args(args);
        restic.output().expect("restic is installed")
    }

    /// What restic says; it must end well.
    pub(super) fn restic(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "restic {args:?}: {complaint}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What restic complains about; it must fail.
    pub(super) fn restic_fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "restic {args:?} went through");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Restic finds nothing wrong, in no byte.
    pub(super) fn check(&self) {
        self.restic(&["check", "--read-data", "--no-lock"]);
    }

    /// The source as restic restores it.
    pub(super) fn restored(&self, stored: &Stored) -> PathBuf {
        let target = self.root.path().join(format!("restored-{}", stored.snapshot));
        if !target.exists() {
            self.restic(&["restore", &stored.snapshot.to_hex(), "--target", target.to_str().unwrap()]);
        }
        target.join(self.source().strip_prefix("/").unwrap())
    }
}

type Hook = dyn Fn(&Object) -> Result<(), StorageError> + Send + Sync;

/// A folder that asks before every put, and before what was put is read back.
pub(super) struct Hooked {
    inner: Folder,
    hook: Box<Hook>,
    before_proof: Box<Hook>,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Storage for Hooked {
    fn place(&self) -> String {
        self.inner.place()
    }
    fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError> {
        (self.hook)(object)?;
        self.inner.put(object, bytes)
    }
    fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
        self.inner.get(object, bytes_max)
    }
    fn read_back(&self, object: &Object, bytes_max: u64) -> Result<crate::storage::Seen, StorageError> {
        (self.before_proof)(object)?;
        self.inner.read_back(object, bytes_max)
    }
    fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError> {
        self.inner.get_range(object, offset, length)
    }
    fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
        self.inner.list(kind)
    }
    fn remove(&self, object: &Object) -> Result<(), StorageError> {
        self.inner.remove(object)
    }
}

pub(super) fn store(archive: &Archive, source: Source<'_>, cancel: &Cancel) -> Result<Stored, ArchiveError> {
    let options = Options::new(Who::this_process());
    archive.store(source, &options, &clock(), cancel, &Counters::default())
}

pub(super) fn put_file(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

/// Bytes that were put.
pub(super) fn added(stored: &Stored) -> u64 {
    stored.objects.iter().map(|(_, bytes)| bytes).sum()
}

/// Bytes that cannot be compressed.
pub(super) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What must be the same of two entries.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    device: u64,
    links: Option<u64>,
    target: Option<PathBuf>,
    content: Option<(u64, Id)>,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

fn see(path: &Path) -> Seen {
    let metadata = path.symlink_metadata().unwrap();
    let is_file = metadata.is_file();
    let mut list = [0_u8; 4096];
    let length = rustix::fs::llistxattr(path, &mut list).unwrap_or(0);
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = [0_u8; 8192];
        let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        value[..length].to_vec()
    };
    Seen {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        device: metadata.rdev(),
        links: is_file.then(|| metadata.nlink()),
        target: path.read_link().ok(),
        content: is_file.then(|| (metadata.len(), Id::of(&std::fs::read(path).unwrap()))),
        attributes: names.map(|name| (name.to_vec(), value(name))).collect(),
    }
}

fn all_below(root: &Path, at: &Path, found: &mut BTreeMap<PathBuf, Seen>) {
    found.insert(at.strip_prefix(root).unwrap().to_owned(), see(at));
    if at.symlink_metadata().unwrap().is_dir() {
        for entry in at.read_dir().unwrap() {
            all_below(root, &entry.unwrap().path(), found);
        }
    }
}

/// Two folders hold the same, with all that the format keeps.
pub(super) fn assert_same(a: &Path, b: &Path) {
    let (mut left, mut right) = (BTreeMap::new(), BTreeMap::new());
    all_below(a, a, &mut left);
    all_below(b, b, &mut right);
    for (path, seen) in &left {
        assert_eq!(Some(seen), right.get(path), "{}", path.display());
    }
    assert_eq!(left.len(), right.len());
}
