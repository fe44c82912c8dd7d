//! A folder with every kind of file and metadata, and what it means to be equal to another.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::write;

/// Bytes that repeat nowhere and do not compress.
pub(super) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

fn set_times(path: &Path, seconds: i64, nanos: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// An ACL as the kernel stores it: an entry for the user 12345 beside the usual ones.
fn acl() -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] =
        [(1, 7, u32::MAX), (2, 5, 12345), (4, 4, u32::MAX), (16, 5, u32::MAX), (32, 0, u32::MAX)];
    let mut raw = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        raw.extend_from_slice(&tag.to_le_bytes());
        raw.extend_from_slice(&permissions.to_le_bytes());
        raw.extend_from_slice(&id.to_le_bytes());
    }
    raw
}

/// Fills a folder. Owners, devices and trusted attributes need root.
pub(super) fn fill(root: &Path) {
    let at = |name: &str| root.join(name);
    for folder in ["a/b/c/d", "empty", "modes", "links", "other"] {
        fs::create_dir_all(at(folder)).unwrap();
    }
    write(&at("a/empty"), b"");
    write(&at("a/one"), b"1");
    write(&at("a/b/half"), &noise(512 * 1024, 1));
    write(&at("a/b/c/big"), &noise(9 * 1024 * 1024, 2));
    write(&at("a/b/c/text"), "the same line again\n".repeat(50_000).as_bytes());
    for (number, mode) in [0o644, 0o000, 0o4755, 0o2755, 0o6711, 0o1777, 0o400].into_iter().enumerate() {
        let path = at(&format!("modes/{number}"));
        write(&path, format!("mode {number}").as_bytes());
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    sparse(&at("sparse"));
    fs::hard_link(at("a/one"), at("links/one")).unwrap();
    fs::hard_link(at("a/one"), at("a/b/uno")).unwrap();
    fs::hard_link(at("a/b/c/big"), at("other/big")).unwrap();
    symlink("/etc/passwd", at("links/absolute")).unwrap();
    symlink("nowhere/at all", at("links/dangling")).unwrap();
    symlink("../a", at("links/folder")).unwrap();
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from_raw_mode(0o620), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    for name in
        [&b"new\nline"[..], b"\"quoted\" 'too' \\", b"\xff\xfe not text \xc3", "\u{e4}\u{1f600}".as_bytes(), b" "]
    {
        write(&root.join("other").join(OsStr::from_bytes(name)), name);
    }
    set_attribute(&at("a/one"), "user.colour", b"red\0\xff");
    set_attribute(&at("a/b"), "user.empty", b"");
    if rustix::process::geteuid().is_root() {
        as_root(root);
    }
    for (name, seconds, nanos) in [
        ("a/empty", -86_400 * 365, 1),
        ("a/b/half", 1_700_000_000, 123_456_789),
        ("links/dangling", 1_000_000_000, 999_999_999),
        ("fifo", 1, 5),
        ("empty", 1_600_000_000, 7),
        ("a/b/c", 12, 34),
        ("a/b", -5, 6),
        ("a", 1_500_000_000, 8),
    ] {
        set_times(&at(name), seconds, nanos);
    }
}

fn as_root(root: &Path) {
    let at = |name: &str| root.join(name);
    rustix::fs::mknodat(
        CWD,
        at("null"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o666),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    rustix::fs::mknodat(
        CWD,
        at("loop"),
        FileType::BlockDevice,
        Mode::from_raw_mode(0o660),
        rustix::fs::makedev(7, 300),
    )
    .unwrap();
    for (name, uid, gid) in [("modes/2", 1234, 5678), ("links/absolute", 99, 98), ("empty", 65_534, 1), ("null", 3, 4)]
    {
        std::os::unix::fs::lchown(at(name), Some(uid), Some(gid)).unwrap();
    }
    // The change of owner took the set-id bit.
    fs::set_permissions(at("modes/2"), fs::Permissions::from_mode(0o4755)).unwrap();
    set_attribute(&at("a/b/half"), "system.posix_acl_access", &acl());
    set_attribute(&at("empty"), "system.posix_acl_default", &acl());
    set_attribute(&at("a/b/half"), "trusted.mark", b"t");
}

fn sparse(path: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::create(path).unwrap();
    file.set_len(40 * 1024 * 1024 + 17).unwrap();
    file.write_all_at(&noise(10_000, 3), 0).unwrap();
    file.write_all_at(&noise(70_000, 4), 20 * 1024 * 1024 + 5).unwrap();
}

/// All that is compared of an entry.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    /// 0 for folders.
    size: u64,
    mtime: (i64, i64),
    device: u64,
    links: u64,
    target: Option<PathBuf>,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    content: Option<[u8; 32]>,
}

fn attributes(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0_u8; 65_536];
    let length = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0_u8; 65_536];
        let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
        value[..length].to_vec()
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

fn see(path: &Path) -> Seen {
    let metadata = path.symlink_metadata().unwrap();
    let kind = metadata.file_type();
    Seen {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        size: if kind.is_dir() { 0 } else { metadata.size() },
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        device: metadata.rdev(),
        links: if kind.is_dir() { 0 } else { metadata.nlink() },
        target: kind.is_symlink().then(|| fs::read_link(path).unwrap()),
        attributes: attributes(path),
        content: kind.is_file().then(|| *crate::format::Id::of(&fs::read(path).unwrap()).as_bytes()),
    }
}

fn list(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut open = vec![PathBuf::new()];
    while let Some(below) = open.pop() {
        for entry in fs::read_dir(root.join(&below)).unwrap() {
            let entry = entry.unwrap();
            let kind = entry.file_type().unwrap();
            // restic keeps no sockets.
            if kind.is_socket() {
                continue;
            }
            let path = below.join(entry.file_name());
            if kind.is_dir() {
                open.push(path.clone());
            }
            found.insert(path);
        }
    }
    found
}

/// Which names are of one inode.
fn linked(root: &Path, paths: &BTreeSet<PathBuf>) -> BTreeSet<Vec<PathBuf>> {
    let mut groups: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
    for path in paths {
        let metadata = root.join(path).symlink_metadata().unwrap();
        if !metadata.is_dir() && metadata.nlink() > 1 {
            groups.entry(metadata.ino()).or_default().push(path.clone());
        }
    }
    groups.into_values().collect()
}

/// Two folders hold the same, in all that is kept.
pub(super) fn assert_same(source: &Path, restored: &Path) {
    let (paths, others) = (list(source), list(restored));
    assert_eq!(paths, others);
    for path in &paths {
        assert_eq!(see(&source.join(path)), see(&restored.join(path)), "{}", path.display());
    }
    assert_eq!(linked(source, &paths), linked(restored, &others));
}
