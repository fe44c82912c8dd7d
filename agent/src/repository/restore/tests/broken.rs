//! Packs, trees and indexes that are damaged or missing.

use std::fs;

use super::memory::{Memory, folder};
use super::tree::noise;
use super::*;
use crate::format::BlobKind;
use crate::format::tree::{Node, NodeKind};

fn pieces(node: &Node) -> Vec<Id> {
    match &node.kind {
        NodeKind::File { content, .. } => content.clone(),
        _ => Vec::new(),
    }
}

fn failures(result: Result<Restored, RestoreError>) -> Notes {
    match result {
        Err(RestoreError::Incomplete { failures, .. }) => failures,
        other => panic!("{other:?}"),
    }
}

#[test]
fn damaged_blob_is_named_with_the_file_that_needs_it_and_all_others_are_restored() {
    let (target, mut memory) = (tempfile::tempdir().unwrap(), Memory::default());
    let (bad, good) = (memory.file("bad", &noise(5000, 1)), memory.file("good", &noise(5000, 2)));
    let damaged = pieces(&bad)[2];
    memory.damage(BlobKind::Data, &damaged);
    let mut link = bad.clone();
    link.name = b"link".to_vec();
    let mut nodes = vec![bad, good, link];
    for at in [0, 2] {
        (nodes[at].inode, nodes[at].links) = (3, 2);
    }
    let root = memory.tree(nodes);
    let failures = failures(memory.restore(root, target.path()));
    let told = failures.first.join("\n");
    assert!(told.contains("/bad: ") && told.contains(&damaged.to_hex()) && told.contains("/link: "), "{told}");
    assert_eq!(failures.count, 2);
    assert!(!target.path().join("bad").exists() && !target.path().join("link").exists());
    assert_eq!(fs::read(target.path().join("good")).unwrap(), noise(5000, 2));

    // Once the repository is mended, the same call finishes, and fetches only what was missing.
    memory.damage(BlobKind::Data, &damaged);
    let mended = memory.restore(root, target.path()).unwrap();
    assert_eq!((mended.files, mended.bytes_kept), (2, 9000));
    assert_eq!(fs::read(target.path().join("link")).unwrap(), noise(5000, 1));
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 3, "no part file is left");
}

#[test]
fn old_file_stays_when_its_new_content_cannot_be_had() {
    let (target, mut memory) = (tempfile::tempdir().unwrap(), Memory::default());
    write(&target.path().join("bad"), b"old");
    let bad = memory.file("bad", b"new content");
    memory.damage(BlobKind::Data, &pieces(&bad)[0]);
    let root = memory.tree(vec![bad]);
    assert_eq!(failures(memory.restore(root, target.path())).count, 1);
    assert_eq!(fs::read(target.path().join("bad")).unwrap(), b"old");
}

#[test]
fn missing_blob_and_damaged_tree_are_named() {
    let (target, mut memory) = (tempfile::tempdir().unwrap(), Memory::default());
    let (lost, good) = (memory.file("lost", b"lost"), memory.file("good", b"good"));
    let inner = memory.file("inner", b"inner");
    memory.forget(BlobKind::Data, &pieces(&lost)[0]);
    let below = memory.tree(vec![inner]);
    memory.damage(BlobKind::Tree, &below);
    let root = memory.tree(vec![folder("f", below), good, lost]);
    let told = failures(memory.restore(root, target.path())).first.join("\n");
    assert!(told.contains("/lost: data blob") && told.contains(&format!("tree {below}")), "{told}");
    assert!(target.path().join("good").exists() && target.path().join("f").is_dir());
}

#[test]
fn corrupted_pack_of_restics_writes_no_wrong_file() {
    let (source, target, stock) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Stock::new());
    for number in 0..20 {
        write(&source.path().join(format!("{number}")), &noise(100_000, 100 + number));
    }
    stock.backup(source.path());
    let mut packs = Vec::new();
    for folder in fs::read_dir(stock.path().join("data")).unwrap() {
        packs.extend(fs::read_dir(folder.unwrap().path()).unwrap().map(|e| e.unwrap().path()));
    }
    let pack = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = fs::read(pack).unwrap();
    let length = bytes.len();
    for at in (0..length - 3000).step_by(150_000) {
        bytes[at + 500] ^= 0x40;
    }
    fs::remove_file(pack).unwrap();
    write(pack, &bytes);
    let failures = failures(stock.restore(target.path()));
    let name = pack.file_name().unwrap().to_str().unwrap();
    assert!(failures.count >= 5 && failures.first[0].contains(name), "{failures:?}");
    for number in 0..20 {
        if let Ok(read) = fs::read(target.path().join(format!("{number}"))) {
            assert!(read == noise(100_000, 100 + number), "{number} is wrong");
        }
    }
    let right = fs::read_dir(target.path()).unwrap().count() as u64;
    assert_eq!(right, 20 - failures.count);
}

#[test]
fn damaged_index_is_named() {
    let (source, stock) = (tempfile::tempdir().unwrap(), Stock::new());
    write(&source.path().join("a"), b"a");
    stock.backup(source.path());
    let index = fs::read_dir(stock.path().join("index")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&index).unwrap();
    bytes[20] ^= 1;
    fs::remove_file(&index).unwrap();
    write(&index, &bytes);
    let error = stock.open().load_index().unwrap_err();
    assert!(error.to_string().contains(index.file_name().unwrap().to_str().unwrap()), "{error}");
}
