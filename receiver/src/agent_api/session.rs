//! One agent's session: hello and welcome, then heartbeats, inventory and reports in, acks and directives out.
//!
//! Inbox: the agent's stream, wake-ups and endings from the registry, the drain. Output: the stream back. A session
//! that is ended from outside ends at once, whatever it was doing: work that was not acknowledged comes again.
//! Reports are taken as many as wait, submitted together, and acknowledged only after their commit; while a
//! submission is under way nothing else is read, so a fast agent is held back at its own stream.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use hestner_proto::v1::agents_server::Agents;
use hestner_proto::v1::{self, from_agent, from_receiver};
use hestner_proto::{REPORTS_IN_FLIGHT_MAX, v1::FromReceiver};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::peer::Peer;
use crate::enrolment::Enrolment;
use crate::enrolment::admission::{Admitted, Refusal};
use crate::fleet::Fleet;
use crate::ingest::{self, Inlet, Origin};
use crate::lifecycle::Tasks;
use crate::model::counters::SharedCounters;
use crate::model::run::cut;
use crate::platform::causes::chain;
use crate::platform::clock::SharedClock;
use crate::sessions::{End, Sessions, Ticket};

/// How long an agent may take to say hello.
const HELLO_TIME_MAX: Duration = Duration::from_secs(10);
/// How long an agent may leave our messages unread.
const SEND_TIME_MAX: Duration = Duration::from_secs(30);
/// Messages that wait for the agent: acks and directives of one round.
const OUTBOX_MAX: usize = 64;
/// Inventories that come faster are held back; the newest counts. An agent sends one an interval of a second or more.
const INVENTORY_INTERVAL_MIN: Duration = Duration::from_secs(5);
/// An agent asks once a session, and looks once a minute whether it has to.
const RENEWAL_INTERVAL_MIN: Duration = Duration::from_secs(30);
/// Longest text of a hello that goes into the log, in bytes.
const VERSION_BYTES_MAX: usize = 64;
/// Longest name of an outbox, in bytes.
const EPOCH_BYTES_MAX: usize = 64;
/// How long a peer that was turned away may take to read why, before its connection is closed.
const GOODBYE_TIME: Duration = Duration::from_secs(1);
/// Heartbeats that may be missed.
const MISSED_HEARTBEATS_MAX: u32 = 3;

/// What all sessions share.
#[derive(Clone)]
#[expect(missing_docs, reason = "a bundle of handles, each described where it is made")]
pub struct Parts {
    pub enrolment: Enrolment,
    pub inlet: Inlet,
    pub fleet: Fleet,
    pub sessions: Sessions,
    pub heartbeat_interval: Duration,
    pub tasks: Tasks,
    pub clock: SharedClock,
    pub counters: SharedCounters,
}

/// The service behind the agents' listener. Cheap to clone.
#[derive(Clone)]
pub struct AgentsDoor(Arc<Parts>);

impl AgentsDoor {
    /// A door to `parts`.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    pub(super) fn enrolment(&self) -> Enrolment {
        self.0.enrolment.clone()
    }
}

type Outbound = Result<FromReceiver, Status>;

#[tonic::async_trait]
impl Agents for AgentsDoor {
    type SessionStream = ReceiverStream<Outbound>;

    async fn session(
        &self,
        request: Request<Streaming<v1::FromAgent>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = request.extensions().get::<Peer>().cloned().ok_or_else(|| Status::internal("no peer"))?;
        let (outbox, outbound) = mpsc::channel(OUTBOX_MAX);
        let line = Line { inbound: request.into_inner(), outbox };
        let parts = Arc::clone(&self.0);
        self.0.tasks.spawn_passing("session", begin(parts, peer, line));
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

/// Both directions of one stream.
struct Line {
    inbound: Streaming<v1::FromAgent>,
    outbox: mpsc::Sender<Outbound>,
}

/// Why a session ends.
enum Ending {
    /// The stream is gone, or the agent has ended it.
    Gone,
    /// We end it, and say why.
    Goodbye { code: &'static str, message: String, retry_after_seconds: u32 },
}

impl Ending {
    fn goodbye(code: &'static str, message: impl Into<String>) -> Self {
        Self::Goodbye { code, message: message.into(), retry_after_seconds: 0 }
    }

    /// Whether the peer has nothing more to say on its connection.
    fn turns_away(&self) -> bool {
        matches!(self, Self::Goodbye { code: "unknown" | "revoked" | "fork" | "protocol", .. })
    }
}

impl Line {
    /// Sends, or gives the session up when the agent does not read.
    async fn send(&self, body: from_receiver::Body) -> Result<(), Ending> {
        let message = Ok(FromReceiver { body: Some(body) });
        match tokio::time::timeout(SEND_TIME_MAX, self.outbox.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Ending::Gone),
        }
    }

    fn close(self, ending: Ending) {
        if let Ending::Goodbye { code, message, retry_after_seconds } = ending {
            let goodbye = v1::Goodbye { code: code.to_owned(), message, retry_after_seconds };
            // An agent that is gone or does not read cannot be told; it will be when it comes again.
            let _ = self.outbox.try_send(Ok(FromReceiver { body: Some(from_receiver::Body::Goodbye(goodbye)) }));
        }
    }

    async fn hello(&mut self) -> Result<v1::Hello, Ending> {
        match tokio::time::timeout(HELLO_TIME_MAX, self.inbound.message()).await {
            Ok(Ok(Some(v1::FromAgent { body: Some(from_agent::Body::Hello(hello)) }))) => Ok(hello),
            Ok(Ok(Some(_))) => Err(Ending::goodbye("bad_message", "the first message must be hello")),
            Ok(Ok(None) | Err(_)) => Err(Ending::Gone),
            Err(_) => Err(Ending::goodbye("bad_message", "no hello came in time")),
        }
    }

    /// A message that is there already, without waiting.
    async fn waiting(&mut self) -> Option<Result<Option<v1::FromAgent>, Status>> {
        // Cancel-safe: `message` keeps what it has read of a message in the stream.
        tokio::select! {
            biased;
            message = self.inbound.message() => Some(message),
            () = std::future::ready(()) => None,
        }
    }
}

async fn begin(parts: Arc<Parts>, peer: Peer, mut line: Line) {
    let ending = match admit(&parts, &peer, &mut line).await {
        Ok(session) => session.run(&mut line).await,
        Err(ending) => {
            parts.counters.sessions_refused.raise();
            if let Ending::Goodbye { code, message, .. } = &ending {
                tracing::warn!(event = "session_refused", component = "session", code, message, peer = %peer.address, "a session was refused");
            }
            ending
        }
    };
    let turned_away = ending.turns_away();
    line.close(ending);
    if turned_away {
        // Its place is for those who may speak; a connection that was kept could hold it for ever.
        tokio::time::sleep(GOODBYE_TIME).await;
        peer.hang_up();
    }
}

async fn admit(parts: &Arc<Parts>, peer: &Peer, line: &mut Line) -> Result<Session, Ending> {
    let certificate = peer.certificate.as_deref().unwrap_or_default();
    let identity = parts.enrolment.recognise(certificate);
    let identity = identity.map_err(|error| Ending::goodbye("unknown", error.to_string()))?;
    let hello = line.hello().await?;
    let admitted = parts.enrolment.admit(&identity, &hello).await.map_err(refused)?;
    let ticket = parts.sessions.open(admitted.server);
    parts.enrolment.still_admits(&identity).await.map_err(refused)?;
    let seconds = parts.heartbeat_interval.as_secs().max(1);
    line.send(from_receiver::Body::Welcome(v1::Welcome {
        now_ms: parts.clock.now_ms(),
        heartbeat_seconds: u32::try_from(seconds).unwrap_or(u32::MAX),
        inventory_wanted: admitted.inventory_wanted,
        recovery_fingerprint: admitted.recovery_fingerprint.clone(),
    }))
    .await?;
    parts.counters.sessions_opened.raise();
    tracing::info!(
        event = "session_opened", component = "session", tenant_id = %admitted.company, server_id = %admitted.server, peer = %peer.address,
        agent_version = cut(hello.agent_version, VERSION_BYTES_MAX), skew_ms = hello.now_ms.saturating_sub(parts.clock.now_ms()), "session"
    );
    let Admitted { server, company, .. } = admitted;
    let epoch = cut(hello.epoch, EPOCH_BYTES_MAX);
    let origin = Origin { server, company, peer: peer.address.to_string(), epoch, shown: 0 };
    Ok(Session {
        parts: Arc::clone(parts),
        identity,
        origin,
        ticket,
        delivered: HashSet::new(),
        inventory: None,
        inventory_at: Instant::now(),
        renewed_at: None,
    })
}

fn refused(refusal: Refusal) -> Ending {
    if let Refusal::Failed(error) = &refusal {
        tracing::error!(
            event = "admission_failed",
            component = "session",
            error = chain(error),
            "cannot decide on a session"
        );
        return Ending::goodbye(refusal.code(), "the receiver could not decide");
    }
    Ending::goodbye(refusal.code(), refusal.to_string())
}

struct Session {
    parts: Arc<Parts>,
    identity: crate::enrolment::admission::Identity,
    origin: Origin,
    ticket: Ticket,
    /// Directives handed to this session, as far as they are still open.
    delivered: HashSet<String>,
    /// The newest inventory that is not stored yet.
    inventory: Option<v1::Inventory>,
    /// When the next inventory may be stored.
    inventory_at: Instant,
    /// When the last renewal was asked for.
    renewed_at: Option<Instant>,
}

impl Session {
    async fn run(mut self, line: &mut Line) -> Ending {
        let (ended_outside, expired) = (self.ticket.ended(), self.expired());
        // Cancel-safe: what `work` was doing is either committed or never happened, and the agent sends again what
        // was not acknowledged.
        let ending = tokio::select! {
            biased;
            why = ended_outside => ended(why),
            () = expired => refused(Refusal::Expired),
            worked = self.work(line) => match worked {
                Ok(never) => match never {},
                Err(ending) => ending,
            },
        };
        let code = match &ending {
            Ending::Gone => "gone",
            Ending::Goodbye { code, .. } => code,
        };
        tracing::info!(
            event = "session_closed", component = "session", tenant_id = %self.origin.company, server_id = %self.origin.server, code, "session"
        );
        ending
    }

    async fn work(&mut self, line: &mut Line) -> Result<std::convert::Infallible, Ending> {
        self.deliver(line).await?;
        let silence_max = self.parts.heartbeat_interval * MISSED_HEARTBEATS_MAX;
        let drain = self.parts.tasks.drain().clone();
        let mut heard = Instant::now();
        loop {
            // Cancel-safe: `message` keeps half a message in the stream, `woken` keeps its wake-up in the registry.
            tokio::select! {
                biased;
                () = drain.begun() => return Err(draining()),
                message = line.inbound.message() => {
                    heard = Instant::now();
                    self.hear(line, message).await?;
                }
                () = self.ticket.woken() => self.deliver(line).await?,
                () = tokio::time::sleep_until(self.inventory_at), if self.inventory.is_some() => self.store_inventory().await?,
                () = tokio::time::sleep_until(heard + silence_max) => return Err(Ending::Gone),
            }
        }
    }

    /// Waits until the certificate of the session has expired.
    fn expired(&self) -> impl Future<Output = ()> + Send + use<> {
        let left_ms = self.identity.not_after_ms.saturating_sub(self.parts.clock.now_ms());
        tokio::time::sleep(Duration::from_millis(u64::try_from(left_ms).unwrap_or(0)))
    }

    /// Takes in a message, and with a report all others that wait behind it.
    async fn hear(&mut self, line: &mut Line, first: Result<Option<v1::FromAgent>, Status>) -> Result<(), Ending> {
        let mut reports = Vec::new();
        let mut next = Some(first);
        let mut end = None;
        while let Some(message) = next {
            match message {
                Ok(Some(message)) => match message.body {
                    Some(from_agent::Body::Report(envelope)) => reports.push(envelope),
                    other => self.take(line, other).await?,
                },
                Ok(None) => end = Some(Ending::Gone),
                Err(status) => end = Some(self.broken(&status)),
            }
            let more = end.is_none() && !reports.is_empty() && reports.len() < REPORTS_IN_FLIGHT_MAX;
            next = if more { line.waiting().await } else { None };
        }
        if !reports.is_empty() {
            self.submit(line, reports).await?;
        }
        end.map_or(Ok(()), Err)
    }

    fn broken(&self, status: &Status) -> Ending {
        // A stream that breaks off is everyday; a message that cannot be read is not.
        if matches!(status.code(), tonic::Code::Internal | tonic::Code::OutOfRange | tonic::Code::ResourceExhausted) {
            self.parts.counters.messages_bad.raise();
            return Ending::goodbye("bad_message", "a message could not be read");
        }
        Ending::Gone
    }

    async fn take(&mut self, line: &Line, body: Option<from_agent::Body>) -> Result<(), Ending> {
        let server = self.origin.server;
        match body {
            Some(from_agent::Body::Heartbeat(beat)) => {
                self.parts.counters.heartbeats.raise();
                let dropped = self.parts.sessions.beat(server, &beat, self.parts.clock.now_ms());
                self.parts.counters.samples_dropped.add(dropped);
                Ok(())
            }
            Some(from_agent::Body::Progress(progress)) => {
                self.parts.sessions.progress(server, progress);
                Ok(())
            }
            Some(from_agent::Body::Inventory(inventory)) => {
                self.inventory = Some(inventory);
                if Instant::now() >= self.inventory_at { self.store_inventory().await } else { Ok(()) }
            }
            Some(from_agent::Body::Renewal(renewal)) => self.renew(line, &renewal.csr_der).await,
            // Reports go another way; a second hello or something newer than this receiver has no meaning.
            Some(from_agent::Body::Report(_) | from_agent::Body::Hello(_)) | None => {
                self.parts.counters.messages_bad.raise();
                Err(Ending::goodbye("bad_message", "a message that this receiver does not know"))
            }
        }
    }

    async fn store_inventory(&mut self) -> Result<(), Ending> {
        let Some(inventory) = self.inventory.take() else { return Ok(()) };
        self.inventory_at = Instant::now() + INVENTORY_INTERVAL_MIN;
        self.parts.inlet.inventory(self.origin.server, &inventory).await.map_err(|error| match error {
            ingest::Error::BadInventory(_) => Ending::goodbye("bad_message", error.to_string()),
            other => self.overloaded(&other),
        })
    }

    fn overloaded(&self, error: &dyn std::error::Error) -> Ending {
        tracing::error!(event = "session_failed", component = "session", server_id = %self.origin.server, error = chain(error), "ending a session");
        Ending::goodbye("overloaded", "the receiver could not store it; nothing is lost, send it again")
    }

    async fn renew(&mut self, line: &Line, csr_der: &[u8]) -> Result<(), Ending> {
        let now = Instant::now();
        if self.renewed_at.is_some_and(|before| now < before + RENEWAL_INTERVAL_MIN) {
            return Err(Ending::goodbye("bad_message", "certificates are renewed far more seldom than that"));
        }
        self.renewed_at = Some(now);
        match self.parts.enrolment.renew(&self.identity, csr_der).await {
            Ok(certificate) => line.send(from_receiver::Body::Certificate(certificate)).await,
            Err(Refusal::Failed(error)) if error.code() == "internal" => Err(self.overloaded(&error)),
            Err(Refusal::Failed(error)) => Err(Ending::goodbye("bad_message", format!("{}: {error}", error.code()))),
            Err(refusal) => Err(refused(refusal)),
        }
    }

    async fn submit(&mut self, line: &Line, reports: Vec<v1::Envelope>) -> Result<(), Ending> {
        let submitted = self.parts.inlet.submit(self.origin.clone(), reports).await;
        let (verdict, bad) = submitted.map_err(|error| match error {
            ingest::Error::Stopping => draining(),
            other => self.overloaded(&other),
        })?;
        self.origin.shown = verdict.shown;
        if let Some(seq) = verdict.ack {
            let epoch = self.origin.epoch.clone();
            line.send(from_receiver::Body::Ack(v1::Ack { epoch, seq })).await?;
        }
        if verdict.forked {
            return Err(ended(End::Quarantined));
        }
        match bad {
            Some(bad) => Err(Ending::goodbye("bad_message", bad.to_string())),
            None => Ok(()),
        }
    }

    /// Hands over open directives that this session has not had yet.
    async fn deliver(&mut self, line: &Line) -> Result<(), Ending> {
        let open = self.parts.fleet.open_directives(self.origin.server).await;
        let open = open.map_err(|error| self.overloaded(&error))?;
        self.delivered.retain(|id| open.iter().any(|directive| directive.id == *id));
        let mut ids = Vec::new();
        for directive in open {
            if self.delivered.insert(directive.id.clone()) {
                ids.push(directive.id.clone());
                line.send(from_receiver::Body::Directive(directive)).await?;
            }
        }
        if ids.is_empty() {
            return Ok(());
        }
        self.parts.fleet.directives_delivered(&ids).await.map_err(|error| self.overloaded(&error))
    }
}

fn ended(why: End) -> Ending {
    match why {
        End::Replaced => Ending::goodbye("replaced", "a newer session of this server took its place"),
        End::Revoked => Ending::goodbye("revoked", "the server's identity was taken back"),
        End::Quarantined => Ending::goodbye("fork", "report numbers of this server came with two contents"),
    }
}

fn draining() -> Ending {
    let message = "the receiver is stopping".to_owned();
    Ending::Goodbye { code: "draining", message, retry_after_seconds: 1 }
}
