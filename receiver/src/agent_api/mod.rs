//! The agents' door: gRPC over TLS, enrolment on one listener and sessions on another.
//!
//! It turns messages into calls of the work below and their answers into messages; it decides nothing and never
//! touches the store. Who a peer is comes from the certificate of its connection, never from a message.
//! Listeners are bounded in connections, handshakes, message size and idle time.

mod enrol;
mod peer;
mod session;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hestner_proto::MESSAGE_BYTES_MAX;
use hestner_proto::v1::agents_server::AgentsServer;
use hestner_proto::v1::enrolment_server::EnrolmentServer;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use toml_example::TomlExample;
use tonic::transport::Server;

pub use enrol::EnrolmentDoor;
pub use session::{AgentsDoor, Parts};

use crate::lifecycle::{Drain, Tasks};
use crate::platform::tls::Listener;
use peer::{KeyPlaces, PeerStream};

/// Section `[session]` of the settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// How often an agent sends a heartbeat. One that is silent for three of them is cut off.
    pub heartbeat_interval: String,
    /// How often heartbeats are written to the store, all in one transaction.
    pub flush_interval: String,
    /// Life of an agent's certificate; agents renew at half of it.
    pub certificate_ttl: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { heartbeat_interval: "30s".into(), flush_interval: "60s".into(), certificate_ttl: "7days".into() }
    }
}

/// Connections with a session at once. Each costs two descriptors' worth of memory, about 100 KiB.
const AGENTS_MAX: usize = 8192;
/// Connections to enrol at once.
const ENROLMENTS_MAX: usize = 128;
/// Streams on one connection; an agent needs one.
const STREAMS_MAX: u32 = 8;
/// Connections that wait between the handshake and the HTTP/2 server.
const READY_MAX: usize = 16;
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// A request to enrol that takes longer is given up.
const ENROL_TIME_MAX: Duration = Duration::from_secs(20);
/// An idle connection to enrol must not keep its place from others.
const ENROL_AGE_MAX: Duration = Duration::from_secs(60);
/// hyper can hang in a graceful shutdown (hyper#4170), so it gets this long and no longer.
const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(5);

/// Serves sessions until the drain.
pub async fn serve_agents(door: AgentsDoor, listener: Listener, tasks: Tasks) {
    let drain = tasks.drain().clone();
    let recogniser = door.enrolment();
    let key_of = move |certificate: &[u8]| recogniser.recognise(certificate).ok().map(|peer| peer.spki_sha256);
    let incoming = accept(listener, AGENTS_MAX, key_of, &tasks, "accept_agents");
    let service = AgentsServer::new(door)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let served = server().add_service(service).serve_with_incoming_shutdown(incoming, begun(drain.clone()));
    until_shut_down("agents", served, drain).await;
}

/// Serves enrolment until the drain.
pub async fn serve_enrolment(door: EnrolmentDoor, listener: Listener, tasks: Tasks) {
    let drain = tasks.drain().clone();
    let incoming = accept(listener, ENROLMENTS_MAX, |_| None, &tasks, "accept_enrolments");
    let service = EnrolmentServer::new(door).max_decoding_message_size(64 * 1024);
    let served = server()
        .timeout(ENROL_TIME_MAX)
        .max_connection_age(ENROL_AGE_MAX)
        .max_connection_age_grace(ENROL_TIME_MAX)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, begun(drain.clone()));
    until_shut_down("enrolment", served, drain).await;
}

fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_pending_accept_reset_streams(Some(STREAMS_MAX as usize))
        .http2_max_header_list_size(16 * 1024)
}

async fn begun(drain: Drain) {
    drain.begun().await;
}

async fn until_shut_down(
    name: &'static str,
    served: impl Future<Output = Result<(), tonic::transport::Error>>,
    drain: Drain,
) {
    let deadline = async {
        drain.begun().await;
        tokio::time::sleep(SHUTDOWN_TIME_MAX).await;
    };
    tokio::select! {
        ended = served => if let Err(error) = ended {
            tracing::error!(event = "listener_failed", component = "agent_api", listener = name, error = %error, "a listener ended");
        },
        () = deadline => tracing::warn!(event = "shutdown_deadline", component = "agent_api", listener = name, "connections cut off"),
    }
}

type Accepted = Result<PeerStream, std::io::Error>;

/// Accepts connections in a task of its own, `connections_max` at once, as the stream that tonic wants. Those whose
/// certificate has a key are bounded for each key as well; one too many is closed.
fn accept(
    mut listener: Listener,
    connections_max: usize,
    key_of: impl Fn(&[u8]) -> Option<String> + Send + 'static,
    tasks: &Tasks,
    name: &'static str,
) -> ReceiverStream<Accepted> {
    let (ready, incoming) = mpsc::channel(READY_MAX);
    let drain = tasks.drain().clone();
    let mut pulse = tasks.pulse(name);
    tasks.spawn(name, async move {
        let (places, key_places) = (Arc::new(Semaphore::new(connections_max)), KeyPlaces::default());
        loop {
            let Ok(place) = pulse.rest(Arc::clone(&places).acquire_owned()).await else { return };
            // Cancel-safe: handshakes in flight live in the listener.
            let (stream, address): (_, SocketAddr) = tokio::select! {
                accepted = pulse.rest(listener.accept()) => accepted,
                () = drain.begun() => return,
            };
            let key = stream.peer_certificates().first().and_then(|certificate| key_of(certificate));
            let key_place = match key.map(|key| key_places.take(key)) {
                Some(None) => {
                    tracing::debug!(event = "too_many_connections", component = "agent_api", peer = %address, "one key has too many connections");
                    continue;
                }
                Some(taken) => taken,
                None => None,
            };
            if ready.send(Ok(PeerStream::new(stream, address, place, key_place))).await.is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(incoming)
}
