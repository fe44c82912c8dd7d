//! `/metrics` in Prometheus' text form, for keys of all companies and for callers on loopback.
//!
//! Totals over all companies only: no label names a server or a company, so their number does not grow with the
//! fleet and a page that leaks tells nothing of anybody.

use axum::Router;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::auth::{self, Auth};
use crate::fleet::Fleet;
use crate::model::Scope;
use crate::model::counters::SharedCounters;
use crate::model::problem::Problem;
use crate::platform::causes::chain;
use crate::platform::tls::PeerAddr;
use crate::sessions::Sessions;

/// What the page is made from. Cheap to clone.
#[derive(Clone)]
#[expect(missing_docs, reason = "a bundle of handles, each described where it is made")]
pub struct Metrics {
    pub auth: Auth,
    pub fleet: Fleet,
    pub sessions: Sessions,
    pub counters: SharedCounters,
}

/// The page's route.
pub fn router(metrics: Metrics) -> Router {
    Router::new().route("/metrics", get(page)).with_state(metrics)
}

async fn page(State(metrics): State<Metrics>, peer: Option<Extension<PeerAddr>>, headers: HeaderMap) -> Response {
    // What a proxy on this machine passes on comes from loopback too, but not from here.
    let passed_on = headers.contains_key(header::FORWARDED) || headers.contains_key("x-forwarded-for");
    let local =
        peer.is_some_and(|Extension(PeerAddr(address))| address.ip().to_canonical().is_loopback()) && !passed_on;
    if !local && let Err(problem) = metrics.check_key(&headers).await {
        return refused(&problem);
    }
    match metrics.render().await {
        Ok(text) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(problem) => refused(&problem),
    }
}

fn refused(problem: &Problem) -> Response {
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let text = serde_json::to_string(problem).unwrap_or_default();
    let mut response = (status, [(header::CONTENT_TYPE, "application/problem+json")], text).into_response();
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// What failed goes into the log and not out.
fn internal(error: &dyn std::error::Error) -> Problem {
    tracing::error!(event = "request_failed", component = "metrics", error = chain(error), "a request failed");
    Problem::internal()
}

#[derive(Debug)]
struct Counted(SharedCounters);

impl prometheus_client::collector::Collector for Counted {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (name, help, total) in self.0.all() {
            let counter = ConstCounter::new(total);
            let name = format!("hestner_{name}");
            let metric = encoder.encode_descriptor(&name, help, None, counter.metric_type())?;
            counter.encode(metric)?;
        }
        Ok(())
    }
}

impl Metrics {
    async fn check_key(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let caller = self.auth.authenticate(shown.and_then(auth::bearer)).await;
        let next = "use a key made with `hestner-receiver apikey create --all-companies`, or ask from loopback";
        let caller = caller.map_err(|error| {
            let code = match error {
                auth::Error::Missing => "key_missing",
                auth::Error::Invalid => "key_invalid",
                auth::Error::Store(_) | auth::Error::Random(_) => return internal(&error),
            };
            self.counters.keys_refused.raise();
            Problem::new(401, code, error.to_string(), next)
        })?;
        match caller.scope {
            Scope::All => Ok(()),
            Scope::Company(_) => Err(Problem::new(403, "scope_too_narrow", "the key is bound to one company", next)),
        }
    }

    async fn render(&self) -> Result<String, Problem> {
        let runs = self.fleet.runs_by_status().await.map_err(|error| internal(&error))?;
        let mut registry = Registry::default();
        let sessions: Gauge = Gauge::default();
        sessions.set(i64::try_from(self.sessions.count()).unwrap_or(i64::MAX));
        registry.register("hestner_sessions", "Open sessions of agents", sessions);
        let by_status: Family<Vec<(String, String)>, Gauge> = Family::default();
        for (status, count) in runs {
            by_status.get_or_create(&vec![("status".to_owned(), status)]).set(count);
        }
        registry.register("hestner_runs", "Runs in the store by status", by_status);
        registry.register_collector(Box::new(Counted(self.counters.clone())));
        let mut text = String::new();
        encode(&mut text, &registry).map_err(|error| internal(&error))?;
        Ok(text)
    }
}
