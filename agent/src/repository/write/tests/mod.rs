//! The write path, with stock restic as the judge.

mod deaths;
mod depth;
mod faults;
mod fixtures;
mod gates;
mod writers;

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::path::Path;

use proptest::prelude::*;

use super::*;
use fixtures::{Place, added, assert_same, noise, put_file};

/// A folder with every kind of entry that the format keeps.
fn every_kind(root: &Path) {
    put_file(&root.join("plain"), b"some text\n");
    put_file(&root.join("empty"), b"");
    put_file(&root.join("big"), &noise(5 << 20, 1));
    put_file(&root.join("deep/er/file"), &noise(3000, 2));
    std::fs::create_dir(root.join("empty folder")).unwrap();
    for name in [&b"bytes-\xff\xc3"[..], b"new\nline", b"quote\"back\\slash", "\u{e4}\u{1f600}".as_bytes(), b"\x7f\x01"]
    {
        put_file(&root.join(std::ffi::OsStr::from_bytes(name)), name);
    }
    symlink("plain", root.join("link")).unwrap();
    symlink("/no/where", root.join("dangling")).unwrap();
    std::fs::hard_link(root.join("plain"), root.join("second name")).unwrap();
    let mode = |name: &str, mode| std::fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).unwrap();
    mode("empty", 0o4711);
    mode("empty folder", 0o3775);
    sparse(&root.join("sparse"), 40 << 20);
    nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    if nix::unistd::geteuid().is_root() {
        for (name, kind) in [("char", nix::sys::stat::SFlag::S_IFCHR), ("block", nix::sys::stat::SFlag::S_IFBLK)] {
            let device = nix::sys::stat::makedev(259, 300);
            nix::sys::stat::mknod(&root.join(name), kind, nix::sys::stat::Mode::S_IRUSR, device).unwrap();
        }
        std::os::unix::fs::lchown(root.join("link"), Some(12_345), Some(23_456)).unwrap();
        std::os::unix::fs::chown(root.join("deep"), Some(1), Some(2)).unwrap();
    }
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(root.join("plain"), "user.note", b"\0\xff\"", flags).unwrap();
    rustix::fs::setxattr(root.join("deep"), "user.long", &noise(2000, 3), flags).unwrap();
    // An ACL: rwx for the owner, r for user 7, r for the group, r as mask, none for others.
    let acl = hex::decode("0200000001000700ffffffff020004000700000004000400ffffffff10000400ffffffff20000000ffffffff")
        .unwrap();
    rustix::fs::setxattr(root.join("big"), "system.posix_acl_access", &acl, flags).unwrap();
    for (name, seconds) in [("deep/er/file", -86_400 * 3650), ("plain", 1_700_000_000), ("empty folder", 1_000_000_000)]
    {
        let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        let at = rustix::fs::CWD;
        rustix::fs::utimensat(at, root.join(name), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// A file with data at its begin and its end, and a hole between them.
fn sparse(path: &Path, bytes: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(b"end", bytes - 3).unwrap();
}

#[test]
fn what_is_counted_beside_a_store_is_what_it_stores() {
    let place = Place::new();
    every_kind(&place.source());
    put_file(&place.source().join("cache/CACHEDIR.TAG"), b"Signature: 8a477f597d28d172789f06886806bc55");
    put_file(&place.source().join("cache/big"), &noise(1 << 20, 9));
    put_file(&place.source().join("deep/er/left.tmp"), b"left out");
    let files = Files { exclude: vec!["*.tmp".to_owned()], skip_caches: true, ..place.files() };
    let totals = Totals::default();
    count(&files, &totals);
    let stored = fixtures::store(&place.open(), Source::Files(files.clone()), &Cancel::default()).unwrap();
    assert_eq!(totals.known(), Some((stored.bytes, stored.files)));
    // Some of it below another part of it, and told to stop before it begins.
    let paths = vec![place.source().join("deep"), place.source(), place.source().join("plain")];
    let (again, stopped) = (Totals::default(), Totals::default());
    count(&Files { paths, ..files.clone() }, &again);
    assert_eq!(again.known(), totals.known());
    stopped.stop();
    count(&files, &stopped);
    assert_eq!(stopped.known(), None);
}

#[test]
fn restic_restores_every_kind_of_entry_as_it_was() {
    let place = Place::new();
    every_kind(&place.source());
    let stored = place.store().unwrap();
    place.check();
    assert_same(&place.source(), &place.restored(&stored));
    // Two names of one file, and pieces of the hole that are stored once.
    let target = place.restored(&stored);
    let inode = |name: &str| target.join(name).symlink_metadata().unwrap().ino();
    assert_eq!(inode("plain"), inode("second name"));
    assert!(added(&stored) < 6 << 20, "{stored:?}");
}

/// Restic takes the same source into the same repository, and finds nothing different, not even in metadata.
#[test]
fn restic_sees_no_difference_between_its_snapshot_and_ours() {
    let place = Place::new();
    every_kind(&place.source());
    std::fs::remove_file(place.source().join("big")).unwrap();
    std::fs::remove_file(place.source().join("sparse")).unwrap();
    let ours = place.store().unwrap();
    let source = place.source();
    place.restic(&["backup", "--force", source.to_str().unwrap()]);
    let theirs = place.newest_but(&ours);
    let difference = place.restic(&["diff", "--metadata", &ours.snapshot.to_hex(), &theirs]);
    // Only folders above the source, which others write into, may differ.
    assert!(!difference.contains(source.to_str().unwrap()), "{difference}");
    assert!(difference.contains("Data Blobs:      0 new,     0 removed"), "{difference}");
}

#[test]
fn link_to_bytes_that_are_no_utf8_is_kept() {
    let place = Place::new();
    let target = std::ffi::OsStr::from_bytes(b"odd-\xff");
    symlink(target, place.source().join("link")).unwrap();
    let stored = place.store().unwrap();
    place.check();
    let nodes = place.nodes(&stored);
    let kind = &nodes.iter().find(|node| node.name == b"link").unwrap().kind;
    assert_eq!(*kind, crate::format::tree::NodeKind::Symlink { target: b"odd-\xff".to_vec() });
}

#[test]
fn unchanged_source_is_not_read_again_and_shares_its_tree() {
    let place = Place::new();
    every_kind(&place.source());
    let first = place.store().unwrap();
    let tree = place.source_tree(&first);
    let second = place.store().unwrap();
    assert_eq!((second.bytes_read, second.parent), (0, Some(first.snapshot)));
    assert_eq!((second.bytes, second.files), (first.bytes, first.files));
    let forced = place.store_with(|options| options.parent = Parent::ForceRead).unwrap();
    assert!(forced.bytes_read > 5 << 20);
    for stored in [second, forced] {
        assert_eq!(place.source_tree(&stored), tree);
        assert!(added(&stored) < 20_000, "{stored:?}");
    }
    put_file(&place.source().join("plain"), b"another text");
    let third = place.store().unwrap();
    // `plain` has two names.
    assert_eq!(third.bytes_read, 2 * 12);
    place.check();
    assert_same(&place.source(), &place.restored(&third));
}

#[test]
fn file_whose_pieces_are_gone_is_read_again() {
    let place = Place::new();
    put_file(&place.source().join("a"), &noise(2000, 9));
    let first = place.store().unwrap();
    for (object, _) in first.objects.iter().filter(|(object, _)| object.kind == crate::storage::Kind::Pack) {
        std::fs::remove_file(place.repository().join(object.path())).unwrap();
    }
    let second = place.store().unwrap();
    assert_eq!(second.bytes_read, 2000);
    // The old index file still names the pack that is gone, and restic believes one or the other.
    place.restic(&["rebuild-index"]);
    assert_same(&place.source(), &place.restored(&second));
}

#[test]
fn big_file_with_a_change_stores_little_more() {
    let place = Place::new();
    let mut bytes = noise(30 << 20, 5);
    put_file(&place.source().join("database"), &bytes);
    place.store().unwrap();
    bytes.splice(10_000_000..10_000_000, *b"inserted");
    put_file(&place.source().join("database"), &bytes);
    let second = place.store().unwrap();
    assert!(added(&second) < 9 << 20, "{second:?}");
    place.check();
    assert_same(&place.source(), &place.restored(&second));
}

#[test]
fn restic_leaves_out_the_same() {
    let place = Place::new();
    let root = place.source();
    for name in ["a.o", "a.c", "cache/x", "cache/sub/y", "keep/a.o", "keep/b/c/d", "other/b/c/d", "[odd]/x"] {
        put_file(&root.join(name), name.as_bytes());
    }
    put_file(&root.join("tagged/CACHEDIR.TAG"), b"Signature: 8a477f597d28d172789f06886806bc55\n");
    put_file(&root.join("tagged/left out"), b"x");
    put_file(&root.join("untagged/CACHEDIR.TAG"), b"something else");
    put_file(&root.join("untagged/kept"), b"x");
    put_file(&root.join("tagged/below/left out"), b"x");
    put_file(&root.join("short/CACHEDIR.TAG"), b"Signature: 8a477f597d28d172789f06886806bc5");
    put_file(&root.join("short/kept"), b"x");
    put_file(&root.join("tag is a folder/CACHEDIR.TAG/kept"), b"x");
    put_file(&root.join("tag is empty/CACHEDIR.TAG"), b"");
    put_file(&root.join("tag is empty/kept"), b"x");
    let exclude: Vec<String> = ["*.o", "cache/sub", "keep/**/d", "!keep/a.o", "\\[odd\\]"].map(String::from).into();
    let files = Files { paths: vec![root.clone()], exclude: exclude.clone(), skip_caches: true, ..Files::default() };
    let ours = place.store_files(files).unwrap();
    let mut args = vec!["backup", "--exclude-caches"];
    args.extend(exclude.iter().flat_map(|pattern| ["--exclude", pattern]));
    args.push(root.to_str().unwrap());
    place.restic(&args);
    let theirs = place.newest_but(&ours);
    let list = |id: &str| -> Vec<String> {
        place.restic(&["ls", "-q", id]).lines().filter(|line| line.starts_with('/')).map(str::to_owned).collect()
    };
    assert_eq!(list(&ours.snapshot.to_hex()), list(&theirs));
    assert!(list(&theirs).iter().any(|line| line.ends_with("untagged/kept")));
}

#[test]
fn several_paths_stand_with_the_folders_above_them() {
    let place = Place::new();
    for name in ["one/a", "two/b", "two/inner/c", "three"] {
        put_file(&place.source().join(name), name.as_bytes());
    }
    let paths = ["one", "two/inner", "three", "two"].map(|name| place.source().join(name));
    let stored = place.store_files(Files { paths: paths.to_vec(), ..Files::default() }).unwrap();
    place.check();
    assert_same(&place.source(), &place.restored(&stored));
}

#[test]
fn two_writers_at_once_leave_a_good_repository() {
    let place = Place::new();
    for n in 0..40 {
        put_file(&place.source().join(format!("f{n}")), &noise(100_000, n));
    }
    let archives = [place.open(), place.open()];
    std::thread::scope(|scope| {
        let threads = archives.map(|archive| {
            scope.spawn(|| {
                let archive = archive;
                place.store_in(&archive).unwrap()
            })
        });
        let stored = threads.map(|thread| thread.join().unwrap());
        assert_eq!(place.source_tree(&stored[0]), place.source_tree(&stored[1]));
    });
    place.check();
}

#[derive(Clone, Debug)]
enum Entry {
    File(Vec<u8>, u32),
    Folder,
    Link(String),
}

fn entries() -> impl Strategy<Value = Vec<(Vec<String>, Entry)>> {
    let entry = prop_oneof![
        (proptest::collection::vec(any::<u8>(), 0..2000), 0_u32..0o1000).prop_map(|(b, m)| Entry::File(b, m | 0o400)),
        Just(Entry::Folder),
        // To nowhere: what is made below must not come to lie outside of the source.
        "to-[a-z.]{1,20}".prop_map(Entry::Link),
    ];
    let path = proptest::collection::vec("[a-c\u{e4}\" ]{1,2}", 1..4);
    proptest::collection::vec((path, entry), 0..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, max_shrink_iters: 20, ..ProptestConfig::default() })]

    #[test]
    fn restic_restores_every_tree(entries in entries()) {
        let place = Place::new();
        for (path, entry) in entries {
            let path = place.source().join(path.join("/"));
            // What is in the way of another is left as it is.
            let Some(Ok(())) = path.parent().map(std::fs::create_dir_all) else { continue };
            let _ = match entry {
                Entry::File(bytes, mode) if path.symlink_metadata().is_err() => {
                    put_file(&path, &bytes);
                    std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))
                }
                Entry::Folder => std::fs::create_dir(&path),
                Entry::Link(target) => symlink(target, &path),
                Entry::File(..) => Ok(()),
            };
        }
        let stored = place.store().unwrap();
        place.check();
        assert_same(&place.source(), &place.restored(&stored));
    }
}
