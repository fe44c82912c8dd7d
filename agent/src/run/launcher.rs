//! The daemon's side of the runner: has one started and passes on what it says.
//!
//! Installed as units, the daemon connects to a socket, and systemd starts a runner as root in a unit of its
//! own; otherwise the daemon starts one as its own user. Either way it says one request and nothing more: it
//! gives no privilege and shares no memory. While the conversation is held open the run goes on; dropping it
//! cancels the run.

use std::io;
use std::path::PathBuf;

use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Child;

use super::messages::{Event, Request, receive, send};
use crate::platform::command::{CommandError, End, Program, Streams};

/// A runner that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The process could not be started.
    #[error(transparent)]
    Start(#[from] CommandError),
    /// Nobody listens where systemd should.
    #[error("no runner can be started through {path}: is its socket unit active?")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It could not be spoken to.
    #[error("cannot talk to the runner")]
    Pipe(#[from] io::Error),
}

/// How runners come to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// As a child process, which reads this settings file.
    Process {
        /// The settings file.
        config: PathBuf,
    },
    /// By systemd, which listens on this socket and tells the runner its settings file.
    Socket(PathBuf),
}

impl Launch {
    /// Whether runners have privileges of their own.
    pub fn is_separated(&self) -> bool {
        matches!(self, Self::Socket(_))
    }
}

/// A runner at work.
#[derive(Debug)]
pub struct Runner {
    /// `None`: it is a unit, and systemd's to wait for.
    child: Option<Child>,
    read: BufReader<OwnedReadHalf>,
    // Held open: its end is the runner's sign that the daemon is gone.
    _write: OwnedWriteHalf,
}

impl Runner {
    /// Has a runner started.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn launch(launch: &Launch, request: &Request) -> Result<Self, LaunchError> {
        let (child, socket) = match launch {
            Launch::Process { config } => {
                let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
                ours.set_nonblocking(true)?;
                let program = Program::own().arg("--config").arg(config).arg("runner");
                let child = program.spawn(Streams::socket(theirs.into())?, End::ByItself, &[])?;
                (Some(child), UnixStream::from_std(ours)?)
            }
            Launch::Socket(path) => {
                let unreachable = |source| LaunchError::Unreachable { path: path.clone(), source };
                (None, UnixStream::connect(path).await.map_err(unreachable)?)
            }
        };
        let (read, mut write) = socket.into_split();
        send(&mut write, request).await?;
        Ok(Self { child, read: BufReader::new(read), _write: write })
    }

    /// What it says next. `None`: it has ended, and its process is gone.
    pub async fn next(&mut self) -> Option<Event> {
        let event = receive(&mut self.read).await;
        if let (None, Some(child)) = (&event, &mut self.child) {
            // How it ended does not matter: what it did not say is in its ledger.
            let _ = child.wait().await;
        }
        event
    }
}
