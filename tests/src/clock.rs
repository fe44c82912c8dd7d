//! The only place of the tests that reads a clock, and the only way they wait.
//!
//! A test never sleeps for luck: it names the condition it waits for and how long that may take. In:
//! a condition. Out: its value, or a panic that says what did not happen.

#![expect(clippy::disallowed_methods, reason = "this module is the tests' clock")]

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Pause between two looks at a condition.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The monotonic clock.
pub fn now() -> Instant {
    Instant::now()
}

/// The same clock as a number that processes can tell each other (`CLOCK_MONOTONIC`).
pub fn monotonic() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("a monotonic clock").into()
}

/// Milliseconds since the Unix epoch.
pub fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
    i64::try_from(since.as_millis()).expect("a date before the year 292 million")
}

/// Waits until `look` gives a value.
///
/// # Panics
/// When it gave none `within` that time.
pub fn wait_for<T>(what: &str, within: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = now() + within;
    loop {
        if let Some(value) = look() {
            return value;
        }
        assert!(now() < end, "waited {within:?} in vain for: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until `holds`.
///
/// # Panics
/// When it did not hold `within` that time.
pub fn wait_until(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    wait_for(what, within, || holds().then_some(()));
}

/// Waits until `holds`, and says whether it did.
pub fn eventually(within: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let end = now() + within;
    while !holds() {
        if now() >= end {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
    }
    true
}

/// Lets `time` pass: for measuring, and for faults at varying moments. Never to wait for something.
pub fn let_pass(time: Duration) {
    std::thread::sleep(time);
}
