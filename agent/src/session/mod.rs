//! The agent's one stream to the receiver, over mutual TLS.
//!
//! Inputs: the outbox (through the store), the latest heartbeat and inventory, progress of runs. Outputs:
//! directives, and the state of the link. A report is sent only from the outbox and forgotten only when
//! the receiver has acknowledged it; everything else is of the moment and may be lost with the stream.
//!
//! It never decides what a directive leads to, and it never deletes an identity because it was rejected.

mod stream;

use std::sync::Arc;
use std::time::Duration;

use hestner_proto::v1;
use serde::Deserialize;
use tokio::sync::{Notify, mpsc, watch};
use toml_example::TomlExample;
use tonic::transport::Endpoint;

use crate::identity::{Identity, IdentityError, Keeper};
use crate::lifecycle::{Drain, Pulse};
use crate::platform::backoff::{Backoff, random_u64};
use crate::platform::chain;
use crate::platform::clock::SharedClock;
use crate::platform::command::printable;
use crate::store::{Store, StoreError};
use crate::tls::{self, Dialer, TlsError};

/// Delay after the first failure, at most.
const BACKOFF_BASE: Duration = Duration::from_secs(1);
/// Longest pause that a receiver can ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// HTTP/2 pings, so that a dead link is noticed by this side.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Settings of the link to the receiver.
#[derive(Clone, Debug, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where agents' sessions are taken: host and port.
    #[toml_example(default = "receiver.example:7443")]
    pub address: String,
    /// Where hosts enrol: host and port.
    #[toml_example(default = "receiver.example:7444")]
    pub enrolment_address: String,
    /// Longest pause between two tries to connect; each is drawn at random below it. 1,000 agents that come
    /// back together then connect at about 30 a second.
    #[serde(with = "humantime_serde")]
    #[toml_example(default = "60s")]
    pub retry_max: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            address: "receiver.example:7443".to_owned(),
            enrolment_address: "receiver.example:7444".to_owned(),
            retry_max: Duration::from_secs(60),
        }
    }
}

/// Whether the stream stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// It does.
    pub connected: bool,
    /// Why not, as far as it is known.
    pub because: String,
    /// How far our clock is ahead of the receiver's, in milliseconds, as of the last session.
    pub skew_ms: Option<i64>,
    /// Fingerprint of what the receiver takes for the company's recovery key, as of the last session; empty while it has
    /// named none. It is never followed.
    pub recovery_key_named: String,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// There is no identity to show.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The connection could not be made.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where to.
        address: String,
        /// Why not.
        #[source]
        source: tonic::transport::Error,
    },
    /// The stream broke.
    #[error("the stream broke")]
    Stream(#[source] Box<tonic::Status>),
    /// The receiver ended the session.
    #[error("the receiver ended the session ({code}): {message}")]
    Goodbye {
        /// Stable code.
        code: String,
        /// Why.
        message: String,
        /// How long to stay away; zero leaves it to us.
        retry_after: Duration,
    },
    /// The receiver did not begin with a welcome.
    #[error("the receiver did not say welcome")]
    NoWelcome,
    /// The outbox cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are no random numbers.
    #[error("no random numbers")]
    Random(#[from] getrandom::Error),
}

/// The task.
pub struct Session {
    /// Its settings.
    pub settings: Settings,
    /// Whether daemon and runner are separate units with separate privileges.
    pub separated: bool,
    /// Who we are.
    pub keeper: Keeper,
    /// Outbox.
    pub store: Store,
    /// The clock.
    pub clock: SharedClock,
    /// Rung when the outbox has grown.
    pub outbox_grew: Arc<Notify>,
    /// The latest heartbeat.
    pub heartbeat: watch::Receiver<v1::Heartbeat>,
    /// The latest inventory.
    pub inventory: watch::Receiver<Option<Arc<v1::Inventory>>>,
    /// Progress of runs, of the moment.
    pub progress: watch::Receiver<Option<v1::Progress>>,
    /// How many runs go on.
    pub runs_active: watch::Receiver<usize>,
    /// Where directives go.
    pub directives: mpsc::Sender<v1::Directive>,
    /// Whether the stream stands.
    pub link: watch::Sender<Link>,
    /// Its sign of life.
    pub pulse: Pulse,
}

impl Session {
    /// Connects again and again until the drain.
    pub async fn run(mut self, drain: Drain) {
        let mut backoff = Backoff::new(BACKOFF_BASE, self.settings.retry_max);
        let mut use_next = true;
        loop {
            let began = tokio::time::Instant::now();
            let ended = tokio::select! {
                () = drain.cancelled() => return,
                ended = self.connect_and_talk(use_next) => ended,
            };
            // A certificate that was just renewed is shown next; one that does not work takes turns with the old one.
            use_next = ended.is_ok() || !use_next;
            // A stream that stood for longer than the longest pause counts as a success.
            if began.elapsed() > self.settings.retry_max {
                backoff.reset();
            }
            let pause = self.pause_after(ended, &mut backoff);
            tokio::select! {
                () = drain.cancelled() => return,
                () = self.pulse.rest(tokio::time::sleep(pause)) => {}
            }
        }
    }

    fn pause_after(&self, ended: Result<(), SessionError>, backoff: &mut Backoff) -> Duration {
        let own = random_u64().map_or(self.settings.retry_max, |random| backoff.next_delay(random));
        let (because, pause) = match ended {
            Ok(()) => ("the certificate was renewed".to_owned(), Duration::ZERO),
            Err(error @ SessionError::Goodbye { retry_after, .. }) => {
                (printable(chain(&error).as_bytes()), own.max(retry_after.min(RETRY_AFTER_MAX)))
            }
            Err(error) => (printable(chain(&error).as_bytes()), own),
        };
        tracing::warn!(event = "session_ended", because, retry_in_ms = pause.as_millis());
        self.link.send_modify(|link| (link.connected, link.because) = (false, because));
        pause
    }

    /// One stream, from the handshake to its end. `Ok`: it ended in order to show a renewed certificate.
    async fn connect_and_talk(&mut self, use_next: bool) -> Result<(), SessionError> {
        let next = self.keeper.load_next().filter(|_| use_next);
        let is_next = next.is_some();
        let identity = match next {
            Some(identity) => identity,
            None => self.keeper.load()?,
        };
        let channel = self.pulse.rest(connect(&self.settings.address, &identity)).await?;
        stream::Stream::open(self, channel, identity, is_next).await?.talk().await
    }
}

async fn connect(address: &str, identity: &Identity) -> Result<tonic::transport::Channel, SessionError> {
    let (ca, own, key) = identity.for_tls();
    let dialer = Dialer::new(address, tls::mutual(ca, own, key)?)?;
    let connector = tower::service_fn(move |_| dialer.clone().connect());
    // The address that is dialled is the dialer's; this one only fills the request's authority.
    let endpoint = Endpoint::from_static("http://receiver")
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    let connected = endpoint.connect_with_connector(connector).await;
    connected.map_err(|source| SessionError::Connect { address: address.to_owned(), source })
}
