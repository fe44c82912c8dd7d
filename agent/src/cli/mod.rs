//! The command line: what people type, what they see, and the exit code.
//!
//! Exit 0 only on success; 64 for bad usage, bad settings, or an input or a resource that a person has to
//! mend; 1 for everything else. Errors go to standard error with what to do next and a stable code. No
//! secret is taken as an argument.

mod artifacts;
mod enroll;
mod grants;
mod log;
mod output;
mod talk;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use hestner_proto::words::{ErrorClass, GrantValue, Verb};

use crate::daemon::settings::{DEFAULT_PATH, Settings, SettingsError};
use crate::daemon::{self};
use crate::platform::chain;
use crate::platform::clock::SystemClock;
use crate::platform::process;
use crate::run::messages::Failure;
use crate::run::worker::StreamEnds;
use crate::run::{hook, runner, worker};

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
    Run,
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
    /// Write a run's artifact to a folder. Works without the daemon.
    #[command(
        after_help = "Example:\n  hestner-agent restore 0198c0de-0000-7000-8000-000000000000 --target /srv/restored\n\nThe tree appears below the folder under its original path."
    )]
    Restore {
        /// The run.
        run: String,
        /// An empty or new folder.
        #[arg(long, value_name = "DIR")]
        target: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read a run's artifact and the whole repository back. Works without the daemon.
    #[command(after_help = "Example:\n  hestner-agent verify 0198c0de-0000-7000-8000-000000000000")]
    Verify {
        /// The run.
        run: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// One run; started by the daemon with a socket as standard input.
    #[command(hide = true)]
    Runner,
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
        Command::Runner => return run_runner(&config),
        _ => {}
    }
    let settings = Settings::read(&config)?;
    match command {
        Command::Enroll(arguments) => block_on(enroll::run(&settings, &arguments)),
        Command::Run => run_daemon(settings, &config),
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
        Command::Snapshot { service, dry_run: true, json, .. } => block_on(talk::plan(&settings, service, json)),
        Command::Snapshot { service, detach, json, .. } => block_on(talk::snapshot(&settings, service, detach, json)),
        Command::Runs { limit, json } => block_on(talk::runs(&settings, limit, json)),
        Command::Restore { run, target, json } => block_on(artifacts::restore(&settings, &run, &target, json)),
        Command::Verify { run, json } => block_on(artifacts::verify(&settings, &run, json)),
        // Handled above.
        Command::Runner | Command::Worker { .. } | Command::Hook => Ok(()),
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

fn run_runner(config: &std::path::Path) -> Result<(), Complaint> {
    log::init_child();
    let host = match Settings::read(config) {
        Ok(settings) => settings.host(),
        Err(error) => Err(Failure::new(error.class(), error.to_string())),
    };
    let broken = |e: std::io::Error| Complaint::broken("runner_broken", &e, "it is started by the daemon, not by hand");
    let socket = process::adopt(0).map(std::os::unix::net::UnixStream::from).map_err(broken)?;
    block_on(async {
        socket.set_nonblocking(true).map_err(broken)?;
        let socket = tokio::net::UnixStream::from_std(socket).map_err(broken)?;
        runner::run(socket, host, Arc::new(SystemClock)).await.map_err(broken)
    })
}

fn run_daemon(settings: Settings, config: &std::path::Path) -> Result<(), Complaint> {
    log::init(&settings.log)
        .map_err(|reason| Complaint::mend("settings_invalid", reason, "mend `filter` under [log]"))?;
    tracing::info!(event = "starting", version = env!("CARGO_PKG_VERSION"), state_dir = %settings.state_dir.display(), services = settings.services.len());
    block_on(async {
        let bound = daemon::build(settings, config, Arc::new(SystemClock)).await.map_err(start_complaint)?;
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
        E::Random(_) => ("no_random_numbers", "wait until the machine has booted"),
    };
    Complaint::mend(code, chain(&error), next_step)
}
