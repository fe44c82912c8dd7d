//! The people's door: REST `/v1` over HTTP/1.1 and HTTP/2, and the health pages.
//!
//! Handlers check form, call the work below and give back its types; they decide nothing and never touch the
//! store. Every error is a problem document (RFC 9457). What belongs to another company answers like what does
//! not exist. Bounded: body, time, header time, connections, requests at once.

mod extract;
mod fleet;
mod health;
mod policies;
mod problems;
mod serve;
mod snapshots;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use axum::routing::get;
use serde::{Deserialize, Serialize};
use toml_example::TomlExample;
use utoipa::ToSchema;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder, SecurityRequirement};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::auth::Auth;
use crate::costs::Costs;
use crate::fleet::Fleet;
use crate::ingest::Inlet;
use crate::ingest::heartbeats::FlusherPulse;
use crate::model::counters::SharedCounters;

pub use serve::serve;

/// Section `[rest]` of the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, TomlExample)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Serve REST without TLS. Allowed only when listen.rest is a loopback address.
    pub plain_http: bool,
}

/// Largest request body.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// What handlers work with. Cheap to clone.
#[derive(Clone)]
#[expect(missing_docs, reason = "a bundle of handles, each described where it is made")]
pub struct State {
    pub auth: Auth,
    pub fleet: Fleet,
    pub costs: Costs,
    pub inlet: Inlet,
    pub pulse: FlusherPulse,
    pub counters: SharedCounters,
}

/// A list, in an object so that it can grow other members.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Items<T: ToSchema> {
    items: Vec<T>,
}

/// The whole application: `/v1`, health, and the pages of `others`.
pub fn app(state: State, others: Router) -> Router {
    let (v1, document) = router().split_for_parts();
    // Made once; a page that cannot be made would be a bug that the golden test finds.
    let document: Arc<str> = document.to_pretty_json().unwrap_or_default().into();
    let page = get(move || health::json_page(Arc::clone(&document)));
    v1.route("/v1/openapi.json", page)
        .with_state(state)
        .merge(others)
        .fallback(problems::no_such_page)
        .method_not_allowed_fallback(problems::no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn(serve::guard))
}

fn router() -> OpenApiRouter<State> {
    let info = InfoBuilder::new()
        .title("Hestner receiver")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("Servers, snapshots and costs. Errors are problem documents (RFC 9457) with `code`, `next_step` and `retry`."))
        .build();
    let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    let components = ComponentsBuilder::new().security_scheme("api_key", scheme).build();
    let document: OpenApi = OpenApiBuilder::new()
        .info(info)
        .components(Some(components))
        .security(Some([SecurityRequirement::new("api_key", Vec::<String>::new())]))
        .build();
    OpenApiRouter::with_openapi(document)
        .routes(routes!(fleet::companies))
        .routes(routes!(fleet::servers))
        .routes(routes!(fleet::overview))
        .routes(routes!(fleet::services))
        .routes(routes!(fleet::repository_keys))
        .routes(routes!(fleet::costs))
        .routes(routes!(snapshots::request, snapshots::list))
        .routes(routes!(snapshots::one))
        .routes(routes!(policies::put, policies::list))
        .routes(routes!(health::health))
        .routes(routes!(health::worker))
}
