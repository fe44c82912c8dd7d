//! Names that certificates carry, and fingerprints that people compare.
//!
//! An agent is named by one URI in its certificate, `spiffe://<trust domain>/company/<id>/server/<id>`
//! (<https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>), and by nothing else: not by
//! hostname, not by machine-id.

use std::fmt;
use std::str::FromStr;

/// Identity of one server's agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AgentId {
    /// Name of the receiver's trust domain, such as `hestner.internal`.
    pub trust_domain: String,
    /// The company the server belongs to.
    pub company_id: i64,
    /// The server.
    pub server_id: i64,
}

/// A string that is not an agent's identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not of the form spiffe://<trust domain>/company/<id>/server/<id>")]
pub struct NotAnAgentId(String);

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trust_domain, company_id, server_id } = self;
        write!(f, "spiffe://{trust_domain}/company/{company_id}/server/{server_id}")
    }
}

impl FromStr for AgentId {
    type Err = NotAnAgentId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || NotAnAgentId(text.chars().take(200).collect());
        let rest = text.strip_prefix("spiffe://").ok_or_else(refused)?;
        let parts: Vec<&str> = rest.split('/').collect();
        let [trust_domain, "company", company, "server", server] = parts[..] else { return Err(refused()) };
        if trust_domain.is_empty() {
            return Err(refused());
        }
        let id = |digits: &str| match digits.parse::<i64>() {
            // Written one way only, so that two texts never name the same agent.
            Ok(id) if id > 0 && id.to_string() == digits => Ok(id),
            _ => Err(refused()),
        };
        Ok(Self { trust_domain: trust_domain.to_owned(), company_id: id(company)?, server_id: id(server)? })
    }
}

/// Pin of a CA: SHA-256 of its certificate in DER, as 64 hex digits.
pub fn ca_pin(certificate_der: &[u8]) -> String {
    crate::sha256::hex(certificate_der)
}

/// Fingerprint of a company's recovery key, as it is typed on the host: `sha256:` and the first 128 bits
/// of the SHA-256 of the recipient's text. A second key with the same fingerprint costs 2^128 tries.
pub fn recovery_fingerprint(recipient: &str) -> String {
    format!("sha256:{}", &crate::sha256::hex(recipient.trim().as_bytes())[..32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_survives_its_own_text() {
        let id = AgentId { trust_domain: "t.example".into(), company_id: 7, server_id: 42 };
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn identity_refuses_every_other_text() {
        for text in [
            "",
            "spiffe://",
            "spiffe:///company/1/server/2",
            "https://t/company/1/server/2",
            "spiffe://t/company/1/server/2/",
            "spiffe://t/company/01/server/2",
            "spiffe://t/company/-1/server/2",
            "spiffe://t/company/0/server/2",
            "spiffe://t/server/2/company/1",
            "spiffe://t/company/1/server/99999999999999999999",
        ] {
            assert!(text.parse::<AgentId>().is_err(), "{text}");
        }
    }
}
