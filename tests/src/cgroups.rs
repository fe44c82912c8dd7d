//! Control groups of either hierarchy: everything of a unit in one place, and the whole of it killed at once.
//!
//! In: which hierarchy. Out: a group that processes are started in ([`Cgroup::command`]). Whoever is left in
//! it is killed with its handle. Needs root.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::booted::Hierarchy;
use crate::command::Cmd;
use crate::{clock, files, processes};

static MADE: AtomicU32 = AtomicU32::new(0);

/// A control group of its own.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
    hierarchy: Hierarchy,
    /// The same group in hierarchies of version 1 that have a controller.
    controlled: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes a group. `None`: this machine does not have that hierarchy.
    pub fn new(hierarchy: Hierarchy, name: &str) -> Option<Self> {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let folder = root(hierarchy)?.join(format!("hestner-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        Some(Self { folder, hierarchy, controlled: Vec::new() })
    }

    /// Makes it one that its processes may divide, as systemd does for `Delegate=`: marked, and with the controllers
    /// of version 1, which this machine binds there.
    ///
    /// # Panics
    /// When it cannot be marked.
    #[must_use]
    pub fn handed_on(mut self, controllers: &[&str]) -> Self {
        let mark = if self.hierarchy == Hierarchy::V2 { "user.delegate" } else { "trusted.delegate" };
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&self.folder, mark, b"1", flags).expect("a mark");
        let name = self.folder.file_name().expect("a name");
        for controller in controllers {
            let Some(root) = controller_root(controller) else { continue };
            let folder = root.join(name);
            std::fs::create_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            self.controlled.push(folder);
        }
        self
    }

    fn folders(&self) -> impl DoubleEndedIterator<Item = &PathBuf> {
        std::iter::once(&self.folder).chain(&self.controlled)
    }

    /// A command line whose process is in the group before it runs.
    pub fn command(&self, program: &Path) -> Cmd {
        let enter = "until [ \"$1\" = -- ]; do echo $$ >\"$1/cgroup.procs\" || exit 9; shift; done; shift; exec \"$@\"";
        Cmd::new("bash").args(["-c", enter, "enter"]).args(self.folders()).arg("--").arg(program)
    }

    /// Moves a process into it; one that has ended meanwhile is fine.
    pub fn take_in(&self, pid: i32) {
        // The shell's own echo: its failure is an exit code and no panic.
        let _ = Cmd::new("bash")
            .args(["-c", "echo \"$1\" >\"$0/cgroup.procs\""])
            .arg(&self.folder)
            .arg(pid.to_string())
            .run();
    }

    /// Who is in it.
    pub fn pids(&self) -> Vec<i32> {
        below(&self.folder).iter().flat_map(|folder| pids_in(folder)).collect()
    }

    /// Kills everybody in it at once, as systemd does; who waits for a frozen disk dies after the thaw.
    pub fn kill(&self) {
        let all_at_once = self.folder.join("cgroup.kill");
        if self.hierarchy == Hierarchy::V2 && all_at_once.exists() {
            files::write(all_at_once, "1");
            return;
        }
        // Who was just started by one of them is found in the next round.
        for _ in 0..20 {
            let pids = self.pids();
            pids.iter().for_each(|pid| processes::kill(*pid));
            if pids.is_empty() {
                return;
            }
            clock::let_pass(Duration::from_millis(1));
        }
    }

    /// Whether nobody is in it any more.
    pub fn is_empty(&self) -> bool {
        self.pids().is_empty()
    }
}

impl Cgroup {
    /// Kills who is left in it, and removes it.
    pub fn remove(&self) {
        self.kill();
        // One that cannot be emptied now is the machine's to keep; it holds nothing.
        clock::eventually(Duration::from_secs(5), || {
            // The innermost first.
            for folder in self.folders().flat_map(|folder| below(folder)).rev() {
                let _ = std::fs::remove_dir(folder);
            }
            self.folders().all(|folder| !folder.exists())
        });
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

/// A group and all groups in it, the outermost first.
fn below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_owned()];
    let mut next = 0;
    while let Some(folder) = found.get(next) {
        let inside = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let groups: Vec<PathBuf> = inside.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
        found.extend(groups);
        next += 1;
    }
    found
}

fn pids_in(folder: &Path) -> Vec<i32> {
    files::lines(&folder.join("cgroup.procs")).iter().filter_map(|line| line.parse().ok()).collect()
}

/// Where a controller of version 1 is mounted. `None`: this machine does not have it there.
pub fn controller_root(controller: &str) -> Option<PathBuf> {
    mounted("cgroup", controller)
}

/// Where a hierarchy is mounted.
fn root(hierarchy: Hierarchy) -> Option<PathBuf> {
    match hierarchy {
        Hierarchy::V2 => mounted("cgroup2", ""),
        // The one that systemd itself uses; no controller is bound to it.
        Hierarchy::V1 => mounted("cgroup", "name=systemd"),
    }
}

fn mounted(wanted: &str, word: &str) -> Option<PathBuf> {
    let mounts = files::lines(Path::new("/proc/self/mounts"));
    let mut places = mounts.iter().filter_map(|line| {
        let [_, place, kind, options] = line.split(' ').take(4).collect::<Vec<_>>().try_into().ok()?;
        let has_word = word.is_empty() || options.split(',').any(|option| option == word);
        (kind == wanted && has_word).then(|| PathBuf::from(place))
    });
    places.next()
}
