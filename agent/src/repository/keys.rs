//! A repository's password: made here, kept 0600, and wrapped for the company's recovery key.
//!
//! The wrapped key lies at the repository's root as `hestner-key.age` (not under `keys/`: stock restic stops
//! at a key file it does not know) and travels to the centre as a report. `age -d -i recovery.key
//! hestner-key.age` prints the password, so that repository and recovery key suffice on the day when the
//! host is gone. The format is age's, <https://age-encryption.org/v1>.
//!
//! Files of a repository in the host's folder of keys: `.password`, `.age` (wrapped), `.recipient` (the recovery key
//! that it is wrapped for: the wrapped one does not say), `.id`.

use std::path::Path;

use hestner_proto::sha256;

use zeroize::Zeroizing;

use super::open::ArchiveError;
use super::{Mode, RepositoryError};
use crate::escrow::{EscrowedKey, RepositoryKey};
use crate::platform::files;
use crate::storage::{Kind, Object, Storage, StorageError};

/// Bytes of randomness in a password; it is written as hex.
const PASSWORD_RANDOM_BYTES: usize = 32;
/// Longest password, and longest wrapped one.
pub const KEY_BYTES_MAX: u64 = 16 * 1024;

/// Makes the password, unless an earlier try already did.
pub(super) fn make_password(path: &Path) -> Result<(), RepositoryError> {
    if path.exists() {
        return Ok(());
    }
    let mut random = [0_u8; PASSWORD_RANDOM_BYTES];
    getrandom::fill(&mut random).map_err(|error| RepositoryError::Surprise(format!("no random numbers: {error}")))?;
    if let Some(folder) = path.parent() {
        files::private_folder(folder)?;
    }
    Ok(files::write(path, hex::encode(random).as_bytes(), 0o600)?)
}

/// The key as the company gets it. It is wrapped once for each recovery key, and the copy that is believed lies beside
/// the password: whoever can write at the destination could lay down another. A copy that is not known to be for
/// `recipient` is made anew.
pub(super) fn escrow(password_file: &Path, mode: Mode, recipient: &str) -> Result<EscrowedKey, RepositoryError> {
    let password = Zeroizing::new(files::read(password_file, KEY_BYTES_MAX)?);
    if mode == Mode::Open {
        return Ok(EscrowedKey::Open(String::from_utf8_lossy(&password).into_owned()));
    }
    let (kept, for_whom) = (password_file.with_extension("age"), password_file.with_extension("recipient"));
    let is_for_them = files::read(&for_whom, KEY_BYTES_MAX).is_ok_and(|known| known == recipient.trim().as_bytes());
    match files::read(&kept, KEY_BYTES_MAX) {
        Ok(wrapped) if is_for_them => return Ok(EscrowedKey::Wrapped(wrapped)),
        Err(error) if !error.is_missing() => return Err(error.into()),
        _ => {}
    }
    let wrapped = wrap(&password, recipient.trim())?;
    // In this order: whatever breaks in between, no copy is taken for one that is for somebody else.
    files::remove(&for_whom)?;
    files::write(&kept, &wrapped, 0o600)?;
    files::write(&for_whom, recipient.trim().as_bytes(), 0o600)?;
    Ok(EscrowedKey::Wrapped(wrapped))
}

/// Wraps every password of encrypted repositories in a host's folder of keys for a recovery key, where that is not
/// done yet. Returns the names of the destinations.
///
/// # Errors
/// When the key cannot be used, or a file cannot be read or written; some may be wrapped then.
pub fn wrap_all(folder: &Path, recipient: &str) -> Result<Vec<String>, RepositoryError> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(files::failed("list", folder))?,
    };
    let ending = format!("-{}.password", Mode::Encrypted.as_str());
    let mut wrapped = Vec::new();
    for entry in entries {
        let path = entry.map_err(files::failed("list", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(destination) = name.strip_suffix(&ending) {
            escrow(&path, Mode::Encrypted, recipient)?;
            wrapped.push(destination.to_owned());
        }
    }
    wrapped.sort();
    Ok(wrapped)
}

/// Lays the wrapped key beside the repository, in place of whatever else lies there. Where nothing may be removed,
/// another key that lies there stays: that is told in the log, and keeps nobody from storing, since the receiver has
/// the right one.
///
/// # Errors
/// When the place fails.
pub(super) fn lay_beside(storage: &dyn Storage, key: &RepositoryKey) -> Result<(), RepositoryError> {
    let EscrowedKey::Wrapped(bytes) = &key.key else { return Ok(()) };
    let object = wrapped_object();
    let removed = match lying_at(storage) {
        Ok(Some(there)) if there == *bytes => return Ok(()),
        Ok(None) => Ok(()),
        Ok(Some(_)) | Err(StorageError::TooBig { .. }) => storage.remove(&object),
        Err(error) => return Err(ArchiveError::from(error).into()),
    };
    match removed {
        Ok(()) => Ok(storage.put(&object, bytes).map_err(ArchiveError::from)?),
        Err(error) => {
            tracing::warn!(event = "wrapped_key_not_replaced", place = storage.place(), %error);
            Ok(())
        }
    }
}

/// The wrapped key that lies at a repository's root; `None`: there is none.
///
/// # Errors
/// When the place fails, or it is bigger than any wrapped key.
pub fn lying_at(storage: &dyn Storage) -> Result<Option<Vec<u8>>, StorageError> {
    match storage.get(&wrapped_object(), KEY_BYTES_MAX) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(StorageError::Missing(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn wrapped_object() -> Object {
    Object::new(Kind::WrappedKey, Kind::WrappedKey.only_name().unwrap_or_default())
}

fn wrap(password: &[u8], recipient: &str) -> Result<Vec<u8>, RepositoryError> {
    let recipient: age::x25519::Recipient =
        recipient.parse().map_err(|error: &str| RepositoryError::RecoveryKey(error.to_owned()))?;
    age::encrypt(&recipient, password).map_err(|error| {
        // The error could hold no secret, but nothing says so; its hash tells two errors apart.
        RepositoryError::RecoveryKey(format!("encryption failed ({})", &sha256::hex(error.to_string().as_bytes())[..8]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Folder;
    use crate::storage::fault::{Fault, Faulty};

    #[test]
    fn recovery_key_opens_what_was_wrapped_and_no_other_key_does() {
        let folder = tempfile::tempdir().unwrap();
        let password_file = folder.path().join("keys/local-encrypted.password");
        make_password(&password_file).unwrap();
        let password = files::read(&password_file, 1000).unwrap();
        let (company, stranger) = (age::x25519::Identity::generate(), age::x25519::Identity::generate());
        let key = escrow(&password_file, Mode::Encrypted, &company.to_public().to_string()).unwrap();
        let EscrowedKey::Wrapped(wrapped) = key else { panic!("it must be wrapped") };
        assert_eq!(age::decrypt(&company, &wrapped).unwrap(), password);
        assert!(age::decrypt(&stranger, &wrapped).is_err());
    }

    #[test]
    fn another_recovery_key_gets_a_wrapped_key_of_its_own_and_the_same_one_gets_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let password_file = folder.path().join("local-encrypted.password");
        make_password(&password_file).unwrap();
        let password = files::read(&password_file, 1000).unwrap();
        let (old, new) = (age::x25519::Identity::generate(), age::x25519::Identity::generate());
        let wrapped = |company: &age::x25519::Identity| match escrow(
            &password_file,
            Mode::Encrypted,
            &company.to_public().to_string(),
        )
        .unwrap()
        {
            EscrowedKey::Wrapped(bytes) => bytes,
            EscrowedKey::Open(_) => panic!("it must be wrapped"),
        };
        let first = wrapped(&old);
        assert_eq!(wrapped(&old), first, "an unchanged key is not wrapped again: it would be told again");
        let second = wrapped(&new);
        assert_eq!(age::decrypt(&new, &second).unwrap(), password);
        assert!(age::decrypt(&old, &second).is_err());
        // A copy of which nobody knows whom it is for is not believed.
        files::remove(&password_file.with_extension("recipient")).unwrap();
        assert_ne!(wrapped(&new), second);
        assert_eq!(wrap_all(folder.path(), &old.to_public().to_string()).unwrap(), ["local"]);
        assert_eq!(age::decrypt(&old, &wrapped(&old)).unwrap(), password);
    }

    #[test]
    fn wrapped_key_is_replaced_at_any_place_and_stays_where_nothing_may_be_removed() {
        let folder = tempfile::tempdir().unwrap();
        let key = |bytes: &[u8]| RepositoryKey {
            repository_id: "r".into(),
            destination: "d".into(),
            key: EscrowedKey::Wrapped(bytes.to_vec()),
        };
        let storage = Folder::open(folder.path()).unwrap();
        assert_eq!(lying_at(&storage).unwrap(), None);
        for bytes in [&b"first"[..], b"first", b"second", &[7; 20_000]] {
            lay_beside(&storage, &key(bytes)).unwrap();
        }
        assert!(lying_at(&storage).is_err(), "nobody reads so much for a key");
        lay_beside(&storage, &key(b"third")).unwrap();
        assert_eq!(lying_at(&storage).unwrap().unwrap(), b"third");
        // The second call is the removal.
        let put_only = Faulty::new(storage, 2, Fault::Fail);
        lay_beside(&put_only, &key(b"fourth")).unwrap();
        assert!(put_only.was_reached());
        assert_eq!(lying_at(&put_only).unwrap().unwrap(), b"third");
    }

    #[test]
    fn key_that_somebody_else_laid_beside_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let ours = EscrowedKey::Wrapped(b"ours".to_vec());
        let key = RepositoryKey { repository_id: "r".into(), destination: "d".into(), key: ours };
        files::write(&folder.path().join("hestner-key.age"), b"theirs", 0o600).unwrap();
        lay_beside(&Folder::open(folder.path()).unwrap(), &key).unwrap();
        assert_eq!(files::read(&folder.path().join("hestner-key.age"), 100).unwrap(), b"ours");
    }

    #[test]
    fn password_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p");
        make_password(&path).unwrap();
        let first = files::read(&path, 1000).unwrap();
        make_password(&path).unwrap();
        assert_eq!(files::read(&path, 1000).unwrap(), first);
        assert_eq!(first.len(), 2 * PASSWORD_RANDOM_BYTES);
    }

    #[test]
    fn text_that_is_no_recovery_key_is_refused() {
        assert!(matches!(wrap(b"p", "age1nonsense"), Err(RepositoryError::RecoveryKey(_))));
    }
}
