//! A repository's password: made here, kept 0600, and wrapped for the company's recovery key.
//!
//! The wrapped key lies at the repository's root as `hestner-key.age` (not under `keys/`: stock restic stops
//! at a key file it does not know) and travels to the centre as a report. `age -d -i recovery.key
//! hestner-key.age` prints the password, so that repository and recovery key suffice on the day when the
//! host is gone. The format is age's, <https://age-encryption.org/v1>.

use std::path::Path;

use hestner_proto::sha256_hex;

use super::open::ArchiveError;
use super::{Mode, RepositoryError};
use crate::escrow::EscrowedKey;
use crate::platform::files;
use crate::storage::{Kind, Object, Storage, StorageError};

/// Bytes of randomness in a password; it is written as hex.
const PASSWORD_RANDOM_BYTES: usize = 32;
const KEY_BYTES_MAX: u64 = 16 * 1024;

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

/// The key as the company gets it. It is wrapped once, and the copy that is believed lies beside the
/// password: whoever can write at the destination could lay down another.
pub(super) fn escrow(password_file: &Path, mode: Mode, recipient: &str) -> Result<EscrowedKey, RepositoryError> {
    let password = files::read(password_file, KEY_BYTES_MAX)?;
    if mode == Mode::Open {
        return Ok(EscrowedKey::Open(String::from_utf8_lossy(&password).into_owned()));
    }
    let kept = password_file.with_extension("age");
    match files::read(&kept, KEY_BYTES_MAX) {
        Ok(wrapped) => Ok(EscrowedKey::Wrapped(wrapped)),
        Err(error) if error.is_missing() => {
            let wrapped = wrap(&password, recipient)?;
            files::write(&kept, &wrapped, 0o600)?;
            Ok(EscrowedKey::Wrapped(wrapped))
        }
        Err(error) => Err(error.into()),
    }
}

/// Lays the wrapped key beside the repository, in place of whatever else lies there.
pub(super) fn lay_beside(storage: &dyn Storage, wrapped: &[u8]) -> Result<(), ArchiveError> {
    let Some(object) = Object::only(Kind::WrappedKey) else { return Ok(()) };
    match storage.get(&object, KEY_BYTES_MAX) {
        Ok(there) if there == wrapped => return Ok(()),
        Err(StorageError::Missing(_)) => {}
        Ok(_) | Err(StorageError::TooBig { .. }) => storage.remove(&object)?,
        Err(error) => return Err(error.into()),
    }
    Ok(storage.put(&object, wrapped)?)
}

fn wrap(password: &[u8], recipient: &str) -> Result<Vec<u8>, RepositoryError> {
    let recipient: age::x25519::Recipient =
        recipient.parse().map_err(|error: &str| RepositoryError::RecoveryKey(error.to_owned()))?;
    age::encrypt(&recipient, password).map_err(|error| {
        // The error could hold no secret, but nothing says so; its hash tells two errors apart.
        RepositoryError::RecoveryKey(format!("encryption failed ({})", &sha256_hex(error.to_string().as_bytes())[..8]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Folder;

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
    fn key_that_somebody_else_laid_beside_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        files::write(&folder.path().join("hestner-key.age"), b"theirs", 0o600).unwrap();
        let storage = Folder::open(folder.path()).unwrap();
        for _ in 0..2 {
            lay_beside(&storage, b"ours").unwrap();
            assert_eq!(files::read(&folder.path().join("hestner-key.age"), 100).unwrap(), b"ours");
        }
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
