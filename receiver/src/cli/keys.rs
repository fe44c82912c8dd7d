//! `keys`: what the receiver keeps of repositories' keys, and the way out for one.
//!
//! A wrapped key goes to whoever has the company's recovery key; it opens nothing without. Never printed: a password.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::Json;
use super::output::{Failure, print_json, print_table};
use crate::model::report::EscrowedKey;
use crate::model::{Actor, ServerId};
use crate::platform::files;
use crate::server::Opened;

#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// List them; passwords of open repositories are not shown
    #[command(after_help = "Example:\n  hestner-receiver keys list --server 12 --json")]
    List {
        /// Of this server only
        #[arg(long, value_name = "ID")]
        server: Option<i64>,
        #[command(flatten)]
        output: Json,
    },
    /// Write one to a file that only you can read; who took it stands in the audit log
    #[command(
        after_help = "Example:\n  hestner-receiver keys export --server 12 --repository 5956a3f67a6230d4a92cefb29529f10196c7d92582ec305fd71ff6d331d6271b --out server-12.age\n\nCarry it to where the recovery key is: hestner-agent recover list --recovery-key FILE --wrapped-key server-12.age\nThat of an open repository is the password itself: hestner-agent recover list --password-file FILE"
    )]
    Export {
        /// Whose repository it is
        #[arg(long, value_name = "ID")]
        server: i64,
        /// The repository's id, or the first eight or more digits of it
        #[arg(long, value_name = "ID")]
        repository: String,
        /// The file; it must not be there yet
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        output: Json,
    },
}

/// Shortest beginning of an id that counts.
const PREFIX_MIN: usize = 8;

pub(super) async fn run(opened: &Opened, actor: Actor, command: KeysCommand) -> Result<(), Failure> {
    match command {
        KeysCommand::List { server, output } => list(opened, server.map(ServerId), output).await,
        KeysCommand::Export { server, repository, out, output } => {
            export(opened, actor, (ServerId(server), &repository), &out, output).await
        }
    }
}

async fn list(opened: &Opened, server: Option<ServerId>, output: Json) -> Result<(), Failure> {
    let keys = opened.store.repository_keys(server).await?;
    if output.json {
        return print_json(&keys);
    }
    let rows = keys.into_iter().map(|key| {
        vec![key.server_id.to_string(), key.destination, key.form.to_owned(), key.received_at, key.repository_id]
    });
    print_table(&["SERVER", "DESTINATION", "FORM", "RECEIVED", "REPOSITORY"], rows);
    Ok(())
}

async fn export(
    opened: &Opened,
    actor: Actor,
    (server, repository): (ServerId, &str),
    out: &Path,
    output: Json,
) -> Result<(), Failure> {
    if out.symlink_metadata().is_ok() {
        return Err(Failure::FileExists(out.to_owned()));
    }
    let known = opened.store.repository_keys(Some(server)).await?;
    let is_meant = |id: &str| id == repository || repository.len() >= PREFIX_MIN && id.starts_with(repository);
    let mut found = known.into_iter().map(|key| key.repository_id).filter(|id| is_meant(id));
    let (Some(id), None) = (found.next(), found.next()) else {
        return Err(Failure::NoRepositoryKey { server: server.0, repository: repository.to_owned() });
    };
    let key = opened.fleet.export_key(actor, server, &id).await?;
    let (form, bytes) = match &key.key {
        EscrowedKey::Wrapped(bytes) => ("wrapped", bytes.as_slice()),
        EscrowedKey::Open(password) => ("open", password.as_bytes()),
    };
    files::write_atomically(out, bytes, 0o600)?;
    if output.json {
        let told = serde_json::json!({ "server_id": server.0, "repository_id": id, "form": form, "file": out });
        return print_json(&told);
    }
    println!("the {form} key of repository {id} lies in {}", out.display());
    Ok(())
}
