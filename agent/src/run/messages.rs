//! What daemon, runner and worker say to each other: one JSON object a line.
//!
//! The runner believes the daemon a run id, a service and a verb, and nothing more. Lines are bounded by
//! [`LINE_BYTES_MAX`]; a longer one ends the conversation.

use std::path::PathBuf;

use hestner_proto::words::{ErrorClass, Phase};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncBufRead;

use crate::escrow::RepositoryKey;
use crate::freeze::Bind;
use crate::platform::chain;
use crate::platform::lines;
pub use crate::platform::lines::send;
use crate::policy::Effort;
use crate::report::RunRecord;
use crate::repository::{Job, Location, Progress, Stored};
use crate::status::Description;

/// Longest line. A finished run with its log tail stays below a tenth of it.
pub const LINE_BYTES_MAX: u64 = 1024 * 1024;

/// What the daemon asks of a runner, in the first and only line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// A run.
    Run {
        /// UUIDv7.
        run_uid: String,
        /// The service.
        service: String,
        /// A word of the closed list; as text, so that an unknown one is refused by name.
        verb: String,
    },
    /// The plan of a run, without the run.
    Plan {
        /// The service.
        service: String,
    },
    /// Bring to an end what earlier runs left open, then tell of each of these how it ended.
    Settle {
        /// Runs of which the daemon knows no end.
        run_uids: Vec<String>,
    },
    /// What the daemon may know of this host and cannot see by itself.
    Describe,
}

/// What a runner says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Where it is.
    Progress {
        /// The phase.
        phase: Phase,
        /// How far.
        progress: Progress,
    },
    /// A run's end: the same as its file `result.json`.
    Finished(Box<Finished>),
    /// A process of the run still lives: it has no end yet.
    Alive {
        /// The run.
        run_uid: String,
    },
    /// The plan, as lines for people.
    Planned(Vec<String>),
    /// Everything is settled that can be. Runs that were asked for and not named have left no notes.
    Settled,
    /// What the daemon may know.
    Described(Box<Description>),
}

/// A run's end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finished {
    /// The run. Kind and directive are the daemon's to fill in.
    pub record: RunRecord,
    /// The repository's key, if the run reached a repository.
    pub repository_key: Option<RepositoryKey>,
}

/// What the runner asks of a worker, in the first line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerTask {
    /// The repository.
    pub location: Location,
    /// What it may cost.
    pub effort: Effort,
    /// What to do with it.
    pub work: Work,
}

/// The kinds of [`WorkerTask`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Open or make the repository, store, read back.
    Store {
        /// What.
        job: Job,
        /// Folders that stand in for others while it is read.
        binds: Vec<Bind>,
        /// Folders that must stay as they are even if a bind hides them.
        keep: Vec<PathBuf>,
        /// The company's recovery key.
        recovery_recipient: String,
    },
    /// Remove whatever a run left.
    Forget {
        /// The run.
        run_uid: String,
    },
    /// Remove what retention no longer keeps.
    Expire {
        /// Ids in the repository.
        snapshot_ids: Vec<String>,
    },
}

/// What a runner tells a worker while it stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerOrder {
    /// The producer of the stream ended well: the stream may end now.
    EndOfStream,
}

/// What a worker says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerEvent {
    /// The repository is open; its key.
    Opened(RepositoryKey),
    /// How far it is.
    Progress {
        /// `archive` or `verify`.
        phase: Phase,
        /// How far.
        progress: Progress,
    },
    /// What was stored.
    Stored(Stored),
    /// A [`Work::Forget`] or [`Work::Expire`] is done.
    Removed {
        /// Size of the repository now.
        repository_bytes: u64,
        /// Why the data is still there that only they used, if it is.
        warning: Option<String>,
    },
    /// It failed.
    Failed(Failure),
}

/// A failure as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable class.
    pub class: ErrorClass,
    /// As a sentence.
    pub message: String,
    /// Entries that could not be read.
    #[serde(default)]
    pub unreadable: u64,
    /// The first of them.
    #[serde(default)]
    pub unreadable_names: Vec<String>,
}

impl Failure {
    /// A failure without entries.
    pub fn new(class: ErrorClass, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), unreadable: 0, unreadable_names: Vec::new() }
    }

    /// An error with everything below it.
    pub fn of(class: ErrorClass, error: &dyn std::error::Error) -> Self {
        Self::new(class, chain(error))
    }
}

/// Reads one message. `None`: the other side is gone, or said what is no message.
pub async fn receive<T: DeserializeOwned>(reader: &mut (impl AsyncBufRead + Unpin)) -> Option<T> {
    lines::receive(reader, LINE_BYTES_MAX).await.ok().flatten()
}
