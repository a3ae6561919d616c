//! Routes about the service itself.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use msb_protocol::control::{ActorTree, HostInfo, ShutdownRequest, VersionInfo};
use msb_protocol::error::ApiError;
use msb_protocol::version::{CONTROL_API_VERSION, GUEST_GENERATION};

use super::ApiState;
use super::failure::{Failure, body};

fn version_info(state: &ApiState) -> VersionInfo {
    VersionInfo {
        version: env!("CARGO_PKG_VERSION").into(),
        api_version: CONTROL_API_VERSION,
        guest_generation: GUEST_GENERATION,
        pid: std::process::id(),
        started_at: state.started_at,
    }
}

#[utoipa::path(get, path = "/v1/version", responses((status = 200, body = VersionInfo)))]
pub(crate) async fn version(State(state): State<ApiState>) -> Json<VersionInfo> {
    Json(version_info(&state))
}

#[utoipa::path(get, path = "/v1/host", responses((status = 200, body = HostInfo), (status = "5XX", body = ApiError)))]
pub(crate) async fn host(State(state): State<ApiState>) -> Result<Json<HostInfo>, Failure> {
    let surroundings = state.daemon.surroundings();
    let home = surroundings.home.home.clone();
    let free = tokio::task::spawn_blocking({
        let home = home.clone();
        move || rustix::fs::statvfs(&home).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
    });
    Ok(Json(HostInfo {
        service: version_info(&state),
        home: home.display().to_string(),
        runtime_dir: surroundings.runtime_dir.display().to_string(),
        share_dir: state.share_dir.display().to_string(),
        kernel: surroundings.host.kernel.display().to_string(),
        probe: state.probe.report().await?,
        sandboxes: state.daemon.count().await?,
        home_free_bytes: free.await.unwrap_or_default(),
    }))
}

#[utoipa::path(post, path = "/v1/shutdown", request_body = ShutdownRequest, responses((status = 200, description = "the daemon ends, sandboxes go on unless they are to stop too"), (status = "4XX", body = ApiError)))]
pub(crate) async fn shutdown(State(state): State<ApiState>, bytes: Bytes) -> Result<Json<serde_json::Value>, Failure> {
    let request = body(&bytes, Some(ShutdownRequest::default()))?;
    let stopped = if request.sandboxes { state.daemon.host_stop().await? } else { 0 };
    state.request_shutdown();
    Ok(Json(serde_json::json!({ "stopped": stopped })))
}

#[utoipa::path(get, path = "/v1/debug/actors", responses((status = 200, body = ActorTree)))]
pub(crate) async fn debug_actors(State(state): State<ApiState>) -> Result<Json<ActorTree>, Failure> {
    Ok(Json(state.daemon.actors().await?))
}
