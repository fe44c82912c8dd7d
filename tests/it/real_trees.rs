//! Two real trees as the corpus, `/usr` and cargo's registry: what our engine stores stock restic checks, diffs and
//! gives back, and what restic stores our engine gives back.
//!
//! A part of each, chosen by the order of names, so that the suite stays short; with `HESTNER_WHOLE_TREES` set, as
//! `scripts/check --long` does, the whole of both. The engine is called as a library: runs through daemon and worker
//! are tried in `archiver` and `fidelity`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use hestner_agent::format::key::Cost;
use hestner_agent::platform::clock::{SharedClock, SystemClock};
use hestner_agent::repository::open::{Archive, Who};
use hestner_agent::repository::restore::{self, Reader};
use hestner_agent::repository::snapshots;
use hestner_agent::repository::write::{Cancel, Counters, Files, Options, Source, Stored};
use hestner_agent::storage::Folder;
use hestner_tests::restic::Repository;
use hestner_tests::tree::{self, Manifest};
use hestner_tests::{Cmd, files, is_root_or_skips, world};

const PASSWORD: &str = "judge";
/// How long one step of the whole of `/usr` may take.
const LONG: Duration = Duration::from_secs(1800);
/// How much of a tree is taken unless all of it is asked for.
const PART: Part = Part { files: 9_000, bytes: 220_000_000 };

#[derive(Clone, Copy)]
struct Part {
    files: u64,
    bytes: u64,
}

fn is_whole_wanted() -> bool {
    std::env::var_os("HESTNER_WHOLE_TREES").is_some()
}

/// The folders in `folders`, in the order of their names, that fit into the part.
fn part_of(folders: &[&Path]) -> Vec<PathBuf> {
    let mut left = PART;
    let mut taken = Vec::new();
    for folder in folders {
        let children = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let children = children.map(|child| child.expect("an entry").path());
        let mut children: Vec<PathBuf> = children.filter(|path| path.is_dir() && !path.is_symlink()).collect();
        children.sort();
        for child in children {
            let size = size_of(&child);
            // One that is large does not take the place of many.
            if size.files <= left.files / 2 && size.bytes <= left.bytes / 2 {
                left = Part { files: left.files - size.files, bytes: left.bytes - size.bytes };
                taken.push(child);
            }
        }
    }
    taken
}

fn size_of(path: &Path) -> Part {
    let meta = fs::symlink_metadata(path).expect("an entry");
    if !meta.is_dir() {
        return Part { files: 1, bytes: meta.size() };
    }
    let children = fs::read_dir(path).expect("a folder").map(|child| size_of(&child.expect("an entry").path()));
    children.fold(Part { files: 1, bytes: 0 }, |a, b| Part { files: a.files + b.files, bytes: a.bytes + b.bytes })
}

fn clock() -> SharedClock {
    Arc::new(SystemClock)
}

/// Folders of one proof, and the paths that are backed up.
struct Proof {
    folder: PathBuf,
    paths: Vec<PathBuf>,
}

impl Proof {
    fn manifests(&self) -> Vec<Manifest> {
        self.paths.iter().map(|path| tree::manifest(path)).collect()
    }

    fn assert_restored(&self, expected: &[Manifest], target: &Path) {
        for (path, expected) in self.paths.iter().zip(expected) {
            tree::assert_same_manifest(expected, &tree::manifest(&tree::restored(target, path)));
        }
        fs::remove_dir_all(target).expect("our own folder");
    }

    fn repository(&self, name: &str) -> Repository {
        let password_file = files::write(self.folder.join("password"), PASSWORD);
        Repository { path: self.folder.join(name), password_file }
    }

    fn store(&self, archive: &Archive) -> Stored {
        let files = Files { paths: self.paths.clone(), one_file_system: true, ..Files::default() };
        let options = Options::new(Who::this_process());
        let stored = archive.store(Source::Files(files), &options, &clock(), &Cancel::default(), &Counters::default());
        stored.expect("a snapshot")
    }

    /// Ours, judged by restic: whole by its check, equal to the source when it restores it, and unchanged at the
    /// second time without a byte being read.
    fn ours_is_right(&self, expected: &[Manifest]) -> (Archive, Repository, Stored) {
        let repository = self.repository("ours");
        let storage = Arc::new(Folder::create(&repository.path).expect("a folder"));
        let made = Archive::make(storage, PASSWORD.as_bytes(), Cost::default(), &Who::this_process(), clock().as_ref());
        let archive = made.expect("a repository");
        let first = self.store(&archive);
        let again = self.store(&archive);
        assert!(first.bytes_read > 0 && first.bytes_read == first.bytes, "{first:?}");
        assert_eq!((again.bytes_read, again.parent), (0, Some(first.snapshot)));
        assert_eq!((again.bytes, again.files), (first.bytes, first.files));
        // The folders above the source are not ours alone, and their times change.
        let stored: u64 = again.objects.iter().map(|(_, bytes)| bytes).sum();
        assert!(stored < 20_000, "nothing but the folders above may be new: {:?}", again.objects);
        assert_eq!(diff(&repository, &first, &again), BTreeSet::new());
        let check = repository.stock(&["check", "--read-data"]).within(LONG).run();
        assert_eq!(check.code, Some(0), "{check}");
        let target = self.folder.join("by-restic");
        let id = again.snapshot.to_hex();
        repository.stock(&["restore", &id, "--target"]).arg(&target).within(LONG).ok();
        self.assert_restored(expected, &target);
        (archive, repository, again)
    }

    /// restic's, given back by ours.
    fn theirs_comes_back(&self, expected: &[Manifest]) {
        let repository = self.repository("theirs");
        repository.stock(&["init", "--repository-version", "2"]).ok();
        repository.stock(&["backup", "--one-file-system"]).args(&self.paths).within(LONG).ok();
        let storage = Arc::new(Folder::open(&repository.path).expect("a repository"));
        let archive = Archive::open(storage, PASSWORD.as_bytes()).expect("an open repository");
        let snapshot = snapshots::list(&archive).expect("snapshots").pop().expect("a snapshot").snapshot;
        let index = archive.load_index().expect("an index");
        let target = self.folder.join("by-hestner");
        fs::create_dir_all(&target).expect("a folder");
        let (options, counters) = (restore::Options::default(), restore::Counters::default());
        let reader = Reader::new(&archive, &index);
        let restored = restore::restore(&reader, snapshot.tree, &target, &options, &counters, &AtomicBool::new(false));
        let restored = restored.expect("a whole restore");
        assert_eq!(restored.warnings.count, 0, "{:?}", restored.warnings);
        self.assert_restored(expected, &target);
    }
}

#[test]
fn usr_is_stored_as_restic_reads_it_and_given_back_as_restic_stored_it() {
    if !is_root_or_skips("usr_is_stored_as_restic_reads_it_and_given_back_as_restic_stored_it") {
        return;
    }
    let folder = world::own_folder("real-usr");
    let paths = match is_whole_wanted() {
        true => vec![PathBuf::from("/usr")],
        false => part_of(&[Path::new("/usr/lib"), Path::new("/usr/share")]),
    };
    let proof = Proof { folder: folder.clone(), paths };
    let before = proof.manifests();
    assert!(before.iter().map(Manifest::len).sum::<usize>() > 1000, "that is no system");
    proof.ours_is_right(&before);
    proof.theirs_comes_back(&before);
    fs::remove_dir_all(folder).expect("our own folder");
}

#[test]
fn registry_is_stored_given_back_and_diffed_as_restic_says() {
    if !is_root_or_skips("registry_is_stored_given_back_and_diffed_as_restic_says") {
        return;
    }
    let folder = world::own_folder("real-registry");
    let source = copy_of_the_registry(&folder.join("source"));
    let proof = Proof { folder: folder.clone(), paths: vec![source.clone()] };
    let before = proof.manifests();
    assert!(before[0].len() > 1000, "that is no registry");
    let (archive, repository, first) = proof.ours_is_right(&before);
    proof.theirs_comes_back(&before);

    let expected = change(&source);
    let second = proof.store(&archive);
    assert_eq!(diff(&repository, &first, &second), expected);
    fs::remove_dir_all(folder).expect("our own folder");
}

/// What restic tells of two snapshots: a mark and a path. A folder of which nothing but its own times has changed is
/// told as well, and left out here.
fn diff(repository: &Repository, before: &Stored, after: &Stored) -> BTreeSet<String> {
    let args = ["diff", "--metadata", &before.snapshot.to_hex(), &after.snapshot.to_hex()];
    let told = repository.stock(&args).within(LONG).ok();
    let lines = told.lines().filter(|line| ["+ ", "- ", "M ", "U "].iter().any(|mark| line.starts_with(mark)));
    lines.filter(|line| !(line.starts_with('U') && line.ends_with('/'))).map(squeezed).collect()
}

/// Where cargo keeps the sources of what this was built from.
fn copy_of_the_registry(to: &Path) -> PathBuf {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cargo"));
    let registry = home.join("registry/src");
    let inside = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        entries.map(|entry| entry.expect("an entry").path()).collect()
    };
    let mut indexes = inside(&registry);
    indexes.sort();
    let chosen = match is_whole_wanted() {
        true => indexes.iter().flat_map(|index| inside(index)).collect(),
        false => part_of(&indexes.iter().map(PathBuf::as_path).collect::<Vec<_>>()),
    };
    fs::create_dir_all(to).expect("a folder");
    Cmd::new("cp").args(["--archive", "--target-directory"]).arg(to).args(&chosen).within(LONG).ok();
    to.to_owned()
}

/// Changes of every kind; returns what restic must tell of them.
fn change(source: &Path) -> BTreeSet<String> {
    let mut names: Vec<PathBuf> =
        fs::read_dir(source).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    names.sort();
    let file_in = |folder: &PathBuf| {
        let children = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
        children.filter(|path| path.is_file()).min().expect("a file in every crate")
    };
    let mut folders = names.iter().filter(|name| name.is_dir());
    let mut next = || folders.next().expect("five crates");
    let (grown, gone, other_mode, renamed, moved) =
        (file_in(next()), file_in(next()), file_in(next()), file_in(next()), next().clone());
    let mut told = BTreeSet::new();
    let mut tell = |mark: &str, path: &Path, end: &str| told.insert(format!("{mark} {}{end}", path.display()));

    files::write(&grown, [fs::read(&grown).expect("a file"), b"\n// more\n".to_vec()].concat());
    tell("M", &grown, "");
    fs::remove_file(&gone).expect("a file");
    tell("-", &gone, "");
    files::set_mode(&other_mode, 0o640);
    tell("U", &other_mode, "");
    let new_name = renamed.with_extension("renamed");
    Cmd::new("mv").arg(&renamed).arg(&new_name).ok();
    tell("-", &renamed, "");
    tell("+", &new_name, "");
    let new = files::write(source.join("new-folder/new.txt"), "new");
    tell("+", new.parent().expect("a folder"), "/");
    tell("+", &new, "");
    for (path, is_folder) in everything_below(&moved) {
        tell("-", &path, if is_folder { "/" } else { "" });
    }
    fs::remove_dir_all(&moved).expect("a crate");
    told
}

/// A folder and all in it; whether each is a folder.
fn everything_below(folder: &Path) -> Vec<(PathBuf, bool)> {
    let mut found = vec![(folder.to_owned(), true)];
    for child in fs::read_dir(folder).expect("a folder") {
        let child = child.expect("an entry").path();
        match child.is_dir() {
            true => found.extend(everything_below(&child)),
            false => found.push((child, false)),
        }
    }
    found
}

/// `+    /path` as `+ /path`.
fn squeezed(line: &str) -> String {
    let (mark, path) = line.split_at(1);
    format!("{mark} {}", path.trim_start())
}
