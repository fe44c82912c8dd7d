//! Restores of repositories that stock restic wrote, of trees made by hand, and of what is broken.

mod broken;
mod hostile;
mod killed;
mod memory;
mod oracle;
mod tree;

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use super::*;
use crate::platform::command::Program;
use crate::repository::index::BlobIndex;
use crate::repository::open::Archive;
use crate::repository::snapshots;
use crate::storage::Folder as Place;

/// A folder as an entry.
pub(in crate::repository) fn folder_node(name: &str, subtree: Id) -> crate::format::tree::Node {
    memory::folder(name, subtree)
}

/// Writes a file, as tests may.
pub(in crate::repository) fn write(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}

/// A repository of stock restic's.
pub(in crate::repository) struct Stock {
    pub(in crate::repository) folder: tempfile::TempDir,
    opened: OnceLock<Archive>,
}

impl Stock {
    pub(in crate::repository) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("password"), b"secret");
        let stock = Self { folder, opened: OnceLock::new() };
        stock.run(&["init", "--repository-version", "2"], Path::new("/"));
        stock
    }

    pub(in crate::repository) fn path(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    pub(in crate::repository) fn run(&self, arguments: &[&str], from: &Path) {
        let program = Program::new("/usr/bin/restic")
            .args(["--quiet", "--no-cache", "--repo"])
            .arg(self.path())
            .arg("--password-file")
            .arg(self.folder.path().join("password"))
            .args(arguments.iter().copied());
        let output = program.prepare().current_dir(from).output().unwrap();
        assert!(output.status.success(), "restic {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Backs up what a folder holds; the root tree is that folder's.
    pub(in crate::repository) fn backup(&self, source: &Path) {
        self.run(&["backup", "--tag", "run=r1,service=web", "."], source);
    }

    /// Opened once: what a password costs is not what is tried here.
    pub(in crate::repository) fn open(&self) -> Archive {
        let open = || Archive::open(Arc::new(Place::open(&self.path()).unwrap()), b"secret").unwrap();
        self.opened.get_or_init(open).clone()
    }

    pub(super) fn last_tree(&self) -> (Archive, BlobIndex, Id) {
        let archive = self.open();
        let index = archive.load_index().unwrap();
        let tree = snapshots::list(&archive).unwrap().last().unwrap().snapshot.tree;
        (archive, index, tree)
    }

    /// Restores the last snapshot.
    pub(super) fn restore(&self, target: &Path) -> Result<Restored, RestoreError> {
        self.restore_some(target, &[])
    }

    pub(super) fn restore_some(&self, target: &Path, include: &[&str]) -> Result<Restored, RestoreError> {
        let (archive, index, tree) = self.last_tree();
        let options = Options { include: include.iter().map(PathBuf::from).collect(), threads: 2 };
        let never = AtomicBool::new(false);
        restore(&Reader::new(&archive, &index), tree, target, &options, &Counters::default(), &never)
    }
}
