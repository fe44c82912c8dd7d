//! From a destination's settings to the place where a repository's objects lie.

use crate::policy::{DestinationKind, DestinationSettings};
use crate::storage::{Folder, Kind, Limits, S3Place, SftpPlace, Storage, StorageError, s3, sftp};

/// Opens the place of the repository `name` at a destination. Remote ones are not spoken to yet.
///
/// # Errors
/// [`StorageError::NoRoot`] when its folder is not there; when credentials are not believed.
pub fn open(destination: &DestinationSettings, name: &str, limits: &Limits) -> Result<Box<dyn Storage>, StorageError> {
    match destination.kind {
        DestinationKind::Folder => Ok(Box::new(Folder::open(&destination.path.join(name))?)),
        DestinationKind::S3 => s3(&bucket(destination, name), limits),
        DestinationKind::Sftp => sftp(&server(destination, name), limits),
    }
}

/// The same, for a repository that is to be made: a folder of this server is made first.
///
/// # Errors
/// As [`open`]; when the folder cannot be made.
pub fn create(
    destination: &DestinationSettings,
    name: &str,
    limits: &Limits,
) -> Result<Box<dyn Storage>, StorageError> {
    if let Some(folder) = destination.folder() {
        Folder::create(&folder.join(name))?;
    }
    open(destination, name, limits)
}

/// What counts as stored; locks do not.
pub(super) const STORED: [Kind; 4] = [Kind::Pack, Kind::Index, Kind::Snapshot, Kind::Key];

/// Bytes of all that is stored.
pub(super) fn stored_bytes(storage: &dyn Storage) -> Result<u64, StorageError> {
    let mut bytes = 0;
    for kind in STORED {
        bytes += storage.list(kind)?.iter().map(|(_, bytes)| bytes).sum::<u64>();
    }
    Ok(bytes)
}

/// Where it is, for people; without secrets.
pub fn shown(destination: &DestinationSettings, name: &str) -> String {
    match destination.kind {
        DestinationKind::Folder => destination.path.join(name).display().to_string(),
        DestinationKind::S3 => bucket(destination, name).to_string(),
        DestinationKind::Sftp => server(destination, name).to_string(),
    }
}

pub(super) fn bucket(destination: &DestinationSettings, name: &str) -> S3Place {
    let region = if destination.region.is_empty() { "us-east-1" } else { &destination.region };
    let prefix = match destination.prefix.is_empty() {
        true => name.to_owned(),
        false => format!("{}/{name}", destination.prefix),
    };
    S3Place {
        endpoint: destination.endpoint.clone(),
        bucket: destination.bucket.clone(),
        prefix,
        region: region.to_owned(),
        path_style: destination.path_style,
        credentials_file: destination.credentials_file.clone(),
    }
}

pub(super) fn server(destination: &DestinationSettings, name: &str) -> SftpPlace {
    SftpPlace {
        host: destination.host.clone(),
        port: destination.port,
        user: destination.user.clone(),
        path: destination.path.join(name).display().to_string(),
        identity_file: destination.identity_file.clone(),
        known_hosts: destination.known_hosts.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_of_one_destination_lie_beside_each_other() {
        let temp = tempfile::tempdir().unwrap();
        let folder = DestinationSettings { path: temp.path().to_owned(), ..DestinationSettings::default() };
        let place = |d: &DestinationSettings| create(d, "server-1", &Limits::default()).unwrap().place();
        assert_eq!(place(&folder), temp.path().join("server-1").display().to_string());
        let sftp = DestinationSettings {
            kind: DestinationKind::Sftp,
            path: "/backups".into(),
            host: "h".into(),
            user: "u".into(),
            port: 22,
            ..DestinationSettings::default()
        };
        assert_eq!(place(&sftp), "sftp://u@h:22/backups/server-1");
        for destination in [&folder, &sftp] {
            assert_eq!(place(destination), shown(destination, "server-1"));
        }
        let s3 = DestinationSettings { prefix: "a/b".into(), ..DestinationSettings::default() };
        assert_eq!(bucket(&s3, "server-1").prefix, "a/b/server-1");
        assert_eq!(bucket(&DestinationSettings::default(), "server-1").prefix, "server-1");
    }
}
