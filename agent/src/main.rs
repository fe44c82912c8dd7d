//! `hestner-agent`: parse, run, exit code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    hestner_agent::cli::main()
}
