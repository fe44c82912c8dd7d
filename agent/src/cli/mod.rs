//! The command line: what people type, what they see, and the exit code.
//!
//! Exit 0 only on success; 64 for bad usage, bad settings, or an input or a resource that a person has to
//! mend; 1 for everything else. Errors go to standard error with what to do next and a stable code. No
//! secret is taken as an argument.

mod artifacts;
mod confirm;
mod doctor;
mod enroll;
mod extent;
mod grants;
mod keys;
mod log;
mod output;
mod place;
mod progress;
mod prune;
mod recover;
mod recovery_key;
mod talk;
mod target;
mod thaw;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory as _, Parser, Subcommand};
use hestner_proto::words::{ErrorClass, GrantValue, Verb};

use crate::daemon::settings::{DEFAULT_PATH, Settings, SettingsError};
use crate::daemon::{self};
use crate::guard;
use crate::guard::freezer::Given;
use crate::guard::process::ThawStart;
use crate::platform::chain;
use crate::platform::clock::SystemClock;
use crate::platform::process;
use crate::run::fence::Fence;
use crate::run::messages::Failure;
use crate::run::runner::Askers;
use crate::run::worker::StreamEnds;
use crate::run::{hook, privileges, runner, worker};

/// Takes application-consistent snapshots on this server and proves it.
#[derive(Parser)]
#[command(name = "hestner-agent", version, max_term_width = 100, after_help = "Example:\n  hestner-agent status")]
struct Arguments {
    /// The settings file.
    #[arg(long, global = true, default_value = DEFAULT_PATH, value_name = "FILE")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make this host known to a receiver.
    #[command(
        after_help = "Example:\n  hestner-agent enroll --token-file /root/token --recovery-fingerprint sha256:0123456789abcdef0123456789abcdef"
    )]
    Enroll(enroll::Arguments),
    /// Run the daemon.
    #[command(
        after_help = "Example:\n  hestner-agent run\n\nSIGTERM stops it in good order; a run in progress ends as `interrupted`."
    )]
    Run {
        /// Have systemd start runners, as units of their own: the socket that it listens on. Without it they are
        /// started here, as the same user.
        #[arg(long, value_name = "SOCKET")]
        runner_socket: Option<PathBuf>,
    },
    /// Show the daemon's state.
    #[command(after_help = "Example:\n  hestner-agent status --json")]
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show or change what the centre may ask for.
    #[command(subcommand, after_help = "Example:\n  hestner-agent grants allow docs snapshot")]
    Grants(Grants),
    /// Say what is wrong on this host and what to do. Works without the daemon and changes nothing.
    #[command(
        after_help = "Example:\n  hestner-agent doctor --json\n\nExit code 0: no problems, though perhaps warnings; 1: problems."
    )]
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Let a run begin that waits for a person, or refuse it.
    #[command(
        after_help = "Example:\n  hestner-agent confirm --list\n  hestner-agent confirm 0198c0de-0000-7000-8000-000000000000"
    )]
    Confirm(confirm::Arguments),
    /// Take a snapshot of a service and follow it.
    #[command(after_help = "Example:\n  hestner-agent snapshot docs")]
    Snapshot {
        /// The service.
        service: String,
        /// Do not wait for its end.
        #[arg(long, conflicts_with = "dry_run")]
        detach: bool,
        /// Only show what would be done.
        #[arg(long)]
        dry_run: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the newest runs.
    #[command(after_help = "Example:\n  hestner-agent runs --limit 5")]
    Runs {
        /// At most so many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the keys of this host's repositories, and whether the company has them as well. Works without the daemon.
    #[command(
        after_help = "Example:\n  hestner-agent keys --json\n\nAs long as a key is not acknowledged, losing this host loses what was stored with it, unless the repository's own hestner-key.age is there."
    )]
    Keys {
        /// Fail unless the receiver has acknowledged every key.
        #[arg(long)]
        require_escrow: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// For which recovery key of the company this host wraps its repositories' keys.
    #[command(subcommand, after_help = "Example:\n  hestner-agent recovery-key show")]
    RecoveryKey(recovery_key::RecoveryKey),
    /// Write a run's artifact to a folder. Works without the daemon.
    #[command(
        after_help = "Example:\n  hestner-agent restore 0198c0de-0000-7000-8000-000000000000 --target /srv/restored\n\nThe tree appears below the folder under its original path. A restore that was ended early goes on when the same command is given again: only what is missing is written."
    )]
    Restore {
        /// The run.
        run: String,
        /// A folder that is new or empty, or holds an unfinished restore of the same run.
        #[arg(long, value_name = "DIR")]
        target: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Release what runs have left frozen, paused or quiesced. Works without the daemon, safe at any time.
    #[command(
        after_help = "Example:\n  hestner-agent thaw\n  hestner-agent thaw --wait 300\n\nRuns that go as they should are left alone. With --wait: exit 0 as soon as no run holds its service any more, 1 if the time is over before."
    )]
    Thaw {
        /// Wait until no run holds its service, at most so long.
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
        /// Say nothing when nothing is held.
        #[arg(long)]
        quiet: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read the repository of a run's artifact back: its structure, and all of its data unless less is asked for. Works
    /// without the daemon.
    #[command(
        after_help = "Example:\n  hestner-agent verify 0198c0de-0000-7000-8000-000000000000 --sample '2 GiB'\n\nExit code 0: everything that was read is right."
    )]
    Verify {
        /// The run.
        run: String,
        #[command(flatten)]
        how_much: extent::HowMuch,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// The server is gone: list, verify and restore its repository with the company's recovery key alone. Needs no
    /// settings, no enrolment, no receiver.
    #[command(
        subcommand,
        after_help = "Example:\n  hestner-agent recover list --folder /mnt/backup/server-12-encrypted --recovery-key /root/recovery.key\n\nA bucket or another server's folder is named by --place FILE:\n  kind = \"s3\"\n  endpoint = \"https://s3.example.com\"\n  bucket = \"backups\"\n  credentials_file = \"/root/s3.toml\"\n  repository = \"server-12-encrypted\""
    )]
    Recover(recover::Recover),
    /// Remove snapshots that are no longer wanted, and the data that only they used, by stock restic.
    #[command(
        after_help = "Example:\n  hestner-agent prune --place /root/place.toml --password-file /root/server-12.password --keep-days 30 --keep-count 7 --dry-run\n  hestner-agent prune --destination local --forget 1f0c5a2e\n\nThe newest snapshot of a service never goes. Without --forget, --keep-days and --keep-count only data that nothing uses is removed."
    )]
    Prune(prune::Arguments),
    /// One run; started by the daemon with a socket as standard input.
    #[command(hide = true)]
    Runner {
        /// Have systemd start the guard, as a unit of its own: the socket that it listens on.
        #[arg(long, value_name = "SOCKET")]
        guard_socket: Option<PathBuf>,
    },
    /// Work on a repository; started by the runner.
    #[command(hide = true)]
    Worker {
        #[arg(long, requires = "stream_write")]
        stream_read: Option<i32>,
        #[arg(long, requires = "stream_read")]
        stream_write: Option<i32>,
    },
    /// One hook; started by the runner.
    #[command(hide = true)]
    Hook,
    /// Ends a frozen window whatever happens; started by the runner with a socket as standard input.
    #[command(hide = true)]
    Guard {
        /// Start `hestner-agent thaw` by connecting here, and not as a process.
        #[arg(long, value_name = "SOCKET")]
        thaw_socket: Option<PathBuf>,
    },
    /// Freezes one filesystem when it is told to; started by the guard.
    #[command(hide = true)]
    Freezer {
        #[arg(long)]
        mount: i32,
        #[arg(long)]
        journal: i32,
        #[arg(long)]
        offset: u64,
    },
}

#[derive(Subcommand)]
enum Grants {
    /// List them.
    #[command(after_help = "Example:\n  hestner-agent grants list --json")]
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Let the centre ask for it.
    #[command(after_help = "Example:\n  hestner-agent grants allow docs snapshot")]
    Allow(Subject),
    /// Have a person confirm it each time.
    #[command(after_help = "Example:\n  hestner-agent grants confirm docs restore")]
    Confirm(Subject),
    /// Refuse it.
    #[command(after_help = "Example:\n  hestner-agent grants deny docs prune")]
    Deny(Subject),
}

#[derive(clap::Args)]
struct Subject {
    /// The service.
    service: String,
    /// The verb: snapshot, verify, restore, prune, logs, probe or image.
    verb: Verb,
}

/// An error as a person sees it.
#[derive(Debug)]
struct Complaint {
    message: String,
    next_step: String,
    code: String,
    exit: u8,
}

/// Exit code for what a person has to mend (`EX_USAGE` of sysexits.h).
const EXIT_MEND: u8 = 64;
const EXIT_FAILED: u8 = 1;

impl Complaint {
    fn mend(code: &str, message: impl Into<String>, next_step: impl Into<String>) -> Self {
        Self { message: message.into(), next_step: next_step.into(), code: code.to_owned(), exit: EXIT_MEND }
    }

    fn of_class(class: ErrorClass, message: impl Into<String>) -> Self {
        let exit = if class.needs_operator() { EXIT_MEND } else { EXIT_FAILED };
        Self { message: message.into(), next_step: class.next_step().to_owned(), code: class.to_string(), exit }
    }

    fn broken(code: &str, error: &dyn std::error::Error, next_step: &str) -> Self {
        Self { message: chain(error), next_step: next_step.to_owned(), code: code.to_owned(), exit: EXIT_FAILED }
    }
}

impl From<SettingsError> for Complaint {
    fn from(error: SettingsError) -> Self {
        let next_step = match &error {
            SettingsError::Distrust { .. } => ErrorClass::UnsafePermissions.next_step(),
            SettingsError::Missing(_) => {
                "write it (config/agent.toml is a commented example), or name another with --config"
            }
            _ => "mend the file; config/agent.toml is a commented example",
        };
        Self::mend(error.class().as_str(), error.to_string(), next_step)
    }
}

/// The command line as data: man pages and completions are made from it.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// The whole program.
pub fn main() -> ExitCode {
    // Its own processes are started through /proc/self/exe, and would all be called `exe`.
    let _ = nix::sys::prctl::set_name(c"hestner-agent");
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are no mistakes.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(EXIT_MEND) } else { ExitCode::SUCCESS };
        }
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(complaint) => {
            output::complain(&complaint);
            ExitCode::from(complaint.exit)
        }
    }
}

fn run(Arguments { config, command }: Arguments) -> Result<(), Complaint> {
    match command {
        // These two are told everything by whoever starts them.
        Command::Hook => {
            return hook::supervise().map_err(|e| Complaint::broken("hook_not_supervised", &e, "read the agent's log"));
        }
        Command::Worker { stream_read, stream_write } => {
            log::init_child();
            let ends = stream_ends(stream_read, stream_write)
                .map_err(|e| Complaint::broken("worker_broken", &e, "read the agent's log"))?;
            return block_on(async {
                worker::run(ends).await.map_err(|e| Complaint::broken("worker_broken", &e, "read the agent's log"))
            });
        }
        // A slip in a setting must keep nothing frozen.
        Command::Thaw { wait, quiet, json } => {
            return block_on(thaw::run(&config, thaw::How { wait_seconds: wait, quiet, json }));
        }
        // Settings that cannot be read are what it may have been called for.
        Command::Doctor { json } => return block_on(doctor::run(&config, Settings::read(&config), json)),
        Command::Guard { thaw_socket } => {
            log::init_child();
            let thaw = thaw_socket.map_or(ThawStart::Process { config }, ThawStart::Socket);
            return guard::process::run(thaw)
                .map_err(|e| Complaint::broken("guard_broken", &e, "read the agent's log"));
        }
        Command::Freezer { mount, journal, offset } => {
            return guard::freezer::run(Given { mount, journal, offset })
                .map_err(|e| Complaint::broken("freezer_broken", &e, "read the agent's log"));
        }
        Command::Runner { guard_socket } => return run_runner(&config, guard_socket),
        // A host that has nothing but this program, and need not become more.
        Command::Recover(command) => {
            log::init_command();
            return block_on(recover::run(&command));
        }
        Command::Prune(arguments) => {
            log::init_command();
            return block_on(prune::run(&arguments, || Ok(Settings::read(&config)?)));
        }
        _ => {}
    }
    let settings = Settings::read(&config)?;
    match command {
        Command::Enroll(arguments) => block_on(enroll::run(&settings, &arguments)),
        Command::Run { runner_socket } => run_daemon(settings, &config, runner_socket),
        Command::Status { json } => block_on(talk::status(&settings, json)),
        Command::Grants(Grants::List { json }) => grants::list(&settings, json),
        Command::Grants(Grants::Allow(Subject { service, verb })) => {
            grants::set(&settings, &service, verb, GrantValue::Allow)
        }
        Command::Grants(Grants::Confirm(Subject { service, verb })) => {
            grants::set(&settings, &service, verb, GrantValue::Confirm)
        }
        Command::Grants(Grants::Deny(Subject { service, verb })) => {
            grants::set(&settings, &service, verb, GrantValue::Deny)
        }
        Command::Confirm(arguments) => block_on(confirm::run(&settings, &arguments)),
        Command::Snapshot { service, dry_run: true, json, .. } => block_on(talk::plan(&settings, service, json)),
        Command::Snapshot { service, detach, json, .. } => block_on(talk::snapshot(&settings, service, detach, json)),
        Command::Runs { limit, json } => block_on(talk::runs(&settings, limit, json)),
        Command::RecoveryKey(command) => recovery_key::run(&settings, &command),
        Command::Keys { require_escrow, json } => keys::list(&settings, require_escrow, json),
        Command::Restore { run, target, json } => block_on(artifacts::restore(&settings, &run, &target, json)),
        Command::Verify { run, how_much, json } => {
            block_on(artifacts::verify(&settings, &run, how_much.extent(), json))
        }
        // Handled above.
        Command::Thaw { .. }
        | Command::Doctor { .. }
        | Command::Runner { .. }
        | Command::Recover(_)
        | Command::Prune(_)
        | Command::Worker { .. }
        | Command::Guard { .. }
        | Command::Freezer { .. }
        | Command::Hook => Ok(()),
    }
}

fn block_on<T>(work: impl Future<Output = Result<T, Complaint>>) -> Result<T, Complaint> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Complaint::broken("no_runtime", &e, "free some memory or file descriptors"))?;
    let done = runtime.block_on(work);
    // A thread that waits for a dead disk must not keep the process.
    runtime.shutdown_background();
    done
}

fn stream_ends(read: Option<i32>, write: Option<i32>) -> std::io::Result<Option<StreamEnds>> {
    match (read, write) {
        (Some(read), Some(write)) => {
            Ok(Some(StreamEnds { read: process::adopt(read)?, write: process::adopt(write)? }))
        }
        _ => Ok(None),
    }
}

fn run_runner(config: &std::path::Path, guard_socket: Option<PathBuf>) -> Result<(), Complaint> {
    log::init_child();
    let settings = Settings::read(config).map_err(|error| Failure::new(error.class(), error.to_string()));
    let host = settings.as_ref().map_err(Clone::clone).and_then(Settings::host);
    // Only its unit says what is the most that a run may need; without one it is whatever the daemon's user may.
    if let (Ok(host), Some(_)) = (&host, &guard_socket) {
        privileges::lay_down_what_is_not_needed(host)
            .map_err(|reason| Complaint::mend("runner_broken", reason, "look at the capabilities of its unit"))?;
    }
    // Before there is a child: each would stay in the group that is divided here.
    let fence = if guard_socket.is_some() { Fence::of_the_unit() } else { Fence::default() };
    let told = runner::Told {
        host: host.map(|h| h.started_with(config, guard_socket).fenced(fence.clone())),
        askers: match &settings {
            Ok(settings) => settings.daemon_user().map_or(Askers::NobodyElse, Askers::Daemon),
            Err(_) => Askers::Anybody,
        },
        description: daemon::describe(&settings, &fence),
        clock: Arc::new(SystemClock),
    };
    let broken = |e: std::io::Error| Complaint::broken("runner_broken", &e, "it is started by the daemon, not by hand");
    let socket = process::adopt(0).map(std::os::unix::net::UnixStream::from).map_err(broken)?;
    block_on(async {
        socket.set_nonblocking(true).map_err(broken)?;
        let socket = tokio::net::UnixStream::from_std(socket).map_err(broken)?;
        runner::run(socket, told).await.map_err(broken)
    })
}

fn run_daemon(settings: Settings, config: &std::path::Path, runner_socket: Option<PathBuf>) -> Result<(), Complaint> {
    log::init(&settings.log)
        .map_err(|reason| Complaint::mend("settings_invalid", reason, "mend `filter` under [log]"))?;
    tracing::info!(event = "starting", version = env!("CARGO_PKG_VERSION"), state_dir = %settings.state_dir.display(), services = settings.services.len());
    block_on(async {
        let bound = daemon::build(settings, config, runner_socket, Arc::new(SystemClock)).await;
        let bound = bound.map_err(start_complaint)?;
        bound.run().await.map_err(|e| Complaint::broken("stopped_badly", &e, "read the agent's log"))
    })
}

fn start_complaint(error: daemon::StartError) -> Complaint {
    use daemon::StartError as E;
    let (code, next_step) = match &error {
        E::Identity(_) => ("not_enrolled", "enrol it with `hestner-agent enroll`"),
        E::File(e) if e.is_full() => ("state_full", ErrorClass::StateFull.next_step()),
        E::Store(e) if e.is_full() => ("state_full", ErrorClass::StateFull.next_step()),
        E::Distrust(_) => ("unsafe_permissions", ErrorClass::UnsafePermissions.next_step()),
        E::File(_) | E::Store(_) => ("state_unusable", "look at the state folder's permissions and disk"),
        E::StateInUse(_) | E::Control(_) => {
            ("already_running", "stop the other agent first, or give this one a state folder and a socket of its own")
        }
        E::Manager(_) => ("manager_unreachable", "start it by its unit, or without NOTIFY_SOCKET in the environment"),
        E::Random(_) => ("no_random_numbers", "wait until the machine has booted"),
    };
    Complaint::mend(code, chain(&error), next_step)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../systemd");

    fn unit(name: &str) -> String {
        std::fs::read_to_string(format!("{UNITS}/{name}")).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    #[test]
    fn units_call_the_program_in_words_that_it_knows_and_by_sockets_that_somebody_listens_on() {
        let names =
            ["hestner-agent.service", "hestner-run@.service", "hestner-guard@.service", "hestner-thaw@.service"];
        let listening = ["run", "guard", "thaw"].map(|name| unit(&format!("hestner-{name}.socket")));
        let mut calls = 0;
        for name in names {
            let text = unit(name);
            for line in text.lines().filter(|line| line.starts_with("ExecSt")) {
                let command = line.split_once('=').map(|(_, command)| command.trim_start_matches('+'));
                let words: Vec<&str> = command.unwrap_or_default().split_whitespace().collect();
                if let Err(error) = Arguments::try_parse_from(&words) {
                    panic!("{name}: {line}\n{error}");
                }
                for socket in words.iter().filter(|word| word.ends_with(".sock")) {
                    let listens = listening.iter().any(|unit| unit.contains(&format!("ListenStream={socket}\n")));
                    assert!(listens, "{name}: nobody listens on {socket}");
                }
                calls += 1;
            }
        }
        assert_eq!(calls, 6, "a start each, and what follows a run and a guard");
    }
}
