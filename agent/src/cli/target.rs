//! The folder that a restore writes to: one that is new or empty, or one that the same restore was killed in.
//!
//! While a restore is unfinished a mark lies in its target: an empty file whose name holds the snapshot's id. No
//! snapshot can hold a file of that name, since its id is the hash of what it holds. Whoever finds the mark of the
//! same snapshot goes on with it; any other folder with something in it is refused. The mark is locked while somebody
//! works, so that two never write at once.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::Complaint;
use crate::platform::chain;
use crate::platform::files::{self, FileError, Lock};

/// How a mark's name begins.
const MARK_PREFIX: &str = ".hestner-restore-";
const NEXT_STEP: &str = "name a folder that does not exist yet or is empty";

/// A target that is ours as long as this lives.
#[derive(Debug)]
pub(super) struct Target {
    mark: PathBuf,
    _lock: Lock,
    /// Whether it holds what an earlier restore of the same snapshot has written.
    pub(super) goes_on: bool,
}

fn bad(reason: String) -> Complaint {
    Complaint::mend("bad_target", reason, NEXT_STEP)
}

/// Makes the target of a restore, or takes one that a restore of the same snapshot was ended early in.
pub(super) fn begin(target: &Path, snapshot_id: &str) -> Result<Target, Complaint> {
    let name = format!("{MARK_PREFIX}{snapshot_id}");
    let mark = target.join(&name);
    let marks = marks(target);
    let goes_on = marks.contains(&name);
    if goes_on {
        // Whoever else could write there may have prepared what would then be called restored.
        refuse_strangers(target)?;
        refuse_strangers(&mark)?;
    } else {
        if let Some(other) = marks.first() {
            let id = other.trim_start_matches(MARK_PREFIX);
            let reason = format!("{} holds an unfinished restore of another snapshot, {id}", target.display());
            let next = "finish that one, remove the folder, or name another";
            return Err(Complaint::mend("bad_target", reason, next));
        }
        check_target(target)?;
    }
    match files::try_lock(&mark) {
        Ok(Some(lock)) => Ok(Target { mark, _lock: lock, goes_on }),
        Ok(None) => {
            let reason = format!("another restore is writing to {} now", target.display());
            Err(Complaint::mend("bad_target", reason, "wait until it has ended"))
        }
        Err(error) => Err(bad(chain(&error))),
    }
}

/// Goes on only in what is this user's own, and nobody else's to write.
fn refuse_strangers(path: &Path) -> Result<(), Complaint> {
    let metadata = path.symlink_metadata().map_err(|e| bad(format!("cannot look at {}: {e}", path.display())))?;
    let is_ours = metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o022 == 0;
    match is_ours {
        true => Ok(()),
        false => Err(bad(format!("{} belongs to somebody else, or others can write it", path.display()))),
    }
}

impl Target {
    /// Everything is restored.
    pub(super) fn finish(self) -> Result<(), FileError> {
        files::remove(&self.mark)
    }
}

/// The marks in a folder. Only regular files are some: nobody can lead us elsewhere.
fn marks(target: &Path) -> Vec<String> {
    let is_folder = target.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    let entries = is_folder.then(|| target.read_dir().ok()).flatten();
    let marks = entries.into_iter().flatten().flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_file()));
    let names = marks.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(MARK_PREFIX)).collect()
}

/// What is restored must not mix with what is there, and must not follow a symlink somewhere else. Makes the folder if
/// need be.
pub(super) fn check_target(target: &Path) -> Result<(), Complaint> {
    match target.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            files::private_folder(target).map_err(|e| bad(chain(&e)))
        }
        Err(error) => Err(bad(format!("cannot look at {}: {error}", target.display()))),
        Ok(metadata) if !metadata.is_dir() => Err(bad(format!("{} is not a folder", target.display()))),
        Ok(_) => match target.read_dir().map(|mut entries| entries.next().is_none()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(bad(format!("{} is not empty", target.display()))),
            Err(error) => Err(bad(format!("cannot list {}: {error}", target.display()))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(target: &Path, id: &str) -> String {
        begin(target, id).unwrap_err().message
    }

    #[test]
    fn unfinished_restore_is_gone_on_with_and_a_finished_one_is_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("new");
        let first = begin(&target, "aa").unwrap();
        assert!(!first.goes_on);
        assert_eq!(refusal(&target, "aa"), format!("another restore is writing to {} now", target.display()));
        files::create_new(&target.join("part"), b"x").unwrap();
        drop(first);
        assert!(refusal(&target, "bb").contains("of another snapshot, aa"));
        let second = begin(&target, "aa").unwrap();
        assert!(second.goes_on);
        second.finish().unwrap();
        assert!(refusal(&target, "aa").contains("is not empty"));
    }

    #[test]
    fn mark_that_leads_elsewhere_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        let target = folder.path().join("target");
        files::private_folder(&target).unwrap();
        std::os::unix::fs::symlink(&outside, target.join(format!("{MARK_PREFIX}aa"))).unwrap();
        assert!(refusal(&target, "aa").contains("is not empty"));
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        assert!(refusal(&link, "aa").contains("is not a folder"));
        assert!(!outside.exists());
    }
}
