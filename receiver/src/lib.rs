//! The thin centre of Hestner: it enrols agents, takes in their reports and answers REST `/v1`.
//!
//! ```text
//!   cli, main                              entry
//!   server                                 wiring: settings, build, run
//!   agent_api   rest   metrics             doors: gRPC, HTTP, Prometheus
//!   enrolment   ingest   fleet   costs     work; they meet in the store only
//!   auth                                   who may see what
//!   store   ca   sessions                  what is kept: rows, the authority's key, live streams
//!   model                                  words and pure rules
//!   platform   lifecycle                   clock, files, TLS listener; tasks and drain
//! ```
//!
//! A module imports only from lines below its own. It never makes an agent's key, never sends a command
//! line to a host, and acknowledges a report only after its commit.

pub mod lifecycle;
pub mod platform;

pub mod model;

pub mod ca;
pub mod sessions;
pub mod store;

pub mod auth;

pub mod costs;
pub mod enrolment;
pub mod fleet;
pub mod ingest;

pub mod agent_api;
pub mod metrics;
pub mod rest;

pub mod server;

pub mod cli;
