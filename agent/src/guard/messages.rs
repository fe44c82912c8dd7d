//! What runner and guard say to each other: JSON, one object a line.
//!
//! The runner's first line is [`Order::Arm`]; with its first byte come descriptors: the runner's pidfd, then
//! a folder on each filesystem. They are handed over and not opened here from names or numbers: a number
//! may be another process by then, and the guard's unit need not see the mounts.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::client::{GuardError, Verdict};

/// A line, at most: room for many long paths.
pub(super) const LINE_BYTES_MAX: usize = 256 * 1024;
/// Filesystems of one window; a message carries 253 descriptors at most (`SCM_MAX_FD` of the kernel).
pub(super) const MOUNTS_MAX: usize = 64;

/// What a runner orders.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Order {
    /// Make everything ready.
    Arm(Arm),
    /// The window begins; nothing is frozen.
    Begin {
        /// When the order was given, in ns of `CLOCK_MONOTONIC`: an order that lies around does not
        /// lengthen the window.
        given_ns: u64,
    },
    /// Another step begins, with a time of its own; the window before is over. Only where nothing is frozen.
    Renew {
        /// As above.
        given_ns: u64,
        /// How long the step may take.
        window_ms: u64,
    },
    /// Freeze everything.
    Freeze {
        /// As above.
        given_ns: u64,
    },
    /// Thaw and say whether all went well.
    Thaw,
}

/// What the guard is to watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Arm {
    pub run_uid: String,
    /// Which life of the machine, as the runner sees it: so that it is what `thaw` will see. In a container another
    /// file may lie over the kernel's, which the fences of the guard's unit take away.
    pub boot_id: String,
    pub journal: PathBuf,
    pub mounts: Vec<Mount>,
    pub window_ms: u64,
}

/// A filesystem as the runner names it; its folder's descriptor comes beside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mount {
    pub path: PathBuf,
    pub superblock: String,
}

/// What the guard answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Answer {
    /// Everything is ready.
    Armed,
    /// The window runs.
    Begun,
    /// Everything is frozen.
    Frozen,
    /// Confirmed: everything was frozen until the order, and is thawed.
    Thawed {
        /// For how long.
        frozen_ns: u64,
    },
    /// The window is over, and not by the runner's order.
    Ended(Fault),
}

/// Why a window could not be had or did not last. As [`GuardError`], which has the words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Fault {
    Lost,
    RunnerGone,
    Busy { mount: PathBuf },
    Deadline { window_ms: u64 },
    Stopped,
    Stuck { mount: PathBuf },
    SlowSync { mount: PathBuf, took_ms: u64, limit_ms: u64 },
    NotSupported { mount: PathBuf },
    NotFrozen { mount: PathBuf },
    ThawedByOthers { mount: PathBuf },
    TooLong { window_ms: u64, ceiling_ms: u64 },
    NoRoom { reason: String },
    Failed { step: String, reason: String },
}

impl Fault {
    pub(super) fn failed(step: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Failed { step: step.into(), reason: reason.to_string() }
    }
}

impl From<Fault> for GuardError {
    fn from(fault: Fault) -> Self {
        let ms = Duration::from_millis;
        match fault {
            // The runner hears this only when it has closed by itself.
            Fault::Lost | Fault::RunnerGone => Self::Lost,
            Fault::Busy { mount } => Self::Busy { mount },
            Fault::Deadline { window_ms } => Self::Deadline { window: ms(window_ms) },
            Fault::Stopped => Self::Stopped,
            Fault::Stuck { mount } => Self::Stuck { mount },
            Fault::SlowSync { mount, took_ms, limit_ms } => {
                Self::SlowSync { mount, took: ms(took_ms), limit: ms(limit_ms) }
            }
            Fault::NotSupported { mount } => Self::NotSupported { mount },
            Fault::NotFrozen { mount } => Self::NotFrozen { mount },
            Fault::ThawedByOthers { mount } => Self::ThawedByOthers { mount },
            Fault::TooLong { window_ms, ceiling_ms } => {
                Self::TooLong { window: ms(window_ms), ceiling: ms(ceiling_ms) }
            }
            Fault::NoRoom { reason } => Self::NoRoom { reason },
            Fault::Failed { step, reason } => Self::Failed { step, reason },
        }
    }
}

impl Verdict {
    pub(super) fn of_ns(frozen_ns: u64) -> Self {
        Self { frozen: Duration::from_nanos(frozen_ns) }
    }
}

/// A message as it goes over the socket.
pub(super) fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Takes the first message out of what was read. `None`: it is not whole yet.
///
/// # Errors
/// When it is no such message, or too long to become one.
pub(super) fn take<T: DeserializeOwned>(read: &mut Vec<u8>) -> io::Result<Option<T>> {
    let Some(end) = read.iter().position(|byte| *byte == b'\n') else {
        let too_long = || io::Error::new(io::ErrorKind::InvalidData, "the message is too long");
        return if read.len() > LINE_BYTES_MAX { Err(too_long()) } else { Ok(None) };
    };
    let message = serde_json::from_slice(&read[..end])?;
    read.drain(..=end);
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_taken_one_by_one_and_half_ones_wait() {
        let mut read = line(&Order::Freeze { given_ns: 7 }).unwrap();
        read.extend(line(&Order::Thaw).unwrap());
        let half = read.split_off(read.len() - 1);
        assert_eq!(take::<Order>(&mut read).unwrap(), Some(Order::Freeze { given_ns: 7 }));
        assert_eq!(take::<Order>(&mut read).unwrap(), None);
        read.extend(half);
        assert_eq!(take::<Order>(&mut read).unwrap(), Some(Order::Thaw));
        assert!(read.is_empty());
    }

    #[test]
    fn what_is_no_message_or_never_ends_is_refused() {
        assert!(take::<Order>(&mut b"{\"melt\":1}\n".to_vec()).is_err());
        assert!(take::<Order>(&mut vec![b'x'; LINE_BYTES_MAX + 1]).is_err());
    }
}
