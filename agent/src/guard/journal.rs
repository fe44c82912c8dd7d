//! The record of one window: which filesystems, what happened to each, and how it ended.
//!
//! ```text
//! {"version":1,"run_uid":"...","boot_id":"...","window_ms":7000,"mounts":[...]}\n
//! -00000000000000000000 AA\n
//! │└ deadline, ns of CLOCK_MONOTONIC; 0 before the window began
//! └ how it ended                  └ a letter a filesystem, in the order of `mounts`
//! ```
//!
//! The file is whole and on the disk before anything is frozen. After that single bytes are overwritten in
//! place: no block is allocated, so a full disk does not matter, and nothing is synced, because the record
//! is for the death of processes; after the death of the machine nothing is frozen (`boot_id`).
//!
//! The guard and its freezers hold a lock on the file: whoever gets it knows that all of them are gone.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::mounted::Mounted;
use crate::platform::files::{self, FileError};

/// Format of the file.
const VERSION: u32 = 1;
/// Room for many long paths.
const BYTES_MAX: u64 = 1024 * 1024;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Digits of a deadline.
const DEADLINE_DIGITS: usize = 20;

/// What happened to a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    /// Nothing yet; its freezer waits.
    Armed = b'A',
    /// Its freezer is about to call FIFREEZE, or is inside.
    Begun = b'B',
    /// FIFREEZE returned 0.
    Frozen = b'F',
    /// Somebody else had frozen it: never to be thawed by us.
    Busy = b'E',
    /// FIFREEZE failed otherwise.
    Failed = b'N',
    /// It is not frozen by us any more.
    Thawed = b'T',
}

impl State {
    fn of(byte: u8) -> Option<Self> {
        use State as S;
        [S::Armed, S::Begun, S::Frozen, S::Busy, S::Failed, S::Thawed].into_iter().find(|state| *state as u8 == byte)
    }

    /// Whether it may be frozen by us.
    pub(super) fn may_be_frozen(self) -> bool {
        matches!(self, Self::Begun | Self::Frozen)
    }
}

/// How a window ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Outcome {
    /// It has not, or nobody lived to write it down.
    Open = b'-',
    /// By the runner's order.
    Ordered = b'O',
    /// It failed, and the runner was told so.
    Failed = b'X',
    /// At the deadline.
    Deadline = b'D',
    /// The runner died or closed.
    RunnerGone = b'G',
    /// The guard was told to stop.
    Stopped = b'S',
    /// A freeze is stuck inside the kernel.
    Stuck = b'K',
    /// The guard was lost; the runner thawed.
    ByRunner = b'R',
    /// Both were lost; recovery thawed.
    ByRecovery = b'L',
}

impl Outcome {
    fn of(byte: u8) -> Option<Self> {
        use Outcome as O;
        let all = [O::Open, O::Ordered, O::Failed, O::Deadline, O::RunnerGone, O::Stopped, O::Stuck];
        all.into_iter().chain([O::ByRunner, O::ByRecovery]).find(|outcome| *outcome as u8 == byte)
    }

    /// Whether the window ended otherwise than by the runner's order, and without the runner's doing.
    pub(super) fn is_struck(self) -> bool {
        matches!(self, Self::Deadline | Self::RunnerGone | Self::Stopped | Self::Stuck | Self::ByRecovery)
    }
}

/// The part that never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    version: u32,
    /// The run.
    pub run_uid: String,
    /// In which life of the machine.
    pub boot_id: String,
    /// How long the window may be.
    pub window_ms: u64,
    /// What is frozen in it.
    pub mounts: Vec<Mounted>,
}

impl Header {
    /// For a window of that life of the machine.
    pub(super) fn new(run_uid: String, boot_id: String, window: Duration, mounts: Vec<Mounted>) -> Self {
        let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        Self { version: VERSION, run_uid, boot_id, window_ms, mounts }
    }
}

/// Which life of the machine this is.
///
/// # Errors
/// When `/proc` cannot be read.
pub(super) fn boot_id() -> Result<String, FileError> {
    let bytes = files::read(Path::new(BOOT_ID), 100)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// An open record.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    /// What it says of the window.
    pub header: Header,
    /// Where the second line begins.
    base: u64,
}

impl Journal {
    /// Makes the record; it is on the disk afterwards.
    ///
    /// # Errors
    /// When there is one already, or it cannot be written.
    pub(super) fn create(path: &Path, header: Header) -> Result<Self, FileError> {
        if path.symlink_metadata().is_ok() {
            return Err(files::failed("make", path)(io::ErrorKind::AlreadyExists.into()));
        }
        let mut bytes = serde_json::to_vec(&header).map_err(|e| files::failed("write", path)(e.into()))?;
        bytes.push(b'\n');
        bytes.push(Outcome::Open as u8);
        bytes.extend([b'0'; DEADLINE_DIGITS]);
        bytes.push(b' ');
        bytes.extend(header.mounts.iter().map(|_| State::Armed as u8));
        bytes.push(b'\n');
        files::write(path, &bytes, 0o600)?;
        Self::open(path)?.ok_or_else(|| files::failed("open", path)(io::ErrorKind::NotFound.into()))
    }

    /// Opens a record. `None`: there is none.
    ///
    /// # Errors
    /// When there is one that cannot be read, or is none.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, FileError> {
        let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
        let open = |writes| OpenOptions::new().read(true).write(writes).custom_flags(flags).open(path);
        let mut file = match open(true) {
            Ok(file) => file,
            // What it says is needed most when its disk has become read-only; what is done then is not noted.
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                open(false).map_err(files::failed("open", path))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(files::failed("open", path)(error)),
        };
        let mut bytes = Vec::new();
        (&mut file).take(BYTES_MAX).read_to_end(&mut bytes).map_err(files::failed("read", path))?;
        let garbled = || io::Error::new(io::ErrorKind::InvalidData, "it is no record of a frozen window");
        let parsed = (|| {
            let end = bytes.iter().position(|byte| *byte == b'\n')?;
            let header: Header = serde_json::from_slice(&bytes[..end]).ok()?;
            let whole = bytes.len() == end + 1 + 1 + DEADLINE_DIGITS + 1 + header.mounts.len() + 1;
            (header.version == VERSION && whole).then_some((header, end as u64 + 1))
        })();
        let (header, base) = parsed.ok_or_else(|| files::failed("read", path)(garbled()))?;
        Ok(Some(Self { file, path: path.to_owned(), header, base }))
    }

    /// Takes the lock. False: a guard or one of its freezers lives.
    ///
    /// # Errors
    /// When the filesystem has no locks.
    pub(super) fn try_lock(&self) -> Result<bool, FileError> {
        match self.file.try_lock() {
            Ok(()) => Ok(true),
            Err(std::fs::TryLockError::WouldBlock) => Ok(false),
            Err(std::fs::TryLockError::Error(error)) => Err(files::failed("lock", &self.path)(error)),
        }
    }

    /// Another descriptor of the same open file, which shares the lock.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from)
    }

    /// Where the letter of a filesystem stands.
    pub(super) fn state_offset(&self, mount: usize) -> u64 {
        self.base + 1 + DEADLINE_DIGITS as u64 + 1 + mount as u64
    }

    pub(super) fn state(&self, mount: usize) -> Result<State, FileError> {
        self.byte(self.state_offset(mount)).and_then(|byte| State::of(byte).ok_or_else(|| self.garbled()))
    }

    pub(super) fn set_state(&self, mount: usize, state: State) -> Result<(), FileError> {
        self.write(&[state as u8], self.state_offset(mount))
    }

    pub(super) fn outcome(&self) -> Result<Outcome, FileError> {
        self.byte(self.base).and_then(|byte| Outcome::of(byte).ok_or_else(|| self.garbled()))
    }

    pub(super) fn set_outcome(&self, outcome: Outcome) -> Result<(), FileError> {
        self.write(&[outcome as u8], self.base)
    }

    /// When the window is over, in time of `CLOCK_MONOTONIC`. `None`: it has not begun.
    pub(super) fn deadline(&self) -> Result<Option<Duration>, FileError> {
        let mut digits = [0; DEADLINE_DIGITS];
        self.file.read_exact_at(&mut digits, self.base + 1).map_err(files::failed("read", &self.path))?;
        let text = std::str::from_utf8(&digits).map_err(|_| self.garbled())?;
        let nanoseconds: u64 = text.parse().map_err(|_| self.garbled())?;
        Ok((nanoseconds > 0).then(|| Duration::from_nanos(nanoseconds)))
    }

    pub(super) fn set_deadline(&self, at: Duration) -> Result<(), FileError> {
        self.write(format!("{:020}", at.as_nanos().min(u64::MAX.into())).as_bytes(), self.base + 1)
    }

    fn byte(&self, at: u64) -> Result<u8, FileError> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at).map_err(files::failed("read", &self.path))?;
        Ok(byte[0])
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), FileError> {
        self.file.write_all_at(bytes, at).map_err(files::failed("write", &self.path))
    }

    fn garbled(&self) -> FileError {
        let error = io::Error::new(io::ErrorKind::InvalidData, "it is no record of a frozen window");
        files::failed("read", &self.path)(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(folder: &Path, mounts: usize) -> Journal {
        let mounted = |i| Mounted { path: format!("/m{i}").into(), device: i, superblock: String::new() };
        let mounts = (0..mounts as u64).map(mounted).collect();
        let header = Header::new("run".to_owned(), boot_id().unwrap(), Duration::from_secs(7), mounts);
        Journal::create(&folder.join("freeze.journal"), header).unwrap()
    }

    #[test]
    fn record_says_what_was_written_and_nothing_else_changes() {
        let folder = tempfile::tempdir().unwrap();
        let journal = made(folder.path(), 3);
        assert_eq!(journal.deadline().unwrap(), None);
        journal.set_state(1, State::Busy).unwrap();
        journal.set_outcome(Outcome::Deadline).unwrap();
        journal.set_deadline(Duration::from_nanos(42)).unwrap();
        let read = Journal::open(&folder.path().join("freeze.journal")).unwrap().unwrap();
        let states: Vec<State> = (0..3).map(|i| read.state(i).unwrap()).collect();
        assert_eq!(states, [State::Armed, State::Busy, State::Armed]);
        assert_eq!(read.outcome().unwrap(), Outcome::Deadline);
        assert_eq!(read.deadline().unwrap(), Some(Duration::from_nanos(42)));
        assert_eq!(read.header, journal.header);
    }

    #[test]
    fn record_is_made_once_and_a_torn_one_is_no_record() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("freeze.journal");
        let journal = made(folder.path(), 1);
        assert!(Journal::create(&path, journal.header.clone()).is_err());
        let length = path.metadata().unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
        assert!(Journal::open(&path).is_err());
        assert!(Journal::open(&folder.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn lock_is_shared_by_who_inherits_and_refused_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let journal = made(folder.path(), 0);
        let other = Journal::open(&folder.path().join("freeze.journal")).unwrap().unwrap();
        assert!(journal.try_lock().unwrap());
        let inherited = journal.share().unwrap();
        drop(journal);
        assert!(!other.try_lock().unwrap(), "a freezer that lives holds the lock of its dead guard");
        drop(inherited);
        assert!(other.try_lock().unwrap());
    }
}
