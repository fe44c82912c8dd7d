//! Time as an argument: whoever needs the hour of the day is given a [`Clock`].
//!
//! Deadlines inside the process use `tokio::time::Instant`, which tests can pause; this module is for
//! the calendar only.

use std::sync::Arc;

use chrono::{DateTime, Utc};

/// Tells the time of day in UTC.
pub trait Clock: Send + Sync {
    /// Now.
    fn now(&self) -> DateTime<Utc>;

    /// Now, in milliseconds since the Unix epoch, as it goes over the wire.
    fn now_ms(&self) -> i64 {
        self.now().timestamp_millis()
    }
}

/// A clock that several tasks share.
pub type SharedClock = Arc<dyn Clock>;

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the machine's clock")]
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }
}
