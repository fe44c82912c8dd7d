//! Writes what the packages hold beside the programs: man pages and shell completions.
//!
//! Both are made from the programs' own command lines, so that they cannot tell of an option that is not there.
//! In: a folder. Out: `man/`, `bash/`, `zsh/` and `fish/` in it, as `packaging/build` puts them into the packages. Commands
//! that are hidden from people stay hidden here. It never installs anything.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{Arg, Command};
use clap_complete::{Shell, generate};
use clap_mangen::Man;
use hestner_agent::platform::files;

/// Section of the manual.
const SECTION: &str = "1";
const MODE: u32 = 0o644;

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [folder] = arguments.as_slice() else {
        eprintln!("usage: hestner-packaging OUT_DIR");
        return ExitCode::from(64);
    };
    match write(folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hestner-packaging: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(folder: &Path) -> anyhow::Result<()> {
    let folder = std::path::absolute(folder)?;
    for command in [hestner_agent::cli::command(), hestner_receiver::cli::command()] {
        let command = without_hidden(&command);
        write_manual(&folder, &command)?;
        write_completions(&folder, &command)?;
    }
    Ok(())
}

/// The command line as people see it. clap completes hidden commands as well, and a command cannot be taken
/// out of another, so it is put together anew.
fn without_hidden(command: &Command) -> Command {
    let mut seen = Command::new(leaked(command.get_name()));
    if let Some(version) = command.get_version() {
        seen = seen.version(leaked(version));
    }
    if let Some(about) = command.get_about() {
        seen = seen.about(about.clone());
    }
    if let Some(about) = command.get_long_about() {
        seen = seen.long_about(about.clone());
    }
    if let Some(after) = command.get_after_help() {
        seen = seen.after_help(after.clone());
    }
    seen = seen.subcommand_required(command.is_subcommand_required_set());
    seen = seen.args(command.get_arguments().filter(|a| !a.is_hide_set() && !is_of_clap(a)).cloned());
    seen.subcommands(command.get_subcommands().filter(|s| !s.is_hide_set()).map(without_hidden))
}

/// clap keeps names for as long as the program runs, and so does this, which runs for a moment.
fn leaked(text: &str) -> &'static str {
    text.to_owned().leak()
}

/// clap adds these again by itself.
fn is_of_clap(argument: &Arg) -> bool {
    ["help", "version"].contains(&argument.get_id().as_str())
}

/// One page for the program, and one for each command: `man hestner-agent-enroll`.
fn write_manual(folder: &Path, command: &Command) -> anyhow::Result<()> {
    let mut command = command.clone().disable_help_subcommand(true);
    command.build();
    write_page(folder, command.get_name().to_owned(), &command)
}

fn write_page(folder: &Path, name: String, command: &Command) -> anyhow::Result<()> {
    for part in command.get_subcommands() {
        write_page(folder, format!("{name}-{}", part.get_name()), part)?;
    }
    let mut page = Vec::new();
    // `date` left empty: the page of one version is the same whenever it is made.
    let man =
        Man::new(command.clone().name(leaked(&name))).section(SECTION).manual("Hestner").title(name.to_uppercase());
    man.render(&mut page)?;
    put(&folder.join("man").join(format!("{name}.{SECTION}")), &page)
}

fn write_completions(folder: &Path, command: &Command) -> anyhow::Result<()> {
    let program = command.get_name().to_owned();
    let places = [
        (Shell::Bash, format!("bash/{program}")),
        (Shell::Zsh, format!("zsh/_{program}")),
        (Shell::Fish, format!("fish/{program}.fish")),
    ];
    for (shell, place) in places {
        let mut text = Vec::new();
        generate(shell, &mut command.clone(), &program, &mut text);
        put(&folder.join(place), &text)?;
    }
    Ok(())
}

fn put(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let Some(parent) = path.parent() else { bail!("{} has no folder", path.display()) };
    std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    Ok(files::write(path, bytes, MODE)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        folder
    }

    fn text(folder: &tempfile::TempDir, name: &str) -> String {
        std::fs::read_to_string(folder.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    #[test]
    fn every_command_that_people_see_has_a_page() {
        let folder = written();
        for program in [hestner_agent::cli::command(), hestner_receiver::cli::command()] {
            let name = program.get_name();
            assert!(text(&folder, &format!("man/{name}.1")).contains(".SH SYNOPSIS"));
            for part in program.get_subcommands() {
                let page = folder.path().join(format!("man/{name}-{}.1", part.get_name()));
                assert_eq!(page.exists(), !part.is_hide_set(), "{}", page.display());
            }
        }
        assert!(text(&folder, "man/hestner-agent-grants-allow.1").contains("Example:"));
    }

    #[test]
    fn shells_complete_commands_but_not_hidden_ones() {
        let folder = written();
        for place in ["bash/hestner-agent", "zsh/_hestner-agent", "fish/hestner-agent.fish"] {
            let completions = text(&folder, place);
            assert!(completions.contains("enroll") && completions.contains("grants"), "{place}");
            for hidden in ["freezer", "worker"] {
                assert!(!completions.contains(hidden), "{place} offers `{hidden}`");
            }
        }
        assert!(text(&folder, "bash/hestner-receiver").contains("company"));
    }
}
