//! Routes of registries: pulling, and who is logged in where.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use bytes::Bytes;
use msb_protocol::error::ApiError;
use msb_protocol::images::{LoginReport, LoginRequest, PullEvent, PullRequest, RegistryList};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ApiState;
use super::failure::{Failure, body, query};
use super::images::json_lines;

/// Progress lines that wait for a slow client.
const PROGRESS_LEN: usize = 256;

/// Which registry.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct RegistryQuery {
    /// Host with port.
    registry: String,
}

/// A client that goes away cancels its pull; what has come is kept for the next one.
#[utoipa::path(post, path = "/v1/images/pull", request_body = PullRequest, responses((status = 200, body = PullEvent, content_type = "application/x-ndjson", description = "lines; the last one is done or error"), (status = "4XX", body = ApiError)))]
pub(crate) async fn pull(State(state): State<ApiState>, bytes: Bytes) -> Result<Response, Failure> {
    let request: PullRequest = body(&bytes, None)?;
    let (lines, waiting) = mpsc::channel::<PullEvent>(PROGRESS_LEN);
    let cancelled = CancellationToken::new();
    tokio::spawn(async move {
        let pulling = state.daemon.pull_image(request, cancelled.clone(), lines.clone());
        let gone = async {
            lines.closed().await;
            cancelled.cancel();
            // The pull itself says that it ended.
            std::future::pending::<()>().await;
        };
        let outcome = tokio::select! {
            outcome = pulling => outcome,
            () = gone => return,
        };
        let last = match outcome {
            Ok((image, was_present)) => PullEvent::Done { image: Box::new(image), was_present },
            Err(error) => PullEvent::Error { error },
        };
        // A client that went away does not read the end.
        let _ = lines.send(last).await;
    });
    Ok(json_lines(waiting))
}

#[utoipa::path(get, path = "/v1/registries", responses((status = 200, body = RegistryList), (status = "5XX", body = ApiError)))]
pub(crate) async fn list(State(state): State<ApiState>) -> Result<Json<RegistryList>, Failure> {
    Ok(Json(state.daemon.registries().await?))
}

#[utoipa::path(post, path = "/v1/registries/login", request_body = LoginRequest, responses((status = 200, body = LoginReport), (status = "4XX", body = ApiError), (status = "5XX", body = ApiError)))]
pub(crate) async fn login(State(state): State<ApiState>, bytes: Bytes) -> Result<Json<LoginReport>, Failure> {
    Ok(Json(state.daemon.login(body(&bytes, None)?).await?))
}

#[utoipa::path(delete, path = "/v1/registries/login", params(RegistryQuery), responses((status = 200), (status = "4XX", body = ApiError)))]
pub(crate) async fn logout(
    State(state): State<ApiState>,
    which: Result<Query<RegistryQuery>, QueryRejection>,
) -> Result<Json<serde_json::Value>, Failure> {
    state.daemon.logout(query(which)?.registry).await?;
    Ok(Json(serde_json::json!({})))
}
