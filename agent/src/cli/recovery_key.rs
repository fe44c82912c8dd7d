//! `recovery-key`: for which recovery key this host wraps its repositories' keys, and the change of it.
//!
//! The new key comes as a file, and its fingerprint is typed: by hand, from the company. The receiver is not asked; what
//! it says of recovery keys decides nothing on this host.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use hestner_proto::identity::recovery_fingerprint;
use serde_json::json;

use super::enroll::is_fingerprint;
use super::{Complaint, output};
use crate::daemon::settings::Settings;
use crate::identity::{IdentityError, Keeper, Server};
use crate::platform::{chain, files};
use crate::repository::keys;

/// A line, and perhaps comments.
const KEY_FILE_BYTES_MAX: u64 = 64 * 1024;

#[derive(Subcommand)]
pub(super) enum RecoveryKey {
    /// Show for which one keys are wrapped.
    #[command(after_help = "Example:\n  hestner-agent recovery-key show --json")]
    Show {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// The company has changed its recovery key: wrap for the new one from now on.
    #[command(
        after_help = "Example:\n  hestner-agent recovery-key set --recovery-key new.pub --recovery-fingerprint sha256:0123456789abcdef0123456789abcdef\n\nThe wrapped keys that lie beside the repositories, and those that the receiver has, are replaced by the next run of each destination; `hestner-agent keys` shows which are acknowledged. Who has the old recovery key and a copy of an old wrapped key can go on opening that repository."
    )]
    Set {
        /// File with the public half of the new key (age1...).
        #[arg(long, value_name = "FILE")]
        recovery_key: PathBuf,
        /// Its fingerprint, as the company says it by another way than the file came.
        #[arg(long, value_name = "SHA256")]
        recovery_fingerprint: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(settings: &Settings, command: &RecoveryKey) -> Result<(), Complaint> {
    match command {
        RecoveryKey::Show { json } => show(settings, *json),
        RecoveryKey::Set { recovery_key, recovery_fingerprint, json } => {
            set(settings, recovery_key, recovery_fingerprint.trim(), *json)
        }
    }
}

fn unusable(error: &IdentityError) -> Complaint {
    match error {
        IdentityError::NotEnrolled => {
            Complaint::mend("not_enrolled", chain(error), "enrol it with `hestner-agent enroll`")
        }
        _ => Complaint::mend("identity_unusable", chain(error), "run the command as root; look at the state folder"),
    }
}

fn show(settings: &Settings, as_json: bool) -> Result<(), Complaint> {
    let server = Server::read(&settings.state_dir).map_err(|e| unusable(&e))?;
    if as_json {
        let (recipient, fingerprint) = (&server.recovery_recipient, server.recovery_fingerprint());
        output::json(&json!({"recovery_fingerprint": fingerprint, "recovery_recipient": recipient}));
    } else {
        output::line(&format!("{}  {}", server.recovery_fingerprint(), server.recovery_recipient));
    }
    Ok(())
}

fn set(settings: &Settings, file: &Path, typed: &str, as_json: bool) -> Result<(), Complaint> {
    let recipient = read_recipient(file)?;
    let next = "ask the company for the fingerprint by another way than the file came; nothing was changed";
    if !is_fingerprint(typed) {
        return Err(Complaint::mend("recovery_fingerprint_malformed", format!("`{typed}` is no fingerprint"), next));
    }
    let offered = recovery_fingerprint(&recipient);
    if offered != typed {
        let message = format!("the key in {} has the fingerprint {offered}, and {typed} was typed", file.display());
        return Err(Complaint::mend("recovery_key_mismatch", message, next));
    }
    let server = Keeper::of(&settings.state_dir).change_recovery_key(&recipient).map_err(|e| unusable(&e))?;
    let wrapped = keys::wrap_all(&settings.state_dir.join("keys"), &server.recovery_recipient)
        .map_err(|e| Complaint::of_class(e.class(), chain(&e)))?;
    if as_json {
        output::json(&json!({"recovery_fingerprint": offered, "wrapped_anew": wrapped}));
        return Ok(());
    }
    output::line(&format!("keys are wrapped for {offered} from now on; wrapped anew: {}", wrapped.len()));
    if !wrapped.is_empty() {
        output::line(&format!("next: take a snapshot to each of: {}", wrapped.join(", ")));
        output::line("then `hestner-agent keys --require-escrow` says whether the receiver has them");
    }
    Ok(())
}

fn read_recipient(file: &Path) -> Result<String, Complaint> {
    let unreadable = |e: files::FileError| Complaint::mend("file_unreadable", chain(&e), "name a file that is there");
    let text = String::from_utf8_lossy(&files::read(file, KEY_FILE_BYTES_MAX).map_err(unreadable)?).into_owned();
    let shown = file.display();
    if text.to_ascii_uppercase().contains("AGE-SECRET-KEY") {
        let next = "give the public one (`age-keygen -y FILE`), and take the secret off this host";
        return Err(Complaint::mend("recovery_key_secret", format!("{shown} holds the secret half"), next));
    }
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let recipient = lines.next().filter(|_| lines.next().is_none()).and_then(|line| {
        let recipient: age::x25519::Recipient = line.parse().ok()?;
        Some(recipient.to_string())
    });
    let next = "give the file that `age-keygen -y` wrote: one line age1...";
    recipient.ok_or_else(|| Complaint::mend("recovery_key_malformed", format!("{shown} holds no recovery key"), next))
}
