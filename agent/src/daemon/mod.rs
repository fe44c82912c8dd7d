//! Wires the daemon together: opens everything, then starts the tasks.
//!
//! | task | hears | tells |
//! | --- | --- | --- |
//! | `session` | outbox, heartbeat, inventory, progress | directives, state of the link |
//! | `dispatch` | directives | runs, policies |
//! | `scheduler` | policies | runs |
//! | `control` | people on the host | runs, status |
//! | `heart` | the host | heartbeat, usage |
//! | `inventory` | the host | inventory |
//!
//! [`build`] spawns nothing, so that an error leaves no half daemon; ready means that the outbox is open
//! and the settings are valid, not that the receiver can be reached. Nothing is decided here.

pub mod dispatch;
pub mod runs;
pub mod settings;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hestner_proto::v1;
use hestner_proto::words::{RunKind, Verb};
use tokio::sync::{Notify, mpsc, watch};

use crate::control::{self, Answer, Call, ControlError};
use crate::freeze::PointPlan;
use crate::heartbeat::{Heart, Sample};
use crate::identity::{IdentityError, Keeper};
use crate::inventory::{Inventory, Known};
use crate::lifecycle::{Drain, Tasks};
use crate::platform::backoff::random_u64;
use crate::platform::clock::SharedClock;
use crate::platform::files::{self, FileError};
use crate::policy::{Policies, ServiceSettings, SourceKind};
use crate::report::{Report, RunRecord, Usage};
use crate::repository::{Location, Mode};
use crate::run::launcher::Runner;
use crate::run::messages::{Event, Request};
use crate::run::plan::read_grants;
use crate::scheduler::Scheduler;
use crate::session::{Link, Session};
use crate::status::{RepositoryStatus, ServiceStatus, Status};
use crate::store::{Store, StoreError};

use dispatch::Dispatcher;
use runs::{Heard, Parts, Runs, Wish};
use settings::Settings;

/// Directives that wait for the dispatcher; the receiver keeps the others.
const DIRECTIVES_WAITING: usize = 64;
/// Calls of people that wait.
const CALLS_WAITING: usize = 32;
/// What a follower of a run may leave unread.
const HEARD_WAITING: usize = 32;
/// Directives are remembered for a week after they expired, in case a clock is set back.
const INBOX_KEPT_MS: i64 = 7 * 24 * 3600 * 1000;

/// The daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There is no identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The state folder cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another daemon uses the state folder.
    #[error("another agent uses the state folder {0}")]
    StateInUse(PathBuf),
    /// The outbox cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The local socket cannot be bound.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// There are no random numbers.
    #[error("no random numbers")]
    Random(#[from] getrandom::Error),
}

/// A daemon with everything open and nothing started.
pub struct Bound {
    settings: Settings,
    settings_path: PathBuf,
    keeper: Keeper,
    store: Store,
    control: control::Listener,
    clock: SharedClock,
    _state: files::Lock,
}

/// Opens everything.
///
/// # Errors
/// [`StartError`]; then nothing was started.
pub async fn build(settings: Settings, settings_path: &Path, clock: SharedClock) -> Result<Bound, StartError> {
    files::private_folder(&settings.state_dir)?;
    let state = files::try_lock(&settings.state_dir.join("lock"))?;
    let Some(state) = state else { return Err(StartError::StateInUse(settings.state_dir.clone())) };
    let keeper = Keeper::of(&settings.state_dir);
    keeper.load()?;
    let epoch = format!("{:016x}{:016x}", random_u64()?, random_u64()?);
    let store = Store::open(&settings.state_dir.join("agent.db"), &epoch)?;
    let control = control::bind(&settings.socket).await?;
    let settings_path = std::path::absolute(settings_path).unwrap_or_else(|_| settings_path.to_owned());
    Ok(Bound { settings, settings_path, keeper, store, control, clock, _state: state })
}

impl Bound {
    /// Starts the tasks and runs until the process is told to stop.
    ///
    /// # Errors
    /// [`crate::lifecycle::Unclean`], when anything but an orderly stop happened.
    pub async fn run(self) -> Result<(), crate::lifecycle::Unclean> {
        let tasks = Tasks::default();
        let drain = tasks.drain();
        let (heartbeat_tx, heartbeat) = watch::channel(Sample::default());
        let (inventory_tx, inventory) = watch::channel(None);
        let (progress_tx, progress) = watch::channel(None);
        let (active_tx, runs_active) = watch::channel(0);
        let (link_tx, link) = watch::channel(Link::default());
        let (directives_tx, directives) = mpsc::channel(DIRECTIVES_WAITING);
        let (wishes_tx, wishes) = mpsc::channel(DIRECTIVES_WAITING);
        let (usage_tx, usage) = mpsc::channel(1);
        let (calls_tx, calls) = mpsc::channel(CALLS_WAITING);
        let (outbox_grew, policies_changed) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let policies = Policies::of(&self.settings.state_dir);
        let Self { settings, settings_path, keeper, store, control, clock, _state } = self;
        let runs = Runs::new(Parts {
            settings_path: settings_path.clone(),
            state_dir: settings.state_dir.clone(),
            limits: settings.limits.clone(),
            store: store.clone(),
            clock: clock.clone(),
            tasks: tasks.clone(),
            outbox_grew: outbox_grew.clone(),
            progress: progress_tx,
            active: active_tx,
        });
        let heart =
            Heart { settings: settings.heartbeat.clone(), clock: clock.clone(), latest: heartbeat_tx, usage: usage_tx };
        let inventory_task = Inventory {
            settings: settings.inventory.clone(),
            known: {
                let (settings, path) = (settings.clone(), settings_path.clone());
                move || known(settings.clone(), path.clone())
            },
            latest: inventory_tx,
        };
        let scheduler = Scheduler {
            services: settings.services.iter().map(|s| (s.name.clone(), seed(&keeper, &s.name))).collect(),
            policies: policies.clone(),
            store: store.clone(),
            clock: clock.clone(),
            changed: policies_changed.clone(),
            wishes: wishes_tx,
        };
        let dispatcher = Dispatcher {
            settings_path: settings_path.clone(),
            policies: policies.clone(),
            store: store.clone(),
            clock: clock.clone(),
            runs: runs.clone(),
            policies_changed,
            outbox_grew: outbox_grew.clone(),
            directives,
        };
        let session = Session {
            settings: settings.receiver.clone(),
            keeper: keeper.clone(),
            store: store.clone(),
            clock: clock.clone(),
            outbox_grew: outbox_grew.clone(),
            heartbeat,
            inventory,
            progress,
            runs_active: runs_active.clone(),
            directives: directives_tx,
            link: link_tx,
        };
        let desk = Desk {
            settings: settings.clone(),
            settings_path,
            keeper,
            policies,
            store: store.clone(),
            runs: runs.clone(),
            runs_active,
            link,
        };
        let recovery = runs.clone();
        tasks.spawn_ending(async move { recovery.recover().await });
        tasks.spawn("heart", heart.run(drain.clone()));
        tasks.spawn("inventory", inventory_task.run(drain.clone()));
        tasks.spawn("scheduler", scheduler.run(drain.clone()));
        tasks.spawn("dispatch", dispatcher.run(drain.clone()));
        tasks.spawn("session", session.run(drain.clone()));
        tasks.spawn("control", control.run(calls_tx, tasks.clone(), drain.clone()));
        tasks.spawn("desk", desk.run(calls, tasks.clone(), drain.clone()));
        tasks.spawn("wishes", take_wishes(wishes, runs, drain.clone()));
        tasks.spawn("usage", keep_usage(usage, store, clock, outbox_grew, drain));
        tracing::warn!(
            event = "separation_off",
            "daemon and runner run as the same user: this agent was not started by its systemd units"
        );
        tracing::info!(event = "ready", socket = %settings.socket.display(), receiver = settings.receiver.address);
        tasks.run_until_stopped().await
    }
}

/// Spreads servers that have the same schedule.
fn seed(keeper: &Keeper, service: &str) -> u64 {
    let server = keeper.load().map_or(0, |identity| identity.id.server_id);
    let hash = hestner_proto::sha256_hex(format!("{server}/{service}").as_bytes());
    u64::from_str_radix(&hash[..16], 16).unwrap_or(0)
}

async fn take_wishes(mut wishes: mpsc::Receiver<String>, runs: Runs, drain: Drain) {
    loop {
        let service = tokio::select! {
            () = drain.cancelled() => return,
            Some(service) = wishes.recv() => service,
        };
        let wish = Wish { service, verb: Verb::Snapshot.to_string(), kind: RunKind::Cron, directive_id: String::new() };
        let name = wish.service.clone();
        if let Err(failure) = runs.start(wish, None).await {
            // An overlap is skipped: the run in progress is the newer one's equal.
            tracing::warn!(event = "schedule_skipped", service = name, error_class = %failure.class, error = failure.message);
        }
    }
}

async fn keep_usage(
    mut usage: mpsc::Receiver<Usage>,
    store: Store,
    clock: SharedClock,
    grew: Arc<Notify>,
    drain: Drain,
) {
    loop {
        let hour = tokio::select! {
            () = drain.cancelled() => return,
            Some(hour) = usage.recv() => hour,
        };
        match store.append(Report::Usage(hour).encode(clock.now_ms())).await {
            Ok(_) => grew.notify_one(),
            Err(error) => tracing::error!(event = "usage_not_kept", error = %error),
        }
        if let Err(error) = store.forget_expired(clock.now_ms() - INBOX_KEPT_MS).await {
            tracing::warn!(event = "inbox_not_tidied", error = %error);
        }
    }
}

/// What the inventory tells of the settings, read anew each time.
async fn known(fallback: Settings, path: PathBuf) -> Known {
    let settings = Settings::read(&path).unwrap_or(fallback);
    let mut services = Vec::new();
    for service in &settings.services {
        services.push((service.clone(), reach(service, &settings).await));
    }
    let grants = read_grants(&settings.grants).unwrap_or_default();
    let grant = |(service, verb, value): (&str, Verb, hestner_proto::words::GrantValue)| v1::Grant {
        service: service.to_owned(),
        verb: verb.to_string(),
        value: value.to_string(),
    };
    Known {
        services,
        destinations: settings.destinations.iter().map(|d| d.name.clone()).collect(),
        grants: grants.iter().map(grant).collect(),
    }
}

/// The best consistency that a service can reach here; empty when its source cannot be reached at all.
async fn reach(service: &ServiceSettings, settings: &Settings) -> String {
    if service.source.kind == SourceKind::Command {
        return hestner_proto::words::Consistency::Application.to_string();
    }
    let source = &service.source;
    match PointPlan::of(&source.paths, &source.exclude, "inventory", &settings.freeze).await {
        Ok(point) => point.consistency(!service.hooks.is_empty()).to_string(),
        Err(_) => String::new(),
    }
}

/// Answers people on the host.
#[derive(Clone)]
struct Desk {
    settings: Settings,
    settings_path: PathBuf,
    keeper: Keeper,
    policies: Policies,
    store: Store,
    runs: Runs,
    runs_active: watch::Receiver<usize>,
    link: watch::Receiver<Link>,
}

impl Desk {
    async fn run(self, mut calls: mpsc::Receiver<Call>, tasks: Tasks, drain: Drain) {
        loop {
            let call = tokio::select! {
                () = drain.cancelled() => return,
                Some(call) = calls.recv() => call,
            };
            let desk = self.clone();
            tasks.spawn_ending(async move { desk.answer(call).await });
        }
    }

    async fn answer(&self, Call { request, answers }: Call) {
        let last = match request {
            control::Request::Status => Answer::Status(Box::new(self.status().await)),
            control::Request::Runs { limit } => self.list(limit).await,
            control::Request::Plan { service } => self.plan(service).await,
            control::Request::Snapshot { service } => return self.snapshot(service, answers).await,
        };
        // A caller that has left needs no answer.
        let _ = answers.send(last).await;
    }

    async fn list(&self, limit: u32) -> Answer {
        match self.store.newest_runs(limit).await {
            Ok(rows) => Answer::Runs(
                rows.iter().filter_map(|row| serde_json::from_str::<RunRecord>(&row.record).ok()).collect(),
            ),
            Err(error) => refused("state_unusable", &error.to_string(), "look at the state folder's disk"),
        }
    }

    async fn plan(&self, service: String) -> Answer {
        let event = match Runner::launch(&self.settings_path, &Request::Plan { service }).await {
            Ok(mut runner) => runner.next().await,
            Err(error) => return refused("runner_not_started", &error.to_string(), "read the agent's log"),
        };
        match event {
            Some(Event::Planned(lines)) => Answer::Plan(lines),
            Some(Event::Finished(end)) => Answer::Ended(Box::new(end.record)),
            _ => refused("runner_not_started", "the runner ended without an answer", "read the agent's log"),
        }
    }

    async fn snapshot(&self, service: String, answers: mpsc::Sender<Answer>) {
        let wish =
            Wish { service, verb: Verb::Snapshot.to_string(), kind: RunKind::Manual, directive_id: String::new() };
        let (follower, mut heard) = mpsc::channel(HEARD_WAITING);
        let run_uid = match self.runs.start(wish, Some(follower)).await {
            Ok(run_uid) => run_uid,
            Err(failure) => {
                let _ =
                    answers.send(refused(failure.class.as_str(), &failure.message, failure.class.next_step())).await;
                return;
            }
        };
        let mut next = Some(Answer::Started { run_uid });
        while let Some(answer) = next {
            // A caller that has left does not end the run.
            if answers.send(answer).await.is_err() {
                return;
            }
            next = heard.recv().await.map(|heard| match heard {
                Heard::Progress(p) => Answer::Progress {
                    phase: p.phase,
                    bytes: (p.bytes_done, p.bytes_total),
                    files: (p.files_done, p.files_total),
                    seconds_remaining: p.seconds_remaining,
                },
                Heard::Ended(record) => Answer::Ended(record),
            });
        }
    }

    async fn status(&self) -> Status {
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            runs_active: *self.runs_active.borrow(),
            separated: false,
            ..Status::default()
        };
        let link = self.link.borrow().clone();
        (status.connected, status.disconnected_because) = (link.connected, link.because);
        match self.store.waiting().await {
            Ok(waiting) => status.outbox_reports = waiting,
            Err(error) => status.problems.push(error.to_string()),
        }
        // The runner reads the settings anew for each run, so this does as well.
        let settings = Settings::read(&self.settings_path).unwrap_or_else(|error| {
            status.problems.push(error.to_string());
            self.settings.clone()
        });
        if let Err(failure) = read_grants(&settings.grants) {
            status.problems.push(failure.message);
        }
        for service in &settings.services {
            let policy = self.policies.load(&service.name).ok().flatten();
            status.services.push(ServiceStatus {
                name: service.name.clone(),
                consistency: reach(service, &settings).await,
                destination: policy.as_ref().map_or(service.destination.clone(), |p| p.destination.clone()),
                cron: policy.map(|p| p.cron).unwrap_or_default(),
            });
        }
        if let Ok(identity) = self.keeper.load() {
            status.enrolled = true;
            (status.company_id, status.server_id) = (identity.id.company_id, identity.id.server_id);
            status.certificate_expires_at_ms = identity.not_after.timestamp_millis();
            status.repositories = repositories(&settings, identity.id.server_id);
        }
        status
    }
}

fn refused(code: &str, message: &str, next_step: &str) -> Answer {
    Answer::Refused { code: code.to_owned(), message: message.to_owned(), next_step: next_step.to_owned() }
}

/// Repositories that exist.
fn repositories(settings: &Settings, server_id: i64) -> Vec<RepositoryStatus> {
    let all = settings.destinations.iter().flat_map(|d| [Mode::Encrypted, Mode::Open].map(|mode| (d, mode)));
    let located =
        all.map(|(d, mode)| (mode, Location::new(d, mode, server_id, &settings.state_dir, &settings.repository)));
    let existing = located.filter(|(_, location)| location.path().join("config").exists());
    let status = |(mode, location): (Mode, Location)| RepositoryStatus {
        path: location.path().display().to_string(),
        password_file: location.password_file().display().to_string(),
        mode: mode.as_str().to_owned(),
        destination: location.destination,
    };
    existing.map(status).collect()
}
