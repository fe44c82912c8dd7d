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
}

impl Cgroup {
    /// Makes a group. `None`: this machine does not have that hierarchy.
    pub fn new(hierarchy: Hierarchy, name: &str) -> Option<Self> {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let folder = root(hierarchy)?.join(format!("hestner-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        Some(Self { folder, hierarchy })
    }

    /// A command line whose process is in the group before it runs.
    pub fn command(&self, program: &Path) -> Cmd {
        let enter = "echo $$ >\"$0/cgroup.procs\" && exec \"$@\"";
        Cmd::new("bash").args(["-c", enter]).arg(&self.folder).arg(program)
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
        files::lines(&self.folder.join("cgroup.procs")).iter().filter_map(|line| line.parse().ok()).collect()
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
            std::fs::remove_dir(&self.folder).is_ok() || !self.folder.exists()
        });
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Where a hierarchy is mounted.
fn root(hierarchy: Hierarchy) -> Option<PathBuf> {
    let mounts = files::lines(Path::new("/proc/self/mounts"));
    let places = mounts.iter().filter_map(|line| {
        let [_, place, kind, options] = line.split(' ').take(4).collect::<Vec<_>>().try_into().ok()?;
        Some((place, kind, options))
    });
    let wanted = |kind: &str, options: &str| match hierarchy {
        Hierarchy::V2 => kind == "cgroup2",
        // The one that systemd itself uses; no controller is bound to it.
        Hierarchy::V1 => kind == "cgroup" && options.split(',').any(|option| option == "name=systemd"),
    };
    let mut found = places.filter(|(_, kind, options)| wanted(kind, options));
    found.next().map(|(place, ..)| PathBuf::from(place))
}
