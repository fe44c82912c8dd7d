//! `hestner-agent`: takes application-consistent snapshots on a managed server and proves it.
//!
//! The modules stand on floors and import downwards only; `ARCHITECTURE.md` has the picture, and a test
//! keeps it. From the ground up:

pub mod lifecycle;
pub mod platform;

pub mod escrow;
pub mod format;
pub mod guard;
pub mod hook;
pub mod policy;
pub mod status;
pub mod storage;
pub mod store;
pub mod tls;

pub mod freeze;
pub mod gate;
pub mod identity;
pub mod report;
pub mod repository;
pub mod source;

pub mod run;

pub mod heartbeat;
pub mod inventory;
pub mod scheduler;

pub mod control;
pub mod enrolment;
pub mod session;

pub mod daemon;
pub mod doctor;

pub mod cli;
