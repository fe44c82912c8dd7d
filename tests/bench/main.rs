//! Benchmarks of the project, one verb each: `scripts/bench VERB [--json FILE]` builds and runs this.
//!
//! Every verb measures the real programs, ours and the peer's in turns on one machine in one run, and
//! gives medians with their spread: as a table for people, and as JSON for whoever compares over time.
//!
//! `freeze` drives the agent's library, which starts its processes through `/proc/self/exe`: this program is
//! then the agent for as long as it is called so.

mod archive;
mod freeze;
mod idle;
mod measure;
mod output;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hestner_agent::platform::command::OWN_NAME;

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
    /// How long a service is held for each kind of point, ours and by hand in turns; needs root
    Freeze {
        /// How often each kind is measured
        #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(5..=10_000))]
        rounds: u32,
        /// Only kinds whose name holds this, such as `ext4`
        #[arg(long, default_value = "", hide_default_value = true)]
        only: String,
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

fn main() -> anyhow::Result<ExitCode> {
    if std::env::args_os().next().is_some_and(|name| name == OWN_NAME) {
        // A line for each window would bury the figures; what goes wrong comes back as an error.
        nix::unistd::dup2_stderr(std::fs::File::options().write(true).open("/dev/null")?)?;
        return Ok(hestner_agent::cli::main());
    }
    let cli = Cli::parse();
    let bench = match cli.verb {
        Verb::Archive { dir, rounds } => archive::run(&dir, rounds)?,
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
