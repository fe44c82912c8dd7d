//! What ours is compared with: the same system calls, commands and requests, by hand and with nothing around.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use hestner_agent::platform::command::Program;
use hestner_agent::platform::fsfreeze;
use hestner_tests::clock::now;
use hestner_tests::files;

/// A folder to freeze by.
pub(super) fn open(folder: &Path) -> anyhow::Result<File> {
    File::open(folder).with_context(|| format!("{} cannot be opened", folder.display()))
}

/// Freezes, runs the command if there is one, and thaws.
pub(super) fn freeze(folder: &File, command: Option<&str>) -> anyhow::Result<Duration> {
    // As ours does before its window: what lies around is not the freeze's to write.
    nix::unistd::syncfs(folder)?;
    let begin = now();
    fsfreeze::freeze(folder)?;
    let ran = command.map(|program| run(&Program::new(program)));
    fsfreeze::thaw(folder)?;
    let took = begin.elapsed();
    ran.transpose()?;
    Ok(took)
}

/// Takes a btrfs snapshot, and removes it afterwards.
pub(super) fn snapshot(subvolume: &Path) -> anyhow::Result<Duration> {
    let (took, path) = snapshot_only(subvolume)?;
    remove_snapshot(&path)?;
    Ok(took)
}

/// Takes one, and leaves it.
pub(super) fn snapshot_only(subvolume: &Path) -> anyhow::Result<(Duration, PathBuf)> {
    let path = subvolume.join("by-hand");
    let program = Program::new("/usr/bin/btrfs").args(["subvolume", "snapshot", "-r", "--"]).arg(subvolume).arg(&path);
    Ok((run(&program)?, path))
}

fn remove_snapshot(path: &Path) -> anyhow::Result<()> {
    run(&Program::new("/usr/bin/btrfs").args(["subvolume", "delete", "--commit-after", "--"]).arg(path)).map(drop)
}

/// Copies a tree, sharing its blocks, and removes the copy afterwards.
pub(super) fn copy(tree: &Path) -> anyhow::Result<Duration> {
    let copy = tree.with_file_name("by-hand");
    let took = run(&Program::new("/usr/bin/cp").args(["-a", "--reflink=always", "-T", "--"]).arg(tree).arg(&copy))?;
    std::fs::remove_dir_all(&copy)?;
    Ok(took)
}

fn run(program: &Program) -> anyhow::Result<Duration> {
    let mut command = program.prepare();
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let begin = now();
    let status = command.status()?;
    let took = begin.elapsed();
    if !status.success() {
        bail!("{program:?} ended with {status}");
    }
    Ok(took)
}

/// One connection to Docker's socket, with requests as bytes.
pub(super) struct Docker(UnixStream);

impl Docker {
    pub(super) fn connect(socket: &Path) -> anyhow::Result<Self> {
        Ok(Self(UnixStream::connect(socket)?))
    }

    /// Pauses a container, takes a snapshot, and lets it go.
    pub(super) fn pause(
        &mut self,
        name: &str,
        snapshot: impl FnOnce() -> anyhow::Result<(Duration, PathBuf)>,
    ) -> anyhow::Result<Duration> {
        let begin = now();
        self.post(&format!("/containers/{name}/pause"))?;
        let taken = snapshot();
        self.post(&format!("/containers/{name}/unpause"))?;
        let took = begin.elapsed();
        remove_snapshot(&taken?.1)?;
        Ok(took)
    }

    /// Stops a container and starts it again.
    pub(super) fn stop(&mut self, name: &str) -> anyhow::Result<Duration> {
        let begin = now();
        self.post(&format!("/containers/{name}/stop?t=10"))?;
        self.post(&format!("/containers/{name}/start"))?;
        Ok(begin.elapsed())
    }

    /// Each answer that is wanted is 204, which has no body.
    fn post(&mut self, path: &str) -> anyhow::Result<()> {
        write!(self.0, "POST {path} HTTP/1.1\r\nHost: docker\r\nContent-Length: 0\r\n\r\n")?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\r\n\r\n") {
            self.0.read_exact(&mut byte)?;
            answer.push(byte[0]);
        }
        if !answer.starts_with(b"HTTP/1.1 204") {
            bail!("Docker answered {path} with {}", String::from_utf8_lossy(&answer));
        }
        Ok(())
    }
}

/// Two hooks, the first of which says when it ends, and the second when it begins.
pub(super) struct Stamps {
    folder: PathBuf,
    /// The script that both are.
    pub(super) script: PathBuf,
}

impl Stamps {
    pub(super) fn new(folder: &Path) -> Self {
        let script = files::write_script(folder.join("stamp"), "date +%s%N >\"$1\"");
        Self { folder: folder.to_owned(), script }
    }

    /// The command line of a hook.
    pub(super) fn argv(&self, which: &str) -> Vec<String> {
        [&self.script, &self.folder.join(which)].iter().map(|path| path.display().to_string()).collect()
    }

    /// The time between the two.
    pub(super) fn between(&self) -> anyhow::Result<Duration> {
        let stamp = |which: &str| -> anyhow::Result<u64> {
            Ok(std::fs::read_to_string(self.folder.join(which))?.trim().parse()?)
        };
        Ok(Duration::from_nanos(stamp("post")?.saturating_sub(stamp("pre")?)))
    }

    /// Both, by hand.
    pub(super) fn by_hand(&self) -> anyhow::Result<Duration> {
        for which in ["pre", "post"] {
            let argv = self.argv(which);
            run(&Program::new(&argv[0]).args(&argv[1..]))?;
        }
        self.between()
    }
}
