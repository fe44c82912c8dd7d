//! The only place of the tests that writes files. Tests need neither atomic nor durable ones.
//!
//! In: a path and what to put there. Out: the path. Everything panics with the path on an error.

#![expect(clippy::disallowed_methods, reason = "this module wraps std::fs::write and std::fs::rename")]

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// Writes a file with mode 0644, and the folders above it.
pub fn write(path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
    let path = path.as_ref();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    }
    fs::write(path, content).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path.to_owned()
}

/// Writes a file of which a reader sees the old content or the new one, and nothing between.
pub fn replace(path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
    let path = path.as_ref();
    let new = write(path.with_extension("new"), content);
    fs::rename(new, path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path.to_owned()
}

/// Writes a program of `bash` that others may run but not write.
pub fn write_script(path: impl AsRef<Path>, body: &str) -> PathBuf {
    let path = write(path, format!("#!/bin/bash\n{body}\n"));
    set_mode(&path, 0o755);
    path
}

/// Sets the permission bits.
pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Gives a path, and all below it, to a user and the group of the same number.
pub fn give_to(path: &Path, uid: u32) {
    crate::Cmd::new("chown").arg("-hR").arg(format!("{uid}:{uid}")).arg(path).ok();
}

/// Lines of a file; none when it does not exist.
pub fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path).map(|text| text.lines().map(str::to_owned).collect()).unwrap_or_default()
}

/// Random bytes: what no archiver can make smaller or has seen before.
pub fn random_bytes(count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).expect("/dev/urandom");
    bytes
}

/// A folder of `count` text files in sub-folders, about `bytes` long each and all different.
pub fn small_tree(folder: &Path, count: usize, bytes: usize) -> PathBuf {
    for i in 0..count {
        let line = format!("{i} {}\n", hex::encode(random_bytes(16)));
        write(folder.join(format!("part{}/file{i}.txt", i % 7)), line.repeat(bytes / line.len() + 1));
    }
    folder.to_owned()
}
