//! A small Debian with systemd as its first process, in which the packages are installed and driven.
//!
//! The tree is made once by `debootstrap` (`scripts/lib.sh` knows how) and stays untouched: each machine works on an
//! overlay of its own. It has a network of its own, with loopback only, and its own place in the control groups, so
//! that several can run beside each other, and beside whatever runs here. In: the control group hierarchy, folders of the host to
//! show inside. Out: commands run inside, files, restarts. What the machine froze is thawed and everything in it
//! ended when its handle goes, also when the test fails.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use crate::clock::{self, wait_for};
use crate::command::{Cmd, Ended};
use crate::{files, processes};

/// What a boot may take on a busy machine.
const BOOT_WITHIN: Duration = Duration::from_secs(60);
/// What a power-off may take; services have to release what they hold.
const OFF_WITHIN: Duration = Duration::from_secs(120);
/// What `debootstrap` may take.
const TREE_WITHIN: Duration = Duration::from_secs(900);
/// Where the tree lies that all machines share.
const TREE: &str = "/var/cache/hestner-tests/bookworm";
const CGROUPS: [&str; 2] = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"];

/// Which control groups systemd finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    /// Version 1, as older hosts have it.
    V1,
    /// Version 2, the default of Debian 12.
    V2,
}

/// A machine, running or off.
pub struct Booted {
    name: String,
    folder: PathBuf,
    hierarchy: Hierarchy,
    binds: Vec<(PathBuf, PathBuf)>,
    nspawn: Option<Child>,
    /// The first process inside, by its number outside.
    leader: i32,
}

/// Both packages of one version.
pub struct Packages {
    /// `hestner-agent`.
    pub agent: PathBuf,
    /// `hestner-receiver`.
    pub receiver: PathBuf,
}

impl Packages {
    /// Builds them from the programs beside the running test.
    ///
    /// # Panics
    /// When they cannot be built.
    pub fn build(folder: &Path, version: &str) -> Self {
        let agent = crate::world::bin("hestner-agent");
        let script = repository().join("packaging/build");
        let built = Cmd::new(script)
            .args(["--fast", "--profile", "dev", "--version", version, "--binaries"])
            .args([agent.parent().expect("a folder"), folder])
            .ok();
        let mut lines = built.lines().map(PathBuf::from);
        let mut next = || lines.next().unwrap_or_else(|| panic!("packaging/build named no package: {built}"));
        Self { agent: next(), receiver: next() }
    }
}

impl Booted {
    /// Makes a machine below `folder` and boots it. `binds` are folders of the host and where they appear inside.
    pub fn start(folder: &Path, hierarchy: Hierarchy, binds: &[(&Path, &str)]) -> Self {
        make_tree();
        let name = format!("hestner-booted-{}-{}", std::process::id(), format!("{hierarchy:?}").to_lowercase());
        let binds = binds.iter().map(|(outside, inside)| ((*outside).to_owned(), PathBuf::from(inside))).collect();
        let mut machine = Self { name, folder: folder.join("machine"), hierarchy, binds, nspawn: None, leader: 0 };
        machine.lay_out();
        machine.boot();
        machine
    }

    /// A path inside, as the host sees it.
    pub fn at(&self, inside: &str) -> PathBuf {
        self.folder.join("root").join(inside.trim_start_matches('/'))
    }

    /// A command inside, as root.
    pub fn command(&self, words: &[&str]) -> Cmd {
        assert!(self.leader != 0, "the machine is off");
        Cmd::new("nsenter")
            .args(["-t", &self.leader.to_string(), "-m", "-u", "-i", "-n", "-p", "-C", "--", "env", "-i"])
            .args([
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME=/root",
                "LANG=C.UTF-8",
                "DEBIAN_FRONTEND=noninteractive",
            ])
            .args(words)
    }

    /// Runs a command inside.
    pub fn run(&self, words: &[&str]) -> Ended {
        self.command(words).run()
    }

    /// Runs a command inside that must succeed; gives its standard output.
    pub fn ok(&self, words: &[&str]) -> String {
        self.run(words).ok()
    }

    /// Runs a line of shell inside that must succeed; gives its standard output.
    pub fn sh(&self, line: &str) -> String {
        self.ok(&["sh", "-c", line])
    }

    /// Installs a package, or upgrades to it.
    pub fn install(&self, package: &Path) -> Ended {
        let name = package.file_name().expect("a file name").to_string_lossy().into_owned();
        let inside = format!("/root/{name}");
        std::fs::copy(package, self.at(&inside)).expect("a copy of the package");
        self.command(&["dpkg", "--force-confold", "-i", &inside]).within(Duration::from_secs(180)).run()
    }

    /// Offers a package to the machine's apt, from a repository that holds nothing else.
    ///
    /// # Panics
    /// When apt does not take it.
    pub fn offer(&self, package: &Path) {
        let folder = self.at("/srv/apt");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::copy(package, folder.join("offered.deb")).expect("a copy of the package");
        let control = Cmd::new("dpkg-deb").arg("--field").arg(package).ok();
        let hash = Cmd::new("sha256sum").arg(package).ok();
        let hash = hash.split_whitespace().next().expect("a hash");
        let size = package.metadata().expect("the package").len();
        let entry = format!("{}\nFilename: ./offered.deb\nSize: {size}\nSHA256: {hash}\n", control.trim_end());
        files::write(folder.join("Packages"), entry);
        files::write(self.at("/etc/apt/sources.list"), "deb [trusted=yes] file:/srv/apt ./\n");
        self.ok(&["apt-get", "update"]);
    }

    /// `apt-get`, which asks nobody and keeps the settings that were edited.
    pub fn apt(&self, words: &[&str]) -> Cmd {
        let keep = ["apt-get", "--yes", "-o", "Dpkg::Options::=--force-confold"];
        self.command(&[&keep, words].concat()).within(Duration::from_secs(240))
    }

    /// The capability bounding sets of our processes inside that are `word`, such as `runner`, as bits.
    pub fn left_of_the_bounding_set(&self, word: &str) -> Vec<u64> {
        let inside = self.left_inside();
        let ours = processes::all().into_iter().filter(|p| inside.contains(&p.pid) && p.is_part(word));
        ours.filter_map(|p| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", p.pid)).ok()?;
            let bits = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
            u64::from_str_radix(bits.trim(), 16).ok()
        })
        .collect()
    }

    /// One property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.ok(&["systemctl", "show", "--value", "-p", name, unit]).trim().to_owned()
    }

    /// Whether a unit is active.
    pub fn is_active(&self, unit: &str) -> bool {
        self.run(&["systemctl", "is-active", "--quiet", unit]).code == Some(0)
    }

    /// Powers off in good order and boots again. Mounts of the host survive it: it is no reboot.
    pub fn restart(&mut self) {
        self.power_off();
        self.boot();
    }

    /// Asks for a power-off and returns at once.
    pub fn begin_power_off(&self) {
        let asked = self.run(&["systemctl", "--no-block", "poweroff"]);
        assert_eq!(asked.code, Some(0), "{asked}");
    }

    /// Powers off in good order.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn power_off(&mut self) {
        if self.nspawn.is_some() {
            self.begin_power_off();
        }
        self.wait_off();
    }

    /// Waits for the end of a power-off that was asked for.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn wait_off(&mut self) {
        let Some(mut child) = self.nspawn.take() else { return };
        let off = clock::eventually(OFF_WITHIN, || child.try_wait().is_ok_and(|status| status.is_some()));
        if !off {
            self.nspawn = Some(child);
            panic!("the machine did not power off within {OFF_WITHIN:?}");
        }
        self.leader = 0;
    }

    /// Boots a machine that is off, and waits until it is up.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn boot(&mut self) {
        self.leave_cgroups();
        let hierarchy = if self.hierarchy == Hierarchy::V1 { "0" } else { "1" };
        let mut line = vec!["set -e".to_owned()];
        for cgroup in self.cgroups() {
            line.push(format!("mkdir -p {0} && echo $$ > {0}/cgroup.procs", cgroup.display()));
        }
        line.push("exec systemd-nspawn \"$@\"".to_owned());
        let binds =
            self.binds.iter().map(|(outside, inside)| format!("--bind={}:{}", outside.display(), inside.display()));
        let child = Cmd::new("sh")
            .env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", hierarchy)
            .arg("-c")
            .arg(line.join("\n"))
            .args([
                "nspawn",
                "--quiet",
                "--register=no",
                "--keep-unit",
                "--boot",
                "--private-network",
                "--console=pipe",
            ])
            // What a machine has and such a container has not: leave to lock memory.
            .args(["--capability=CAP_IPC_LOCK", "--hostname=hestner-test", "--resolv-conf=off", "--timezone=off"])
            .arg(format!("--machine={}", self.name))
            .arg("-D")
            .arg(self.folder.join("root"))
            .args(binds)
            .spawn_logged(&self.folder.join("console.log"));
        let nspawn = i32::try_from(child.id()).expect("a pid");
        self.nspawn = Some(child);
        let console = self.folder.join("console.log");
        self.leader = wait_for(&format!("a first process inside, see {}", console.display()), BOOT_WITHIN, || {
            let child = processes::all().into_iter().find(|p| p.parent == nspawn)?;
            // First there are the shell's own children and a copy of systemd-nspawn.
            let is_init = child.argv.first().is_some_and(|arg| arg.ends_with("/init") || arg.ends_with("/systemd"));
            is_init.then_some(child.pid)
        });
        wait_for(&format!("the machine to be up, see {}", console.display()), BOOT_WITHIN, || {
            let state = self.run(&["systemctl", "is-system-running"]).stdout;
            ["running", "degraded"].contains(&state.trim()).then_some(())
        });
    }

    fn cgroups(&self) -> impl Iterator<Item = PathBuf> {
        CGROUPS.iter().filter(|base| Path::new(base).is_dir()).map(|base| Path::new(base).join(&self.name))
    }

    fn lay_out(&self) {
        for part in ["upper", "work", "root"] {
            std::fs::create_dir_all(self.folder.join(part)).expect("a folder");
        }
        let options = ["upper", "work"].map(|part| format!("{part}dir={}", self.folder.join(part).display())).join(",");
        Cmd::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &format!("lowerdir={TREE},{options}")])
            .arg(self.folder.join("root"))
            .ok();
        // debootstrap copies what the host is called.
        files::write(self.at("/etc/hostname"), "hestner-test\n");
        files::write(self.at("/etc/hosts"), "127.0.0.1 localhost hestner-test\n");
        files::write(self.at("/etc/resolv.conf"), "");
        // A journal that outlives a restart of the machine.
        std::fs::create_dir_all(self.at("/var/log/journal")).expect("a folder");
        self.binds.iter().for_each(|(_, inside)| {
            std::fs::create_dir_all(self.at(&inside.to_string_lossy())).expect("a mount point");
        });
    }

    /// The newest lines of the journal inside.
    pub fn journal(&self, lines: u32) -> String {
        let folder = self.at("/var/log/journal");
        Cmd::new("journalctl")
            .args(["--no-pager", "-o", "short-monotonic", "-n", &lines.to_string(), "-D"])
            .arg(folder)
            .run()
            .stdout
    }

    /// Processes in the machine's control groups, by their numbers outside.
    fn left_inside(&self) -> Vec<i32> {
        let name = format!("/{}/", self.name);
        let is_inside =
            |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|c| c.contains(&name));
        processes::all().into_iter().map(|p| p.pid).filter(|pid| is_inside(*pid)).collect()
    }

    fn leave_cgroups(&self) {
        for cgroup in self.cgroups().filter(|cgroup| cgroup.exists()) {
            // Innermost first; one that is busy stays, and stays visible.
            let _ = Cmd::new("find").arg(&cgroup).args(["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"]).run();
        }
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        // A process that writes to something frozen cannot be killed: so nothing may be frozen.
        for (outside, _) in &self.binds {
            let _ = Cmd::new("fsfreeze").arg("-u").arg(outside).run();
        }
        if std::thread::panicking() {
            eprintln!("--- journal of the machine\n{}", self.journal(150));
            let status: &[&str] = &["systemctl", "--no-pager", "--full", "status", "hestner-*"];
            for words in [status, &["hestner-agent", "thaw", "--json"]] {
                eprintln!("--- {}\n{}", words.join(" "), self.run(words));
            }
        }
        if self.leader != 0 {
            processes::kill(self.leader);
        }
        if let Some(mut child) = self.nspawn.take() {
            if !clock::eventually(Duration::from_secs(10), || child.try_wait().is_ok_and(|s| s.is_some())) {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
        // A machine whose first process was never found outlives systemd-nspawn.
        for inside in self.left_inside() {
            processes::kill(inside);
        }
        let root = self.folder.join("root");
        let unmounted = clock::eventually(Duration::from_secs(5), || {
            Cmd::new("umount").arg(&root).run().code == Some(0) || !is_mounted(&root)
        });
        if !unmounted {
            let _ = Cmd::new("umount").arg("-l").arg(&root).run();
        }
        self.leave_cgroups();
    }
}

fn is_mounted(path: &Path) -> bool {
    Cmd::new("mountpoint").arg("-q").arg(path).run().code == Some(0)
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root").to_owned()
}

/// Makes the tree that all machines share, unless it is there.
fn make_tree() {
    let line = format!(". scripts/lib.sh && booted_tree {TREE}");
    Cmd::new("bash").args(["-c", &line]).in_folder(&repository()).within(TREE_WITHIN).ok();
}
