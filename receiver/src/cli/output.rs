//! What the command line prints, and how failures end the process.
//!
//! A failure is shown as what happened, what to do next and a stable code; the exit code says whether an
//! operator has to mend something (64) or not (1).

use std::path::PathBuf;
use std::process::ExitCode;

use crate::platform::causes::chain;
use crate::server::settings;
use crate::{auth, ca, enrolment, fleet, platform, server, store};

/// Bad usage, settings or input: something that an operator has to mend.
const MEND: u8 = 64;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Settings(#[from] settings::Error),
    #[error(transparent)]
    Server(#[from] server::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Files(#[from] platform::files::Error),
    #[error(transparent)]
    Fleet(#[from] fleet::Error),
    #[error(transparent)]
    Enrolment(#[from] enrolment::Error),
    #[error(transparent)]
    Auth(#[from] auth::Error),
    #[error("there is no file {0}")]
    NoFile(PathBuf),
    #[error("there is a file {0} already")]
    FileExists(PathBuf),
    #[error("server {server} has told no key, or several, of a repository `{repository}`")]
    NoRepositoryKey { server: i64, repository: String },
    #[error("there is no company {0}")]
    NoCompany(i64),
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
    #[error("cannot use the socket that NOTIFY_SOCKET names")]
    Manager(#[source] std::io::Error),
    #[error("the task `{0}` ended although it must not")]
    TaskEnded(&'static str),
    #[error("row {0} of the audit log is not what was written")]
    AuditBroken(i64),
    #[error("cannot print the result")]
    Print(#[source] serde_json::Error),
}

impl Failure {
    /// Stable code, next step and exit code.
    fn verdict(&self) -> (&'static str, &'static str, u8) {
        if self.store_error().is_some_and(store::Error::is_full) {
            return ("state_full", "make room on the disk that holds state_dir, then try again", MEND);
        }
        match self {
            Self::Settings(settings::Error::Missing(_)) => {
                ("settings_missing", "name an existing file after --config", MEND)
            }
            Self::Settings(_) => {
                ("settings_invalid", "mend the settings file; config/receiver.toml shows every key", MEND)
            }
            Self::Server(server::Error::Listen { .. }) => {
                ("listen_failed", "stop what uses the address, or change [listen] in the settings", MEND)
            }
            Self::Server(server::Error::AlreadyServed(_)) => {
                ("already_served", "stop the other receiver, or give this one a state_dir of its own", MEND)
            }
            Self::Server(server::Error::Files(_)) | Self::Files(_) => {
                ("file_failed", "check that the path exists and that this user may use it", MEND)
            }
            Self::Server(server::Error::Store(store::Error::Open { .. } | store::Error::File(_))) => {
                ("store_unavailable", "check that state_dir exists and that this user may write it", MEND)
            }
            Self::Server(server::Error::Authority(
                ca::Error::KeyMissing(_) | ca::Error::File(_) | ca::Error::Malformed { .. },
            )) => ("ca_unusable", "bring STATE/ca back from a backup; agents trust no other authority", MEND),
            Self::NoFile(_) => ("file_missing", "name an existing file", MEND),
            Self::FileExists(_) => ("file_exists", "name a file that does not exist yet", MEND),
            Self::NoRepositoryKey { .. } => ("not_found", "`hestner-receiver keys list` shows them", MEND),
            Self::NoCompany(_)
            | Self::Enrolment(enrolment::Error::NoSuch(_))
            | Self::Fleet(fleet::Error::NotFound(_)) => {
                ("not_found", "`hestner-receiver company list` and `agent list` show the ids", MEND)
            }
            Self::Fleet(fleet::Error::RecoveryKey(_)) => {
                ("recovery_key_invalid", "make one offline with `age-keygen`, and give its public half", MEND)
            }
            Self::Fleet(fleet::Error::NameTaken(_)) => ("name_taken", "choose another name", MEND),
            Self::Fleet(fleet::Error::Invalid(_)) => ("invalid_input", "correct the arguments", MEND),
            Self::AuditBroken(_) => {
                ("audit_broken", "compare with a backup of the store; rows before this one still hold", 1)
            }
            Self::TaskEnded(_) => ("task_ended", "read the log; the service manager starts it again", 1),
            _ => ("internal", "read the message; if it stays, report it", 1),
        }
    }

    /// The store's own error, whatever work it came through.
    fn store_error(&self) -> Option<&store::Error> {
        match self {
            Self::Store(error)
            | Self::Server(server::Error::Store(error))
            | Self::Fleet(fleet::Error::Store(error))
            | Self::Enrolment(enrolment::Error::Store(error))
            | Self::Auth(auth::Error::Store(error)) => Some(error),
            _ => None,
        }
    }

    /// Prints the failure and gives the exit code.
    pub(super) fn report(&self) -> ExitCode {
        let (code, next, exit) = self.verdict();
        eprintln!("hestner-receiver: {}\n  next: {next}\n  code: {code}", chain(self));
        ExitCode::from(exit)
    }
}

/// Shows clap's words; help and version are no failures.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    // Nothing more can be said to somebody whose terminal is gone.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(MEND) } else { ExitCode::SUCCESS }
}

pub(super) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    println!("{}", serde_json::to_string_pretty(value).map_err(Failure::Print)?);
    Ok(())
}

/// Columns as wide as their widest cell.
pub(super) fn print_table(heads: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let mut table: Vec<Vec<String>> = vec![heads.iter().map(ToString::to_string).collect()];
    table.extend(rows);
    let width = |column: usize| table.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..heads.len()).map(|column| width(column).unwrap_or(0)).collect();
    for row in &table {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}
