//! What a service's data is before anybody reads it: do the paths exist, and are they still the same
//! afterwards.
//!
//! Reads names and numbers, never contents. The archiver may exit with 0 although one of two paths was
//! missing, so the paths are looked at here before and after it ran.

use std::fs::FileType;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A path of a source that is not as it must be.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It is not there.
    #[error("the path {0} does not exist")]
    Missing(PathBuf),
    /// It cannot be looked at.
    #[error("cannot look at {path}")]
    Unreachable {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It was replaced while it was being read.
    #[error("the path {0} was replaced by another while it was read")]
    Replaced(PathBuf),
}

/// Paths that exist, each with what it was when it was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths(Vec<(PathBuf, FileId)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
    /// A filesystem gives the number of a removed file to the next one: kind and birth tell them apart.
    kind: FileType,
    born: Option<SystemTime>,
}

impl Paths {
    /// Looks at every path.
    ///
    /// # Errors
    /// The first one that is missing or cannot be reached.
    pub fn look_at(paths: &[PathBuf]) -> Result<Self, SourceError> {
        paths.iter().map(|path| Ok((path.clone(), file_id(path)?))).collect::<Result<_, _>>().map(Self)
    }

    /// Looks again: each path must still lead to the same file or folder.
    ///
    /// # Errors
    /// The first one that does not.
    pub fn look_again(&self) -> Result<(), SourceError> {
        for (path, before) in &self.0 {
            if file_id(path)? != *before {
                return Err(SourceError::Replaced(path.clone()));
            }
        }
        Ok(())
    }
}

fn file_id(path: &Path) -> Result<FileId, SourceError> {
    match path.symlink_metadata() {
        Ok(metadata) => Ok(FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
            kind: metadata.file_type(),
            born: metadata.created().ok(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(SourceError::Missing(path.to_owned())),
        Err(source) => Err(SourceError::Unreachable { path: path.to_owned(), source }),
    }
}

/// Symlinks whose target is not UTF-8, at most `limit` of them: restic (0.14) stores such a target changed and
/// says nothing, so a run that met one would be green and wrong. What `exclude` names literally is passed
/// over, and with `one_file_system` whatever is mounted below.
pub fn unstorable_links(paths: &[PathBuf], exclude: &[String], one_file_system: bool, limit: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let device = |path: &Path| path.symlink_metadata().map(|metadata| metadata.dev()).ok();
    let mut queue: Vec<(PathBuf, Option<u64>)> = paths.iter().map(|path| (path.clone(), device(path))).collect();
    while let Some((path, home)) = queue.pop() {
        // What cannot be looked at here cannot be read by the archiver either, which reports it.
        let Ok(metadata) = path.symlink_metadata() else { continue };
        let elsewhere = one_file_system && home != Some(metadata.dev());
        if found.len() >= limit || elsewhere || exclude.iter().any(|pattern| path == Path::new(pattern)) {
            continue;
        }
        if metadata.is_symlink() {
            if path.read_link().is_ok_and(|target| target.to_str().is_none()) {
                found.push(path);
            }
        } else if metadata.is_dir() {
            // The kind of an entry comes with the listing: plain files cost no further call.
            let entries = path.read_dir().into_iter().flatten().flatten();
            let entries = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir() || t.is_symlink()));
            queue.extend(entries.map(|e| (e.path(), home)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_that_was_replaced_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::create_dir(&path).unwrap();
        let paths = Paths::look_at(std::slice::from_ref(&path)).unwrap();
        paths.look_again().unwrap();
        let keep_inode_busy = folder.path().join("other");
        std::fs::create_dir(&keep_inode_busy).unwrap();
        std::fs::remove_dir(&path).unwrap();
        assert!(matches!(paths.look_again(), Err(SourceError::Missing(_))));
        std::os::unix::fs::symlink(&keep_inode_busy, &path).unwrap();
        assert!(matches!(paths.look_again(), Err(SourceError::Replaced(_))));
    }

    #[test]
    fn link_whose_target_is_not_utf8_is_found_unless_it_is_excluded() {
        use std::os::unix::ffi::OsStrExt as _;
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("deep/link");
        std::fs::create_dir(folder.path().join("deep")).unwrap();
        std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(b"odd-\xff"), &link).unwrap();
        std::os::unix::fs::symlink("fine", folder.path().join("other")).unwrap();
        let paths = [folder.path().to_owned()];
        assert_eq!(unstorable_links(&paths, &[], false, 10), std::slice::from_ref(&link));
        assert!(unstorable_links(&paths, &[link.display().to_string()], false, 10).is_empty());
    }

    #[test]
    fn missing_path_beside_a_good_one_is_named() {
        let error = Paths::look_at(&["/usr".into(), "/no/such/path".into()]).unwrap_err().to_string();
        assert!(error.contains("/no/such/path"), "{error}");
    }
}
