//! From a destination's settings to the place where a repository's objects lie.

use crate::policy::{DestinationKind, DestinationSettings};
use crate::storage::{Folder, Limits, S3Place, SftpPlace, Storage, StorageError, s3, sftp};

/// Opens the place of the repository `name` at a destination; a folder is made if need be. Remote ones are not
/// spoken to yet.
///
/// # Errors
/// When the folder cannot be made, or credentials are not believed.
pub fn open(destination: &DestinationSettings, name: &str, limits: &Limits) -> Result<Box<dyn Storage>, StorageError> {
    match destination.kind {
        DestinationKind::Folder => Ok(Box::new(Folder::create(&destination.path.join(name))?)),
        DestinationKind::S3 => s3(&bucket(destination, name), limits),
        DestinationKind::Sftp => sftp(&server(destination, name), limits),
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
        let place = |d: &DestinationSettings| open(d, "server-1", &Limits::default()).unwrap().place();
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
        let s3 = DestinationSettings { prefix: "a/b".into(), ..DestinationSettings::default() };
        assert_eq!(bucket(&s3, "server-1").prefix, "a/b/server-1");
        assert_eq!(bucket(&DestinationSettings::default(), "server-1").prefix, "server-1");
    }
}
