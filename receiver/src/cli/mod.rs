//! The command line: one function a command, all on the same parts as `serve`.
//!
//! Commands other than `serve` work directly on the store, beside a running `serve`. Exit codes: 0 success,
//! 64 for usage, settings and input that an operator has to mend, 1 for everything else. Errors go to standard
//! error with what to do next and a stable code.

mod keys;
mod output;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::lifecycle::{self, Drain};
use crate::model::{Actor, CompanyId, Scope, ServerId, times};
use crate::platform::clock::{SharedClock, SystemClock};
use crate::platform::notify::Notifier;
use crate::platform::{files, span};
use crate::server::settings::{self, Checked, LogFormat};
use crate::server::{self, Opened};
use crate::store::audit::Verdict;
use output::{Failure, print_json, print_table};

/// The thin centre of Hestner: enrols agents, takes in their reports, answers REST /v1.
#[derive(Debug, Parser)]
#[command(
    name = "hestner-receiver",
    version,
    after_help = "Example:\n  hestner-receiver --config /etc/hestner/receiver.toml serve"
)]
struct Cli {
    /// Settings file [default: /etc/hestner/receiver.toml, which may be missing]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the receiver until SIGTERM or SIGINT
    #[command(after_help = "Example:\n  hestner-receiver serve")]
    Serve,
    /// Companies
    #[command(subcommand, after_help = "Example:\n  hestner-receiver company list --json")]
    Company(CompanyCommand),
    /// Join tokens, which new hosts enrol with
    #[command(subcommand, after_help = "Example:\n  hestner-receiver token create --company 1")]
    Token(TokenCommand),
    /// API keys for REST
    #[command(subcommand, after_help = "Example:\n  hestner-receiver apikey create --company 1 --label console")]
    Apikey(ApikeyCommand),
    /// Enrolled agents
    #[command(subcommand, after_help = "Example:\n  hestner-receiver agent list --company 1")]
    Agent(AgentCommand),
    /// Keys of repositories, as hosts have told them
    #[command(subcommand, after_help = "Example:\n  hestner-receiver keys list --server 12")]
    Keys(keys::KeysCommand),
    /// The audit log
    #[command(subcommand, after_help = "Example:\n  hestner-receiver audit verify")]
    Audit(AuditCommand),
    /// The certificate authority
    #[command(subcommand, after_help = "Example:\n  hestner-receiver ca show")]
    Ca(CaCommand),
}

#[derive(Debug, Subcommand)]
enum CompanyCommand {
    /// Add a company with the public half of its recovery key
    #[command(
        after_help = "Example:\n  age-keygen -o recovery.key            # on a machine that stays offline\n  age-keygen -y recovery.key > recovery.pub\n  hestner-receiver company add \"Acme\" --recovery-key recovery.pub"
    )]
    Add {
        /// Its name
        name: String,
        /// File with one age recipient (age1...)
        #[arg(long, value_name = "FILE")]
        recovery_key: PathBuf,
        #[command(flatten)]
        output: Json,
    },
    /// Put another recovery key in the place of a company's: hosts that enrol from now on compare this one
    #[command(
        after_help = "Example:\n  hestner-receiver company set-recovery-key 1 --recovery-key new.pub\n\nHosts that are enrolled go on with the old one, and say so (`recovery_key_refused`), until somebody types the new\nfingerprint on each: hestner-agent recovery-key set"
    )]
    SetRecoveryKey {
        /// The company
        #[arg(value_name = "ID")]
        company: i64,
        /// File with one age recipient (age1...)
        #[arg(long, value_name = "FILE")]
        recovery_key: PathBuf,
        #[command(flatten)]
        output: Json,
    },
    /// List companies
    #[command(after_help = "Example:\n  hestner-receiver company list")]
    List {
        #[command(flatten)]
        output: Json,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a join token and print it; it is shown once
    #[command(after_help = "Example:\n  hestner-receiver token create --company 1 --ttl 30m > join-token")]
    Create {
        /// The company to enrol into
        #[arg(long, value_name = "ID")]
        company: i64,
        /// The server to enrol anew; a new one if left out
        #[arg(long, value_name = "ID")]
        server: Option<i64>,
        /// How long it can be used, up to 30 days
        #[arg(long, default_value = "1h", value_name = "TIME", value_parser = token_life)]
        ttl: Duration,
        #[command(flatten)]
        output: Json,
    },
}

#[derive(Debug, Subcommand)]
enum ApikeyCommand {
    /// Make an API key and print it; it is shown once
    #[command(after_help = "Example:\n  hestner-receiver apikey create --all-companies --label metrics")]
    Create {
        #[command(flatten)]
        scope: KeyScope,
        /// What it is for
        #[arg(long, value_name = "TEXT")]
        label: String,
        #[command(flatten)]
        output: Json,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct KeyScope {
    /// The one company it opens
    #[arg(long, value_name = "ID")]
    company: Option<i64>,
    /// It opens every company
    #[arg(long)]
    all_companies: bool,
}

#[derive(Debug, Subcommand)]
enum AgentCommand {
    /// List enrolled agents; whether one is online, only REST can tell
    #[command(after_help = "Example:\n  hestner-receiver agent list --json")]
    List {
        /// Of this company only
        #[arg(long, value_name = "ID")]
        company: Option<i64>,
        #[command(flatten)]
        output: Json,
    },
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Recompute the chain of hashes; exit 1 if a row was changed or taken out
    #[command(
        after_help = "Example:\n  hestner-receiver audit verify --json\n\nKeep the last hash elsewhere: it proves later that nothing before it was rewritten."
    )]
    Verify {
        #[command(flatten)]
        output: Json,
    },
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Show the authority's pin, subject, end and certificate
    #[command(after_help = "Example:\n  hestner-receiver ca show --json")]
    Show {
        #[command(flatten)]
        output: Json,
    },
}

#[derive(Clone, Copy, Debug, Args)]
struct Json {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn token_life(text: &str) -> Result<Duration, String> {
    let life = span::parse(text).map_err(|error| error.to_string())?;
    let allowed = Duration::from_secs(1)..=Duration::from_secs(30 * 24 * 3600);
    if allowed.contains(&life) { Ok(life) } else { Err("must be from 1s to 30days".to_owned()) }
}

/// The command line as data: man pages and completions are made from it.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let settings = settings::load(cli.config.as_deref())?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().build().map_err(Failure::Runtime)?;
    runtime.block_on(async {
        let clock: SharedClock = Arc::new(SystemClock);
        match cli.command {
            Command::Serve => serve(settings, clock).await,
            command => {
                let opened = server::open(&settings, &clock).await?;
                let done = work(&opened, command, &clock).await;
                opened.store.close().await;
                done
            }
        }
    })
}

async fn serve(settings: Checked, clock: SharedClock) -> Result<(), Failure> {
    start_log(&settings);
    let manager = Arc::new(Notifier::from_environment().map_err(Failure::Manager)?);
    let bound = server::build(settings, clock).await?;
    let addresses = bound.addresses();
    let pin = bound.opened().authority.pin().to_owned();
    let drain = Drain::default();
    let running = bound.start(drain.clone())?;
    running.tell(&manager);
    tracing::info!(
        event = "ready", component = "server", version = env!("CARGO_PKG_VERSION"), ca_pin = pin,
        agents = %addresses.agents, enrolment = %addresses.enrolment, rest = %addresses.rest, "ready"
    );
    println!(
        "event=ready agents={} enrolment={} rest={} ca_pin={pin}",
        addresses.agents, addresses.enrolment, addresses.rest
    );
    tokio::select! {
        asked = lifecycle::asked_to_stop() => asked.map_err(Failure::Signals)?,
        () = drain.begun() => {}
    }
    tracing::info!(event = "draining", component = "server", "stopping");
    manager.stopping();
    drain.begin();
    let second = async {
        // Without handlers there is no second signal to wait for.
        if lifecycle::asked_to_stop().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    running.finish(second).await.map_err(Failure::TaskEnded)?;
    tracing::info!(event = "stopped", component = "server", "stopped");
    Ok(())
}

fn start_log(settings: &Checked) {
    use tracing_subscriber::prelude::*;
    let filter: tracing_subscriber::filter::Targets = settings.log_filter.parse().unwrap_or_default();
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let registry = tracing_subscriber::registry();
    // Fails only where a test has set a log already; that one stays.
    let _ = match settings.log_format {
        LogFormat::Text => registry.with(layer.with_filter(filter)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_filter(filter)).try_init(),
    };
}

/// Who sits at this shell, for the audit log.
fn operator() -> Actor {
    let uid = nix::unistd::getuid();
    let user = nix::unistd::User::from_uid(uid).ok().flatten();
    Actor::Cli(user.map_or_else(|| uid.to_string(), |user| user.name))
}

async fn work(opened: &Opened, command: Command, clock: &SharedClock) -> Result<(), Failure> {
    match command {
        Command::Serve => Ok(()),
        Command::Company(CompanyCommand::Add { name, recovery_key, output }) => {
            add_company(opened, &name, &recovery_key, output).await
        }
        Command::Company(CompanyCommand::SetRecoveryKey { company, recovery_key, output }) => {
            set_recovery_key(opened, company, &recovery_key, output).await
        }
        Command::Keys(command) => keys::run(opened, operator(), command).await,
        Command::Company(CompanyCommand::List { output }) => list_companies(opened, output).await,
        Command::Token(TokenCommand::Create { company, server, ttl, output }) => {
            create_token(opened, CompanyId(company), server.map(ServerId), ttl, output).await
        }
        Command::Apikey(ApikeyCommand::Create { scope, label, output }) => {
            create_key(opened, &scope, &label, clock.now_ms(), output).await
        }
        Command::Agent(AgentCommand::List { company, output }) => {
            list_agents(opened, company.map(CompanyId), output).await
        }
        Command::Audit(AuditCommand::Verify { output }) => verify_audit(opened, output).await,
        Command::Ca(CaCommand::Show { output }) => show_ca(opened, output),
    }
}

async fn add_company(opened: &Opened, name: &str, key: &std::path::Path, output: Json) -> Result<(), Failure> {
    let text = files::read_text(key)?.ok_or_else(|| Failure::NoFile(key.to_owned()))?;
    let added = opened.fleet.add_company(operator(), name, &text).await?;
    if output.json {
        return print_json(&serde_json::json!({
            "id": added.id, "name": name.trim(), "recovery_fingerprint": added.recovery_fingerprint,
        }));
    }
    println!("company {} added: {}", added.id, name.trim());
    println!("recovery key's fingerprint, to be typed on each host: {}", added.recovery_fingerprint);
    println!("next: hestner-receiver token create --company {}", added.id);
    Ok(())
}

async fn set_recovery_key(opened: &Opened, id: i64, key: &std::path::Path, output: Json) -> Result<(), Failure> {
    let text = files::read_text(key)?.ok_or_else(|| Failure::NoFile(key.to_owned()))?;
    let fingerprint = opened.fleet.set_recovery_key(operator(), CompanyId(id), &text).await?;
    if output.json {
        return print_json(&serde_json::json!({ "id": id, "recovery_fingerprint": fingerprint }));
    }
    println!("recovery key's fingerprint of company {id}, to be typed on each host: {fingerprint}");
    println!(
        "next, on each host: hestner-agent recovery-key set --recovery-key FILE --recovery-fingerprint {fingerprint}"
    );
    Ok(())
}

async fn list_companies(opened: &Opened, output: Json) -> Result<(), Failure> {
    let companies = opened.store.companies(Scope::All).await?;
    if output.json {
        return print_json(&companies);
    }
    let rows = companies.into_iter().map(|c| vec![c.id.to_string(), c.name, c.status, c.recovery_fingerprint]);
    print_table(&["ID", "NAME", "STATUS", "RECOVERY KEY"], rows);
    Ok(())
}

async fn create_token(
    opened: &Opened,
    company: CompanyId,
    server: Option<ServerId>,
    life: Duration,
    output: Json,
) -> Result<(), Failure> {
    let made = opened.enrolment.create_token(operator(), company, server, life).await?;
    let expires_at = times::rfc3339(made.expires_at_ms);
    if output.json {
        let token = made.token.to_string();
        return print_json(&serde_json::json!({ "id": made.id, "token": token, "expires_at": expires_at }));
    }
    // Alone on its line: it is meant to be piped into a file.
    println!("{}", made.token);
    eprintln!("token {}, good for one host until {expires_at}; it is not shown again", made.id);
    Ok(())
}

async fn create_key(opened: &Opened, scope: &KeyScope, label: &str, now_ms: i64, output: Json) -> Result<(), Failure> {
    let scope = match scope.company {
        Some(id) => {
            let company = CompanyId(id);
            if opened.store.companies(Scope::Company(company)).await?.is_empty() {
                return Err(Failure::NoCompany(id));
            }
            Scope::Company(company)
        }
        None => Scope::All,
    };
    let made = opened.auth.create(operator(), scope, label, now_ms).await?;
    if output.json {
        let company = if let Scope::Company(id) = scope { Some(id) } else { None };
        return print_json(&serde_json::json!({
            "id": made.id, "key": made.key, "company_id": company, "label": label,
        }));
    }
    println!("{}", made.key);
    eprintln!("API key {}; it is not shown again", made.id);
    Ok(())
}

async fn list_agents(opened: &Opened, company: Option<CompanyId>, output: Json) -> Result<(), Failure> {
    let servers = opened.store.servers(company, &crate::fleet::ServerFilter::default()).await?;
    if output.json {
        return print_json(&servers);
    }
    let rows = servers.into_iter().map(|s| {
        // This process has no sessions, so "offline" would be a guess.
        let standing = serde_json::to_value(s.status).ok().and_then(|v| v.as_str().map(str::to_owned));
        let standing = standing.filter(|word| word != "offline").unwrap_or_else(|| "active".to_owned());
        vec![
            s.id.to_string(),
            s.company_id.to_string(),
            s.name,
            standing,
            s.agent_version,
            s.last_seen_at.unwrap_or_else(|| "never".to_owned()),
        ]
    });
    print_table(&["ID", "COMPANY", "NAME", "STANDING", "VERSION", "LAST SEEN"], rows);
    Ok(())
}

async fn verify_audit(opened: &Opened, output: Json) -> Result<(), Failure> {
    match opened.store.verify_audit().await? {
        Verdict::Broken { id } => Err(Failure::AuditBroken(id)),
        Verdict::Whole { rows, last_hash } if output.json => {
            print_json(&serde_json::json!({ "rows": rows, "last_hash": last_hash }))
        }
        Verdict::Whole { rows, last_hash } => {
            println!("{rows} rows, each with the hash it must have\nlast hash  {last_hash}");
            Ok(())
        }
    }
}

fn show_ca(opened: &Opened, output: Json) -> Result<(), Failure> {
    let authority = &opened.authority;
    let (subject, not_after_ms) = authority.summary();
    let not_after = times::rfc3339(not_after_ms);
    if output.json {
        return print_json(&serde_json::json!({
            "pin": authority.pin(), "subject": subject, "not_after": not_after, "certificate": authority.pem(),
        }));
    }
    println!(
        "pin        {}\nsubject    {subject}\nnot after  {not_after}\n{}",
        authority.pin(),
        authority.pem().trim_end()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent_and_every_command_shows_an_example() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Example:"), "`{}` has no example", command.get_name());
            command.get_subcommands().for_each(check);
        }
        Cli::command().debug_assert();
        check(&Cli::command());
    }

    #[test]
    fn a_key_is_for_one_company_or_for_all_and_never_for_both_or_neither() {
        let parse = |rest: &[&str]| {
            let words = ["hestner-receiver", "apikey", "create", "--label", "x"];
            Cli::try_parse_from(words.iter().chain(rest)).is_ok()
        };
        assert!(parse(&["--company", "1"]) && parse(&["--all-companies"]));
        assert!(!parse(&[]) && !parse(&["--company", "1", "--all-companies"]));
    }
}
