//! Small filesystems of their own, mounted from a file: a full disk, a btrfs, one that gets frozen.
//!
//! In: kind, size and where. Out: a mount that goes when its handle goes. What a test may freeze is thawed
//! whatever becomes of the test: whoever waits for a frozen filesystem can be neither stopped nor killed.
//! Needs root.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::time::Duration;

use crate::clock;
use crate::command::Cmd;

/// Longer than any test may take (see `.config/nextest.toml`).
const WATCHED_SECONDS: u32 = 400;

/// A mounted filesystem.
pub struct Mounted {
    path: PathBuf,
    watchdog: Option<Watchdog>,
}

impl Mounted {
    /// An ext4 of that many megabytes, without reserved blocks.
    pub fn ext4(path: &Path, megabytes: u32) -> Self {
        Self::new(path, megabytes, &["mkfs.ext4", "-q", "-m", "0", "-F"])
    }

    /// The same with room for that many files, and at rest: the kernel initialises nothing of it later on.
    pub fn ext4_of_many_files(path: &Path, megabytes: u32, files: u64) -> Self {
        let at_once = "lazy_itable_init=0,lazy_journal_init=0";
        Self::new(path, megabytes, &["mkfs.ext4", "-q", "-m", "0", "-F", "-N", &files.to_string(), "-E", at_once])
    }

    /// A btrfs; it needs 256 megabytes to be usable.
    pub fn btrfs(path: &Path) -> Self {
        Self::new(path, 256, &["mkfs.btrfs", "-q", "-f"])
    }

    /// An xfs; mkfs.xfs wants 300 megabytes at least.
    pub fn xfs(path: &Path) -> Self {
        Self::new(path, 320, &["mkfs.xfs", "-q", "-f"])
    }

    /// One of `ext4`, `xfs` and `btrfs` for a test that freezes it, with room for some hundred megabytes.
    ///
    /// # Panics
    /// For another kind.
    pub fn of_kind(kind: &str, path: &Path) -> Self {
        let mut mounted = match kind {
            "ext4" => Self::ext4(path, 320),
            "xfs" => Self::xfs(path),
            "btrfs" => Self::btrfs(path),
            other => panic!("no filesystem {other} here"),
        };
        mounted.watchdog = Some(Watchdog::start(path));
        mounted
    }

    /// Whether somebody has frozen it: a second freeze answers EBUSY. Not to be asked while somebody is about
    /// to freeze it: one that is not frozen is, for a moment.
    pub fn is_frozen(&self) -> bool {
        let tried = Cmd::new("fsfreeze").arg("-f").arg(&self.path).run();
        if tried.code == Some(0) {
            self.thaw();
            return false;
        }
        assert!(tried.stderr.contains("busy"), "{tried}");
        true
    }

    /// Freezes it as somebody else would.
    pub fn freeze(&self) {
        Cmd::new("fsfreeze").arg("-f").arg(&self.path).ok();
    }

    /// Thaws it, whoever froze it. True: it was frozen.
    pub fn thaw(&self) -> bool {
        thaw(&self.path)
    }

    fn new(path: &Path, megabytes: u32, mkfs: &[&str]) -> Self {
        std::fs::create_dir_all(path).expect("a mount point");
        let image = image_of(path);
        Cmd::new("truncate").arg("-s").arg(format!("{megabytes}M")).arg(&image).ok();
        Cmd::new(mkfs[0]).args(&mkfs[1..]).arg(&image).ok();
        Cmd::new("mount").args(["-o", "loop"]).arg(&image).arg(path).ok();
        crate::files::set_mode(path, 0o755);
        Self { path: path.to_owned(), watchdog: None }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn image_of(mount: &Path) -> PathBuf {
    mount.with_extension("image")
}

/// Thaws what is mounted there, whoever froze it. True: it was frozen.
pub fn thaw(path: &Path) -> bool {
    Cmd::new("fsfreeze").arg("-u").arg(path).run().code == Some(0)
}

/// A process in a session of its own that thaws a mount when the test is gone or its time is over, and then
/// goes on for a while: what is on the way to be frozen is not frozen yet.
struct Watchdog {
    child: Child,
    // Its end is the sign that the test is gone.
    pipe: ChildStdin,
}

impl Watchdog {
    fn start(mount: &Path) -> Self {
        let script = format!(
            "read -r -t {WATCHED_SECONDS} word; [ \"$word\" = done ] && exit; \
             for i in {{1..100}}; do fsfreeze -u \"$0\"; sleep 0.1; done 2>/dev/null"
        );
        let mut child = Cmd::new("setsid").args(["bash", "-c", &script]).arg(mount).spawn_told();
        let pipe = child.stdin.take().expect("a pipe");
        Self { child, pipe }
    }

    fn dismiss(mut self) {
        let _ = self.pipe.write_all(b"done\n");
        drop(self.pipe);
        let _ = self.child.wait();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(watchdog) = self.watchdog.take() {
            // A freeze that waits for a write lands when that ends: a failed test leaves such things.
            clock::eventually(Duration::from_secs(2), || !self.thaw());
            watchdog.dismiss();
        }
        // One that is frozen can be neither written nor unmounted, and whoever waits for it cannot be killed.
        self.thaw();
        // Whoever still works in it is ours: its command line names our folder.
        if Cmd::new("umount").arg(&self.path).run().code != Some(0) {
            crate::processes::kill_all_naming(&self.path);
            let _ = Cmd::new("umount").arg("-l").arg(&self.path).run();
        }
        if !std::thread::panicking() {
            let _ = std::fs::remove_file(image_of(&self.path));
        }
    }
}
