//! A local folder as the place of objects: a backup disk, a mount of NFS.
//!
//! An object is written under a name that no object has, in the folder it belongs to, synced, and given its name
//! by a rename that cannot overwrite; then the folder is synced. Folders are made when they are first needed,
//! and what leads to them is synced before anything in them counts as stored, whoever made them. The names of
//! half-written files are those that restic gives its own (`NAME-tmp-...`); those of dead writers, a day old,
//! are removed by whoever lists the folder or first writes into it.
//!
//! Never: an object that is overwritten, a failed sync that is tried again (the kernel may have dropped the pages
//! and would say that all is well), a folder made in place of a root that is gone.

use std::collections::HashSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hestner_proto::sha256::Hasher;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, PosixFadviseAdvice, RenameFlags, posix_fadvise, renameat2};
use nix::unistd::linkat;

use super::{Kind, Object, Seen, Storage, StorageError, failed, too_short};
use crate::platform::backoff::random_u64;
use crate::platform::clock::{Clock as _, SystemClock};
use crate::platform::files;

/// What stands between an object's name and the random rest in the name of a half-written file.
const UNFINISHED: &str = "-tmp-";
/// Bytes that are read back at once.
const PIECE_BYTES: usize = 256 * 1024;
/// A half-written file that nobody has written to for so long has no writer any more.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 60 * 60);

/// A folder that holds a repository.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// Folders that are known to outlive a power cut. At most one for every two hex digits, and a few.
    durable: Mutex<HashSet<PathBuf>>,
}

impl Folder {
    /// A folder that is there.
    ///
    /// # Errors
    /// When it is not: a disk that is not mounted must not be written beside.
    pub fn open(root: &Path) -> Result<Self, StorageError> {
        let folder = Self { root: root.to_owned(), durable: Mutex::default() };
        match folder.check_root() {
            Ok(()) => Ok(folder),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StorageError::NoRoot(root.display().to_string()))
            }
            Err(error) => Err(failed("open", root.display(), error)),
        }
    }

    /// A folder that is made if need be, with those above it, for its owner only.
    ///
    /// # Errors
    /// When it cannot be made or synced.
    pub fn create(root: &Path) -> Result<Self, StorageError> {
        files::private_folder(root).map_err(|e| failed("make", root.display(), e.source))?;
        Self::open(root)
    }

    fn check_root(&self) -> io::Result<()> {
        match std::fs::metadata(&self.root)?.is_dir() {
            true => Ok(()),
            false => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    fn path(&self, object: &Object) -> PathBuf {
        self.root.join(object.path())
    }

    /// Makes a folder below the root and syncs what leads to it, once in the life of this value.
    fn make_durable(&self, folder: &Path) -> io::Result<()> {
        if self.durable.lock().unwrap_or_else(PoisonError::into_inner).contains(folder) {
            return Ok(());
        }
        if folder == self.root {
            self.check_root()?;
        } else {
            let parent = folder.parent().ok_or(io::ErrorKind::InvalidInput)?;
            self.make_durable(parent)?;
            match DirBuilder::new().mode(0o700).create(folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => sync(parent)?,
            }
        }
        // Only those who write need the room, and they may remove.
        let _ = remove_leftovers(folder);
        self.durable.lock().unwrap_or_else(PoisonError::into_inner).insert(folder.to_owned());
        Ok(())
    }

    fn store(&self, path: &Path, bytes: &[u8]) -> io::Result<Stored> {
        let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        self.make_durable(folder)?;
        let unfinished = unfinished(path)?;
        let stored = (|| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            let stored = give_name(&unfinished, path)?;
            sync(folder)?;
            Ok(stored)
        })();
        if !matches!(stored, Ok(Stored::New)) {
            // Best effort: one that stays is removed when it is a day old.
            let _ = std::fs::remove_file(&unfinished);
        }
        stored
    }

    /// Whether what is there has these bytes; if so it is durable afterwards.
    fn is_same(path: &Path, bytes: &[u8]) -> io::Result<bool> {
        let file = open(path)?;
        if file.metadata()?.len() != bytes.len() as u64 {
            return Ok(false);
        }
        let mut there = Vec::new();
        (&file).take(bytes.len() as u64 + 1).read_to_end(&mut there)?;
        if there != bytes {
            return Ok(false);
        }
        // Whoever wrote it may have died before this.
        file.sync_all()?;
        sync(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
        Ok(true)
    }

    /// The objects of a kind in one folder. `None`: there is no such folder.
    fn list_folder(&self, kind: Kind, folder: &Path) -> io::Result<Option<Vec<(String, u64)>>> {
        let Some(entries) = entries(folder)? else { return Ok(None) };
        let mut found = Vec::new();
        for (name, metadata) in entries {
            let object = Object::new(kind, name);
            if metadata.is_file() && object.is_well_named() && self.path(&object).parent() == Some(folder) {
                found.push((object.name, metadata.len()));
            }
        }
        Ok(Some(found))
    }

    fn list_packs(&self, data: &Path) -> io::Result<Option<Vec<(String, u64)>>> {
        let Some(folders) = entries(data)? else { return Ok(None) };
        let mut found = Vec::new();
        for (name, metadata) in folders {
            let is_ours = name.len() == 2 && name.bytes().all(is_lower_hex);
            if !is_ours || !metadata.is_dir() {
                continue;
            }
            let listed = self.list_folder(Kind::Pack, &data.join(name))?;
            found.extend(listed.ok_or_else(|| io::Error::other("a folder of packs went away meanwhile"))?);
        }
        Ok(Some(found))
    }
}

impl Storage for Folder {
    fn place(&self) -> String {
        self.root.display().to_string()
    }

    fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError> {
        object.check_name("store")?;
        let path = self.path(object);
        match self.store(&path, bytes) {
            Ok(Stored::New) => Ok(()),
            Ok(Stored::WasThere) => match Self::is_same(&path, bytes) {
                Ok(true) => Ok(()),
                Ok(false) => Err(StorageError::Exists(object.clone())),
                Err(error) => Err(failed("compare", object, error)),
            },
            Err(error) if files::is_full(&error) => Err(StorageError::Full(object.clone())),
            Err(error) => Err(failed("store", object, error)),
        }
    }

    fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError> {
        object.check_name("read")?;
        let read = |file: File| -> io::Result<(u64, Vec<u8>)> {
            let length = file.metadata()?.len();
            let mut bytes = Vec::new();
            if length <= bytes_max {
                bytes.reserve_exact(usize::try_from(length).unwrap_or_default());
                file.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
            }
            Ok((length.max(bytes.len() as u64), bytes))
        };
        let (length, bytes) = open(&self.path(object)).and_then(read).map_err(|e| missing_or(object, e))?;
        if length > bytes_max {
            return Err(StorageError::TooBig { object: object.clone(), bytes: length, bytes_max });
        }
        Ok(bytes)
    }

    fn read_back(&self, object: &Object, bytes_max: u64) -> Result<Seen, StorageError> {
        object.check_name("read")?;
        let file = open(&self.path(object)).map_err(|e| missing_or(object, e))?;
        // What was synced can be dropped from the page cache, so that the disk answers and not our own memory.
        let _ = posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        let seen = see(&file, bytes_max).map_err(|e| missing_or(object, e))?;
        match seen.bytes > bytes_max {
            true => Err(StorageError::TooBig { object: object.clone(), bytes: seen.bytes, bytes_max }),
            false => Ok(seen),
        }
    }

    fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError> {
        object.check_name("read")?;
        let file = open(&self.path(object)).map_err(|e| missing_or(object, e))?;
        let there = file.metadata().map_err(|e| missing_or(object, e))?.len();
        // Before anything is allocated: a length may come out of a damaged index.
        if offset.checked_add(length).is_none_or(|end| end > there) {
            return Err(too_short(object, offset, length, there));
        }
        let length = usize::try_from(length).map_err(|e| failed("read", object, e))?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).map_err(|e| missing_or(object, e))?;
        Ok(bytes)
    }

    fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
        let folder = if kind.folder().is_empty() { self.root.clone() } else { self.root.join(kind.folder()) };
        let listed = match kind {
            Kind::Pack => self.list_packs(&folder),
            kind => self.list_folder(kind, &folder),
        };
        let listed = listed.and_then(|found| match found {
            Some(found) => Ok(found),
            // Nothing of the kind yet, but only where the repository's own folder is there.
            None => self.check_root().map(|()| Vec::new()),
        });
        listed.map_err(|e| failed("list", folder.display(), e))
    }

    fn remove(&self, object: &Object) -> Result<(), StorageError> {
        object.check_name("remove")?;
        let path = self.path(object);
        let removed = match std::fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.check_root(),
            Err(error) => Err(error),
            Ok(()) => sync(path.parent().unwrap_or(&self.root)),
        };
        removed.map_err(|e| failed("remove", object, e))
    }
}

enum Stored {
    New,
    WasThere,
}

/// Opens an object: a regular file. Nothing else, such as a pipe, can hold this up.
fn open(path: &Path) -> io::Result<File> {
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

/// Reads a file piece by piece, and no further than one byte past the bound.
fn see(mut file: &File, bytes_max: u64) -> io::Result<Seen> {
    let (mut hasher, mut bytes, mut piece) = (Hasher::default(), 0, vec![0; PIECE_BYTES]);
    while bytes <= bytes_max {
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(read) => {
                hasher.update(&piece[..read]);
                bytes += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Seen { bytes, sha256: hasher.finish() })
}

fn unfinished(path: &Path) -> io::Result<PathBuf> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!("{UNFINISHED}{:016x}", random_u64().map_err(io::Error::other)?));
    Ok(path.with_file_name(name))
}

/// Renames without overwriting. Where the filesystem cannot do that in one step (NFS, most of FUSE), a second
/// hard link does it, which fails as well when the name is taken.
fn give_name(unfinished: &Path, path: &Path) -> io::Result<Stored> {
    match renameat2(AT_FDCWD, unfinished, AT_FDCWD, path, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => Ok(Stored::New),
        Err(Errno::EEXIST) => Ok(Stored::WasThere),
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => link(unfinished, path),
        Err(errno) => Err(errno.into()),
    }
}

fn link(unfinished: &Path, path: &Path) -> io::Result<Stored> {
    match linkat(AT_FDCWD, unfinished, AT_FDCWD, path, AtFlags::empty()) {
        // An answer of NFS that got lost makes it ask again, and the second answer says that the name is taken:
        // the count of links knows better.
        Err(Errno::EEXIST) if std::fs::symlink_metadata(unfinished)?.nlink() < 2 => return Ok(Stored::WasThere),
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    // One that stays is a leftover like any other.
    let _ = std::fs::remove_file(unfinished);
    Ok(Stored::New)
}

fn sync(folder: &Path) -> io::Result<()> {
    nix::unistd::fsync(File::open(folder)?.as_fd()).map_err(io::Error::from)
}

/// All entries of a folder whose names are text, without those that went away meanwhile; leftovers are removed.
/// `None`: there is no such folder.
fn entries(folder: &Path) -> io::Result<Option<Vec<(String, std::fs::Metadata)>>> {
    let listing = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        listing => listing?,
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let metadata = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        if metadata.is_file() && is_leftover(&name, &metadata) {
            // Best effort: whoever lists need not be allowed to remove.
            let _ = std::fs::remove_file(entry.path());
            continue;
        }
        found.push((name, metadata));
    }
    Ok(Some(found))
}

fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.contains(UNFINISHED) && is_leftover(&name, &entry.metadata()?) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn is_leftover(name: &str, metadata: &std::fs::Metadata) -> bool {
    let Some((object, _)) = name.split_once(UNFINISHED) else { return false };
    // Nothing that is not ours or restic's is removed.
    let is_only = [Kind::Config, Kind::WrappedKey].iter().any(|kind| kind.only_name() == Some(object));
    let is_object = is_only || Object::new(Kind::Pack, object).is_well_named();
    let now = SystemTime::from(SystemClock.now());
    let age = metadata.modified().ok().and_then(|written| now.duration_since(written).ok());
    metadata.is_file() && is_object && age.is_some_and(|age| age > LEFTOVER_AGE)
}

fn is_lower_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn missing_or(object: &Object, error: io::Error) -> StorageError {
    match error.kind() {
        io::ErrorKind::NotFound => StorageError::Missing(object.clone()),
        _ => failed("read", object, error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn pack(digit: char) -> Object {
        Object::new(Kind::Pack, digit.to_string().repeat(64))
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::create(&temp.path().join("repository")).unwrap();
        (temp, folder)
    }

    fn plant(path: &Path, age: Duration) {
        let file = File::create(path).unwrap();
        file.set_modified(SystemTime::from(SystemClock.now()) - age).unwrap();
    }

    #[test]
    fn files_and_folders_are_their_owners_only() {
        let (_temp, folder) = folder();
        folder.put(&pack('a'), b"bytes").unwrap();
        let mode = |path: &str| std::fs::metadata(folder.root.join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(""), mode("data"), mode("data/aa")), (0o700, 0o700, 0o700));
        assert_eq!(mode(&pack('a').path()), 0o600);
    }

    #[test]
    fn name_that_is_taken_is_not_given_by_a_link_either() {
        let (temp, _) = folder();
        let at = |name: &str| temp.path().join(name);
        plant(&at("one"), Duration::ZERO);
        plant(&at("two"), Duration::ZERO);
        assert!(matches!(link(&at("one"), &at("object")).unwrap(), Stored::New));
        assert!(!at("one").exists());
        assert!(matches!(link(&at("two"), &at("object")).unwrap(), Stored::WasThere));
        // A link whose answer got lost.
        std::fs::remove_file(at("object")).unwrap();
        std::fs::hard_link(at("two"), at("object")).unwrap();
        assert!(matches!(link(&at("two"), &at("object")).unwrap(), Stored::New));
    }

    #[test]
    fn leftovers_of_dead_writers_go_and_those_of_living_ones_and_strangers_stay() {
        let (_temp, folder) = folder();
        folder.put(&pack('a'), b"bytes").unwrap();
        let beside = |name: &str| folder.root.join("data/aa").join(name);
        let day = Duration::from_secs(25 * 60 * 60);
        let (dead, living) = (format!("{}-tmp-1", pack('a').name), format!("{}-tmp-2", pack('a').name));
        plant(&beside(&dead), day);
        plant(&beside(&living), Duration::from_secs(3600));
        plant(&beside("notes-tmp-1"), day);
        assert_eq!(folder.list(Kind::Pack).unwrap(), [(pack('a').name, 5)]);
        assert_eq!([&dead, &living, "notes-tmp-1"].map(|name| beside(name).exists()), [false, true, true]);
        // The first write of another process into that folder does it too.
        plant(&beside(&dead), day);
        let other = Object::new(Kind::Pack, format!("aa{}", "b".repeat(62)));
        Folder::open(&folder.root).unwrap().put(&other, b"x").unwrap();
        assert_eq!([&dead, &living].map(|name| beside(name).exists()), [false, true]);
    }

    #[test]
    fn failed_put_leaves_nothing() {
        let (_temp, folder) = folder();
        // A folder has the object's name.
        std::fs::create_dir_all(folder.path(&pack('a'))).unwrap();
        assert!(folder.put(&pack('a'), b"bytes").is_err());
        assert_eq!(std::fs::read_dir(folder.root.join("data/aa")).unwrap().count(), 1);
        assert!(folder.list(Kind::Pack).unwrap().is_empty());
    }

    #[test]
    fn root_that_is_gone_is_no_empty_repository() {
        let (temp, folder) = folder();
        std::fs::remove_dir_all(temp.path().join("repository")).unwrap();
        assert!(folder.list(Kind::Snapshot).is_err());
        assert!(folder.list(Kind::Pack).is_err());
        assert!(folder.put(&pack('a'), b"bytes").is_err());
        assert!(Folder::open(&folder.root).is_err());
        assert!(!folder.root.exists());
    }
}
