//! The point in time: what kind a source can have, how it is taken, and how it is removed again.
//!
//! Two kinds so far: none (a live tree), and btrfs read-only snapshots, which are atomic by themselves and
//! need no FIFREEZE. What is made here is written down by the caller *before* it is made, so that a restart
//! removes it by that note and never by guessing names.
//!
//! [`Frozen`] means that the service is quiesced; only a value of it can take the point.

use std::path::{Path, PathBuf};

use hestner_proto::words::Consistency;
use serde::{Deserialize, Serialize};
use toml_example::TomlExample;

use crate::platform::command::{CommandError, Limits, Program};
use crate::platform::files::{self, FileError};
use crate::platform::mounts::{self, Mounts};

/// How long one snapshot command may take.
const COMMAND_SECONDS: u64 = 30;

/// Settings of the point in time.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The btrfs program.
    #[toml_example(default = "/usr/bin/btrfs")]
    pub btrfs: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self { btrfs: "/usr/bin/btrfs".into() }
    }
}

/// A point that could not be planned, taken or removed.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// The source's paths cannot be looked at.
    #[error(transparent)]
    File(#[from] FileError),
    /// A snapshot command could not be run.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A snapshot command failed.
    #[error("btrfs could not {operation} {path}: {complaint}")]
    Btrfs {
        /// What was tried.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// What it said.
        complaint: String,
    },
    /// Data lies in a subvolume below, which a snapshot of the one above shows as an empty folder.
    #[error(
        "{nested} is a btrfs subvolume of its own, which a snapshot of {subvolume} does not cover: list it under `paths` by itself or exclude it"
    )]
    Nested {
        /// The subvolume below.
        nested: PathBuf,
        /// The one that would be snapshotted.
        subvolume: PathBuf,
    },
    /// A snapshot's subvolume is not where it was, so that nobody can say whether the snapshot is gone.
    #[error("{0} is not mounted now; what was made in it is removed when it is")]
    Away(PathBuf),
}

/// How the point will be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PointPlan {
    /// None: the tree is read as it lives.
    Live,
    /// A read-only snapshot of each subvolume that holds a path.
    Btrfs {
        /// What will be snapshotted.
        snapshots: Vec<Snapshot>,
        /// What the archiver will see where: snapshot's folder, original path.
        binds: Vec<Bind>,
    },
}

/// A btrfs snapshot, made or to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Of which subvolume.
    pub subvolume: PathBuf,
    /// Where it lies.
    pub path: PathBuf,
}

/// A folder that stands in for another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// The folder of the snapshot.
    pub from: PathBuf,
    /// The original path.
    pub to: PathBuf,
}

impl PointPlan {
    /// Plans the point of a source of files.
    ///
    /// # Errors
    /// When the paths cannot be reached, or a snapshot would leave something out.
    pub async fn of(
        paths: &[PathBuf],
        exclude: &[String],
        run_uid: &str,
        settings: &Settings,
    ) -> Result<Self, PointError> {
        let mounts = Mounts::read()?;
        let mut snapshots: Vec<Snapshot> = Vec::new();
        let mut binds = Vec::new();
        for path in paths {
            let Some(subvolume) = mounts::subvolume_of(path, &mounts)? else { return Ok(Self::Live) };
            let snapshot = subvolume.join(format!(".hestner-{run_uid}"));
            let real = path.canonicalize().map_err(files::failed("find", path))?;
            let inside = real.strip_prefix(&subvolume).unwrap_or(Path::new(""));
            binds.push(Bind { from: snapshot.join(inside), to: path.clone() });
            if !snapshots.iter().any(|s| s.subvolume == subvolume) {
                snapshots.push(Snapshot { subvolume, path: snapshot });
            }
        }
        for Snapshot { subvolume, .. } in &snapshots {
            refuse_nested(subvolume, paths, exclude, settings).await?;
        }
        Ok(Self::Btrfs { snapshots, binds })
    }

    /// What this point reaches. Several subvolumes are not one moment unless hooks hold the writers.
    pub fn consistency(&self, hooks: bool) -> Consistency {
        match self {
            Self::Live => Consistency::None,
            Self::Btrfs { .. } if hooks => Consistency::Application,
            Self::Btrfs { snapshots, .. } if snapshots.len() > 1 => Consistency::None,
            Self::Btrfs { .. } => Consistency::Filesystem,
        }
    }
}

async fn refuse_nested(
    subvolume: &Path,
    paths: &[PathBuf],
    exclude: &[String],
    settings: &Settings,
) -> Result<(), PointError> {
    let output = btrfs(settings)
        .args(["subvolume", "list", "-o", "--"])
        .arg(subvolume)
        .run(b"", Limits::seconds(COMMAND_SECONDS))
        .await?;
    if !output.status.success() {
        return Err(PointError::Btrfs {
            operation: "list the subvolumes of",
            path: subvolume.to_owned(),
            complaint: output.complaint(),
        });
    }
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        // "ID 257 gen 9 top level 256 path a/b": the path counts from the top of the filesystem, which
        // may be mounted elsewhere or not at all. Its tail below our subvolume is what matters.
        let Some((_, from_top)) = line.split_once(" path ") else { continue };
        let Some(nested) = below(subvolume, Path::new(from_top)) else { continue };
        let own = nested.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".hestner-"));
        let read = paths.iter().any(|path| nested.starts_with(path) && nested != *path);
        let excluded = exclude.iter().any(|pattern| nested == Path::new(pattern));
        if read && !own && !excluded {
            return Err(PointError::Nested { nested, subvolume: subvolume.to_owned() });
        }
    }
    Ok(())
}

/// Finds a subvolume, given by its path from the filesystem's top, below `subvolume`: the longest tail of
/// the path that leads to a folder there.
fn below(subvolume: &Path, from_top: &Path) -> Option<PathBuf> {
    let parts: Vec<_> = from_top.components().collect();
    (0..parts.len()).map(|skip| subvolume.join(parts[skip..].iter().collect::<PathBuf>())).find(|path| path.is_dir())
}

fn btrfs(settings: &Settings) -> Program {
    Program::new(&settings.btrfs)
}

/// A service that is quiesced: its `pre_freeze` hooks have all ended well.
#[derive(Debug)]
pub struct Frozen(());

/// A point in time that was taken.
#[derive(Debug)]
pub struct Point(Vec<Snapshot>);

/// The service is quiesced. Called when the last `pre_freeze` has ended well, and nowhere else.
pub fn freeze() -> Frozen {
    Frozen(())
}

impl Frozen {
    /// Takes the point.
    ///
    /// # Errors
    /// When a snapshot cannot be made; those made before are removed by the caller's note of the plan.
    pub async fn take(self, plan: &PointPlan, settings: &Settings) -> Result<Point, PointError> {
        let PointPlan::Btrfs { snapshots, .. } = plan else { return Ok(Point(Vec::new())) };
        for Snapshot { subvolume, path } in snapshots {
            let program = btrfs(settings).args(["subvolume", "snapshot", "-r", "--"]).arg(subvolume).arg(path);
            let output = program.run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
            if !output.status.success() {
                return Err(PointError::Btrfs {
                    operation: "snapshot",
                    path: subvolume.clone(),
                    complaint: output.complaint(),
                });
            }
        }
        Ok(Point(snapshots.clone()))
    }
}

impl Point {
    /// Removes what was made for it.
    ///
    /// # Errors
    /// When a snapshot cannot be removed; it stays in the caller's note and is tried again at the next start.
    pub async fn remove(self, settings: &Settings) -> Result<(), PointError> {
        remove_snapshots(&self.0, settings).await
    }
}

/// Removes snapshots by a note of them; one that is not there is fine.
///
/// # Errors
/// When one is there and cannot be removed, or its subvolume is not there to look into.
pub async fn remove_snapshots(snapshots: &[Snapshot], settings: &Settings) -> Result<(), PointError> {
    for Snapshot { subvolume, path } in snapshots {
        match path.symlink_metadata() {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && mounts::is_subvolume(subvolume) => continue,
            Err(_) => return Err(PointError::Away(subvolume.clone())),
        }
        let program = btrfs(settings).args(["subvolume", "delete", "--commit-after", "--"]).arg(path);
        let output = program.run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
        if !output.status.success() {
            return Err(PointError::Btrfs { operation: "remove", path: path.clone(), complaint: output.complaint() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(subvolumes: usize) -> PointPlan {
        let snapshot = |i| Snapshot { subvolume: format!("/v{i}").into(), path: format!("/v{i}/.hestner-u").into() };
        let bind = |i| Bind { from: format!("/v{i}/.hestner-u/data").into(), to: format!("/v{i}/data").into() };
        PointPlan::Btrfs {
            snapshots: (0..subvolumes).map(snapshot).collect(),
            binds: (0..subvolumes).map(bind).collect(),
        }
    }

    #[test]
    fn live_tree_is_never_called_consistent() {
        assert_eq!(PointPlan::Live.consistency(true), Consistency::None);
    }

    #[test]
    fn several_subvolumes_are_one_moment_only_while_hooks_hold_the_writers() {
        assert_eq!(plan(1).consistency(false), Consistency::Filesystem);
        assert_eq!(plan(2).consistency(false), Consistency::None);
        assert_eq!(plan(2).consistency(true), Consistency::Application);
    }
}
