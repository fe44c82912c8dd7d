//! Benchmarks of the project, one verb each: `scripts/bench VERB [--json FILE]` builds and runs this.
//!
//! Every verb measures the real programs, ours and the peer's in turns on one machine in one run, and
//! gives medians with their spread: as a table for people, and as JSON for whoever compares over time.

mod archive;
mod idle;
mod measure;
mod output;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    about = "Benchmarks of Hestner",
    after_help = "Example: scripts/bench archive /usr/share/doc --json archive.json"
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
    /// First, unchanged and 1 %-changed backup of a tree, Hestner and stock restic in turns
    Archive {
        /// The tree; it is copied first and never changed
        dir: PathBuf,
        /// How often each case is measured
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(5..=50))]
        rounds: u32,
    },
    /// Memory, CPU and size of an agent that is connected and has nothing to do
    Idle {
        /// How long CPU is counted
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(10..=3600))]
        seconds: u32,
    },
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let bench = match &cli.verb {
        Verb::Archive { dir, rounds } => archive::run(dir, *rounds)?,
        Verb::Idle { seconds } => idle::run(*seconds),
    };
    print!("{}", output::table(&bench));
    if let Some(path) = cli.json {
        hestner_tests::files::write(&path, serde_json::to_string_pretty(&output::json(&bench))? + "\n");
        println!("\nwritten to {}", path.display());
    }
    Ok(())
}
