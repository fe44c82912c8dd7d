//! Stock `restic`: the judge of every repository, and what our agents prune with.
//!
//! [`Repository`] reads a repository with the distribution's own program and the password file of the
//! host, without us. [`FaultyRestic`] is a program that behaves like `restic` until a test writes a snippet
//! of shell for one of its verbs; it leaves a line for every call. Agents find it through their settings. Runs are held
//! and broken by the [`Archiver`](crate::Archiver).

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

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
        files::write(folder.join("calls.log"), "");
        Self { folder: folder.to_owned() }
    }

    /// The program.
    pub fn program(&self) -> PathBuf {
        self.folder.join("restic")
    }

    /// From now on runs `snippet` before that verb, or before `any`. The snippet may end the call itself (`exit 1`).
    pub fn on(&self, verb: &str, snippet: &str) {
        files::write(self.folder.join(format!("on-{verb}")), snippet);
    }

    /// Behaves like stock restic again.
    pub fn heal(&self, verb: &str) {
        let _ = std::fs::remove_file(self.folder.join(format!("on-{verb}")));
    }

    /// Verb and arguments of every call so far.
    pub fn calls(&self) -> Vec<String> {
        files::lines(&self.folder.join("calls.log"))
    }
}
