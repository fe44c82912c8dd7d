//! A repository that is open: its config and its keys, and its objects in the clear.
//!
//! The calls block. What is read is checked against its name before anybody sees it; what is written gets its
//! name from what it holds.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use crate::format::compress::{expand, unwrap_file, wrap_file};
use crate::format::config::Config;
use crate::format::crypto::{Cipher, NONCE_BYTES};
use crate::format::index::{Index, IndexedPack};
use crate::format::key::{Cost, KeyFile, Maker, MasterKey};
use crate::format::pack::{self, LENGTH_BYTES, PackedBlob};
use crate::format::{FormatError, Id, Timestamp};
use crate::platform::clock::Clock;
use crate::storage::{Kind, Object, Storage, StorageError};

use super::errors::EntryErrors;
use super::index::{BlobIndex, Location};

/// Longest file outside packs, as it is stored.
const FILE_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Longest key file and config.
const SMALL_BYTES_MAX: u64 = 64 * 1024;
/// How many key files are tried: each costs what scrypt costs.
pub(super) const KEYS_MAX: usize = 20;

/// An operation on an open repository that failed.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The place of its objects failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An object is not what it must be.
    #[error("{object} cannot be used")]
    Object {
        /// Which.
        object: String,
        /// Why.
        #[source]
        source: FormatError,
    },
    /// Something could not be written in the format.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// There is no repository.
    #[error("there is no repository at {0}")]
    None(String),
    /// There is one already.
    #[error("there is a repository at {0} already")]
    Exists(String),
    /// No key file opens with the password.
    #[error("the password does not open the repository at {0}")]
    WrongPassword(String),
    /// There are more key files than are tried, and none of those that were is ours: somebody lays foreign ones there.
    #[error(
        "none of the {tried} key files that were tried opens the repository at {place}, which has {keys}: remove those that are not \
         of this repository, and keep whoever lays them there from it"
    )]
    TooManyKeys {
        /// Where.
        place: String,
        /// How many there are.
        keys: usize,
        /// How many were tried.
        tried: usize,
    },
    /// Somebody else holds it.
    #[error("the repository is locked by {0}")]
    Locked(String),
    /// Our own lock could not be kept, so somebody may prune meanwhile.
    #[error("the lock on the repository could not be kept")]
    LockLost,
    /// No random numbers.
    #[error("no random numbers: {0}")]
    Random(String),
    /// Entries of the source could not be read; there is no snapshot.
    #[error("{} entries could not be read: {}", .0.unreadable, .0.names.join(", "))]
    Unreadable(EntryErrors),
    /// Whoever produced the stream failed; there is no snapshot.
    #[error("the stream did not end well: {0}")]
    Stream(String),
    /// The caller cancelled it; there is no snapshot.
    #[error("it was cancelled")]
    Cancelled,
    /// A part of this program failed.
    #[error("{0}")]
    Broken(String),
}

impl ArchiveError {
    /// Whether one object is missing, damaged or cannot be read, and others may be sound: a bad sector of a disk.
    pub fn is_of_one_object(&self) -> bool {
        match self {
            Self::Object { .. } | Self::Storage(StorageError::Missing(_) | StorageError::TooBig { .. }) => true,
            Self::Storage(StorageError::Failed { operation, .. }) => *operation == "read",
            _ => false,
        }
    }
}

/// Who works on a repository, as it is written into locks, keys and snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// The host's name.
    pub hostname: String,
    /// The user's name.
    pub username: String,
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Who {
    /// This process.
    pub fn this_process() -> Self {
        let uid = nix::unistd::getuid();
        let user = nix::unistd::User::from_uid(uid).ok().flatten();
        Self {
            hostname: nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            username: user.map(|user| user.name).unwrap_or_default(),
            uid: uid.as_raw(),
            gid: nix::unistd::getgid().as_raw(),
        }
    }
}

/// Now, as the format writes it.
pub(super) fn timestamp(clock: &dyn Clock) -> Timestamp {
    let now = clock.now();
    Timestamp { seconds: now.timestamp(), nanos: now.timestamp_subsec_nanos().min(999_999_999) }
}

/// Random bytes of the operating system.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ArchiveError> {
    let mut bytes = [0_u8; N];
    getrandom::fill(&mut bytes).map_err(|error| ArchiveError::Random(error.to_string()))?;
    Ok(bytes)
}

/// An open repository.
#[derive(Clone)]
pub struct Archive {
    storage: Arc<dyn Storage>,
    cipher: Arc<Cipher>,
    config: Config,
}

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Archive").field("place", &self.storage.place()).field("id", &self.config.id).finish()
    }
}

impl Archive {
    /// Makes a repository where there is none: a key file behind the password, then the config. A making that was
    /// broken off is gone on with: a second key file beside the first would open nothing, and restic would try it.
    ///
    /// # Errors
    /// [`ArchiveError::Exists`], also when there is data without a config; otherwise when the place fails.
    pub fn make(
        storage: Arc<dyn Storage>,
        password: &[u8],
        cost: Cost,
        who: &Who,
        clock: &dyn Clock,
    ) -> Result<Self, ArchiveError> {
        for kind in [Kind::Config, Kind::Pack, Kind::Index, Kind::Snapshot] {
            if !listed(storage.as_ref(), kind)?.is_empty() {
                return Err(ArchiveError::Exists(storage.place()));
            }
        }
        let master = match begun_key(storage.as_ref(), password)? {
            Some(master) => master,
            None => new_key(storage.as_ref(), password, cost, who, clock)?,
        };
        let config = Config::make(random()?, || random().map(u64::from_le_bytes))?;
        let cipher = Arc::new(master.cipher()?);
        let sealed = cipher.seal(&random()?, &config.to_bytes()?)?;
        storage.put(&Object::new(Kind::Config, "config"), &sealed)?;
        Ok(Self { storage, cipher, config })
    }

    /// Opens a repository.
    ///
    /// # Errors
    /// [`ArchiveError::None`], [`ArchiveError::WrongPassword`], [`ArchiveError::TooManyKeys`]; otherwise when the place
    /// fails or an object is damaged.
    pub fn open(storage: Arc<dyn Storage>, password: &[u8]) -> Result<Self, ArchiveError> {
        let config = Object::new(Kind::Config, "config");
        let sealed = match storage.get(&config, SMALL_BYTES_MAX) {
            Err(StorageError::Missing(_)) => return Err(ArchiveError::None(storage.place())),
            got => got?,
        };
        let (cipher, config) = unlock(storage.as_ref(), password, &sealed)?;
        Ok(Self { storage, cipher: Arc::new(cipher), config })
    }

    /// What it says of itself.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where its objects are.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    pub(super) fn cipher(&self) -> &Cipher {
        &self.cipher
    }

    /// A file outside packs, in the clear.
    ///
    /// # Errors
    /// When it cannot be had, or is damaged.
    pub fn read_file(&self, kind: Kind, id: &str) -> Result<Vec<u8>, ArchiveError> {
        let object = Object::new(kind, id);
        let sealed = self.storage.get(&object, FILE_BYTES_MAX)?;
        if Id::of(&sealed).to_hex() != id {
            return Err(unusable(&object)(FormatError::Forged("file")));
        }
        let plain = self.cipher.open("file", sealed).and_then(|plain| unwrap_file("file", plain));
        plain.map_err(unusable(&object))
    }

    /// Writes a file outside packs: its object, and how many bytes are stored.
    ///
    /// # Errors
    /// When the place fails.
    pub fn write_file(&self, kind: Kind, plain: &[u8]) -> Result<(Object, u64), ArchiveError> {
        let (object, sealed) = self.seal_file(kind, plain)?;
        self.storage.put(&object, &sealed)?;
        Ok((object, sealed.len() as u64))
    }

    /// As [`Self::write_file`], for what must not be there if this fails: after a put that failed the object may be
    /// there all the same, and is removed where that is allowed.
    ///
    /// # Errors
    /// As [`Self::write_file`].
    pub(super) fn write_file_or_withdraw(&self, kind: Kind, plain: &[u8]) -> Result<(Object, u64), ArchiveError> {
        let (object, sealed) = self.seal_file(kind, plain)?;
        if let Err(error) = self.storage.put(&object, &sealed) {
            self.withdraw(&object);
            return Err(error.into());
        }
        Ok((object, sealed.len() as u64))
    }

    /// Removes what must not be there, where that is allowed.
    pub(super) fn withdraw(&self, object: &Object) {
        let removed = self.storage.remove(object);
        tracing::warn!(event = "withdrawn", %object, removed = removed.is_ok());
    }

    fn seal_file(&self, kind: Kind, plain: &[u8]) -> Result<(Object, Vec<u8>), ArchiveError> {
        let nonce: [u8; NONCE_BYTES] = random()?;
        let sealed = self.cipher.seal(&nonce, &wrap_file(plain)?)?;
        Ok((Object::new(kind, Id::of(&sealed).to_hex()), sealed))
    }

    /// All index files as one index. Packs that are not there, or are shorter than what is said to lie in them,
    /// are left out: what they should hold counts as not stored.
    ///
    /// # Errors
    /// When the place fails, or an index is damaged.
    pub fn load_index(&self) -> Result<BlobIndex, ArchiveError> {
        Ok(self.load_index_files()?.0)
    }

    /// As [`Self::load_index`], with the names of the index files.
    pub(super) fn load_index_files(&self) -> Result<(BlobIndex, HashSet<String>), ArchiveError> {
        // In this order: whoever writes beside us puts packs before the index files that name them.
        let names = self.storage.list(Kind::Index)?;
        let packs = self.storage.list(Kind::Pack)?.into_iter();
        let index = BlobIndex::new(packs.filter_map(|(name, bytes)| Some((name.parse().ok()?, bytes))).collect());
        let mut loaded = HashSet::with_capacity(names.len());
        for (name, _) in names {
            self.add_index_file(&index, &name)?;
            loaded.insert(name);
        }
        Ok((index, loaded))
    }

    /// Takes in one index file.
    pub(super) fn add_index_file(&self, index: &BlobIndex, name: &str) -> Result<(), ArchiveError> {
        // Nobody prunes beside our lock, so that one which is missing is as bad as a damaged one.
        let bytes = self.read_file(Kind::Index, name)?;
        let parsed = Index::parse(&bytes).map_err(unusable(&Object::new(Kind::Index, name)))?;
        parsed.packs.iter().for_each(|pack: &IndexedPack| index.add_stored(pack));
        Ok(())
    }

    /// What a pack of so many bytes says of itself: its blobs, its sealed header, and the header's length.
    ///
    /// # Errors
    /// When it cannot be had, or its header does not open.
    pub(super) fn pack_end(&self, object: &Object, bytes: u64) -> Result<PackEnd, ArchiveError> {
        let wrong = |source| ArchiveError::Object { object: object.to_string(), source };
        let too_short = || wrong(FormatError::Damaged { what: "pack", why: "it is too short".to_owned() });
        let last_at = bytes.checked_sub(LENGTH_BYTES as u64).ok_or_else(too_short)?;
        let last = self.storage.get_range(object, last_at, LENGTH_BYTES as u64)?;
        let last = last.first_chunk().copied().ok_or_else(too_short)?;
        let header_bytes = u64::from(pack::header_length(last, bytes).map_err(wrong)?);
        let header = self.storage.get_range(object, last_at - header_bytes, header_bytes)?;
        let blobs = pack::parse(&self.cipher, header.clone(), bytes).map_err(wrong)?;
        Ok(PackEnd { blobs, header, last })
    }

    /// A blob in the clear, out of its stored bytes; checked against its name.
    ///
    /// # Errors
    /// When it is not what it must be.
    pub(super) fn open_blob(&self, id: &Id, at: &Location, sealed: Vec<u8>) -> Result<Vec<u8>, ArchiveError> {
        let plain = self.cipher.open("blob", sealed).and_then(|plain| match at.raw_length {
            Some(length) => expand("blob", &plain, length as usize),
            None => Ok(plain),
        });
        let plain = plain.and_then(|plain| match Id::of(&plain) == *id {
            true => Ok(plain),
            false => Err(FormatError::Forged("blob")),
        });
        plain.map_err(unusable(&Object::new(Kind::Pack, at.pack.to_hex())))
    }
}

/// The end of a pack.
pub(super) struct PackEnd {
    /// What lies in it.
    pub(super) blobs: Vec<PackedBlob>,
    /// As it is stored.
    pub(super) header: Vec<u8>,
    /// The header's length, as it is stored.
    pub(super) last: [u8; LENGTH_BYTES],
}

fn unusable(object: &Object) -> impl Fn(FormatError) -> ArchiveError + '_ {
    |source| ArchiveError::Object { object: object.to_string(), source }
}

/// The objects of a kind, at a place where nobody has stored anything perhaps.
fn listed(storage: &dyn Storage, kind: Kind) -> Result<Vec<(String, u64)>, StorageError> {
    match storage.list(kind) {
        Err(StorageError::NoRoot(_)) => Ok(Vec::new()),
        listed => listed,
    }
}

/// The key of a making that was broken off before the config. Key files that the password does not open are removed:
/// without a config they open nothing.
fn begun_key(storage: &dyn Storage, password: &[u8]) -> Result<Option<MasterKey>, ArchiveError> {
    for (name, _) in listed(storage, Kind::Key)? {
        let object = Object::new(Kind::Key, name);
        let bytes = storage.get(&object, SMALL_BYTES_MAX)?;
        match KeyFile::parse(&bytes).and_then(|key| key.open(password)) {
            Ok(key) => return Ok(Some(key)),
            Err(_) => storage.remove(&object)?,
        }
    }
    Ok(None)
}

fn new_key(
    storage: &dyn Storage,
    password: &[u8],
    cost: Cost,
    who: &Who,
    clock: &dyn Clock,
) -> Result<MasterKey, ArchiveError> {
    let master = MasterKey::new(random()?);
    let maker = Maker {
        created: timestamp(clock).to_string(),
        username: who.username.clone(),
        hostname: who.hostname.clone(),
        salt: random()?,
        nonce: random()?,
    };
    let key = KeyFile::make(&master, password, cost, maker)?.to_bytes()?;
    storage.put(&Object::new(Kind::Key, Id::of(&key).to_hex()), &key)?;
    Ok(master)
}

/// Tries the password on key file after key file, and what it opens on the config: whoever may write here may have
/// put a key file of another repository, or one of their own, that the password opens as well. One that is damaged or
/// strange does not hide another.
fn unlock(storage: &dyn Storage, password: &[u8], sealed: &[u8]) -> Result<(Cipher, Config), ArchiveError> {
    let config = Object::new(Kind::Config, "config");
    let mut hindered = None;
    let listed = storage.list(Kind::Key)?;
    let keys = listed.len();
    for (name, _) in listed.into_iter().take(KEYS_MAX) {
        let object = Object::new(Kind::Key, name);
        let bytes = storage.get(&object, SMALL_BYTES_MAX)?;
        let key = match KeyFile::parse(&bytes).and_then(|key| key.open(password)) {
            Ok(key) => key,
            Err(FormatError::WrongPassword) => continue,
            Err(error) => {
                hindered.get_or_insert(unusable(&object)(error));
                continue;
            }
        };
        let cipher = key.cipher()?;
        match cipher.open("config", sealed.to_vec()).and_then(|plain| Config::parse(&plain)) {
            Ok(config) => return Ok((cipher, config)),
            // This says more than a key file that is damaged.
            Err(error) => hindered = Some(unusable(&config)(error)),
        }
    }
    let place = || storage.place();
    Err(match hindered {
        _ if keys > KEYS_MAX => ArchiveError::TooManyKeys { place: place(), keys, tried: KEYS_MAX },
        Some(error) => error,
        None => ArchiveError::WrongPassword(place()),
    })
}
