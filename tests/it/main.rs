//! Black-box flows of agent and receiver on loopback: real binaries, real `restic`, real filesystems.
//!
//! One file a behaviour. A test starts its own receiver and agents in a folder of its own
//! ([`hestner_tests::World`]), so that tests run side by side; what it asserts stands in its name.

mod archiver;
mod bad_input;
mod booted;
mod booted_packages;
mod booted_privilege;
mod btrfs;
mod commit_gate;
mod confirm;
mod containers;
mod doctor;
mod exactly_once;
mod false_green;
mod faults;
mod fidelity;
mod grants;
mod guard;
mod hook_guard;
mod hooks;
mod inventory;
mod journey;
mod kinds;
mod notify;
mod real_trees;
mod separation;
mod storage;
mod thaw;
