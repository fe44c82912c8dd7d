//! A snapshot mounted read-only to be read, in a folder of the agent's own, and where a path lies in it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{PointError, Settings};
use crate::platform::command::{Limits, Program};
use crate::platform::files;
use crate::platform::mounts::{Mount, Mounts};

/// How long mounting may take: a journal is replayed.
const COMMAND_SECONDS: u64 = 120;

/// A mount, made or to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// What is mounted: a device, a dataset's snapshot.
    pub what: String,
    /// The filesystem's type.
    pub kind: String,
    /// Where.
    pub point: PathBuf,
}

impl View {
    /// Mounts it.
    pub(super) async fn open(&self, settings: &Settings) -> Result<(), PointError> {
        files::private_folder(&self.point)?;
        let options = match self.kind.as_str() {
            // It has the id of the filesystem that it is a snapshot of, and that is mounted too.
            "xfs" => "ro,nosuid,nodev,noexec,nouuid",
            _ => "ro,nosuid,nodev,noexec",
        };
        let program = Program::new(&settings.mount).args(["-t", &self.kind, "-o", options, "--", &self.what]);
        run("mount", "mount", &self.what, program.arg(&self.point)).await
    }

    /// Unmounts it and removes its folder; what is not there is fine.
    pub(super) async fn close(&self, settings: &Settings) -> Result<(), PointError> {
        while Mounts::read()?.iter().any(|mount| mount.point == self.point) {
            let program = Program::new(&settings.umount).arg("--").arg(&self.point);
            run("umount", "unmount", &self.point.display().to_string(), program).await?;
        }
        // Never with what is in it: if it is not empty, something is still there.
        match std::fs::remove_dir(&self.point) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(files::failed("remove", &self.point)(error).into())
            }
            _ => Ok(()),
        }
    }
}

async fn run(program: &'static str, operation: &'static str, object: &str, command: Program) -> Result<(), PointError> {
    let output = command.env("LC_ALL", "C").run(b"", Limits::seconds(COMMAND_SECONDS)).await?;
    if output.status.success() {
        return Ok(());
    }
    Err(PointError::Refused { program, operation, object: object.to_owned(), complaint: output.complaint() })
}

/// The mount that holds a path, and the path's place below the mount point.
pub(super) fn place_of(path: &Path, mounts: &Mounts) -> Result<(Mount, PathBuf), PointError> {
    let real = path.canonicalize().map_err(files::failed("find", path))?;
    let missing = || files::failed("find the mount of", path)(std::io::ErrorKind::NotFound.into());
    let mount = mounts.holding(&real).ok_or_else(missing)?;
    let inside = real.strip_prefix(&mount.point).unwrap_or(Path::new("")).to_owned();
    Ok((mount.clone(), inside))
}

/// `folder/inside`, without a slash at the end when nothing follows.
pub(super) fn below(folder: &Path, inside: &Path) -> PathBuf {
    if inside.as_os_str().is_empty() { folder.to_owned() } else { folder.join(inside) }
}
