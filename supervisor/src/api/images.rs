//! Routes of images.

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use msb_actors::images::LoadOptions;
use msb_protocol::control::{ImageDetail, ImageList, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{DiskUsage, ImageRemoval, PinRequest, PruneReport, PruneRequest, SaveRequest, TagRequest};
use tokio::sync::mpsc;

use super::failure::{Failure, body, query};
use super::sandboxes::TERMS_MAX;
use super::{ApiState, archives};

/// Progress lines that wait for a slow client.
const PROGRESS_LEN: usize = 64;

/// Which image.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImageQuery {
    /// Name, digest, or a digest's first digits.
    reference: String,
    /// On removal: even if a sandbox uses it.
    #[serde(default)]
    force: bool,
}

#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = ImageList)))]
pub(crate) async fn list(State(state): State<ApiState>) -> Result<Json<ImageList>, Failure> {
    Ok(Json(ImageList { images: state.daemon.list_images().await? }))
}

#[utoipa::path(get, path = "/v1/image", params(ImageQuery), responses((status = 200, body = ImageDetail), (status = "4XX", body = ApiError)))]
pub(crate) async fn inspect(
    State(state): State<ApiState>,
    which: Result<Query<ImageQuery>, QueryRejection>,
) -> Result<Json<ImageDetail>, Failure> {
    Ok(Json(state.daemon.inspect_image(query(which)?.reference).await?))
}

#[utoipa::path(delete, path = "/v1/image", params(ImageQuery), responses((status = 200, body = ImageRemoval), (status = "4XX", body = ApiError)))]
pub(crate) async fn remove(
    State(state): State<ApiState>,
    which: Result<Query<ImageQuery>, QueryRejection>,
) -> Result<Json<ImageRemoval>, Failure> {
    let which = query(which)?;
    Ok(Json(state.daemon.remove_image(which.reference, which.force).await?))
}

#[utoipa::path(post, path = "/v1/images/tag", request_body = TagRequest, responses((status = 200, body = ImageSummary), (status = "4XX", body = ApiError)))]
pub(crate) async fn tag(State(state): State<ApiState>, bytes: Bytes) -> Result<Json<ImageSummary>, Failure> {
    Ok(Json(state.daemon.tag_image(body(&bytes, None)?).await?))
}

#[utoipa::path(post, path = "/v1/images/pin", request_body = PinRequest, responses((status = 200, body = ImageSummary), (status = "4XX", body = ApiError)))]
pub(crate) async fn pin(State(state): State<ApiState>, bytes: Bytes) -> Result<Json<ImageSummary>, Failure> {
    Ok(Json(state.daemon.pin_image(body(&bytes, None)?).await?))
}

#[utoipa::path(post, path = "/v1/images/prune", request_body = PruneRequest, responses((status = 200, body = PruneReport), (status = "4XX", body = ApiError)))]
pub(crate) async fn prune(State(state): State<ApiState>, bytes: Bytes) -> Result<Json<PruneReport>, Failure> {
    Ok(Json(state.daemon.prune_images(body(&bytes, Some(PruneRequest::default()))?).await?))
}

#[utoipa::path(get, path = "/v1/store/usage", responses((status = 200, body = DiskUsage), (status = "5XX", body = ApiError)))]
pub(crate) async fn usage(State(state): State<ApiState>) -> Result<Json<DiskUsage>, Failure> {
    Ok(Json(state.daemon.disk_usage().await?))
}

#[utoipa::path(post, path = "/v1/images/save", request_body = SaveRequest, responses((status = 200, body = String, content_type = "application/x-tar", description = "a docker or OCI archive"), (status = "4XX", body = ApiError)))]
pub(crate) async fn save(State(state): State<ApiState>, bytes: Bytes) -> Result<Response, Failure> {
    let what: SaveRequest = body(&bytes, None)?;
    if what.references.is_empty() {
        return Err(Failure(ApiError::new(ErrorCode::InvalidRequest, "no image is named")));
    }
    archives::answer("application/x-tar", move |out| async move { state.daemon.save_images(what, out).await }).await
}

#[utoipa::path(get, path = "/v1/store/check", responses((status = 200, body = StoreReport), (status = "5XX", body = ApiError)))]
pub(crate) async fn check_store(State(state): State<ApiState>) -> Result<Json<StoreReport>, Failure> {
    Ok(Json(state.daemon.check_store().await?))
}

/// The body is read by the store as it goes, so it is never held as a whole; a client that goes away ends the load, and the
/// store is then as it was.
#[utoipa::path(post, path = "/v1/images/load", params(("tag" = Option<Vec<String>>, Query, description = "NAME for the first image of the archive, or OLD=NEW"), ("platform" = Option<String>, Query, description = "as linux/amd64, where the archive has several")), request_body(content = String, content_type = "application/x-tar", description = "a docker or OCI archive"), responses((status = 200, body = LoadEvent, content_type = "application/x-ndjson", description = "lines; the last one is done or error")))]
pub(crate) async fn load(
    State(state): State<ApiState>,
    pairs: Result<Query<Vec<(String, String)>>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let how = load_options(query(pairs)?)?;
    let (lines, waiting) = mpsc::channel::<LoadEvent>(PROGRESS_LEN);
    let archive = archives::reader(request.into_body());
    tokio::spawn(async move {
        let last = match state.daemon.load_image(Box::new(archive), how, lines.clone()).await {
            Ok(images) => LoadEvent::Done { images },
            Err(error) => LoadEvent::Error { error },
        };
        // A client that went away does not read the end.
        let _ = lines.send(last).await;
    });
    Ok(json_lines(waiting))
}

fn load_options(pairs: Vec<(String, String)>) -> Result<LoadOptions, ApiError> {
    if pairs.len() > TERMS_MAX {
        return Err(ApiError::new(ErrorCode::LimitExceeded, format!("a load has at most {TERMS_MAX} tags")));
    }
    let mut how = LoadOptions::default();
    for (key, value) in pairs {
        match key.as_str() {
            "tag" => how.tags.push(value),
            "platform" => how.platform = Some(value),
            _ => {
                return Err(ApiError::new(ErrorCode::InvalidRequest, format!("unknown query parameter {key:?}")));
            }
        }
    }
    Ok(how)
}

/// Values as lines of JSON.
pub(crate) fn json_lines<T: serde::Serialize + Send + 'static>(values: mpsc::Receiver<T>) -> Response {
    let lines = futures_util::stream::unfold(values, |mut values| async move {
        let value = values.recv().await?;
        let line = serde_json::to_vec(&value).map(|mut line| {
            line.push(b'\n');
            Bytes::from(line)
        });
        Some((line.map_err(std::io::Error::other), values))
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}
