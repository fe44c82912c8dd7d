//! Serving HTTP connections, and what surrounds every request: an id, a deadline, a log line.
//!
//! In: connections whose handshake is done. Each is a task of its own, ends by itself after a while, and is ended
//! gracefully at the drain. The peer's address goes into the request's extensions. Bodies are never logged, nor
//! queries, which may hold names of customers.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;
use tower::ServiceExt as _;

use super::problems::Refused;
use crate::lifecycle::{Drain, Tasks};
use crate::model::problem::Problem;
use crate::platform::tls::{Listener, PeerAddr, Stream};

/// Connections at once; more wait in the kernel's backlog.
const CONNECTIONS_MAX: usize = 512;
/// Requests on one HTTP/2 connection at once.
const STREAMS_MAX: u32 = 32;
const HEADER_TIME_MAX: Duration = Duration::from_secs(10);
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);
/// Requests under way get this long at the drain.
const SHUTDOWN_TIME_MAX: Duration = Duration::from_secs(5);
/// A connection is asked to end after this, so that idle ones do not keep their places for ever.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(600);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Serves `app` until the drain.
pub async fn serve(app: Router, mut listener: Listener, tasks: Tasks) {
    let drain = tasks.drain().clone();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut pulse = tasks.pulse("rest");
    loop {
        let Ok(place) = pulse.rest(Arc::clone(&places).acquire_owned()).await else { return };
        // Cancel-safe: handshakes in flight live in the listener.
        let (stream, peer) = tokio::select! {
            accepted = pulse.rest(listener.accept()) => accepted,
            () = drain.begun() => return,
        };
        let (app, drain) = (app.clone(), drain.clone());
        tasks.spawn_passing("rest_connection", async move {
            connection(app, stream, peer, drain).await;
            drop(place);
        });
    }
}

async fn connection(app: Router, stream: Stream, peer: SocketAddr, drain: Drain) {
    let service = app.map_request(move |request: axum::http::Request<Incoming>| {
        let mut request = request.map(axum::body::Body::new);
        request.extensions_mut().insert(PeerAddr(peer));
        request
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIME_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(16 * 1024);
    let served = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    tokio::pin!(served);
    let over = async {
        tokio::select! {
            () = drain.begun() => {}
            () = tokio::time::sleep(CONNECTION_AGE_MAX) => {}
        }
    };
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = over => {
            served.as_mut().graceful_shutdown();
            match tokio::time::timeout(SHUTDOWN_TIME_MAX, served).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(event = "connection_broken", component = "rest", peer = %peer, error = %error, "a connection broke");
    }
}

/// Gives every request an id and a deadline, and logs how it ended.
pub(super) async fn guard(request: Request, next: Next) -> Result<Response, Infallible> {
    let id = request_id(&request);
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = match tokio::time::timeout(REQUEST_TIME_MAX, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let problem = Problem::new(503, "timeout", "the request took too long", "try again").retryable();
            Refused(problem).into_response()
        }
    };
    let status = response.status().as_u16();
    let shown = id.to_str().unwrap_or_default();
    tracing::debug!(event = "request", component = "rest", request_id = shown, %method, path, status, "request");
    response.headers_mut().insert(REQUEST_ID, id);
    Ok(response)
}

/// The caller's own id if it is short and plain, a new one otherwise.
fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID).filter(|value| {
        let bytes = value.as_bytes();
        (1..=64).contains(&bytes.len()) && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
    });
    let fresh = || HeaderValue::from_str(&uuid::Uuid::now_v7().to_string());
    given.cloned().map_or_else(fresh, Ok).unwrap_or(HeaderValue::from_static("none"))
}
