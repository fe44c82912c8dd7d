//! The ground everything stands on: clock, files, processes, back-off.
//!
//! Wraps what the operating system offers so that time, durability, deadlines and bounds are decided in
//! one place. It knows nothing of snapshots, runs or the centre, and it is the only module that calls
//! what `clippy.toml` bans elsewhere.

pub mod backoff;
pub mod clock;
pub mod command;
pub mod files;
pub mod mounts;
pub mod process;
pub mod trust;
