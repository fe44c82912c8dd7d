//! A copy that shares its blocks with the original (xfs, btrfs): `cp -a --reflink=always`, in a folder of
//! the same filesystem. File after file, so it is one moment only while nobody writes.
//!
//! In: paths. Out: copies in `.hestner-<run id>` beside each path, or inside where the path is the root of
//! its filesystem. It would hang on a frozen filesystem, so nothing is frozen around it.

use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Bind, PointError, Settings, view};
use crate::platform::command::{Limits, Program};
use crate::platform::files;
use crate::platform::mounts::Mounts;
use crate::policy::SourceSettings;

/// Filesystems that can share blocks.
const SHARING: &[&str] = &["xfs", "btrfs"];
/// Entries in one command line.
const ENTRIES_A_COMMAND: usize = 500;
/// Folders of ours begin so.
pub(super) const OWN_PREFIX: &str = ".hestner-";

/// A folder of copies, made or to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// `.hestner-<run id>`, on the filesystem of the original.
    pub folder: PathBuf,
    /// The mount point of that filesystem.
    pub mount: PathBuf,
}

/// One path to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    from: PathBuf,
    to: PathBuf,
    place: Place,
    /// The copy lies inside the original, and must not be copied itself.
    is_inside: bool,
    one_file_system: bool,
}

/// Plans a copy of each path.
pub(super) fn plan(source: &SourceSettings, run_uid: &str) -> Result<(Vec<Copy>, Vec<Bind>), PointError> {
    let mounts = Mounts::read()?;
    let mut copies = Vec::new();
    for (i, path) in source.paths.iter().enumerate() {
        let unfit = |reason: String| PointError::Unfit { kind: "reflink", path: path.clone(), reason };
        let (mount, inside) = view::place_of(path, &mounts)?;
        if !SHARING.contains(&mount.kind.as_str()) {
            return Err(unfit(format!("{} cannot share blocks; {} can", mount.kind, SHARING.join(", "))));
        }
        if let Some(below) = mounts.below(path).find(|_| !source.one_file_system) {
            return Err(unfit(format!(
                "{} is mounted below it, where no block can be shared: set `one_file_system`",
                below.point.display()
            )));
        }
        let is_inside = inside.as_os_str().is_empty();
        let beside = if is_inside { Some(path.as_path()) } else { path.parent() };
        let beside = beside.ok_or_else(|| unfit("it has no folder above it".to_owned()))?;
        let place = Place { folder: beside.join(format!("{OWN_PREFIX}{run_uid}")), mount: mount.point };
        copies.push(Copy {
            from: path.clone(),
            to: place.folder.join(i.to_string()),
            place,
            is_inside,
            one_file_system: source.one_file_system,
        });
    }
    let binds = copies.iter().map(|copy| Bind { from: copy.to.clone(), to: copy.from.clone() }).collect();
    Ok((copies, binds))
}

/// The folders that the copies will lie in, each once.
pub(super) fn places(copies: &[Copy]) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    for copy in copies {
        if !places.contains(&copy.place) {
            places.push(copy.place.clone());
        }
    }
    places
}

impl Copy {
    /// For people.
    pub(super) fn line(&self) -> String {
        format!("copy {} as {}, sharing its blocks", self.from.display(), self.to.display())
    }

    /// Copies it.
    pub(super) async fn take(&self, settings: &Settings, limit: Duration) -> Result<(), PointError> {
        files::private_folder(&self.place.folder)?;
        if !self.is_inside {
            let program = self.program(settings).args(["-T", "--"]).arg(&self.from).arg(&self.to);
            return self.run(program, limit).await;
        }
        std::fs::create_dir(&self.to).map_err(files::failed("make", &self.to))?;
        for entries in self.entries()?.chunks(ENTRIES_A_COMMAND) {
            let program = self.program(settings).arg("-t").arg(&self.to).arg("--");
            self.run(program.args(entries.iter().cloned()), limit).await?;
        }
        self.copy_attributes()
    }

    fn program(&self, settings: &Settings) -> Program {
        let program = Program::new(&settings.cp).args(["-a", "--reflink=always"]).env("LC_ALL", "C");
        if self.one_file_system { program.arg("-x") } else { program }
    }

    /// What is directly in it, but our own folders.
    fn entries(&self) -> Result<Vec<OsString>, PointError> {
        let failed = || files::failed("list", &self.from);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.from).map_err(failed())? {
            let entry = entry.map_err(failed())?;
            if !entry.file_name().to_string_lossy().starts_with(OWN_PREFIX) {
                found.push(entry.path().into_os_string());
            }
        }
        Ok(found)
    }

    /// Owner, mode and time of the folder itself, which `cp` was not given.
    fn copy_attributes(&self) -> Result<(), PointError> {
        let failed = || files::failed("copy the attributes of", &self.from);
        let of = self.from.metadata().map_err(failed())?;
        std::os::unix::fs::chown(&self.to, Some(of.uid()), Some(of.gid())).map_err(failed())?;
        let mode = std::fs::Permissions::from_mode(of.mode() & 0o7777);
        std::fs::set_permissions(&self.to, mode).map_err(failed())?;
        let times = std::fs::FileTimes::new()
            .set_accessed(of.accessed().map_err(failed())?)
            .set_modified(of.modified().map_err(failed())?);
        std::fs::File::open(&self.to).and_then(|folder| folder.set_times(times)).map_err(failed())?;
        Ok(())
    }

    async fn run(&self, program: Program, limit: Duration) -> Result<(), PointError> {
        let output = program.run(b"", Limits { timeout: limit, output_bytes_max: 1024 * 1024 }).await?;
        if output.status.success() || is_only_vanished(&output.stderr) {
            return Ok(());
        }
        Err(PointError::Refused {
            program: "cp",
            operation: "copy",
            object: self.from.display().to_string(),
            complaint: output.complaint(),
        })
    }
}

/// Whether all complaints are about entries that were gone when it was their turn, as on any live tree.
fn is_only_vanished(stderr: &[u8]) -> bool {
    let text = String::from_utf8_lossy(stderr);
    let vanished = |line: &str| {
        let looked = line.contains(": cannot stat '") || line.contains(": cannot open '");
        looked && line.ends_with(": No such file or directory")
    };
    !text.trim().is_empty() && text.lines().all(vanished)
}

impl Place {
    /// Removes it with all in it; one that is not there is fine.
    pub(super) fn remove(&self) -> Result<(), PointError> {
        if self.folder.symlink_metadata().is_err() {
            let is_mounted = Mounts::read()?.iter().any(|mount| mount.point == self.mount);
            return if is_mounted { Ok(()) } else { Err(PointError::Away(self.mount.clone())) };
        }
        Ok(files::remove(&self.folder)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_forgives_what_vanished_and_nothing_else() {
        let gone = b"cp: cannot stat '/x/a': No such file or directory\n";
        assert!(is_only_vanished(gone));
        assert!(!is_only_vanished(b""));
        assert!(!is_only_vanished(b"cp: failed to clone '/y' from '/x': Operation not supported\n"));
        let both = [gone.as_slice(), b"cp: error reading '/x/b': Input/output error\n"].concat();
        assert!(!is_only_vanished(&both));
    }
}
