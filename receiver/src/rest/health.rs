//! Health pages and the API's own description; none of them needs a key.
//!
//! `/health` says that the process answers; `/health/worker` that reports are being committed and heartbeats
//! flushed, by a round trip through both tasks and a real write transaction.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State as Shared;
use axum::http::header;
use axum::response::IntoResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::State;
use super::problems::Refused;
use crate::model::problem::Problem;

const ROUND_TRIP_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`.
    status: &'static str,
    /// The receiver's version.
    version: &'static str,
}

const OK: Health = Health { status: "ok", version: env!("CARGO_PKG_VERSION") };

/// Whether the process answers.
#[utoipa::path(get, path = "/health", tag = "health", security(()), responses((status = 200, body = Health)))]
pub(super) async fn health() -> Json<Health> {
    Json(OK)
}

/// Whether reports are committed and heartbeats flushed.
#[utoipa::path(get, path = "/health/worker", tag = "health", security(()),
    responses((status = 200, body = Health), (status = 503, body = Problem, content_type = "application/problem+json")))]
pub(super) async fn worker(Shared(state): Shared<State>) -> Result<Json<Health>, Refused> {
    let round_trip = async { state.inlet.ping().await && state.pulse.ping().await };
    match tokio::time::timeout(ROUND_TRIP_MAX, round_trip).await {
        Ok(true) => Ok(Json(OK)),
        Ok(false) | Err(_) => {
            let detail = "a round trip through the writer did not end in time";
            Err(Problem::new(503, "worker_stuck", detail, "look at the receiver's log and at its disk")
                .retryable()
                .into())
        }
    }
}

pub(super) async fn json_page(text: Arc<str>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], text.to_string())
}
