//! Room on the disk, and what lies on it: free bytes and inodes, sizes of folders, a page cache that is warm.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::bail;
use hestner_tests::mounts::Mounted;

/// What stays free on the disk whatever is measured.
const SPARE_BYTES: u64 = 2_000_000_000;
/// What a file takes at most beside its bytes: the rest of its last block, and an inode.
const BLOCK_BYTES: u64 = 4096;
const INODE_BYTES: u64 = 256;

/// Says what is missing unless `folder`'s disk has room.
pub(crate) fn need_room(folder: &Path, what: &str, bytes: u64) -> anyhow::Result<()> {
    let stat = nix::sys::statvfs::statvfs(folder)?;
    let free = stat.blocks_available() * stat.fragment_size();
    let wanted = bytes + SPARE_BYTES;
    if free < wanted {
        let (free, wanted) = (free / 1_000_000, wanted / 1_000_000);
        bail!(
            "{what} takes {wanted} MB at {}, where {free} MB are free: free {} MB more, or choose less",
            folder.display(),
            wanted - free
        );
    }
    Ok(())
}

/// An ext4 made anew, so that nobody pays for what another one removed: for minutes ext4 searches past the inodes of
/// removed files (`recently_deleted` in the kernel's `fs/ext4/ialloc.c`).
pub(crate) struct Fresh(Mounted);

impl Fresh {
    /// Mounted at `path`, with room for `files` files that hold `bytes` in all.
    pub(crate) fn new(path: &Path, files: u64, bytes: u64) -> anyhow::Result<Self> {
        // Folders and symlinks are not counted.
        let inodes = files + files / 4 + 10_000;
        let megabytes = u32::try_from((bytes + inodes * (BLOCK_BYTES + INODE_BYTES)) / 950_000 + 256)?;
        Ok(Self(Mounted::ext4_of_many_files(path, megabytes, inodes)))
    }

    /// A folder in it, for whoever makes it.
    pub(crate) fn tree(&self) -> PathBuf {
        self.0.path().join("tree")
    }
}

/// What a tree holds, as far as a restore must give it back; contents are not compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holds {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    /// Sum over sizes, times and modes.
    mark: u64,
}

/// Looks at every file of a tree.
pub(crate) fn holds(tree: &Path) -> anyhow::Result<Holds> {
    let mut found = Holds::default();
    each_file(tree, &mut |_, meta| {
        found.files += 1;
        found.bytes += meta.len();
        let time = meta.mtime().cast_unsigned().wrapping_mul(1_000_000_007) ^ meta.mtime_nsec().cast_unsigned();
        found.mark = found.mark.wrapping_add((time ^ u64::from(meta.mode())).wrapping_mul(meta.len() | 1));
        Ok(())
    })?;
    Ok(found)
}

/// Bytes of all files below a folder; 0 when it is not there.
pub(crate) fn bytes(folder: &Path) -> anyhow::Result<u64> {
    if folder.exists() { Ok(holds(folder)?.bytes) } else { Ok(0) }
}

/// Reads everything once, so that nobody finds what another one made warm.
pub(crate) fn warm(folder: &Path) -> anyhow::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    each_file(folder, &mut |path, _| {
        let mut file = File::open(path)?;
        while file.read(&mut buffer)? > 0 {}
        Ok(())
    })
}

/// Lets the disk come to rest: what one has written is not written on another one's time.
pub(crate) fn settle() {
    nix::unistd::sync();
}

/// Regular files of a tree in the order of their names.
pub(crate) fn regular_files(tree: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    each_file(tree, &mut |path, _| {
        found.push(path.to_owned());
        Ok(())
    })?;
    found.sort();
    Ok(found)
}

fn each_file(tree: &Path, visit: &mut dyn FnMut(&Path, &fs::Metadata) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut todo = vec![tree.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                visit(&entry.path(), &entry.metadata()?)?;
            }
        }
    }
    Ok(())
}
