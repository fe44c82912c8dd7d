//! `archive DIR`: the same tree backed up by Hestner and by stock restic, in turns.
//!
//! Hestner goes its real way: `hestner-agent snapshot` against a connected daemon, through runner and
//! worker, with the commit gate, the repository's check of what was stored, and reports to a receiver.
//! restic does `init` and `backup` into a repository of its own and nothing more, so Hestner's figures
//! hold what its promises cost. Cases: `first` (fresh repository), `unchanged`, `changed 1%`.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use hestner_tests::restic::STOCK;
use hestner_tests::{Agent, Cmd, Service, World, files};

use crate::measure::{Cost, cost};
use crate::output::{Bench, Figure, Row};

const CASES: [&str; 3] = ["first", "unchanged", "changed 1%"];

/// A metric: its name, its unit and where it stands in a cost.
type Metric = (&'static str, &'static str, fn(&Cost) -> f64);

const METRICS: [Metric; 4] = [
    ("wall", "s", |c| c.wall_seconds),
    ("cpu", "s", |c| c.cpu_seconds),
    ("rss biggest process", "MiB", |c| c.biggest_mib),
    ("rss sum", "MiB", |c| c.sum_mib),
];

/// Costs by case and program.
type Costs = BTreeMap<(usize, &'static str), Vec<Cost>>;

/// Measures it.
pub(crate) fn run(dir: &Path, rounds: u32) -> anyhow::Result<Bench> {
    let dir = dir.canonicalize().with_context(|| format!("{} cannot be opened", dir.display()))?;
    let world = World::unhurried("bench-archive");
    let tree = world.at("tree");
    eprintln!("copying {} ...", dir.display());
    Cmd::new("cp").arg("-a").arg(&dir).arg(&tree).within(Duration::from_secs(3600)).ok();
    let names = regular_files(&tree)?;
    if names.is_empty() {
        bail!("{} holds no files", dir.display());
    }
    let agent = agent_with_a_destination_a_round(&world, &tree, rounds);
    let mut costs = Costs::new();
    for round in 1..=rounds {
        let restic = Peer::new(&world, round);
        for (case, name) in CASES.iter().enumerate() {
            if case == 2 {
                change_one_in_a_hundred(&names, round);
            }
            // Read once, so that neither finds the other's warm cache.
            Cmd::new("tar").arg("-cf").arg("/dev/null").arg(&tree).within(Duration::from_secs(3600)).run();
            let mut turns = ["hestner", "restic"];
            if round % 2 == 0 {
                turns.reverse();
            }
            for program in turns {
                let spent = match program {
                    "hestner" => cost(agent.command(&["snapshot", &service(round)]), Some(agent.pid())),
                    _ => cost(restic.command(case == 0, &tree), None),
                };
                eprintln!("round {round}/{rounds} {name:<10} {program:<8} {:.2} s", spent.wall_seconds);
                costs.entry((case, program)).or_default().push(spent);
            }
        }
    }
    let size = Cmd::new("du").args(["-sb"]).arg(&tree).ok();
    let megabytes = size.split_whitespace().next().and_then(|b| b.parse::<u64>().ok()).unwrap_or(0) / 1_000_000;
    let remark = format!(
        "archive of {} ({} files, {megabytes} MB), {rounds} rounds in turns; Hestner with commit gate and read-back, restic bare",
        dir.display(),
        names.len()
    );
    Ok(Bench { name: "archive", remark, rows: rows(&costs) })
}

fn rows(costs: &Costs) -> Vec<Row> {
    let version = Cmd::new(STOCK).arg("version").ok();
    let peer = version.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    let mut rows = Vec::new();
    for (case, name) in CASES.iter().enumerate() {
        for (metric, unit, of) in METRICS {
            let figure = |program| Figure::of(costs[&(case, program)].iter().map(of).collect());
            let peer = Some((peer.clone(), figure("restic")));
            rows.push(Row { case: (*name).to_owned(), metric, unit, hestner: figure("hestner"), peer });
        }
    }
    rows
}

fn service(round: u32) -> String {
    format!("tree{round}")
}

/// A fresh repository a round is a destination of its own a round: the agent never loses one.
fn agent_with_a_destination_a_round(world: &World, tree: &Path, rounds: u32) -> Agent {
    let mut builder = world.agent();
    for round in 1..=rounds {
        let destination = format!("disk{round}");
        builder = builder.destination(&destination, &world.at(&format!("hestner/{destination}")));
        builder = builder.allowed(Service::files(&service(round), [tree]).destination(&destination));
    }
    builder.started()
}

/// Stock restic with a repository and a cache of its own for one round.
struct Peer {
    program: PathBuf,
}

impl Peer {
    fn new(world: &World, round: u32) -> Self {
        let at = |name: &str| world.at(&format!("restic/{round}/{name}"));
        let password = files::write(at("password"), "bench");
        let common = format!(
            "{STOCK} -r {} --password-file {} --cache-dir {} --quiet",
            at("repository").display(),
            password.display(),
            at("cache").display()
        );
        let body = format!("set -e\n[ \"$1\" = first ] && {common} init\nexec {common} backup \"$2\"");
        Self { program: files::write_script(at("backup"), &body) }
    }

    fn command(&self, first: bool, tree: &Path) -> Cmd {
        Cmd::new(&self.program).arg(if first { "first" } else { "again" }).arg(tree)
    }
}

fn regular_files(tree: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut todo = vec![tree.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Rewrites another hundredth of the files each round: same size class, other content.
fn change_one_in_a_hundred(names: &[PathBuf], round: u32) {
    for name in names.iter().skip(round as usize % 100).step_by(100) {
        let mode = std::fs::metadata(name).expect("a file").permissions().mode();
        let size = std::fs::metadata(name).expect("a file").len();
        files::write(name, files::random_bytes(usize::try_from(size).expect("a size").max(16)));
        files::set_mode(name, mode & 0o7777);
    }
}
