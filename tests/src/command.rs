//! The only place of the tests that starts programs: with a deadline, and with both outputs kept.
//!
//! In: a command line. Out: how it ended ([`Ended`]), or a child that writes into a log file. A deadline
//! that is met ends the program and the test.

#![expect(clippy::disallowed_methods, reason = "this module wraps std::process::Command")]

use std::ffi::OsStr;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::clock;

/// What a test waits for one command unless it says otherwise.
const DEADLINE: Duration = Duration::from_secs(90);

/// A command line under construction.
pub struct Cmd {
    inner: Command,
    stdin: Option<Vec<u8>>,
    stdin_from: Option<OwnedFd>,
    deadline: Duration,
}

/// How a command ended.
pub struct Ended {
    /// Exit code, `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    shown: String,
}

impl Cmd {
    /// `program` is looked up in `PATH` unless it is a path.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { inner: Command::new(program), stdin: None, stdin_from: None, deadline: DEADLINE }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.inner.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.inner.args(args);
        self
    }

    /// Sets one variable of the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.inner.env(name, value);
        self
    }

    /// Takes away everything that the test's own environment has but `PATH`; for use before [`Cmd::env`].
    #[must_use]
    pub fn without_environment(mut self) -> Self {
        self.inner.env_clear();
        if let Some(path) = std::env::var_os("PATH") {
            self.inner.env("PATH", path);
        }
        self
    }

    /// Runs it in `folder`.
    #[must_use]
    pub fn in_folder(mut self, folder: &Path) -> Self {
        self.inner.current_dir(folder);
        self
    }

    /// Runs it as this user and group; `None` leaves it as it is.
    #[must_use]
    pub fn as_user(mut self, uid: Option<u32>) -> Self {
        if let Some(uid) = uid {
            self.inner.uid(uid).gid(uid);
        }
        self
    }

    /// Gives it `text` as standard input.
    #[must_use]
    pub fn stdin(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(text.into());
        self
    }

    /// Makes a pipe or a socket its standard input; for [`Cmd::spawn_logged`] and [`Cmd::spawn_heard`].
    #[must_use]
    pub fn stdin_from(mut self, fd: OwnedFd) -> Self {
        self.stdin_from = Some(fd);
        self
    }

    /// Ends the test when the command takes longer.
    #[must_use]
    pub fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts it; [`Started::ended`] waits for its end.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(mut self) -> Started {
        let shown = shown(&self.inner);
        let input = if self.stdin.is_some() { Stdio::piped() } else { Stdio::null() };
        self.inner.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.inner.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"));
        if let (Some(text), Some(mut pipe)) = (self.stdin, child.stdin.take()) {
            // A program may end without reading its input; that is its right.
            let _ = pipe.write_all(&text);
        }
        let stdout = reader(child.stdout.take());
        let stderr = reader(child.stderr.take());
        Started { child, stdout, stderr, deadline: self.deadline, shown }
    }

    /// Runs it to its end.
    pub fn run(self) -> Ended {
        self.start().ended()
    }

    /// Runs it to its end and gives its standard output.
    ///
    /// # Panics
    /// When it does not exit with 0.
    pub fn ok(self) -> String {
        self.run().ok()
    }

    /// Starts it with both outputs appended to the file `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn_logged(mut self, log: &Path) -> Child {
        let shown = shown(&self.inner);
        let file = OpenOptions::new().create(true).append(true).open(log).expect("a log file");
        let second = file.try_clone().expect("a second handle of the log file");
        self.inner.stdin(self.stdin_from.map_or_else(Stdio::null, Stdio::from)).stdout(file).stderr(second);
        self.inner.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"))
    }

    /// Starts it with its standard input as a pipe that the caller keeps; it says nothing.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn_told(mut self) -> Child {
        let shown = shown(&self.inner);
        self.inner.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        self.inner.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"))
    }

    /// Starts it with pipes to and from it, for a conversation.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn_conversed(mut self) -> Child {
        let shown = shown(&self.inner);
        self.inner.stdin(Stdio::piped()).stdout(Stdio::piped());
        self.inner.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"))
    }

    /// Starts it with its standard output as a pipe, for whoever listens while it runs.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn_heard(mut self) -> Child {
        let shown = shown(&self.inner);
        self.inner.stdin(self.stdin_from.map_or_else(Stdio::null, Stdio::from)).stdout(Stdio::piped());
        self.inner.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"))
    }
}

/// A command on its way.
pub struct Started {
    child: Child,
    stdout: std::thread::JoinHandle<Vec<u8>>,
    stderr: std::thread::JoinHandle<Vec<u8>>,
    deadline: Duration,
    shown: String,
}

impl Started {
    /// Its process.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid")
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When the deadline passes first.
    pub fn ended(mut self) -> Ended {
        let end = clock::now() + self.deadline;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child to wait for") {
                break status;
            }
            if clock::now() >= end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("{} did not end within {:?}", self.shown, self.deadline);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ended {
            code: status.code(),
            stdout: text(self.stdout.join().expect("a reader")),
            stderr: text(self.stderr.join().expect("a reader")),
            shown: self.shown,
        }
    }
}

impl Ended {
    /// Standard output of a command that succeeded.
    ///
    /// # Panics
    /// When it did not exit with 0.
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self}");
        self.stdout
    }

    /// Standard output of a command that succeeded, as JSON.
    ///
    /// # Panics
    /// When it did not exit with 0 or printed something else.
    pub fn json(self) -> serde_json::Value {
        assert_eq!(self.code, Some(0), "{self}");
        self.any_json()
    }

    /// Standard output as JSON, however the command ended.
    ///
    /// # Panics
    /// When it printed something else.
    pub fn any_json(self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}) from {self}"))
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, stdout, stderr, shown } = self;
        write!(f, "{shown}\nexit: {code:?}\nstdout: {stdout}\nstderr: {stderr}")
    }
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}

fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error is still worth showing.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}
