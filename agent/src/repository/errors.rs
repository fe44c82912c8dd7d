//! What can go wrong with a repository, each with its stable class.

use std::path::{Path, PathBuf};

use hestner_proto::words::ErrorClass;

use super::open::ArchiveError;
use super::restore::RestoreError;
use super::verify::VerifyError;
use crate::platform::files::FileError;
use crate::storage::StorageError;

/// Entries of a source that the archiver stumbled over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryErrors {
    /// Could not be read or listed.
    pub unreadable: u64,
    /// Went away before they were read.
    pub vanished: u64,
    /// The first of the unreadable ones.
    pub names: Vec<String>,
}

/// An operation on a repository that failed.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// The destination's folder does not exist.
    #[error("the destination's folder {0} does not exist; is its disk mounted?")]
    NoFolder(PathBuf),
    /// A repository that was there before is not.
    #[error("the repository {0} was there before and is not now; is its disk mounted?")]
    Gone(String),
    /// A repository is there, but the file with its password is not.
    #[error("there is a repository but no password file {0}")]
    NoPassword(PathBuf),
    /// The password does not open the repository.
    #[error("the password in {0} does not open the repository")]
    WrongKey(PathBuf),
    /// Somebody else holds the repository.
    #[error("the repository is locked by somebody else: {0}")]
    Locked(String),
    /// Entries could not be read; nothing was kept.
    #[error("{} could not be read: {}", entries(.0.unreadable), .0.names.join(", "))]
    Unreadable(EntryErrors),
    /// The caller cancelled it.
    #[error("it was cancelled")]
    Cancelled,
    /// The archive engine failed.
    #[error(transparent)]
    Archive(ArchiveError),
    /// A restore did not end well.
    #[error(transparent)]
    Restore(RestoreError),
    /// The repository is not whole.
    #[error(transparent)]
    Damaged(VerifyError),
    /// The repository is not as it must be.
    #[error("{0}")]
    Surprise(String),
    /// The recovery key cannot be used.
    #[error("the company's recovery key cannot be used: {0}")]
    RecoveryKey(String),
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// One of the host's own files about it could not: its password, its id.
    #[error(transparent)]
    OwnFile(FileError),
}

impl From<ArchiveError> for RepositoryError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Locked(by) => Self::Locked(by),
            ArchiveError::Unreadable(entries) => Self::Unreadable(entries),
            ArchiveError::Cancelled => Self::Cancelled,
            other => Self::Archive(other),
        }
    }
}

impl From<RestoreError> for RepositoryError {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Archive(error) => error.into(),
            RestoreError::Cancelled => Self::Cancelled,
            other => Self::Restore(other),
        }
    }
}

fn archive_class(error: &ArchiveError) -> ErrorClass {
    match error {
        ArchiveError::Storage(StorageError::Full(_)) => ErrorClass::DestinationFull,
        ArchiveError::Storage(_)
        | ArchiveError::None(_)
        | ArchiveError::Exists(_)
        | ArchiveError::TooManyKeys { .. }
        | ArchiveError::LockLost => ErrorClass::RepositoryUnavailable,
        ArchiveError::WrongPassword(_) => ErrorClass::RepositoryWrongKey,
        ArchiveError::Locked(_) => ErrorClass::RepositoryUnavailable,
        ArchiveError::Unreadable(_) => ErrorClass::SourceUnreadable,
        ArchiveError::Stream(_) => ErrorClass::ProducerFailed,
        ArchiveError::Cancelled => ErrorClass::Cancelled,
        ArchiveError::Object { .. } => ErrorClass::VerifyFailed,
        ArchiveError::Format(_) | ArchiveError::Random(_) | ArchiveError::Broken(_) => ErrorClass::ArchiverFailed,
    }
}

fn entries(count: u64) -> String {
    if count == 1 { "1 entry".to_owned() } else { format!("{count} entries") }
}

impl RepositoryError {
    /// Tells files below the host's own folder from those of the destination: room is to be made elsewhere.
    pub(super) fn own_below(self, folder: &Path) -> Self {
        match self {
            Self::File(error) if error.path.starts_with(folder) => Self::OwnFile(error),
            other => other,
        }
    }

    /// Whether there is no repository where one was looked for.
    pub(super) fn is_no_repository(&self) -> bool {
        matches!(self, Self::Archive(ArchiveError::None(_) | ArchiveError::Storage(StorageError::NoRoot(_))))
    }

    /// The stable class.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::NoFolder(_) | Self::Gone(_) | Self::Locked(_) | Self::RecoveryKey(_) => {
                ErrorClass::RepositoryUnavailable
            }
            Self::NoPassword(_) | Self::WrongKey(_) => ErrorClass::RepositoryWrongKey,
            Self::File(error) if error.is_full() => ErrorClass::DestinationFull,
            Self::OwnFile(error) if error.is_full() => ErrorClass::StateFull,
            Self::OwnFile(_) => ErrorClass::StateUnusable,
            Self::Unreadable(_) => ErrorClass::SourceUnreadable,
            Self::Cancelled => ErrorClass::Cancelled,
            Self::Archive(error) => archive_class(error),
            Self::Damaged(_) | Self::Restore(RestoreError::Incomplete { .. } | RestoreError::Endless { .. }) => {
                ErrorClass::VerifyFailed
            }
            Self::Restore(_) => ErrorClass::ArchiverFailed,
            Self::File(_) => ErrorClass::RepositoryUnavailable,
            Self::Surprise(_) => ErrorClass::ArchiverFailed,
        }
    }
}
