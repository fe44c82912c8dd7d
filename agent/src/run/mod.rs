//! A run: hooks, the point in time, the archive, the result.
//!
//! | part | process | for what |
//! | --- | --- | --- |
//! | [`machine`] | | what follows what, as pure code; its picture is in `docs/run-states.md` |
//! | [`plan`] | runner | what a run will do, and every reason not to |
//! | [`runner`], `driver` | runner | performs it and keeps the record |
//! | [`hook`] | supervisor | runs one command and leaves no process behind |
//! | [`worker`], `archive` | worker | everything that touches a repository |
//! | [`ledger`], [`settle`] | runner | notes of what was made, and recovery by them |
//! | [`launcher`] | daemon | starts a runner and passes on what it says |
//! | [`messages`] | | what these processes say to each other |
//!
//! The run never speaks to the centre, and it takes nothing from the daemon but a run id, a service and a
//! verb. What it stores goes through the repository's commit gate; what it tells goes into one record.

mod archive;
mod driver;
pub mod hook;
pub mod launcher;
pub mod ledger;
mod log;
pub mod machine;
pub mod messages;
pub mod plan;
pub mod runner;
pub mod settle;
pub mod worker;
