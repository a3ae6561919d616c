//! Routes of snapshots.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::response::Response;
use msb_protocol::control::SandboxDetail;
use msb_protocol::error::ApiError;
use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::{
    CreateSnapshot, ForkRequest, ImportSnapshot, SnapshotCheck, SnapshotDetail, SnapshotList, snapshot_name,
};

use super::failure::{Failure, body, query};
use super::{ApiState, archives};

fn named(name: &str) -> Result<SandboxName, Failure> {
    snapshot_name(name).map_err(Failure)
}

#[utoipa::path(get, path = "/v1/snapshots", responses((status = 200, body = SnapshotList)))]
pub(crate) async fn list(State(state): State<ApiState>) -> Result<Json<SnapshotList>, Failure> {
    Ok(Json(SnapshotList { snapshots: state.daemon.list_snapshots().await? }))
}

#[utoipa::path(post, path = "/v1/snapshots", request_body = CreateSnapshot, responses((status = 200, body = SnapshotDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn create(State(state): State<ApiState>, request: Bytes) -> Result<Json<SnapshotDetail>, Failure> {
    Ok(Json(state.daemon.take_snapshot(body(&request, None)?).await?))
}

#[utoipa::path(post, path = "/v1/sandboxes/{name}/fork", params(("name" = String, Path)), request_body = ForkRequest, responses((status = 200, body = Vec<SandboxDetail>, description = "once all of them are up"), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub(crate) async fn fork(
    State(state): State<ApiState>,
    Path(name): Path<String>,
    request: Bytes,
) -> Result<Json<Vec<SandboxDetail>>, Failure> {
    let name = SandboxName::parse(&name).map_err(Failure)?;
    Ok(Json(state.daemon.fork(&name, body(&request, None)?).await?))
}

#[utoipa::path(get, path = "/v1/snapshots/{name}", params(("name" = String, Path)), responses((status = 200, body = SnapshotDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn inspect(
    State(state): State<ApiState>,
    Path(name): Path<String>,
) -> Result<Json<SnapshotDetail>, Failure> {
    Ok(Json(state.daemon.inspect_snapshot(named(&name)?.as_str()).await?))
}

#[utoipa::path(delete, path = "/v1/snapshots/{name}", params(("name" = String, Path)), responses((status = 200), (status = "4XX", body = ApiError)))]
pub(crate) async fn remove(
    State(state): State<ApiState>,
    Path(name): Path<String>,
) -> Result<Json<serde_json::Value>, Failure> {
    state.daemon.remove_snapshot(named(&name)?).await?;
    Ok(Json(serde_json::json!({})))
}

#[utoipa::path(post, path = "/v1/snapshots/{name}/verify", params(("name" = String, Path)), responses((status = 200, body = SnapshotCheck), (status = "4XX", body = ApiError)))]
pub(crate) async fn verify(
    State(state): State<ApiState>,
    Path(name): Path<String>,
) -> Result<Json<SnapshotCheck>, Failure> {
    Ok(Json(state.daemon.verify_snapshot(&named(&name)?).await?))
}

#[utoipa::path(get, path = "/v1/snapshots/{name}/archive", params(("name" = String, Path)), responses((status = 200, body = String, content_type = "application/zstd", description = "a .tar.zst of manifest.json and disk.img"), (status = "4XX", body = ApiError)))]
pub(crate) async fn export(State(state): State<ApiState>, Path(name): Path<String>) -> Result<Response, Failure> {
    let name = named(&name)?;
    archives::answer("application/zstd", move |out| async move { state.daemon.export_snapshot(&name, out).await }).await
}

#[utoipa::path(post, path = "/v1/snapshot-archives", params(ImportSnapshot), request_body(content = String, content_type = "application/zstd", description = "a .tar.zst as an export gives it"), responses((status = 200, body = SnapshotDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn import(
    State(state): State<ApiState>,
    how: Result<Query<ImportSnapshot>, QueryRejection>,
    request: Request,
) -> Result<Json<SnapshotDetail>, Failure> {
    let name = query(how)?.name.as_deref().map(named).transpose()?;
    let archive = archives::reader(request.into_body());
    Ok(Json(state.daemon.import_snapshot(name, Box::new(archive)).await?))
}
