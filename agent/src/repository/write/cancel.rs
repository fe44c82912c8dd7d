//! How a running store is told to end, and a stream that can be called off while it waits for bytes.
//!
//! A flag alone is seen only by who looks at it. Whoever waits for a producer waits for a pipe as well, whose other
//! end is closed when the store is cancelled.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Tells a running [`Archive::store`](super::Archive::store) to end; it leaves no snapshot then.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Told>);

#[derive(Debug, Default)]
struct Told {
    is_cancelled: AtomicBool,
    /// One end each for those who wait.
    waiting: Mutex<Vec<PipeWriter>>,
}

impl Cancel {
    /// Ends it soon: at the next entry, piece or pack, and at once where it waits for an [`Interruptible`].
    pub fn cancel(&self) {
        self.0.is_cancelled.store(true, Ordering::Release);
        self.waiting().clear();
    }

    /// Whether it was told to end.
    pub fn is_cancelled(&self) -> bool {
        self.0.is_cancelled.load(Ordering::Acquire)
    }

    /// A stream whose reads end with an error once this is cancelled.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn interruptible(&self, stream: OwnedFd) -> io::Result<Interruptible> {
        let (called_off, end) = io::pipe()?;
        let mut waiting = self.waiting();
        if !self.is_cancelled() {
            waiting.push(end);
        }
        Ok(Interruptible { stream: stream.into(), called_off })
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<PipeWriter>> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that can be called off.
#[derive(Debug)]
pub struct Interruptible {
    stream: File,
    called_off: PipeReader,
}

impl Read for Interruptible {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let wanted = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut both = [wanted(self.called_off.as_fd()), wanted(self.stream.as_fd())];
            match poll(&mut both, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) if both[0].any() != Some(false) => {
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it was called off"));
                }
                // Bytes, an end, or an error: the read says which.
                Ok(_) => return self.stream.read(into),
            }
        }
    }
}
