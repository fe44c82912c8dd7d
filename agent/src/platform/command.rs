//! Other programs, run with a deadline and a bound on what they may say.
//!
//! Every child gets an environment of its own (nothing is inherited but `PATH` and `LANG`), and it is said of
//! each whether it dies with its parent or ends by itself ([`End`]).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use super::process;

/// Name of this program in lists of processes; the kernel keeps 15 bytes.
pub const OWN_NAME: &str = "hestner-agent";

/// A program that could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It did not end in time and was killed.
    #[error("{program} did not end within {seconds} s and was killed")]
    Timeout {
        /// The program.
        program: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// Talking to it failed.
    #[error("cannot talk to {program}")]
    Pipe {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    /// What it is called in lists of processes, if not by its path.
    name: Option<&'static str>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

/// What a program that has ended left behind.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// The first bytes of its output, up to the bound.
    pub stdout: Vec<u8>,
    /// The first bytes of its error output, up to the bound.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Error output as one line for a message, without control characters.
    pub fn complaint(&self) -> String {
        printable(&self.stderr)
    }
}

/// Turns bytes of a stranger into one line of text that cannot move a terminal's cursor.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let clean: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    clean.chars().take(2000).collect()
}

impl Program {
    /// The program at `path`, without arguments.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), name: None, arguments: Vec::new(), environment: Vec::new() }
    }

    /// This very program, to be started again as another of its processes: the one that runs, also when its
    /// file was replaced by an upgrade meanwhile.
    pub fn own() -> Self {
        Self { name: Some(OWN_NAME), ..Self::new("/proc/self/exe") }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment. Not for secrets: others of the same user can read it.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// As the standard library starts it; for callers that wait without a runtime.
    #[expect(clippy::disallowed_methods, reason = "the one place that starts programs")]
    pub fn prepare(&self) -> std::process::Command {
        let mut command = std::process::Command::new(&self.path);
        if let Some(name) = self.name {
            command.arg0(name);
        }
        command.args(&self.arguments).env_clear();
        for name in ["PATH", "LANG"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts it with the given standard streams; `inherit` are descriptors that it gets as well.
    ///
    /// # Errors
    /// [`CommandError::Start`].
    pub fn spawn(
        &self,
        streams: Streams,
        end: End,
        inherit: &[&dyn AsFd],
    ) -> Result<tokio::process::Child, CommandError> {
        let mut command = self.prepare();
        command.stdin(streams.stdin).stdout(streams.stdout).stderr(streams.stderr);
        match end {
            End::WithParent => process::die_with_parent(&mut command),
            End::ByItself => process::detach(&mut command, None),
        }
        for fd in inherit {
            process::inherit(&mut command, fd.as_fd());
        }
        let mut command = tokio::process::Command::from(command);
        command.kill_on_drop(end == End::WithParent);
        command.spawn().map_err(|source| CommandError::Start { program: self.path.clone(), source })
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it cannot be started, or does not end before `deadline`. Another exit code than 0 is no error.
    pub async fn run(&self, stdin: &[u8], limits: Limits) -> Result<Output, CommandError> {
        let mut child = self.spawn(Streams::piped(), End::WithParent, &[])?;
        let pipe = |source| CommandError::Pipe { program: self.path.clone(), source };
        let input = child.stdin.take();
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let feed = async {
            if let Some(mut input) = input {
                // A program that does not read all of its input is free not to.
                let _ = input.write_all(stdin).await;
            }
        };
        let all = async {
            let ((), stdout, stderr, status) = tokio::join!(
                feed,
                read_bounded(out, limits.output_bytes_max),
                read_bounded(err, limits.output_bytes_max),
                child.wait()
            );
            Ok(Output { status: status.map_err(pipe)?, stdout: stdout.map_err(pipe)?, stderr: stderr.map_err(pipe)? })
        };
        match tokio::time::timeout(limits.timeout, all).await {
            Ok(output) => output,
            Err(_) => Err(CommandError::Timeout { program: self.path.clone(), seconds: limits.timeout.as_secs() }),
        }
    }
}

/// What ends a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It is killed when the thread that started it ends, or its handle is dropped.
    WithParent,
    /// It watches its input, and has work of its own to bring to an end when that closes.
    ByItself,
}

/// Bounds of a run.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long it may take.
    pub timeout: Duration,
    /// How much of each stream is kept; the rest is read and dropped.
    pub output_bytes_max: usize,
}

impl Limits {
    /// For commands that answer at once: 1 MiB of output.
    pub fn seconds(seconds: u64) -> Self {
        Self { timeout: Duration::from_secs(seconds), output_bytes_max: 1024 * 1024 }
    }
}

/// Standard streams of a child.
#[derive(Debug)]
pub struct Streams {
    /// Where it reads.
    pub stdin: Stdio,
    /// Where it writes.
    pub stdout: Stdio,
    /// Where it complains.
    pub stderr: Stdio,
}

impl Streams {
    /// All three piped to this process.
    pub fn piped() -> Self {
        Self { stdin: Stdio::piped(), stdout: Stdio::piped(), stderr: Stdio::piped() }
    }

    /// One descriptor for reading and writing; complaints go where this process's go.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn socket(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { stdin: Stdio::from(fd.try_clone()?), stdout: Stdio::from(fd), stderr: Stdio::inherit() })
    }
}

async fn read_bounded(stream: Option<impl AsyncRead + Unpin>, bytes_max: usize) -> io::Result<Vec<u8>> {
    let Some(mut stream) = stream else { return Ok(Vec::new()) };
    let mut kept = Vec::new();
    (&mut stream).take(bytes_max as u64).read_to_end(&mut kept).await?;
    tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_beyond_the_bound_is_dropped_and_the_program_ends() {
        let program = Program::new("/bin/sh").args(["-c", "head -c 1000000 /dev/zero; echo done >&2"]);
        let limits = Limits { timeout: Duration::from_secs(20), output_bytes_max: 10 };
        let output = program.run(b"", limits).await.unwrap();
        assert_eq!((output.stdout.len(), output.complaint().as_str()), (10, "done"));
        assert!(output.status.success());
    }

    #[tokio::test]
    async fn program_past_its_deadline_is_killed() {
        let limits = Limits { timeout: Duration::from_millis(50), output_bytes_max: 10 };
        let error = Program::new("/bin/sleep").arg("60").run(b"", limits).await.unwrap_err();
        assert!(matches!(error, CommandError::Timeout { .. }));
    }

    #[test]
    fn text_of_strangers_cannot_move_the_cursor() {
        assert_eq!(printable(b"a\x1b[2Jb\nc\n"), "a [2Jb c");
    }
}
