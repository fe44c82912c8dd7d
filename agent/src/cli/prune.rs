//! `prune`: removes snapshots that are no longer wanted, and their data, by stock restic.
//!
//! Meant for a machine with credentials that the hosts do not have; on a host it works on a destination of the
//! settings. Everything that will go is chosen and shown before anything is removed. The runs whose artifacts went are
//! marked in this host's ledger; another host's, and the receiver's, learn nothing of it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::place::{KeyArguments, PlaceArguments, asked_to_stop, no_key, no_place, watched};
use super::recover::{as_json, table};
use super::{Complaint, EXIT_FAILED, EXIT_MEND, output};
use crate::daemon::settings::Settings;
use crate::platform::chain;
use crate::platform::clock::{Clock as _, SystemClock};
use crate::repository::prune::{self, Forget, How, Known, PruneError};
use crate::repository::recovery::{Key, Place, Recovered};
use crate::repository::retention::Rules;
use crate::repository::snapshots::Listed;
use crate::repository::{Location, Mode};
use crate::run::ledger::{Ledger, is_run_id};

const RESTIC: &str = "/usr/bin/restic";

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    place: PlaceArguments,
    /// A destination of this host's agent.toml, whose key this host has.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["folder", "place", "recovery_key", "password_file"])]
    destination: Option<String>,
    /// With --destination: the repository of policies without encryption.
    #[arg(long, requires = "destination")]
    open: bool,
    #[command(flatten)]
    key: KeyArguments,
    /// Forget these snapshots: an id, its first eight or more digits, or a run.
    #[arg(long, value_name = "SNAPSHOT", num_args = 1..)]
    forget: Vec<String>,
    /// Forget what is older than so many days, counted from the newest snapshot of its service. With --keep-count: only
    /// what neither keeps.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    keep_days: Option<u32>,
    /// Forget all but the newest so many of each service. Elsewhere than on the host the newest two always stay: nobody
    /// knows there whether the run of the newest ended well.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    keep_count: Option<u32>,
    /// Only show what would be forgotten.
    #[arg(long)]
    dry_run: bool,
    /// The restic program; that of the settings with --destination, otherwise /usr/bin/restic.
    #[arg(long, value_name = "FILE")]
    restic: Option<PathBuf>,
    /// How long to wait for others who use the repository, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    lock_wait: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl From<PruneError> for Complaint {
    fn from(error: PruneError) -> Self {
        Self {
            message: chain(&error),
            next_step: error.next_step().to_owned(),
            code: error.code().to_owned(),
            exit: if error.needs_operator() { EXIT_MEND } else { EXIT_FAILED },
        }
    }
}

/// What the arguments come to.
struct Task {
    place: Place,
    key: Key,
    how: How,
    forget: Forget,
    /// This host's, where its own repository is pruned.
    ledger: Option<Ledger>,
}

impl Arguments {
    fn task(&self, settings: impl FnOnce() -> Result<Settings, Complaint>) -> Result<Task, Complaint> {
        let rules = Rules { days: self.keep_days.unwrap_or(0), count: self.keep_count.unwrap_or(0) };
        let rules = (rules.days > 0 || rules.count > 0).then_some(rules);
        let forget = Forget { named: self.forget.clone(), rules };
        if let Some(name) = &self.destination {
            return self.own(name, forget, &settings()?);
        }
        let place =
            self.place.read()?.ok_or_else(|| no_place(", or as a destination of this host with --destination"))?;
        let key = self.key.read()?.ok_or_else(no_key)?;
        let how = How { restic: self.restic.clone().unwrap_or_else(|| RESTIC.into()), cache: None };
        Ok(Task { place, key, how, forget, ledger: None })
    }

    fn own(&self, name: &str, forget: Forget, settings: &Settings) -> Result<Task, Complaint> {
        let Some(destination) = settings.destinations.iter().find(|d| d.name == name) else {
            let next = "`hestner-agent doctor` names those of agent.toml";
            return Err(Complaint::mend("unknown_destination", format!("there is no destination `{name}`"), next));
        };
        let host = settings.host().map_err(|failure| Complaint::of_class(failure.class, failure.message))?;
        let mode = if self.open { Mode::Open } else { Mode::Encrypted };
        let (repository, storage) = (&settings.repository, &settings.storage);
        let location = Location::new(destination, mode, host.server_id, &settings.state_dir, repository, storage);
        Ok(Task {
            place: Place { destination: destination.clone(), repository: location.name() },
            key: Key::password(&location.password_file())?,
            how: How {
                restic: self.restic.clone().unwrap_or_else(|| settings.repository.restic.clone()),
                cache: Some(location.cache),
            },
            forget,
            ledger: Some(Ledger::of(&settings.state_dir)),
        })
    }
}

pub(super) async fn run(
    arguments: &Arguments,
    settings: impl FnOnce() -> Result<Settings, Complaint>,
) -> Result<(), Complaint> {
    let Task { place, key, how, forget, ledger } = arguments.task(settings)?;
    let lock_wait = Duration::from_secs(arguments.lock_wait);
    if !arguments.dry_run {
        // Before anything is forgotten.
        prune::check_restic(&how.restic).await?;
    }
    let (at, wanted, runs) = (place.clone(), forget.clone(), ledger.clone());
    let looked = watched(
        move |_| {
            let repository = Recovered::open(&at, &key, lock_wait)?;
            let snapshots = repository.list()?;
            let is_good = |listed: &Listed| {
                runs.as_ref()
                    .is_none_or(|ledger| is_run_id(listed.run_uid()) && ledger.run(listed.run_uid()).offers_artifact())
            };
            let newest_kept = if runs.is_some() { 1 } else { 2 };
            let known = Known { is_good: &is_good, newest_kept, now: SystemClock.now() };
            let chosen = prune::choose(&snapshots, &wanted, &known)?;
            let bytes = prune::stored_bytes(&repository)?;
            Ok::<_, PruneError>((Arc::new(repository), snapshots.len() - chosen.len(), chosen, bytes))
        },
        || {},
    );
    let (repository, kept, chosen, bytes_before) = looked.await??;
    show(&chosen, kept, arguments);
    if arguments.dry_run {
        print(arguments, &chosen, kept, None);
        return Ok(());
    }
    let (at_work, going) = (Arc::clone(&repository), chosen.clone());
    watched(move |_| prune::forget(&at_work, &going), || {}).await??;
    mark(ledger.as_ref(), &chosen)?;
    prune::prune(&place, &repository, &how, asked_to_stop(), |line| eprintln!("restic: {line}")).await?;
    let bytes_after = watched(move |_| prune::stored_bytes(&repository), || {}).await??;
    print(arguments, &chosen, kept, Some((bytes_before, bytes_after)));
    Ok(())
}

fn show(chosen: &[Listed], kept: usize, arguments: &Arguments) {
    let word = if arguments.dry_run { "would be forgotten" } else { "are forgotten" };
    if !arguments.json {
        output::line(&format!("{} snapshots {word}, {kept} stay", chosen.len()));
        if !chosen.is_empty() {
            table(chosen);
        }
    }
}

/// `restore` then says what became of them.
fn mark(ledger: Option<&Ledger>, chosen: &[Listed]) -> Result<(), Complaint> {
    let Some(ledger) = ledger else { return Ok(()) };
    let runs: BTreeSet<&str> = chosen.iter().map(Listed::run_uid).filter(|run| is_run_id(run)).collect();
    for run in runs.into_iter().map(|run| ledger.run(run)) {
        if run.result().is_ok_and(|result| result.is_some()) {
            let unwritable = |e| Complaint::broken("ledger_unwritable", &e, "run the command as root, once more");
            run.mark_expired().map_err(unwritable)?;
        }
    }
    Ok(())
}

fn print(arguments: &Arguments, chosen: &[Listed], kept: usize, bytes: Option<(u64, u64)>) {
    // Repacking may need a little more than what it frees.
    let freed = bytes.map(|(before, after)| before.saturating_sub(after));
    if arguments.json {
        let forgotten: Vec<_> = chosen.iter().map(as_json).collect();
        output::json(&json!({
            "dry_run": arguments.dry_run,
            "forgotten": forgotten,
            "kept": kept,
            "bytes_before": bytes.map(|(before, _)| before),
            "bytes_after": bytes.map(|(_, after)| after),
            "bytes_freed": freed,
        }));
    } else if let (Some(freed), Some((_, after))) = (freed, bytes) {
        output::line(&format!("freed {}; the repository has {}", output::bytes(freed), output::bytes(after)));
    }
}
