//! Pages about companies, servers, services and costs.
//!
//! In: ids and queries; `?name=` means the same as leaving the name out. Out: the work's types as JSON, lists in
//! `items`. Nothing is changed by any page here.

use axum::Json;
use axum::extract::State as Shared;
use serde::Deserialize;
use utoipa::IntoParams;

use super::extract::{self, Authenticated, Path, Query};
use super::problems::Refused;
use super::{Items, State};
use crate::fleet::ServerFilter;
use crate::model::cost::MonthlyCosts;
use crate::model::problem::Problem;
use crate::model::range::Range;
use crate::model::report::KeptKey;
use crate::model::server::{Company, Overview, Server, ServerStatus, Service};
use crate::model::times::Month;
use crate::model::{CompanyId, ServerId};

type Answer<T> = Result<Json<T>, Refused>;

/// Companies that the key can see.
#[utoipa::path(get, path = "/v1/companies", tag = "companies",
    responses((status = 200, body = Items<Company>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn companies(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
) -> Answer<Items<Company>> {
    Ok(Json(Items { items: state.fleet.companies(caller).await? }))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ServersQuery {
    /// Part of the name or hostname.
    search: Option<String>,
    /// `online`, `offline`, `quarantined` or `revoked`.
    #[serde(default, deserialize_with = "extract::or_empty")]
    #[param(inline, value_type = Option<ServerStatus>)]
    status: Option<ServerStatus>,
    /// Environment.
    env: Option<String>,
    /// Region.
    region: Option<String>,
}

/// Servers of a company, by id; at most 1,000.
#[utoipa::path(get, path = "/v1/companies/{company_id}/servers", tag = "servers",
    params(("company_id" = i64, Path), ServersQuery),
    responses((status = 200, body = Items<Server>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn servers(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(company): Path<i64>,
    Query(query): Query<ServersQuery>,
) -> Answer<Items<Server>> {
    let given = |text: Option<String>| text.filter(|text| !text.is_empty());
    let filter = ServerFilter { search: given(query.search), env: given(query.env), region: given(query.region) };
    let items = state.fleet.servers(caller, CompanyId(company), &filter, query.status).await?;
    Ok(Json(Items { items }))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OverviewQuery {
    /// `1h`, `24h`, `7d` or `30d`.
    #[serde(default, deserialize_with = "extract::or_empty")]
    #[param(inline, value_type = Option<Range>)]
    range: Option<Range>,
}

/// A server at a glance, with series over the range.
#[utoipa::path(get, path = "/v1/servers/{server_id}/overview", tag = "servers",
    params(("server_id" = i64, Path), OverviewQuery),
    responses((status = 200, body = Overview), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn overview(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
    Query(query): Query<OverviewQuery>,
) -> Answer<Overview> {
    Ok(Json(state.fleet.overview(caller, ServerId(server), query.range.unwrap_or_default()).await?))
}

/// Services of a server that its last inventory named, with what the host allows.
#[utoipa::path(get, path = "/v1/servers/{server_id}/services", tag = "servers",
    params(("server_id" = i64, Path)),
    responses((status = 200, body = Items<Service>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn services(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
) -> Answer<Items<Service>> {
    Ok(Json(Items { items: state.fleet.services(caller, ServerId(server)).await? }))
}

/// Keys of a server's repositories as its host has told them. A wrapped one opens with the company's recovery key only;
/// the password of an open one is not shown.
#[utoipa::path(get, path = "/v1/servers/{server_id}/repository-keys", tag = "servers",
    params(("server_id" = i64, Path)),
    responses((status = 200, body = Items<KeptKey>), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn repository_keys(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
) -> Answer<Items<KeptKey>> {
    Ok(Json(Items { items: state.fleet.repository_keys(caller, ServerId(server)).await? }))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct CostsQuery {
    /// `YYYY-MM`; the current month if left out.
    month: Option<String>,
}

/// A server's ledger rows of a month and their sums. Amounts are decimal strings.
#[utoipa::path(get, path = "/v1/servers/{server_id}/costs", tag = "costs",
    params(("server_id" = i64, Path), CostsQuery),
    responses((status = 200, body = MonthlyCosts), (status = "default", body = Problem, content_type = "application/problem+json")))]
pub(super) async fn costs(
    Shared(state): Shared<State>,
    Authenticated(caller): Authenticated,
    Path(server): Path<i64>,
    Query(query): Query<CostsQuery>,
) -> Answer<MonthlyCosts> {
    let month = query.month.as_deref().filter(|text| !text.is_empty()).map(Month::parse).transpose();
    let month = month.map_err(|error| Problem::invalid(error.to_string()))?;
    Ok(Json(state.costs.of_month(caller, ServerId(server), month).await?))
}
