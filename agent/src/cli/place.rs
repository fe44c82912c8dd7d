//! Where a repository lies that this host need not know, and what opens it: the arguments that `recover` and `prune`
//! share, and the work on it, which is watched and can be called off.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::{Complaint, EXIT_FAILED, EXIT_MEND};
use crate::platform::chain;
use crate::repository::recovery::{Key, Place, RecoveryError};

/// How often it is told how far the work is.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

#[derive(clap::Args)]
pub(super) struct PlaceArguments {
    /// The repository, if it is a folder of this machine: the folder that holds the file `config`.
    #[arg(long, value_name = "DIR")]
    pub(super) folder: Option<PathBuf>,
    /// A file that says where the repository is: the keys of a [[destination]] in agent.toml, and `repository`, its
    /// name there, such as `repository = "server-12-encrypted"`.
    #[arg(long, value_name = "FILE", conflicts_with = "folder")]
    pub(super) place: Option<PathBuf>,
}

#[derive(clap::Args)]
pub(super) struct KeyArguments {
    /// The secret half of the company's recovery key: the file that `age-keygen -o` wrote.
    #[arg(long, value_name = "FILE", conflicts_with = "password_file")]
    pub(super) recovery_key: Option<PathBuf>,
    /// The wrapped key as `hestner-receiver keys export` wrote it, if the repository's own hestner-key.age is gone.
    #[arg(long, value_name = "FILE", requires = "recovery_key")]
    pub(super) wrapped_key: Option<PathBuf>,
    /// The password itself: that of an open repository, or one that was unwrapped before.
    #[arg(long, value_name = "FILE")]
    pub(super) password_file: Option<PathBuf>,
}

impl PlaceArguments {
    /// `None`: neither was named.
    pub(super) fn read(&self) -> Result<Option<Place>, Complaint> {
        match (&self.folder, &self.place) {
            (Some(folder), _) => Ok(Some(Place::folder(folder)?)),
            (None, Some(file)) => Ok(Some(Place::read(file)?)),
            (None, None) => Ok(None),
        }
    }
}

impl KeyArguments {
    /// `None`: neither was named.
    pub(super) fn read(&self) -> Result<Option<Key>, Complaint> {
        match (&self.recovery_key, &self.password_file) {
            (Some(key), _) => Ok(Some(Key::recovery(key, self.wrapped_key.as_deref())?)),
            (None, Some(file)) => Ok(Some(Key::password(file)?)),
            (None, None) => Ok(None),
        }
    }
}

pub(super) fn no_place(more: &str) -> Complaint {
    let next = format!("name it with --folder or --place{more}");
    Complaint::mend("usage", "where the repository is was not said", next)
}

pub(super) fn no_key() -> Complaint {
    let next = "name the recovery key with --recovery-key, or the password with --password-file";
    Complaint::mend("usage", "what opens the repository was not said", next)
}

impl From<RecoveryError> for Complaint {
    fn from(error: RecoveryError) -> Self {
        Self {
            message: chain(&error),
            next_step: error.next_step().to_owned(),
            code: error.code().to_owned(),
            exit: if error.needs_operator() { EXIT_MEND } else { EXIT_FAILED },
        }
    }
}

/// Runs what blocks on a thread of its own, and tells how far it is. SIGINT and SIGTERM set its flag: it ends in good
/// order then, and leaves no lock.
pub(super) async fn watched<T: Send + 'static, E: Send + 'static>(
    work: impl FnOnce(&AtomicBool) -> Result<T, E> + Send + 'static,
    mut tell: impl FnMut(),
) -> Result<Result<T, E>, Complaint> {
    let cancel = Arc::new(AtomicBool::new(false));
    let (done, mut result) = oneshot::channel();
    let flag = Arc::clone(&cancel);
    let thread = std::thread::Builder::new().name("archive".to_owned()).spawn(move || {
        // Nobody waits any more when it cannot be said.
        let _ = done.send(work(&flag));
    });
    thread.map_err(|e| Complaint::broken("no_thread", &e, "end other programs, or raise the limit"))?;
    let mut ticks = tokio::time::interval(LOOK_PAUSE);
    let (mut asked, mut asked_again) = (std::pin::pin!(asked_to_stop()), std::pin::pin!(asked_to_stop()));
    loop {
        tokio::select! {
            ended = &mut result => {
                tell();
                let broke = || Complaint::mend("broken", "the archive engine broke off", "repeat the command; if it stays, report it");
                return ended.map_err(|_| broke());
            }
            () = &mut asked, if !cancel.load(Ordering::Relaxed) => {
                cancel.store(true, Ordering::Relaxed);
                eprintln!("stopping; what is done stays, and the command can be repeated");
            }
            // A place that does not answer is tried for minutes.
            () = &mut asked_again, if cancel.load(Ordering::Relaxed) => {
                let next = "repeat the command; whoever prunes may have to wait half an hour for a lock that is left";
                return Err(Complaint { exit: EXIT_FAILED, ..Complaint::mend("cancelled", "it was stopped at once", next) });
            }
            _ = ticks.tick() => tell(),
        }
    }
}

/// Completes at SIGINT or SIGTERM, and not at SIGHUP, with which `restic unlock` asks whether a lock's process lives.
pub(super) async fn asked_to_stop() {
    let signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
    match signals {
        [Ok(mut interrupt), Ok(mut terminate), _hangup] => tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        },
        // They end the process at once then, as they do by default.
        _ => std::future::pending().await,
    }
}
