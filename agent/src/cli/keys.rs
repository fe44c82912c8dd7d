//! `keys`: which keys this host has, and which of them the company has as well.
//!
//! For people, and for the package: purging it removes keys only when nobody would miss them. Reads the key files
//! and the daemon's outbox; prints no key. Works without the daemon, and beside it. That a key was acknowledged is the
//! daemon's word; nobody else has heard it.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::{Complaint, EXIT_FAILED, output};
use crate::daemon::settings::Settings;
use crate::escrow::EscrowedKey;
use crate::platform::files::{self, FileError};
use crate::platform::{chain, process};
use crate::policy::DAEMON_FOLDER;
use crate::report::Report;
use crate::store::{self, StoreError};

const KEY_BYTES_MAX: u64 = 16 * 1024;

/// A repository's key, without the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Key {
    /// Name of the destination.
    destination: String,
    /// `encrypted` or `open`.
    mode: String,
    /// Whether the company has it too.
    escrow: Escrow,
    /// The file with the password.
    password_file: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Escrow {
    /// The receiver has committed it.
    Acknowledged,
    /// It was not told, or not acknowledged yet.
    Waiting,
}

pub(super) fn list(settings: &Settings, require_escrow: bool, as_json: bool) -> Result<(), Complaint> {
    let keys = keys(&settings.state_dir)?;
    if as_json {
        output::json(&keys);
    } else if keys.is_empty() {
        output::line("this host has no keys");
    }
    for Key { destination, mode, escrow, password_file } in keys.iter().filter(|_| !as_json) {
        let escrow = match escrow {
            Escrow::Acknowledged => "acknowledged by the receiver",
            Escrow::Waiting => "NOT acknowledged by the receiver",
        };
        output::line(&format!("{destination} ({mode})  {escrow}  {password_file}"));
    }
    let waiting: Vec<&str> =
        keys.iter().filter(|key| key.escrow == Escrow::Waiting).map(|key| key.destination.as_str()).collect();
    if !require_escrow || waiting.is_empty() {
        return Ok(());
    }
    Err(Complaint {
        message: format!("the receiver has not acknowledged the key of: {}", waiting.join(", ")),
        next_step: "let the agent run until `hestner-agent keys` says so, or copy the password files to a safe place"
            .to_owned(),
        code: "escrow_waiting".to_owned(),
        exit: EXIT_FAILED,
    })
}

fn keys(state_dir: &Path) -> Result<Vec<Key>, Complaint> {
    let unreadable = |e: &dyn std::error::Error| Complaint::mend("keys_unreadable", chain(e), "run it as root");
    let told = told(state_dir).map_err(|e| unreadable(&e))?;
    let mut found = Vec::new();
    for path in password_files(&state_dir.join("keys")).map_err(|e| unreadable(&e))? {
        let mark = mark(&path).map_err(|e| unreadable(&e))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let (destination, mode) = name.rsplit_once('-').unwrap_or((&name, ""));
        found.push(Key {
            destination: destination.to_owned(),
            mode: mode.to_owned(),
            escrow: if told.contains(&mark) { Escrow::Acknowledged } else { Escrow::Waiting },
            password_file: path.display().to_string(),
        });
    }
    Ok(found)
}

fn password_files(folder: &Path) -> std::io::Result<Vec<std::path::PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "password") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The mark that the report of this key carried.
fn mark(password_file: &Path) -> Result<String, FileError> {
    let wrapped = password_file.with_extension("age");
    match files::read(&wrapped, KEY_BYTES_MAX) {
        Ok(bytes) => Ok(EscrowedKey::Wrapped(bytes).mark()),
        Err(error) if error.is_missing() => {
            let password = files::read(password_file, KEY_BYTES_MAX)?;
            Ok(EscrowedKey::Open(String::from_utf8_lossy(&password).into_owned()).mark())
        }
        Err(error) => Err(error),
    }
}

/// Marks of the keys that the receiver has acknowledged. A daemon without a store has told nothing.
fn told(state_dir: &Path) -> Result<BTreeSet<String>, StoreError> {
    let daemon = state_dir.join(DAEMON_FOLDER);
    let look = || {
        let path = daemon.join("agent.db");
        if !path.exists() {
            return Ok(BTreeSet::new());
        }
        let mut waiting = BTreeSet::new();
        let mut marks = store::look(&path, |report| waiting.extend(Report::key_mark(report)))?;
        marks.retain(|mark| !waiting.contains(mark));
        Ok(marks)
    };
    // What SQLite lays beside the file must be the daemon's.
    process::as_owner_of(&daemon, look).unwrap_or_else(|_| Ok(BTreeSet::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::escrow::RepositoryKey;
    use crate::store::Store;

    fn key(content: &[u8]) -> RepositoryKey {
        let key = EscrowedKey::Wrapped(content.to_vec());
        RepositoryKey { repository_id: "r".into(), destination: "local".into(), key }
    }

    fn escrow_of(state_dir: &Path) -> Vec<(String, Escrow)> {
        let keys = keys(state_dir).unwrap_or_else(|c| panic!("{}", c.message));
        keys.into_iter().map(|key| (key.destination, key.escrow)).collect()
    }

    #[tokio::test]
    async fn key_counts_as_escrowed_only_after_the_receiver_has_acknowledged_it() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path();
        files::private_folder(&state.join("keys")).unwrap();
        files::private_folder(&state.join(DAEMON_FOLDER)).unwrap();
        files::write(&state.join("keys/off-site-encrypted.password"), b"secret", 0o600).unwrap();
        files::write(&state.join("keys/off-site-encrypted.age"), b"wrapped", 0o600).unwrap();
        assert_eq!(escrow_of(state), [("off-site".to_owned(), Escrow::Waiting)], "no store");

        let store = Store::open(&state.join(DAEMON_FOLDER).join("agent.db"), "e").unwrap();
        assert_eq!(escrow_of(state)[0].1, Escrow::Waiting, "never told");
        let told = key(b"wrapped");
        store.append_once(told.key.mark(), Report::RepositoryKey(told).encode(1)).await.unwrap();
        assert_eq!(escrow_of(state)[0].1, Escrow::Waiting, "told, not acknowledged");
        store.acknowledge(1).await.unwrap();
        assert_eq!(escrow_of(state)[0].1, Escrow::Acknowledged);

        // Another key at the same destination is another matter.
        files::write(&state.join("keys/off-site-encrypted.age"), b"wrapped anew", 0o600).unwrap();
        assert_eq!(escrow_of(state)[0].1, Escrow::Waiting, "another key");
    }
}
