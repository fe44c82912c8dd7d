//! Benchmarks of the project, one verb each: `scripts/bench VERB [--json FILE]` builds and runs this.
//!
//! Every verb measures the real programs, ours and the peer's in turns on one machine in one run, and
//! gives medians with their spread: as a table for people, and as JSON for whoever compares over time.
//!
//! `freeze` drives the agent's library, which starts its processes through `/proc/self/exe`: this program is
//! then the agent for as long as it is called so.

mod archive;
mod disk;
mod freeze;
mod generate;
mod growth;
mod idle;
mod measure;
mod output;
mod page;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand, ValueEnum as _};
use hestner_agent::platform::command::OWN_NAME;

use archive::trees::Tree;
use output::Bench;

#[derive(Parser)]
#[command(
    about = "Benchmarks of Hestner",
    after_help = "Examples:\n  scripts/bench archive --tree small --rounds 1\n  scripts/bench archive /usr/share/doc \
                  --json archive.json\n  scripts/bench growth --files 10000,100000"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Also writes the figures to this file.
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Verb {
    /// First, unchanged and 1 %-changed backup and restore; Hestner, stock restic and borg in turns; needs root
    Archive {
        /// A tree of your own instead of the built-in ones; it is copied first and never changed
        #[arg(conflicts_with = "tree")]
        dir: Option<PathBuf>,
        /// Which of the built-in trees; all unless you say
        #[arg(long, value_enum, value_delimiter = ',')]
        tree: Vec<BuiltIn>,
        /// How often each case is measured
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
        rounds: u32,
        /// Also writes the table into docs/archive.md
        #[arg(long)]
        docs: bool,
    },
    /// How long a service is held for each kind of point, ours and by hand in turns; needs root
    Freeze {
        /// How often each kind is measured
        #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(5..=10_000))]
        rounds: u32,
        /// Only kinds whose name holds this, such as `ext4`
        #[arg(long, default_value = "", hide_default_value = true)]
        only: String,
    },
    /// First and unchanged backup and restore as the number of files grows; needs root
    Growth {
        /// Numbers of files
        #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000, 1_000_000, 2_000_000])]
        files: Vec<u64>,
        /// Measures stock restic and borg beside Hestner
        #[arg(long)]
        peers: bool,
        /// Also writes table and plot into docs/archive.md and docs/archive-growth.svg
        #[arg(long)]
        docs: bool,
    },
    /// Restores many files, and fails when that takes more memory than it may; needs root
    RestoreMillion {
        /// How many
        #[arg(long, default_value_t = 1_000_000)]
        files: u64,
        /// Peak of the restoring process in megabytes
        #[arg(long, default_value_t = 200)]
        rss_max_mb: u64,
    },
    /// The runner that `freeze` kills
    #[command(hide = true)]
    HoldFrozen { config: PathBuf, journal: PathBuf, mount: PathBuf },
    /// Memory, CPU and size of an agent that is connected and has nothing to do
    Idle {
        /// How long CPU is counted
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(10..=3600))]
        seconds: u32,
    },
}

/// The trees that are always the same, or as near to it as the machine allows.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum BuiltIn {
    /// About 45,000 files of /usr, 1.7 GB
    Real,
    /// 150,000 text files of 0.2 to 6 kB
    Small,
    /// One file of 4 GB, in pages as a database has them
    Database,
    /// 2 GB that do not compress, in 20 files
    Random,
}

impl BuiltIn {
    fn tree(self) -> Tree {
        match self {
            Self::Real => Tree::Real,
            Self::Small => Tree::Small,
            Self::Database => Tree::Database,
            Self::Random => Tree::Random,
        }
    }
}

fn archive(dir: Option<PathBuf>, tree: &[BuiltIn], rounds: u32, docs: bool) -> anyhow::Result<Bench> {
    let trees: Vec<Tree> = match (dir, tree) {
        (Some(dir), _) => {
            vec![Tree::Copy(dir.canonicalize().with_context(|| format!("{} cannot be opened", dir.display()))?)]
        }
        (None, []) => BuiltIn::value_variants().iter().map(|tree| tree.tree()).collect(),
        (None, some) => some.iter().map(|tree| tree.tree()).collect(),
    };
    let bench = archive::run(&trees, rounds)?;
    if docs {
        page::put(&page::folder(), "archive", &output::markdown(&bench))?;
    }
    Ok(bench)
}

fn growth(files: &[u64], peers: bool, docs: bool) -> anyhow::Result<Bench> {
    let bench = growth::run(files, peers)?;
    if docs {
        growth::document(&bench, &page::folder())?;
    }
    Ok(bench)
}

fn main() -> anyhow::Result<ExitCode> {
    if std::env::args_os().next().is_some_and(|name| name == OWN_NAME) {
        // A line for each window would bury the figures; what goes wrong comes back as an error.
        nix::unistd::dup2_stderr(std::fs::File::options().write(true).open("/dev/null")?)?;
        return Ok(hestner_agent::cli::main());
    }
    let cli = Cli::parse();
    let bench = match cli.verb {
        Verb::Archive { dir, tree, rounds, docs } => archive(dir, &tree, rounds, docs)?,
        Verb::Growth { files, peers, docs } => growth(&files, peers, docs)?,
        Verb::RestoreMillion { files, rss_max_mb } => growth::restore_bounded(files, rss_max_mb)?,
        Verb::Freeze { rounds, only } => freeze::run(rounds, &only)?,
        Verb::HoldFrozen { config, journal, mount } => {
            return freeze::hold_frozen(config, journal, &mount).map(|()| ExitCode::SUCCESS);
        }
        Verb::Idle { seconds } => idle::run(seconds),
    };
    print!("{}", output::table(&bench));
    if let Some(path) = cli.json {
        hestner_tests::files::write(&path, serde_json::to_string_pretty(&output::json(&bench))? + "\n");
        println!("\nwritten to {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}
