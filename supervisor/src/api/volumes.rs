//! Routes of named volumes.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use msb_protocol::error::ApiError;
use msb_protocol::id::SandboxName;
use msb_protocol::mount::volume_name;
use msb_protocol::volume::{CreateVolume, VolumeDetail, VolumeList};

use super::ApiState;
use super::failure::{Failure, body};

fn named(name: &str) -> Result<SandboxName, Failure> {
    volume_name(name).map_err(Failure)
}

#[utoipa::path(get, path = "/v1/volumes", responses((status = 200, body = VolumeList)))]
pub(crate) async fn list(State(state): State<ApiState>) -> Result<Json<VolumeList>, Failure> {
    Ok(Json(VolumeList { volumes: state.daemon.list_volumes().await? }))
}

#[utoipa::path(post, path = "/v1/volumes", request_body = CreateVolume, responses((status = 200, body = VolumeDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn create(State(state): State<ApiState>, request: Bytes) -> Result<Json<VolumeDetail>, Failure> {
    Ok(Json(state.daemon.create_volume(body(&request, None)?).await?))
}

#[utoipa::path(get, path = "/v1/volumes/{name}", params(("name" = String, Path)), responses((status = 200, body = VolumeDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn inspect(
    State(state): State<ApiState>,
    Path(name): Path<String>,
) -> Result<Json<VolumeDetail>, Failure> {
    Ok(Json(state.daemon.inspect_volume(named(&name)?).await?))
}

#[utoipa::path(delete, path = "/v1/volumes/{name}", params(("name" = String, Path)), responses((status = 200), (status = "4XX", body = ApiError)))]
pub(crate) async fn remove(
    State(state): State<ApiState>,
    Path(name): Path<String>,
) -> Result<Json<serde_json::Value>, Failure> {
    state.daemon.remove_volume(named(&name)?).await?;
    Ok(Json(serde_json::json!({})))
}
