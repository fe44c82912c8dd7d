//! What must never be frozen, and why: whatever has to go on, or to be started, while a filesystem is.
//!
//! Compared are superblocks, and what lies beneath them: freezing the filesystem that holds the file behind
//! a loop device stops the filesystem inside as well.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::PointError;
use super::containers::Link;
use crate::platform::mounts::{Device, Mount, Mounts};

/// Filesystems whose freeze is tried and known.
pub(super) const FREEZABLE: &[&str] = &["ext4", "xfs", "btrfs"];
/// How long Docker may take to say where its data lies, in seconds.
const DOCKER_SECONDS: u64 = 10;

/// Of every host: what the system writes to by itself.
const OF_THE_SYSTEM: &[(&str, &str)] = &[
    ("the root filesystem", "/"),
    ("the system's runtime files", "/run"),
    ("temporary files", "/tmp"),
    ("temporary files", "/var/tmp"),
    ("the system's log", "/var/log"),
    ("the journal", "/run/log/journal"),
];
/// Where Docker and its containers write, wherever they are installed in the usual way.
const OF_DOCKER: &[&str] = &["/var/lib/docker", "/var/lib/containerd"];

/// Paths that must never be frozen, each with what it is.
#[derive(Clone, Debug, Default)]
pub struct Protected(Vec<(String, PathBuf)>);

impl Protected {
    /// Adds a path; `what` is how it is called in a refusal, such as `the agent's state`.
    #[must_use]
    pub fn and(mut self, what: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        self.0.push((what.into(), path.into()));
        self
    }

    /// Adds what the system, our own process and Docker write to.
    pub(super) async fn with_the_system(mut self, docker_socket: &Path) -> Self {
        // The caller's own words come first: they say more than "the root filesystem".
        self.0.extend(own_logs());
        if docker_socket.exists() {
            let link = Link::open(docker_socket, DOCKER_SECONDS).await.ok();
            if let Some(root) = match &link {
                Some(link) => link.data_root().await,
                None => None,
            } {
                self = self.and("Docker's data", root);
            }
        }
        let docker = OF_DOCKER.iter().filter(|path| Path::new(path).exists());
        let mut all = docker.fold(self, |all, path| all.and("Docker's data", path));
        all.0.extend(OF_THE_SYSTEM.iter().map(|(what, path)| ((*what).to_owned(), PathBuf::from(path))));
        all
    }

    /// Whether a filesystem may be frozen.
    ///
    /// # Errors
    /// What lies there, or that its kind cannot be frozen.
    pub(super) fn allows(&self, mount: &Mount, mounts: &Mounts) -> Result<(), PointError> {
        if !FREEZABLE.contains(&mount.kind.as_str()) {
            return Err(PointError::Unfit {
                kind: "fsfreeze",
                path: mount.point.clone(),
                reason: format!("{} cannot be frozen; {} can", mount.kind, FREEZABLE.join(", ")),
            });
        }
        match self.first_on(mount.device, |path| mounts.beneath(path)) {
            None => Ok(()),
            Some((what, path)) => {
                Err(PointError::Protected { mount: mount.point.clone(), what: what.clone(), path: path.clone() })
            }
        }
    }

    fn first_on(&self, frozen: Device, beneath: impl Fn(&Path) -> BTreeSet<Device>) -> Option<&(String, PathBuf)> {
        self.0.iter().find(|(_, path)| beneath(path).contains(&frozen))
    }
}

/// Files that our standard output and errors go to.
fn own_logs() -> Vec<(String, PathBuf)> {
    let targets = ["/proc/self/fd/1", "/proc/self/fd/2"].into_iter().filter_map(|fd| std::fs::read_link(fd).ok());
    let files = targets.filter(|target| target.is_absolute() && target.is_file());
    files.map(|file| ("the agent's log".to_owned(), file)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusal_names_the_first_thing_that_lies_there() {
        let device = |minor| Device { major: 7, minor };
        let own = Protected::default().and("the agent's state", "/state").and("the grants", "/etc/grants");
        let beneath = |path: &Path| {
            // The state lies in a file on 7:1, which lies on 7:0.
            if path == Path::new("/state") {
                BTreeSet::from([device(0), device(1)])
            } else {
                BTreeSet::from([device(2)])
            }
        };
        assert_eq!(own.first_on(device(0), beneath).map(|(what, _)| what.as_str()), Some("the agent's state"));
        assert_eq!(own.first_on(device(2), beneath).map(|(what, _)| what.as_str()), Some("the grants"));
        assert!(own.first_on(device(3), beneath).is_none());
    }

    #[tokio::test]
    async fn root_filesystem_is_never_frozen() {
        let mounts = Mounts::read().unwrap();
        let root = Mount { kind: "ext4".to_owned(), ..mounts.holding(Path::new("/")).unwrap().clone() };
        let error = Protected::default().with_the_system(Path::new("")).await.allows(&root, &mounts).unwrap_err();
        assert!(matches!(error, PointError::Protected { .. }), "{error}");
        let tmpfs = Mount { kind: "tmpfs".to_owned(), ..root };
        let error = Protected::default().allows(&tmpfs, &mounts).unwrap_err();
        assert!(error.to_string().contains("ext4, xfs, btrfs can"), "{error}");
    }
}
