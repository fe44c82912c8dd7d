//! What will be held, frozen, taken and made for the point of a service, decided before anything is done.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_proto::words::Consistency;
use serde::{Deserialize, Serialize};

use super::containers::{self, Containers};
use super::lvm::{self, LvmSnapshot};
use super::own::{self, Commands};
use super::reflink::{self, Place};
use super::zfs::{self, ZfsSnapshot};
use super::{PointError, Protected, Settings, Snapshot, btrfs, view};
use crate::guard::client::ARM_MAX;
use crate::platform::mounts::Mounts;
use crate::policy::{Hold, PointKind, ServiceSettings, SourceKind};

/// How long the order to thaw, and its answer, may take.
const THAWED_WITHIN: Duration = Duration::from_secs(5);

/// How long after its window a guard of filesystems may take to say how that ended.
const FIRST_WORD: Duration = Duration::from_secs(1);

/// How the point will be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointPlan {
    pub(super) taker: Taker,
    pub(super) binds: Vec<Bind>,
    pub(super) containers: Containers,
    /// How containers are held, when the settings name any, whether they run now or not.
    pub(super) hold: Option<Hold>,
    /// Filesystems to freeze, by their mount points.
    pub(super) mounts: Vec<PathBuf>,
    /// How long filesystems may be frozen and containers paused.
    pub(super) window: Duration,
    /// How long containers may be stopped, and a copy may take.
    pub(super) downtime_max: Duration,
    /// The source is the output of a command.
    pub(super) is_stream: bool,
    /// Hooks prepare the application.
    pub(super) quiesces: bool,
    /// What the service asks for.
    pub(super) least: Consistency,
    reasons: Vec<String>,
}

/// What takes the point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Taker {
    /// Nothing: the tree is read as it lives.
    Live,
    /// A read-only snapshot of each subvolume that holds a path.
    Btrfs(Vec<Snapshot>),
    /// A snapshot of each logical volume.
    Lvm(Vec<LvmSnapshot>),
    /// A snapshot of each dataset.
    Zfs(Vec<ZfsSnapshot>),
    /// A copy of each path that shares its blocks.
    Reflink(Vec<reflink::Copy>),
    /// The operator's command, while the filesystem is frozen.
    Own(Commands),
}

/// A folder that stands in for another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// The folder of the snapshot.
    pub from: PathBuf,
    /// The original path.
    pub to: PathBuf,
}

/// Everything that will be held or made for a point, as it is written down before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Containers that may be held.
    pub containers: Containers,
    /// What will be made, in order.
    pub made: Vec<Made>,
}

/// Something that is made for a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Made {
    /// A btrfs snapshot.
    Btrfs(Snapshot),
    /// An LVM snapshot, and its mount.
    Lvm(LvmSnapshot),
    /// A ZFS snapshot, and its mount.
    Zfs(ZfsSnapshot),
    /// A folder of copies.
    Copies(Place),
    /// Whatever the operator's command makes.
    Own(Commands),
}

impl PointPlan {
    /// Plans the point of a service, also of one whose source is a command.
    ///
    /// # Errors
    /// When the paths cannot be reached, the source's place cannot have the kind that the settings name, a
    /// snapshot would leave something out, or what would be frozen must never be.
    pub async fn of(
        service: &ServiceSettings,
        run_uid: &str,
        settings: &Settings,
        own: &Protected,
    ) -> Result<Self, PointError> {
        let point = &service.point;
        let (containers, mut reasons) =
            containers::look(&point.containers, point.hold, &settings.docker_socket).await?;
        let hold = (!point.containers.is_empty()).then_some(point.hold);
        let is_stream = service.source.kind == SourceKind::Command;
        let taken = if is_stream { Taken::default() } else { Taken::of(service, run_uid, settings, own).await? };
        if taken.taker == Taker::Live && hold == Some(Hold::Pause) {
            let path = service.source.paths.first().cloned().unwrap_or_default();
            let reason = "nothing takes a point there, and paused containers run again before anything is read: \
                set `hold = \"stop\"`, or a `kind` that takes a point";
            return Err(PointError::Unfit { kind: point.kind.as_str(), path, reason: reason.to_owned() });
        }
        reasons.extend(taken.reasons);
        Ok(Self {
            taker: taken.taker,
            binds: taken.binds,
            containers,
            hold,
            mounts: taken.mounts,
            window: settings.window,
            downtime_max: point.downtime_max,
            is_stream,
            quiesces: service.quiesces(),
            least: service.consistency,
            reasons,
        })
    }

    /// What this point reaches; `hooks`: whether hooks hold the writers.
    pub fn consistency(&self, hooks: bool) -> Consistency {
        self.reaches(hooks, self.hold, false)
    }

    /// The same, knowing whether a container had to be killed instead of ending by itself.
    pub(super) fn reached(&self, killed: bool) -> Consistency {
        self.reaches(self.quiesces, self.hold, killed)
    }

    fn reaches(&self, hooks: bool, hold: Option<Hold>, killed: bool) -> Consistency {
        let ended_well = hold == Some(Hold::Stop) && !killed;
        match &self.taker {
            _ if self.is_stream => Consistency::Application,
            // Nobody writes, and the applications have or have not closed their files.
            Taker::Live if ended_well => Consistency::Application,
            Taker::Live if hold == Some(Hold::Stop) => Consistency::Crash,
            Taker::Live => Consistency::None,
            _ if hooks || ended_well => Consistency::Application,
            _ if hold.is_some() => Consistency::Filesystem,
            taker if taker.is_one_moment() => Consistency::Filesystem,
            _ => Consistency::None,
        }
    }

    /// Whether containers stay stopped until everything was read, so that the thaw follows the archive.
    pub fn spans_archive(&self) -> bool {
        self.is_live() && self.hold.is_some()
    }

    /// What the archiver sees where.
    pub fn binds(&self) -> &[Bind] {
        &self.binds
    }

    /// Whether the archiver reads the tree itself, and not a copy or a snapshot of it.
    pub fn is_live(&self) -> bool {
        self.taker == Taker::Live
    }

    /// How long containers may be held.
    pub(super) fn window(&self) -> Duration {
        if self.hold == Some(Hold::Stop) { self.downtime_max } else { self.window }
    }

    /// How long it may take until everything is ready to be held and frozen.
    pub(super) fn armed_within(&self) -> Duration {
        if self.mounts.is_empty() && self.containers.running.is_empty() { self.held_within() } else { ARM_MAX }
    }

    /// How long hooks may hold the service from then on, until the point is taken; with containers that are
    /// stopped for the archive, until that is over.
    pub(super) fn held_within(&self) -> Duration {
        match self.taker {
            Taker::Reflink(_) => self.window().max(self.downtime_max),
            _ if self.hold.is_some() => self.window() + containers::ASKED_WITHIN,
            // The guard of the filesystem has the first word: it knows more.
            Taker::Own(_) => self.window() + FIRST_WORD,
            _ => self.window(),
        }
    }

    /// How long it may take to thaw and to let everything go.
    pub fn let_go_within(&self) -> Duration {
        let containers = u32::try_from(self.containers.running.len()).unwrap_or(u32::MAX);
        THAWED_WITHIN + containers::LET_GO * containers
    }

    /// What is left as it is, and why no better consistency can be had here; for people.
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }

    /// What to write down before anything is done.
    pub fn intent(&self) -> Intent {
        Intent { containers: self.containers.clone(), made: self.taker.made() }
    }

    /// The plan for people, a line a step.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let names: Vec<&str> = self.containers.running.iter().map(|c| c.name.as_str()).collect();
        let (holding, letting_go) = match self.hold {
            Some(Hold::Stop) => ("stop", "start"),
            _ => ("pause", "resume"),
        };
        lines.extend(
            names
                .iter()
                .map(|name| format!("{holding} container {name}, for {} s at most", self.window().as_secs_f32())),
        );
        lines.extend(
            self.mounts
                .iter()
                .map(|mount| format!("freeze {}, for {} s at most", mount.display(), self.window.as_secs_f32())),
        );
        lines.extend(self.taker.lines());
        lines.extend(self.mounts.iter().map(|mount| format!("thaw {}", mount.display())));
        if !self.spans_archive() {
            lines.extend(self.letting_go_lines(letting_go));
        }
        lines.extend(self.reasons.iter().cloned());
        lines
    }

    /// What follows the archive when containers are held until then.
    pub fn lines_after_archive(&self) -> Vec<String> {
        if self.spans_archive() { self.letting_go_lines("start") } else { Vec::new() }
    }

    fn letting_go_lines(&self, verb: &str) -> Vec<String> {
        self.containers.running.iter().rev().map(|c| format!("{verb} container {}", c.name)).collect()
    }
}

impl Taker {
    /// One operation of the kernel or of the operator's command, on one filesystem.
    fn is_one_moment(&self) -> bool {
        match self {
            Self::Btrfs(snapshots) => snapshots.len() == 1,
            Self::Lvm(snapshots) => snapshots.len() == 1,
            Self::Zfs(snapshots) => snapshots.len() == 1,
            Self::Own(_) => true,
            Self::Live | Self::Reflink(_) => false,
        }
    }

    fn made(&self) -> Vec<Made> {
        match self {
            Self::Live => Vec::new(),
            Self::Btrfs(snapshots) => snapshots.iter().cloned().map(Made::Btrfs).collect(),
            Self::Lvm(snapshots) => snapshots.iter().cloned().map(Made::Lvm).collect(),
            Self::Zfs(snapshots) => snapshots.iter().cloned().map(Made::Zfs).collect(),
            Self::Reflink(copies) => reflink::places(copies).into_iter().map(Made::Copies).collect(),
            Self::Own(commands) => vec![Made::Own(commands.clone())],
        }
    }

    fn lines(&self) -> Vec<String> {
        match self {
            Self::Live => vec!["no point in time: the source is read as it lives".to_owned()],
            Self::Btrfs(snapshots) => {
                let line =
                    |s: &Snapshot| format!("btrfs snapshot of {} as {}", s.subvolume.display(), s.path.display());
                snapshots.iter().map(line).collect()
            }
            Self::Lvm(snapshots) => {
                let line = |s: &LvmSnapshot| format!("LVM snapshot of {}/{} as {}", s.group, s.volume, s.name);
                snapshots.iter().map(line).collect()
            }
            Self::Zfs(snapshots) => snapshots.iter().map(|s| format!("ZFS snapshot {}", s.name)).collect(),
            Self::Reflink(copies) => copies.iter().map(reflink::Copy::line).collect(),
            Self::Own(commands) => vec![format!("take the point: {}", commands.take.join(" "))],
        }
    }
}

/// The part of a plan that the kind decides.
struct Taken {
    taker: Taker,
    binds: Vec<Bind>,
    mounts: Vec<PathBuf>,
    reasons: Vec<String>,
}

impl Default for Taken {
    fn default() -> Self {
        Self { taker: Taker::Live, binds: Vec::new(), mounts: Vec::new(), reasons: Vec::new() }
    }
}

impl Taken {
    async fn of(
        service: &ServiceSettings,
        run_uid: &str,
        settings: &Settings,
        own: &Protected,
    ) -> Result<Self, PointError> {
        let (source, point) = (&service.source, &service.point);
        let (paths, exclude) = (source.paths.as_slice(), source.exclude.as_slice());
        let with = |(taker, binds)| Self { taker, binds, ..Self::default() };
        Ok(match point.kind {
            PointKind::None => Self::default(),
            PointKind::Auto => match btrfs::plan(paths, exclude, run_uid, settings).await? {
                Ok((snapshots, binds)) => with((Taker::Btrfs(snapshots), binds)),
                Err(elsewhere) => Self { reasons: vec![why_live(&elsewhere)?], ..Self::default() },
            },
            PointKind::Btrfs => match btrfs::plan(paths, exclude, run_uid, settings).await? {
                Ok((snapshots, binds)) => with((Taker::Btrfs(snapshots), binds)),
                Err(path) => {
                    return Err(PointError::Unfit { kind: "btrfs", path, reason: "it is not on btrfs".to_owned() });
                }
            },
            PointKind::Lvm => {
                let (snapshots, binds) = lvm::plan(paths, run_uid, point, settings).await?;
                with((Taker::Lvm(snapshots), binds))
            }
            PointKind::Zfs => {
                let (snapshots, binds) = zfs::plan((paths, exclude), run_uid, settings).await?;
                with((Taker::Zfs(snapshots), binds))
            }
            PointKind::Reflink => {
                let (copies, binds) = reflink::plan(source, run_uid)?;
                with((Taker::Reflink(copies), binds))
            }
            PointKind::Fsfreeze => Self::fsfreeze(service, run_uid, settings, own).await?,
        })
    }

    async fn fsfreeze(
        service: &ServiceSettings,
        run_uid: &str,
        settings: &Settings,
        own: &Protected,
    ) -> Result<Self, PointError> {
        let (paths, point) = (&service.source.paths, &service.point);
        let mounts = Mounts::read()?;
        let mut found = None;
        for path in paths {
            let (mount, _) = view::place_of(path, &mounts)?;
            match &found {
                None => found = Some(mount),
                Some(first) if first.point == mount.point => {}
                Some(first) => {
                    let reason = format!(
                        "another path lies on {}, and one command takes the point of one filesystem: make it a service of its own",
                        first.point.display()
                    );
                    return Err(PointError::Unfit { kind: "fsfreeze", path: path.clone(), reason });
                }
            }
        }
        let Some(mount) = found else { return Ok(Self::default()) };
        // What takes the point, and where it is read, must be reachable while the filesystem is frozen.
        let commands = point.commands().filter_map(|argv| argv.first());
        let own = commands.fold(own.clone(), |own, program| own.and("the point's program", program));
        own.with_the_system(&settings.docker_socket).await.allows(&mount, &mounts)?;
        Ok(Self {
            binds: own::binds(paths, &mount, &point.read_from),
            taker: Taker::Own(Commands::of(point, &mount, &service.name, run_uid)),
            mounts: vec![mount.point],
            reasons: Vec::new(),
        })
    }
}

/// Why the tree is read as it lives.
fn why_live(path: &Path) -> Result<String, PointError> {
    let (mount, _) = view::place_of(path, &Mounts::read()?)?;
    Ok(format!(
        "{} lies on {}, which has no snapshots of its own; [service.point] can name another kind of point",
        path.display(),
        mount.kind
    ))
}

/// Why a service's filesystem may not be frozen; `None`: it may.
///
/// # Errors
/// When its paths cannot be reached.
pub async fn why_not_frozen(
    service: &ServiceSettings,
    settings: &Settings,
    own: &Protected,
) -> Result<Option<String>, PointError> {
    let mounts = Mounts::read()?;
    let own = own.clone().with_the_system(&settings.docker_socket).await;
    for path in &service.source.paths {
        let (mount, _) = view::place_of(path, &mounts)?;
        if let Err(error) = own.allows(&mount, &mounts) {
            return Ok(Some(error.to_string()));
        }
    }
    Ok(None)
}

/// Programs that the agent itself runs for the point of a service, beside the operator's.
pub fn programs(service: &ServiceSettings, settings: &Settings) -> Vec<PathBuf> {
    let all: Vec<&PathBuf> = match service.point.kind {
        // btrfs is needed, and therefore looked at, only where it is there.
        PointKind::Auto => [&settings.btrfs].into_iter().filter(|program| program.exists()).collect(),
        PointKind::Btrfs => vec![&settings.btrfs],
        PointKind::Lvm => {
            let Settings { lvs, lvcreate, lvremove, dmsetup, mount, umount, .. } = settings;
            vec![lvs, lvcreate, lvremove, dmsetup, mount, umount]
        }
        PointKind::Zfs => vec![&settings.zfs, &settings.mount, &settings.umount],
        PointKind::Reflink => vec![&settings.cp],
        PointKind::None | PointKind::Fsfreeze => Vec::new(),
    };
    all.into_iter().cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(taker: Taker, hold: Option<Hold>) -> PointPlan {
        PointPlan {
            taker,
            binds: Vec::new(),
            containers: Containers::default(),
            hold,
            mounts: Vec::new(),
            window: Duration::from_secs(7),
            downtime_max: Duration::from_secs(300),
            is_stream: false,
            quiesces: false,
            least: Consistency::None,
            reasons: Vec::new(),
        }
    }

    fn btrfs(subvolumes: usize) -> Taker {
        let snapshot = |i| Snapshot { subvolume: format!("/v{i}").into(), path: format!("/v{i}/.hestner-u").into() };
        Taker::Btrfs((0..subvolumes).map(snapshot).collect())
    }

    fn own() -> Taker {
        let none = Vec::new;
        Taker::Own(Commands { take: none(), after: none(), remove: none(), environment: Vec::new() })
    }

    /// The table of `docs/operations.md`, from the code: a line for each kind.
    fn table() -> String {
        let kinds = [
            ("none, or `auto` on another filesystem", Taker::Live),
            ("`btrfs`, `lvm`, `zfs`: one snapshot", btrfs(1)),
            ("`btrfs`, `lvm`, `zfs`: several", btrfs(2)),
            ("`fsfreeze`", own()),
            ("`reflink`", Taker::Reflink(Vec::new())),
        ];
        let holds = [(false, None), (true, None), (false, Some(Hold::Pause)), (false, Some(Hold::Stop))];
        let cell = |taker: Taker, (hooks, hold): (bool, Option<Hold>)| {
            let refused = taker == Taker::Live && hold == Some(Hold::Pause);
            if refused { "refused".to_owned() } else { plan(taker, hold).consistency(hooks).to_string() }
        };
        let row = |(name, taker): &(&str, Taker)| {
            let cells: Vec<String> = holds.iter().map(|held| cell(taker.clone(), *held)).collect();
            format!("| {name} | {} |\n", cells.join(" | "))
        };
        kinds.iter().map(row).collect()
    }

    #[test]
    fn table_of_consistencies_in_the_docs_is_what_the_code_does() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains(&table()), "docs/operations.md must hold this table:\n{}", table());
    }

    #[test]
    fn hooks_add_to_whatever_is_held() {
        assert_eq!(plan(btrfs(2), Some(Hold::Pause)).consistency(true), Consistency::Application);
        assert_eq!(plan(Taker::Live, None).consistency(true), Consistency::None, "a live tree is no point in time");
    }

    #[test]
    fn container_that_had_to_be_killed_is_no_clean_end() {
        let stopped = |taker| plan(taker, Some(Hold::Stop));
        assert_eq!(stopped(Taker::Live).reached(true), Consistency::Crash);
        assert_eq!(stopped(btrfs(1)).reached(true), Consistency::Filesystem);
        assert_eq!(stopped(btrfs(1)).reached(false), Consistency::Application);
    }

    #[test]
    fn intent_survives_its_own_file() {
        let view = view::View { what: "/dev/vg/s".into(), kind: "xfs".into(), point: "/points/u-0".into() };
        let lvm = LvmSnapshot {
            group: "vg".into(),
            volume: "data".into(),
            name: "hestner-u-0".into(),
            pool: String::new(),
            size: "2G".into(),
            usage_max: 80,
            dmsetup: "/usr/sbin/dmsetup".into(),
            view,
        };
        for taker in [btrfs(2), own(), Taker::Lvm(vec![lvm])] {
            let intent = plan(taker, None).intent();
            let text = serde_json::to_string(&intent).unwrap();
            assert_eq!(serde_json::from_str::<Intent>(&text).unwrap(), intent);
        }
    }
}
