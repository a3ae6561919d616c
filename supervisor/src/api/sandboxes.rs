//! Routes of sandboxes that answer once.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{ConnectInfo, Path, Query, State};
use msb_protocol::control::{
    CreateRequest, LabelRequest, PAGE_LEN_MAX, PingReport, SandboxDetail, SandboxList, SandboxSummary, StartRequest,
    StopRequest,
};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::labels::LabelTerm;
use msb_protocol::selector::Selector;

use super::ApiState;
use super::failure::{Failure, body, query};
use crate::peer::Peer;

type Answer<T> = Result<Json<T>, Failure>;

/// Most terms of one filter.
pub(crate) const TERMS_MAX: usize = 64;

pub(crate) fn name(text: &str) -> Result<SandboxName, Failure> {
    Ok(SandboxName::parse(text)?)
}

#[utoipa::path(post, path = "/v1/sandboxes", request_body = CreateRequest, responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub(crate) async fn create(
    State(state): State<ApiState>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    bytes: Bytes,
) -> Answer<SandboxDetail> {
    let request: CreateRequest = body(&bytes, None)?;
    let creator = if request.spec.detached { None } else { peer.creator() };
    Ok(Json(state.daemon.create(request, creator).await?))
}

#[utoipa::path(get, path = "/v1/sandboxes", params(("label" = Option<Vec<String>>, Query, description = "KEY=VALUE is exact, a bare KEY asks whether it exists; all must fit"), ("selector" = Option<Vec<String>>, Query, description = "an expression, as in team in (ml,web),!debug; all must fit"), ("limit" = Option<u32>, Query, description = "at most so many, 1 to 1000; all of them if absent"), ("after" = Option<SandboxId>, Query, description = "only those after the page that ended with this next")), responses((status = 200, body = SandboxList), (status = "4XX", body = ApiError)))]
pub(crate) async fn list(
    State(state): State<ApiState>,
    pairs: Result<Query<Vec<(String, String)>>, QueryRejection>,
) -> Answer<SandboxList> {
    let pairs = query(pairs)?;
    if pairs.len() > TERMS_MAX {
        return Err(Failure(ApiError::new(
            ErrorCode::LimitExceeded,
            format!("a filter has at most {TERMS_MAX} terms"),
        )));
    }
    let refuse = |message: String| Failure(ApiError::new(ErrorCode::InvalidRequest, message));
    let (mut terms, mut limit, mut after) = (Vec::new(), None, None);
    for (key, value) in pairs {
        match key.as_str() {
            "label" => terms.push(LabelTerm::parse(&value)?),
            "selector" => terms.push(LabelTerm::Fits(Selector::parse(&value)?)),
            "limit" => {
                let count = value.parse().ok().filter(|count| (1..=PAGE_LEN_MAX).contains(count));
                limit = Some(count.ok_or_else(|| refuse(format!("limit must be 1 to {PAGE_LEN_MAX}, not {value:?}")))?);
            }
            "after" => {
                let wrong = |_| refuse("after must be the next of an earlier page".to_owned());
                after = Some(value.parse::<SandboxId>().map_err(wrong)?);
            }
            _ => return Err(refuse(format!("unknown query parameter {key:?}"))),
        }
    }
    Ok(Json(page(state.daemon.list(&terms).await?, limit, after)))
}

/// A part of a list that goes from the newest id to the oldest.
fn page(mut sandboxes: Vec<SandboxSummary>, limit: Option<usize>, after: Option<SandboxId>) -> SandboxList {
    sandboxes.retain(|sandbox| after.is_none_or(|after| sandbox.id < after));
    let is_cut = limit.is_some_and(|limit| sandboxes.len() > limit);
    sandboxes.truncate(limit.unwrap_or(usize::MAX));
    let next = if is_cut { sandboxes.last().map(|sandbox| sandbox.id) } else { None };
    SandboxList { sandboxes, next }
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/ping", params(("name" = String, Path)), responses((status = 200, body = PingReport), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub(crate) async fn ping(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Answer<PingReport> {
    Ok(Json(state.daemon.ping(&name(&sandbox)?).await?))
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}", params(("name" = String, Path)), responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn inspect(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Answer<SandboxDetail> {
    Ok(Json(state.daemon.inspect(&name(&sandbox)?).await?))
}

/// How to remove.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemoveQuery {
    /// Even when it runs.
    #[serde(default)]
    force: bool,
}

#[utoipa::path(delete, path = "/v1/sandboxes/{name}", params(("name" = String, Path), RemoveQuery), responses((status = 200), (status = "4XX", body = ApiError)))]
pub(crate) async fn remove(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    how: Result<Query<RemoveQuery>, QueryRejection>,
) -> Answer<serde_json::Value> {
    state.daemon.remove(&name(&sandbox)?, query(how)?.force).await?;
    Ok(Json(serde_json::json!({})))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/start", params(("name" = String, Path)), request_body = StartRequest, responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub(crate) async fn start(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    bytes: Bytes,
) -> Answer<SandboxDetail> {
    let request = body(&bytes, Some(StartRequest::default()))?;
    Ok(Json(state.daemon.start(&name(&sandbox)?, request.hold_main).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/stop", params(("name" = String, Path)), request_body = StopRequest, responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn stop(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    bytes: Bytes,
) -> Answer<SandboxDetail> {
    let request = body(&bytes, Some(StopRequest::default()))?;
    Ok(Json(state.daemon.stop(&name(&sandbox)?, request.grace_ms, request.force).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/restart", params(("name" = String, Path)), request_body = StopRequest, responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub(crate) async fn restart(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    bytes: Bytes,
) -> Answer<SandboxDetail> {
    let request = body(&bytes, Some(StopRequest::default()))?;
    let sandbox = name(&sandbox)?;
    if request.force {
        // A kill and then a start: the same road as two requests, without a moment in which it rests for somebody else to see.
        state.daemon.stop(&sandbox, None, true).await?;
    }
    Ok(Json(state.daemon.restart(&sandbox, request.grace_ms).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/pause", params(("name" = String, Path)), responses((status = 200, body = SandboxDetail, description = "once nothing in it runs"), (status = "4XX", body = ApiError)))]
pub(crate) async fn pause(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Answer<SandboxDetail> {
    Ok(Json(state.daemon.pause(&name(&sandbox)?).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/resume", params(("name" = String, Path)), responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn resume(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Answer<SandboxDetail> {
    Ok(Json(state.daemon.resume(&name(&sandbox)?).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/detach", params(("name" = String, Path)), responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn detach(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Answer<SandboxDetail> {
    Ok(Json(state.daemon.detach(&name(&sandbox)?).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/labels", params(("name" = String, Path)), request_body = LabelRequest, responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn label(
    State(state): State<ApiState>,
    Path(sandbox): Path<String>,
    bytes: Bytes,
) -> Answer<SandboxDetail> {
    let request: LabelRequest = body(&bytes, None)?;
    Ok(Json(state.daemon.label(&name(&sandbox)?, request).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/touch", params(("name" = String, Path)), responses((status = 200, body = SandboxDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn touch(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Answer<SandboxDetail> {
    Ok(Json(state.daemon.touch(&name(&sandbox)?).await?))
}

#[utoipa::path(get, path = "/v1/sandboxes/{name}/wait", params(("name" = String, Path)), responses((status = 200, body = SandboxDetail, description = "once it rests"), (status = "4XX", body = ApiError)))]
pub(crate) async fn wait(State(state): State<ApiState>, Path(sandbox): Path<String>) -> Answer<SandboxDetail> {
    Ok(Json(state.daemon.wait(&name(&sandbox)?).await?))
}
