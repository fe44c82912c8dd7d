//! An agent on loopback: its daemon, its command line, its processes and its repository.
//!
//! Made by an [`AgentBuilder`]. It speaks to the daemon as a person would, finds its parts through `/proc`,
//! and looks at what is stored with stock restic. Everything the agent needs lies in one folder owned by
//! the user it runs as. The daemon and all that it started end with the handle.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::archiver::Archiver;
use crate::builder::AgentBuilder;
use crate::clock::{self, wait_for, wait_until};
use crate::command::{Cmd, Ended};
use crate::files;
use crate::processes::{self, Process};
use crate::restic::Repository;
use crate::run::{Run, Snapshotting};

/// How long a start may take on a busy machine.
const START_WITHIN: Duration = Duration::from_secs(30);
/// How long one snapshot of a test's small source may take.
const RUN_WITHIN: Duration = Duration::from_secs(180);

/// An agent on loopback. Ends with its handle.
pub struct Agent {
    /// Its settings file.
    pub config: PathBuf,
    /// Its log.
    pub log: PathBuf,
    /// The server it enrolled as, 0 before.
    pub server_id: i64,
    binary: PathBuf,
    child: Option<Child>,
    builder: AgentBuilder,
}

impl Agent {
    /// Makes a run's guards seem to have lived before the machine was booted.
    ///
    /// # Panics
    /// When a record is not there, or does not name this life of the machine.
    pub fn seem_rebooted(&self, uid: &str, journals: &[&str]) {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("the boot id");
        for journal in journals {
            let journal = self.state().join("runs").join(uid).join(journal);
            let text = std::fs::read_to_string(&journal).expect("a guard's record");
            assert!(text.contains(boot.trim()), "the record names the life of the machine: {text}");
            files::write(&journal, text.replace(boot.trim(), "00000000-0000-4000-8000-000000000000"));
        }
    }

    /// Writes the files of an agent to be.
    pub(crate) fn written(builder: AgentBuilder) -> Self {
        let agent = Self {
            config: builder.folder.join("agent.toml"),
            log: builder.folder.join("agent.log"),
            binary: builder.binary(),
            server_id: 0,
            child: None,
            builder,
        };
        agent.write_files();
        agent
    }

    fn write_files(&self) {
        std::fs::create_dir_all(&self.builder.folder).expect("a folder");
        std::fs::create_dir_all(&self.builder.state).expect("a folder");
        for (_, path) in &self.builder.destinations {
            std::fs::create_dir_all(path).expect("a folder");
        }
        files::write(self.grants_file(), self.builder.grants_text());
        files::write(&self.config, self.builder.settings());
        if let Some(uid) = self.builder.uid {
            files::give_to(&self.builder.folder, uid);
        }
        if let Some(uid) = self.builder.daemon_uid {
            files::set_mode(&self.builder.state, 0o755);
            for own in [self.builder.state.join("daemon"), self.builder.socket_folder()] {
                std::fs::create_dir_all(&own).expect("a folder");
                files::set_mode(&own, 0o700);
                files::give_to(&own, uid);
            }
        }
    }

    /// Changes the settings on disk; the next start, or the next command, sees them.
    pub fn change(&mut self, change: impl FnOnce(AgentBuilder) -> AgentBuilder) {
        self.builder = change(self.builder.clone());
        self.write_files();
    }

    /// The grants file.
    pub fn grants_file(&self) -> PathBuf {
        self.builder.folder.join("grants.toml")
    }

    /// The daemon's local socket.
    pub fn socket(&self) -> PathBuf {
        self.builder.socket_folder().join("control.sock")
    }

    /// The state folder.
    pub fn state(&self) -> &Path {
        &self.builder.state
    }

    /// The agent's folder: settings, grants, log.
    pub fn folder(&self) -> &Path {
        &self.builder.folder
    }

    /// Enrols with the builder's token.
    pub fn enrol(&self, more: &[&str]) -> Ended {
        self.enrol_with(&self.builder.token, &self.builder.fingerprint, more)
    }

    /// Enrols with this token and fingerprint.
    pub fn enrol_with(&self, token: &str, fingerprint: &str, more: &[&str]) -> Ended {
        let args = ["enroll", "--token-file", "-", "--recovery-fingerprint", fingerprint];
        self.command(&args).args(more).stdin(format!("{token}\n")).run()
    }

    /// Enrols with the builder's token, and keeps the server's id.
    ///
    /// # Panics
    /// When it is not admitted.
    pub fn enrol_again(&mut self) {
        let enrolled = self.enrol(&["--json"]).json();
        self.server_id = enrolled["server_id"].as_i64().unwrap_or_else(|| panic!("no server_id in {enrolled}"));
    }

    /// Whether it holds a certificate.
    pub fn is_enrolled(&self) -> bool {
        self.state().join("daemon/identity/agent.pem").exists()
    }

    /// A command line of it.
    pub fn command(&self, args: &[&str]) -> Cmd {
        Cmd::new(&self.binary).as_user(self.builder.uid).arg("--config").arg(&self.config).args(args).within(RUN_WITHIN)
    }

    /// Runs a command line of it.
    pub fn cli(&self, args: &[&str]) -> Ended {
        self.command(args).run()
    }

    /// Starts the daemon and waits until it is connected.
    pub fn start(&mut self) {
        self.start_alone();
        self.wait_connected();
    }

    /// Starts the daemon and waits until it answers on its socket, with or without a receiver.
    pub fn start_alone(&mut self) {
        let log = self.log.clone();
        let socket =
            self.builder.runner_socket.iter().flat_map(|path| [OsStr::new("--runner-socket"), path.as_os_str()]);
        self.child = Some(self.command(&["run"]).args(socket).as_user(self.builder.daemon_uid).spawn_logged(&log));
        wait_until(&format!("the agent to answer, see {}", log.display()), START_WITHIN, || {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                panic!("the agent ended at once ({status}):\n{}", files::lines(&log).join("\n"));
            }
            self.daemon_answers()
        });
    }

    fn daemon_answers(&self) -> bool {
        self.cli(&["status", "--json"]).code == Some(0)
    }

    /// `status --json`.
    pub fn status(&self) -> Value {
        self.cli(&["status", "--json"]).json()
    }

    /// Waits until the receiver has welcomed it.
    pub fn wait_connected(&self) {
        wait_until("the agent to be connected", START_WITHIN, || self.status()["connected"] == true);
    }

    /// Waits until every report is acknowledged.
    pub fn wait_outbox_empty(&self) {
        wait_until("the outbox to be empty", Duration::from_secs(60), || {
            let status = self.status();
            status["outbox_reports"] == 0 && status["runs_active"] == 0
        });
    }

    /// The daemon's process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().expect("a running daemon").id()).expect("a pid")
    }

    /// Whether the daemon's process runs.
    pub fn daemon_is_alive(&self) -> bool {
        processes::is_alive(self.pid())
    }

    /// SIGKILL for the daemon alone: what it started lives on as it can.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and waits for a clean end.
    pub fn stop(&mut self) {
        let pid = self.pid();
        processes::send(pid, Signal::SIGTERM);
        let mut child = self.child.take().expect("a running daemon");
        let status = wait_for("the agent to stop", Duration::from_secs(20), || child.try_wait().ok().flatten());
        assert!(status.success(), "the agent stopped with {status}");
    }

    /// The part of that name (`runner`, `worker`, `hook`) below the daemon, when there is one.
    pub fn part(&self, word: &str) -> Option<Process> {
        self.parts(word).pop()
    }

    /// The parts of that name that name our settings or descend from our daemon.
    pub fn parts(&self, word: &str) -> Vec<Process> {
        let own = |p: &Process| p.argv.first().is_some_and(|program| program.ends_with("hestner-agent"));
        processes::descendants(self.pid()).into_iter().filter(|p| own(p) && p.is_part(word)).collect()
    }

    /// Waits for the part of that name.
    pub fn wait_part(&self, word: &str) -> Process {
        wait_for(&format!("a {word} process"), Duration::from_secs(30), || self.part(word))
    }

    /// A handle to its archiver, from which a run can be held and broken.
    pub fn archiver(&self) -> Archiver {
        Archiver::of(self.state())
    }

    /// Takes a snapshot to its end.
    pub fn snapshot(&self, service: &str) -> Run {
        self.snapshot_started(service).run()
    }

    /// Takes a snapshot that must succeed.
    ///
    /// # Panics
    /// When it did not.
    pub fn snapshot_ok(&self, service: &str) -> Run {
        let ended = self.snapshot_started(service).0.ended();
        assert_eq!(ended.code, Some(0), "{ended}");
        let run = Run(ended.any_json());
        assert_eq!(run.text("status"), "success", "{run:?}");
        run
    }

    /// Starts a snapshot and goes on.
    pub fn snapshot_started(&self, service: &str) -> Snapshotting {
        Snapshotting(self.command(&["snapshot", service, "--json"]).start())
    }

    /// Runs, newest first.
    pub fn runs(&self) -> Vec<Run> {
        let runs = self.cli(&["runs", "--json"]).json();
        runs.as_array().expect("a list of runs").iter().cloned().map(Run).collect()
    }

    /// The newest run.
    ///
    /// # Panics
    /// When there is none.
    pub fn last_run(&self) -> Run {
        self.runs().into_iter().next().expect("a run")
    }

    /// Waits until the newest run has ended.
    pub fn wait_last_run_ended(&self) -> Run {
        wait_for("the newest run to end", RUN_WITHIN, || {
            let run = self.runs().into_iter().next()?;
            (run.text("status") == "success" || run.text("status") == "failed").then_some(run)
        })
    }

    /// Restores a run.
    pub fn restore(&self, run_uid: &str, target: &Path) -> Ended {
        self.cli(&["restore", run_uid, "--target", target.to_str().expect("a path in UTF-8")])
    }

    /// Folder of the encrypted repository at a destination.
    pub fn repository_path(&self, destination: &str) -> PathBuf {
        let found = self.builder.destinations.iter().find(|(name, _)| name == destination);
        let (_, path) = found.unwrap_or_else(|| panic!("no destination {destination}"));
        path.join(self.repository_name())
    }

    /// Name of the encrypted repository below any destination.
    pub fn repository_name(&self) -> String {
        format!("server-{}-encrypted", self.server_id)
    }

    /// The file with the password of the encrypted repository at a destination.
    pub fn password_file(&self, destination: &str) -> PathBuf {
        self.builder.state.join(format!("keys/{destination}-encrypted.password"))
    }

    /// The encrypted repository at a destination, for stock restic.
    pub fn repository(&self, destination: &str) -> Repository {
        Repository { path: self.repository_path(destination), password_file: self.password_file(destination) }
    }

    /// Asserts that the repository holds the snapshots of these runs only, and no lock.
    ///
    /// # Panics
    /// When it does not.
    pub fn assert_repository_holds(&self, expected: &[&Run]) {
        self.repository_holds(expected).unwrap_or_else(|difference| panic!("{difference}"));
    }

    /// The same, once what an earlier daemon left has been cleaned up.
    ///
    /// # Panics
    /// When it is not within a minute.
    pub fn wait_repository_holds(&self, expected: &[&Run]) {
        clock::eventually(Duration::from_secs(60), || self.repository_holds(expected).is_ok());
        self.assert_repository_holds(expected);
    }

    fn repository_holds(&self, expected: &[&Run]) -> Result<(), String> {
        let repository = self.repository("local");
        if !repository.path.join("config").exists() {
            let fine = expected.is_empty();
            return if fine { Ok(()) } else { Err(format!("there is no repository at {}", repository.path.display())) };
        }
        let mut held: Vec<String> =
            repository.snapshots().iter().map(|s| s["id"].as_str().expect("an id").to_owned()).collect();
        let mut wanted: Vec<String> = expected.iter().map(|run| run.snapshot_id()).collect();
        held.sort();
        wanted.sort();
        let locks = repository.locks();
        if held == wanted && locks.is_empty() {
            return Ok(());
        }
        Err(format!("the repository holds {held:?}, expected {wanted:?}; locks left behind: {locks:?}"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let below = self.child.as_ref().map(|_| processes::descendants(self.pid())).unwrap_or_default();
        self.kill9();
        below.iter().for_each(|process| processes::kill(process.pid));
        processes::kill_all_naming(&self.builder.folder);
    }
}
