//! `archive`: the same trees backed up and restored by Hestner, stock restic and borg, in turns.
//!
//! Hestner goes its real way: `hestner-agent snapshot` against a connected daemon, through runner and worker, with
//! the commit gate, every stored byte read back from the disk, and reports to a receiver; so its figures hold what
//! its promises cost. The others make their repository, back up and restore, and nothing more. Cases: `first` (fresh
//! repository), `unchanged`, `changed 1%`, `restore` (to an empty filesystem; what came back is compared by number,
//! sizes, times and modes).

pub(crate) mod programs;
pub(crate) mod trees;
pub(crate) mod turns;

use anyhow::Context as _;
use hestner_tests::World;

use crate::disk;
use crate::output::{Bench, Row};
use programs::{Hestner, Peer, Program};
use trees::Tree;
use turns::{Case, Measured, Round};

/// Measures the trees one after the other.
pub(crate) fn run(trees: &[Tree], rounds: u32) -> anyhow::Result<Bench> {
    let mut rows = Vec::new();
    let mut told = Vec::new();
    for tree in trees {
        let (found, remark) = one(tree, rounds)?;
        rows.extend(found);
        told.push(remark);
    }
    let remark = format!(
        "{}. {rounds} rounds in turns, medians; ratio is ours to the best peer's. Hestner with commit gate and read-back, \
         restic --compression auto (repository version 2), borg zstd,3 and repokey-blake2, both bare; page cache warm for \
         all ({})",
        told.join("; "),
        programs::versions()
    );
    Ok(Bench { name: "archive", remark, rows })
}

fn one(tree: &Tree, rounds: u32) -> anyhow::Result<(Vec<Row>, String)> {
    let world = World::unhurried(&format!("bench-archive-{}", tree.name()));
    // The tree, three repositories that may hardly be smaller, what is restored.
    disk::need_room(world.path(), &format!("the tree `{}`", tree.name()), tree.bytes()? * 5)?;
    let at = world.at("source/tree");
    eprintln!("making the tree `{}` ...", tree.name());
    tree.make(&at).with_context(|| format!("the tree `{}` cannot be made", tree.name()))?;
    let holds = disk::holds(&at)?;
    let agent = programs::agent(&world, &at, rounds);
    let mut measured = Measured::default();
    for number in 1..=rounds {
        let mut programs: Vec<Box<dyn Program + '_>> = vec![
            Box::new(Hestner::new(&agent, number)),
            Box::new(Peer::restic(&world, number)),
            Box::new(Peer::borg(&world, number)),
        ];
        let round = Round { tree: &at, restored: world.at("restored"), number, cases: &Case::ALL };
        round.run(&mut programs, || tree.change(&at, number), &mut measured)?;
    }
    let remark = format!("{} ({} files, {} MB)", tree.told(), holds.files, holds.bytes / 1_000_000);
    Ok((measured.rows(tree.name()), remark))
}
