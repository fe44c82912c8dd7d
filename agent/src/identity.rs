//! Who this host is: key, certificate, CA and the company's recovery key.
//!
//! The key is made here and never leaves: it is stored 0600 in one file together with its certificate, so
//! that the pair is never torn apart. A renewed pair waits beside as `next.pem` until it has carried a
//! message; the old one is replaced only then, and nothing is ever deleted because it was rejected.
//!
//! Files in `STATE/daemon/identity`, the daemon's: `agent.pem` (key, certificate, CA), `next.pem` (the same,
//! renewed), `enrolling.pem` (the key of an enrolment that has not ended), `recovery.fingerprint` (what the daemon
//! compares with what the receiver names). Beside them, in `STATE`, lies
//! `server.json` ([`Server`]), which a daemon that was taken over cannot change: the runner believes it, and
//! nothing else, of what came from the receiver.

use std::path::{Path, PathBuf};

use chrono::{DateTime, TimeDelta, Utc};
use hestner_proto::identity::{AgentId, recovery_fingerprint};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
use zeroize::Zeroizing;

use crate::platform::files::{self, FileError};
use crate::platform::process;
use crate::platform::trust::{self, Distrust};
use crate::policy::DAEMON_FOLDER;

/// An identity file is about two kilobytes.
const IDENTITY_BYTES_MAX: u64 = 64 * 1024;

/// An identity that cannot be made, read or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is none.
    #[error("this host is not enrolled")]
    NotEnrolled,
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Others could have written what the runner believes.
    #[error("what this host was enrolled as is not believed")]
    Distrust(#[from] Distrust),
    /// A file holds something else.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The receiver's answer does not fit this host.
    #[error("the receiver's certificate cannot be used: {0}")]
    Certificate(String),
    /// A key or a request could not be made.
    #[error("cannot make a key or a certificate request")]
    Key(#[from] rcgen::Error),
}

/// A key with the request for its certificate.
pub struct Request {
    key_pem: Zeroizing<String>,
    /// PKCS#10, signed by the key.
    pub csr_der: Vec<u8>,
}

/// A key with its certificate.
#[derive(Clone)]
pub struct Identity {
    /// Who the certificate names.
    pub id: AgentId,
    /// Beginning of its validity.
    pub not_before: DateTime<Utc>,
    /// End of its validity.
    pub not_after: DateTime<Utc>,
    /// The certificate, as DER.
    pub certificate: Vec<u8>,
    /// The CA's certificate, as DER.
    pub ca: Vec<u8>,
    key_pkcs8: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

impl Identity {
    fn read(path: &Path) -> Result<Self, IdentityError> {
        let bytes = Zeroizing::new(files::read(path, IDENTITY_BYTES_MAX)?);
        let damaged = |reason: &str| IdentityError::Damaged { path: path.to_owned(), reason: reason.to_owned() };
        let parts = pem::parse_many(&*bytes).map_err(|_| damaged("it is not PEM"))?;
        let [key, certificate, ca] = &parts[..] else { return Err(damaged("it must hold a key and two certificates")) };
        Self::new(key.contents(), certificate.contents().to_vec(), ca.contents().to_vec())
            .map_err(|error| damaged(&error.to_string()))
    }

    fn new(key_pkcs8: &[u8], certificate: Vec<u8>, ca: Vec<u8>) -> Result<Self, IdentityError> {
        let bad = |reason: &str| IdentityError::Certificate(reason.to_owned());
        let (id, not_before, not_after) = {
            let (_, parsed) = X509Certificate::from_der(&certificate).map_err(|_| bad("it is not X.509"))?;
            let names = parsed.subject_alternative_name().ok().flatten().ok_or_else(|| bad("it names nobody"))?;
            let [GeneralName::URI(uri)] = names.value.general_names[..] else {
                return Err(bad("it must name one URI"));
            };
            let id: AgentId = uri.parse().map_err(|_| bad("its URI is not an agent's identity"))?;
            let time = |t: x509_parser::time::ASN1Time| {
                DateTime::from_timestamp(t.timestamp(), 0).ok_or_else(|| bad("its validity"))
            };
            (id, time(parsed.validity().not_before)?, time(parsed.validity().not_after)?)
        };
        Ok(Self { id, not_before, not_after, certificate, ca, key_pkcs8: Zeroizing::new(key_pkcs8.to_vec()) })
    }

    /// Key and certificates as TLS wants them: CA, own, key.
    pub fn for_tls(&self) -> (CertificateDer<'static>, CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = PrivatePkcs8KeyDer::from(self.key_pkcs8.to_vec());
        (self.ca.clone().into(), self.certificate.clone().into(), key.into())
    }

    /// When to ask for the next certificate: at half of the validity, plus up to a tenth of it at random,
    /// so that a fleet that enrolled together does not renew together.
    pub fn renew_at(&self, random: u64) -> DateTime<Utc> {
        let validity = self.not_after - self.not_before;
        let tenth = validity.num_milliseconds() / 10;
        let jitter = (random as f64 / u64::MAX as f64 * tenth as f64) as i64;
        self.not_before + validity / 2 + TimeDelta::milliseconds(jitter)
    }

    fn to_pem(&self) -> Zeroizing<String> {
        let part = |tag: &str, der: &[u8]| pem::encode(&pem::Pem::new(tag, der));
        let [key, own, ca] =
            [("PRIVATE KEY", &self.key_pkcs8[..]), ("CERTIFICATE", &self.certificate), ("CERTIFICATE", &self.ca)]
                .map(|(tag, der)| Zeroizing::new(part(tag, der)));
        Zeroizing::new(format!("{}{}{}", *key, *own, *ca))
    }
}

impl Request {
    /// A request with a key of its own.
    ///
    /// # Errors
    /// When the key cannot be made.
    pub fn new() -> Result<Self, IdentityError> {
        let key = rcgen::KeyPair::generate()?;
        Self::with_key(Zeroizing::new(key.serialize_pem()))
    }

    fn with_key(key_pem: Zeroizing<String>) -> Result<Self, IdentityError> {
        let key = rcgen::KeyPair::from_pem(&key_pem)?;
        // The receiver takes the public key and nothing else; the request needs no names.
        let csr_der = rcgen::CertificateParams::default().serialize_request(&key)?.der().to_vec();
        Ok(Self { key_pem, csr_der })
    }

    /// Joins the key with the certificate that the receiver made for it.
    ///
    /// # Errors
    /// When the certificate is for another key or names no agent.
    pub fn complete(&self, certificate: Vec<u8>, ca: Vec<u8>) -> Result<Identity, IdentityError> {
        let key = rcgen::KeyPair::from_pem(&self.key_pem)?;
        let fits = X509Certificate::from_der(&certificate)
            .is_ok_and(|(_, parsed)| parsed.public_key().raw == rcgen::PublicKeyData::subject_public_key_info(&key));
        if !fits {
            return Err(IdentityError::Certificate("it is for another key".to_owned()));
        }
        Identity::new(&key.serialize_der(), certificate, ca)
    }
}

/// What the runner has to know of the enrolment: `STATE/server.json`, the runner's own file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// The company.
    pub company_id: i64,
    /// The server; it names the repository.
    pub server_id: i64,
    /// The company's recovery key, whose fingerprint was typed at enrolment.
    pub recovery_recipient: String,
}

impl Server {
    /// Reads it.
    ///
    /// # Errors
    /// [`IdentityError::NotEnrolled`], or when it is damaged or others could have written it.
    pub fn read(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = Self::path(state_dir);
        match trust::read_text(&path, IDENTITY_BYTES_MAX) {
            Ok(text) => {
                serde_json::from_str(&text).map_err(|error| IdentityError::Damaged { path, reason: error.to_string() })
            }
            Err(error) if error.is_missing() => Err(IdentityError::NotEnrolled),
            Err(error) => Err(error.into()),
        }
    }

    /// The fingerprint that was typed.
    pub fn recovery_fingerprint(&self) -> String {
        recovery_fingerprint(&self.recovery_recipient)
    }

    fn keep(&self, state_dir: &Path) -> Result<(), IdentityError> {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        Ok(files::write(&Self::path(state_dir), &text, 0o600)?)
    }

    fn path(state_dir: &Path) -> PathBuf {
        state_dir.join("server.json")
    }
}

/// The folders that keep the identity.
#[derive(Clone, Debug)]
pub struct Keeper {
    state_dir: PathBuf,
    folder: PathBuf,
}

impl Keeper {
    /// The identity of an agent whose state lies in `state_dir`.
    pub fn of(state_dir: &Path) -> Self {
        Self { state_dir: state_dir.to_owned(), folder: state_dir.join(DAEMON_FOLDER).join("identity") }
    }

    /// Works in the daemon's folder as its owner: the enrolment is done by root, the folder is the daemon's.
    fn as_daemon<T>(&self, work: impl FnOnce() -> Result<T, IdentityError>) -> Result<T, IdentityError> {
        let daemon = self.state_dir.join(DAEMON_FOLDER);
        files::private_folder(&daemon)?;
        process::as_owner_of(&daemon, work).map_err(files::failed("work as the owner of", &daemon))?
    }

    /// The identity in force.
    ///
    /// # Errors
    /// [`IdentityError::NotEnrolled`], or when the file is damaged.
    pub fn load(&self) -> Result<Identity, IdentityError> {
        if !self.folder.exists() {
            return Err(IdentityError::NotEnrolled);
        }
        match self.as_daemon(|| Identity::read(&self.folder.join("agent.pem"))) {
            Err(IdentityError::File(error)) if error.is_missing() => Err(IdentityError::NotEnrolled),
            other => other,
        }
    }

    /// The renewed identity that has not carried a message yet.
    pub fn load_next(&self) -> Option<Identity> {
        // One that cannot be read is as good as none: the old one still works and is renewed again.
        Identity::read(&self.folder.join("next.pem")).ok()
    }

    /// The request of an enrolment: with the same key as the last time, if that did not come to its end,
    /// so that the receiver knows that it is the same host.
    ///
    /// # Errors
    /// When the key cannot be made or kept.
    pub fn enrolling_request(&self) -> Result<Request, IdentityError> {
        self.as_daemon(|| self.request_in_folder())
    }

    fn request_in_folder(&self) -> Result<Request, IdentityError> {
        let path = self.folder.join("enrolling.pem");
        match files::read(&path, IDENTITY_BYTES_MAX) {
            Ok(bytes) => {
                let text = String::from_utf8(bytes)
                    .map_err(|_| IdentityError::Damaged { path, reason: "it is not PEM".to_owned() })?;
                Request::with_key(Zeroizing::new(text))
            }
            Err(error) if error.is_missing() => {
                let request = Request::new()?;
                files::private_folder(&self.folder)?;
                files::write(&path, request.key_pem.as_bytes(), 0o600)?;
                Ok(request)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Ends an enrolment: keeps what the runner needs, then the identity, then forgets the request.
    ///
    /// # Errors
    /// When a file cannot be written; the enrolment can then be repeated with the same token.
    pub fn keep_enrolled(&self, identity: &Identity, recovery_recipient: &str) -> Result<(), IdentityError> {
        let AgentId { company_id, server_id, .. } = identity.id;
        let recovery_recipient = recovery_recipient.trim().to_owned();
        self.keep_server(&Server { company_id, server_id, recovery_recipient })?;
        self.as_daemon(|| {
            files::write(&self.folder.join("agent.pem"), identity.to_pem().as_bytes(), 0o600)?;
            Ok(files::remove(&self.folder.join("enrolling.pem"))?)
        })
    }

    /// Puts another recovery key in the place of the one that was typed at enrolment.
    ///
    /// # Errors
    /// [`IdentityError::NotEnrolled`], or when a file cannot be read or written.
    pub fn change_recovery_key(&self, recovery_recipient: &str) -> Result<Server, IdentityError> {
        let server = Server::read(&self.state_dir)?;
        let server = Server { recovery_recipient: recovery_recipient.trim().to_owned(), ..server };
        self.keep_server(&server)?;
        Ok(server)
    }

    /// The fingerprint that was typed, as the daemon knows it: so that it can say when the receiver names another. What
    /// it says decides nothing. `None`: nobody has told it, which an agent of an older version did not.
    pub fn recovery_fingerprint(&self) -> Option<String> {
        let told = files::read(&self.told_fingerprint(), IDENTITY_BYTES_MAX).ok()?;
        Some(String::from_utf8_lossy(&told).trim().to_owned())
    }

    fn told_fingerprint(&self) -> PathBuf {
        self.folder.join("recovery.fingerprint")
    }

    fn keep_server(&self, server: &Server) -> Result<(), IdentityError> {
        server.keep(&self.state_dir)?;
        self.as_daemon(|| {
            files::private_folder(&self.folder)?;
            Ok(files::write(&self.told_fingerprint(), server.recovery_fingerprint().as_bytes(), 0o600)?)
        })
    }

    /// Keeps a renewed identity beside the one in force.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep_next(&self, identity: &Identity) -> Result<(), IdentityError> {
        Ok(files::write(&self.folder.join("next.pem"), identity.to_pem().as_bytes(), 0o600)?)
    }

    /// Puts the renewed identity in force: it has carried a message.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn promote_next(&self, identity: &Identity) -> Result<(), IdentityError> {
        files::write(&self.folder.join("agent.pem"), identity.to_pem().as_bytes(), 0o600)?;
        Ok(files::remove(&self.folder.join("next.pem"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_enrolment_goes_on_with_the_same_key() {
        let folder = tempfile::tempdir().unwrap();
        let keeper = Keeper::of(folder.path());
        let first = keeper.enrolling_request().unwrap();
        let second = keeper.enrolling_request().unwrap();
        assert_eq!(*first.key_pem, *second.key_pem);
        assert!(matches!(keeper.load(), Err(IdentityError::NotEnrolled)));
    }

    #[test]
    fn certificate_for_another_key_is_refused() {
        let (mine, other) = (Request::new().unwrap(), rcgen::KeyPair::generate().unwrap());
        let certificate = rcgen::CertificateParams::default().self_signed(&other).unwrap();
        let error = mine.complete(certificate.der().to_vec(), Vec::new()).unwrap_err().to_string();
        assert!(error.contains("another key"), "{error}");
    }

    #[test]
    fn renewal_is_due_between_half_and_six_tenths_of_the_validity() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI("spiffe://t/company/1/server/2".try_into().unwrap())];
        let certificate = params.self_signed(&key).unwrap().der().to_vec();
        let identity = Identity::new(&key.serialize_der(), certificate.clone(), certificate).unwrap();
        let validity = identity.not_after - identity.not_before;
        assert_eq!(identity.renew_at(0), identity.not_before + validity / 2);
        assert!(identity.renew_at(u64::MAX) <= identity.not_before + validity * 6 / 10);
        assert!(!format!("{identity:?}").contains("key"));
    }
}
