//! Who may have written a file that decides what runs as root.
//!
//! Settings, grants and hook programs are believed only if they, and every folder above them, belong to
//! root (or to the user this process runs as) and can be written by nobody else. A sticky folder such as
//! `/tmp` does not count as safe: whoever made the name first would own it.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use zeroize::Zeroizing;

use super::files::{self, FileError};

/// Symlinks on the way to a file, at most, as the kernel counts them (path_resolution(7)).
const SYMLINKS_MAX: u32 = 40;

/// Why a path is not believed.
#[derive(Debug, thiserror::Error)]
pub enum Distrust {
    /// The path or a folder above it belongs to somebody else.
    #[error("{path} belongs to user {owner}; it must belong to root")]
    Owner {
        /// What belongs to somebody else.
        path: PathBuf,
        /// To whom.
        owner: u32,
    },
    /// The path or a folder above it can be written by others.
    #[error("{path} has mode {mode:04o}; neither group nor others may write to it")]
    Writable {
        /// What can be written.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It holds a secret, and others can read it.
    #[error("{path} has mode {mode:04o}: others than its owner can read it; `chmod 600` it")]
    Readable {
        /// What can be read.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The path is not absolute.
    #[error("{path} is not an absolute path")]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be looked at.
    #[error(transparent)]
    File(#[from] FileError),
}

impl Distrust {
    /// Whether the file itself does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::File(error) if error.is_missing())
    }
}

/// Whether a user id may own what this process believes: root, and the user it runs as.
pub fn is_trusted_user(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// Checks a path and every folder and symlink on the way to what it leads to, hop by hop: whoever can
/// change one of them decides what is found.
///
/// # Errors
/// The first thing found that others could change.
pub fn check(path: &Path) -> Result<(), Distrust> {
    if !path.is_absolute() {
        return Err(Distrust::Relative { path: path.to_owned() });
    }
    let mut hops = 0;
    let mut reached = PathBuf::from("/");
    check_one(&reached)?;
    let mut ahead: Vec<OsString> = parts_reversed(path);
    while let Some(part) = ahead.pop() {
        if part == ".." {
            reached.pop();
            continue;
        }
        reached.push(&part);
        check_one(&reached)?;
        if !reached.is_symlink() {
            continue;
        }
        hops += 1;
        if hops > SYMLINKS_MAX {
            let too_many = std::io::Error::from_raw_os_error(nix::libc::ELOOP);
            return Err(files::failed("follow", path)(too_many).into());
        }
        let target = reached.read_link().map_err(files::failed("follow", &reached))?;
        reached.pop();
        if target.is_absolute() {
            reached = PathBuf::from("/");
        }
        ahead.extend(parts_reversed(&target));
    }
    Ok(())
}

fn parts_reversed(path: &Path) -> Vec<OsString> {
    let named = path.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir));
    let mut parts: Vec<OsString> = named.map(|c| c.as_os_str().to_owned()).collect();
    parts.reverse();
    parts
}

/// Checks a path and reads it as text of at most `bytes_max` bytes.
///
/// # Errors
/// As [`check`], or when it cannot be read or is not UTF-8.
pub fn read_text(path: &Path, bytes_max: u64) -> Result<String, Distrust> {
    check(path)?;
    let bytes = files::read(path, bytes_max)?;
    let not_text = |_| files::failed("read", path)(std::io::Error::new(std::io::ErrorKind::InvalidData, "not UTF-8"));
    String::from_utf8(bytes).map_err(|e| not_text(e).into())
}

/// Checks a path and reads it as text, if nobody but its owner can read it.
///
/// # Errors
/// As [`read_text`], and [`Distrust::Readable`].
pub fn read_secret(path: &Path, bytes_max: u64) -> Result<Zeroizing<String>, Distrust> {
    check(path)?;
    let mode = path.metadata().map_err(files::failed("look at", path))?.mode();
    if mode & 0o077 != 0 {
        return Err(Distrust::Readable { path: path.to_owned(), mode: mode & 0o7777 });
    }
    read_text(path, bytes_max).map(Zeroizing::new)
}

fn check_one(path: &Path) -> Result<(), Distrust> {
    let metadata = path.symlink_metadata().map_err(files::failed("look at", path))?;
    if !is_trusted_user(metadata.uid()) {
        return Err(Distrust::Owner { path: path.to_owned(), owner: metadata.uid() });
    }
    // A symlink has no mode of its own; the folder that holds it is on the list.
    if !metadata.is_symlink() && metadata.mode() & 0o022 != 0 {
        return Err(Distrust::Writable { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn sticky_folder_above_is_not_believed() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let path = folder.path().join("grants.toml");
        std::fs::File::create(&path).unwrap();
        let error = check(&path).unwrap_err();
        assert!(matches!(&error, Distrust::Writable { path, .. } if path == Path::new("/tmp")), "{error}");
    }

    #[test]
    fn link_in_the_middle_that_others_can_change_is_not_believed() {
        let base = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let at = |name: &str| base.path().join(name);
        for folder in ["release", "open", "app"] {
            std::fs::create_dir(at(folder)).unwrap();
        }
        std::fs::File::create(at("release/hook")).unwrap();
        // app/entry -> open/current -> release: only the folder of the middle link is open to others.
        std::os::unix::fs::symlink(at("release"), at("open/current")).unwrap();
        std::os::unix::fs::symlink("../open/current", at("app/entry")).unwrap();
        let path = at("app/entry/hook");
        check(&path).unwrap();
        std::fs::set_permissions(at("open"), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = check(&path).unwrap_err();
        assert!(matches!(&error, Distrust::Writable { path, .. } if path.ends_with("open")), "{error}");
    }

    #[test]
    fn relative_and_missing_paths_are_told_apart() {
        assert!(matches!(check(Path::new("a")), Err(Distrust::Relative { .. })));
        assert!(check(Path::new("/no/such/file")).unwrap_err().is_missing());
    }

    #[test]
    fn group_writable_file_is_named_with_its_mode() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("hook");
        std::fs::File::create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o775)).unwrap();
        let error = check_one(&path).unwrap_err();
        assert!(error.to_string().contains("mode 0775"), "{error}");
    }
}
