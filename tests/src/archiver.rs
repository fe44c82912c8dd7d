//! The archiver of an agent, made to wait, to fail or to die at a chosen moment, and what it noted of its work.
//!
//! In: the agent's state folder. Out: orders for its workers, and for whoever else opens its repositories, and what they
//! came to. Debug builds of the agent look for them (`agent/src/repository/failpoints.rs`); a test that waits for a
//! moment in another build says so after a minute.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::clock::wait_until;
use crate::files;

/// How long a run may take to come to a moment on a busy machine.
const REACHED_WITHIN: Duration = Duration::from_secs(60);

/// Where the archiver can be caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The repository is open; nothing of the source is read, and no lock is taken.
    Store,
    /// Everything is stored but the snapshot.
    Commit,
    /// The snapshot is stored, and not yet read back.
    Stored,
    /// A snapshot is about to be removed.
    Forget,
    /// Retention is about to remove something.
    Expire,
    /// The so-many-th call of a process to its storage, whatever it is, counted from 1.
    Call(usize),
    /// The so-many-th object that a process puts.
    Put(usize),
    /// The so-many-th pack of them.
    Pack(usize),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store => f.write_str("store"),
            Self::Commit => f.write_str("commit"),
            Self::Stored => f.write_str("stored"),
            Self::Forget => f.write_str("forget"),
            Self::Expire => f.write_str("expire"),
            Self::Call(number) => write!(f, "call-{number}"),
            Self::Put(number) => write!(f, "put-{number}"),
            Self::Pack(number) => write!(f, "pack-{number}"),
        }
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Archiver {
    folder: PathBuf,
}

impl Archiver {
    /// That of an agent with this state folder, which need not be there yet. From now on it notes what it does.
    ///
    /// # Panics
    /// When the folder cannot be made.
    pub fn of(state: &Path) -> Self {
        let folder = state.join("failpoint-worker");
        std::fs::create_dir_all(&folder).expect("a folder");
        let owner = std::fs::metadata(state).expect("the state folder").uid();
        if owner != nix::unistd::geteuid().as_raw() {
            files::give_to(&folder, owner);
        }
        Self { folder }
    }

    /// From now on it waits there, until it is killed or may [`Archiver::go_on`]. At a numbered moment all later ones
    /// wait as well, as at a place that does not answer any more.
    pub fn hold_at(&self, moment: Moment) {
        self.order(moment, "hold");
    }

    /// The first one that comes there waits, and nobody else.
    pub fn hold_once_at(&self, moment: Moment) {
        self.order(moment, "hold once");
    }

    /// From now on it fails there, each time.
    pub fn fail_at(&self, moment: Moment) {
        self.order(moment, "fail");
    }

    /// The first one that comes there fails.
    pub fn fail_once_at(&self, moment: Moment) {
        self.order(moment, "fail once");
    }

    /// The first one that comes there is killed (SIGKILL).
    pub fn kill_once_at(&self, moment: Moment) {
        self.order(moment, "kill once");
    }

    fn order(&self, moment: Moment, action: &str) {
        let _ = std::fs::remove_file(self.mark(moment));
        let mut orders = files::lines(&self.orders());
        orders.retain(|order| !order.starts_with(&format!("{moment} ")));
        orders.push(format!("{moment} {action}"));
        files::replace(self.orders(), orders.join("\n"));
    }

    /// Nothing waits or fails any more. Works where the state folder has no room.
    pub fn go_on(&self) {
        for order in files::lines(&self.orders()) {
            let moment = order.split(' ').next().unwrap_or_default();
            let _ = std::fs::remove_file(self.folder.join(format!("reached-{moment}")));
        }
        let _ = std::fs::remove_file(self.orders());
    }

    /// Whether it came there since it was told what to do then.
    pub fn was_reached(&self, moment: Moment) -> bool {
        self.mark(moment).exists()
    }

    /// Waits until it is there.
    pub fn wait_reached(&self, moment: Moment) {
        wait_until(&format!("the archiver to reach {moment}"), REACHED_WITHIN, || self.was_reached(moment));
    }

    /// What it noted so far: `begin store`, `call-4 get keys/...`, `commit`, without the numbers of processes.
    pub fn notes(&self) -> Vec<String> {
        let lines = files::lines(&self.folder.join("log")).into_iter();
        lines.filter_map(|line| Some(line.split_once(' ')?.1.to_owned())).collect()
    }

    /// How many workers were started to store something.
    pub fn stores_begun(&self) -> usize {
        self.notes().iter().filter(|note| *note == "begin store").count()
    }

    /// Forgets what it noted.
    pub fn forget_notes(&self) {
        let _ = std::fs::remove_file(self.folder.join("log"));
    }

    fn orders(&self) -> PathBuf {
        self.folder.join("orders")
    }

    fn mark(&self, moment: Moment) -> PathBuf {
        self.folder.join(format!("reached-{moment}"))
    }
}
