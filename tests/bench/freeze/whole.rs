//! Whole runs of the real programs: what a service feels between its last `pre_freeze` and its first
//! `post_thaw`, with ledger, reports, supervisors and everything.

use std::path::Path;

use hestner_tests::mounts::Mounted;
use hestner_tests::{Hook, Service, World, files};

use super::by_hand::Stamps;
use super::{RUNS_MAX, milliseconds};
use crate::output::{Figure, Row};

/// Runs of a service without a point, of one on btrfs, and of one that is frozen.
pub(super) fn run(rounds: u32) -> anyhow::Result<Vec<Row>> {
    let world = World::unhurried("bench-freeze-run");
    let stamps = Stamps::new(&world.at("stamps"));
    let (snapshotted, frozen) = (Mounted::btrfs(&world.at("btrfs")), Mounted::of_kind("ext4", &world.at("ext4")));
    let tree = |folder: &Path| files::small_tree(folder, 20, 2_000);
    // What a command of a SAN would have made; here it is there already.
    let copy = tree(&world.at("copy"));
    let read_from = format!("read_from = \"{}\"", copy.display());
    let services = [
        ("none", Service::files("none", [tree(&world.at("source"))])),
        ("btrfs", Service::files("btrfs", [tree(snapshotted.path())])),
        (
            "fsfreeze ext4",
            Service::files("fsfreeze", [tree(frozen.path())])
                .point_line("kind = \"fsfreeze\"")
                .point_program("command", &["/bin/true"])
                .point_line(&read_from),
        ),
    ];
    let (pre, post) = (stamps.argv("pre"), stamps.argv("post"));
    let hook = || Hook::new("stamps").pre(&words(&pre)).post(&words(&post));
    let agent = services
        .iter()
        .fold(world.agent(), |agent, (_, service)| agent.allowed(service.clone().hook(hook())))
        .started();
    let mut rows = Vec::new();
    for (kind, service) in &services {
        let mut between = Vec::new();
        for _ in 0..rounds.min(RUNS_MAX) {
            agent.snapshot_ok(&service.name);
            between.push(milliseconds(stamps.between()?));
        }
        eprintln!("whole run, {kind}: done");
        let case = format!("whole run, {kind}");
        rows.push(Row { case, metric: "between hooks", unit: "ms", hestner: Figure::of(between), peers: Vec::new() });
    }
    Ok(rows)
}

fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}
