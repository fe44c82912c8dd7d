//! What systemd does with the agent's units, for tests on machines that it did not boot: sockets with
//! `Accept=yes`, each connection an instance in a control group of its own, and `ExecStopPost`.
//!
//! In: the agent's settings and a hierarchy of control groups. Out: the socket that the daemon is pointed to,
//! and the instances by unit. The units themselves are tested in a booted Debian (`booted.rs`); here it
//! matters what dies together.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::booted::Hierarchy;
use crate::cgroups::Cgroup;
use crate::clock;
use crate::command::Cmd;
use crate::world::bin;

/// How long what is left of an instance may take to die.
const GONE_WITHIN: Duration = Duration::from_secs(60);

/// A unit that is started by connecting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// `hestner-run@.service`.
    Run,
    /// `hestner-guard@.service`.
    Guard,
    /// `hestner-thaw@.service`.
    Thaw,
}

impl Unit {
    const ALL: [Self; 3] = [Self::Run, Self::Guard, Self::Thaw];

    fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Guard => "guard",
            Self::Thaw => "thaw",
        }
    }
}

/// The three sockets, and what was started through them.
pub struct Units {
    inner: Arc<Inner>,
}

struct Inner {
    folder: PathBuf,
    config: PathBuf,
    hierarchy: Hierarchy,
    /// What a run may divide, as `Delegate=` of its unit names it.
    handed_on: &'static [&'static str],
    ended: AtomicBool,
    instances: Mutex<Vec<(Unit, Arc<Cgroup>)>>,
}

impl Units {
    /// Listens below `folder`, for the agent of these settings. `None`: this machine does not have that
    /// hierarchy.
    pub fn start(folder: &Path, config: &Path, hierarchy: Hierarchy) -> Option<Self> {
        Self::start_handing_on(folder, config, hierarchy, &[])
    }

    /// The same, where each run is handed these controllers to divide; with none of them, no run is.
    pub fn start_handing_on(
        folder: &Path,
        config: &Path,
        hierarchy: Hierarchy,
        handed_on: &'static [&'static str],
    ) -> Option<Self> {
        drop(Cgroup::new(hierarchy, "probe")?);
        std::fs::create_dir_all(folder).expect("a folder");
        let inner = Arc::new(Inner {
            folder: folder.to_owned(),
            config: config.to_owned(),
            hierarchy,
            handed_on,
            ended: AtomicBool::new(false),
            instances: Mutex::default(),
        });
        for unit in Unit::ALL {
            let path = inner.socket(unit);
            let listener = UnixListener::bind(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let inner = Arc::clone(&inner);
            std::thread::spawn(move || inner.listen(unit, &listener));
        }
        Some(Self { inner })
    }

    /// Where the daemon asks for runners.
    pub fn runner_socket(&self) -> PathBuf {
        self.inner.socket(Unit::Run)
    }

    /// Kills everything of the instances of a unit that live. False: there was none.
    pub fn kill(&self, unit: Unit) -> bool {
        let groups = self.groups(unit);
        groups.iter().for_each(|group| group.kill());
        !groups.is_empty()
    }

    /// Processes of the instances of a unit.
    pub fn pids(&self, unit: Unit) -> Vec<i32> {
        self.groups(unit).iter().flat_map(|group| group.pids()).collect()
    }

    fn groups(&self, unit: Unit) -> Vec<Arc<Cgroup>> {
        let instances = self.inner.instances.lock().expect("the instances");
        let of_unit = instances.iter().filter(|(of, group)| *of == unit && !group.is_empty());
        of_unit.map(|(_, group)| Arc::clone(group)).collect()
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        self.inner.ended.store(true, Ordering::SeqCst);
        for unit in Unit::ALL {
            // Only to be seen.
            let _ = UnixStream::connect(self.inner.socket(unit));
        }
        // The threads of instances may hold them for longer than this process lives.
        let instances = std::mem::take(&mut *self.inner.instances.lock().expect("the instances"));
        instances.iter().for_each(|(_, group)| group.remove());
    }
}

impl Inner {
    fn socket(&self, unit: Unit) -> PathBuf {
        self.folder.join(format!("{}.sock", unit.name()))
    }

    fn listen(self: Arc<Self>, unit: Unit, listener: &UnixListener) {
        for connection in listener.incoming().map_while(Result::ok) {
            if self.ended.load(Ordering::SeqCst) {
                return;
            }
            let inner = Arc::clone(&self);
            std::thread::spawn(move || inner.run(unit, connection));
        }
    }

    /// One instance, from its start to its `ExecStopPost`.
    fn run(&self, unit: Unit, connection: UnixStream) {
        let group = Cgroup::new(self.hierarchy, unit.name()).expect("a group");
        let is_handed_on = unit == Unit::Run && !self.handed_on.is_empty();
        let group = Arc::new(if is_handed_on { group.handed_on(self.handed_on) } else { group });
        let base = group.command(&bin("hestner-agent")).arg("--config").arg(&self.config);
        let command = match unit {
            Unit::Run => base.arg("runner").arg("--guard-socket").arg(self.socket(Unit::Guard)),
            Unit::Guard => base.arg("guard").arg("--thaw-socket").arg(self.socket(Unit::Thaw)),
            Unit::Thaw => base.arg("thaw"),
        };
        let log = self.folder.join("units.log");
        let mut main = command.stdin_from(OwnedFd::from(connection)).spawn_logged(&log);
        self.instances.lock().expect("the instances").push((unit, Arc::clone(&group)));
        let _ = main.wait();
        // What the main process leaves is killed, and only then comes what follows the stop.
        group.kill();
        clock::eventually(GONE_WITHIN, || group.is_empty());
        if unit != Unit::Thaw && !self.ended.load(Ordering::SeqCst) {
            let thaw = Cmd::new(bin("hestner-agent")).arg("--config").arg(&self.config).arg("thaw");
            let _ = thaw.spawn_logged(&log).wait();
        }
    }
}
