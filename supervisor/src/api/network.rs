//! Routes of a sandbox's network: its decision log, and what its policy would say.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::response::Response;
use msb_protocol::control::{NetworkDecision, NetworkExplainQuery, NetworkLogQuery};
use msb_protocol::error::ApiError;
use msb_protocol::vmm::{DECISION_LOG_FILE, NetworkExplanation};
use tokio::sync::mpsc;

use super::ApiState;
use super::failure::{Failure, query};
use super::images::json_lines;
use super::log_files::{self, QUEUE_LEN, Which};
use super::sandboxes::name;

#[utoipa::path(get, path = "/v1/sandboxes/{name}/network/log", params(("name" = String, Path), NetworkLogQuery), responses((status = 200, body = NetworkDecision, content_type = "application/x-ndjson", description = "lines"), (status = "4XX", body = ApiError)))]
pub(crate) async fn log(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    which: Result<Query<NetworkLogQuery>, QueryRejection>,
) -> Result<Response, Failure> {
    let NetworkLogQuery { follow, tail } = query(which)?;
    let sandbox = state.daemon.find(&name(&sandbox)?).await?;
    let directory = state.daemon.surroundings().directories(&sandbox.name, sandbox.id).logs;
    let (lines, waiting) = mpsc::channel::<NetworkDecision>(QUEUE_LEN);
    let rests = log_files::rests(sandbox.view, follow.then(|| lines.clone()));
    tokio::task::spawn_blocking(move || {
        log_files::read(&directory, DECISION_LOG_FILE, Which { tail, follow }, |_| true, &lines, &rests);
    });
    Ok(json_lines(waiting))
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/network/explain", params(("name" = String, Path), NetworkExplainQuery), responses((status = 200, body = NetworkExplanation), (status = "4XX", body = ApiError)))]
pub(crate) async fn explain(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    what: Result<Query<NetworkExplainQuery>, QueryRejection>,
) -> Result<Json<NetworkExplanation>, Failure> {
    let target = query(what)?.target;
    Ok(Json(state.daemon.explain_network(&name(&sandbox)?, target).await?))
}
