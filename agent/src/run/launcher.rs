//! The daemon's side of the runner: starts the process and passes on what it says.
//!
//! The daemon hands over a socket and one request; it gives no privilege and shares no memory. While the
//! conversation is held open the run goes on; dropping it cancels the run.

use std::io;
use std::path::Path;

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
    /// It could not be spoken to.
    #[error("cannot talk to the runner")]
    Pipe(#[from] io::Error),
}

/// A runner at work.
#[derive(Debug)]
pub struct Runner {
    child: Child,
    read: BufReader<OwnedReadHalf>,
    // Held open: its end is the runner's sign that the daemon is gone.
    _write: OwnedWriteHalf,
}

impl Runner {
    /// Starts a runner with the settings file it shall read.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn launch(settings: &Path, request: &Request) -> Result<Self, LaunchError> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let program = Program::own().arg("--config").arg(settings).arg("runner");
        let child = program.spawn(Streams::socket(theirs.into())?, End::ByItself, &[])?;
        let (read, mut write) = UnixStream::from_std(ours)?.into_split();
        send(&mut write, request).await?;
        Ok(Self { child, read: BufReader::new(read), _write: write })
    }

    /// What it says next. `None`: it has ended, and its process is gone.
    pub async fn next(&mut self) -> Option<Event> {
        let event = receive(&mut self.read).await;
        if event.is_none() {
            // How it ended does not matter: what it did not say is in its ledger.
            let _ = self.child.wait().await;
        }
        event
    }
}
