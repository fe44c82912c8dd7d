//! A repository of restic's is right, and whatever is wrong with it is named.

use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::format::BlobKind;
use crate::format::index::{Index, IndexedPack};
use crate::repository::restore::tests::{Stock, write};
use crate::repository::snapshots;
use crate::storage::{Kind, Object};

fn verify_all(stock: &Stock, extent: Extent) -> Result<Verified, VerifyError> {
    verify(&stock.open(), extent, 2, &Counters::default(), &AtomicBool::new(false))
}

fn stored() -> Stock {
    let (source, stock) = (tempfile::tempdir().unwrap(), Stock::new());
    fs::create_dir_all(source.path().join("deep/er")).unwrap();
    for number in 0..40_u32 {
        let content: Vec<u8> = (0..60_000_u32).map(|n| (n.wrapping_mul(n ^ number) >> 7) as u8).collect();
        write(&source.path().join(format!("deep/er/{number}")), &content);
    }
    stock.backup(source.path());
    write(&source.path().join("later"), b"later");
    stock.backup(source.path());
    stock
}

fn packs(stock: &Stock) -> Vec<PathBuf> {
    let folders = fs::read_dir(stock.path().join("data")).unwrap();
    let mut found: Vec<_> = folders
        .flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    found.sort_by_key(|path| path.metadata().unwrap().len());
    found
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::remove_file(path).unwrap();
    write(path, &bytes);
}

fn complaint(stock: &Stock, extent: Extent) -> String {
    match verify_all(stock, extent) {
        Err(error @ VerifyError::Damaged(_)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

#[test]
fn whole_repository_is_found_right_at_every_extent() {
    let stock = stored();
    let all = verify_all(&stock, Extent::All).unwrap();
    assert_eq!((all.snapshots, all.packs, all.packs_read), (2, packs(&stock).len() as u64, all.packs));
    let size: u64 = packs(&stock).iter().map(|path| path.metadata().unwrap().len()).sum();
    assert_eq!(all.bytes_read, size);
    assert_eq!(verify_all(&stock, Extent::Structure).unwrap().packs_read, 0);
    let some = verify_all(&stock, Extent::Bytes { bytes: 1, seed: 3 }).unwrap();
    assert_eq!(some.packs_read, 1);
    let percent = |percent| verify_all(&stock, Extent::Percent { percent, seed: 1 }).unwrap().packs_read;
    assert_eq!((percent(0.0), percent(100.0)), (0, all.packs));
}

#[test]
fn changed_byte_in_a_pack_is_found_and_named_with_who_needs_it() {
    let stock = stored();
    let pack = packs(&stock).pop().unwrap();
    change(&pack, |bytes| bytes[1000] ^= 1);
    assert!(verify_all(&stock, Extent::Structure).is_ok());
    let told = complaint(&stock, Extent::All);
    assert!(told.contains(name(&pack)) && told.contains("/deep/er/"), "{told}");
}

#[test]
fn every_byte_of_the_smallest_pack_counts() {
    let stock = stored();
    let pack = packs(&stock).remove(0);
    let length = fs::read(&pack).unwrap().len();
    for at in (0..length).step_by(length / 40 + 1).chain(length - 4..length) {
        change(&pack, |bytes| bytes[at] ^= 0x10);
        assert!(complaint(&stock, Extent::All).contains(name(&pack)), "byte {at}");
        change(&pack, |bytes| bytes[at] ^= 0x10);
    }
    assert!(verify_all(&stock, Extent::All).is_ok());
}

#[test]
fn pack_that_is_missing_or_cut_short_is_a_matter_of_structure() {
    let stock = stored();
    let pack = packs(&stock).pop().unwrap();
    change(&pack, |bytes| bytes.truncate(bytes.len() - 1));
    let told = complaint(&stock, Extent::Structure);
    assert!(told.contains(name(&pack)) && told.contains("instead of"), "{told}");
    fs::remove_file(&pack).unwrap();
    let told = complaint(&stock, Extent::Structure);
    assert!(told.contains("it is missing") && told.contains("needed by snapshot"), "{told}");
}

#[test]
fn damaged_index_and_snapshot_are_named() {
    for folder in ["index", "snapshots"] {
        let stock = stored();
        let file = fs::read_dir(stock.path().join(folder)).unwrap().next().unwrap().unwrap().path();
        change(&file, |bytes| bytes[30] ^= 1);
        let told = complaint(&stock, Extent::Structure);
        assert!(told.contains(&format!("{folder}/{}", name(&file))), "{told}");
    }
}

/// Puts a pack with trees, an index file that names it, and a snapshot of the last tree.
fn plant(stock: &Stock, trees: &[Vec<u8>]) {
    use crate::format::pack::{PackedBlob, footer};
    let archive = stock.open();
    let (mut bytes, mut blobs) = (Vec::new(), Vec::new());
    for tree in trees {
        let sealed = archive.cipher().seal(&[7; 16], tree).unwrap();
        let (offset, length) = (bytes.len() as u32, sealed.len() as u32);
        blobs.push(PackedBlob { kind: BlobKind::Tree, id: Id::of(tree), offset, length, raw_length: None });
        bytes.extend_from_slice(&sealed);
    }
    bytes.extend_from_slice(&footer(archive.cipher(), &[8; 16], &blobs).unwrap());
    let pack = IndexedPack { id: Id::of(&bytes), blobs };
    archive.storage().put(&Object::new(Kind::Pack, pack.id.to_hex()), &bytes).unwrap();
    let index = Index { supersedes: Vec::new(), packs: vec![pack] };
    archive.write_file(Kind::Index, &index.to_bytes().unwrap()).unwrap();
    let mut snapshot = snapshots::list(&archive).unwrap().remove(0).snapshot;
    snapshot.tree = Id::of(trees.last().unwrap());
    archive.write_file(Kind::Snapshot, &snapshot.to_bytes().unwrap()).unwrap();
}

fn folder_tree(names: &[&str], below: &[u8]) -> Vec<u8> {
    let subtree = Id::of(below);
    let nodes = names.iter().map(|name| crate::repository::restore::tests::folder_node(name, subtree));
    crate::format::tree::to_bytes(nodes.collect())
}

#[test]
fn tree_that_names_one_folder_again_and_again_is_read_once() {
    let stock = stored();
    let mut trees = vec![crate::format::tree::to_bytes(Vec::new())];
    for _ in 0..60 {
        let above = folder_tree(&["a", "b"], trees.last().unwrap());
        trees.push(above);
    }
    plant(&stock, &trees);
    let before = verify_all(&stored(), Extent::Structure).unwrap().trees;
    assert_eq!(verify_all(&stock, Extent::Structure).unwrap().trees, before + 61);
}

#[test]
fn folders_without_end_are_a_finding() {
    let stock = stored();
    let mut trees = vec![crate::format::tree::to_bytes(Vec::new())];
    for _ in 0..2500 {
        let above = folder_tree(&["d"], trees.last().unwrap());
        trees.push(above);
    }
    plant(&stock, &trees);
    let told = complaint(&stock, Extent::Structure);
    assert!(told.contains("folders are deeper than 2048"), "{told}");
}

#[test]
fn cancelled_verification_says_so() {
    let stock = stored();
    let ended = verify(&stock.open(), Extent::All, 2, &Counters::default(), &AtomicBool::new(true));
    assert!(matches!(ended, Err(VerifyError::Cancelled)), "{ended:?}");
}

#[test]
fn snapshots_are_listed_found_by_tag_and_removed_by_id() {
    let stock = stored();
    let archive = stock.open();
    let all = snapshots::list(&archive).unwrap();
    assert_eq!(all.len(), 2);
    assert!(all[0].time() < all[1].time());
    assert_eq!((all[0].run_uid(), all[0].service()), ("r1", "web"));
    assert_eq!(snapshots::with_tag(&archive, &snapshots::run_tag("r1")).unwrap(), all);
    assert!(snapshots::with_tag(&archive, "run=r").unwrap().is_empty());
    assert_eq!(snapshots::get(&archive, &all[1].id).unwrap(), all[1]);
    snapshots::forget(&archive, &[all[0].id, Id::of(b"never there")]).unwrap();
    assert_eq!(snapshots::list(&archive).unwrap(), all[1..]);
    stock.run(&["check"], Path::new("/"));
}
