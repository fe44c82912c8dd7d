//! A machine that has nothing of Hestner but the agent's program, and a repository somewhere.
//!
//! In: the repository as the host left it. Out: the program's words. No settings, no state, no environment are given
//! to it, so that a test cannot pass by what a host would have.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::command::{Cmd, Ended};
use crate::files;
use crate::s3::{BUCKET, PREFIX, S3Server};
use crate::sftp::SftpServer;
use crate::world::bin;

/// How long one command may take on a busy machine.
const WITHIN: Duration = Duration::from_secs(180);

/// A command line of the agent on a machine that is no server.
pub fn agent(args: &[&str]) -> Cmd {
    let program = Cmd::new(bin("hestner-agent")).args(["--config", "/nonexistent/agent.toml"]).args(args);
    program.without_environment().within(WITHIN)
}

/// Where a repository lies, as arguments.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    place: [String; 2],
}

impl Elsewhere {
    /// A copy of a repository in a folder.
    pub fn folder(repository: &Path, copy: &Path) -> Self {
        Cmd::new("cp").arg("-a").arg(repository).arg(copy).ok();
        Self { place: ["--folder".to_owned(), copy.display().to_string()] }
    }

    /// A copy of a repository in a bucket, opened with these credentials; `file` gets the settings of the place.
    pub fn bucket(repository: &Path, server: &S3Server, credentials: &Path, file: &Path) -> Self {
        server.plant_all(repository);
        Self::opened_bucket(server, credentials, file)
    }

    /// The same bucket with other credentials.
    pub fn opened_bucket(server: &S3Server, credentials: &Path, file: &Path) -> Self {
        let endpoint = format!("http://127.0.0.1:{}", server.port());
        let text = format!(
            "kind = \"s3\"\nendpoint = {endpoint:?}\nbucket = {BUCKET:?}\ncredentials_file = {credentials:?}\n\
             repository = {PREFIX:?}\n"
        );
        Self::told(file, &text)
    }

    /// A copy of a repository in a folder of another server.
    pub fn server(repository: &Path, server: &SftpServer, file: &Path) -> Self {
        let copy = server.files().join("repository");
        Cmd::new("cp").arg("-a").arg(repository).arg(&copy).ok();
        let text = format!(
            "kind = \"sftp\"\nhost = \"127.0.0.1\"\nport = {}\nuser = {:?}\npath = {:?}\nidentity_file = {:?}\n\
             known_hosts = {:?}\nrepository = \"repository\"\n",
            server.port(),
            server.user(),
            server.files(),
            server.identity_file(),
            server.known_hosts(),
        );
        Self::told(file, &text)
    }

    fn told(file: &Path, text: &str) -> Self {
        files::write(file, text);
        Self { place: ["--place".to_owned(), file.display().to_string()] }
    }

    /// A command on it: `recover list`, and what opens it.
    pub fn run(&self, command: &[&str], opening: &[&str]) -> Ended {
        self.command(command, opening).run()
    }

    /// The same, not started yet.
    pub fn command(&self, command: &[&str], opening: &[&str]) -> Cmd {
        let place = [self.place[0].as_str(), self.place[1].as_str()];
        agent(&[command, &place, opening].concat())
    }
}

/// The password of a repository, by `age` and not by us.
pub fn unwrapped(recovery_key: &Path, wrapped: &Path) -> Ended {
    Cmd::new("age").arg("-d").arg("-i").arg(recovery_key).arg(wrapped).run()
}

/// The same, in a file that only its owner can read.
pub fn password_file(recovery_key: &Path, repository: &Path, file: PathBuf) -> PathBuf {
    let password = unwrapped(recovery_key, &repository.join("hestner-key.age")).ok();
    files::write(&file, password);
    files::set_mode(&file, 0o600);
    file
}
