//! `growth`: what a first and an unchanged backup and a restore cost as the number of files grows; and
//! `restore-million`: a restore whose memory has a bound.
//!
//! Small text files of 0.1 to 1.5 kB, so that what a file costs is seen and not what its bytes do. Hestner alone,
//! or beside stock restic and borg.

mod plot;

use std::path::Path;

use anyhow::ensure;
use hestner_tests::World;

use crate::archive::programs::{self, Hestner, Peer, Program};
use crate::archive::turns::{Case, Measured, Round};
use crate::disk::{self, Fresh};
use crate::generate;
use crate::output::{Bench, Figure, Row, markdown};
use crate::page;

const SIZES: std::ops::Range<u64> = 100..1_500;
/// Blocks and inodes of the files and of their copy that comes back, and the repository.
const BYTES_A_FILE: u64 = 2 * (4096 + 300) + 700;
const CASES: [Case; 3] = [Case::First, Case::Unchanged, Case::Restore];

/// Measures every size once.
pub(crate) fn run(files: &[u64], with_peers: bool) -> anyhow::Result<Bench> {
    let mut rows = Vec::new();
    for &count in files {
        let measured = one(count, with_peers, &CASES)?;
        rows.extend(measured.rows(&grouped(count)));
    }
    let versions = if with_peers { format!(" ({})", programs::versions()) } else { String::new() };
    let remark = format!("Text files of {} to {} bytes, one round, page cache warm{versions}", SIZES.start, SIZES.end);
    Ok(Bench { name: "growth", remark, rows })
}

/// Measures a restore, and fails when it took more memory than it may.
pub(crate) fn restore_bounded(files: u64, rss_max_mb: u64) -> anyhow::Result<Bench> {
    let measured = one(files, false, &[Case::First, Case::Restore])?;
    let spent = measured.ours(Case::Restore).map_or(f64::INFINITY, |spent| spent.cost.biggest_mib * 1.048_576);
    let bound = rss_max_mb as f64;
    eprintln!("the restore of {files} files took {spent:.0} MB at most; allowed are {bound:.0} MB");
    ensure!(spent <= bound, "the restore of {files} files took {spent:.0} MB, more than {bound:.0} MB");
    let row = Row {
        case: format!("{} restore", grouped(files)),
        metric: "rss allowed",
        unit: "MB",
        hestner: Figure::of(vec![bound]),
        peers: Vec::new(),
    };
    let mut rows = measured.rows(&grouped(files));
    rows.push(row);
    Ok(Bench { name: "restore-million", remark: format!("restore of {files} files"), rows })
}

fn one(files: u64, with_peers: bool, cases: &[Case]) -> anyhow::Result<Measured> {
    let world = World::unhurried(&format!("bench-growth-{files}"));
    disk::need_room(world.path(), &format!("{files} files"), files * BYTES_A_FILE)?;
    let source = Fresh::new(&world.at("source"), files, files * SIZES.end)?;
    let tree = source.tree();
    eprintln!("making {files} files ...");
    generate::small_files(&tree, files, SIZES)?;
    let agent = programs::agent(&world, &tree, 1);
    let mut measured = Measured::default();
    let mut programs: Vec<Box<dyn Program + '_>> = vec![Box::new(Hestner::new(&agent, 1))];
    if with_peers {
        programs.push(Box::new(Peer::restic(&world, 1)));
        programs.push(Box::new(Peer::borg(&world, 1)));
    }
    let round = Round { tree: &tree, restored: world.at("restored"), number: 1, cases };
    round.run(&mut programs, || Ok(()), &mut measured)?;
    Ok(measured)
}

/// Writes table and plot into the documentation.
pub(crate) fn document(bench: &Bench, folder: &Path) -> anyhow::Result<()> {
    hestner_tests::files::write(folder.join("archive-growth.svg"), plot::svg(bench));
    page::put(folder, "growth", &markdown(bench))
}

/// `1 000 000`.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or_default()).collect();
    groups.join(" ")
}
