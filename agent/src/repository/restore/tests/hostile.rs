//! Trees that want to write outside the target, or over each other.

use std::fs;
use std::os::unix::fs::symlink as make_symlink;

use super::memory::{Memory, folder, node, symlink};
use super::*;
use crate::format::BlobKind;
use crate::format::tree::NodeKind;

/// A target inside a folder, beside something that must not change.
struct World {
    base: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(base.path().join("target")).unwrap();
        fs::create_dir(base.path().join("outside")).unwrap();
        write(&base.path().join("outside/victim"), b"untouched");
        Self { base }
    }

    fn target(&self) -> PathBuf {
        self.base.path().join("target")
    }

    fn outside(&self) -> PathBuf {
        self.base.path().join("outside")
    }

    fn assert_untouched(&self) {
        let names: Vec<_> = fs::read_dir(self.outside()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["victim"]);
        assert_eq!(fs::read(self.outside().join("victim")).unwrap(), b"untouched");
        let names = fs::read_dir(self.base.path()).unwrap().count();
        assert_eq!(names, 2);
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused_and_the_others_restored() {
    for name in ["..", ".", "", "a/b", "../outside/victim", "/etc/hestner-test", "nul\0"] {
        let (world, mut memory) = (World::new(), Memory::default());
        let good = memory.file("good", b"good");
        let evil = memory.file(name, b"evil");
        let below = memory.tree(vec![evil]);
        let root = memory.tree(vec![folder("f", below), good]);
        let error = memory.restore(root, &world.target()).unwrap_err();
        assert!(
            matches!(&error, RestoreError::Incomplete { failures, .. } if failures.count == 1),
            "{name:?}: {error}"
        );
        assert!(error.to_string().contains(&format!("tree {below}")), "{error}");
        assert_eq!(fs::read(world.target().join("good")).unwrap(), b"good");
        assert_eq!(fs::read_dir(world.target().join("f")).unwrap().count(), 0);
        world.assert_untouched();
    }
}

#[test]
fn symlink_and_folder_of_one_name_are_refused() {
    let (world, mut memory) = (World::new(), Memory::default());
    let evil = memory.file("victim", b"evil");
    let below = memory.tree(vec![evil]);
    let link = symlink("a", world.outside().to_str().unwrap());
    let root = memory.tree(vec![link, folder("a", below)]);
    let error = memory.restore(root, &world.target()).unwrap_err();
    assert!(error.to_string().contains("is not in order"), "{error}");
    world.assert_untouched();
}

#[test]
fn symlink_in_the_way_is_replaced_and_never_followed() {
    let (world, mut memory) = (World::new(), Memory::default());
    make_symlink(world.outside(), world.target().join("folder")).unwrap();
    make_symlink(world.outside().join("victim"), world.target().join("file")).unwrap();
    make_symlink(world.outside().join("victim"), world.target().join("pipe")).unwrap();
    make_symlink(world.outside().join("new"), world.target().join("link")).unwrap();
    let first = memory.file("victim", b"inside");
    let below = memory.tree(vec![first]);
    let file = memory.file("file", b"file");
    let empty = memory.file("link", b"");
    let root = memory.tree(vec![file, folder("folder", below), empty, node("pipe", NodeKind::Fifo)]);
    memory.restore(root, &world.target()).unwrap();
    world.assert_untouched();
    let kind = |name: &str| world.target().join(name).symlink_metadata().unwrap().file_type();
    assert!(kind("folder").is_dir() && kind("file").is_file() && kind("link").is_file());
    assert_eq!(fs::read(world.target().join("folder/victim")).unwrap(), b"inside");
}

#[test]
fn hard_links_that_are_none_become_files_of_their_own() {
    let (world, mut memory) = (World::new(), Memory::default());
    let mut nodes = vec![memory.file("a", b"one"), memory.file("b", b"two"), memory.file("c", b"one")];
    nodes.push(node("d", NodeKind::Fifo));
    for node in &mut nodes {
        (node.inode, node.device_id, node.links) = (7, 7, 4);
    }
    let root = memory.tree(nodes);
    memory.restore(root, &world.target()).unwrap();
    let read = |name: &str| fs::read(world.target().join(name)).unwrap();
    assert_eq!((read("a"), read("b"), read("c")), (b"one".to_vec(), b"two".to_vec(), b"one".to_vec()));
}

#[test]
fn folder_that_holds_something_is_not_replaced_by_a_file() {
    let (world, mut memory) = (World::new(), Memory::default());
    fs::create_dir(world.target().join("a")).unwrap();
    write(&world.target().join("a/mine"), b"mine");
    fs::create_dir(world.target().join("b")).unwrap();
    let (a, b) = (memory.file("a", b"file"), memory.file("b", b"file"));
    let root = memory.tree(vec![a, b]);
    let error = memory.restore(root, &world.target()).unwrap_err();
    assert!(matches!(&error, RestoreError::Incomplete { failures, .. } if failures.count == 1), "{error}");
    assert_eq!(fs::read(world.target().join("a/mine")).unwrap(), b"mine");
    assert_eq!(fs::read(world.target().join("b")).unwrap(), b"file");
}

#[test]
fn names_like_those_of_part_files_are_restored() {
    let (world, mut memory) = (World::new(), Memory::default());
    let digits = Id::of(b"x").to_hex();
    let part = format!("{}0-{}", super::super::folder::PART_PREFIX, &digits[..24]);
    let nodes = vec![memory.file(&part, b"looks like a part"), memory.file("x", b"another")];
    let root = memory.tree(nodes);
    for _ in 0..2 {
        memory.restore(root, &world.target()).unwrap();
        assert_eq!(fs::read(world.target().join(&part)).unwrap(), b"looks like a part");
        assert_eq!(fs::read(world.target().join("x")).unwrap(), b"another");
    }
}

#[test]
fn size_that_is_not_the_sum_of_the_pieces_is_refused() {
    let (world, mut memory) = (World::new(), Memory::default());
    let mut file = memory.file("a", b"content");
    if let NodeKind::File { size, .. } = &mut file.kind {
        *size = 1 << 60;
    }
    let root = memory.tree(vec![file]);
    let error = memory.restore(root, &world.target()).unwrap_err();
    assert!(error.to_string().contains("its pieces have 7"), "{error}");
    assert!(!world.target().join("a").exists());
}

#[test]
fn folders_deeper_than_any_path_are_refused() {
    let (world, mut memory) = (World::new(), Memory::default());
    let mut tree = memory.tree(Vec::new());
    for _ in 0..3000 {
        tree = memory.tree(vec![folder("d", tree)]);
    }
    let error = memory.restore(tree, &world.target()).unwrap_err();
    assert!(error.to_string().contains("too deep"), "{error}");
}

/// A folder that holds one folder twice, which holds another twice, and so on: a tree of 2^60 folders, in 60 blobs.
#[test]
fn tree_that_names_one_folder_again_and_again_is_refused() {
    let (world, mut memory) = (World::new(), Memory::default());
    let mut tree = memory.tree(vec![node("end", NodeKind::Fifo)]);
    for _ in 0..60 {
        tree = memory.tree(vec![folder("a", tree), folder("b", tree)]);
    }
    let error = memory.restore(tree, &world.target()).unwrap_err();
    assert!(matches!(error, RestoreError::Endless { .. }), "{error}");
    world.assert_untouched();
}

/// As what is mounted in several places of a source.
#[test]
fn folder_that_stands_in_several_places_is_restored_in_each() {
    let (world, mut memory) = (World::new(), Memory::default());
    let file = memory.file("file", b"content");
    let inner = memory.tree(vec![file]);
    let outer = memory.tree(vec![folder("inner", inner)]);
    let names = ["a", "b", "c", "d", "e", "f"];
    let root = memory.tree(names.map(|name| folder(name, outer)).to_vec());
    memory.restore(root, &world.target()).unwrap();
    for name in names {
        assert_eq!(fs::read(world.target().join(name).join("inner/file")).unwrap(), b"content");
    }
}

#[test]
fn owner_that_no_kernel_has_is_a_warning() {
    let (world, mut memory) = (World::new(), Memory::default());
    let mut file = memory.file("a", b"content");
    (file.uid, file.mode) = (u32::MAX, 0o4755);
    let root = memory.tree(vec![file]);
    let restored = memory.restore(root, &world.target()).unwrap();
    assert_eq!(restored.warnings.count, 2, "{:?}", restored.warnings);
    assert!(memory.find(BlobKind::Tree, &root).is_some());
}
