//! Whoever is measured: Hestner on its real way, stock restic, borg. Each with a repository of its own a round.
//!
//! All three compress with zstd in the class of its level 3 (Hestner's own level, restic's `auto`, borg's `zstd,3`),
//! and encrypt. `first` makes the repository as well. Nobody leaves anything out.

use std::path::{Path, PathBuf};

use hestner_tests::restic::STOCK;
use hestner_tests::{Agent, Cmd, Service, World, files};

use crate::measure::{Cost, cost};

/// A program with a repository of its own.
pub(crate) trait Program {
    /// Its name, as the tables have it.
    fn name(&self) -> &'static str;
    /// Backs the tree up.
    fn back_up(&mut self, tree: &Path) -> Cost;
    /// Restores the newest backup below an empty folder.
    fn restore(&mut self, target: &Path) -> Cost;
    /// Where its repository lies.
    fn repository(&self) -> PathBuf;
}

/// Makes an agent that has a service and a destination a round: it never loses a repository.
pub(crate) fn agent(world: &World, tree: &Path, rounds: u32) -> Agent {
    let mut builder = world.agent();
    for round in 1..=rounds {
        let destination = Hestner::destination(round);
        builder = builder.destination(&destination, &world.at(&format!("hestner/{destination}")));
        builder = builder.allowed(Service::files(&Hestner::service(round), [tree]).destination(&destination));
    }
    builder.started()
}

/// Hestner: `hestner-agent snapshot` and `restore`, beside a connected daemon.
pub(crate) struct Hestner<'a> {
    agent: &'a Agent,
    round: u32,
}

impl<'a> Hestner<'a> {
    pub(crate) fn new(agent: &'a Agent, round: u32) -> Self {
        Self { agent, round }
    }

    fn destination(round: u32) -> String {
        format!("disk{round}")
    }

    fn service(round: u32) -> String {
        format!("tree{round}")
    }
}

impl Program for Hestner<'_> {
    fn name(&self) -> &'static str {
        "hestner"
    }

    fn back_up(&mut self, _tree: &Path) -> Cost {
        cost(self.agent.command(&["snapshot", &Self::service(self.round)]), Some(self.agent.pid()))
    }

    fn restore(&mut self, target: &Path) -> Cost {
        let run = self.agent.last_run();
        let command = self.agent.command(&["restore", run.uid(), "--target"]).arg(target);
        cost(command, Some(self.agent.pid()))
    }

    fn repository(&self) -> PathBuf {
        self.agent.repository_path(&Self::destination(self.round))
    }
}

/// A peer, as two scripts: one that backs up `$1`, the first time after making the repository, and one that
/// restores to `$1`.
pub(crate) struct Peer {
    name: &'static str,
    folder: PathBuf,
    back_up: PathBuf,
    restore: PathBuf,
}

impl Peer {
    /// Stock restic.
    pub(crate) fn restic(world: &World, round: u32) -> Self {
        let folder = world.at(&format!("restic/{round}"));
        let password = files::write(folder.join("password"), "bench");
        let common = format!(
            "{STOCK} -r {0}/repository --password-file {1} --cache-dir {0}/cache --quiet",
            folder.display(),
            password.display()
        );
        let init = format!("{common} init --repository-version 2");
        let back_up = format!("{common} backup --compression auto \"$1\"");
        Self::new("restic", folder, &init, &back_up, &format!("{common} restore latest --target \"$1\""))
    }

    /// Borg.
    pub(crate) fn borg(world: &World, round: u32) -> Self {
        let folder = world.at(&format!("borg/{round}"));
        let common =
            format!("export BORG_PASSPHRASE=bench BORG_BASE_DIR={0}/base BORG_REPO={0}/repository", folder.display());
        let init = format!("{common}\nborg init --encryption repokey-blake2");
        let back_up = format!("{common}\nborg create --compression zstd,3 \"::$(date +%s%N)\" \"$1\"");
        let restore = format!("{common}\ncd \"$1\"\nborg extract \"::$(borg list --last 1 --short)\"");
        Self::new("borg", folder, &init, &back_up, &restore)
    }

    fn new(name: &'static str, folder: PathBuf, init: &str, back_up: &str, restore: &str) -> Self {
        let back_up = format!("set -e\nif [ ! -e {}/repository ]; then {init}; fi\n{back_up}", folder.display());
        let back_up = files::write_script(folder.join("back-up"), &back_up);
        let restore = files::write_script(folder.join("restore"), &format!("set -e\n{restore}"));
        Self { name, folder, back_up, restore }
    }
}

impl Program for Peer {
    fn name(&self) -> &'static str {
        self.name
    }

    fn back_up(&mut self, tree: &Path) -> Cost {
        cost(Cmd::new(&self.back_up).arg(tree), None)
    }

    fn restore(&mut self, target: &Path) -> Cost {
        cost(Cmd::new(&self.restore).arg(target), None)
    }

    fn repository(&self) -> PathBuf {
        self.folder.join("repository")
    }
}

/// Versions of the peers, for the remark.
pub(crate) fn versions() -> String {
    let restic = Cmd::new(STOCK).arg("version").ok();
    let restic = restic.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    format!("{restic}, {}", Cmd::new("borg").arg("--version").ok().trim())
}
