//! The enrolment service, rate limited by client address.
//!
//! A refusal is a gRPC status whose message is a sentence, with the stable code in the metadata
//! `hestner-code` and the next step in `hestner-next-step`.

use std::net::IpAddr;
use std::num::NonZeroU32;

use governor::clock::DefaultClock;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};
use hestner_proto::v1;
use hestner_proto::v1::enrolment_server::Enrolment as EnrolmentService;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};

use super::peer::Peer;
use crate::enrolment::{self, Enrolment};
use crate::model::run::cut;
use crate::platform::causes::chain;

/// Addresses remembered before those that are quiet again are forgotten.
const ADDRESSES_MAX: usize = 10_000;
/// Longest hostname that goes into the log, in bytes.
const HOSTNAME_BYTES_MAX: usize = 256;

/// See the module.
pub struct EnrolmentDoor {
    enrolment: Enrolment,
    attempts: RateLimiter<IpAddr, DashMapStateStore<IpAddr>, DefaultClock>,
}

impl EnrolmentDoor {
    /// A door that lets one address try so many times a minute.
    pub fn new(enrolment: Enrolment, attempts_per_minute: NonZeroU32) -> Self {
        Self { enrolment, attempts: RateLimiter::dashmap(Quota::per_minute(attempts_per_minute)) }
    }

    fn check_rate(&self, address: IpAddr) -> Result<(), Status> {
        let refused = |message| refusal(Code::ResourceExhausted, message, "too_many_attempts", "wait a minute");
        if self.attempts.len() >= ADDRESSES_MAX {
            self.attempts.retain_recent();
            if self.attempts.len() >= ADDRESSES_MAX {
                return Err(refused("too many addresses try to enrol"));
            }
        }
        self.attempts.check_key(&client(address)).map_err(|_| refused("too many attempts from this address"))
    }
}

/// Whom an address stands for. A host with IPv6 has a whole /64 to itself.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() & !u128::from(u64::MAX)).into()),
        v4 => v4,
    }
}

#[tonic::async_trait]
impl EnrolmentService for EnrolmentDoor {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollReply>, Status> {
        let peer = request.extensions().get::<Peer>().cloned().ok_or_else(|| Status::internal("no peer"))?;
        self.check_rate(peer.address.ip())?;
        let asked = request.into_inner();
        let hostname = cut(asked.hostname.clone(), HOSTNAME_BYTES_MAX);
        let enrolled = self.enrolment.enrol(enrolment::Request {
            token: asked.token,
            csr_der: asked.csr_der,
            recovery_fingerprint: asked.recovery_fingerprint,
            hostname: asked.hostname,
            agent_version: asked.agent_version,
        });
        match enrolled.await {
            Ok(enrolled) => {
                tracing::info!(
                    event = "enrolled", component = "enrolment", tenant_id = %enrolled.company, server_id = %enrolled.server, hostname,
                    peer = %peer.address, "a server was enrolled"
                );
                Ok(Response::new(v1::EnrollReply {
                    certificate_der: enrolled.certificate_der,
                    ca_der: enrolled.ca_der,
                    company_id: enrolled.company.0,
                    server_id: enrolled.server.0,
                    recovery_recipient: enrolled.recovery_recipient,
                }))
            }
            Err(error) => {
                tracing::warn!(event = "enrolment_refused", component = "enrolment", code = error.code(), peer = %peer.address, error = chain(&error), "refused");
                Err(status(&error))
            }
        }
    }
}

fn status(error: &enrolment::Error) -> Status {
    use enrolment::Error;
    let grpc = match error {
        Error::TokenUnknown => Code::Unauthenticated,
        Error::TokenUsed | Error::TokenExpired | Error::RecoveryKeyMismatch => Code::FailedPrecondition,
        Error::CompanySuspended | Error::ServerRevoked | Error::KeyInUse => Code::PermissionDenied,
        Error::NoSuch(_) => Code::NotFound,
        Error::Authority(_) if error.code() == "csr_invalid" => Code::InvalidArgument,
        Error::Authority(_) | Error::Store(_) | Error::Random(_) => Code::Unavailable,
    };
    // What failed inside is nobody's business outside.
    let message = if grpc == Code::Unavailable { "the receiver could not do it".to_owned() } else { error.to_string() };
    refusal(grpc, &message, error.code(), error.next_step())
}

fn refusal(grpc: Code, message: &str, code: &'static str, next_step: &'static str) -> Status {
    let mut metadata = MetadataMap::new();
    for (name, value) in [("hestner-code", code), ("hestner-next-step", next_step)] {
        // Both are constants of ours in ASCII.
        if let Ok(value) = value.parse() {
            metadata.insert(name, value);
        }
    }
    Status::with_metadata(grpc, message, metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_host_are_one_client() {
        let of = |text: &str| client(text.parse().expect("an address"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
