//! `freeze`: how long a service is held for each kind of point, next to the same done by hand.
//!
//! In: how often. Out: for each kind the window, ours and by hand in turns on the same filesystem, with
//! somebody else writing and syncing beside. What is measured is `hestner_agent::freeze` with its real guard,
//! freezer and supervisor processes; a few whole runs of the real programs come last. By hand means: the two system
//! calls in a process that does nothing else, the one command, the two requests to Docker.
//!
//! Two figures a kind: `window` is how long something was frozen or held (as the guard measured it, where
//! there is one), `between hooks` is the time from the last `pre_freeze` to the first `post_thaw`, in which the
//! guard gets ready as well.

mod by_hand;
mod point;
mod whole;

use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use hestner_tests::clock::let_pass;
use hestner_tests::docker::Docker;
use hestner_tests::files;
use hestner_tests::mounts::Mounted;
use hestner_tests::writer::Writer;
use serde_json::json;

use crate::output::{Bench, Figure, Row};
use point::Points;

pub(crate) use point::hold_frozen;

/// Filesystems that can be frozen.
const FREEZABLE: [&str; 3] = ["ext4", "xfs", "btrfs"];
/// Filesystems that can share blocks.
const SHARING: [&str; 2] = ["xfs", "btrfs"];
/// Files of a tree that is copied.
const FILES: usize = 1_000;
/// A freeze soon after another one is up to ten times as fast: the kernel's locks need no grace period of RCU
/// then (rcu_sync in percpu_rwsem). A service is not frozen ten times a second, so both are measured later.
const BETWEEN_FREEZES: Duration = Duration::from_millis(120);
/// Runners that are killed, for each filesystem.
const KILLS_MAX: u32 = 50;

/// Whole runs, of each kind.
const RUNS_MAX: u32 = 20;

/// How long it took, ours and by hand.
#[derive(Default)]
struct Times {
    window: Vec<f64>,
    between: Vec<f64>,
    by_hand: Vec<f64>,
}

/// Measures every kind whose name holds `only`.
pub(crate) fn run(rounds: u32, only: &str) -> anyhow::Result<Bench> {
    if !nix::unistd::geteuid().is_root() {
        bail!("it mounts, freezes and starts containers: run it as root");
    }
    let mut bench = Freeze { points: Points::new()?, rounds, only, rows: Vec::new() };
    for kind in FREEZABLE {
        bench.fsfreeze(kind)?;
    }
    bench.btrfs()?;
    for kind in SHARING {
        bench.reflink(kind)?;
    }
    bench.docker()?;
    bench.hooks()?;
    for kind in FREEZABLE {
        bench.killed(kind)?;
    }
    if bench.wants("whole run") {
        bench.rows.extend(whole::run(rounds)?);
    }
    let remark = format!(
        "{rounds} points of each kind (runner killed {}, whole runs {}), ours and by hand in turns, beside somebody who writes and syncs",
        rounds.min(KILLS_MAX),
        rounds.min(RUNS_MAX)
    );
    Ok(Bench { name: "freeze", remark, rows: bench.rows })
}

struct Freeze<'a> {
    points: Points,
    rounds: u32,
    only: &'a str,
    rows: Vec<Row>,
}

impl Freeze<'_> {
    fn fsfreeze(&mut self, kind: &str) -> anyhow::Result<()> {
        let empty = format!("fsfreeze {kind}");
        let with_command = format!("fsfreeze {kind}, command");
        if self.wants(&empty) {
            let disk = Disk::new(&self.points, kind);
            let folder = by_hand::open(disk.path())?;
            let times = self.in_turns(
                &empty,
                self.rounds,
                |points| points.freeze(disk.path()).map(|window| (window, None)),
                || by_hand::freeze(&folder, None),
            )?;
            self.add(&empty, "FIFREEZE, FITHAW", times);
        }
        if self.wants(&with_command) {
            let disk = Disk::new(&self.points, kind);
            let folder = by_hand::open(disk.path())?;
            let service = point::service(
                json!({"kind": "fsfreeze", "command": ["/bin/true"], "read_from": "/mnt"}),
                disk.path(),
            )?;
            let times = self.in_turns(
                &with_command,
                self.rounds,
                |points| points.take(&service),
                || by_hand::freeze(&folder, Some("/bin/true")),
            )?;
            self.add(&with_command, "FIFREEZE, /bin/true, FITHAW", times);
        }
        Ok(())
    }

    fn btrfs(&mut self) -> anyhow::Result<()> {
        let name = "btrfs snapshot";
        if self.wants(name) {
            let disk = Disk::new(&self.points, "btrfs");
            files::small_tree(&disk.path().join("tree"), FILES, 2_000);
            let service = point::service(json!({"kind": "btrfs"}), disk.path())?;
            let times =
                self.in_turns(name, self.rounds, |points| points.take(&service), || by_hand::snapshot(disk.path()))?;
            self.add(name, "btrfs subvolume snapshot -r", times);
        }
        Ok(())
    }

    fn reflink(&mut self, kind: &str) -> anyhow::Result<()> {
        let name = format!("reflink {kind}");
        if self.wants(&name) {
            let disk = Disk::new(&self.points, kind);
            let tree = files::small_tree(&disk.path().join("tree"), FILES, 2_000);
            let service = point::service(json!({"kind": "reflink"}), &tree)?;
            let times = self.in_turns(&name, self.rounds, |points| points.take(&service), || by_hand::copy(&tree))?;
            self.add(&name, "cp -a --reflink=always", times);
        }
        Ok(())
    }

    fn docker(&mut self) -> anyhow::Result<()> {
        let (pause, stop) = ("docker pause, btrfs", "docker stop");
        if !self.wants(pause) && !self.wants(stop) {
            return Ok(());
        }
        let docker = Docker::start(&self.points.at("docker"));
        self.points.use_docker(docker.socket());
        let mut by_hand = by_hand::Docker::connect(&docker.socket())?;
        if self.wants(pause) {
            let disk = Disk::quiet(&self.points, "btrfs");
            docker.run_writer("paused", disk.path());
            let service = point::service(json!({"kind": "btrfs", "containers": ["paused"]}), disk.path())?;
            let times = self.in_turns(
                pause,
                self.rounds,
                |points| points.take(&service),
                || by_hand.pause("paused", || by_hand::snapshot_only(disk.path())),
            )?;
            self.add(pause, "POST pause, btrfs snapshot, POST unpause", times);
            docker.docker(&["rm", "-f", "paused"]).ok();
        }
        if self.wants(stop) {
            let folder = self.points.at("stopped");
            std::fs::create_dir_all(&folder)?;
            docker.run_writer("stopped", &folder);
            let point = json!({"kind": "none", "containers": ["stopped"], "hold": "stop"});
            let service = point::service(point, &folder)?;
            let times = self.in_turns(stop, self.rounds, |points| points.take(&service), || by_hand.stop("stopped"))?;
            self.add(stop, "POST stop, POST start", times);
        }
        Ok(())
    }

    fn hooks(&mut self) -> anyhow::Result<()> {
        let name = "hooks only";
        if self.wants(name) {
            let stamps = by_hand::Stamps::new(&self.points.at("stamps"));
            let service = point::service(json!({"kind": "none"}), Path::new("/usr/share/doc"))?;
            let times = self.in_turns(
                name,
                self.rounds,
                |points| points.between_hooks(&service, &stamps).map(|window| (window, None)),
                || stamps.by_hand(),
            )?;
            self.add(name, "the same two programs, started in turn", times);
        }
        Ok(())
    }

    fn killed(&mut self, kind: &str) -> anyhow::Result<()> {
        let name = format!("runner killed {kind}");
        if self.wants(&name) {
            let disk = Disk::new(&self.points, kind);
            let mut thawed = Vec::new();
            for _ in 0..self.rounds.min(KILLS_MAX) {
                thawed.push(milliseconds(self.points.killed(disk.path())?));
            }
            eprintln!("{name}: done");
            self.rows.push(Row {
                case: name,
                metric: "until thawed",
                unit: "ms",
                hestner: Figure::of(thawed),
                peers: Vec::new(),
            });
        }
        Ok(())
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(self.only)
    }

    /// Ours and by hand, each first every other time.
    fn in_turns(
        &mut self,
        name: &str,
        rounds: u32,
        mut ours: impl FnMut(&mut Points) -> anyhow::Result<(Duration, Option<Duration>)>,
        mut by_hand: impl FnMut() -> anyhow::Result<Duration>,
    ) -> anyhow::Result<Times> {
        let mut times = Times::default();
        for round in 0..rounds {
            let ours_at = round % 2;
            for turn in 0..2 {
                if name.contains("fsfreeze") {
                    let_pass(BETWEEN_FREEZES);
                }
                if turn == ours_at {
                    let (window, between) = ours(&mut self.points)?;
                    times.window.push(milliseconds(window));
                    times.between.extend(between.map(milliseconds));
                } else {
                    times.by_hand.push(milliseconds(by_hand()?));
                }
            }
        }
        eprintln!("{name}: done");
        Ok(times)
    }

    fn add(&mut self, case: &str, peer: &str, times: Times) {
        let row =
            |metric, ours, peers| Row { case: case.to_owned(), metric, unit: "ms", hestner: Figure::of(ours), peers };
        self.rows.push(row("window", times.window, vec![(peer.to_owned(), Figure::of(times.by_hand))]));
        if !times.between.is_empty() {
            self.rows.push(row("between hooks", times.between, Vec::new()));
        }
    }
}

/// A filesystem of its own for one kind, and whoever writes on it.
struct Disk {
    // Dropped first: a writer keeps the filesystem busy.
    _writer: Option<Writer>,
    mounted: Mounted,
}

impl Disk {
    fn new(points: &Points, kind: &str) -> Self {
        let mut disk = Self::quiet(points, kind);
        disk._writer = Some(Writer::start(disk.path()));
        disk
    }

    /// Somebody else will write on it.
    fn quiet(points: &Points, kind: &str) -> Self {
        Self { _writer: None, mounted: Mounted::of_kind(kind, &points.fresh("disk")) }
    }

    fn path(&self) -> &Path {
        self.mounted.path()
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
