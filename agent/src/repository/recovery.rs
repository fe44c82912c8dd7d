//! A repository on a host that never knew it: opened with the company's recovery key, or with its password.
//!
//! In: the place as a destination's settings name it, and a [`Key`]. Out: an open repository, and what can be done with
//! one whose server is gone: list, restore, verify. The wrapped key lies at the repository's root, or is brought by hand
//! (the receiver keeps a copy). Nothing of this host is needed: no settings, no state, no receiver. The calls block.
//!
//! Never: a secret in an error or in `Debug`; a folder made where none is; a password that was not asked for tried on
//! a repository. Whoever can write at the place can lay another repository there with a key of its own that the same
//! recovery key opens: age says for whom something is, and not from whom. The repository's id, which the receiver
//! knows, tells them apart.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use age::x25519::Identity;
use hestner_proto::words::ErrorClass;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::keys::{self, KEY_BYTES_MAX};
use super::open::{Archive, ArchiveError};
use super::snapshots::{self, Listed};
use super::verify::{self, Extent, Verified};
use super::{RepositoryError, own, place, reading, restore};
use crate::platform::files::{self, FileError};
use crate::platform::trust::{self, Distrust};
use crate::policy::{DestinationKind, DestinationSettings};
use crate::storage::{Folder, Limits, Storage, StorageError};

/// Longest file with recovery keys: a rotation leaves a handful.
const RECOVERY_KEY_BYTES_MAX: u64 = 64 * 1024;
/// Longest settings of a place.
const PLACE_BYTES_MAX: u64 = 64 * 1024;
/// Most repositories of a folder that are named to whoever named the folder above them.
const NEIGHBOURS_MAX: usize = 20;

/// A repository that could not be recovered from.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The file with the place's settings has mistakes.
    #[error("{path}: {}", .mistakes.join("; "))]
    Place {
        /// The file, or what was typed.
        path: PathBuf,
        /// Each as a sentence.
        mistakes: Vec<String>,
    },
    /// A file with a secret is not believed, or cannot be read.
    #[error(transparent)]
    Secret(#[from] Distrust),
    /// The wrapped key's file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The recovery key is itself encrypted.
    #[error("{0} is encrypted itself")]
    Protected(PathBuf),
    /// The file holds no recovery key.
    #[error("{0} holds no line AGE-SECRET-KEY-1... that can be understood")]
    NoRecoveryKey(PathBuf),
    /// There is nothing to unwrap.
    #[error("there is no hestner-key.age at {0}")]
    NoWrappedKey(String),
    /// What should be a wrapped key is none.
    #[error("the wrapped key of {place} cannot be used: {reason}")]
    DamagedKey {
        /// Where it lies.
        place: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It was wrapped for somebody else.
    #[error("the wrapped key of {0} is for another recovery key")]
    ForeignKey(String),
    /// What was unwrapped, or typed, does not open the repository.
    #[error("the key does not open the repository at {0}")]
    WrongPassword(String),
    /// There is no repository; perhaps there are some below.
    #[error("there is no repository at {place}{}", hint(.below))]
    NoRepository {
        /// Where.
        place: String,
        /// Names of repositories in the folder.
        below: Vec<String>,
    },
    /// There is no such snapshot, or several.
    #[error("{0}")]
    NoSnapshot(String),
    /// The repository could not be read.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
}

fn hint(below: &[String]) -> String {
    if below.is_empty() { String::new() } else { format!("; below it there are: {}", below.join(", ")) }
}

impl RecoveryError {
    /// Stable code.
    pub fn code(&self) -> &str {
        match self {
            Self::Place { .. } => "place_invalid",
            Self::Secret(_) => "secret_not_believed",
            Self::File(_) => "file_unreadable",
            Self::Protected(_) => "recovery_key_protected",
            Self::NoRecoveryKey(_) => "recovery_key_malformed",
            Self::NoWrappedKey(_) => "wrapped_key_missing",
            Self::DamagedKey { .. } => "wrapped_key_damaged",
            Self::ForeignKey(_) => "recovery_key_wrong",
            Self::WrongPassword(_) => "repository_wrong_key",
            Self::NoRepository { .. } => "repository_missing",
            Self::NoSnapshot(_) => "unknown_snapshot",
            Self::Repository(error) => error.class().as_str(),
        }
    }

    /// What a person should do next.
    pub fn next_step(&self) -> &str {
        const WITHOUT: &str =
            "bring the receiver's copy (`hestner-receiver keys export`) and name it with --wrapped-key";
        match self {
            Self::Place { .. } => {
                "mend it: the keys of a [[destination]] in agent.toml, and `repository = \"server-12-encrypted\"`"
            }
            Self::Secret(_) => {
                "put it into a folder that only you can write, such as /root, give it to you, and `chmod 600` it"
            }
            Self::File(_) => "name a file that is there and that you can read",
            Self::Protected(_) => "decrypt it first: `age -d -o recovery.key FILE`, in a folder that only you can read",
            Self::NoRecoveryKey(_) => "name the file that `age-keygen -o` wrote, not the public half",
            Self::NoWrappedKey(_) | Self::DamagedKey { .. } => WITHOUT,
            Self::ForeignKey(_) => {
                "name the recovery key of the company whose server this was; if it is that one, somebody has laid \
                 another wrapped key there: bring the receiver's copy and name it with --wrapped-key"
            }
            Self::WrongPassword(_) => "name the wrapped key, or the password, of this very repository",
            Self::NoRepository { .. } => "name the folder that holds the file `config`",
            Self::NoSnapshot(_) => "`hestner-agent recover list` shows them",
            Self::Repository(error) => error.class().next_step(),
        }
    }

    /// Whether a person has to mend something before it can work.
    pub fn needs_operator(&self) -> bool {
        match self {
            Self::Repository(error) => error.class().needs_operator(),
            _ => true,
        }
    }
}

impl From<ArchiveError> for RecoveryError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::WrongPassword(place) => Self::WrongPassword(place),
            ArchiveError::None(place) => Self::NoRepository { place, below: Vec::new() },
            other => Self::Repository(other.into()),
        }
    }
}

impl From<StorageError> for RecoveryError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::NoRoot(place) => Self::NoRepository { place, below: Vec::new() },
            other => ArchiveError::from(other).into(),
        }
    }
}

/// Where one repository lies.
#[derive(Clone, Debug)]
pub struct Place {
    /// What holds it.
    pub destination: DestinationSettings,
    /// Its name there, such as `server-12-encrypted`.
    pub repository: String,
}

impl Place {
    /// A folder of this machine that is a repository.
    ///
    /// # Errors
    /// When its path cannot be that of a repository.
    pub fn folder(path: &Path) -> Result<Self, RecoveryError> {
        let invalid =
            |mistake: &str| RecoveryError::Place { path: path.to_owned(), mistakes: vec![mistake.to_owned()] };
        let absolute = std::path::absolute(path).map_err(|_| invalid("it is no path"))?;
        let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name().and_then(|name| name.to_str()))
        else {
            return Err(invalid("it is not the path of a folder with a name in UTF-8"));
        };
        let destination = DestinationSettings { path: parent.to_owned(), ..DestinationSettings::default() };
        Ok(Self { destination, repository: name.to_owned() })
    }

    /// Reads a file with the keys of a `[[destination]]` and `repository`.
    ///
    /// # Errors
    /// When the file is not believed, or has mistakes: all of them are named.
    pub fn read(path: &Path) -> Result<Self, RecoveryError> {
        let text = trust::read_text(&absolute(path), PLACE_BYTES_MAX)?;
        Self::parse(&text).map_err(|mistakes| RecoveryError::Place { path: path.to_owned(), mistakes })
    }

    fn parse(text: &str) -> Result<Self, Vec<String>> {
        let mut table: toml::Table = toml::from_str(text).map_err(|error| vec![error.message().to_owned()])?;
        let repository = match table.remove("repository") {
            Some(toml::Value::String(name)) => name,
            _ => return Err(vec!["`repository` is missing: the repository's name, as text".to_owned()]),
        };
        table.entry("name").or_insert_with(|| "place".into());
        let destination: DestinationSettings = table.try_into().map_err(|error| vec![error.message().to_owned()])?;
        let mut mistakes = destination.mistakes();
        let is_of_a_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if repository.is_empty() || repository.starts_with('.') || !repository.chars().all(is_of_a_name) {
            mistakes.push(format!("`repository` has letters, digits, `_`, `.`, `-`: `{repository}`"));
        }
        if mistakes.is_empty() { Ok(Self { destination, repository }) } else { Err(mistakes) }
    }

    /// Its objects. A folder that is not there is not made.
    ///
    /// # Errors
    /// When there is no such folder, or credentials are not believed.
    pub fn storage(&self) -> Result<Arc<dyn Storage>, RecoveryError> {
        if self.destination.kind == DestinationKind::Folder {
            return Ok(Arc::new(Folder::open(&self.destination.path.join(&self.repository))?));
        }
        Ok(Arc::from(place::open(&self.destination, &self.repository, &Limits::default())?))
    }

    /// Repositories in the folder that was taken for one.
    fn below(&self) -> Vec<String> {
        let entries = match self.destination.folder() {
            Some(folder) => std::fs::read_dir(folder.join(&self.repository)),
            None => return Vec::new(),
        };
        let is_one = |entry: &std::fs::DirEntry| entry.path().join("config").is_file();
        let found = entries.into_iter().flatten().flatten().filter(is_one);
        let mut names: Vec<String> = found.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names.truncate(NEIGHBOURS_MAX);
        names
    }
}

fn absolute(path: &Path) -> PathBuf {
    // What cannot be made absolute is refused by whoever checks it.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// What opens a repository. `Debug` shows nothing of it.
pub enum Key {
    /// The company's recovery key, and the wrapped key if it was brought by hand.
    Recovery {
        /// One, or several after a change.
        identities: Vec<Identity>,
        /// `None`: the one at the repository's root.
        wrapped: Option<Vec<u8>>,
    },
    /// The password.
    Password(Zeroizing<Vec<u8>>),
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Recovery { .. } => "Recovery(..)",
            Self::Password(_) => "Password(..)",
        })
    }
}

impl Key {
    /// Reads the secret half of a recovery key, as `age-keygen` wrote it, and perhaps a wrapped key.
    ///
    /// # Errors
    /// When a file is not believed, is encrypted itself, or holds something else.
    pub fn recovery(recovery_key: &Path, wrapped: Option<&Path>) -> Result<Self, RecoveryError> {
        let text =
            trust::read_secret(&absolute(recovery_key), RECOVERY_KEY_BYTES_MAX).map_err(|error| match error {
                // age's own files are not UTF-8.
                Distrust::File(e) if e.source.kind() == std::io::ErrorKind::InvalidData => {
                    RecoveryError::Protected(recovery_key.to_owned())
                }
                other => other.into(),
            })?;
        let identities = identities(&text).map_err(|what| match what {
            NoIdentity::Protected => RecoveryError::Protected(recovery_key.to_owned()),
            NoIdentity::None => RecoveryError::NoRecoveryKey(recovery_key.to_owned()),
        })?;
        // It opens for nobody but the recovery key, so that it may lie anywhere.
        let wrapped = wrapped.map(|path| files::read(path, KEY_BYTES_MAX)).transpose()?;
        Ok(Self::Recovery { identities, wrapped })
    }

    /// Reads a password.
    ///
    /// # Errors
    /// When the file is not believed.
    pub fn password(path: &Path) -> Result<Self, RecoveryError> {
        let text = trust::read_secret(&absolute(path), KEY_BYTES_MAX)?;
        Ok(Self::Password(Zeroizing::new(text.trim().as_bytes().to_vec())))
    }

    fn password_for(&self, storage: &dyn Storage) -> Result<Zeroizing<Vec<u8>>, RecoveryError> {
        match self {
            Self::Password(password) => Ok(password.clone()),
            Self::Recovery { identities, wrapped: Some(wrapped) } => unwrap(wrapped, identities, &storage.place()),
            Self::Recovery { identities, wrapped: None } => {
                let lying = keys::lying_at(storage).map_err(|error| match error {
                    StorageError::TooBig { .. } => {
                        RecoveryError::DamagedKey { place: storage.place(), reason: "it is too big" }
                    }
                    other => other.into(),
                })?;
                let wrapped = lying.ok_or_else(|| RecoveryError::NoWrappedKey(storage.place()))?;
                unwrap(&wrapped, identities, &storage.place())
            }
        }
    }
}

enum NoIdentity {
    Protected,
    None,
}

fn identities(text: &str) -> Result<Vec<Identity>, NoIdentity> {
    if text.starts_with("age-encryption.org/") || text.contains("-----BEGIN AGE ENCRYPTED FILE-----") {
        return Err(NoIdentity::Protected);
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let found: Result<Vec<Identity>, _> = lines.map(str::parse).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(NoIdentity::None),
    }
}

fn unwrap(wrapped: &[u8], identities: &[Identity], place: &str) -> Result<Zeroizing<Vec<u8>>, RecoveryError> {
    use age::DecryptError as E;
    let damaged = |reason| Err(RecoveryError::DamagedKey { place: place.to_owned(), reason });
    for identity in identities {
        let plain = match age::decrypt(identity, wrapped) {
            Ok(plain) => Zeroizing::new(plain),
            Err(E::NoMatchingKeys) => continue,
            Err(E::InvalidHeader | E::UnknownFormat) => return damaged("it is no file of age's"),
            Err(_) => return damaged("it was changed after it was wrapped"),
        };
        let password = plain.trim_ascii();
        // Passwords are hex; one that a person chose may be more, but is a line.
        return match password.is_empty() || password.iter().any(u8::is_ascii_control) {
            true => damaged("what it holds is no password"),
            false => Ok(Zeroizing::new(password.to_vec())),
        };
    }
    Err(RecoveryError::ForeignKey(place.to_owned()))
}

/// A repository that was opened, with the password that opened it.
pub struct Recovered {
    archive: Archive,
    password: Zeroizing<Vec<u8>>,
    lock_wait: Duration,
}

impl std::fmt::Debug for Recovered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recovered").field("archive", &self.archive).finish_non_exhaustive()
    }
}

/// How far restoring or verifying is; others may read it at any time.
#[derive(Debug, Default)]
pub struct Counters {
    /// Of a restore.
    pub restore: restore::Counters,
    /// Of a verification.
    pub verify: verify::Counters,
}

impl Recovered {
    /// Opens a repository. Whoever removes from it is waited for as long as `lock_wait`.
    ///
    /// # Errors
    /// When there is none, or the key does not open it.
    pub fn open(place: &Place, key: &Key, lock_wait: Duration) -> Result<Self, RecoveryError> {
        let opened = Self::try_open(place, key, lock_wait);
        opened.map_err(|error| match error {
            RecoveryError::NoRepository { place: shown, .. } => {
                RecoveryError::NoRepository { place: shown, below: place.below() }
            }
            other => other,
        })
    }

    fn try_open(place: &Place, key: &Key, lock_wait: Duration) -> Result<Self, RecoveryError> {
        let storage = place.storage()?;
        // Otherwise a folder that holds none would be one whose key is missing.
        if storage.list(crate::storage::Kind::Config)?.is_empty() {
            return Err(RecoveryError::NoRepository { place: storage.place(), below: Vec::new() });
        }
        let password = key.password_for(storage.as_ref())?;
        let archive = Archive::open(storage, &password)?;
        Ok(Self { archive, password, lock_wait })
    }

    /// The repository's id.
    pub fn id(&self) -> &str {
        &self.archive.config().id
    }

    /// Where it is, for people.
    pub fn shown_place(&self) -> String {
        self.archive.storage().place()
    }

    /// Every snapshot, the oldest first.
    ///
    /// # Errors
    /// When any cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, RecoveryError> {
        Ok(snapshots::list(&self.archive)?)
    }

    /// The snapshot with that id, with an id that begins so, or of that run.
    ///
    /// # Errors
    /// [`RecoveryError::NoSnapshot`] unless it is exactly one.
    pub fn find(&self, text: &str) -> Result<Listed, RecoveryError> {
        pick(self.list()?, text)
    }

    /// Writes a snapshot's tree below `target`. Returns what this user or filesystem could not set, as sentences.
    ///
    /// # Errors
    /// When anything could not be written as it was stored.
    pub fn restore(
        &self,
        snapshot: &Listed,
        target: &Path,
        counters: &Counters,
        cancel: &AtomicBool,
    ) -> Result<Vec<String>, RecoveryError> {
        let _lock = own::locked_to_read(&self.archive, self.give_up())?;
        Ok(reading::restore(&self.archive, &snapshot.id, target, &counters.restore, cancel)?)
    }

    /// Looks at the structure, and reads so much of the data back.
    ///
    /// # Errors
    /// When anything is damaged.
    pub fn verify(&self, extent: Extent, counters: &Counters, cancel: &AtomicBool) -> Result<Verified, RecoveryError> {
        let _lock = own::locked_to_read(&self.archive, self.give_up())?;
        Ok(reading::verify(&self.archive, extent, &counters.verify, cancel)?)
    }

    pub(super) fn archive(&self) -> &Archive {
        &self.archive
    }

    pub(super) fn password(&self) -> &[u8] {
        &self.password
    }

    pub(super) fn lock_wait(&self) -> Duration {
        self.lock_wait
    }

    pub(super) fn give_up(&self) -> Instant {
        Instant::now() + self.lock_wait
    }
}

/// Shortest beginning of an id that counts, as restic shows them.
const PREFIX_MIN: usize = 8;

pub(super) fn pick(all: Vec<Listed>, text: &str) -> Result<Listed, RecoveryError> {
    let is_meant = |listed: &Listed| {
        let begins = text.len() >= PREFIX_MIN && listed.id.to_hex().starts_with(text);
        begins || !text.is_empty() && listed.run_uid() == text
    };
    let mut found = all.into_iter().filter(is_meant);
    match (found.next(), found.next()) {
        (Some(listed), None) => Ok(listed),
        (None, _) => Err(RecoveryError::NoSnapshot(format!("there is no snapshot `{text}` in the repository"))),
        (Some(_), Some(_)) => Err(RecoveryError::NoSnapshot(format!("several snapshots are called `{text}`"))),
    }
}

/// Whether an error says that stored bytes are wrong, rather than that they could not be reached.
pub fn is_damage(error: &RecoveryError) -> bool {
    matches!(error, RecoveryError::Repository(e) if e.class() == ErrorClass::VerifyFailed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::storage::{Kind, Object};

    fn trusted_folder() -> tempfile::TempDir {
        // Not below /tmp, which everybody can write.
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    fn file(folder: &Path, name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path = folder.join(name);
        files::write(&path, content, mode).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn secret(identity: &Identity) -> String {
        use age::secrecy::ExposeSecret as _;
        format!("# created: today\n{}\n", identity.to_string().expose_secret())
    }

    #[test]
    fn place_has_the_words_of_a_destination_and_a_repository() {
        let place = Place::parse("kind = \"folder\"\npath = \"/mnt\"\nrepository = \"server-1-encrypted\"").unwrap();
        assert_eq!(place.destination.path.join(&place.repository), Path::new("/mnt/server-1-encrypted"));
        for (text, part) in [
            ("kind = \"folder\"\npath = \"/mnt\"", "`repository` is missing"),
            ("kind = \"folder\"\npath = \"mnt\"\nrepository = \"a/b\"", "must be absolute"),
            ("kind = \"folder\"\npath = \"/mnt\"\nrepository = \"..\"", "`repository` has"),
            ("kind = \"floppy\"\nrepository = \"a\"", "floppy"),
            ("kind = \"folder\"\npath = \"/mnt\"\nrepository = \"a\"\nsecret = 1", "unknown field"),
        ] {
            let mistakes = Place::parse(text).unwrap_err().join("; ");
            assert!(mistakes.contains(part), "{text}: {mistakes}");
        }
    }

    #[test]
    fn recovery_key_is_read_where_only_its_owner_can_read_it_and_is_never_shown() {
        let folder = trusted_folder();
        let identity = Identity::generate();
        let good = file(folder.path(), "good", secret(&identity).as_bytes(), 0o600);
        let key = Key::recovery(&good, None).unwrap();
        assert_eq!(format!("{key:?}"), "Recovery(..)");
        let open = file(folder.path(), "open", secret(&identity).as_bytes(), 0o640);
        assert_eq!(Key::recovery(&open, None).unwrap_err().code(), "secret_not_believed");
        let public = file(folder.path(), "public", identity.to_public().to_string().as_bytes(), 0o600);
        assert_eq!(Key::recovery(&public, None).unwrap_err().code(), "recovery_key_malformed");
        let half = secret(&identity).replace("AGE-SECRET-KEY-1", "AGE-SECRET-KEY-1QQ");
        let broken = file(folder.path(), "broken", half.as_bytes(), 0o600);
        let error = Key::recovery(&broken, None).unwrap_err();
        assert_eq!(error.code(), "recovery_key_malformed");
        assert!(!error.to_string().contains("SECRET-KEY-1QQ"), "{error}");
        let wrapped = age::encrypt(&identity.to_public(), b"x").unwrap();
        for (name, content) in [("age", &wrapped[..]), ("armor", b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n")] {
            let protected = file(folder.path(), name, content, 0o600);
            assert_eq!(Key::recovery(&protected, None).unwrap_err().code(), "recovery_key_protected", "{name}");
        }
        assert_eq!(Key::recovery(&folder.path().join("none"), None).unwrap_err().code(), "secret_not_believed");
    }

    #[test]
    fn hostile_wrapped_keys_open_nothing_and_each_has_its_word() {
        let (company, stranger) = (Identity::generate(), Identity::generate());
        let sealed = |bytes: &[u8]| age::encrypt(&company.to_public(), bytes).unwrap();
        let good = sealed(b" secret\n");
        assert_eq!(*unwrap(&good, std::slice::from_ref(&company), "p").unwrap(), b"secret");
        // After a change the company may have two keys in its file.
        assert!(unwrap(&good, &[stranger.clone(), company.clone()], "p").is_ok());
        let code =
            |bytes: &[u8], key: &Identity| unwrap(bytes, std::slice::from_ref(key), "p").unwrap_err().code().to_owned();
        assert_eq!(code(&good, &stranger), "recovery_key_wrong");
        assert_eq!(code(b"", &company), "wrapped_key_damaged");
        assert_eq!(code(&[0xff; 1000], &company), "wrapped_key_damaged");
        for at in [0, 30, good.len() / 2, good.len() - 1] {
            let mut changed = good.clone();
            changed[at] ^= 1;
            assert_ne!(code(&changed, &company), "", "byte {at}");
        }
        for end in 0..good.len() {
            assert!(unwrap(&good[..end], std::slice::from_ref(&company), "p").is_err(), "cut at {end}");
        }
        for nonsense in [&b""[..], b"\n\n", b"two\nlines", b"\0"] {
            assert_eq!(code(&sealed(nonsense), &company), "wrapped_key_damaged");
        }
    }

    #[test]
    fn wrapped_key_of_monstrous_size_is_not_read() {
        let folder = trusted_folder();
        let storage = Folder::open(folder.path()).unwrap();
        let object = Object::only(Kind::WrappedKey).unwrap();
        storage.put(&object, &vec![b'a'; 1_000_000]).unwrap();
        let key = Key::Recovery { identities: vec![Identity::generate()], wrapped: None };
        let error = key.password_for(&storage).unwrap_err();
        assert_eq!(error.code(), "wrapped_key_damaged", "{error}");
    }
}
