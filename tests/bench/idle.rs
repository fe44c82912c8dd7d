//! `idle`: an agent that is connected, beats, and has nothing to do.
//!
//! Settings are the product's defaults, systemd inventory included. CPU is counted from the scheduler's
//! own nanoseconds of all threads, so that a tick of 10 ms does not hide what is being looked for.

use std::time::Duration;

use hestner_tests::clock::{let_pass, now};
use hestner_tests::{Cmd, Service, World, processes, world};

use crate::output::{Bench, Figure, Row};

/// Start-up, enrolment's last allocations and the first inventory lie before the measurement.
const SETTLE: Duration = Duration::from_secs(20);

/// Measures it.
pub(crate) fn run(seconds: u32) -> Bench {
    let world = World::unhurried("bench-idle");
    let source = world.source("source");
    let agent =
        world.agent().allowed(Service::files("docs", [&source])).setting("inventory", "systemd = true").started();
    let pid = agent.pid();
    eprintln!("settling for {} s, then counting for {seconds} s ...", SETTLE.as_secs());
    let_pass(SETTLE);
    let (before, started) = (run_nanoseconds(pid), now());
    let_pass(Duration::from_secs(u64::from(seconds)));
    let share = (run_nanoseconds(pid) - before) as f64 / started.elapsed().as_nanos() as f64;
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    let memory = |file: &str, name: &str| mib(processes::kilobytes(pid, file, name).unwrap_or(0));
    let size = |name: &str| mib(std::fs::metadata(world::bin(name)).map_or(0, |meta| meta.len()));
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map(Iterator::count).unwrap_or(0);
    let row = |metric, unit, value| Row {
        case: "idle".to_owned(),
        metric,
        unit,
        hestner: Figure::of(vec![value]),
        peers: Vec::new(),
    };
    let rows = vec![
        row("rss", "MiB", memory("status", "VmRSS")),
        row("rss anonymous", "MiB", memory("status", "RssAnon")),
        row("pss", "MiB", memory("smaps_rollup", "Pss")),
        row("rss peak", "MiB", memory("status", "VmHWM")),
        row("cpu", "% of a core", share * 100.0),
        row("threads", "threads", threads as f64),
        row("agent binary", "MiB", size("hestner-agent")),
        row("receiver binary", "MiB", size("hestner-receiver")),
    ];
    let version = Cmd::new(world::bin("hestner-agent")).arg("--version").run().stdout;
    Bench { name: "idle", remark: format!("idle, connected, {} s: {}", seconds, version.trim()), rows }
}

/// Time that all threads of a process have run.
fn run_nanoseconds(pid: i32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a running agent");
    let times = tasks.flatten().filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    times.sum()
}
