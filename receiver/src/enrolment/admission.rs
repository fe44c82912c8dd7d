//! Who may open a session, and how a certificate is renewed inside one.
//!
//! In: the certificates of a finished handshake and the agent's hello. Out: who it is, or a refusal whose code
//! goes into the goodbye. TLS has proved the key and the authority; here the row decides: the server must
//! exist, belong to the named company, be active, and have this very key.

use std::time::Duration;

use hestner_proto::PROTOCOL;
use hestner_proto::v1;
use tokio::time::MissedTickBehavior;

use super::{Enrolment, Error};
use crate::ca::{self, PeerIdentity, ProvenKey};
use crate::lifecycle::{Drain, Pulse};
use crate::model::{Actor, CompanyId, ServerId};
use crate::platform::causes::chain;
use crate::sessions::End;
use crate::store::audit::Entry;
use crate::store::servers::Standing;

/// Who a verified certificate names, under the name that doors use: they never import `ca`.
pub type Identity = PeerIdentity;

/// An agent that was let in.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// The server.
    pub server: ServerId,
    /// Its company.
    pub company: CompanyId,
    /// Whether the stored inventory is another than the one the agent has sent last.
    pub inventory_wanted: bool,
    /// Of the company's recovery key; the host says so when it is not the one that was typed there.
    pub recovery_fingerprint: String,
}

/// An agent that was not let in.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// No such server, or another key speaks for it.
    #[error("this receiver does not know the server, or another key speaks for it now")]
    Unknown,
    /// The server was revoked.
    #[error("the server was revoked")]
    Revoked,
    /// The server is quarantined.
    #[error("the server is quarantined since its report numbers forked; enrol it anew with a token for it")]
    Fork,
    /// The certificate has ended since the handshake.
    #[error("the agent's certificate has expired; open a new connection with a renewed one, or enrol the server anew")]
    Expired,
    /// Another version of the protocol.
    #[error("this receiver speaks protocol {PROTOCOL}, the agent {0}")]
    Protocol(u32),
    /// It cannot be decided now.
    #[error(transparent)]
    Failed(#[from] Error),
}

impl Refusal {
    /// Code of the goodbye.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unknown | Self::Expired => "unknown",
            Self::Revoked => "revoked",
            Self::Fork => "fork",
            Self::Protocol(_) => "protocol",
            Self::Failed(_) => "overloaded",
        }
    }
}

impl From<crate::store::Error> for Refusal {
    fn from(error: crate::store::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl Enrolment {
    /// Reads who a peer is from the leaf certificate that it showed.
    ///
    /// # Errors
    /// When it names no agent of our trust domain.
    pub fn recognise(&self, certificate_der: &[u8]) -> Result<PeerIdentity, ca::Error> {
        ca::read_peer(certificate_der, &self.rules.trust_domain)
    }

    /// Decides whether a peer may have a session, and takes in its hello.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub async fn admit(&self, peer: &PeerIdentity, hello: &v1::Hello) -> Result<Admitted, Refusal> {
        if hello.protocol != PROTOCOL {
            return Err(Refusal::Protocol(hello.protocol));
        }
        let now_ms = self.clock.now_ms();
        let mut tx = self.store.begin().await?;
        let standing = tx.standing(ServerId(peer.agent.server_id)).await?;
        let standing = check_standing(standing, peer, now_ms)?;
        if standing.spki_sha256 != peer.spki_sha256 {
            tx.append_audit(promoted(&standing, peer, now_ms)).await?;
        }
        tx.greet(standing.id, &peer.spki_sha256, hello, now_ms).await?;
        let company = tx.company(standing.company).await?;
        tx.commit().await?;
        let held = standing.inventory_hash.unwrap_or_default();
        Ok(Admitted {
            server: standing.id,
            company: standing.company,
            inventory_wanted: held.is_empty() || held != hello.inventory_hash,
            recovery_fingerprint: company.map(|company| company.recovery_fingerprint).unwrap_or_default(),
        })
    }

    /// Looks at a peer's standing again, without waiting for the writer: whoever was shut out after [`Self::admit`]
    /// and before its session stood in the registry would not have been ended there.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub async fn still_admits(&self, peer: &PeerIdentity) -> Result<(), Refusal> {
        let standing = self.store.standing(ServerId(peer.agent.server_id)).await?;
        check_standing(standing, peer, self.clock.now_ms()).map(drop)
    }

    /// Renews a certificate inside a session. The key may be a new one; the old one holds until it has spoken.
    ///
    /// # Errors
    /// The refusal of a hello with the same certificate, since a server may have been shut out or enrolled anew while
    /// the request waited. [`Refusal::Failed`] when the request is bad, another server has the key, or signing or
    /// the store fails.
    pub async fn renew(&self, peer: &PeerIdentity, csr_der: &[u8]) -> Result<v1::Certificate, Refusal> {
        let key = ProvenKey::from_request(csr_der).map_err(Error::from)?;
        let now_ms = self.clock.now_ms();
        let server = ServerId(peer.agent.server_id);
        let signed = self.authority.sign_agent(&key, &peer.agent, now_ms, self.rules.certificate_life);
        let certificate_der = signed.map_err(Error::from)?;
        let mut change = self.store.change(Actor::Agent(server), now_ms).await?;
        check_standing(change.standing(server).await?, peer, now_ms)?;
        if change.server_of_key(&key.sha256).await?.is_some_and(|owner| owner.id != server) {
            return Err(Error::KeyInUse.into());
        }
        if key.sha256 != peer.spki_sha256 {
            change.announce_key(server, &key.sha256).await?;
        }
        let details = serde_json::json!({ "key": key.sha256, "replaces": peer.spki_sha256 });
        let company = CompanyId(peer.agent.company_id);
        change.commit(Some(company), "certificate_renewed", format!("server:{server}"), details).await?;
        Ok(v1::Certificate { certificate_der, ca_der: self.authority.certificate().to_vec() })
    }

    /// Ends the sessions of servers that were shut out since, by whatever process did it.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn end_shut_out(&self) -> Result<(), Error> {
        for (server, status) in self.store.shut_out().await? {
            self.sessions.end(server, if status == "revoked" { End::Revoked } else { End::Quarantined });
        }
        Ok(())
    }
}

/// The row of a peer that may speak now.
fn check_standing(standing: Option<Standing>, peer: &PeerIdentity, now_ms: i64) -> Result<Standing, Refusal> {
    if now_ms >= peer.not_after_ms {
        return Err(Refusal::Expired);
    }
    let standing = standing.ok_or(Refusal::Unknown)?;
    if standing.company.0 != peer.agent.company_id {
        return Err(Refusal::Unknown);
    }
    match standing.status.as_str() {
        "active" => {}
        "quarantined" => return Err(Refusal::Fork),
        _ => return Err(Refusal::Revoked),
    }
    let known = standing.spki_sha256 == peer.spki_sha256;
    let announced = standing.next_spki_sha256.as_deref() == Some(&peer.spki_sha256);
    if known || announced { Ok(standing) } else { Err(Refusal::Unknown) }
}

/// The audit row of a renewed key that takes over with its first hello.
fn promoted(standing: &Standing, peer: &PeerIdentity, now_ms: i64) -> Entry {
    Entry {
        at_ms: now_ms,
        actor: Actor::Agent(standing.id).to_string(),
        company: Some(standing.company),
        action: "server_key_promoted",
        subject: format!("server:{}", standing.id),
        details: serde_json::json!({ "key": peer.spki_sha256, "replaces": standing.spki_sha256 }),
    }
}

/// How soon a server that was shut out by another process loses its session.
const STANDING_INTERVAL: Duration = Duration::from_secs(1);

impl Enrolment {
    /// Watches for servers that are shut out while they have a session, until the drain.
    pub async fn watch_standing(self, mut pulse: Pulse, drain: Drain) {
        let mut ticks = tokio::time::interval(STANDING_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Cancel-safe: neither future holds anything that is lost.
            tokio::select! {
                _ = pulse.rest(ticks.tick()) => {}
                () = drain.begun() => return,
            }
            if let Err(error) = self.end_shut_out().await {
                // Not fatal: hello asks the store itself, and the next tick tries again.
                tracing::warn!(
                    event = "standing_not_read",
                    component = "standing",
                    error = chain(&error),
                    "cannot see who was shut out"
                );
            }
        }
    }
}
