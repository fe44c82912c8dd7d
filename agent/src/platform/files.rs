//! Files that are whole or not there: written beside, synced, renamed, and the folder synced.
//!
//! A file that this module wrote is never seen half-written, not even after a power cut. Claims
//! ([`create_new`]) exist exactly once: whoever makes the file owns what it stands for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::sys::stat::Mode;

/// An operation on a file that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path}")]
pub struct FileError {
    /// What was tried, such as `write`.
    pub operation: &'static str,
    /// To what.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// Whether the filesystem had no room (`ENOSPC`) or the owner no quota (`EDQUOT`).
    pub fn is_full(&self) -> bool {
        is_full(&self.source)
    }

    /// Whether there is no such file.
    pub fn is_missing(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// Whether an error says that there is no room.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Names the operation and the path of a failed call.
pub fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError { operation, path: path.to_owned(), source }
}

/// Writes a file so that it is either wholly there, on disk, or as it was before.
///
/// # Errors
/// When the folder cannot be written, has no room, or cannot be synced. The half-written file beside is
/// removed.
#[expect(clippy::disallowed_methods, reason = "the one place that renames")]
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let beside = beside(path);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        sync_folder_of(path)
    })();
    written.map_err(|error| {
        // Best effort: the error that is returned is the one that matters.
        let _ = fs::remove_file(&beside);
        failed("write", path)(error)
    })
}

/// Gives a file or a folder another name in the same folder, on disk as well.
///
/// # Errors
/// When it cannot be renamed or the folder not synced.
#[expect(clippy::disallowed_methods, reason = "the one place that renames")]
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::rename(from, to).and_then(|()| sync_folder_of(to)).map_err(failed("rename", from))
}

/// Makes a file that must not exist yet, and syncs it and its folder.
///
/// Returns false, and writes nothing, if it exists.
///
/// # Errors
/// As [`write()`].
pub fn create_new(path: &Path, bytes: &[u8]) -> Result<bool, FileError> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = match made {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        Err(error) => return Err(failed("make", path)(error)),
    };
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .and_then(|()| sync_folder_of(path))
        .map_err(failed("make", path))?;
    Ok(true)
}

/// Makes a folder, and those above it, that only its owner can enter. An existing one is left as it is.
///
/// # Errors
/// When it cannot be made.
pub fn private_folder(path: &Path) -> Result<(), FileError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make", path))?;
    sync_folder_of(path).map_err(failed("sync", path))
}

/// Reads a file of at most `bytes_max` bytes.
///
/// # Errors
/// When it cannot be read, or is longer.
pub fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, FileError> {
    read_at_most(File::open(path).map_err(failed("open", path))?, path, bytes_max)
}

fn read_at_most(file: File, path: &Path, bytes_max: u64) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    if bytes.len() as u64 > bytes_max {
        let source = io::Error::new(io::ErrorKind::FileTooLarge, format!("it is longer than {bytes_max} bytes"));
        return Err(failed("read", path)(source));
    }
    Ok(bytes)
}

/// Reads a file of at most `bytes_max` bytes that lies in folders which somebody else may write: below
/// `base`, which is believed, no symlink is followed, and only a regular file is read. What it holds is a
/// stranger's.
///
/// # Errors
/// When it cannot be read, is no regular file, lies behind a symlink, or is longer.
pub fn read_of_stranger(base: &Path, below: &Path, bytes_max: u64) -> Result<Vec<u8>, FileError> {
    let path = base.join(below);
    let folder_only = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let steps: Vec<_> = below.iter().collect();
    let opened = (|| -> io::Result<File> {
        let (name, folders) = steps.split_last().ok_or(io::ErrorKind::InvalidInput)?;
        let mut folder: OwnedFd = nix::fcntl::open(base, folder_only, Mode::empty())?;
        for step in folders {
            folder = openat(&folder, *step, folder_only | OFlag::O_NOFOLLOW, Mode::empty())?;
        }
        // O_NONBLOCK: a FIFO must not hold up who opens it.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = File::from(openat(&folder, *name, flags, Mode::empty())?);
        match file.metadata()?.is_file() {
            true => Ok(file),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
        }
    })();
    read_at_most(opened.map_err(failed("open", &path))?, &path, bytes_max)
}

/// Removes a file or a folder with all in it; one that is not there is fine.
///
/// # Errors
/// When it is there and cannot be removed.
pub fn remove(path: &Path) -> Result<(), FileError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// A lock that ends when every process that holds its file open has ended.
pub type Lock = Flock<File>;

/// Takes the lock of a file, which is made if need be. `None`: somebody holds it.
///
/// # Errors
/// When the file cannot be opened or the filesystem has no locks.
pub fn try_lock(path: &Path) -> Result<Option<Lock>, FileError> {
    let no_link = nix::fcntl::OFlag::O_NOFOLLOW.bits();
    let opened =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).custom_flags(no_link).open(path);
    // A disk that has become read-only must not keep anybody from being alone.
    let read_only = |error: &io::Error| error.kind() == io::ErrorKind::ReadOnlyFilesystem;
    let opened = opened.or_else(|error| if read_only(&error) { File::open(path) } else { Err(error) });
    let file = opened.map_err(failed("open", path))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(failed("lock", path)(errno.into())),
    }
}

/// Bytes that an unprivileged writer can still put on the filesystem that holds `path`.
///
/// # Errors
/// When the path does not exist.
pub fn free_bytes(path: &Path) -> Result<u64, FileError> {
    let folder = File::open(path).map_err(failed("open", path))?;
    let stat = nix::sys::statvfs::fstatvfs(folder.as_fd()).map_err(|e| failed("measure", path)(e.into()))?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    path.with_file_name(name)
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_write_leaves_the_old_file_and_nothing_beside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write(&path, b"old", 0o600).unwrap();
        // A folder in the way of the file beside makes the write fail before the rename.
        fs::create_dir(beside(&path)).unwrap();
        assert!(write(&path, b"new", 0o600).is_err());
        assert_eq!(read(&path, 10).unwrap(), b"old");
    }

    #[test]
    fn claim_is_given_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("claim");
        assert!(create_new(&path, b"").unwrap());
        assert!(!create_new(&path, b"").unwrap());
    }

    #[test]
    fn read_refuses_what_is_too_long() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write(&path, b"12345", 0o600).unwrap();
        assert!(read(&path, 4).is_err());
        assert_eq!(read(&path, 5).unwrap(), b"12345");
    }

    #[test]
    fn strangers_file_is_read_only_where_it_seems_to_lie() {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        let read = |below: &str| read_of_stranger(base.path(), Path::new(below), 10);
        fs::create_dir_all(at("theirs/policies")).unwrap();
        write(&at("secret"), b"root's", 0o600).unwrap();
        write(&at("theirs/policies/a"), b"policy", 0o600).unwrap();
        assert_eq!(read("theirs/policies/a").unwrap(), b"policy");
        assert!(read("theirs/policies/none").unwrap_err().is_missing());
        // A link as the file, a link as a folder, a FIFO that nobody writes to, a folder, a long file.
        std::os::unix::fs::symlink(at("secret"), at("theirs/policies/link")).unwrap();
        std::os::unix::fs::symlink(base.path(), at("theirs/around")).unwrap();
        nix::unistd::mkfifo(&at("theirs/policies/fifo"), Mode::S_IRWXU).unwrap();
        write(&at("theirs/policies/long"), b"12345678901", 0o600).unwrap();
        for below in [
            "theirs/policies/link",
            "theirs/around/secret",
            "theirs/policies/fifo",
            "theirs/policies",
            "theirs/policies/long",
        ] {
            assert!(read(below).is_err(), "{below} was read");
        }
    }

    #[test]
    fn lock_is_held_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        drop(held);
        assert!(try_lock(&path).unwrap().is_some());
    }
}
