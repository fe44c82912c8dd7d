//! What a service's data is before anybody reads it: do the paths exist, on which filesystems do they lie,
//! and are they still the same afterwards.
//!
//! Reads names and numbers, never contents. The archiver may exit with 0 although one of two paths was
//! missing, so the paths are looked at here before and after it ran.

use std::fs::FileType;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A btrfs subvolume's root has this inode number
/// (<https://btrfs.readthedocs.io/en/latest/btrfs-subvolume.html>).
const SUBVOLUME_ROOT_INODE: u64 = 256;

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
    /// The list of mounts cannot be read.
    #[error("cannot read the list of mounts")]
    Mounts(#[source] io::Error),
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
/// over.
pub fn unstorable_links(paths: &[PathBuf], exclude: &[String], limit: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut queue: Vec<PathBuf> = paths.to_vec();
    while let Some(path) = queue.pop() {
        if found.len() >= limit || exclude.iter().any(|pattern| path == Path::new(pattern)) {
            continue;
        }
        // What cannot be looked at here cannot be read by the archiver either, which reports it.
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.is_symlink() {
            if path.read_link().is_ok_and(|target| target.to_str().is_none()) {
                found.push(path);
            }
        } else if metadata.is_dir() {
            // The kind of an entry comes with the listing: plain files cost no further call.
            let entries = path.read_dir().into_iter().flatten().flatten();
            queue.extend(
                entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir() || t.is_symlink())).map(|e| e.path()),
            );
        }
    }
    found
}

/// One line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// Type of the filesystem, such as `btrfs`.
    pub kind: String,
}

/// The mounts that this process sees.
#[derive(Clone, Debug, Default)]
pub struct Mounts(Vec<Mount>);

impl Mounts {
    /// Reads them.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn read() -> Result<Self, SourceError> {
        std::fs::read_to_string("/proc/self/mountinfo").map(|text| Self::parse(&text)).map_err(SourceError::Mounts)
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse_mount).collect())
    }

    /// The mount that holds a path: the longest one above it, the latest of equals.
    pub fn holding(&self, path: &Path) -> Option<&Mount> {
        self.0.iter().filter(|mount| path.starts_with(&mount.point)).max_by_key(|mount| mount.point.as_os_str().len())
    }

    /// Mounts strictly below a path.
    pub fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a Mount> {
        self.0.iter().filter(move |mount| mount.point.starts_with(path) && mount.point != path)
    }
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let point = before.split(' ').nth(4)?;
    let kind = after.split(' ').next()?;
    Some(Mount { point: PathBuf::from(unescape(point)), kind: kind.to_owned() })
}

/// Undoes the kernel's `\040` for a space, `\011`, `\012` and `\134`.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

/// The root of the btrfs subvolume that holds a path; `None` when the path is not on btrfs.
///
/// # Errors
/// When the path cannot be reached.
pub fn subvolume_of(path: &Path, mounts: &Mounts) -> Result<Option<PathBuf>, SourceError> {
    let unreachable = |source| SourceError::Unreachable { path: path.to_owned(), source };
    let real = path.canonicalize().map_err(unreachable)?;
    let Some(mount) = mounts.holding(&real).filter(|mount| mount.kind == "btrfs") else { return Ok(None) };
    for folder in real.ancestors().take_while(|folder| folder.starts_with(&mount.point)) {
        if folder.symlink_metadata().map_err(unreachable)?.ino() == SUBVOLUME_ROOT_INODE {
            return Ok(Some(folder.to_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
        40 22 0:30 /a /srv/with\\040space rw,relatime shared:1 - btrfs /dev/loop0 rw\n\
        41 40 0:31 / /srv/with\\040space/deep rw - tmpfs tmpfs rw\n";

    #[test]
    fn longest_mount_above_holds_a_path() {
        let mounts = Mounts::parse(MOUNTINFO);
        let kind = |path: &str| mounts.holding(Path::new(path)).map(|m| m.kind.clone());
        assert_eq!(kind("/srv/with space/x").as_deref(), Some("btrfs"));
        assert_eq!(kind("/srv/with space/deep/x").as_deref(), Some("tmpfs"));
        assert_eq!(kind("/srv/with spaces").as_deref(), Some("ext4"));
        assert_eq!(mounts.below(Path::new("/srv")).count(), 2);
    }

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
        assert_eq!(unstorable_links(&paths, &[], 10), std::slice::from_ref(&link));
        assert!(unstorable_links(&paths, &[link.display().to_string()], 10).is_empty());
    }

    #[test]
    fn missing_path_beside_a_good_one_is_named() {
        let error = Paths::look_at(&["/usr".into(), "/no/such/path".into()]).unwrap_err().to_string();
        assert!(error.contains("/no/such/path"), "{error}");
    }
}
