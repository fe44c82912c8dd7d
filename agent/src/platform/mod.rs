//! The ground everything stands on: clock, files, processes, back-off.
//!
//! Wraps what the operating system offers so that time, durability, deadlines and bounds are decided in
//! one place. It knows nothing of snapshots, runs or the centre, and it is the only module that calls
//! what `clippy.toml` bans elsewhere.

pub mod backoff;
pub mod capabilities;
pub mod cgroup;
pub mod clock;
pub mod command;
pub mod failpoint;
pub mod files;
pub mod fsfreeze;
pub mod lines;
pub mod mounts;
pub mod notify;
pub mod process;
pub mod size;
pub mod trust;

/// An error and everything below it, as one sentence.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        // Some libraries repeat what lies below.
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}
