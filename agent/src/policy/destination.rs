//! The words of a destination: a folder of this server, a bucket, a folder of another server. Every mistake is
//! named; nothing is looked at, and nobody spoken to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml_example::TomlExample;

/// Where artifacts are stored. Only the host defines destinations; the centre chooses among the names.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize, TomlExample)]
#[serde(deny_unknown_fields)]
pub struct DestinationSettings {
    /// Name of the destination.
    #[toml_example(default = "local")]
    pub name: String,
    /// `folder`: a folder of this server, such as a mounted backup disk. `s3`: a bucket. `sftp`: a folder of
    /// another server.
    #[toml_example(default = "folder")]
    pub kind: DestinationKind,
    /// The host may put, get and list there, and delete only below `locks/`: retention removes nothing from this host,
    /// and `hestner-agent prune` does it elsewhere, with credentials that this host never holds.
    #[serde(default)]
    #[toml_example(default = false)]
    pub put_only: bool,
    /// For `folder` and `sftp`: the folder.
    #[serde(default)]
    #[toml_example(default = "/srv/hestner")]
    pub path: PathBuf,
    /// For `s3`: `https://HOST[:PORT]`.
    #[serde(default)]
    #[toml_example(default = "")]
    pub endpoint: String,
    /// For `s3`: the bucket.
    #[serde(default)]
    #[toml_example(default = "")]
    pub bucket: String,
    /// For `s3`: what the names of all objects begin with, such as `backups/web1`; may be empty.
    #[serde(default)]
    #[toml_example(default = "")]
    pub prefix: String,
    /// For `s3`: the region; `us-east-1` if it is empty, as most servers without regions want it.
    #[serde(default)]
    #[toml_example(default = "")]
    pub region: String,
    /// For `s3`: name the bucket in the path of requests; false: in the name of the host, as Amazon's has it.
    #[serde(default = "yes")]
    #[toml_example(default = true)]
    pub path_style: bool,
    /// For `s3`: a file with `access_key_id = "..."` and `secret_access_key = "..."` that only root can read. A
    /// key that may put, get and list, and delete below `locks/` only, is enough for backups.
    #[serde(default)]
    #[toml_example(default = "")]
    pub credentials_file: PathBuf,
    /// For `sftp`: name or address of the server.
    #[serde(default)]
    #[toml_example(default = "")]
    pub host: String,
    /// For `sftp`: its port.
    #[serde(default = "ssh_port")]
    #[toml_example(default = 22)]
    pub port: u16,
    /// For `sftp`: who enters.
    #[serde(default)]
    #[toml_example(default = "")]
    pub user: String,
    /// For `sftp`: the private key, without a passphrase.
    #[serde(default)]
    #[toml_example(default = "")]
    pub identity_file: PathBuf,
    /// For `sftp`: the server's keys, as `ssh-keyscan` writes them; another server is not spoken to.
    #[serde(default)]
    #[toml_example(default = "")]
    pub known_hosts: PathBuf,
}

/// The kinds of [`DestinationSettings`].
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DestinationKind {
    /// A folder of this server.
    #[default]
    Folder,
    /// A bucket of an S3 server.
    S3,
    /// A folder of another server.
    Sftp,
}

impl DestinationKind {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Folder => "folder",
            Self::S3 => "s3",
            Self::Sftp => "sftp",
        }
    }
}

fn yes() -> bool {
    true
}

fn ssh_port() -> u16 {
    22
}

impl DestinationSettings {
    /// Its folder, if it is one of this server.
    pub fn folder(&self) -> Option<&Path> {
        (self.kind == DestinationKind::Folder).then_some(self.path.as_path())
    }

    /// Every mistake in these settings but that of the name, each as one sentence.
    pub fn mistakes(&self) -> Vec<String> {
        let mut found = self.keys_of_other_kinds();
        found.extend(match self.kind {
            DestinationKind::Folder => absolute("path", &self.path),
            DestinationKind::S3 => self.s3_mistakes(),
            DestinationKind::Sftp => self.sftp_mistakes(),
        });
        found
    }

    fn keys_of_other_kinds(&self) -> Vec<String> {
        use DestinationKind::{Folder, S3, Sftp};
        let is_set = |path: &Path| !path.as_os_str().is_empty();
        let keys: [(&str, &[DestinationKind], bool); 10] = [
            ("path", &[Folder, Sftp], is_set(&self.path)),
            ("endpoint", &[S3], !self.endpoint.is_empty()),
            ("bucket", &[S3], !self.bucket.is_empty()),
            ("prefix", &[S3], !self.prefix.is_empty()),
            ("region", &[S3], !self.region.is_empty()),
            ("credentials_file", &[S3], is_set(&self.credentials_file)),
            ("host", &[Sftp], !self.host.is_empty()),
            ("user", &[Sftp], !self.user.is_empty()),
            ("identity_file", &[Sftp], is_set(&self.identity_file)),
            ("known_hosts", &[Sftp], is_set(&self.known_hosts)),
        ];
        let strange = keys.iter().filter(|(_, kinds, is_set)| *is_set && !kinds.contains(&self.kind));
        strange.map(|(key, ..)| format!("`{key}` does not belong to the kind `{}`", self.kind.as_str())).collect()
    }

    fn s3_mistakes(&self) -> Vec<String> {
        let mut found = absolute("credentials_file", &self.credentials_file);
        let host = self.endpoint.strip_prefix("https://").or_else(|| self.endpoint.strip_prefix("http://"));
        if host.is_none_or(|host| host.is_empty() || !host.chars().all(is_of_a_host)) {
            found.push(format!("`endpoint` must read https://HOST[:PORT], not `{}`", self.endpoint));
        }
        if self.bucket.is_empty() || !self.bucket.chars().all(is_of_a_name) {
            found.push(format!("`bucket` must be the name of a bucket, not `{}`", self.bucket));
        }
        if !self.path_style && self.bucket.contains('.') {
            found.push("a bucket with `.` in its name needs `path_style = true`".to_owned());
        }
        let mut parts = self.prefix.split('/');
        let is_good = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(is_of_a_name);
        if !self.prefix.is_empty() && !parts.all(is_good) {
            found.push(format!("`prefix` has names of letters, digits, `_`, `.`, `-` between `/`: `{}`", self.prefix));
        }
        if !self.region.chars().all(is_of_a_name) {
            found.push(format!("`region` must be the name of a region, not `{}`", self.region));
        }
        found
    }

    fn sftp_mistakes(&self) -> Vec<String> {
        let mut found = absolute("path", &self.path);
        found.extend(absolute("identity_file", &self.identity_file));
        found.extend(absolute("known_hosts", &self.known_hosts));
        // Both become arguments of ssh.
        let is_argument = |text: &str| !text.is_empty() && !text.starts_with('-');
        if !is_argument(&self.host) || !self.host.chars().all(is_of_a_host) {
            found.push(format!("`host` must be the name or address of a server, not `{}`", self.host));
        }
        if !is_argument(&self.user) || !self.user.chars().all(is_of_a_name) {
            found.push(format!("`user` must be the name of a user, not `{}`", self.user));
        }
        if self.port == 0 {
            found.push("`port` must be at least 1".to_owned());
        }
        found
    }
}

fn absolute(key: &str, path: &Path) -> Vec<String> {
    match path.is_absolute() {
        true => Vec::new(),
        false => vec![format!("`{key}` must be absolute, not `{}`", path.display())],
    }
}

fn is_of_a_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}

fn is_of_a_host(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistakes(text: &str) -> String {
        toml::from_str::<DestinationSettings>(text).unwrap().mistakes().join("\n")
    }

    #[test]
    fn good_destinations_have_no_mistakes() {
        for text in [
            "name = \"a\"\nkind = \"folder\"\npath = \"/srv\"",
            "name = \"a\"\nkind = \"s3\"\nendpoint = \"https://s3.example.com:9000\"\nbucket = \"b\"\nprefix = \"x/web1\"\n\
             credentials_file = \"/etc/hestner/s3.toml\"",
            "name = \"a\"\nkind = \"sftp\"\nhost = \"backup.example.com\"\nuser = \"u1\"\npath = \"/backups\"\n\
             identity_file = \"/etc/hestner/key\"\nknown_hosts = \"/etc/hestner/known_hosts\"",
        ] {
            assert_eq!(mistakes(text), "", "{text}");
        }
    }

    #[test]
    fn every_mistake_of_a_remote_destination_is_named() {
        let s3 =
            mistakes("name = \"a\"\nkind = \"s3\"\nendpoint = \"s3.example.com\"\nprefix = \"../x\"\nhost = \"h\"");
        for part in ["`endpoint` must", "`bucket` must", "`prefix` has", "`credentials_file` must", "`host` does not"] {
            assert!(s3.contains(part), "{part} is not in:\n{s3}");
        }
        let sftp = mistakes("name = \"a\"\nkind = \"sftp\"\nhost = \"-oProxyCommand=x\"\nport = 0\nbucket = \"b\"");
        for part in ["`host` must", "`user` must", "`path` must", "`identity_file` must", "`known_hosts` must"] {
            assert!(sftp.contains(part), "{part} is not in:\n{sftp}");
        }
        assert!(sftp.contains("`port` must") && sftp.contains("`bucket` does not"), "{sftp}");
    }
}
