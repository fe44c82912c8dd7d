//! Trying again, and not too much at once: what every place behind a network needs.
//!
//! What may pass (a lost connection, an overloaded server, no progress) is tried again after a delay with full
//! jitter, until the tries or the time are used up; what will not pass (a denial, a taken name) never is. Uploads
//! keep below a bandwidth, and only so many calls are under way at a time. Time is tokio's, which tests pause.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use toml_example::TomlExample;

use super::StorageError;
use crate::platform::backoff::{Backoff, random_u64};

/// Bytes that go out in one piece: between two pieces the bandwidth is kept and progress is seen.
pub(super) const PIECE_BYTES: usize = 64 * 1024;

/// Bounds of what a remote place may cost.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// How often a call is tried in all.
    #[toml_example(default = 8)]
    pub tries_max: u32,
    /// No further try begins so long after the first one began.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "15m")]
    pub retry_time_max: Duration,
    /// Below this the delay after the first failure is drawn; it doubles with each further one.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "1s")]
    pub delay_base: Duration,
    /// Below this it always stays.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "60s")]
    pub delay_max: Duration,
    /// A request that gets no byte further for so long has failed.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "60s")]
    pub stall_max: Duration,
    /// Bytes that go out in a second, over all calls; 0: as many as can.
    #[toml_example(default = 0)]
    pub upload_bytes_per_second: u64,
    /// Calls under way at a time, at least 1; more wait for their turn.
    #[toml_example(default = 4)]
    pub concurrent_calls: usize,
}

impl Limits {
    /// Every mistake, each as one sentence.
    pub fn mistakes(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.tries_max == 0 {
            found.push("`tries_max` must be at least 1".to_owned());
        }
        if self.concurrent_calls == 0 {
            found.push("`concurrent_calls` must be at least 1".to_owned());
        }
        for (key, time) in [("delay_base", self.delay_base), ("stall_max", self.stall_max)] {
            if time.is_zero() {
                found.push(format!("`{key}` must be longer than 0"));
            }
        }
        if self.delay_max < self.delay_base {
            found.push("`delay_max` must not be shorter than `delay_base`".to_owned());
        }
        found
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tries_max: 8,
            retry_time_max: Duration::from_secs(15 * 60),
            delay_base: Duration::from_secs(1),
            delay_max: Duration::from_secs(60),
            stall_max: Duration::from_secs(60),
            upload_bytes_per_second: 0,
            concurrent_calls: 4,
        }
    }
}

/// A try that failed.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) error: StorageError,
    /// Whether another try may succeed.
    pub(super) is_passing: bool,
}

impl Trouble {
    pub(super) fn passing(error: StorageError) -> Self {
        Self { error, is_passing: true }
    }
}

impl From<StorageError> for Trouble {
    fn from(error: StorageError) -> Self {
        Self { error, is_passing: false }
    }
}

/// Tries until it works, will not work, or has been tried enough.
pub(super) async fn retry<T, F>(limits: &Limits, mut attempt: impl FnMut() -> F) -> Result<T, StorageError>
where
    F: Future<Output = Result<T, Trouble>>,
{
    let begun = Instant::now();
    let mut backoff = Backoff::new(limits.delay_base, limits.delay_max);
    let mut tries = 1;
    loop {
        let trouble = match attempt().await {
            Ok(value) => return Ok(value),
            Err(trouble) => trouble,
        };
        // Without randomness the longest delay is the kindest.
        let delay = backoff.next_delay(random_u64().unwrap_or(u64::MAX));
        let is_over = tries >= limits.tries_max || begun.elapsed() + delay > limits.retry_time_max;
        if !trouble.is_passing || is_over {
            return Err(after(trouble.error, tries));
        }
        tries += 1;
        sleep(delay).await;
    }
}

fn after(error: StorageError, tries: u32) -> StorageError {
    match error {
        StorageError::Failed { operation, what, reason } if tries > 1 => {
            StorageError::Failed { operation, what, reason: format!("{reason} (tried {tries} times)") }
        }
        other => other,
    }
}

/// Waits for one step of a request; `None`: it got no further.
pub(super) async fn step<T>(limits: &Limits, step: impl Future<Output = T>) -> Option<T> {
    timeout(limits.stall_max, step).await.ok()
}

/// Keeps what goes out below a bandwidth: a bucket that holds a single piece, so that there are no bursts.
#[derive(Debug)]
pub(super) struct Bandwidth {
    bytes_per_second: u64,
    /// When the next piece may go.
    free_at: Mutex<Option<Instant>>,
}

impl Bandwidth {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free_at: Mutex::default() }
    }

    /// Waits until so many bytes may go.
    pub(super) async fn take(&self, bytes: usize) {
        if self.bytes_per_second == 0 {
            return;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let now = Instant::now();
        let turn = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let turn = free_at.unwrap_or(now).max(now);
            *free_at = Some(turn + cost);
            turn
        };
        sleep_until(turn).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::storage::{Kind, Object, failed};

    fn passing() -> Trouble {
        Trouble::passing(failed("store", "data/x", "the line is cut"))
    }

    fn limits() -> Limits {
        Limits { tries_max: 4, ..Limits::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn trouble_that_passes_is_tried_again() {
        let tries = Cell::new(0);
        let attempt = || async {
            tries.set(tries.get() + 1);
            if tries.get() < 3 { Err(passing()) } else { Ok(tries.get()) }
        };
        assert_eq!(retry(&limits(), attempt).await.unwrap(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn tries_are_bounded_and_counted_in_the_error() {
        let tries = Cell::new(0);
        let attempt = || async {
            tries.set(tries.get() + 1);
            Err::<(), _>(passing())
        };
        let error = retry(&limits(), attempt).await.unwrap_err();
        assert_eq!(tries.get(), 4);
        assert_eq!(error.to_string(), "cannot store data/x: the line is cut (tried 4 times)");
    }

    #[tokio::test(start_paused = true)]
    async fn no_try_begins_after_the_time_is_over() {
        let tries = Cell::new(0);
        let limits = Limits { retry_time_max: Duration::from_secs(100), tries_max: 1000, ..limits() };
        let begun = Instant::now();
        let attempt = || async {
            tries.set(tries.get() + 1);
            sleep(Duration::from_secs(40)).await;
            Err::<(), _>(passing())
        };
        retry(&limits, attempt).await.unwrap_err();
        assert!(begun.elapsed() <= Duration::from_secs(140), "{:?}", begun.elapsed());
        assert!((2..=3).contains(&tries.get()), "{}", tries.get());
    }

    #[tokio::test(start_paused = true)]
    async fn denial_is_not_tried_again() {
        let tries = Cell::new(0);
        let object = Object::new(Kind::Config, "config");
        let attempt = || async {
            tries.set(tries.get() + 1);
            Err::<(), _>(Trouble::from(StorageError::Exists(object.clone())))
        };
        assert!(matches!(retry(&limits(), attempt).await.unwrap_err(), StorageError::Exists(_)));
        assert_eq!(tries.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn step_without_progress_ends() {
        let begun = Instant::now();
        assert!(step(&limits(), std::future::pending::<()>()).await.is_none());
        assert_eq!(begun.elapsed(), limits().stall_max);
        assert_eq!(step(&limits(), async { 1 }).await, Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn bandwidth_is_shared_and_kept() {
        let bandwidth = Bandwidth::new(1000);
        let begun = Instant::now();
        let one = async {
            for _ in 0..10 {
                bandwidth.take(500).await;
            }
        };
        let other = async {
            for _ in 0..10 {
                bandwidth.take(500).await;
            }
        };
        tokio::join!(one, other);
        // 20 pieces of half a second; the last one goes when the 19 before it have gone.
        assert_eq!(begun.elapsed().as_millis(), 9500);
        // An idle hour is no credit.
        sleep(Duration::from_secs(3600)).await;
        let begun = Instant::now();
        bandwidth.take(1000).await;
        bandwidth.take(1000).await;
        assert_eq!(begun.elapsed().as_millis(), 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn unlimited_bandwidth_never_waits() {
        let begun = Instant::now();
        Bandwidth::new(0).take(usize::MAX).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
