//! Durable files: what is written is either wholly there after a crash or not at all.
//!
//! In: a path, bytes and a mode. Out: the file, after temp file, fsync, rename and fsync of the folder.
//! This is the only module that renames files. Temp files begin with a dot and carry the process id, so
//! that one left by a crash is recognised and overwritten by nobody.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// A file operation that failed, with its path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder could not be made.
    #[error("cannot make the folder {path}")]
    MakeFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file could not be written durably.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others than the owner can read a file that holds a secret.
    #[error("{path} can be read by others (mode {mode:o}); take it away with `chmod 600`")]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

/// Makes `path` and its parents; a folder that is made here is readable by its owner only.
///
/// # Errors
/// [`Error::MakeFolder`].
pub fn make_private_folder(path: &Path) -> Result<(), Error> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|source| Error::MakeFolder { path: path.to_owned(), source })
}

/// Makes an empty file that only its owner can read, or takes others' rights to an existing one away.
///
/// # Errors
/// [`Error::Write`].
pub fn make_private_file(path: &Path) -> Result<(), Error> {
    // A file that is there is not opened: to close it would give up every lock that this process holds on it
    // (<https://sqlite.org/howtocorrupt.html#_posix_advisory_locks_canceled_by_a_separate_thread_doing_close_>).
    match OpenOptions::new().create_new(true).write(true).mode(0o600).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => fs::set_permissions(path, fs::Permissions::from_mode(0o600)),
    }
    .map_err(|source| Error::Write { path: path.to_owned(), source })
}

/// Replaces `path` by `bytes` with permission bits `mode`, atomically and durably.
///
/// # Errors
/// [`Error::Write`]; the old file, if any, is then still whole.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let folder = path.parent().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let temp = folder.join(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let written = write_new(&temp, bytes, mode).and_then(|()| rename_durably(&temp, path, folder));
    if written.is_err() {
        // The error that matters is the first; a temp file that stays behind harms nobody.
        let _ = fs::remove_file(&temp);
    }
    written.map_err(failed)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    // The umask may have taken bits away, never the other way round.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[expect(clippy::disallowed_methods, reason = "the one place that renames, with an fsync of the folder after it")]
fn rename_durably(from: &Path, to: &Path, folder: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    File::open(folder)?.sync_all()
}

/// Reads a text file, or nothing if it does not exist.
///
/// # Errors
/// [`Error::Read`], also for text that is not UTF-8.
pub fn read_text(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.to_owned(), source }),
    }
}

/// Reads a text file that holds a secret, or nothing if it does not exist.
///
/// # Errors
/// [`Error::TooOpen`] when group or others have any right to it, [`Error::Read`] otherwise.
pub fn read_secret_text(path: &Path) -> Result<Option<String>, Error> {
    if let Ok(metadata) = fs::metadata(path) {
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(Error::TooOpen { path: path.to_owned(), mode });
        }
    }
    read_text(path)
}

/// A lock that ends with its value, or with the process however it ends.
pub type Lock = Flock<File>;

/// Locks `path`, waiting for whoever holds it.
///
/// # Errors
/// [`Error::Write`].
pub fn lock(path: &Path) -> Result<Lock, Error> {
    Flock::lock(open_lock(path)?, FlockArg::LockExclusive)
        .map_err(|(_, errno)| Error::Write { path: path.to_owned(), source: errno.into() })
}

/// Locks `path`, or nothing if somebody else holds it.
///
/// # Errors
/// [`Error::Write`].
pub fn try_lock(path: &Path) -> Result<Option<Lock>, Error> {
    match Flock::lock(open_lock(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(Error::Write { path: path.to_owned(), source: errno.into() }),
    }
}

fn open_lock(path: &Path) -> Result<File, Error> {
    let opened = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    opened.map_err(|source| Error::Write { path: path.to_owned(), source })
}

/// Removes a file if it is there.
///
/// # Errors
/// [`Error::Write`].
pub fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::Write { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_cannot_finish_leaves_the_old_file_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        write_atomically(&path, b"old", 0o600).expect("written");
        // A folder in the temp file's place makes the second write fail before its rename.
        let temp = folder.path().join(format!(".a.{}.tmp", std::process::id()));
        fs::create_dir(&temp).expect("made");
        assert!(write_atomically(&path, b"new", 0o600).is_err());
        assert_eq!(read_text(&path).expect("read").as_deref(), Some("old"));
    }

    #[test]
    fn a_secret_that_others_can_read_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("key");
        write_atomically(&path, b"secret", 0o640).expect("written");
        assert!(matches!(read_secret_text(&path), Err(Error::TooOpen { mode: 0o640, .. })));
    }

    #[test]
    fn a_lock_is_held_by_one_and_free_after_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lock");
        let held = try_lock(&path).expect("locked");
        assert!(held.is_some() && try_lock(&path).expect("tried").is_none());
        drop(held);
        assert!(try_lock(&path).expect("tried").is_some());
    }

    #[test]
    fn a_missing_file_is_nothing_and_no_error() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(read_text(&folder.path().join("x")).expect("no error"), None);
    }
}
