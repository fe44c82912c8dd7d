//! How a host becomes a server: join tokens in, certificates out.
//!
//! A token is single use, ends, is stored hashed, and belongs to a company and perhaps a server. Enrolling is
//! idempotent: the same token and public key give the same server, so a host whose reply was lost simply asks
//! again. The fingerprint of the recovery key is compared before anything is consumed. The certificate is made
//! inside the transaction, so a server never exists without one having been signable.
//!
//! [`admission`] decides who may open a session with such a certificate. No gRPC and no HTTP here.

pub mod admission;

use std::sync::Arc;
use std::time::Duration;

use hestner_proto::identity::AgentId;
use hestner_proto::sha256;
use hestner_proto::token::{JoinToken, SECRET_DIGITS};
use serde::Deserialize;
use subtle::ConstantTimeEq as _;

use crate::ca::{self, Authority, ProvenKey};
use crate::model::counters::SharedCounters;
use crate::model::run::cut;
use crate::model::{Actor, CompanyId, ServerId};
use crate::platform::clock::SharedClock;
use crate::platform::random;
use crate::sessions::{End, Sessions};
use crate::store::companies::{CompanyRow, TokenRow};
use crate::store::servers::Standing;
use crate::store::{self, Change, Store};

/// How long after its end a used token still answers the host that used it, for replies that were lost.
const RETRY_GRACE_MS: i64 = 3_600_000;

/// Section `[enrolment]` of the settings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize, toml_example::TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Attempts to enrol that one client address may make in a minute.
    pub attempts_per_minute: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { attempts_per_minute: 30 }
    }
}

/// Why somebody was not enrolled. The code of each is stable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Malformed, never given out, or its secret is wrong.
    #[error("the join token is not known here")]
    TokenUnknown,
    /// Used with another key.
    #[error("the join token was used before, with another key")]
    TokenUsed,
    /// Its time is over.
    #[error("the join token has expired")]
    TokenExpired,
    /// The company is suspended.
    #[error("the company is suspended")]
    CompanySuspended,
    /// The fingerprint typed on the host is not that of the company's key.
    #[error("the company's recovery key has another fingerprint than the one given on the host")]
    RecoveryKeyMismatch,
    /// The server the token is for was taken back.
    #[error("the server was revoked")]
    ServerRevoked,
    /// The key belongs to another server.
    #[error("another server has this key; was the machine cloned?")]
    KeyInUse,
    /// There is no such company or server.
    #[error("there is no such {0}")]
    NoSuch(&'static str),
    /// The request's key cannot be taken, or signing failed.
    #[error(transparent)]
    Authority(#[from] ca::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// No randomness for a token.
    #[error(transparent)]
    Random(#[from] random::NoRandomness),
}

impl Error {
    /// Stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TokenUnknown => "token_unknown",
            Self::TokenUsed => "token_used",
            Self::TokenExpired => "token_expired",
            Self::CompanySuspended => "company_suspended",
            Self::RecoveryKeyMismatch => "recovery_key_mismatch",
            Self::ServerRevoked => "server_revoked",
            Self::KeyInUse => "key_in_use",
            Self::NoSuch(_) => "not_found",
            Self::Authority(ca::Error::BadRequest(_)) => "csr_invalid",
            Self::Authority(_) | Self::Store(_) | Self::Random(_) => "internal",
        }
    }

    /// What the operator at the host should do.
    pub fn next_step(&self) -> &'static str {
        match self {
            Self::TokenUnknown => "copy the whole token, or make a new one with `hestner-receiver token create`",
            Self::TokenUsed | Self::TokenExpired => "make a new token with `hestner-receiver token create`",
            Self::CompanySuspended => "ask whoever runs the receiver",
            Self::RecoveryKeyMismatch => {
                "compare the fingerprint with the one that `hestner-receiver company add` printed"
            }
            Self::ServerRevoked => "enrol with a token that is not bound to this server",
            Self::KeyInUse => "remove the agent's state folder on the clone, then enrol it with a new token",
            Self::NoSuch(_) => "check the id",
            Self::Authority(ca::Error::BadRequest(_)) => "update the agent",
            Self::Authority(_) | Self::Store(_) | Self::Random(_) => "look at the receiver's log, then try again",
        }
    }
}

/// What a host asks with. Has no `Debug`: it holds the token.
#[derive(Clone)]
pub struct Request {
    /// `hjt_<id>_<secret>`.
    pub token: String,
    /// PKCS#10 in DER.
    pub csr_der: Vec<u8>,
    /// As typed on the host.
    pub recovery_fingerprint: String,
    /// A name for people.
    pub hostname: String,
    /// Version of the agent.
    pub agent_version: String,
}

/// What a host gets.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// The agent's certificate.
    pub certificate_der: Vec<u8>,
    /// The authority's certificate.
    pub ca_der: Vec<u8>,
    /// The company.
    pub company: CompanyId,
    /// The server.
    pub server: ServerId,
    /// The company's recovery key.
    pub recovery_recipient: String,
}

/// A new token. Its text is shown once and kept nowhere.
pub struct NewToken {
    /// The row.
    pub id: i64,
    /// The whole text, with the authority's pin.
    pub token: JoinToken,
    /// When it ends, milliseconds since the Unix epoch.
    pub expires_at_ms: i64,
}

/// What enrolment needs of the settings.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Trust domain of the names in certificates.
    pub trust_domain: String,
    /// Life of an agent's certificate.
    pub certificate_life: Duration,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Enrolment {
    store: Store,
    authority: Arc<Authority>,
    sessions: Sessions,
    rules: Rules,
    clock: SharedClock,
    counters: SharedCounters,
}

impl Enrolment {
    /// Enrolment into `store` with certificates of `authority`.
    pub fn new(
        store: Store,
        authority: Arc<Authority>,
        sessions: Sessions,
        rules: Rules,
        clock: SharedClock,
        counters: SharedCounters,
    ) -> Self {
        Self { store, authority, sessions, rules, clock, counters }
    }

    /// Makes a join token for a company, and perhaps for one of its servers.
    ///
    /// # Errors
    /// [`Error::NoSuch`] for a company or server that does not exist, the store's, or no randomness.
    pub async fn create_token(
        &self,
        actor: Actor,
        company: CompanyId,
        server: Option<ServerId>,
        life: Duration,
    ) -> Result<NewToken, Error> {
        let now_ms = self.clock.now_ms();
        let expires_at_ms = now_ms.saturating_add(i64::try_from(life.as_millis()).unwrap_or(i64::MAX));
        let secret = random::secret_hex()?;
        debug_assert_eq!(secret.len(), SECRET_DIGITS);
        let mut change = self.store.change(actor, now_ms).await?;
        change.company(company).await?.ok_or(Error::NoSuch("company"))?;
        if let Some(server) = server {
            let standing = change.standing(server).await?.filter(|standing| standing.company == company);
            standing.ok_or(Error::NoSuch("server of the company"))?;
        }
        let id = change.add_token(company, server, &sha256::hex(secret.as_bytes()), now_ms, expires_at_ms).await?;
        let details = serde_json::json!({ "expires_at_ms": expires_at_ms, "server": server });
        change.commit(Some(company), "token_created", format!("token:{id}"), details).await?;
        let token = JoinToken { id, secret, ca_pin: self.authority.pin().to_owned() };
        Ok(NewToken { id, token, expires_at_ms })
    }

    /// Enrols a host.
    ///
    /// # Errors
    /// See [`Error`]; nothing is consumed or written when one is returned.
    pub async fn enrol(&self, request: Request) -> Result<Enrolled, Error> {
        let enrolled = self.try_enrol(request).await;
        match &enrolled {
            Ok(_) => self.counters.enrolments.raise(),
            Err(_) => self.counters.enrolments_refused.raise(),
        }
        enrolled
    }

    async fn try_enrol(&self, request: Request) -> Result<Enrolled, Error> {
        let (token_id, secret) = JoinToken::parse_presented(&request.token).map_err(|_| Error::TokenUnknown)?;
        // On a reader first: whoever guesses at tokens must not be able to hold the writer.
        let known = self.store.token(token_id).await?.ok_or(Error::TokenUnknown)?;
        check_secret(&known, &secret)?;
        let key = ProvenKey::from_request(&request.csr_der)?;
        let now_ms = self.clock.now_ms();
        let mut change = self.store.change(Actor::Receiver, now_ms).await?;
        let token = change.token(token_id).await?.ok_or(Error::TokenUnknown)?;
        check_secret(&token, &secret)?;
        check_use(&token, &key, now_ms)?;
        let company = change.company(token.company).await?.ok_or(Error::TokenUnknown)?;
        check_company(&company, &request.recovery_fingerprint)?;
        let (server, before) = self.place(&mut change, &token, &key, &request).await?;
        let agent =
            AgentId { trust_domain: self.rules.trust_domain.clone(), company_id: company.id.0, server_id: server.0 };
        let certificate_der = self.authority.sign_agent(&key, &agent, now_ms, self.rules.certificate_life)?;
        change.use_token(token.id, &key.sha256, server, now_ms).await?;
        let details = serde_json::json!({
            "token": token.id, "key": key.sha256, "repeated": token.used.is_some(),
            "key_before": before.as_ref().map(|before| &before.spki_sha256),
            "status_before": before.as_ref().map(|before| &before.status),
        });
        change.commit(Some(company.id), "server_enrolled", format!("server:{server}"), details).await?;
        Ok(Enrolled {
            certificate_der,
            ca_der: self.authority.certificate().to_vec(),
            company: company.id,
            server,
            recovery_recipient: company.recovery_recipient,
        })
    }

    /// Finds or makes the server that this token and key stand for, with how it stood before if it did.
    async fn place(
        &self,
        change: &mut Change,
        token: &TokenRow,
        key: &ProvenKey,
        request: &Request,
    ) -> Result<(ServerId, Option<Standing>), Error> {
        let now_ms = change.now_ms();
        let of_key = change.server_of_key(&key.sha256).await?;
        let wanted = token.used.as_ref().map(|(_, server)| *server).or(token.server);
        if let Some(owner) = of_key {
            // A host that lost its reply and comes with a new token is the same server, unless the token says
            // it should be another one.
            let same = owner.company == token.company && wanted.is_none_or(|wanted| wanted == owner.id);
            if !same {
                return Err(Error::KeyInUse);
            }
            self.take_back(change, &owner, key, token.used.is_some()).await?;
            return Ok((owner.id, Some(owner)));
        }
        if token.used.is_some() {
            // The key was replaced at this server since; whoever holds the old one gets nothing.
            return Err(Error::TokenUsed);
        }
        let Some(server) = token.server else {
            let (name, version) = (cut(request.hostname.clone(), 256), cut(request.agent_version.clone(), 64));
            let added = change.add_server(token.company, &name, &key.sha256, &version, now_ms).await?;
            return Ok((added, None));
        };
        let standing = change.standing(server).await?.ok_or(Error::NoSuch("server"))?;
        self.take_back(change, &standing, key, false).await?;
        Ok((server, Some(standing)))
    }

    /// Gives an existing server to `key`. A mere repetition changes nothing, and neither a repetition nor a new token
    /// lifts a quarantine for the very key that forked: both machines have it.
    async fn take_back(
        &self,
        change: &mut Change,
        standing: &Standing,
        key: &ProvenKey,
        repeated: bool,
    ) -> Result<(), Error> {
        let now_ms = change.now_ms();
        match standing.status.as_str() {
            "revoked" => return Err(Error::ServerRevoked),
            "quarantined" if !repeated && has_key(standing, key) => return Err(Error::KeyInUse),
            _ => {}
        }
        if !repeated {
            change.rekey_server(standing.id, &key.sha256, now_ms).await?;
        }
        if standing.spki_sha256 != key.sha256 {
            // Its new agent knows nothing of runs that the old one had begun.
            change.interrupt_runs(standing.id, now_ms).await?;
            change.reissue_policies(standing.id, now_ms, || uuid::Uuid::now_v7().to_string()).await?;
            // Whoever still speaks with the old key is out.
            self.sessions.end(standing.id, End::Revoked);
        }
        Ok(())
    }
}

/// Whether `key` is, or was announced as, the server's.
fn has_key(standing: &Standing, key: &ProvenKey) -> bool {
    standing.spki_sha256 == key.sha256 || standing.next_spki_sha256.as_ref() == Some(&key.sha256)
}

fn check_secret(token: &TokenRow, secret: &str) -> Result<(), Error> {
    let same = sha256::hex(secret.as_bytes()).as_bytes().ct_eq(token.secret_sha256.as_bytes());
    if bool::from(same) { Ok(()) } else { Err(Error::TokenUnknown) }
}

fn check_use(token: &TokenRow, key: &ProvenKey, now_ms: i64) -> Result<(), Error> {
    match &token.used {
        Some((used_by, _)) if *used_by != key.sha256 => Err(Error::TokenUsed),
        Some(_) if now_ms < token.expires_at_ms.saturating_add(RETRY_GRACE_MS) => Ok(()),
        None if now_ms < token.expires_at_ms => Ok(()),
        _ => Err(Error::TokenExpired),
    }
}

fn check_company(company: &CompanyRow, fingerprint: &str) -> Result<(), Error> {
    if !company.active {
        return Err(Error::CompanySuspended);
    }
    if fingerprint.trim() != company.recovery_fingerprint {
        return Err(Error::RecoveryKeyMismatch);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
