//! The ground: clock, durable files, random numbers, the service manager and the TLS listener.
//!
//! Knows nothing of Hestner and imports nothing of ours. Time and randomness enter the process here and
//! travel up by argument, so that everything above can be tested without waiting.

pub mod causes;
pub mod clock;
pub mod files;
pub mod notify;
pub mod random;
pub mod span;
pub mod tls;
