//! Measures a command and everything below it: wall time, CPU of all processes, memory while it runs.
//!
//! Memory is sampled every 40 ms from `/proc`, the same way for ours and for the peer: the peak of the
//! biggest single process (its own high-water mark) and the peak of the sum of all at one moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hestner_tests::clock::{let_pass, now};
use hestner_tests::{Cmd, processes};
use nix::sys::resource::{UsageWho, getrusage};

/// What one command cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) wall_seconds: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) biggest_mib: f64,
    pub(crate) sum_mib: f64,
}

const SAMPLE_EVERY: Duration = Duration::from_millis(40);

/// Runs `command`, which must succeed. `daemon` does work on its behalf and is counted with all below it.
pub(crate) fn cost(command: Cmd, daemon: Option<i32>) -> Cost {
    let cpu_before = own_children_seconds() + daemon.map_or(0.0, daemon_seconds);
    let started = now();
    let command = command.within(Duration::from_secs(3600)).start();
    let sampler = Sampler::start(std::iter::once(command.pid()).chain(daemon).collect());
    let ended = command.ended();
    let wall_seconds = started.elapsed().as_secs_f64();
    let (biggest, sum) = sampler.stop();
    assert_eq!(ended.code, Some(0), "{ended}");
    let cpu_after = own_children_seconds() + daemon.map_or(0.0, daemon_seconds);
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    Cost { wall_seconds, cpu_seconds: cpu_after - cpu_before, biggest_mib: mib(biggest), sum_mib: mib(sum) }
}

/// CPU of the children that this process has waited for.
fn own_children_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("our own usage");
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// CPU of a daemon and of the children that it has waited for, which hold those of their own children.
fn daemon_seconds(pid: i32) -> f64 {
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    processes::cpu_ticks(pid).expect("a running daemon") as f64 / per_second as f64
}

struct Sampler {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(u64, u64)>,
}

impl Sampler {
    fn start(roots: Vec<i32>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut biggest, mut sum) = (0, 0);
            while !seen.load(Ordering::Relaxed) {
                let below = roots.iter().flat_map(|root| processes::descendant_pids(*root));
                let pids = roots.iter().copied().chain(below);
                let memory: Vec<(u64, u64)> = pids.filter_map(memory).collect();
                biggest = memory.iter().map(|(peak, _)| *peak).max().unwrap_or(0).max(biggest);
                sum = memory.iter().map(|(_, now)| now).sum::<u64>().max(sum);
                let_pass(SAMPLE_EVERY);
            }
            (biggest, sum)
        });
        Self { stop, thread }
    }

    fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the sampler")
    }
}

/// High-water mark and present resident memory.
fn memory(pid: i32) -> Option<(u64, u64)> {
    Some((processes::kilobytes(pid, "status", "VmHWM")?, processes::kilobytes(pid, "status", "VmRSS")?))
}
