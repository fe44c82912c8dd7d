//! The operator's own commands around a frozen filesystem: take the point, make it readable, remove it.
//!
//! Each runs under a supervisor of its own, so that nothing of it is left when it has ended, met its time or
//! was called off. They are told of the run by their environment: `HESTNER_RUN_UID`, `HESTNER_SERVICE`,
//! `HESTNER_MOUNT` (what is frozen) and `HESTNER_READ_FROM`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::{Bind, PointError, view};
use crate::hook::{self, Ended, Spec, Waiting};
use crate::platform::command::printable;
use crate::platform::files;
use crate::platform::mounts::Mount;
use crate::policy::PointSettings;

/// How long the commands may take that run when nothing is frozen.
const UNHURRIED: Duration = Duration::from_secs(300);
/// How much of their output is kept.
const OUTPUT_BYTES_MAX: usize = 16 * 1024;

/// The commands of a service, with what they are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commands {
    /// Takes the point.
    pub take: Vec<String>,
    /// Makes it readable.
    pub after: Vec<String>,
    /// Removes it.
    pub remove: Vec<String>,
    /// What they find in their environment.
    pub environment: Vec<(String, String)>,
}

impl Commands {
    pub(super) fn of(point: &PointSettings, mount: &Mount, service: &str, run_uid: &str) -> Self {
        let (mount, read_from) = (mount.point.display().to_string(), point.read_from.display().to_string());
        let told = [("RUN_UID", run_uid), ("SERVICE", service), ("MOUNT", &*mount), ("READ_FROM", &*read_from)];
        Self {
            take: point.command.clone(),
            after: point.after_command.clone(),
            remove: point.remove_command.clone(),
            environment: told.map(|(name, value)| (format!("HESTNER_{name}"), value.to_owned())).to_vec(),
        }
    }

    /// Runs `command`, which takes the point.
    pub(super) async fn take(&self, call: Call<'_>, waiting: Waiting, limit: Duration) -> Result<(), PointError> {
        let spec = self.spec(&self.take, limit);
        judged("command", waiting.run(&spec, call.stop, call.spare).await?)
    }

    /// Runs `after_command`.
    pub(super) async fn after(&self, call: Call<'_>) -> Result<(), PointError> {
        self.run(("after_command", &self.after), call, UNHURRIED).await
    }

    /// Runs `remove_command`.
    pub(super) async fn remove(&self) -> Result<(), PointError> {
        let stop = CancellationToken::new();
        self.run(("remove_command", &self.remove), Call { stop: &stop, alive: None, spare: &[] }, UNHURRIED).await
    }

    async fn run(
        &self,
        (key, argv): (&'static str, &[String]),
        call: Call<'_>,
        limit: Duration,
    ) -> Result<(), PointError> {
        if argv.is_empty() {
            return Ok(());
        }
        let inherit: Vec<&dyn AsFd> = call.alive.iter().map(|fd| *fd as &dyn AsFd).collect();
        judged(key, hook::run(&self.spec(argv, limit), call.stop, &inherit, call.spare).await?)
    }

    fn spec(&self, argv: &[String], limit: Duration) -> Spec {
        Spec {
            argv: argv.to_vec(),
            user: String::new(),
            timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            output_bytes_max: OUTPUT_BYTES_MAX,
            environment: self.environment.clone(),
            stdout_fd: None,
        }
    }
}

fn judged(key: &'static str, ended: Ended) -> Result<(), PointError> {
    if ended.is_success() {
        return Ok(());
    }
    Err(PointError::Own { key, what: ended.description(), output: printable(&ended.output) })
}

/// How a command is run.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    /// Ends it early.
    pub(super) stop: &'a CancellationToken,
    /// Inherited, so that the run is known to live for as long as the command does.
    pub(super) alive: Option<&'a OwnedFd>,
    /// Children of this process that have nothing to do with it.
    pub(super) spare: &'a [Pid],
}

/// What is read in place of what.
pub(super) fn binds(paths: &[PathBuf], mount: &Mount, read_from: &Path) -> Vec<Bind> {
    let inside = |path: &Path| path.strip_prefix(&mount.point).unwrap_or(Path::new("")).to_owned();
    paths.iter().map(|path| Bind { from: view::below(read_from, &inside(path)), to: path.clone() }).collect()
}

/// Whether the copy is there to be read and is not the original itself.
///
/// # Errors
/// When it is not.
pub(super) fn check_readable(binds: &[Bind]) -> Result<(), PointError> {
    use std::os::unix::fs::MetadataExt as _;
    for Bind { from, to } in binds {
        let unreadable = |reason: &str| PointError::Unreadable { path: from.clone(), reason: reason.to_owned() };
        let copy = from.metadata().map_err(files::failed("look at", from))?;
        let original = to.metadata().map_err(files::failed("look at", to))?;
        if (copy.dev(), copy.ino()) == (original.dev(), original.ino()) {
            return Err(unreadable("it is the original itself and no copy of it"));
        }
        if copy.is_dir() != original.is_dir() {
            return Err(unreadable("it is of another kind than the original"));
        }
        // A mount that did not come about leaves its folder empty: green, and nothing in it.
        if copy.is_dir() && is_empty(from)? && !is_empty(to)? {
            return Err(unreadable("it is empty and the original is not; was the copy mounted?"));
        }
    }
    Ok(())
}

fn is_empty(folder: &Path) -> Result<bool, PointError> {
    Ok(std::fs::read_dir(folder).map_err(files::failed("list", folder))?.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_that_is_empty_or_the_original_itself_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["data", "copy", "empty"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        for name in ["data", "copy"] {
            std::fs::File::create(at(name).join("file")).unwrap();
        }
        let check = |from: &str| check_readable(&[Bind { from: at(from), to: at("data") }]);
        check("copy").unwrap();
        assert!(check("data").unwrap_err().to_string().contains("original itself"));
        assert!(check("empty").unwrap_err().to_string().contains("empty"));
        assert!(check("copy/file").unwrap_err().to_string().contains("another kind"));
        assert!(check("missing").is_err());
    }

    #[test]
    fn copy_stands_for_the_mount_point() {
        let mount = crate::platform::mounts::Mounts::read().unwrap().holding(Path::new("/")).unwrap().clone();
        let mount = Mount { point: "/srv".into(), ..mount };
        let binds = binds(&["/srv/a/b".into(), "/srv".into()], &mount, Path::new("/mnt/copy"));
        let from: Vec<_> = binds.iter().map(|bind| bind.from.to_str().unwrap()).collect();
        assert_eq!(from, ["/mnt/copy/a/b", "/mnt/copy"]);
    }
}
