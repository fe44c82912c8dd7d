//! Pages about runs: asking for one and looking at them.
//!
//! In: a service's name, a query. Out: runs as the store and the sessions know them. Asking only queues: the
//! answer is 202 with the queued run, and the host decides whether it is taken. No page here can send a command
//! line, a path or a destination to a host.

use axum::Json;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use hestner_proto::words::RunStatus;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::extract::{Authenticated, MaybeBody, Path, Query};
use super::problems::Refused;
use super::{Items, State};
use crate::fleet::RunFilter;
use crate::fleet::directives::{RUN_WAITS, SnapshotRequest};
use crate::model::ServerId;
use crate::model::problem::Problem;
use crate::model::run::Run;
use crate::platform::span;

const RUNS_SHOWN: i64 = 50;
const RUNS_SHOWN_MAX: i64 = 500;

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SnapshotBody {
    /// The service to snapshot.
    service: String,
    /// How long the run may wait for its host, such as `30m`; a day if left out.
    expires_in: Option<String>,
}

/// Asks for a snapshot. The host decides whether it is taken. Without a body, the service is the only one that is
/// set up for snapshots. With an `Idempotency-Key` header, the same key and body give the same run for a day.
#[utoipa::path(post, path = "/v1/servers/{server_id}/snapshots", tag = "snapshots",
    params(("server_id" = i64, Path), ("Idempotency-Key" = Option<String>, Header)),
    request_body = Option<SnapshotBody>,
    responses((status = 202, body = Run, headers(("Location" = String, description = "where the run can be looked at"))),
        (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn request(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
    headers: HeaderMap,
    MaybeBody(body): MaybeBody<SnapshotBody>,
) -> Result<impl IntoResponse, Refused> {
    let (service, expires_in) = body.map(|body| (body.service, body.expires_in)).unzip();
    let expires_in = expires_in.flatten();
    let expires_in = expires_in.as_deref().map_or(Ok(RUN_WAITS), span::parse);
    let expires_in = expires_in.map_err(|error| Problem::invalid(format!("expires_in: {error}")))?;
    let key = headers.get("idempotency-key").map(|value| value.to_str().map(str::to_owned)).transpose();
    let idempotency_key = key.map_err(|_| Problem::invalid("Idempotency-Key: must be printable ASCII"))?;
    let request = SnapshotRequest { service, expires_in, idempotency_key };
    let run = state.fleet.request_snapshot(caller, ServerId(server), &request).await?;
    let location = format!("/v1/servers/{server}/snapshots/{}", run.id);
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(run)))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct RunsQuery {
    /// Of this service only.
    service: Option<String>,
    /// `queued`, `running`, `success` or `failed`.
    status: Option<String>,
    /// At most so many, up to 500; 50 if left out.
    limit: Option<i64>,
    /// Only runs with a smaller `id`: for the next page.
    before: Option<i64>,
}

/// Runs of a server, newest first, without `log_tail`, `warnings` and `unreadable_names`: one run shows them.
#[utoipa::path(get, path = "/v1/servers/{server_id}/snapshots", tag = "snapshots",
    params(("server_id" = i64, Path), RunsQuery),
    responses((status = 200, body = Items<Run>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
    Query(query): Query<RunsQuery>,
) -> Result<Json<Items<Run>>, Refused> {
    let limit = query.limit.unwrap_or(RUNS_SHOWN);
    if !(1..=RUNS_SHOWN_MAX).contains(&limit) {
        return Err(Problem::invalid(format!("limit: from 1 to {RUNS_SHOWN_MAX}")).into());
    }
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let (service, status) = (given(query.service), given(query.status));
    if let Some(Err(error)) = status.as_deref().map(str::parse::<RunStatus>) {
        return Err(Problem::invalid(format!("status: {error}")).into());
    }
    let filter = RunFilter { service, status, before: query.before, limit };
    Ok(Json(Items { items: state.fleet.runs(caller, ServerId(server), &filter).await? }))
}

/// One run, by `run_uid`, or by `id` while it is queued.
#[utoipa::path(get, path = "/v1/servers/{server_id}/snapshots/{run}", tag = "snapshots",
    params(("server_id" = i64, Path), ("run" = String, Path)),
    responses((status = 200, body = Run), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn one(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path((server, run)): Path<(i64, String)>,
) -> Result<Json<Run>, Refused> {
    Ok(Json(state.fleet.run(caller, ServerId(server), &run).await?))
}
