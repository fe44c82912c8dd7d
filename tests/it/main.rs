//! Black-box flows of agent and receiver on loopback: real binaries, real `restic`, real filesystems.
//!
//! One file a behaviour. A test starts its own receiver and agents in a folder of its own
//! ([`hestner_tests::World`]), so that tests run side by side; what it asserts stands in its name.

mod bad_input;
mod btrfs;
mod commit_gate;
mod exactly_once;
mod false_green;
mod fidelity;
mod grants;
mod hooks;
mod inventory;
mod journey;
