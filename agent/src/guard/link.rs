//! One end of the socket between runner and guard: whole messages in, whole messages out, never blocking.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt,
    recvmsg, sendmsg, socket, sockopt,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::messages::{self, MOUNTS_MAX};
use crate::platform::{process, trust};

/// Pieces in which a stream is read.
const PIECE_BYTES: usize = 4096;

/// An end of the socket.
#[derive(Debug)]
pub(super) struct Link {
    socket: UnixStream,
    read: Vec<u8>,
    is_closed: bool,
}

impl Link {
    /// Takes an end over. The other end must be root's or this process's own user's.
    ///
    /// # Errors
    /// When the other end is somebody else's.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
        if !trust::is_trusted_user(peer.uid()) {
            let reason = format!("user {} may not guard or be guarded", peer.uid());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, reason));
        }
        socket.set_nonblocking(true)?;
        Ok(Self { socket, read: Vec::with_capacity(PIECE_BYTES), is_closed: false })
    }

    /// Another handle on the same end, for writing.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(super) fn writer(&self) -> io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// Whether nothing more will come.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Closes both directions, also for other handles of this end.
    pub(super) fn close(&mut self) {
        // It may be closed already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.is_closed = true;
    }

    /// Says nothing more, but goes on listening.
    pub(super) fn hang_up(&self) {
        // It may be closed already.
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the other end is gone, or has not read for so long that no room is left.
    pub(super) fn send(&self, message: &impl Serialize) -> io::Result<()> {
        send(&self.socket, message)
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub(super) fn send_with(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let line = messages::line(message)?;
        let raw: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let beside = [ControlMessage::ScmRights(&raw)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&line)], &beside, flags, None)?;
        (&self.socket).write_all(&line[sent..])
    }

    /// Reads what is there. What cannot be read any more is closed.
    pub(super) fn fill(&mut self) {
        let mut piece = [0; PIECE_BYTES];
        loop {
            match (&self.socket).read(&mut piece) {
                Ok(0) => self.is_closed = true,
                Ok(length) => {
                    self.read.extend_from_slice(&piece[..length]);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.is_closed = true,
            }
            return;
        }
    }

    /// Reads a piece of what is there and takes over the descriptors that come with it.
    ///
    /// # Errors
    /// When the other end is gone.
    pub(super) fn fill_with_descriptors(&mut self, fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        let mut piece = [0; PIECE_BYTES];
        let mut space = nix::cmsg_space!([RawFd; MOUNTS_MAX + 1]);
        let mut slices = [IoSliceMut::new(&mut piece)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received = match recvmsg::<()>(self.socket.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            received => received?,
        };
        for message in received.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                for raw in raw {
                    fds.push(process::adopt(raw)?);
                }
            }
        }
        let length = received.bytes;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read.extend_from_slice(&piece[..length]);
        Ok(())
    }

    /// The next whole message among what was read.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        messages::take(&mut self.read)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends a message over a handle of an end.
///
/// # Errors
/// As [`Link::send`].
pub(super) fn send(mut socket: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    socket.write_all(&messages::line(message)?)
}

/// Connects to the socket of a unit, without waiting for anybody.
///
/// # Errors
/// When nobody listens there, or so many have connected that there is no room (`EAGAIN`).
pub(super) fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::messages::Answer;

    #[test]
    fn descriptors_travel_with_their_message() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (ours, mut theirs) = (Link::new(ours).unwrap(), Link::new(theirs).unwrap());
        let folder = std::fs::File::open("/proc").unwrap();
        ours.send_with(&Answer::Armed, &[folder.as_fd(), folder.as_fd()]).unwrap();
        let mut fds = Vec::new();
        theirs.fill_with_descriptors(&mut fds).unwrap();
        assert_eq!(theirs.next::<Answer>().unwrap(), Some(Answer::Armed));
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn what_was_said_before_the_end_is_still_heard() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut theirs = Link::new(theirs).unwrap();
        send(&ours, &Answer::Frozen).unwrap();
        drop(ours);
        theirs.fill();
        assert!(theirs.is_closed());
        assert_eq!(theirs.next::<Answer>().unwrap(), Some(Answer::Frozen));
    }
}
