//! Trees of files: one with everything odd in it, and a manifest that says exactly what a tree holds.
//!
//! The manifest is ours, not restic's: names as bytes, type, mode, owner, modification time to the
//! nanosecond, content hash, link target, hard-link group and extended attributes. Two equal manifests
//! are two equal trees; a difference is printed entry by entry.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use sha2::Digest as _;

use crate::command::Cmd;
use crate::files;

/// What each entry of a tree is, by its name relative to the root.
pub type Manifest = BTreeMap<Vec<u8>, String>;

/// Builds a tree with everything that archivers get wrong. Needs root for foreign owners.
pub fn odd(root: &Path) -> PathBuf {
    files::write(root.join("plain.txt"), "plain\n");
    files::write(root.join("empty.txt"), "");
    files::write(root.join("large.bin"), files::random_bytes(5_000_000));
    odd_names(root);
    odd_modes(root);
    links_and_pipes(root);
    sparse(&root.join("sparse.img"));
    fs::create_dir_all(root.join("empty/below/empty")).expect("folders");
    let with = files::write(root.join("attributes.txt"), "attributes\n");
    for (name, value) in [("user.hestner", "yes"), ("user.empty", ""), ("user.text", "a b\"c")] {
        Cmd::new("setfattr").args(["-n", name, "-v", value]).arg(&with).ok();
    }
    Cmd::new("setfattr").args(["-n", "user.folder", "-v", "1"]).arg(root.join("empty")).ok();
    // Last, because every write above changed the time of a folder.
    set_time(&root.join("plain.txt"), 1_000_000_000, 123_456_789);
    set_time(&root.join("empty.txt"), 0, 1);
    set_time(&root.join("symlink"), 1_500_000_000, 987_654_321);
    set_time(&root.join("empty"), 1_234_567_890, 111_222_333);
    set_time(root, 1_600_000_000, 5);
    root.to_owned()
}

fn odd_names(root: &Path) {
    let long = "n".repeat(255);
    let names: [&[u8]; 10] = [
        b"with space",
        b"new\nline",
        b"not-utf8-\xff\xfe",
        b"-dash",
        b"quote'\"`$(x)",
        b"back\\slash",
        "\u{fc}nic\u{f6}de-\u{1f600}".as_bytes(),
        b"tab\there",
        b"*glob?[x]",
        long.as_bytes(),
    ];
    for name in names {
        files::write(root.join("names").join(OsStr::from_bytes(name)), name);
    }
}

fn odd_modes(root: &Path) {
    for mode in [0o000, 0o400, 0o600, 0o644, 0o755, 0o1755, 0o2755, 0o4755, 0o777] {
        let path = files::write(root.join(format!("modes/{mode:o}")), format!("{mode:o}"));
        files::set_mode(&path, mode);
    }
    let owned = files::write(root.join("owners/daemon"), "daemon");
    std::os::unix::fs::chown(&owned, Some(1), Some(1)).expect("chown");
    let nameless = files::write(root.join("owners/nameless"), "no such user");
    std::os::unix::fs::chown(&nameless, Some(54_321), Some(54_322)).expect("chown");
    let sticky = root.join("modes/sticky");
    fs::create_dir_all(&sticky).expect("a folder");
    files::set_mode(&sticky, 0o1777);
}

fn links_and_pipes(root: &Path) {
    symlink("plain.txt", root.join("symlink")).expect("a symlink");
    symlink("/nowhere/at all", root.join("dangling")).expect("a symlink");
    // Not here: a target that is not UTF-8. restic before 0.17 stores it with replacement characters.
    symlink("plain.txt", root.join(OsStr::from_bytes(b"symlink-\xff"))).expect("a symlink");
    fs::create_dir_all(root.join("links")).expect("a folder");
    for name in ["first", "second", "third"] {
        fs::hard_link(root.join("plain.txt"), root.join("links").join(name)).expect("a hard link");
    }
    nix::unistd::mkfifo(&root.join("pipe"), Mode::from_bits_truncate(0o640)).expect("a pipe");
}

fn sparse(path: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::create(path).expect("a file");
    file.set_len(50_000_000).expect("a length");
    file.write_all_at(b"island", 20_000_000).expect("an island");
}

/// Sets the modification time of an entry itself, never of what it points to.
pub fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = TimeSpec::new(seconds, nanoseconds);
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// What `root` holds, itself included.
pub fn manifest(root: &Path) -> Manifest {
    let mut found = Manifest::new();
    let mut groups: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let attributes = attributes(root);
    let mut todo = vec![root.to_owned()];
    let mut paths = Vec::new();
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        if meta.is_dir() {
            let children = fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            todo.extend(children.map(|c| c.expect("an entry").path()));
        }
        paths.push((path, meta));
    }
    paths.sort_by(|a, b| a.0.cmp(&b.0));
    // A file's names outside of the tree are no matter of the tree's.
    let mut names: HashMap<(u64, u64), u32> = HashMap::new();
    paths.iter().for_each(|(_, meta)| *names.entry((meta.dev(), meta.ino())).or_default() += 1);
    for (path, meta) in paths {
        let name = path.strip_prefix(root).expect("below the root").as_os_str().as_bytes().to_vec();
        let mut entry = describe(&path, &meta);
        if meta.is_file() && names[&(meta.dev(), meta.ino())] > 1 {
            // The first name in the order stands for the group.
            let first = groups.entry((meta.dev(), meta.ino())).or_insert_with(|| name.clone());
            let _ = write!(entry, " same file as {}", String::from_utf8_lossy(first));
        }
        if let Some(own) = attributes.get(&name) {
            let _ = write!(entry, " {own}");
        }
        found.insert(name, entry);
    }
    found
}

fn describe(path: &Path, meta: &fs::Metadata) -> String {
    let kind = meta.file_type();
    let common =
        format!("{:o} {}:{} {}.{:09}", meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec());
    if kind.is_symlink() {
        let target = fs::read_link(path).expect("a link");
        format!("link {common} -> {:?}", target.as_os_str().as_bytes())
    } else if kind.is_dir() {
        format!("folder {common}")
    } else if kind.is_file() {
        let mut file = fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut hash = sha2::Sha256::new();
        let bytes = copy_into(&mut file, &mut hash);
        format!("file {common} {bytes} bytes {}", hex::encode(hash.finalize()))
    } else if kind.is_fifo() {
        format!("pipe {common}")
    } else {
        format!("special {common} {:x}", meta.rdev())
    }
}

fn copy_into(file: &mut fs::File, hash: &mut sha2::Sha256) -> u64 {
    use std::io::Read as _;
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let count = file.read(&mut buffer).expect("a readable file");
        if count == 0 {
            return total;
        }
        hash.update(&buffer[..count]);
        total += count as u64;
    }
}

/// Extended attributes by entry, read by `getfattr`: one block of lines an entry.
fn attributes(root: &Path) -> HashMap<Vec<u8>, String> {
    let args = ["-R", "-P", "-h", "-d", "-m", "-", "-e", "hex", "."];
    let text = Cmd::new("getfattr").args(args).in_folder(root).run().stdout;
    let mut found = HashMap::new();
    for block in text.split("\n\n").filter(|b| !b.is_empty()) {
        let mut lines = block.lines();
        let name = lines.next().and_then(|l| l.strip_prefix("# file: ")).unwrap_or_default();
        let mut values: Vec<&str> = lines.collect();
        values.sort_unstable();
        let name = if name == "." { "" } else { name };
        found.insert(name.as_bytes().to_vec(), values.join(" "));
    }
    found
}

/// Asserts that two trees hold the same.
///
/// # Panics
/// With the entries that differ.
pub fn assert_same(expected: &Path, actual: &Path) {
    assert_same_manifest(&manifest(expected), &manifest(actual));
}

/// Asserts that two manifests are equal.
///
/// # Panics
/// With the entries that differ.
pub fn assert_same_manifest(expected: &Manifest, actual: &Manifest) {
    let mut report = String::new();
    let names: std::collections::BTreeSet<_> = expected.keys().chain(actual.keys()).collect();
    for name in names {
        let (left, right) = (expected.get(name), actual.get(name));
        if left != right {
            let shown = String::from_utf8_lossy(name);
            let _ = writeln!(report, "{shown:?}\n  expected {left:?}\n  actual   {right:?}");
        }
    }
    assert!(report.is_empty(), "the trees differ:\n{report}");
}

/// Where `source` lies below the folder that it was restored to.
///
/// # Panics
/// When it is not there.
pub fn restored(target: &Path, source: &Path) -> PathBuf {
    let below = target.join(source.strip_prefix("/").expect("an absolute path"));
    assert!(below.symlink_metadata().is_ok(), "{} was not restored below {}", source.display(), target.display());
    below
}
