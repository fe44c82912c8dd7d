//! The receiver's certificate authority: one P-256 key, made on first start, that signs agents and listeners.
//!
//! In: certification requests and names. Out: certificates with fresh parameters. Of a request only the
//! public key is taken, after its signature has been checked: whatever else it asks for (CA:TRUE, foreign
//! names, a long life) has no way into the certificate. It never makes or sees an agent's private key.
//!
//! Files in `STATE/ca`: `key.pem` (0600), `cert.pem` (0644), `lock`, which keeps two first starts apart.

pub mod listener;
mod peer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hestner_proto::identity::{AgentId, ca_pin};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use time::OffsetDateTime;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

pub use peer::{PeerIdentity, read_peer};

use crate::platform::{files, random};

/// Life of the authority's own certificate.
const AUTHORITY_LIFE: time::Duration = time::Duration::days(3650);
/// How far certificates reach back, for hosts whose clock is behind.
const BACKDATED: time::Duration = time::Duration::minutes(5);

/// What the authority could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the authority cannot be used.
    #[error(transparent)]
    File(#[from] files::Error),
    /// Certificate without its key: nothing can be signed, and a new key would lock every agent out.
    #[error("{0} is missing although the authority's certificate is there; bring it back from a backup")]
    KeyMissing(PathBuf),
    /// A file does not hold what it should.
    #[error("{path} does not hold a {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// A certificate could not be made.
    #[error("cannot {operation}")]
    Certificate {
        /// What was being made.
        operation: &'static str,
        /// What the library said.
        #[source]
        source: rcgen::Error,
    },
    /// No randomness for a key or serial number.
    #[error(transparent)]
    Random(#[from] random::NoRandomness),
    /// A certification request that cannot be trusted or read.
    #[error("the certification request is not usable: {0}")]
    BadRequest(&'static str),
    /// A peer's certificate that names no agent of ours.
    #[error("the peer's certificate is not an agent's: {0}")]
    BadPeer(String),
    /// TLS settings that rustls refuses.
    #[error("cannot set up TLS")]
    Tls(#[source] rustls::Error),
    /// The client verifier cannot be built.
    #[error("cannot set up the check of client certificates")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
}

/// A public key that an agent proved to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvenKey {
    der: Vec<u8>,
    /// SHA-256 of the SubjectPublicKeyInfo, as hex: the key's name in the store.
    pub sha256: String,
}

/// See the module. Has no `Debug`: it holds the key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    pin: String,
}

impl Authority {
    /// Opens the authority in `state_dir`, making it on first start.
    ///
    /// # Errors
    /// When files cannot be read or written, or do not belong together.
    pub fn open(state_dir: &Path, trust_domain: &str, now_ms: i64) -> Result<Self, Error> {
        let folder = state_dir.join("ca");
        files::make_private_folder(&folder)?;
        let _lock = files::lock(&folder.join("lock"))?;
        let (key_path, cert_path) = (folder.join("key.pem"), folder.join("cert.pem"));
        let key = match (files::read_secret_text(&key_path)?, files::read_text(&cert_path)?) {
            (None, Some(_)) => return Err(Error::KeyMissing(key_path)),
            (Some(pem), certificate) => {
                let malformed = |_| Error::Malformed { path: key_path.clone(), what: "private key" };
                let key = KeyPair::from_pem(&pem).map_err(malformed)?;
                if let Some(certificate) = certificate {
                    return Self::assemble(key, certificate, &cert_path);
                }
                // The key was written and the machine stopped before the certificate was.
                key
            }
            (None, None) => {
                let made = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256);
                let key =
                    made.map_err(|source| Error::Certificate { operation: "make the authority's key", source })?;
                files::write_atomically(&key_path, key.serialize_pem().as_bytes(), 0o600)?;
                key
            }
        };
        let pem = self_sign(&key, trust_domain, now_ms)?;
        files::write_atomically(&cert_path, pem.as_bytes(), 0o644)?;
        Self::assemble(key, pem, &cert_path)
    }

    fn assemble(key: KeyPair, pem: String, path: &Path) -> Result<Self, Error> {
        let malformed = || Error::Malformed { path: path.to_owned(), what: "certificate" };
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| malformed())?;
        if peer::spki_sha256(&certificate).as_deref() != Some(&key_name(&key)) {
            return Err(Error::Malformed { path: path.to_owned(), what: "certificate of the key beside it" });
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|source| Error::Certificate { operation: "use the authority's certificate", source })?;
        let pin = ca_pin(&certificate);
        Ok(Self { issuer, certificate, pem, pin })
    }

    /// Pin of the authority's certificate.
    pub fn pin(&self) -> &str {
        &self.pin
    }

    /// The authority's certificate in DER.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The authority's certificate in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Subject and end of the authority's certificate (milliseconds since the Unix epoch).
    pub fn summary(&self) -> (String, i64) {
        match x509_parser::parse_x509_certificate(&self.certificate) {
            Ok((_, parsed)) => (parsed.subject().to_string(), parsed.validity().not_after.timestamp() * 1000),
            Err(_) => (String::new(), 0),
        }
    }

    /// Signs a certificate for an agent's key: client authentication only, one URI name, no authority.
    ///
    /// # Errors
    /// When the key's kind is not supported or there is no randomness.
    pub fn sign_agent(&self, key: &ProvenKey, agent: &AgentId, now_ms: i64, life: Duration) -> Result<Vec<u8>, Error> {
        let failed = |source| Error::Certificate { operation: "sign an agent", source };
        let uri = agent.to_string().try_into().map_err(failed)?;
        let mut params = fresh_params(now_ms, time::Duration::seconds(seconds(life)))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.distinguished_name.push(DnType::CommonName, format!("server {}", agent.server_id));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let public = SubjectPublicKeyInfo::from_der(&key.der).map_err(failed)?;
        let certificate = params.signed_by(&public, &self.issuer).map_err(failed)?;
        Ok(certificate.der().to_vec())
    }
}

impl ProvenKey {
    /// Takes the public key out of a certification request (PKCS#10, DER), and nothing else.
    ///
    /// # Errors
    /// [`Error::BadRequest`] when it cannot be read, its signature is wrong, or its key is of a kind that we
    /// do not sign.
    pub fn from_request(der: &[u8]) -> Result<Self, Error> {
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|_| Error::BadRequest("it is not PKCS#10"))?;
        if !rest.is_empty() {
            return Err(Error::BadRequest("bytes follow it"));
        }
        request.verify_signature().map_err(|_| Error::BadRequest("its signature does not fit its key"))?;
        let der = request.certification_request_info.subject_pki.raw.to_vec();
        SubjectPublicKeyInfo::from_der(&der).map_err(|_| Error::BadRequest("keys of its kind are not signed"))?;
        Ok(Self { sha256: hestner_proto::sha256::hex(&der), der })
    }
}

fn key_name(key: &KeyPair) -> String {
    use rcgen::PublicKeyData as _;
    hestner_proto::sha256::hex(&key.subject_public_key_info())
}

fn seconds(life: Duration) -> i64 {
    i64::try_from(life.as_secs()).unwrap_or(i64::MAX)
}

/// Parameters that owe nothing to anybody's request.
fn fresh_params(now_ms: i64, life: time::Duration) -> Result<CertificateParams, Error> {
    let now = OffsetDateTime::from_unix_timestamp(now_ms.div_euclid(1000)).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = now - BACKDATED;
    params.not_after = now + life;
    // A leading zero bit keeps the number positive in DER without a 17th byte.
    let mut serial = random::bytes::<16>()?;
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn self_sign(key: &KeyPair, trust_domain: &str, now_ms: i64) -> Result<String, Error> {
    let mut params = fresh_params(now_ms, AUTHORITY_LIFE)?;
    params.distinguished_name.push(DnType::CommonName, format!("Hestner CA of {trust_domain}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let signed = params.self_signed(key);
    let signed = signed.map_err(|source| Error::Certificate { operation: "sign the authority itself", source })?;
    Ok(signed.pem())
}

#[cfg(test)]
mod tests;
