//! How far a store is: done, whole, rate, and an estimate of the rest.
//!
//! In: the counters of the engine. Out: [`Progress`]. The whole of a tree is counted in a thread of its own, behind
//! everybody else, and only when the store has gone on for a while: a short one is over before anybody asks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Progress;
use super::write::{Counters, Files, Totals, count};
use crate::platform::process::{self, IoPriority};

/// How long a store goes on before its source is counted.
const COUNT_AFTER: Duration = Duration::from_secs(2);
/// What lies further back than this hardly counts for the rate: a tree has fast parts and slow ones.
const MEMORY: Duration = Duration::from_secs(15);
/// The last of all at the CPU.
const NICE: i32 = 19;

/// A rate of bytes, smoothed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rate {
    bytes: u64,
    at: Duration,
    bytes_per_second: f64,
}

impl Rate {
    /// Takes in how much is done after so long; gives bytes a second.
    pub fn after(&mut self, bytes: u64, at: Duration) -> f64 {
        let passed = at.saturating_sub(self.at).as_secs_f64();
        if passed <= 0.0 {
            return self.bytes_per_second;
        }
        let now = bytes.saturating_sub(self.bytes) as f64 / passed;
        // At the begin there is nothing to remember: the average of all, then ever more slowly.
        let weight = passed / at.as_secs_f64().min(MEMORY.as_secs_f64()).max(passed);
        self.bytes_per_second += weight * (now - self.bytes_per_second);
        (self.bytes, self.at) = (bytes, at);
        self.bytes_per_second
    }

    /// Fills in rate and estimate.
    pub fn estimate(&mut self, progress: Progress, at: Duration) -> Progress {
        let rate = self.after(progress.bytes_done, at);
        let left = progress.bytes_total.saturating_sub(progress.bytes_done);
        let is_known = progress.bytes_total > 0 && left > 0 && rate >= 1.0;
        // A float beyond the range becomes its end.
        let seconds_remaining = if is_known { (left as f64 / rate).ceil() as u32 } else { 0 };
        Progress { bytes_per_second: rate as u64, seconds_remaining, ..progress }
    }
}

/// Watches a store.
#[derive(Debug)]
pub(super) struct Watch {
    counters: Arc<Counters>,
    /// What is to be counted; `None` when that has begun, and of a stream.
    to_count: Option<Files>,
    totals: Arc<Totals>,
    rate: Rate,
}

impl Watch {
    /// `files`: the source, if it is a tree.
    pub(super) fn new(counters: Arc<Counters>, files: Option<Files>) -> Self {
        Self { counters, to_count: files, totals: Arc::default(), rate: Rate::default() }
    }

    /// How far it is after so long.
    pub(super) fn look(&mut self, at: Duration) -> Progress {
        if at >= COUNT_AFTER
            && let Some(files) = self.to_count.take()
        {
            self.begin_to_count(files);
        }
        let bytes_done = self.counters.bytes_done.load(Ordering::Relaxed);
        let files_done = self.counters.files_done.load(Ordering::Relaxed);
        let (bytes, files) = self.totals.known().unwrap_or_default();
        // A tree that lives may have grown since it was counted.
        let not_below = |total: u64, done: u64| if total == 0 { 0 } else { total.max(done) };
        let progress = Progress {
            bytes_done,
            bytes_total: not_below(bytes, bytes_done),
            files_done,
            files_total: not_below(files, files_done),
            ..Progress::default()
        };
        self.rate.estimate(progress, at)
    }

    fn begin_to_count(&self, files: Files) {
        let totals = Arc::clone(&self.totals);
        let thread = std::thread::Builder::new().name("count".to_owned()).spawn(move || {
            // It counts all the same if it may not go behind.
            let _ = process::give_way(NICE);
            let _ = process::set_io_priority(IoPriority::Idle);
            count(&files, &totals);
        });
        // Without it there is no estimate, and nothing else is missing.
        if let Err(error) = thread {
            tracing::debug!(event = "not_counted", %error);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.totals.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn rate_follows_a_change_without_jumping() {
        let mut rate = Rate::default();
        let mut bytes = 0;
        for second in 1..=20 {
            bytes += 1000;
            assert!((rate.after(bytes, SECOND * second) - 1000.0).abs() < 1.0, "it is steady");
        }
        let after = rate.after(bytes + 100_000, SECOND * 21);
        assert!(after > 1000.0 && after < 10_000.0, "one fast second is not believed at once: {after}");
        let mut later = 0.0;
        for second in 22..=100 {
            bytes += 100_000;
            later = rate.after(bytes + 100_000, SECOND * second);
        }
        assert!((later - 100_000.0).abs() < 2_000.0, "many are: {later}");
    }

    #[test]
    fn estimate_needs_a_whole_and_a_rate() {
        let at = |done, total| Progress { bytes_done: done, bytes_total: total, ..Progress::default() };
        let seconds = |progress| Rate::default().estimate(progress, SECOND * 10).seconds_remaining;
        assert_eq!(seconds(at(100, 1000)), 90);
        assert_eq!([seconds(at(100, 0)), seconds(at(0, 1000)), seconds(at(1000, 1000))], [0; 3]);
        assert_eq!(Rate::default().estimate(at(100, 0), SECOND * 10).bytes_per_second, 10);
        assert_eq!(seconds(at(11, u64::MAX)), u32::MAX, "it does not overflow");
    }

    #[test]
    fn source_is_counted_when_a_store_takes_its_time() {
        let folder = tempfile::tempdir().unwrap();
        crate::platform::files::write(&folder.path().join("file"), b"12345", 0o600).unwrap();
        let counters = Arc::new(Counters::default());
        let files = Files { paths: vec![folder.path().to_owned()], ..Files::default() };
        let mut watch = Watch::new(Arc::clone(&counters), Some(files));
        assert_eq!(watch.look(SECOND).bytes_total, 0);
        counters.bytes_done.store(7, Ordering::Relaxed);
        let mut known = Progress::default();
        // The other thread needs its time, which is no part of the rate.
        while known.files_total == 0 {
            known = watch.look(COUNT_AFTER);
            std::thread::yield_now();
        }
        assert_eq!((known.bytes_total, known.files_total), (7, 1), "one that has grown since counts as it is");
    }
}
