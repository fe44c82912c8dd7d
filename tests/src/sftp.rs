//! A real `sshd` of a test's own, that gives out a folder by SFTP.
//!
//! Its keys and the user's are its own; it listens on loopback and ends, with its sessions, with the handle. Who
//! enters is who runs the test. Needs Debian's `openssh-server`.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::clock::wait_until;
use crate::command::Cmd;
use crate::{files, ports, processes};

const SSHD: &str = "/usr/sbin/sshd";

/// A server.
pub struct SftpServer {
    folder: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl SftpServer {
    /// Starts one; `options` are those of `internal-sftp`, such as `-P fsync` to take a request away.
    pub fn start(folder: &Path, options: &str) -> Self {
        std::fs::create_dir_all(folder.join("files")).expect("a folder");
        let at = |name: &str| folder.join(name);
        for key in ["host_key", "user_key", "other_key"] {
            Cmd::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(at(key)).ok();
        }
        std::fs::copy(at("user_key.pub"), at("authorized_keys")).expect("a copy");
        let [port] = ports::free();
        let host_key = std::fs::read_to_string(at("host_key.pub")).expect("a key");
        files::write(at("known_hosts"), format!("[127.0.0.1]:{port} {host_key}"));
        let shown = folder.display();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {shown}/host_key\nAuthorizedKeysFile {shown}/authorized_keys\n\
             PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             PermitRootLogin yes\nMaxStartups 100\nSubsystem sftp internal-sftp {options}\n"
        );
        files::write(at("sshd_config"), config);
        let mut server = Self { folder: folder.to_owned(), port, child: None };
        server.start_again();
        server
    }

    /// Starts it, also once more.
    pub fn start_again(&mut self) {
        // Where it separates its privileges; made by Debian's unit otherwise.
        std::fs::create_dir_all("/run/sshd").expect("a folder");
        let config = self.folder.join("sshd_config");
        let child = Cmd::new(SSHD).args(["-D", "-e", "-f"]).arg(config).spawn_logged(&self.folder.join("sshd.log"));
        self.child = Some(child);
        wait_until("sshd to listen", Duration::from_secs(30), || ports::is_open(self.port));
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder that tests use.
    pub fn files(&self) -> PathBuf {
        self.folder.join("files")
    }

    /// The key that it lets in.
    pub fn identity_file(&self) -> PathBuf {
        self.folder.join("user_key")
    }

    /// A key that it does not let in.
    pub fn other_identity_file(&self) -> PathBuf {
        self.folder.join("other_key")
    }

    /// Its own key, for those who know it.
    pub fn known_hosts(&self) -> PathBuf {
        self.folder.join("known_hosts")
    }

    /// Who enters.
    pub fn user(&self) -> String {
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid()).expect("users");
        user.expect("a user").name
    }

    /// How many sessions there are.
    pub fn sessions(&self) -> usize {
        processes::descendant_pids(self.pid()).len()
    }

    /// Sends a signal to all sessions.
    pub fn signal_sessions(&self, signal: Signal) {
        for pid in processes::descendant_pids(self.pid()) {
            processes::send(pid, signal);
        }
    }

    /// Ends it with its sessions.
    pub fn stop(&mut self) {
        self.signal_sessions(Signal::SIGKILL);
        if let Some(mut child) = self.child.take() {
            processes::kill(i32::try_from(child.id()).expect("a pid"));
            let _ = child.wait();
        }
    }

    fn pid(&self) -> i32 {
        self.child.as_ref().map_or(i32::MAX, |child| i32::try_from(child.id()).expect("a pid"))
    }
}

impl Drop for SftpServer {
    fn drop(&mut self) {
        self.stop();
    }
}
