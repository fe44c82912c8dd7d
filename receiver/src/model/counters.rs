//! Counters that many parts raise and the metrics door reads.
//!
//! They live this low because the doors that raise them and the door that shows them are neighbours.
//! Totals since the process started; none is per server, so their number does not grow with the fleet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// One more.
    pub fn raise(&self) {
        self.add(1);
    }

    /// `count` more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// The total.
    pub fn total(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[doc = $help:literal])+ $name:ident,)+) => {
        /// All counters of the process.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[doc = $help])+ pub $name: Counter,)+ }

        impl Counters {
            /// Name, help text and total of each.
            pub fn all(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($help,)+).trim(), self.$name.total()),)+]
            }
        }
    };
}

counters! {
    /// Sessions that were welcomed
    sessions_opened,
    /// Sessions that were refused at hello
    sessions_refused,
    /// Heartbeats taken in
    heartbeats,
    /// Transactions that flushed heartbeats
    heartbeat_flushes,
    /// Minute samples dropped because flushing failed for too long
    samples_dropped,
    /// Reports committed for the first time
    reports_committed,
    /// Reports that had been committed before
    reports_repeated,
    /// Transactions that committed reports
    report_commits,
    /// Reports that were kept although they could not be read
    reports_unreadable,
    /// Messages that could not be read
    messages_bad,
    /// Forks: a report number that came with two contents
    forks,
    /// Reports about directives of another server or of none
    directives_ignored,
    /// Directives handed to a session
    directives_delivered,
    /// Directives that expired unanswered
    directives_expired,
    /// Servers enrolled
    enrolments,
    /// Enrolments refused
    enrolments_refused,
    /// REST requests refused for a missing or wrong key
    keys_refused,
}

/// The counters as they are handed around.
pub type SharedCounters = Arc<Counters>;
