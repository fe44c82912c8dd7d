//! The world of one test: a folder that only its owner may write, a receiver, a company and its keys.
//!
//! The folder lies where every folder above it is safe, as the agent demands: below `/srv` for root, below
//! the home folder otherwise; never below `/tmp`. When a test fails, the logs are printed and the folder
//! stays; otherwise all of it goes.

use std::path::{Path, PathBuf};

use crate::builder::AgentBuilder;
use crate::command::Cmd;
use crate::receiver::Receiver;
use crate::{files, processes};

/// Lines of each log that are shown when a test fails.
const LOG_LINES_SHOWN: usize = 60;

/// A company as the tests use it.
pub struct Company {
    /// Its id.
    pub id: i64,
    /// The file with the secret half of its recovery key; kept offline in real life.
    pub recovery_secret: PathBuf,
    /// What an operator types on the host.
    pub fingerprint: String,
}

/// See the module.
pub struct World {
    // Fields are dropped in this order: the receiver ends before the folder goes.
    /// The receiver.
    pub receiver: Receiver,
    /// The company that agents join.
    pub company: Company,
    folder: Folder,
}

struct Folder(PathBuf);

impl World {
    /// A receiver that serves, a company, and an API key of it. `name` should be the test's.
    pub fn new(name: &str) -> Self {
        let folder = Folder(own_folder(name));
        let receiver = Receiver::start_in(&folder.0.join("receiver"));
        Self::around(folder, receiver)
    }

    /// The same with the receiver's default beats, for measuring.
    pub fn unhurried(name: &str) -> Self {
        let folder = Folder(own_folder(name));
        let receiver = Receiver::start_with(&folder.0.join("receiver"), "");
        Self::around(folder, receiver)
    }

    /// The same with these lines in the receiver's section `[session]`.
    pub fn with_session(name: &str, session: &str) -> Self {
        let folder = Folder(own_folder(name));
        let receiver = Receiver::start_with(&folder.0.join("receiver"), session);
        Self::around(folder, receiver)
    }

    fn around(folder: Folder, mut receiver: Receiver) -> Self {
        let company = new_company(&receiver, &folder.0, "acme");
        receiver.use_key(receiver.api_key(Some(company.id)));
        Self { receiver, company, folder }
    }

    /// The world's folder.
    pub fn path(&self) -> &Path {
        &self.folder.0
    }

    /// A path in the world's folder; folders above it are made.
    pub fn at(&self, name: &str) -> PathBuf {
        let path = self.folder.0.join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        path
    }

    /// A small tree to take snapshots of.
    pub fn source(&self, name: &str) -> PathBuf {
        files::small_tree(&self.at(name), 20, 2_000)
    }

    /// A file of random bytes in a folder of its own: large enough to act while it is read.
    pub fn bulky_source(&self, name: &str, bytes: usize) -> PathBuf {
        files::write(self.at(name).join("bulk.bin"), files::random_bytes(bytes));
        self.at(name)
    }

    /// An agent to be.
    pub fn agent(&self) -> AgentBuilder {
        self.agent_named("agent")
    }

    /// A second agent needs another name.
    pub fn agent_named(&self, name: &str) -> AgentBuilder {
        AgentBuilder::new(&self.folder.0.join(name), &self.receiver, &self.company)
    }

    /// Another company.
    pub fn company(&self, name: &str) -> Company {
        new_company(&self.receiver, &self.folder.0, name)
    }
}

fn new_company(receiver: &Receiver, folder: &Path, name: &str) -> Company {
    let secret = folder.join(format!("{name}-recovery.secret"));
    let public = folder.join(format!("{name}-recovery.pub"));
    Cmd::new("age-keygen").arg("-o").arg(&secret).ok();
    let recipient = Cmd::new("age-keygen").arg("-y").arg(&secret).ok();
    files::write(&public, &recipient);
    let id = receiver.add_company(name, &public);
    Company { id, recovery_secret: secret, fingerprint: fingerprint(&recipient) }
}

/// What a person computes by hand: the first 32 digits of the SHA-256 of the recipient.
pub fn fingerprint(recipient: &str) -> String {
    use sha2::Digest as _;
    format!("sha256:{}", &hex::encode(sha2::Sha256::digest(recipient.trim()))[..32])
}

/// A new folder whose parents are all safe.
pub fn own_folder(name: &str) -> PathBuf {
    let base = if nix::unistd::geteuid().is_root() {
        PathBuf::from("/srv/hestner-tests")
    } else {
        PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/hestner-tests")
    };
    let folder = base.join(format!("{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    files::set_mode(&base, 0o755);
    files::set_mode(&folder, 0o755);
    folder
}

/// A program of the workspace, as cargo built it beside the running test.
pub fn bin(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("our own path");
    let folder = test.ancestors().find(|a| a.join(name).is_file());
    folder.unwrap_or_else(|| panic!("{name} is not built; run `cargo build --workspace` first")).join(name)
}

impl Drop for Folder {
    fn drop(&mut self) {
        processes::kill_all_naming(&self.0);
        if std::thread::panicking() {
            show_logs(&self.0);
            eprintln!("the world of the failed test stays in {}", self.0.display());
        } else if std::env::var_os("HESTNER_KEEP").is_none() {
            // What a test mounted is gone by now: its handle was made later than the world.
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

fn show_logs(folder: &Path) {
    let parts = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for log in parts.flat_map(|part| std::fs::read_dir(part.path()).into_iter().flatten().flatten()) {
        if log.path().extension().is_some_and(|e| e == "log") {
            let lines = files::lines(&log.path());
            let first = lines.len().saturating_sub(LOG_LINES_SHOWN);
            eprintln!("--- {} (last {LOG_LINES_SHOWN} lines)\n{}", log.path().display(), lines[first..].join("\n"));
        }
    }
}
