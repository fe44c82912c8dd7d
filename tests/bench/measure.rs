//! Measures a command and everything below it: wall time, CPU of all processes, memory while it runs.
//!
//! Memory is sampled, the same way for ours and for the peers.

use std::time::Duration;

use hestner_tests::clock::now;
use hestner_tests::memory::Sampler;
use hestner_tests::{Cmd, processes, wait_until};
use nix::sys::resource::{UsageWho, getrusage};

/// What one command cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) wall_seconds: f64,
    pub(crate) cpu_seconds: f64,
    pub(crate) biggest_mib: f64,
    pub(crate) sum_mib: f64,
}

/// How long a daemon may take to bury what it started, once the command that asked for it has ended.
const BURIED_WITHIN: Duration = Duration::from_secs(20);
/// No case takes longer.
pub(crate) const LONGEST: Duration = Duration::from_secs(6 * 3600);

/// Runs `command`, which must succeed. `daemon` does work on its behalf and is counted with all below it.
pub(crate) fn cost(command: Cmd, daemon: Option<i32>) -> Cost {
    let cpu_before = own_children_seconds() + daemon.map_or(0.0, daemon_seconds);
    let started = now();
    let command = command.within(LONGEST).start();
    let sampler = Sampler::start(std::iter::once(command.pid()).chain(daemon).collect());
    let ended = command.ended();
    let wall_seconds = started.elapsed().as_secs_f64();
    let peaks = sampler.stop();
    assert_eq!(ended.code, Some(0), "{ended}");
    if let Some(daemon) = daemon {
        // Only then is what they used counted.
        let is_alone = || processes::descendant_pids(daemon).is_empty();
        wait_until("the daemon to be alone again", BURIED_WITHIN, is_alone);
    }
    let cpu_after = own_children_seconds() + daemon.map_or(0.0, daemon_seconds);
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    Cost { wall_seconds, cpu_seconds: cpu_after - cpu_before, biggest_mib: mib(peaks.biggest), sum_mib: mib(peaks.sum) }
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
