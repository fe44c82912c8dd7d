//! The objects of a repository in a folder, and the proof that they are on the disk as they were written.
//!
//! In restic's format a pack, an index and a snapshot file are each named by the SHA-256 of their content
//! (<https://restic.readthedocs.io/en/stable/100_references.html>), so reading one back needs no key.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use sha2::{Digest as _, Sha256};

use super::RepositoryError;
use super::progress::ReadBack;
use crate::platform::files;

/// Buffer for reading back.
const CHUNK_BYTES: usize = 256 * 1024;

/// The objects of a repository: path and size.
#[derive(Clone, Debug, Default)]
pub struct Contents(BTreeMap<PathBuf, u64>);

impl Contents {
    pub(super) fn list(repository: &Path) -> Result<Self, RepositoryError> {
        let mut found = BTreeMap::new();
        for folder in ["data", "index", "snapshots", "keys"] {
            list_into(&repository.join(folder), &mut found)?;
        }
        Ok(Self(found))
    }

    /// Sum of the sizes.
    pub(super) fn bytes(&self) -> u64 {
        self.0.values().sum()
    }

    /// Whether there is anything but keys.
    pub(super) fn has_data(&self) -> bool {
        self.0.keys().any(|path| !path.parent().is_some_and(|folder| folder.ends_with("keys")))
    }

    pub(super) fn read_back_new(&self, before: &Self, far: &ReadBack) -> Result<u64, RepositoryError> {
        let new: Vec<_> = self.0.iter().filter(|(path, _)| !before.0.contains_key(*path)).collect();
        far.objects_total.store(new.len() as u64, Ordering::Relaxed);
        far.bytes_total.store(new.iter().map(|(_, bytes)| *bytes).sum(), Ordering::Relaxed);
        let read = new.into_iter().map(|(path, _)| {
            let bytes = read_back(path)?;
            far.objects_done.fetch_add(1, Ordering::Relaxed);
            far.bytes_done.fetch_add(bytes, Ordering::Relaxed);
            Ok(bytes)
        });
        read.sum()
    }
}

fn list_into(folder: &Path, found: &mut BTreeMap<PathBuf, u64>) -> Result<(), RepositoryError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(files::failed("list", folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(files::failed("list", folder))?;
        let path = entry.path();
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => list_into(&path, found)?,
            Ok(metadata) if is_object(&path) => {
                found.insert(path, metadata.len());
            }
            Ok(_) => {}
            // Another user's prune may remove an object between the listing and the look.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(files::failed("look at", &path)(error).into()),
        }
    }
    Ok(())
}

/// restic writes to temporary names first; those are no objects yet.
fn is_object(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.len() == 64 && name.as_encoded_bytes().iter().all(u8::is_ascii_hexdigit))
}

fn read_back(path: &Path) -> Result<u64, RepositoryError> {
    let failed = |error| files::failed("read back", path)(error);
    let mut file = File::open(path).map_err(failed)?;
    // What was synced can be dropped from the page cache, so that the disk answers and not our own memory.
    let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut chunk).map_err(failed)?;
        if read == 0 {
            break;
        }
        hasher.update(&chunk[..read]);
        bytes += read as u64;
    }
    let matches = path.file_name().is_some_and(|name| name.to_string_lossy() == hex::encode(hasher.finalize()));
    if matches { Ok(bytes) } else { Err(RepositoryError::Differs { path: path.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(repository: &Path, content: &[u8]) -> PathBuf {
        let name = hestner_proto::sha256_hex(content);
        let path = repository.join("data").join(&name[..2]).join(&name);
        files::private_folder(path.parent().unwrap()).unwrap();
        files::write(&path, content, 0o600).unwrap();
        path
    }

    #[test]
    fn only_new_objects_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        put(folder.path(), b"old");
        let before = Contents::list(folder.path()).unwrap();
        put(folder.path(), b"newer");
        let now = Contents::list(folder.path()).unwrap();
        let far = ReadBack::default();
        assert_eq!((now.read_back_new(&before, &far).unwrap(), now.bytes()), (5, 8));
        let far = far.progress();
        assert_eq!((far.bytes_done, far.bytes_total, far.files_done, far.files_total), (5, 5, 1, 1));
    }

    #[test]
    fn object_that_changed_on_disk_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = put(folder.path(), b"content");
        files::write(&path, b"cOntent", 0o600).unwrap();
        let error = Contents::list(folder.path())
            .unwrap()
            .read_back_new(&Contents::default(), &ReadBack::default())
            .unwrap_err();
        assert!(matches!(error, RepositoryError::Differs { path: named } if named == path));
    }
}
