//! Reports: taking an envelope apart and checking it before anything is stored.
//!
//! In: the bytes of an envelope. Out: a [`Report`], or a sentence on why it can never be stored. The hash
//! stands over the body's bytes as they came, so a fork is told from a repetition byte by byte. A body that this
//! receiver cannot read is a report too: it is kept as it came, so that it holds up nothing behind it.

use hestner_proto::v1;
use prost::Message as _;
use serde::Serialize;
use utoipa::ToSchema;

use super::run::{ReportedRun, cut, number};

/// Longest epoch, in characters.
const EPOCH_BYTES_MAX: usize = 64;
/// Longest reason for a body that cannot be read.
const WHY_BYTES_MAX: usize = 512;

/// A numbered report that can be stored.
#[derive(Clone, Debug, PartialEq)]
pub struct NumberedReport {
    /// The outbox it lies in.
    pub epoch: String,
    /// Its number, from 1.
    pub seq: i64,
    /// Hash of the body.
    pub sha256: Vec<u8>,
    /// What it says.
    pub report: Report,
}

/// What a report says.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// Of a run.
    Run(Box<ReportedRun>),
    /// Of a directive.
    Outcome(Outcome),
    /// Of an hour's usage.
    Usage(Usage),
    /// Of a repository's key.
    Key(RepositoryKey),
    /// Of something that this receiver does not understand, such as what a newer agent says.
    Unreadable(Unreadable),
}

/// A body that could not be read. `Debug` does not show it: it may hold a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Unreadable {
    /// The bytes as they came.
    pub body: Vec<u8>,
    /// What is wrong with them.
    pub why: String,
}

impl std::fmt::Debug for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unreadable {{ why: {:?}, .. }}", self.why)
    }
}

/// The host's answer to a directive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The directive.
    pub directive_id: String,
    /// Whether the host does it.
    pub accepted: bool,
    /// Stable code of the refusal.
    pub code: String,
    /// The host's words.
    pub message: String,
}

/// Usage of one hour; see the wire's `Usage` for units.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "named and described as on the wire")]
pub struct Usage {
    pub hour_start_ms: i64,
    pub observed_seconds: i64,
    pub cpu_core_seconds: f64,
    pub memory_byte_seconds: f64,
    pub disk_used_bytes: i64,
    pub network_sent_bytes: i64,
}

/// A repository's key. `Debug` shows no key.
#[derive(Clone, PartialEq, Eq)]
pub struct RepositoryKey {
    /// The repository it opens.
    pub repository_id: String,
    /// The destination's name.
    pub destination: String,
    /// The key itself.
    pub key: EscrowedKey,
}

/// How a key is kept. Has no `Debug`: it is the key.
#[derive(Clone, PartialEq, Eq)]
pub enum EscrowedKey {
    /// Encrypted for the company's recovery key.
    Wrapped(Vec<u8>),
    /// The password itself.
    Open(String),
}

/// A repository's key as it is shown. The password of an open one is not in it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct KeptKey {
    /// Whose repository it is.
    pub server_id: i64,
    /// The repository it opens.
    pub repository_id: String,
    /// The destination's name on the host.
    pub destination: String,
    /// `wrapped`: only the company's recovery key opens it. `open`: the receiver holds the password.
    pub form: &'static str,
    /// SHA-256 of the wrapped key, as hex; `null` for an open one.
    pub sha256: Option<String>,
    /// The wrapped key, as base64: what lies as `hestner-key.age` beside the repository; `null` for an open one.
    pub wrapped: Option<String>,
    /// RFC 3339.
    pub received_at: String,
}

impl std::fmt::Debug for RepositoryKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RepositoryKey {{ repository_id: {:?}, .. }}", self.repository_id)
    }
}

/// An envelope that can never be stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("report {seq}: {why}")]
pub struct BadReport {
    /// Its number as it came.
    pub seq: u64,
    /// What is wrong.
    pub why: String,
}

/// SHA-256 as 32 bytes.
fn sha256(bytes: &[u8]) -> Vec<u8> {
    hestner_proto::sha256::of(bytes).to_vec()
}

impl NumberedReport {
    /// Takes an envelope apart.
    ///
    /// # Errors
    /// [`BadReport`], when number, epoch or hash cannot be right.
    pub fn open(envelope: v1::Envelope) -> Result<Self, BadReport> {
        let number_on_wire = envelope.seq;
        let bad = |why: String| BadReport { seq: number_on_wire, why };
        let seq = i64::try_from(envelope.seq).ok().filter(|seq| *seq > 0);
        let seq = seq.ok_or_else(|| bad("numbers begin at 1 and fit into 63 bits".to_owned()))?;
        if envelope.epoch.is_empty() || envelope.epoch.len() > EPOCH_BYTES_MAX {
            return Err(bad("an epoch has 1 to 64 characters".to_owned()));
        }
        let hash = sha256(&envelope.body);
        if hash != envelope.sha256 {
            return Err(bad("its hash is not that of its body".to_owned()));
        }
        let decoded = v1::Report::decode(envelope.body.as_slice()).map_err(|error| error.to_string());
        let report = decoded
            .and_then(Report::from_wire)
            .unwrap_or_else(|why| Report::Unreadable(Unreadable { body: envelope.body, why: cut(why, WHY_BYTES_MAX) }));
        Ok(Self { epoch: envelope.epoch, seq, sha256: hash, report })
    }
}

impl Report {
    fn from_wire(wire: v1::Report) -> Result<Self, String> {
        use v1::report::Body;
        match wire.body {
            None => Err("it says nothing that this receiver knows".to_owned()),
            Some(Body::Run(run)) => Ok(Self::Run(Box::new(ReportedRun::from_wire(run)?))),
            Some(Body::DirectiveOutcome(outcome)) => Ok(Self::Outcome(Outcome {
                directive_id: outcome.directive_id,
                accepted: outcome.accepted,
                code: cut(outcome.code, 64),
                message: cut(outcome.message, 4096),
            })),
            Some(Body::Usage(usage)) => Usage::from_wire(&usage).map(Self::Usage),
            Some(Body::RepositoryKey(key)) => RepositoryKey::from_wire(key).map(Self::Key),
        }
    }
}

impl Usage {
    fn from_wire(usage: &v1::Usage) -> Result<Self, String> {
        let finite = |value: f64| if value.is_finite() && value >= 0.0 { Ok(value) } else { Err("usage is no number") };
        Ok(Self {
            hour_start_ms: usage.hour_start_ms.max(0),
            observed_seconds: i64::from(usage.observed_seconds),
            cpu_core_seconds: finite(usage.cpu_core_seconds)?,
            memory_byte_seconds: finite(usage.memory_byte_seconds)?,
            disk_used_bytes: number(usage.disk_used_bytes),
            network_sent_bytes: number(usage.network_sent_bytes),
        })
    }
}

impl RepositoryKey {
    fn from_wire(key: v1::RepositoryKey) -> Result<Self, String> {
        use v1::repository_key::Key;
        let kept = match key.key {
            Some(Key::Wrapped(bytes)) if (1..=64 * 1024).contains(&bytes.len()) => EscrowedKey::Wrapped(bytes),
            Some(Key::Open(text)) if (1..=4096).contains(&text.len()) => EscrowedKey::Open(text),
            _ => return Err("a repository key that is missing, empty or too long".to_owned()),
        };
        if key.repository_id.is_empty() || key.repository_id.len() > 128 {
            return Err("a repository key without a repository".to_owned());
        }
        Ok(Self { repository_id: key.repository_id, destination: cut(key.destination, 256), key: kept })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn envelope(body: Vec<u8>) -> v1::Envelope {
        v1::Envelope { epoch: "e".into(), seq: 1, sha256: sha256(&body), body }
    }

    #[test]
    fn a_body_that_was_changed_on_the_way_is_refused() {
        let mut changed = envelope(v1::Report { recorded_at_ms: 1, body: None }.encode_to_vec());
        changed.body.push(0);
        assert!(NumberedReport::open(changed).expect_err("changed").why.contains("hash"));
    }

    #[test]
    fn number_zero_is_refused() {
        let zero = v1::Envelope { seq: 0, ..envelope(Vec::new()) };
        assert!(NumberedReport::open(zero).is_err());
    }

    #[test]
    fn a_key_does_not_print_when_debugged() {
        let key = RepositoryKey {
            repository_id: "r".into(),
            destination: "local".into(),
            key: EscrowedKey::Open("hunter2".into()),
        };
        assert!(!format!("{:?}", Report::Key(key)).contains("hunter2"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused_without_panic(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = NumberedReport::open(envelope(body));
        }
    }
}
