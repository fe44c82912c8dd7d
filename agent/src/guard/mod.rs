//! Ends a frozen window whatever happens to whoever began it.
//!
//! ```text
//! runner ── client ──socket, pidfd, mounts──▶ process (the guard)
//!   │                                            │ one byte            ┌─▶ thread: FITHAW
//!   │ guard gone, or the deadline passed:        ├──────▶ freezer ─────┤   (one a mount)
//!   └─ thaws by itself                           │        FIFREEZE     └─▶ journal
//!                                                └─▶ `hestner-agent thaw`, when it struck
//! ```
//!
//! In: which filesystems, and how long. Out: one word, [`client::Verdict`], without which a frozen point does
//! not count. The guard knows mounts, windows and processes. It never runs a hook, speaks to Docker or
//! opens a database, never thaws what somebody else froze, and believes "not frozen" only when nobody is
//! on the way to freeze any more.
//!
//! Who thaws when: the guard on the runner's order, at the deadline, when the runner dies or closes, and on
//! SIGTERM; the runner when the guard is gone or silent beyond the deadline; [`recovery`] by the journal
//! when neither is left. The one limit: a FIFREEZE that is stuck inside the kernel cannot be cancelled.

mod arming;
pub mod client;
mod filesystem;
pub mod freezer;
mod journal;
mod link;
mod messages;
mod mounted;
pub mod process;
pub mod recovery;

pub use client::GuardError;
