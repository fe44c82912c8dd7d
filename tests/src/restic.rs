//! Stock `restic`: the judge of every repository, and the place where faults are put in.
//!
//! [`Repository`] reads a repository with the distribution's own program and the password file of the
//! host, without us. [`FaultyRestic`] is a program that behaves like `restic` until a test writes a snippet
//! of shell for one of its verbs; it leaves a line for every call. Agents find it through their settings.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::clock::wait_until;
use crate::command::{Cmd, Ended};
use crate::files;

/// The distribution's program.
pub const STOCK: &str = "/usr/bin/restic";

/// A repository as stock restic sees it.
#[derive(Clone, Debug)]
pub struct Repository {
    /// Its folder.
    pub path: PathBuf,
    /// The host's password file.
    pub password_file: PathBuf,
}

impl Repository {
    /// A command of stock restic on this repository, as root and without a cache.
    pub fn stock(&self, args: &[&str]) -> Cmd {
        let base = Cmd::new(STOCK).arg("-r").arg(&self.path).arg("--password-file").arg(&self.password_file);
        base.arg("--no-cache").args(args)
    }

    /// Snapshots in it, by stock restic.
    pub fn snapshots(&self) -> Vec<Value> {
        let list = self.stock(&["snapshots", "--json", "--no-lock"]).run().json();
        list.as_array().cloned().unwrap_or_default()
    }

    /// Locks in it, by stock restic.
    pub fn locks(&self) -> Vec<String> {
        self.stock(&["list", "locks", "--no-lock"]).ok().lines().map(str::to_owned).collect()
    }

    /// Reads every byte back.
    pub fn check(&self) -> Ended {
        self.stock(&["check", "--read-data"]).within(Duration::from_secs(300)).run()
    }

    /// Restores a snapshot by stock restic.
    pub fn restore(&self, snapshot: &str, target: &Path) {
        let target = target.to_str().expect("a path in UTF-8");
        self.stock(&["restore", snapshot, "--target", target]).within(Duration::from_secs(300)).ok();
    }

    /// Whether at least one pack of data lies in it.
    pub fn has_packs(&self) -> bool {
        let data = self.path.join("data");
        let folders = std::fs::read_dir(data).into_iter().flatten().flatten();
        folders.filter_map(|f| std::fs::read_dir(f.path()).ok()).flatten().flatten().any(|file| {
            // restic writes packs under a temporary name first.
            !file.file_name().to_string_lossy().contains("tmp")
        })
    }
}

/// A program in restic's place.
#[derive(Clone, Debug)]
pub struct FaultyRestic {
    folder: PathBuf,
}

impl FaultyRestic {
    /// Puts it into `folder`.
    pub fn new(folder: &Path) -> Self {
        // The verb is the first argument that is one: options may stand before it. `HERE` is for snippets.
        let body = format!(
            r#"HERE={folder}
verb=none
for word in "$@"; do
  case "$word" in
    backup|forget|snapshots|init|check|unlock|stats|cat|restore|dump|ls|diff|prune|list|find|key|tag|version|self-update)
      verb=$word; break ;;
  esac
done
echo "$verb $*" >>"$HERE/calls.log"
[ -e "$HERE/on-any" ] && . "$HERE/on-any"
[ -e "$HERE/on-$verb" ] && . "$HERE/on-$verb"
exec {STOCK} "$@""#,
            folder = folder.display(),
        );
        files::write_script(folder.join("restic"), &body);
        // An unprivileged agent leaves its marks here as well.
        files::write(folder.join("calls.log"), "");
        files::set_mode(&folder.join("calls.log"), 0o666);
        std::fs::create_dir_all(folder.join("marks")).expect("a folder");
        files::set_mode(&folder.join("marks"), 0o777);
        Self { folder: folder.to_owned() }
    }

    /// The program.
    pub fn program(&self) -> PathBuf {
        self.folder.join("restic")
    }

    /// From now on runs `snippet` before that verb. The snippet may end the call itself (`exit 1`), hang,
    /// or change the arguments (`set -- --limit-upload 200 "$@"`).
    pub fn on(&self, verb: &str, snippet: &str) {
        files::write(self.folder.join(format!("on-{verb}")), snippet);
    }

    /// From now on the `number`-th call, whatever its verb, does `instead` (`exit 1`, `kill -9 $$`); the
    /// others behave. Counted from 1.
    pub fn on_call(&self, number: usize, instead: &str) {
        let number = self.calls().len() + number;
        let reached = format!("[ \"$(wc -l <\"$HERE/calls.log\")\" -eq {number} ]");
        self.on("any", &format!("if {reached}; then rm \"$HERE/on-any\"; {instead}; fi"));
    }

    /// Whether the call of [`FaultyRestic::on_call`] is still to come.
    pub fn is_waiting(&self) -> bool {
        self.folder.join("on-any").exists()
    }

    /// Slows down what `backup` writes, so that a test can act while it goes on.
    pub fn slow_down(&self, kilobytes_per_second: u32) {
        self.on("backup", &format!("set -- --limit-upload {kilobytes_per_second} \"$@\""));
    }

    /// Makes that verb leave a mark and then hang until it is killed or [`FaultyRestic::heal`]ed.
    pub fn hang_on(&self, verb: &str) {
        self.on(verb, &format!("touch \"$HERE/marks/{verb}\"\nwhile [ -e \"$HERE/on-{verb}\" ]; do sleep 0.05; done"));
    }

    /// Waits until a hanging verb was reached.
    pub fn wait_reached(&self, verb: &str) {
        let mark = self.folder.join("marks").join(verb);
        wait_until(&format!("restic {verb} to be reached"), Duration::from_secs(60), || mark.exists());
    }

    /// Behaves like stock restic again.
    pub fn heal(&self, verb: &str) {
        let _ = std::fs::remove_file(self.folder.join(format!("on-{verb}")));
        let _ = std::fs::remove_file(self.folder.join("marks").join(verb));
    }

    /// Verb and arguments of every call so far.
    pub fn calls(&self) -> Vec<String> {
        files::lines(&self.folder.join("calls.log"))
    }

    /// How often that verb was called.
    pub fn count(&self, verb: &str) -> usize {
        self.calls().iter().filter(|line| line.starts_with(&format!("{verb} "))).count()
    }
}
