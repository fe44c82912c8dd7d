//! The local socket: how people on the host talk to the daemon.
//!
//! One JSON object a line; one request a connection, then answers until the daemon closes. The caller must
//! be root or the user that the daemon runs as (`SO_PEERCRED`). This module moves requests and answers and
//! knows nothing of what they lead to.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use serde::{Deserialize, Serialize};
use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::lifecycle::{Drain, Pulse, Tasks};
use crate::platform::files::{self, FileError};
use crate::platform::lines;
use crate::platform::trust;
use crate::report::RunRecord;
use crate::status::{Status, WaitingRun};

/// Longest line either way.
const LINE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// How long a caller may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Answers that wait for a caller that does not read.
const ANSWERS_WAITING: usize = 32;
/// Callers at the same time.
const CALLERS_MAX: usize = 32;

/// What a caller wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The daemon's state.
    Status,
    /// The newest runs.
    Runs {
        /// At most so many.
        limit: u32,
    },
    /// Start a run and follow it.
    Snapshot {
        /// Of which service.
        service: String,
    },
    /// What a run would do.
    Plan {
        /// Of which service.
        service: String,
    },
    /// The runs that wait for a person.
    Waiting,
    /// One of them.
    Wait {
        /// Which.
        run_uid: String,
    },
    /// Let it begin. The runner demands root's own file besides.
    Confirm {
        /// Which.
        run_uid: String,
    },
    /// End it.
    Refuse {
        /// Which.
        run_uid: String,
        /// Who says so, for the record.
        by: String,
    },
}

/// What the daemon answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Its state.
    Status(Box<Status>),
    /// Runs, newest first.
    Runs(Vec<RunRecord>),
    /// The run that was started.
    Started {
        /// Its id.
        run_uid: String,
    },
    /// Where it is.
    Progress {
        /// Its phase.
        phase: String,
        /// Bytes done and in all; 0 in all while unknown.
        bytes: (u64, u64),
        /// Files done and in all; 0 in all while unknown.
        files: (u64, u64),
        /// 0 while unknown.
        seconds_remaining: u32,
        /// 0 while unknown.
        #[serde(default)]
        bytes_per_second: u64,
    },
    /// Runs that wait for a person, oldest first; or the one that was asked for.
    Waiting(Vec<WaitingRun>),
    /// Its end.
    Ended(Box<RunRecord>),
    /// What it would do.
    Plan(Vec<String>),
    /// It cannot be done.
    Refused {
        /// Stable code.
        code: String,
        /// Why.
        message: String,
        /// What to do.
        next_step: String,
    },
}

/// A request with the way back to whoever made it. Dropping it ends the conversation.
#[derive(Debug)]
pub struct Call {
    /// What is wanted.
    pub request: Request,
    /// Where answers go.
    pub answers: mpsc::Sender<Answer>,
}

/// The socket could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Its folder cannot be made or an old socket not removed.
    #[error(transparent)]
    File(#[from] FileError),
    /// It cannot be bound.
    #[error("cannot listen on {path}")]
    Bind {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something else lies in its place.
    #[error("{0} is in the way of the agent's socket: it is no socket")]
    NotASocket(PathBuf),
    /// Another daemon listens on it.
    #[error("another agent listens on {0}")]
    InUse(PathBuf),
    /// Nobody listens on it.
    #[error("the agent's daemon cannot be reached at {path}")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The daemon went away in the middle.
    #[error("the agent's daemon stopped before it had answered")]
    Broken,
}

/// The socket, bound.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

/// Binds the socket. One that a killed daemon left behind is replaced.
///
/// # Errors
/// When another daemon listens on it, or it cannot be made.
pub async fn bind(path: &Path) -> Result<Listener, ControlError> {
    if let Some(folder) = path.parent() {
        files::private_folder(folder)?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(ControlError::InUse(path.to_owned()));
    }
    match path.symlink_metadata() {
        Ok(metadata) if metadata.file_type().is_socket() => files::remove(path)?,
        Ok(_) => return Err(ControlError::NotASocket(path.to_owned())),
        // Not there: as it should be.
        Err(_) => {}
    }
    let socket = UnixListener::bind(path).map_err(|source| ControlError::Bind { path: path.to_owned(), source })?;
    Ok(Listener { socket, path: path.to_owned() })
}

impl Listener {
    /// Takes callers until the drain, then removes the socket.
    pub async fn run(self, calls: mpsc::Sender<Call>, mut pulse: Pulse, tasks: Tasks, drain: Drain) {
        let places = std::sync::Arc::new(tokio::sync::Semaphore::new(CALLERS_MAX));
        loop {
            let accepted = tokio::select! {
                () = drain.cancelled() => break,
                accepted = pulse.rest(self.socket.accept()) => accepted,
            };
            let (Ok((stream, _)), Ok(place)) = (accepted, std::sync::Arc::clone(&places).try_acquire_owned()) else {
                continue;
            };
            let (calls, drain) = (calls.clone(), drain.clone());
            tasks.spawn_ending(async move {
                let _place = place;
                tokio::select! {
                    () = drain.cancelled() => {}
                    served = serve(stream, calls) => if let Err(error) = served {
                        tracing::debug!(event = "caller_lost", error = %error);
                    },
                }
            });
        }
        // Best effort: the next start replaces it.
        let _ = files::remove(&self.path);
    }
}

async fn serve(stream: UnixStream, calls: mpsc::Sender<Call>) -> io::Result<()> {
    let peer = getsockopt(&stream, sockopt::PeerCredentials)?;
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    if !trust::is_trusted_user(peer.uid()) {
        tracing::warn!(event = "caller_refused", uid = peer.uid());
        let refused = Answer::Refused {
            code: "not_root".to_owned(),
            message: format!("user {} may not talk to the agent", peer.uid()),
            next_step: "run the command as root".to_owned(),
        };
        return lines::send(&mut write, &refused).await;
    }
    let request = match tokio::time::timeout(REQUEST_TIMEOUT, lines::receive(&mut read, LINE_BYTES_MAX)).await {
        Ok(request) => request?.ok_or(io::ErrorKind::UnexpectedEof)?,
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    let (answers, mut waiting) = mpsc::channel(ANSWERS_WAITING);
    if calls.send(Call { request, answers }).await.is_err() {
        return Ok(());
    }
    while let Some(answer) = waiting.recv().await {
        lines::send(&mut write, &answer).await?;
    }
    Ok(())
}

/// A conversation with the daemon, from the caller's side.
#[derive(Debug)]
pub struct Conversation {
    read: BufReader<tokio::net::unix::OwnedReadHalf>,
    // Held open: a closed half would look like a caller that left.
    _write: tokio::net::unix::OwnedWriteHalf,
}

/// Asks the daemon.
///
/// # Errors
/// When nobody listens.
pub async fn ask(path: &Path, request: &Request) -> Result<Conversation, ControlError> {
    let unreachable = |source| ControlError::Unreachable { path: path.to_owned(), source };
    let (read, mut write) = UnixStream::connect(path).await.map_err(unreachable)?.into_split();
    lines::send(&mut write, request).await.map_err(unreachable)?;
    Ok(Conversation { read: BufReader::new(read), _write: write })
}

impl Conversation {
    /// The next answer. `None`: there are no more.
    ///
    /// # Errors
    /// [`ControlError::Broken`].
    pub async fn next(&mut self) -> Result<Option<Answer>, ControlError> {
        lines::receive(&mut self.read, LINE_BYTES_MAX).await.map_err(|_| ControlError::Broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn second_daemon_is_refused_and_a_dead_ones_socket_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/control.sock");
        let first = bind(&path).await.unwrap();
        assert!(matches!(bind(&path).await, Err(ControlError::InUse(_))));
        drop(first);
        assert!(path.exists(), "a killed daemon leaves its socket");
        bind(&path).await.unwrap();
    }

    #[tokio::test]
    async fn what_is_no_socket_is_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(bind(&path).await, Err(ControlError::NotASocket(_))));
        assert!(path.is_dir());
    }

    #[tokio::test]
    async fn caller_gets_the_answers_of_its_own_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = bind(&path).await.unwrap();
        let (calls, mut waiting) = mpsc::channel(1);
        let tasks = Tasks::default();
        tasks.spawn("control", listener.run(calls, tasks.pulse("control"), tasks.clone(), tasks.drain()));
        let mut conversation = ask(&path, &Request::Runs { limit: 3 }).await.unwrap();
        let call = waiting.recv().await.unwrap();
        assert_eq!(call.request, Request::Runs { limit: 3 });
        call.answers.send(Answer::Plan(vec!["a".into()])).await.unwrap();
        drop(call);
        assert!(matches!(conversation.next().await.unwrap(), Some(Answer::Plan(lines)) if lines == ["a"]));
        assert!(conversation.next().await.unwrap().is_none());
        tasks.drain().cancel();
    }
}
