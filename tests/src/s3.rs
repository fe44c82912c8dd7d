//! A real S3 server of a test's own: SeaweedFS, with one bucket and two users.
//!
//! One user may do all; the other may put, get and list, and delete only locks, as the server's bucket policy
//! says. Everything is on loopback, in a folder, and ends with the handle.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use crate::clock::wait_until;
use crate::command::Cmd;
use crate::{files, ports, processes};

/// The bucket.
pub const BUCKET: &str = "backups";
/// Prefix of the repository in it, or of the repositories.
pub const PREFIX: &str = "host";

const ADMIN: (&str, &str) = ("AKADMIN", "secret-of-admin");
const PUT_ONLY: (&str, &str) = ("AKPUTONLY", "secret-of-put-only");

/// A server.
pub struct S3Server {
    folder: PathBuf,
    port: u16,
    child: Child,
}

impl S3Server {
    /// Starts one.
    pub fn start(folder: &Path) -> Self {
        std::fs::create_dir_all(folder.join("data")).expect("a folder");
        let at = |name: &str| folder.join(name);
        files::write(at("identities.json"), identities());
        let all: [u16; 10] = ports::free();
        let names = ["s3", "master", "filer", "volume", "admin"];
        let port_args = names
            .iter()
            .zip(all.chunks(2))
            .flat_map(|(name, pair)| [format!("-{name}.port={}", pair[0]), format!("-{name}.port.grpc={}", pair[1])]);
        let child = Cmd::new(program())
            .arg("mini")
            .arg(format!("-dir={}", at("data").display()))
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false"])
            .args(["-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"])
            .arg(format!("-s3.config={}", at("identities.json").display()))
            .args(port_args)
            .env("HOME", folder)
            .in_folder(folder)
            .spawn_logged(&at("weed.log"));
        let server = Self { folder: folder.to_owned(), port: all[0], child };
        let wanted = format!("PUT /{BUCKET} - -");
        // It listens before it can store.
        wait_until("the S3 server to make a bucket", Duration::from_secs(60), || server.try_ask(&wanted));
        server.write_credentials();
        server.set_policy();
        server
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The file of the user who may do all.
    pub fn credentials(&self) -> PathBuf {
        self.folder.join("admin.toml")
    }

    /// Id and secret of the user who may do all.
    pub fn keys(&self) -> (&'static str, &'static str) {
        ADMIN
    }

    /// The file of the user who may put, get and list only.
    pub fn put_only_credentials(&self) -> PathBuf {
        self.folder.join("put-only.toml")
    }

    /// Stores an object below the prefix, past whoever is tested.
    pub fn plant(&self, path: &str, bytes: &[u8]) {
        let file = files::write(self.folder.join("planted"), bytes);
        self.ask(&format!("PUT /{BUCKET}/{PREFIX}/{path} - {}", file.display()));
    }

    /// Stores every file below a folder below the prefix, past whoever is tested.
    pub fn plant_all(&self, folder: &Path) {
        let listed = Cmd::new("find").arg(folder).args(["-type", "f", "-printf", "%P\\n"]).ok();
        let line = |path: &str| format!("PUT /{BUCKET}/{PREFIX}/{path} - {}", folder.join(path).display());
        self.ask(&listed.lines().map(line).collect::<Vec<_>>().join("\n"));
    }

    fn write_credentials(&self) {
        for (file, (id, secret)) in [(self.credentials(), ADMIN), (self.put_only_credentials(), PUT_ONLY)] {
            files::write(&file, format!("access_key_id = \"{id}\"\nsecret_access_key = \"{secret}\"\n"));
            files::set_mode(&file, 0o600);
        }
    }

    fn set_policy(&self) {
        let statement = |action: &str, below: &str| {
            serde_json::json!({
                "Effect": "Allow", "Principal": "*", "Action": [action],
                "Resource": [format!("arn:aws:s3:::{BUCKET}/{PREFIX}/{below}")],
            })
        };
        // The locks of a repository at the prefix, and of repositories below it.
        let locks = ["locks/*", "*/locks/*"].map(|below| statement("s3:DeleteObject", below));
        let statements: Vec<_> = [statement("s3:PutObject", "*")].into_iter().chain(locks).collect();
        let policy = serde_json::json!({ "Version": "2012-10-17", "Statement": statements });
        let file = files::write(self.folder.join("policy.json"), policy.to_string());
        self.ask(&format!("PUT /{BUCKET} policy= {}", file.display()));
    }

    fn ask(&self, line: &str) {
        self.admin(line).ok();
    }

    fn try_ask(&self, line: &str) -> bool {
        self.admin(line).run().code == Some(0)
    }

    fn admin(&self, line: &str) -> Cmd {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/s3_admin.py");
        let host = format!("127.0.0.1:{}", self.port);
        Cmd::new("python3").arg(script).args([host.as_str(), ADMIN.0, ADMIN.1]).stdin(format!("{line}\n"))
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        processes::kill(i32::try_from(self.child.id()).expect("a pid"));
        let _ = self.child.wait();
    }
}

fn program() -> PathBuf {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin/weed");
    assert!(program.exists(), "{} is missing; `scripts/test` installs it", program.display());
    program
}

fn identities() -> String {
    let user = |name: &str, (id, secret): (&str, &str), actions: &[String]| {
        let credentials = serde_json::json!({ "accessKey": id, "secretKey": secret });
        serde_json::json!({ "name": name, "credentials": [credentials], "actions": actions })
    };
    let some = [format!("Read:{BUCKET}"), format!("List:{BUCKET}")];
    let identities = [user("admin", ADMIN, &["Admin".to_owned()]), user("put-only", PUT_ONLY, &some)];
    serde_json::json!({ "identities": identities }).to_string()
}
