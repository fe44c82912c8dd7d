//! Harness of the black-box tests: real binaries, real files, real `restic`.
//!
//! A test reads as a story: a [`World`] is a folder with a receiver that serves, a company
//! and its keys; [`AgentBuilder`] puts an agent into it. Handles end what they
//! started when they go out of scope, whatever happened to the test. The harness knows the programs by
//! their command lines, files, sockets and REST only: nothing here imports `agent` or `receiver`, so that
//! a test cannot pass because both sides share a mistake.

pub mod agent;
pub mod archiver;
pub mod booted;
pub mod builder;
pub mod cgroups;
pub mod clock;
pub mod command;
pub mod docker;
pub mod elsewhere;
pub mod files;
pub mod http;
pub mod memory;
pub mod mounts;
pub mod ports;
pub mod processes;
pub mod proxy;
pub mod receiver;
pub mod restic;
pub mod run;
pub mod s3;
pub mod service;
pub mod sftp;
pub mod stage;
pub mod tree;
pub mod units;
pub mod world;
pub mod writer;

pub use agent::Agent;
pub use archiver::{Archiver, Moment};
pub use builder::AgentBuilder;
pub use clock::{wait_for, wait_until};
pub use command::{Cmd, Ended};
pub use receiver::Receiver;
pub use run::Run;
pub use service::{Hook, Service};
pub use world::World;

/// True where the test may mount, change owners and start containers. A test that needs it and cannot
/// have it says so aloud; with `HESTNER_NOTHING_SKIPPED` set, as `scripts/test` does, it fails instead.
pub fn is_root_or_skips(test: &str) -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    let strict = std::env::var_os("HESTNER_NOTHING_SKIPPED").is_some();
    assert!(!strict, "{test} needs root, and nothing may be skipped here");
    eprintln!("SKIPPED: {test} needs root (loop mounts, other users, Docker)");
    false
}
