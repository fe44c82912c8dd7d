//! The freezer process: waits for one byte, calls FIFREEZE, says how it went, ends. Nothing else.
//!
//! It is a process of its own because nobody can cancel FIFREEZE: its end, or its death, is the one sign that
//! no freeze is on the way any more. It is started before the window, so that the window holds no start of
//! a program. It writes one letter into the guard's record before and after, so that recovery knows whether
//! a freeze was begun.
//!
//! In: the folder, the record, where its letter stands. Out: `Returned` on its standard input, a socket.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;

use super::journal::State;
use crate::platform::{fsfreeze, process};

/// It can be told to freeze.
pub(super) const READY: u8 = b'r';
/// Freeze.
pub(super) const GO: u8 = b'g';

/// How FIFREEZE went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Returned {
    /// Its answer.
    pub result: Result<(), Errno>,
    /// When it was called, in time of `CLOCK_MONOTONIC`.
    pub called: Duration,
}

impl Returned {
    /// Bytes of an answer.
    pub(super) const BYTES: usize = 12;

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let errno = self.result.err().map_or(0, |errno| errno as i32);
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&errno.to_ne_bytes());
        bytes[4..].copy_from_slice(&u64::try_from(self.called.as_nanos()).unwrap_or(u64::MAX).to_ne_bytes());
        bytes
    }

    pub(super) fn of_bytes(bytes: [u8; Self::BYTES]) -> Self {
        let [a, b, c, d, called @ ..] = bytes;
        let errno = i32::from_ne_bytes([a, b, c, d]);
        let result = if errno == 0 { Ok(()) } else { Err(Errno::from_raw(errno)) };
        Self { result, called: Duration::from_nanos(u64::from_ne_bytes(called)) }
    }
}

/// What it inherits: numbers of descriptors, and where in the record its letter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// A folder on the filesystem.
    pub mount: i32,
    /// The record.
    pub journal: i32,
    /// The letter's place in it.
    pub offset: u64,
}

/// The freezer process; its standard input is the socket to the guard.
///
/// # Errors
/// When what it inherits cannot be used, or the guard is gone before its order: then nothing was frozen.
pub fn run(given: Given) -> std::io::Result<()> {
    let mut guard = UnixStream::from(process::adopt(0)?);
    let mount = process::adopt(given.mount)?;
    let journal = File::from(process::adopt(given.journal)?);
    guard.write_all(&[READY])?;
    let mut order = [0];
    guard.read_exact(&mut order)?;
    if order[0] != GO {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let note = |state: State| journal.write_all_at(&[state as u8], given.offset);
    // Nothing is frozen of which recovery would not know.
    if let Err(error) = note(State::Begun) {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO));
        return guard.write_all(&Returned { result: Err(errno), called: Duration::ZERO }.to_bytes());
    }
    let called = fsfreeze::monotonic();
    let result = fsfreeze::freeze(&mount);
    let said = Returned { result, called }.to_bytes();
    match result {
        // The guard first: the window runs, and the record may be on a slow disk.
        Ok(()) => guard.write_all(&said).and(note(State::Frozen)),
        // The record first: what is somebody else's must never be thawed, whoever dies now.
        Err(Errno::EBUSY) => note(State::Busy).and(guard.write_all(&said)),
        Err(_) => note(State::Failed).and(guard.write_all(&said)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_survives_the_way() {
        for result in [Ok(()), Err(Errno::EBUSY)] {
            let returned = Returned { result, called: Duration::from_nanos(12_345) };
            assert_eq!(Returned::of_bytes(returned.to_bytes()), returned);
        }
    }
}
