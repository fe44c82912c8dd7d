//! TLS towards the receiver: version 1.3, aws-lc-rs, our own roots only.
//!
//! Two ways to trust: by the pin that came with the join token (before the host has an identity), and by
//! the CA that was kept at enrolment, with the host's own certificate (ever after). The machine's root
//! store is never asked. Sessions are never resumed: each handshake shows the certificate anew.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// How long a connection and its handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A configuration or a connection that failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A certificate or a key cannot be used.
    #[error("the certificate or key cannot be used")]
    Unusable(#[from] rustls::Error),
    /// The verifier could not be built from the CA.
    #[error("the CA cannot be used")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
    /// The receiver's address has no host part that a certificate could carry.
    #[error("`{0}` is not an address of the form host:port")]
    Address(String),
}

/// Trust in whoever shows a chain to the CA with this pin.
#[derive(Debug)]
pub struct PinnedCa {
    pin: String,
    algorithms: WebPkiSupportedAlgorithms,
    provider: Arc<CryptoProvider>,
    mismatch: AtomicBool,
}

impl PinnedCa {
    /// Pin of the CA, see [`hestner_proto::identity::ca_pin`].
    pub fn new(pin: &str) -> Arc<Self> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let algorithms = provider.signature_verification_algorithms;
        Arc::new(Self { pin: pin.to_owned(), algorithms, provider, mismatch: AtomicBool::new(false) })
    }

    /// Whether a receiver was turned away because its CA has another pin.
    pub fn saw_mismatch(&self) -> bool {
        self.mismatch.load(Ordering::Relaxed)
    }

    /// A configuration that trusts by the pin and shows no certificate.
    ///
    /// # Errors
    /// Never with the provider used here.
    pub fn config(self: &Arc<Self>) -> Result<ClientConfig, TlsError> {
        let verifier: Arc<dyn ServerCertVerifier> = Arc::clone(self) as _;
        let config =
            builder(&self.provider)?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
        Ok(finish(config))
    }
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().find(|der| hestner_proto::identity::ca_pin(der) == self.pin);
        let Some(ca) = pinned else {
            self.mismatch.store(true, Ordering::Relaxed);
            return Err(CertificateError::UnknownIssuer.into());
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider)).build();
        let verifier = verifier.map_err(|error| rustls::Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A configuration that trusts one CA and shows the host's certificate.
///
/// # Errors
/// When certificate and key do not fit together or cannot be read.
pub fn mutual(
    ca: CertificateDer<'static>,
    own: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(ca)?;
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let config = builder(&provider)?.with_webpki_verifier(verifier).with_client_auth_cert(vec![own], key)?;
    Ok(finish(config))
}

fn builder(
    provider: &Arc<CryptoProvider>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, TlsError> {
    Ok(ClientConfig::builder_with_provider(Arc::clone(provider)).with_protocol_versions(&[&rustls::version::TLS13])?)
}

fn finish(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    config
}

/// Opens connections to one address with one configuration.
#[derive(Clone, Debug)]
pub struct Dialer {
    address: String,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
}

impl Dialer {
    /// For an address of the form `host:port`.
    ///
    /// # Errors
    /// [`TlsError::Address`].
    pub fn new(address: &str, config: ClientConfig) -> Result<Self, TlsError> {
        let wrong = || TlsError::Address(address.to_owned());
        let (host, _port) = address.rsplit_once(':').ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|_| wrong())?;
        Ok(Self { address: address.to_owned(), name, config: Arc::new(config) })
    }

    /// Connects and shakes hands.
    ///
    /// # Errors
    /// Of the network, of TLS, or when it takes longer than ten seconds.
    pub async fn connect(self) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let Self { address, name, config } = self;
        let connect = async move {
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            TlsConnector::from(config).connect(name, tcp).await
        };
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer within 10 s");
        connected.map_err(timed_out)?.map(TokioIo::new)
    }
}
