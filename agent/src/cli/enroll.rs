//! `hestner-agent enroll`.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use hestner_proto::token::JoinToken;
use serde_json::json;

use super::{Complaint, output};
use crate::daemon::settings::Settings;
use crate::enrolment::{EnrolmentError, Invitation, enrol};
use crate::identity::Keeper;
use crate::platform::chain;
use crate::platform::files;

/// A token is a line.
const TOKEN_BYTES_MAX: u64 = 4096;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// File with the join token; `-` reads it from standard input.
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// Fingerprint of the company's recovery key, as `hestner-receiver company add` printed it.
    #[arg(long, value_name = "SHA256")]
    recovery_fingerprint: String,
    /// The CA's pin, if it came by another way than the token: they must agree.
    #[arg(long, value_name = "HEX")]
    ca_pin: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(settings: &Settings, arguments: &Arguments) -> Result<(), Complaint> {
    let token = read_token(&arguments.token_file)?;
    if arguments.ca_pin.as_ref().is_some_and(|pin| *pin != token.ca_pin) {
        let next = "compare both with `hestner-receiver ca show`; nothing was sent";
        return Err(Complaint::mend(
            "ca_pin_mismatch",
            "the pin in the join token is not the one that was typed",
            next,
        ));
    }
    let fingerprint = arguments.recovery_fingerprint.trim();
    if !is_fingerprint(fingerprint) {
        let next = "type what `hestner-receiver company add` printed: sha256: and 32 digits; nothing was sent";
        return Err(Complaint::mend(
            "recovery_fingerprint_malformed",
            format!("`{fingerprint}` is no fingerprint"),
            next,
        ));
    }
    let hostname = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let invitation = Invitation { token, recovery_fingerprint: fingerprint.to_owned(), hostname };
    let keeper = Keeper::of(&settings.state_dir);
    let identity = enrol(&settings.receiver.enrolment_address, &keeper, &invitation).await.map_err(complaint)?;
    if arguments.json {
        let (company, server) = (identity.id.company_id, identity.id.server_id);
        output::json(
            &json!({"company_id": company, "server_id": server, "certificate_expires_at": identity.not_after.to_rfc3339()}),
        );
    } else {
        output::line(&format!("enrolled as server {} of company {}", identity.id.server_id, identity.id.company_id));
        output::line(&format!("certificate until {}; it renews itself", identity.not_after.format("%Y-%m-%d")));
        output::line("next: allow what the centre may ask for, such as `hestner-agent grants allow SERVICE snapshot`");
    }
    Ok(())
}

pub(super) fn is_fingerprint(text: &str) -> bool {
    let is_digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    text.strip_prefix("sha256:").is_some_and(|digits| digits.len() == 32 && digits.bytes().all(is_digit))
}

fn complaint(error: EnrolmentError) -> Complaint {
    Complaint::mend(error.code(), chain(&error), error.next_step())
}

fn read_token(path: &Path) -> Result<JoinToken, Complaint> {
    let next = "write the token to a file that only you can read, and name it with --token-file";
    let unreadable = |error: &dyn std::error::Error| Complaint::mend("token_unreadable", chain(error), next);
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().take(TOKEN_BYTES_MAX).read_to_end(&mut bytes).map_err(|e| unreadable(&e))?;
        bytes
    } else {
        files::read(path, TOKEN_BYTES_MAX).map_err(|e| unreadable(&e))?
    };
    let malformed = |error: &dyn std::error::Error| {
        Complaint::mend(
            "token_malformed",
            error.to_string(),
            "copy the whole line that `hestner-receiver token create` printed",
        )
    };
    String::from_utf8_lossy(&bytes).parse().map_err(|e: hestner_proto::token::MalformedToken| malformed(&e))
}
