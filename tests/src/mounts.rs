//! Small filesystems of their own, mounted from a file: a full disk, a btrfs.
//!
//! In: kind, size and where. Out: a mount that goes when its handle goes. Needs root.

use std::path::{Path, PathBuf};

use crate::command::Cmd;

/// A mounted filesystem.
pub struct Mounted {
    path: PathBuf,
}

impl Mounted {
    /// An ext4 of that many megabytes, without reserved blocks.
    pub fn ext4(path: &Path, megabytes: u32) -> Self {
        Self::new(path, megabytes, &["mkfs.ext4", "-q", "-m", "0", "-F"])
    }

    /// A btrfs; it needs 256 megabytes to be usable.
    pub fn btrfs(path: &Path) -> Self {
        Self::new(path, 256, &["mkfs.btrfs", "-q", "-f"])
    }

    fn new(path: &Path, megabytes: u32, mkfs: &[&str]) -> Self {
        std::fs::create_dir_all(path).expect("a mount point");
        let image = path.with_extension("image");
        Cmd::new("truncate").arg("-s").arg(format!("{megabytes}M")).arg(&image).ok();
        Cmd::new(mkfs[0]).args(&mkfs[1..]).arg(&image).ok();
        Cmd::new("mount").args(["-o", "loop"]).arg(&image).arg(path).ok();
        crate::files::set_mode(path, 0o755);
        Self { path: path.to_owned() }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whoever still works in it is ours: its command line names our folder.
        if Cmd::new("umount").arg(&self.path).run().code != Some(0) {
            crate::processes::kill_all_naming(&self.path);
            let _ = Cmd::new("umount").arg("-l").arg(&self.path).run();
        }
    }
}
