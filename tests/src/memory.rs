//! How much memory processes take while they run: looked at every 20 ms through `/proc`.
//!
//! In: processes, with all below them. Out: the peak of the biggest single one (its own high-water mark), and the
//! peak of the sum of all at one moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::clock::let_pass;
use crate::processes;

const SAMPLE_EVERY: Duration = Duration::from_millis(20);

/// Bytes of resident memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peaks {
    /// Of the biggest process.
    pub biggest: u64,
    /// Of all together.
    pub sum: u64,
}

/// Looks until it is stopped.
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Peaks>,
}

impl Sampler {
    /// Looks at these processes and all below them.
    pub fn start(roots: Vec<i32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut peaks = Peaks::default();
            while !seen.load(Ordering::Relaxed) {
                let below = roots.iter().flat_map(|root| processes::descendant_pids(*root));
                let pids = roots.iter().copied().chain(below);
                let memory: Vec<(u64, u64)> = pids.filter_map(memory).collect();
                peaks.biggest = memory.iter().map(|(peak, _)| *peak).max().unwrap_or(0).max(peaks.biggest);
                peaks.sum = memory.iter().map(|(_, now)| now).sum::<u64>().max(peaks.sum);
                let_pass(SAMPLE_EVERY);
            }
            peaks
        });
        Self { stop, thread }
    }

    /// What it has seen.
    ///
    /// # Panics
    /// When its thread did.
    pub fn stop(self) -> Peaks {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the sampler")
    }
}

/// High-water mark and present resident memory.
fn memory(pid: i32) -> Option<(u64, u64)> {
    Some((processes::kilobytes(pid, "status", "VmHWM")?, processes::kilobytes(pid, "status", "VmRSS")?))
}
