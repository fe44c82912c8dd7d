//! TLS settings of the three listeners, with certificates that renew themselves.
//!
//! Out: rustls configurations, TLS 1.3 only, aws-lc-rs only. On the mutual one, session resumption is off in
//! both of its forms: stock rustls resumes a session without asking the client verifier again, which would
//! let a revoked agent back in. A server certificate past half its life is replaced at the next handshake.

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use rcgen::{DnType, ExtendedKeyUsagePurpose, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{RootCertStore, ServerConfig};

use super::{Authority, Error, fresh_params};
use crate::platform::clock::SharedClock;

/// Life of a listener's certificate. Short enough that a stolen key is of little use, long enough that an
/// agent with a wrong clock still gets in.
const LISTENER_LIFE: time::Duration = time::Duration::days(30);

/// rustls asks this for the time, so that tests can set it.
#[derive(Debug)]
struct ClockTime(SharedClock);

impl TimeProvider for ClockTime {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.0.now_ms() / 1000).ok()?;
        Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds)))
    }
}

/// Hands the listeners their certificate.
pub struct ListenerCertificates {
    pub(super) authority: Arc<Authority>,
    names: Vec<String>,
    clock: SharedClock,
    /// The certificate and when half its life is over.
    pub(super) current: Mutex<Option<(Arc<CertifiedKey>, i64)>>,
}

impl std::fmt::Debug for ListenerCertificates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ListenerCertificates {{ names: {:?}, .. }}", self.names)
    }
}

impl ListenerCertificates {
    /// Certificates for `names` (DNS names and IP addresses); the first is made now, so that names that
    /// cannot be used are an error at start.
    ///
    /// # Errors
    /// When a certificate cannot be made.
    pub fn new(authority: Arc<Authority>, names: Vec<String>, clock: SharedClock) -> Result<Arc<Self>, Error> {
        let certificates = Self { authority, names, clock, current: Mutex::default() };
        let first = certificates.issue()?;
        if let Ok(mut current) = certificates.current.lock() {
            *current = Some(first);
        }
        Ok(Arc::new(certificates))
    }

    fn issue(&self) -> Result<(Arc<CertifiedKey>, i64), Error> {
        let failed = |source| Error::Certificate { operation: "make a listener's certificate", source };
        let now_ms = self.clock.now_ms();
        let mut params = fresh_params(now_ms, LISTENER_LIFE)?;
        params.distinguished_name.push(DnType::CommonName, "hestner-receiver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in &self.names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(failed)?),
            });
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let certificate = params.signed_by(&key, &self.authority.issuer).map_err(failed)?;
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing = aws_lc_rs::sign::any_supported_type(&private).map_err(Error::Tls)?;
        // The authority's certificate goes along, so that an agent that knows only the pin can check it.
        let chain = vec![certificate.der().clone(), self.authority.certificate.clone()];
        let half_life_ms = LISTENER_LIFE.whole_seconds() * 1000 / 2;
        Ok((Arc::new(CertifiedKey::new(chain, signing)), now_ms + half_life_ms))
    }
}

impl ResolvesServerCert for ListenerCertificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut current = self.current.lock().ok()?;
        let due = current.as_ref().is_none_or(|(_, half_life)| self.clock.now_ms() >= *half_life);
        if due {
            match self.issue() {
                Ok(issued) => *current = Some(issued),
                // The old one still has half its life, and the next handshake tries again.
                Err(error) => {
                    tracing::error!(event = "listener_certificate_failed", component = "ca", error = %error, "cannot renew")
                }
            }
        }
        current.as_ref().map(|(key, _)| Arc::clone(key))
    }
}

/// TLS that asks nothing of the client; `protocols` are offered by ALPN.
///
/// # Errors
/// When rustls refuses the settings.
pub fn server_tls(certificates: Arc<ListenerCertificates>, protocols: &[&str]) -> Result<Arc<ServerConfig>, Error> {
    let clock = Arc::new(ClockTime(Arc::clone(&certificates.clock)));
    let mut config = ServerConfig::builder_with_details(Arc::new(aws_lc_rs::default_provider()), clock)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::Tls)?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

/// TLS that demands a certificate of our authority, at every handshake anew.
///
/// # Errors
/// When rustls refuses the settings.
pub fn mutual_tls(certificates: Arc<ListenerCertificates>) -> Result<Arc<ServerConfig>, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(certificates.authority.certificate.clone()).map_err(Error::Tls)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(Error::Verifier)?;
    let clock = Arc::new(ClockTime(Arc::clone(&certificates.clock)));
    let mut config = ServerConfig::builder_with_details(provider, clock)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::Tls)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(certificates);
    // See the module: without these two lines a resumed session skips the verifier.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}
