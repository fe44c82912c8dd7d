//! Why a point in time could not be planned, taken, confirmed or removed; each with its stable class.

use std::path::PathBuf;
use std::time::Duration;

use hestner_proto::words::{Consistency, ErrorClass};

use crate::guard::GuardError;
use crate::hook::HookError;
use crate::platform::command::CommandError;
use crate::platform::files::FileError;

/// A point that could not be planned, taken, confirmed or removed.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// A path or a file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A program could not be run.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// An operator's command could not be supervised.
    #[error(transparent)]
    Supervisor(#[from] HookError),
    /// The frozen window could not be had, or did not end by our order.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// A program failed.
    #[error("{program} could not {operation} {object}: {complaint}")]
    Refused {
        /// The program's name.
        program: &'static str,
        /// What was tried.
        operation: &'static str,
        /// To what.
        object: String,
        /// What it said.
        complaint: String,
    },
    /// One of the operator's commands failed.
    #[error("the point's `{key}` {what}{}", said(output))]
    Own {
        /// Its key in the settings.
        key: &'static str,
        /// What became of it.
        what: String,
        /// Its output, on one line.
        output: String,
    },
    /// Data lies in a part of its own below, which a snapshot of the one above shows as an empty folder.
    #[error(
        "{nested} is {what} of its own, which a snapshot of {above} does not cover: list it under `paths` by itself or exclude it"
    )]
    Nested {
        /// The part below.
        nested: PathBuf,
        /// What it is, with its article.
        what: &'static str,
        /// The one that would be snapshotted.
        above: PathBuf,
    },
    /// What a note speaks of is not where it was (a filesystem, a volume group, a pool), so that nobody can say
    /// whether the point is gone.
    #[error("{0} is not there now; what was made in it is removed when it is")]
    Away(PathBuf),
    /// The source's place cannot have the kind of point that the settings ask for.
    #[error("{path} cannot have a point of kind `{kind}`: {reason}")]
    Unfit {
        /// As in the settings.
        kind: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// Something that must go on while it is frozen lies there.
    #[error(
        "{mount} cannot be frozen: {what} ({path}) lies on the same filesystem; take a snapshot instead (`btrfs`, `lvm`, `zfs`) or move one of them"
    )]
    Protected {
        /// What would be frozen.
        mount: PathBuf,
        /// What lies there, such as `the agent's state`.
        what: String,
        /// Where that is.
        path: PathBuf,
    },
    /// Docker cannot be asked.
    #[error("Docker does not answer at {socket}: {reason}")]
    Docker {
        /// Its socket.
        socket: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A container is not in a state that it can be held in, or let go from.
    #[error("container `{name}` cannot be {operation}: {reason}")]
    Container {
        /// Its name.
        name: String,
        /// Such as `paused`.
        operation: &'static str,
        /// Why not, and what to do.
        reason: String,
    },
    /// Somebody else has continued or started a container that we held.
    #[error(
        "container `{name}` did not stay {held} until the point was taken: somebody else continued or started it, so that there is no point in time"
    )]
    Touched {
        /// Its name.
        name: String,
        /// How it was held.
        held: &'static str,
    },
    /// The window was over before the point was taken.
    #[error("the point was not taken within the {} s that the service may be held", limit.as_secs_f32())]
    HeldTooLong {
        /// The limit.
        limit: Duration,
        /// Whether something may still be made.
        in_doubt: bool,
    },
    /// A container had to be killed, so that the point is less than the service asks for.
    #[error(
        "container `{name}` did not end within its stop timeout and was killed, so that only consistency `{reached}` is reached: raise its stop timeout"
    )]
    Killed {
        /// Its name.
        name: String,
        /// What is reached.
        reached: Consistency,
    },
    /// The room for changes is used up, or nearly.
    #[error(
        "the LVM snapshot {snapshot} used {used} % of its room (limit {limit} %), so that what was read may be no point in time"
    )]
    Overflow {
        /// `group/name`.
        snapshot: String,
        /// How much of it was used.
        used: u32,
        /// The limit.
        limit: u8,
    },
    /// The copy cannot be read, or it is no copy.
    #[error("the point cannot be read at {path}: {reason}")]
    Unreadable {
        /// Where.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// It was called off.
    #[error("the point was called off")]
    Stopped {
        /// Whether something may still be made.
        in_doubt: bool,
    },
}

fn said(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!(": {output}") }
}

impl PointError {
    /// Stable class.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Guard(error) => guard_class(error),
            Self::Overflow { .. } => ErrorClass::PointOverflow,
            Self::HeldTooLong { .. } => ErrorClass::FreezeTimeout,
            Self::Stopped { .. } => ErrorClass::Cancelled,
            _ => ErrorClass::PointFailed,
        }
    }

    /// Whether a filesystem may be frozen after all, as soon as the kernel comes to it.
    pub fn is_stuck(&self) -> bool {
        matches!(self, Self::Guard(GuardError::Stuck { .. }))
    }

    /// Whether something may still be made after we have looked: a command that was killed may have its way
    /// inside the kernel.
    pub fn leaves_doubt(&self) -> bool {
        match self {
            Self::Command(_) | Self::Supervisor(_) | Self::Guard(GuardError::Stuck { .. }) => true,
            Self::HeldTooLong { in_doubt, .. } | Self::Stopped { in_doubt } => *in_doubt,
            _ => false,
        }
    }
}

fn guard_class(error: &GuardError) -> ErrorClass {
    match error {
        GuardError::Busy { .. } => ErrorClass::FreezeBusy,
        GuardError::Deadline { .. } => ErrorClass::FreezeTimeout,
        GuardError::Stuck { .. } => ErrorClass::FreezeStuck,
        GuardError::Lost | GuardError::Stopped | GuardError::Unreachable { .. } => ErrorClass::GuardLost,
        GuardError::NoRoom { .. } => ErrorClass::StateFull,
        _ => ErrorClass::PointFailed,
    }
}
