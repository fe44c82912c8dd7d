//! Pages about snapshot policies.
//!
//! In: a whole policy; there is no partial change, so that two people cannot mix theirs. Out: the policy with where
//! it stands on the host: pending, applied, or refused with the host's code and words. Only its form is checked
//! here; grants, destinations and floors are the host's.

use axum::Json;
use axum::extract::State as Shared;

use super::extract::{Authenticated, Body, Path};
use super::problems::Refused;
use super::{Items, State};
use crate::model::ServerId;
use crate::model::policy::{Policy, PolicyInput};
use crate::model::problem::Problem;

/// Sets the policy of one service. The answer's `state` says whether the host has taken it; it may refuse.
#[utoipa::path(put, path = "/v1/servers/{server_id}/snapshot-policy", tag = "policies",
    params(("server_id" = i64, Path)),
    request_body = PolicyInput,
    responses((status = 200, body = Policy), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn put(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
    Body(input): Body<PolicyInput>,
) -> Result<Json<Policy>, Refused> {
    Ok(Json(state.fleet.put_policy(caller, ServerId(server), input).await?))
}

/// Policies of a server, by service.
#[utoipa::path(get, path = "/v1/servers/{server_id}/snapshot-policy", tag = "policies",
    params(("server_id" = i64, Path)),
    responses((status = 200, body = Items<Policy>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn list(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
) -> Result<Json<Items<Policy>>, Refused> {
    Ok(Json(Items { items: state.fleet.policies(caller, ServerId(server)).await? }))
}
