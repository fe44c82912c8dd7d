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

mod desk;
pub mod dispatch;
mod known;
pub mod runs;
pub mod settings;
mod waiting;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hestner_proto::v1;
use hestner_proto::words::{RunKind, Verb};
use tokio::sync::{Notify, mpsc, watch};

use crate::control::{self, ControlError};
use crate::heartbeat::Heart;
use crate::identity::{IdentityError, Keeper};
use crate::inventory::Inventory;
use crate::lifecycle::{Drain, Pulse, Tasks};
use crate::platform::backoff::random_u64;
use crate::platform::clock::SharedClock;
use crate::platform::files::{self, FileError};
use crate::platform::notify::Notifier;
use crate::platform::trust::{self, Distrust};
use crate::policy::{DAEMON_FOLDER, Policies};
use crate::report::{Report, Usage};
use crate::run::launcher::Launch;
use crate::scheduler::Scheduler;
use crate::session::{Link, Session};
use crate::store::{Store, StoreError};

use desk::Desk;
use dispatch::Dispatcher;
use known::Knowing;
pub use known::describe;
use runs::{Parts, Runs, Wish};
use settings::Settings;

/// Directives that wait for the dispatcher; the receiver keeps the others.
const DIRECTIVES_WAITING: usize = 64;
/// Calls of people that wait.
const CALLS_WAITING: usize = 32;
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
    /// Others could have written what the state folder holds, and some of it is run.
    #[error("the state folder is not believed")]
    Distrust(#[from] Distrust),
    /// Another daemon uses the state folder.
    #[error("another agent uses the state folder {0}")]
    StateInUse(PathBuf),
    /// The outbox cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The local socket cannot be bound.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// systemd cannot be told that the daemon is ready.
    #[error("cannot use the socket that NOTIFY_SOCKET names")]
    Manager(#[source] std::io::Error),
    /// There are no random numbers.
    #[error("no random numbers")]
    Random(#[from] getrandom::Error),
}

/// A daemon with everything open and nothing started.
pub struct Bound {
    settings: Settings,
    settings_path: PathBuf,
    launch: Launch,
    keeper: Keeper,
    server_id: i64,
    store: Store,
    control: control::Listener,
    clock: SharedClock,
    manager: Arc<Notifier>,
    _state: files::Lock,
}

/// Opens everything. `runner_socket` is where systemd starts runners; without one the daemon starts them.
///
/// # Errors
/// [`StartError`]; then nothing was started.
pub async fn build(
    settings: Settings,
    settings_path: &Path,
    runner_socket: Option<PathBuf>,
    clock: SharedClock,
) -> Result<Bound, StartError> {
    let own = settings.state_dir.join(DAEMON_FOLDER);
    files::private_folder(&own)?;
    trust::check(&own)?;
    let state = files::try_lock(&own.join("lock"))?;
    let Some(state) = state else { return Err(StartError::StateInUse(settings.state_dir.clone())) };
    let keeper = Keeper::of(&settings.state_dir);
    let server_id = keeper.load()?.id.server_id;
    let epoch = format!("{:016x}{:016x}", random_u64()?, random_u64()?);
    let store = Store::open(&own.join("agent.db"), &epoch)?;
    let control = control::bind(&settings.socket).await?;
    let manager = Arc::new(Notifier::from_environment().map_err(StartError::Manager)?);
    let settings_path = std::path::absolute(settings_path).unwrap_or_else(|_| settings_path.to_owned());
    let launch = match runner_socket {
        Some(socket) => Launch::Socket(socket),
        None => Launch::Process { config: settings_path.clone() },
    };
    Ok(Bound { settings, settings_path, launch, keeper, server_id, store, control, clock, manager, _state: state })
}

impl Bound {
    /// Starts the tasks and runs until the process is told to stop.
    ///
    /// # Errors
    /// [`crate::lifecycle::Unclean`], when anything but an orderly stop happened.
    pub async fn run(self) -> Result<(), crate::lifecycle::Unclean> {
        let tasks = Tasks::default();
        let drain = tasks.drain();
        let (heartbeat_tx, heartbeat) = watch::channel(v1::Heartbeat::default());
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
        let Self { settings, settings_path, launch, keeper, server_id, store, control, clock, manager, _state } = self;
        let knowing = Knowing::new(settings.clone(), settings_path.clone(), launch.clone());
        let separated = launch.is_separated();
        let runs = Runs::new(Parts {
            settings_path: settings_path.clone(),
            launch: launch.clone(),
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
                let knowing = knowing.clone();
                move || knowing.clone().known()
            },
            latest: inventory_tx,
        };
        let scheduler = Scheduler {
            server_id,
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
            separated,
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
            pulse: tasks.pulse("session"),
        };
        let desk =
            Desk { knowing, launch, keeper, policies, store: store.clone(), runs: runs.clone(), runs_active, link };
        // Before anybody can ask for a run of the same service.
        runs.resume_waiting().await;
        let recovery = runs.clone();
        tasks.spawn_ending(async move { recovery.recover().await });
        tasks.spawn("heart", heart.run(tasks.pulse("heart"), drain.clone()));
        tasks.spawn("inventory", inventory_task.run(tasks.pulse("inventory"), drain.clone()));
        tasks.spawn("scheduler", scheduler.run(tasks.pulse("scheduler"), drain.clone()));
        tasks.spawn("dispatch", dispatcher.run(tasks.pulse("dispatch"), drain.clone()));
        tasks.spawn("session", session.run(drain.clone()));
        tasks.spawn("control", control.run(calls_tx, tasks.pulse("control"), tasks.clone(), drain.clone()));
        tasks.spawn("desk", desk.run(calls, tasks.pulse("desk"), tasks.clone(), drain.clone()));
        tasks.spawn("wishes", take_wishes(wishes, runs, tasks.pulse("wishes"), drain.clone()));
        tasks.spawn("usage", keep_usage(usage, (store, clock, outbox_grew), tasks.pulse("usage"), drain));
        if !separated {
            tracing::warn!(
                event = "separation_off",
                "daemon and runner run as the same user: this agent was not started by its systemd units"
            );
        }
        tracing::info!(event = "ready", separated, socket = %settings.socket.display(), receiver = settings.receiver.address);
        tasks.spawn(
            "watchdog",
            tasks.clone().watch_over(manager.watchdog(), {
                let manager = Arc::clone(&manager);
                move || manager.alive()
            }),
        );
        manager.ready();
        tasks.run_until_stopped(|| manager.stopping()).await
    }
}

async fn take_wishes(mut wishes: mpsc::Receiver<String>, runs: Runs, mut pulse: Pulse, drain: Drain) {
    loop {
        let service = tokio::select! {
            () = drain.cancelled() => return,
            Some(service) = pulse.rest(wishes.recv()) => service,
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
    (store, clock, grew): (Store, SharedClock, Arc<Notify>),
    mut pulse: Pulse,
    drain: Drain,
) {
    loop {
        let hour = tokio::select! {
            () = drain.cancelled() => return,
            Some(hour) = pulse.rest(usage.recv()) => hour,
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
