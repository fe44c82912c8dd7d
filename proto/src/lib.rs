//! The contract between `hestner-agent` and `hestner-receiver`.
//!
//! Holds the generated messages and stubs ([`v1`]), the names in certificates ([`identity`]), the join
//! token ([`token`]), the hash that reports, keys and stored objects are named by ([`sha256`]) and the words with a closed list ([`words`]). It imports nothing of the agent or the
//! receiver, does no I/O and reads no clock: whatever both ends must agree on stands here once, and
//! nothing else does.

pub mod identity;
pub mod sha256;
pub mod token;
pub mod words;

/// Generated from `proto/hestner/v1/hestner.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("hestner.v1");
}

/// Version of the session protocol. A receiver refuses an agent of another one with `protocol`.
pub const PROTOCOL: u32 = 1;

/// Largest message either side accepts, in bytes. An inventory of 5,000 services takes about 500 KiB;
/// everything else is far smaller.
pub const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Largest number of reports that an agent sends ahead of their acknowledgement.
pub const REPORTS_IN_FLIGHT_MAX: usize = 64;
