//! Full jitter back-off: how long to stay away after the n-th failure in a row.
//!
//! The delay is drawn uniformly from zero to `min(cap, base * 2^n)`: the cap comes before the draw, so
//! that a fleet that has been away for long does not come back in step
//! (<https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>).

use std::time::Duration;

/// Counts failures in a row and draws the next delay.
#[derive(Clone, Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    /// Delays below `base` after the first failure, below `cap` in the long run.
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, failures: 0 }
    }

    /// The delay before the next try. `random` is uniform over all of `u64`.
    pub fn next_delay(&mut self, random: u64) -> Duration {
        let ceiling = self.base.saturating_mul(1_u32 << self.failures.min(20)).min(self.cap);
        self.failures = self.failures.saturating_add(1);
        ceiling.mul_f64(random as f64 / u64::MAX as f64)
    }

    /// It worked: the next failure counts as the first.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A random number from the operating system.
///
/// # Errors
/// When the operating system has none to give, which Linux does only before its pool is first filled.
pub fn random_u64() -> Result<u64, getrandom::Error> {
    getrandom::u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_spread_over_the_whole_range_at_the_cap() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for _ in 0..40 {
            backoff.next_delay(0);
        }
        assert_eq!(backoff.next_delay(u64::MAX), Duration::from_secs(60));
        assert_eq!(backoff.next_delay(0), Duration::ZERO);
        let half = backoff.next_delay(u64::MAX / 2);
        assert!((29..=31).contains(&half.as_secs()), "{half:?}");
    }

    #[test]
    fn success_starts_over() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for _ in 0..10 {
            backoff.next_delay(0);
        }
        backoff.reset();
        assert_eq!(backoff.next_delay(u64::MAX), Duration::from_secs(1));
    }
}
