//! One round: all programs do the same cases in turns, each from a page cache that is warm and a disk at rest.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;

use super::programs::Program;
use crate::disk::{self, Fresh};
use crate::measure::Cost;
use crate::output::{Figure, Row};

/// A case that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Case {
    /// Into a repository that is made for it.
    First,
    /// Again, and nothing has changed.
    Unchanged,
    /// Again, and one hundredth has.
    Changed,
    /// The newest backup to an empty filesystem.
    Restore,
}

impl Case {
    pub(crate) const ALL: [Self; 4] = [Self::First, Self::Unchanged, Self::Changed, Self::Restore];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Unchanged => "unchanged",
            Self::Changed => "changed 1%",
            Self::Restore => "restore",
        }
    }
}

/// What one case cost one program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    pub(crate) cost: Cost,
    /// Bytes that its repository grew by.
    pub(crate) stored: u64,
}

/// What was measured so far, by case and program.
#[derive(Debug, Default)]
pub(crate) struct Measured(BTreeMap<(Case, &'static str), Vec<Spent>>);

/// A metric: its name, its unit and where it stands.
type Metric = (&'static str, &'static str, fn(&Spent) -> f64);

const METRICS: [Metric; 5] = [
    ("wall", "s", |s| s.cost.wall_seconds),
    ("cpu", "s", |s| s.cost.cpu_seconds),
    ("rss biggest process", "MiB", |s| s.cost.biggest_mib),
    ("rss sum", "MiB", |s| s.cost.sum_mib),
    ("stored", "MB", |s| s.stored as f64 / 1e6),
];

impl Measured {
    /// One row a case and metric; the first program is ours.
    pub(crate) fn rows(&self, of: &str) -> Vec<Row> {
        let mut rows = Vec::new();
        for case in Case::ALL {
            for (metric, unit, value) in METRICS {
                if case == Case::Restore && metric == "stored" {
                    continue;
                }
                let figures = |ours: bool| {
                    let chosen = self.0.iter().filter(move |((c, name), _)| *c == case && (*name == "hestner") == ours);
                    chosen.map(|((_, name), spent)| ((*name).to_owned(), Figure::of(spent.iter().map(value).collect())))
                };
                let Some((_, hestner)) = figures(true).next() else { continue };
                let case = format!("{of} {}", case.name());
                rows.push(Row { case, metric, unit, hestner, peers: figures(false).collect() });
            }
        }
        rows
    }

    /// What the first round of a case cost ours.
    pub(crate) fn ours(&self, case: Case) -> Option<Spent> {
        self.0.get(&(case, "hestner"))?.first().copied()
    }
}

/// What a round is about.
pub(crate) struct Round<'r> {
    pub(crate) tree: &'r Path,
    /// Where a filesystem for each restore is mounted.
    pub(crate) restored: PathBuf,
    pub(crate) number: u32,
    pub(crate) cases: &'r [Case],
}

impl Round<'_> {
    /// Runs all cases of a round; `change` changes the tree. The repositories are gone afterwards.
    pub(crate) fn run(
        &self,
        programs: &mut [Box<dyn Program + '_>],
        change: impl Fn() -> anyhow::Result<()>,
        measured: &mut Measured,
    ) -> anyhow::Result<()> {
        for (at, &case) in self.cases.iter().enumerate() {
            if case == Case::Changed {
                change()?;
            }
            let count = programs.len();
            for turn in 0..count {
                // Another one begins each time.
                let program = &mut programs[(turn + at + self.number as usize) % count];
                let spent = self.one(case, program.as_mut())?;
                let Cost { wall_seconds, cpu_seconds, biggest_mib, .. } = spent.cost;
                eprintln!(
                    "round {} {:<10} {:<8} {wall_seconds:8.2} s  cpu {cpu_seconds:8.2} s  rss {biggest_mib:6.0} MiB  +{:.1} MB",
                    self.number,
                    case.name(),
                    program.name(),
                    spent.stored as f64 / 1e6
                );
                measured.0.entry((case, program.name())).or_default().push(spent);
            }
        }
        for program in programs {
            fs::remove_dir_all(program.repository())?;
        }
        Ok(())
    }

    fn one(&self, case: Case, program: &mut dyn Program) -> anyhow::Result<Spent> {
        let before = disk::bytes(&program.repository())?;
        if case == Case::Restore {
            let there = disk::holds(self.tree)?;
            let fresh = Fresh::new(&self.restored, there.files, there.bytes)?;
            fs::create_dir(fresh.tree())?;
            disk::warm(&program.repository())?;
            disk::settle();
            let cost = program.restore(&fresh.tree());
            let back = disk::holds(&hestner_tests::tree::restored(&fresh.tree(), self.tree))?;
            ensure!(there == back, "{} restored {back:?} of {there:?}", program.name());
            return Ok(Spent { cost, stored: 0 });
        }
        disk::warm(self.tree)?;
        disk::settle();
        let cost = program.back_up(self.tree);
        let stored = disk::bytes(&program.repository())?.saturating_sub(before);
        Ok(Spent { cost, stored })
    }
}
