//! Read-only snapshots of btrfs subvolumes: atomic by themselves, and never taken on a frozen filesystem,
//! where they would hang.
//!
//! In: subvolumes. Out: snapshots beside the data, `.hestner-<run id>`, removed by the run's note of them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Bind, PointError, Settings};
use crate::platform::command::{Limits, Program};
use crate::platform::files;
use crate::platform::mounts::{self, Mounts};

/// How long one command may take.
const COMMAND_SECONDS: u64 = 30;

/// A btrfs snapshot, made or to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Of which subvolume.
    pub subvolume: PathBuf,
    /// Where it lies.
    pub path: PathBuf,
}

/// What a plan needs: snapshots, and what is read in place of what.
type Planned = (Vec<Snapshot>, Vec<Bind>);

/// Plans a snapshot of each subvolume that holds a path; the inner error is the first that is not on btrfs.
pub(super) async fn plan(
    paths: &[PathBuf],
    exclude: &[String],
    run_uid: &str,
    settings: &Settings,
) -> Result<Result<Planned, PathBuf>, PointError> {
    let mounts = Mounts::read()?;
    let mut snapshots: Vec<Snapshot> = Vec::new();
    let mut binds = Vec::new();
    for path in paths {
        let Some(subvolume) = mounts::subvolume_of(path, &mounts)? else { return Ok(Err(path.clone())) };
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
    Ok(Ok((snapshots, binds)))
}

async fn refuse_nested(
    subvolume: &Path,
    paths: &[PathBuf],
    exclude: &[String],
    settings: &Settings,
) -> Result<(), PointError> {
    let program = btrfs(settings).args(["subvolume", "list", "-o", "--"]).arg(subvolume);
    let output = program.run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
    if !output.status.success() {
        return Err(refused("list the subvolumes of", subvolume, output.complaint()));
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
            let above = subvolume.to_owned();
            return Err(PointError::Nested { nested, what: "a btrfs subvolume", above });
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

/// Takes them, one after the other.
pub(super) async fn take(snapshots: &[Snapshot], settings: &Settings) -> Result<(), PointError> {
    for Snapshot { subvolume, path } in snapshots {
        let program = btrfs(settings).args(["subvolume", "snapshot", "-r", "--"]).arg(subvolume).arg(path);
        let output = program.run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
        if !output.status.success() {
            return Err(refused("snapshot", subvolume, output.complaint()));
        }
    }
    Ok(())
}

/// Removes one by the note of it; one that is not there is fine.
pub(super) async fn remove(Snapshot { subvolume, path }: &Snapshot, settings: &Settings) -> Result<(), PointError> {
    match path.symlink_metadata() {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && mounts::is_subvolume(subvolume) => return Ok(()),
        Err(_) => return Err(PointError::Away(subvolume.clone())),
    }
    let program = btrfs(settings).args(["subvolume", "delete", "--commit-after", "--"]).arg(path);
    let output = program.run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
    if !output.status.success() {
        return Err(refused("remove", path, output.complaint()));
    }
    Ok(())
}

fn refused(operation: &'static str, path: &Path, complaint: String) -> PointError {
    PointError::Refused { program: "btrfs", operation, object: path.display().to_string(), complaint }
}

fn btrfs(settings: &Settings) -> Program {
    Program::new(&settings.btrfs)
}
