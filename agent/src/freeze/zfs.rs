//! ZFS snapshots: atomic by themselves; nothing else may be frozen around them.
//!
//! In: datasets that hold the source. Out: snapshots `<dataset>@hestner-<run id>`, mounted read-only for the
//! archive. A dataset mounted below the source is named instead of left out.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::view::{self, View};
use super::{Bind, PointError, Settings};
use crate::platform::command::{Limits, Program};
use crate::platform::mounts::Mounts;

/// How long one command may take.
const COMMAND_SECONDS: u64 = 60;

/// A snapshot, made or to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZfsSnapshot {
    /// The dataset.
    pub dataset: String,
    /// `<dataset>@hestner-<run id>`.
    pub name: String,
    /// Where it is mounted to be read.
    pub view: View,
}

/// Plans a snapshot of each dataset that holds a path.
pub(super) async fn plan(
    (paths, exclude): (&[PathBuf], &[String]),
    run_uid: &str,
    settings: &Settings,
) -> Result<(Vec<ZfsSnapshot>, Vec<Bind>), PointError> {
    let mounts = Mounts::read()?;
    let datasets = list(settings).await?;
    let mut snapshots: Vec<ZfsSnapshot> = Vec::new();
    let mut binds = Vec::new();
    for path in paths {
        let (mount, inside) = view::place_of(path, &mounts)?;
        let Some(dataset) = datasets.iter().find(|dataset| dataset.name == mount.source) else {
            let reason = format!("{} ({}) is not a ZFS dataset", mount.point.display(), mount.source);
            return Err(PointError::Unfit { kind: "zfs", path: path.clone(), reason });
        };
        refuse_nested(dataset, &datasets, &mounts, path, exclude)?;
        let name = format!("{}@hestner-{run_uid}", dataset.name);
        let point = match snapshots.iter().find(|snapshot| snapshot.name == name) {
            Some(known) => known.view.point.clone(),
            None => {
                let point = settings.points.join(format!("{run_uid}-{}", snapshots.len()));
                let view = View { what: name.clone(), kind: "zfs".to_owned(), point: point.clone() };
                snapshots.push(ZfsSnapshot { dataset: dataset.name.clone(), name, view });
                point
            }
        };
        binds.push(Bind { from: view::below(&point, &inside), to: path.clone() });
    }
    Ok((snapshots, binds))
}

/// A dataset below has a snapshot of its own or none; the one above shows an empty folder in its place.
fn refuse_nested(
    above: &Dataset,
    datasets: &[Dataset],
    mounts: &Mounts,
    path: &Path,
    exclude: &[String],
) -> Result<(), PointError> {
    let nested = mounts.below(path).find(|mount| {
        let excluded = exclude.iter().any(|pattern| mount.point.starts_with(pattern));
        !excluded && mount.source != above.name && datasets.iter().any(|dataset| dataset.name == mount.source)
    });
    match nested {
        None => Ok(()),
        Some(mount) => Err(PointError::Nested {
            nested: mount.point.clone(),
            what: "a ZFS dataset",
            above: PathBuf::from(&above.name),
        }),
    }
}

impl ZfsSnapshot {
    /// Makes it.
    pub(super) async fn take(&self, settings: &Settings) -> Result<(), PointError> {
        run("snapshot", &self.dataset, Program::new(&settings.zfs).args(["snapshot", &self.name])).await.map(drop)
    }

    /// Unmounts and destroys it; what is not there is fine.
    pub(super) async fn remove(&self, settings: &Settings) -> Result<(), PointError> {
        self.view.close(settings).await?;
        // A dataset that was destroyed took its snapshots along; a pool that is away has them still.
        let pool = self.dataset.split('/').next().unwrap_or_default();
        let pools = Program::new(&settings.zfs).args(["list", "-Hp", "-t", "filesystem", "-o", "name", "-d", "0"]);
        let pools = run("list", "the pools", pools).await?;
        if !String::from_utf8_lossy(&pools).lines().any(|line| line == pool) {
            return Err(PointError::Away(pool.into()));
        }
        let program = Program::new(&settings.zfs).args(["list", "-Hp", "-t", "snapshot", "-o", "name"]);
        let held = run("list the snapshots of", &self.dataset, program).await?;
        if !String::from_utf8_lossy(&held).lines().any(|line| line == self.name) {
            return Ok(());
        }
        // The `@` in the name keeps this from ever meaning a dataset.
        run("destroy", &self.name, Program::new(&settings.zfs).args(["destroy", &self.name])).await.map(drop)
    }
}

/// One line of `zfs list`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Dataset {
    name: String,
}

async fn list(settings: &Settings) -> Result<Vec<Dataset>, PointError> {
    let program =
        Program::new(&settings.zfs).args(["list", "-Hp", "-t", "filesystem", "-o", "name,mountpoint,mounted"]);
    Ok(parse(&run("list", "the datasets", program).await?))
}

/// Tabs between fields (`-H`), exact values (`-p`).
fn parse(text: &[u8]) -> Vec<Dataset> {
    let text = String::from_utf8_lossy(text);
    let mounted = |line: &str| {
        let mut fields = line.split('\t');
        let name = fields.next()?.to_owned();
        (fields.nth(1)? == "yes").then_some(Dataset { name })
    };
    text.lines().filter_map(mounted).collect()
}

async fn run(operation: &'static str, object: &str, command: Program) -> Result<Vec<u8>, PointError> {
    let output = command.env("LC_ALL", "C").run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(PointError::Refused { program: "zfs", operation, object: object.to_owned(), complaint: output.complaint() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_answer_of_zfs_is_understood() {
        let text = b"tank\t/tank\tyes\ntank/data\t/srv/data\tyes\ntank/old\tlegacy\tno\ntank/with space\tlegacy\tyes\n";
        let names: Vec<String> = parse(text).into_iter().map(|dataset| dataset.name).collect();
        assert_eq!(names, ["tank", "tank/data", "tank/with space"]);
        assert!(parse(b"no datasets available").is_empty());
    }
}
