//! Black-box flows of agent and receiver on loopback: real binaries, real `restic`, real filesystems.
//!
//! One file a behaviour. A test starts its own receiver and agents in a folder of its own
//! ([`hestner_tests::World`]), so that tests run side by side; what it asserts stands in its name.

mod bad_input;
mod booted;
mod booted_packages;
mod booted_privilege;
mod btrfs;
mod commit_gate;
mod confirm;
mod containers;
mod destinations;
mod doctor;
mod effort;
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
mod prune;
mod real_trees;
mod recover;
mod recovery_key;
mod resume;
mod separation;
mod storage;
mod storage_faults;
mod thaw;
mod verify;
