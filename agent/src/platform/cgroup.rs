//! Control groups: bounds that the kernel keeps for a child process, where this process was handed a group to divide.
//!
//! Only a group that systemd has marked as handed on is touched (`Delegate=`; the attribute `user.delegate`, or
//! `trusted.delegate` of older ones, <https://systemd.io/CGROUP_DELEGATION/>): any other may have a master. Both
//! hierarchies are known, also mixed, each controller where it is: version 2
//! (<https://docs.kernel.org/admin-guide/cgroup-v2.html>), where a group with controllers for its children holds no
//! process itself, so that this process moves into a child first; and version 1, where a child is simply made.
//!
//! `memory.high` is left alone: above it the kernel slows a process down without an end, and a backup that stands
//! still holds its service longer than one that fails.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::mounts::Mounts;

/// What systemd writes to a group that it hands on.
const MARKS: [&str; 2] = ["user.delegate", "trusted.delegate"];
/// Where this process goes, so that its group can be divided.
const OWN_CHILD: &str = "own";
/// The period that a share of CPU is counted in, in microseconds; the kernel's own default.
const PERIOD_US: u64 = 100_000;

/// What a hierarchy can bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controller {
    /// Memory.
    Memory,
    /// CPU time.
    Cpu,
    /// Who goes first at a disk.
    Io,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Memory, Self::Cpu, Self::Io];

    /// As systemd and version 2 call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Io => "io",
        }
    }

    /// As version 1 calls it.
    fn first_name(self) -> &'static str {
        if self == Self::Io { "blkio" } else { self.as_str() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    controller: Controller,
    version: Version,
    /// The group that was handed to this process.
    folder: PathBuf,
}

/// A group that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Nobody handed this process a group.
    #[error("systemd has handed on no control group to this process (`Delegate=`)")]
    NotHandedOn,
    /// A file or folder of a group could not be read, made or written.
    #[error("cannot {operation} {path}")]
    File {
        /// A verb.
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What a child may take; 0: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// Memory, its files in the page cache included, and no swap.
    pub memory_bytes_max: u64,
    /// CPU time in percent of one core.
    pub cpu_percent_max: u32,
    /// Its weight at disks, 1 to 1000; others have 100.
    pub io_weight: u32,
}

/// The group that was handed to this process.
#[derive(Debug)]
pub struct HandedOn {
    places: Vec<Place>,
    made: AtomicU32,
}

impl HandedOn {
    /// Finds the group of this process and makes it ready to be divided. Before there is a child process: those that
    /// exist stay where they are, and nothing can be divided then.
    ///
    /// # Errors
    /// [`CgroupError`]; then no child can be bounded.
    pub fn to_this_process() -> Result<Self, CgroupError> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(failed("read", Path::new(path)));
        let mounts = Mounts::read().map_err(|error| CgroupError::File {
            operation: "read",
            path: "/proc/self/mountinfo".into(),
            source: io::Error::other(error),
        })?;
        Self::find(&read("/proc/self/cgroup")?, &mounts, is_marked)?.divided()
    }

    /// `of_process` is as `/proc/<pid>/cgroup` has it (cgroups(7)).
    fn find(of_process: &str, mounts: &Mounts, is_marked: impl Fn(&Path) -> bool) -> Result<Self, CgroupError> {
        let entries: Vec<Entry<'_>> = of_process.lines().filter_map(Entry::parse).collect();
        // Where systemd keeps its own: in version 2, or in a hierarchy of version 1 without a controller.
        let systemds = entries.iter().filter(|entry| entry.is_unified() || entry.names("name=systemd"));
        let marked = systemds.filter(|entry| entry.path != "/");
        let marked = marked.into_iter().find(|entry| entry.folder(mounts).is_some_and(|folder| is_marked(&folder)));
        let marked = marked.ok_or(CgroupError::NotHandedOn)?;
        let second = marked.is_unified().then(|| marked.folder(mounts)).flatten();
        let offered = second.as_deref().map(words_of("cgroup.controllers")).unwrap_or_default();
        let mut places = Vec::new();
        for controller in Controller::ALL {
            if let Some(folder) = second.as_ref().filter(|_| offered.iter().any(|word| word == controller.as_str())) {
                places.push(Place { controller, version: Version::V2, folder: folder.clone() });
                continue;
            }
            // A unit that a controller of version 1 was not handed on to is in somebody else's group there.
            let first = entries.iter().find(|entry| entry.names(controller.first_name()) && entry.path == marked.path);
            let folder = first.and_then(|entry| entry.folder(mounts));
            places.extend(folder.map(|folder| Place { controller, version: Version::V1, folder }));
        }
        Ok(Self { places, made: AtomicU32::new(0) })
    }

    /// What version 2 wants before a group has children with bounds. A controller that cannot be had is left out.
    fn divided(mut self) -> Result<Self, CgroupError> {
        let second = self.places.iter().find(|place| place.version == Version::V2).map(|place| place.folder.clone());
        let Some(folder) = second else { return Ok(self) };
        let own = folder.join(OWN_CHILD);
        made(&own)?;
        write(&own.join("cgroup.procs"), "0")?;
        let control = folder.join("cgroup.subtree_control");
        self.places.retain(|place| {
            place.version == Version::V1 || write(&control, &format!("+{}", place.controller.as_str())).is_ok()
        });
        Ok(self)
    }

    /// Whether children can be bounded in this.
    pub fn has(&self, controller: Controller) -> bool {
        self.places.iter().any(|place| place.controller == controller)
    }

    /// Makes a group for a child. Bounds whose controller is missing are not kept: see [`Self::has`].
    ///
    /// # Errors
    /// When it cannot be made or a bound not be set; then it is removed.
    pub fn group(&self, bounds: &Bounds) -> Result<Group, CgroupError> {
        let name = format!("worker-{}", self.made.fetch_add(1, Ordering::Relaxed));
        let mut group = Group { places: Vec::new() };
        for place in &self.places {
            let folder = place.folder.join(&name);
            made(&folder)?;
            let place = Place { folder, ..place.clone() };
            group.places.push(place);
        }
        group.places.iter().try_for_each(|place| place.bound(bounds))?;
        Ok(group)
    }
}

/// A child's group. It is removed with its handle; one that is not empty by then goes with the unit.
#[derive(Debug)]
pub struct Group {
    places: Vec<Place>,
}

impl Group {
    /// Moves a process into it. Before it has children, who would stay behind.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn take_in(&self, pid: u32) -> Result<(), CgroupError> {
        self.folders().try_for_each(|folder| write(&folder.join("cgroup.procs"), &pid.to_string()))
    }

    /// How many of its processes the kernel has killed because they needed more memory than they may.
    pub fn killed_for_memory(&self) -> u64 {
        let memory = self.places.iter().find(|place| place.controller == Controller::Memory);
        let counted = memory.and_then(|place| {
            let file = if place.version == Version::V2 { "memory.events" } else { "memory.oom_control" };
            let text = std::fs::read_to_string(place.folder.join(file)).ok()?;
            text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
        });
        counted.unwrap_or(0)
    }

    /// Each once: all controllers of version 2 share one.
    fn folders(&self) -> impl Iterator<Item = &Path> {
        let mut last = None;
        self.places.iter().map(|place| place.folder.as_path()).filter(move |folder| {
            let is_new = last != Some(*folder);
            last = Some(*folder);
            is_new
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for folder in self.folders() {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

impl Place {
    fn bound(&self, bounds: &Bounds) -> Result<(), CgroupError> {
        let Bounds { memory_bytes_max: memory, cpu_percent_max: cpu, io_weight } = bounds;
        let quota_us = u64::from(*cpu) * PERIOD_US / 100;
        match (self.controller, self.version) {
            (Controller::Memory, _) if *memory == 0 => Ok(()),
            (Controller::Cpu, _) if *cpu == 0 => Ok(()),
            (Controller::Io, _) if *io_weight == 0 => Ok(()),
            (Controller::Memory, Version::V2) => {
                self.set("memory.max", memory)?;
                self.set_if_there("memory.swap.max", 0)
            }
            (Controller::Memory, Version::V1) => {
                self.set("memory.limit_in_bytes", memory)?;
                self.set_if_there("memory.memsw.limit_in_bytes", memory)
            }
            (Controller::Cpu, Version::V2) => self.set("cpu.max", format_args!("{quota_us} {PERIOD_US}")),
            (Controller::Cpu, Version::V1) => {
                self.set("cpu.cfs_period_us", PERIOD_US)?;
                self.set("cpu.cfs_quota_us", quota_us)
            }
            // Which of them there is depends on the disks' schedulers; without any, the I/O class is all there is.
            (Controller::Io, Version::V2) => {
                self.set_if_there("io.weight", io_weight)?;
                self.set_if_there("io.bfq.weight", io_weight)
            }
            (Controller::Io, Version::V1) => self.set_if_there("blkio.bfq.weight", io_weight),
        }
    }

    fn set(&self, file: &str, value: impl std::fmt::Display) -> Result<(), CgroupError> {
        write(&self.folder.join(file), &value.to_string())
    }

    /// Swap is not counted where the kernel was told so, and weights depend on the disk's scheduler.
    fn set_if_there(&self, file: &str, value: impl std::fmt::Display) -> Result<(), CgroupError> {
        if self.folder.join(file).exists() { self.set(file, value) } else { Ok(()) }
    }
}

/// A line of `/proc/<pid>/cgroup`: number, controllers, path.
struct Entry<'t> {
    controllers: &'t str,
    path: &'t str,
}

impl<'t> Entry<'t> {
    fn parse(line: &'t str) -> Option<Self> {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some(Self { controllers, path })
    }

    fn is_unified(&self) -> bool {
        self.controllers.is_empty()
    }

    fn names(&self, controller: &str) -> bool {
        self.controllers.split(',').any(|name| name == controller)
    }

    /// Where the group is seen in this mount namespace.
    fn folder(&self, mounts: &Mounts) -> Option<PathBuf> {
        let is_its = |kind: &str, options: &str| match self.is_unified() {
            true => kind == "cgroup2",
            false => kind == "cgroup" && self.controllers.split(',').all(|name| options.split(',').any(|o| o == name)),
        };
        let mounted = mounts.iter().filter(|mount| is_its(&mount.kind, &mount.options));
        let seen = mounted.filter_map(|mount| {
            let below = Path::new(self.path).strip_prefix(&mount.root).ok()?;
            Some(mount.point.join(below))
        });
        seen.into_iter().find(|folder| folder.is_dir())
    }
}

fn is_marked(folder: &Path) -> bool {
    let mut value = [0_u8; 8];
    MARKS.iter().any(|mark| {
        let read = rustix::fs::getxattr(folder, *mark, &mut value);
        read.is_ok_and(|length| value.get(..length) == Some(b"1"))
    })
}

fn words_of(file: &'static str) -> impl Fn(&Path) -> Vec<String> {
    move |folder| {
        let text = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }
}

fn made(folder: &Path) -> Result<(), CgroupError> {
    match std::fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(failed("make", folder)),
    }
}

/// One call, as these files want it.
fn write(file: &Path, text: &str) -> Result<(), CgroupError> {
    let written = OpenOptions::new().write(true).open(file).and_then(|mut open| open.write_all(text.as_bytes()));
    written.map_err(failed("write", file))
}

fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::File { operation, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::files;

    const BOUNDS: Bounds = Bounds { memory_bytes_max: 64 << 20, cpu_percent_max: 50, io_weight: 10 };

    /// Folders that look like hierarchies, and how they would be mounted.
    struct Pretended {
        root: tempfile::TempDir,
        mounts: String,
    }

    impl Pretended {
        fn new() -> Self {
            Self { root: tempfile::tempdir().unwrap(), mounts: String::new() }
        }

        fn mounted(mut self, name: &str, kind: &str, options: &str) -> Self {
            let point = self.root.path().join(name);
            std::fs::create_dir_all(&point).unwrap();
            self.mounts += &format!("1 2 0:3 / {} rw - {kind} {kind} rw,{options}\n", point.display());
            self
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            files::write(&path, text.as_bytes(), 0o600).unwrap();
        }

        fn has(&self, path: &str) -> String {
            std::fs::read_to_string(self.root.path().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
        }

        fn find(&self, of_process: &str) -> Result<HandedOn, CgroupError> {
            HandedOn::find(of_process, &Mounts::parse(&self.mounts), |folder| folder.ends_with("u.service"))
        }
    }

    /// The kernel makes the files of a group with its folder.
    fn filled(folder: &Path, names: &[&str]) {
        std::fs::create_dir_all(folder).unwrap();
        names.iter().for_each(|name| files::write(&folder.join(name), b"", 0o600).unwrap());
    }

    #[test]
    fn group_of_version_2_is_divided_and_its_child_bounded() {
        let pretended = Pretended::new().mounted("cg", "cgroup2", "nsdelegate");
        pretended.put("cg/s.slice/u.service/cgroup.controllers", "cpu io memory pids\n");
        pretended.put("cg/s.slice/u.service/cgroup.subtree_control", "");
        pretended.put("cg/s.slice/u.service/own/cgroup.procs", "");
        let handed = pretended.find("0::/s.slice/u.service\n").unwrap().divided().unwrap();
        assert_eq!(pretended.has("cg/s.slice/u.service/own/cgroup.procs"), "0");
        assert_eq!(Controller::ALL.map(|c| handed.has(c)), [true; 3]);
        let child = pretended.root.path().join("cg/s.slice/u.service/worker-0");
        filled(&child, &["memory.max", "memory.swap.max", "cpu.max", "io.weight", "cgroup.procs", "memory.events"]);
        let group = handed.group(&BOUNDS).unwrap();
        group.take_in(4711).unwrap();
        for (file, value) in [
            ("memory.max", "67108864"),
            ("memory.swap.max", "0"),
            ("cpu.max", "50000 100000"),
            ("io.weight", "10"),
            ("cgroup.procs", "4711"),
        ] {
            assert_eq!(pretended.has(&format!("cg/s.slice/u.service/worker-0/{file}")), value, "{file}");
        }
        pretended.put("cg/s.slice/u.service/worker-0/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n");
        assert_eq!(group.killed_for_memory(), 2);
    }

    #[test]
    fn group_of_version_1_is_bounded_in_each_hierarchy_that_was_handed_on() {
        let pretended = Pretended::new()
            .mounted("systemd", "cgroup", "xattr,name=systemd")
            .mounted("memory", "cgroup", "memory")
            .mounted("cpu", "cgroup", "cpu,cpuacct");
        for place in ["systemd/s/u.service/x", "memory/s/u.service/x", "cpu/s/x"] {
            pretended.put(place, "");
        }
        let of_process = "3:cpu,cpuacct:/s\n2:memory:/s/u.service\n1:name=systemd:/s/u.service\n0::/\n";
        let handed = pretended.find(of_process).unwrap().divided().unwrap();
        assert_eq!(Controller::ALL.map(|c| handed.has(c)), [true, false, false], "the CPU is another's group");
        let child = pretended.root.path().join("memory/s/u.service/worker-0");
        filled(&child, &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "cgroup.procs", "memory.oom_control"]);
        let group = handed.group(&BOUNDS).unwrap();
        assert_eq!(pretended.has("memory/s/u.service/worker-0/memory.limit_in_bytes"), "67108864");
        assert_eq!(pretended.has("memory/s/u.service/worker-0/memory.memsw.limit_in_bytes"), "67108864");
        pretended
            .put("memory/s/u.service/worker-0/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n");
        assert_eq!(group.killed_for_memory(), 1);
    }

    #[test]
    fn group_that_was_not_handed_on_is_left_alone() {
        let pretended = Pretended::new().mounted("cg", "cgroup2", "nsdelegate");
        pretended.put("cg/s.slice/other.service/cgroup.controllers", "memory\n");
        for of_process in ["0::/s.slice/other.service\n", "0::/\n", ""] {
            assert!(matches!(pretended.find(of_process), Err(CgroupError::NotHandedOn)), "{of_process}");
        }
    }
}
