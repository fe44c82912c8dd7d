//! Makes this host known to a receiver, once.
//!
//! The join token carries the pin of the receiver's CA, so that nothing is sent to anybody else. The
//! fingerprint of the company's recovery key is typed by a person; a receiver that answers with another key
//! is refused, because whoever holds that key could open this host's repositories. An enrolment that broke
//! off is repeated with the same token: the key was kept, and the receiver gives the same server.

use std::sync::Arc;
use std::time::Duration;

use hestner_proto::identity::{ca_pin, recovery_fingerprint};
use hestner_proto::token::JoinToken;
use hestner_proto::v1;
use hestner_proto::v1::enrolment_client::EnrolmentClient;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use crate::identity::{Identity, IdentityError, Keeper};
use crate::platform::chain;
use crate::platform::command::printable;
use crate::tls::{Dialer, PinnedCa, TlsError};

/// How long the receiver may take to answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// What a person brought to the host.
#[derive(Debug)]
pub struct Invitation {
    /// The join token.
    pub token: JoinToken,
    /// The recovery key's fingerprint, as it was typed.
    pub recovery_fingerprint: String,
    /// A name for people.
    pub hostname: String,
}

/// An enrolment that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// The receiver's address, certificate or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The identity cannot be made or kept.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Whoever answered has another CA than the token says.
    #[error("the receiver at {address} has another CA than the join token says")]
    WrongPin {
        /// Where it was.
        address: String,
    },
    /// Nobody answered.
    #[error("the receiver at {address} cannot be reached: {reason}")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What happened.
        reason: String,
    },
    /// The receiver refused.
    #[error("the receiver refused: {message}")]
    Refused {
        /// Stable code.
        code: String,
        /// Why.
        message: String,
        /// What to do.
        next_step: String,
    },
    /// The receiver's recovery key is not the one that was typed.
    #[error("the receiver offers a recovery key with fingerprint {offered}, and {typed} was typed")]
    RecoveryKeyMismatch {
        /// What it offers.
        offered: String,
        /// What was typed.
        typed: String,
    },
    /// This host has an identity already.
    #[error("this host is enrolled already, as server {server_id} of company {company_id}")]
    AlreadyEnrolled {
        /// Which company.
        company_id: i64,
        /// Which server.
        server_id: i64,
    },
}

impl EnrolmentError {
    /// Stable code.
    pub fn code(&self) -> &str {
        match self {
            Self::Tls(_) => "settings_invalid",
            Self::Identity(_) => "identity_not_kept",
            Self::WrongPin { .. } => "ca_pin_mismatch",
            Self::Unreachable { .. } => "receiver_unreachable",
            Self::Refused { code, .. } => code,
            Self::RecoveryKeyMismatch { .. } => "recovery_key_mismatch",
            Self::AlreadyEnrolled { .. } => "already_enrolled",
        }
    }

    /// What a person should do next.
    pub fn next_step(&self) -> &str {
        match self {
            Self::Tls(_) => "mend `enrolment_address` under [receiver] in agent.toml",
            Self::Identity(_) => {
                "make the state folder writable and make room in it, then repeat the command with the same token"
            }
            Self::WrongPin { .. } => {
                "compare the token's last part with `hestner-receiver ca show`; if they agree, somebody else answers at that address"
            }
            Self::Unreachable { .. } => {
                "check `enrolment_address` under [receiver] in agent.toml, the receiver and the firewall, then repeat the command"
            }
            Self::Refused { next_step, .. } => next_step,
            Self::RecoveryKeyMismatch { .. } => {
                "compare with the fingerprint that `hestner-receiver company add` printed; do not go on if the receiver's differs"
            }
            Self::AlreadyEnrolled { .. } => {
                "nothing is to be done; to enrol anew as another server, stop the agent and move the whole state folder away"
            }
        }
    }
}

/// Enrols this host.
///
/// # Errors
/// [`EnrolmentError`]. Nothing half-made is kept but the key, which a repetition uses again.
pub async fn enrol(address: &str, keeper: &Keeper, invitation: &Invitation) -> Result<Identity, EnrolmentError> {
    match keeper.load() {
        Err(IdentityError::NotEnrolled) => {}
        // One that is damaged is a person's to look at, not ours to write over.
        Err(error) => return Err(error.into()),
        Ok(Identity { id, .. }) => {
            return Err(EnrolmentError::AlreadyEnrolled { company_id: id.company_id, server_id: id.server_id });
        }
    }
    let request = keeper.enrolling_request()?;
    let reply = ask(address, invitation, request.csr_der.clone()).await?;
    let offered = recovery_fingerprint(&reply.recovery_recipient);
    if offered != invitation.recovery_fingerprint {
        return Err(EnrolmentError::RecoveryKeyMismatch { offered, typed: invitation.recovery_fingerprint.clone() });
    }
    if ca_pin(&reply.ca_der) != invitation.token.ca_pin {
        return Err(EnrolmentError::WrongPin { address: address.to_owned() });
    }
    let identity = request.complete(reply.certificate_der, reply.ca_der)?;
    keeper.keep_enrolled(&identity, &reply.recovery_recipient)?;
    Ok(identity)
}

async fn ask(address: &str, invitation: &Invitation, csr_der: Vec<u8>) -> Result<v1::EnrollReply, EnrolmentError> {
    let pinned = PinnedCa::new(&invitation.token.ca_pin);
    let dialer = Dialer::new(address, pinned.config()?)?;
    let connector = tower::service_fn(move |_| dialer.clone().connect());
    let unreachable = |reason: String| EnrolmentError::Unreachable { address: address.to_owned(), reason };
    // The address that is dialled is the dialer's; this one only fills the request's authority.
    let channel =
        Endpoint::from_static("http://receiver").timeout(REPLY_TIMEOUT).connect_with_connector(connector).await;
    let channel = channel.map_err(|error| failed_connection(address, &pinned, &error))?;
    let request = v1::EnrollRequest {
        token: invitation.token.presented(),
        csr_der,
        recovery_fingerprint: invitation.recovery_fingerprint.clone(),
        hostname: invitation.hostname.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    match EnrolmentClient::new(channel).enroll(request).await {
        Ok(reply) => Ok(reply.into_inner()),
        Err(status) => Err(refusal(&status).unwrap_or_else(|| unreachable(status.message().to_owned()))),
    }
}

fn failed_connection(address: &str, pinned: &Arc<PinnedCa>, error: &tonic::transport::Error) -> EnrolmentError {
    if pinned.saw_mismatch() {
        return EnrolmentError::WrongPin { address: address.to_owned() };
    }
    EnrolmentError::Unreachable { address: address.to_owned(), reason: chain(error) }
}

/// A refusal with a code; `None` for a status that only says that the connection broke.
fn refusal(status: &Status) -> Option<EnrolmentError> {
    let text = |key: &str| {
        status.metadata().get(key).and_then(|value| value.to_str().ok()).map(|text| printable(text.as_bytes()))
    };
    let code = text("hestner-code").or_else(|| {
        (status.code() != Code::Unknown && status.code() != Code::Unavailable).then(|| "refused".to_owned())
    })?;
    let next_step = text("hestner-next-step").unwrap_or_else(|| "ask the receiver's operator".to_owned());
    Some(EnrolmentError::Refused { code, message: printable(status.message().as_bytes()), next_step })
}
