//! Objects of a repository at their place: whole, named, written once.
//!
//! In: the bytes of an object and its name. Out: the same bytes, or an error that says which object and why.
//! What an object means is not known here. An object is durable when [`Storage::put`] returns: it is there
//! under its name as a whole or not at all, whatever dies meanwhile. Nothing is ever overwritten, and a
//! listing that is not whole is an error and no shorter listing.
//!
//! The calls block; whoever needs them in parallel calls them from several threads.

pub mod fault;
mod folder;
mod remote;
mod retry;
mod s3;
mod sftp;
mod transport;

use std::fmt;

use hestner_proto::sha256;

pub use folder::Folder;
pub use retry::Limits;
pub use s3::{Credentials, S3Place, s3};
pub use sftp::{SSH, SftpPlace, sftp};

/// What an object is for; decides the folder that it lies in, as restic's format has it
/// (<https://restic.readthedocs.io/en/stable/100_references.html>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The one `config` at the root.
    Config,
    /// The repository's password, wrapped for the company's recovery key: the one `hestner-key.age` at the root. Not
    /// of restic's format, which stops at a key file that it does not know, and at no other file.
    WrappedKey,
    /// A key file.
    Key,
    /// Who uses the repository now.
    Lock,
    /// A snapshot.
    Snapshot,
    /// Which blob lies in which pack.
    Index,
    /// Blobs.
    Pack,
}

impl Kind {
    /// Its folder below the repository's root; empty for the root itself.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Config | Self::WrappedKey => "",
            Self::Key => "keys",
            Self::Lock => "locks",
            Self::Snapshot => "snapshots",
            Self::Index => "index",
            Self::Pack => "data",
        }
    }

    /// The one name that an object of this kind has; `None`: each has its own.
    pub fn only_name(self) -> Option<&'static str> {
        match self {
            Self::Config => Some("config"),
            Self::WrappedKey => Some("hestner-key.age"),
            _ => None,
        }
    }
}

/// An object's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Object {
    /// What it is for.
    pub kind: Kind,
    /// 64 hex digits; [`Kind::only_name`] where there is one.
    pub name: String,
}

impl Object {
    /// An object of a kind.
    pub fn new(kind: Kind, name: impl Into<String>) -> Self {
        Self { kind, name: name.into() }
    }

    /// The one object of a kind that has only one.
    pub fn only(kind: Kind) -> Option<Self> {
        kind.only_name().map(|name| Self::new(kind, name))
    }

    /// Whether the name is one that an object of its kind can have: 64 lower-case hex digits, or the only name. All
    /// others would lead elsewhere, or to nothing that restic reads.
    pub fn is_well_named(&self) -> bool {
        match self.kind.only_name() {
            Some(name) => self.name == name,
            None => self.name.len() == 64 && self.name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')),
        }
    }

    fn check_name(&self, operation: &'static str) -> Result<(), StorageError> {
        match self.is_well_named() {
            true => Ok(()),
            false => Err(failed(operation, self, "it has no object's name")),
        }
    }

    /// Its path below the repository's root, with `/` between the parts. Packs lie in folders of the first two
    /// digits of their names.
    pub fn path(&self) -> String {
        match self.kind {
            Kind::Config | Kind::WrappedKey => self.name.clone(),
            Kind::Pack => format!("data/{}/{}", self.name.get(..2).unwrap_or_default(), self.name),
            kind => format!("{}/{}", kind.folder(), self.name),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

/// An object that could not be put, had or listed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// There is no such object.
    #[error("there is no {0}")]
    Missing(Object),
    /// The folder of the whole repository is not there.
    #[error("there is no folder {0}")]
    NoRoot(String),
    /// There is one of that name already, and nothing is overwritten.
    #[error("{0} is there already")]
    Exists(Object),
    /// It is bigger than it may be.
    #[error("{object} has {bytes} bytes, more than the {bytes_max} that it may have")]
    TooBig {
        /// Which.
        object: Object,
        /// How big it is.
        bytes: u64,
        /// How big it may be.
        bytes_max: u64,
    },
    /// No room is left at the destination.
    #[error("no room is left for {0}")]
    Full(Object),
    /// It failed, and trying again did not help.
    #[error("cannot {operation} {what}: {reason}")]
    Failed {
        /// A verb.
        operation: &'static str,
        /// An object or a folder.
        what: String,
        /// Why, in the words of the operating system or the server. Never holds a secret.
        reason: String,
    },
}

fn failed(operation: &'static str, what: impl fmt::Display, reason: impl fmt::Display) -> StorageError {
    StorageError::Failed { operation, what: what.to_string(), reason: reason.to_string() }
}

fn too_short(object: &Object, offset: u64, length: u64, bytes: u64) -> StorageError {
    let reason = format!("it has {bytes} bytes, and {length} from byte {offset} on were asked for");
    failed("read", object, reason)
}

/// What a place has of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How many bytes it has.
    pub bytes: u64,
    /// Their SHA-256.
    pub sha256: [u8; 32],
}

impl Seen {
    fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, sha256: sha256::of(bytes) }
    }
}

/// A place for objects.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Where it is, for people; without secrets.
    fn place(&self) -> String;

    /// What the caller should know about this place, as one sentence: that durability cannot be known there.
    fn remark(&self) -> Option<String> {
        None
    }

    /// Stores an object. It is durable when this returns; after an error it may or may not be there, but never in
    /// part. An object that is there with the same bytes is stored already: whoever died, or lost an answer, puts
    /// it once more.
    ///
    /// # Errors
    /// [`StorageError::Exists`] when there is one of that name with other bytes; what hinders it otherwise.
    fn put(&self, object: &Object, bytes: &[u8]) -> Result<(), StorageError>;

    /// The whole of an object.
    ///
    /// # Errors
    /// When it is missing, bigger than `bytes_max`, or cannot be read.
    fn get(&self, object: &Object, bytes_max: u64) -> Result<Vec<u8>, StorageError>;

    /// Size and SHA-256 of the whole of an object as the place has it, and not as this host remembers having written it.
    ///
    /// # Errors
    /// As [`Storage::get`].
    fn read_back(&self, object: &Object, bytes_max: u64) -> Result<Seen, StorageError> {
        Ok(Seen::of(&self.get(object, bytes_max)?))
    }

    /// A part of an object: exactly `length` bytes.
    ///
    /// # Errors
    /// When it is missing, too short, or cannot be read.
    fn get_range(&self, object: &Object, offset: u64, length: u64) -> Result<Vec<u8>, StorageError>;

    /// Names and sizes of all objects of a kind. What has no object's name is left out.
    ///
    /// # Errors
    /// When any part of the listing cannot be had. A kind without any object is an empty listing.
    fn list(&self, kind: Kind) -> Result<Vec<(String, u64)>, StorageError>;

    /// Removes an object. One that is not there is fine.
    ///
    /// # Errors
    /// When it cannot be removed.
    fn remove(&self, object: &Object) -> Result<(), StorageError>;
}
