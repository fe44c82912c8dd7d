//! Words and pure rules: the types that stores, work and doors share.
//!
//! No I/O, no clock, no task: whatever is decided here is decided from arguments alone. Types that REST
//! shows carry their JSON form and schema, so that a field has one name from the store to the document.

pub mod cost;
pub mod counters;
pub mod policy;
pub mod problem;
pub mod range;
pub mod report;
pub mod run;
pub mod server;
pub mod times;

use serde::{Deserialize, Serialize};

/// A company's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CompanyId(pub i64);

/// A server's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServerId(pub i64);

impl std::fmt::Display for CompanyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::fmt::Display for ServerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Who caused a change, as the audit log names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// Somebody with a shell on the receiver's machine, by user name.
    Cli(String),
    /// The holder of an API key, by its row.
    ApiKey(i64),
    /// A server's agent, by its row.
    Agent(ServerId),
    /// The receiver itself, such as when a directive expires.
    Receiver,
}

impl std::fmt::Display for Actor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cli(user) => write!(f, "cli:{user}"),
            Self::ApiKey(id) => write!(f, "apikey:{id}"),
            Self::Agent(server) => write!(f, "agent:{server}"),
            Self::Receiver => f.write_str("receiver"),
        }
    }
}

/// What a caller may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every company.
    All,
    /// One company.
    Company(CompanyId),
}

impl Scope {
    /// Whether things of `company` are visible.
    pub fn covers(self, company: CompanyId) -> bool {
        match self {
            Self::All => true,
            Self::Company(own) => own == company,
        }
    }
}
