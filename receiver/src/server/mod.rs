//! Wiring: settings become parts, parts become a [`Bound`] with true addresses, and that runs until the drain.
//!
//! [`build`] opens everything and spawns nothing; when it fails, nothing has begun. Tests start the same
//! `build`. The addresses stand in `STATE/addresses.json` while it runs. No decisions are made here.

pub mod settings;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::agent_api::{self, AgentsDoor, EnrolmentDoor};
use crate::auth::Auth;
use crate::ca::listener::{ListenerCertificates, mutual_tls, server_tls};
use crate::ca::{self, Authority};
use crate::costs::Costs;
use crate::enrolment::{Enrolment, Rules};
use crate::fleet::Fleet;
use crate::fleet::housekeeping::Housekeeping;
use crate::ingest::heartbeats::Flusher;
use crate::ingest::{self, Worker};
use crate::lifecycle::{Drain, Tasks};
use crate::model::counters::{Counters, SharedCounters};
use crate::platform::clock::SharedClock;
use crate::platform::files;
use crate::platform::notify::Notifier;
use crate::platform::tls::Listener;
use crate::sessions::Sessions;
use crate::store::{self, Store};
use crate::{metrics, rest};
use settings::Checked;

/// Name of the file that tells the bound addresses.
pub const ADDRESSES_FILE: &str = "addresses.json";

/// Name of the file that keeps a second `serve` off the same state.
const LOCK_FILE: &str = "serve.lock";

/// Why the receiver did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state folder or a file in it.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] ca::Error),
    /// Another `serve` works on the same state.
    #[error("another receiver serves {0} already")]
    AlreadyServed(PathBuf),
    /// A listener.
    #[error("cannot listen on {address} for {listener}")]
    Listen {
        /// What it is for.
        listener: &'static str,
        /// Where.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// What the command line and `serve` both work with.
pub struct Opened {
    /// The authority.
    pub authority: Arc<Authority>,
    /// The store.
    pub store: Store,
    /// Enrolment, for tokens.
    pub enrolment: Enrolment,
    /// The fleet.
    pub fleet: Fleet,
    /// API keys.
    pub auth: Auth,
    sessions: Sessions,
    counters: SharedCounters,
}

/// Opens the state folder: authority, store and the work on it. Makes what is missing.
///
/// # Errors
/// See [`Error`].
pub async fn open(settings: &Checked, clock: &SharedClock) -> Result<Opened, Error> {
    files::make_private_folder(&settings.state_dir)?;
    let authority = Arc::new(Authority::open(&settings.state_dir, &settings.trust_domain, clock.now_ms())?);
    let store = Store::open(&settings.state_dir).await?;
    let sessions = Sessions::default();
    let counters: SharedCounters = Arc::new(Counters::default());
    let rules = Rules { trust_domain: settings.trust_domain.clone(), certificate_life: settings.certificate_life };
    let enrolment = Enrolment::new(
        store.clone(),
        Arc::clone(&authority),
        sessions.clone(),
        rules,
        Arc::clone(clock),
        Arc::clone(&counters),
    );
    let fleet = Fleet::new(store.clone(), sessions.clone(), Arc::clone(clock), Arc::clone(&counters));
    let auth = Auth::new(store.clone());
    Ok(Opened { authority, store, enrolment, fleet, auth, sessions, counters })
}

/// Addresses that listeners are bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Addresses {
    /// Sessions.
    pub agents: SocketAddr,
    /// Enrolment.
    pub enrolment: SocketAddr,
    /// REST.
    pub rest: SocketAddr,
}

/// A receiver that holds its sockets and has not begun.
pub struct Bound {
    addresses: Addresses,
    opened: Opened,
    settings: Checked,
    clock: SharedClock,
    agents: Listener,
    enrolment: Listener,
    rest: Listener,
    lock: files::Lock,
}

/// Opens everything that the receiver needs and binds its listeners.
///
/// # Errors
/// See [`Error`].
pub async fn build(settings: Checked, clock: SharedClock) -> Result<Bound, Error> {
    files::make_private_folder(&settings.state_dir)?;
    let lock = files::try_lock(&settings.state_dir.join(LOCK_FILE))?;
    let lock = lock.ok_or_else(|| Error::AlreadyServed(settings.state_dir.clone()))?;
    // One that a killed receiver left behind names ports that are others' by now.
    files::remove(&settings.state_dir.join(ADDRESSES_FILE))?;
    let opened = open(&settings, &clock).await?;
    let certificates =
        ListenerCertificates::new(Arc::clone(&opened.authority), settings.names.clone(), Arc::clone(&clock))?;
    let mutual = mutual_tls(Arc::clone(&certificates))?;
    let enrolling = server_tls(Arc::clone(&certificates), &["h2"])?;
    let https = if settings.plain_http { None } else { Some(server_tls(certificates, &["h2", "http/1.1"])?) };
    let (agents, agents_at) = bind("agents", settings.agents).await?;
    let (enrolment, enrolment_at) = bind("enrolment", settings.enrolment).await?;
    let (rest, rest_at) = bind("rest", settings.rest).await?;
    Ok(Bound {
        addresses: Addresses { agents: agents_at, enrolment: enrolment_at, rest: rest_at },
        opened,
        settings,
        clock,
        agents: Listener::new(agents, Some(mutual)),
        enrolment: Listener::new(enrolment, Some(enrolling)),
        rest: Listener::new(rest, https),
        lock,
    })
}

async fn bind(listener: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |source| Error::Listen { listener, address, source };
    let socket = TcpListener::bind(address).await.map_err(failed)?;
    let bound = socket.local_addr().map_err(failed)?;
    Ok((socket, bound))
}

impl Bound {
    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The state that it works on; for tests and the start's log line.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Path of the file that tells the addresses.
    pub fn addresses_file(&self) -> PathBuf {
        self.settings.state_dir.join(ADDRESSES_FILE)
    }

    /// Starts everything. The address file is written last: whoever reads it can connect.
    ///
    /// # Errors
    /// When the address file cannot be written; then the caller drains what was started.
    pub fn start(self, drain: Drain) -> Result<Running, Error> {
        let addresses_file = self.addresses_file();
        let tasks = Tasks::new(drain);
        let Self { addresses, opened, settings, clock, agents, enrolment, rest, lock } = self;
        let Opened { sessions, counters, store, fleet, auth, enrolment: enrol, .. } = opened;
        let (inlet, worker) =
            ingest::new(store.clone(), sessions.clone(), settings.card.clone(), clock.clone(), counters.clone());
        let (flusher, pulse) =
            Flusher::new(store.clone(), sessions.clone(), settings.flush_interval, clock.clone(), counters.clone());
        spawn_work(&tasks, worker, flusher, &fleet, &enrol);

        let parts = agent_api::Parts {
            enrolment: enrol.clone(),
            inlet: inlet.clone(),
            fleet: fleet.clone(),
            sessions: sessions.clone(),
            heartbeat_interval: settings.heartbeat_interval,
            tasks: tasks.clone(),
            clock: clock.clone(),
            counters: counters.clone(),
        };
        tasks.spawn("agents", agent_api::serve_agents(AgentsDoor::new(parts), agents, tasks.clone()));
        let door = EnrolmentDoor::new(enrol, settings.attempts_per_minute);
        tasks.spawn("enrolment", agent_api::serve_enrolment(door, enrolment, tasks.clone()));

        let costs = Costs::new(store.clone(), settings.card.currency.clone(), clock);
        let state =
            rest::State { auth: auth.clone(), fleet: fleet.clone(), costs, inlet, pulse, counters: counters.clone() };
        let pages = metrics::Metrics { auth, fleet, sessions, counters };
        let app = rest::app(state, metrics::router(pages));
        tasks.spawn("rest", rest::serve(app, rest, tasks.clone()));

        let text = serde_json::to_string(&addresses).unwrap_or_default();
        files::write_atomically(&addresses_file, text.as_bytes(), 0o644)?;
        Ok(Running { tasks, store, addresses_file, _lock: lock })
    }
}

fn spawn_work(tasks: &Tasks, worker: Worker, flusher: Flusher, fleet: &Fleet, enrolment: &Enrolment) {
    let drain = || tasks.drain().clone();
    tasks.spawn("ingest", worker.run(tasks.pulse("ingest"), drain()));
    tasks.spawn("flush", flusher.run(tasks.pulse("flush"), drain()));
    tasks.spawn("housekeeping", Housekeeping::new(fleet.clone()).run(tasks.pulse("housekeeping"), drain()));
    tasks.spawn("standing", enrolment.clone().watch_standing(tasks.pulse("standing"), drain()));
}

/// A receiver that works.
pub struct Running {
    tasks: Tasks,
    store: Store,
    addresses_file: PathBuf,
    _lock: files::Lock,
}

impl Running {
    /// Tells the service manager that the receiver works, and from now on that it lives, until the drain.
    pub fn tell(&self, manager: &Arc<Notifier>) {
        let alive = Arc::clone(manager);
        let watch = self.tasks.clone().watch_over(manager.watchdog(), move || alive.alive());
        self.tasks.spawn("watchdog", watch);
        manager.ready();
    }

    /// Waits for the drain and then for the tasks; `cut_short` ends the waiting.
    ///
    /// # Errors
    /// The name of the task that ended before its time, if one did.
    pub async fn finish(self, cut_short: impl Future<Output = ()>) -> Result<(), &'static str> {
        self.tasks.drain().begun().await;
        let finished = self.tasks.finish(cut_short).await;
        // A reader that still finds the file would only fail to connect.
        if let Err(error) = files::remove(&self.addresses_file) {
            tracing::warn!(event = "addresses_left_behind", component = "server", error = %error, "cannot remove the address file");
        }
        self.store.close().await;
        finished
    }
}
