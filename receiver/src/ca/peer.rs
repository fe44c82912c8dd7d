//! Reading who a peer is from the certificate it showed.
//!
//! In: DER that rustls has verified against our authority. Out: the one agent it names. It fails closed:
//! more than one name, or any name of another form, is nobody.

use hestner_proto::identity::AgentId;
use x509_parser::extensions::GeneralName;

use super::Error;

/// Who a verified certificate names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The agent.
    pub agent: AgentId,
    /// SHA-256 of the certificate's SubjectPublicKeyInfo, as hex.
    pub spki_sha256: String,
    /// When the certificate ends, milliseconds since the Unix epoch. TLS looks at it only in the handshake.
    pub not_after_ms: i64,
}

/// Name of a certificate's key; none if it cannot be read.
pub(super) fn spki_sha256(der: &[u8]) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(der).ok()?;
    Some(hestner_proto::sha256::hex(parsed.public_key().raw))
}

/// Reads the agent's name from its certificate.
///
/// # Errors
/// [`Error::BadPeer`] unless the certificate has exactly one name, a URI, that names an agent of
/// `trust_domain`.
pub fn read_peer(der: &[u8], trust_domain: &str) -> Result<PeerIdentity, Error> {
    let bad = |why: &str| Error::BadPeer(why.to_owned());
    let (_, parsed) = x509_parser::parse_x509_certificate(der).map_err(|_| bad("it cannot be read"))?;
    let names = parsed.subject_alternative_name().map_err(|_| bad("its names cannot be read"))?;
    let names = names.ok_or_else(|| bad("it has no names"))?;
    let [GeneralName::URI(uri)] = names.value.general_names[..] else {
        return Err(bad("it must have exactly one name, a URI"));
    };
    let agent: AgentId = uri.parse().map_err(|error| Error::BadPeer(format!("{error}")))?;
    if agent.trust_domain != trust_domain {
        return Err(bad("its name is of another trust domain"));
    }
    Ok(PeerIdentity {
        agent,
        spki_sha256: hestner_proto::sha256::hex(parsed.public_key().raw),
        not_after_ms: parsed.validity().not_after.timestamp().saturating_mul(1000),
    })
}
