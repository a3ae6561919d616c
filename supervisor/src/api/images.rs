//! Routes of images.

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use msb_protocol::control::{ImageDetail, ImageList, LoadEvent, StoreReport};
use msb_protocol::error::ApiError;
use tokio::sync::mpsc;

use super::ApiState;
use super::failure::{Failure, query};

/// Progress lines that wait for a slow client.
const PROGRESS_LEN: usize = 64;

/// Pieces of a body that wait for the store.
const PIECES_LEN: usize = 16;

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

/// What to call it.
#[derive(serde::Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(crate) struct LoadQuery {
    /// `NAME` for the first image of the archive, or `OLD=NEW`.
    tag: Option<String>,
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

#[utoipa::path(delete, path = "/v1/image", params(ImageQuery), responses((status = 200), (status = "4XX", body = ApiError)))]
pub(crate) async fn remove(
    State(state): State<ApiState>,
    which: Result<Query<ImageQuery>, QueryRejection>,
) -> Result<Json<serde_json::Value>, Failure> {
    let which = query(which)?;
    state.daemon.remove_image(which.reference, which.force).await?;
    Ok(Json(serde_json::json!({})))
}

#[utoipa::path(get, path = "/v1/store/check", responses((status = 200, body = StoreReport), (status = "5XX", body = ApiError)))]
pub(crate) async fn check_store(State(state): State<ApiState>) -> Result<Json<StoreReport>, Failure> {
    Ok(Json(state.daemon.check_store().await?))
}

/// The body is read by the store as it goes, so it is never held as a whole; a client that goes away ends the load, and the
/// store is then as it was.
#[utoipa::path(post, path = "/v1/images/load", params(LoadQuery), request_body(content = String, content_type = "application/x-tar", description = "a docker or OCI archive"), responses((status = 200, body = LoadEvent, content_type = "application/x-ndjson", description = "lines; the last one is done or error")))]
pub(crate) async fn load(
    State(state): State<ApiState>,
    how: Result<Query<LoadQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let tag = query(how)?.tag;
    let (lines, waiting) = mpsc::channel::<LoadEvent>(PROGRESS_LEN);
    let (pieces, archive) = mpsc::channel(PIECES_LEN);
    let archive = BodyReader { pieces: archive, rest: Bytes::new() };
    let mut body = request.into_body().into_data_stream();
    tokio::spawn(async move {
        while let Some(piece) = body.next().await {
            // A load that failed reads no further; the rest of the body is the connection's business.
            if pieces.send(piece.map_err(std::io::Error::other)).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let last = match state.daemon.load_image(Box::new(archive), tag, lines.clone()).await {
            Ok(images) => LoadEvent::Done { images },
            Err(error) => LoadEvent::Error { error },
        };
        // A client that went away does not read the end.
        let _ = lines.send(last).await;
    });
    Ok(json_lines(waiting))
}

/// A request's body for a reader that blocks. A body that breaks off is an error and never an early end.
struct BodyReader {
    pieces: mpsc::Receiver<std::io::Result<Bytes>>,
    rest: Bytes,
}

impl std::io::Read for BodyReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.rest.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.rest = piece?,
                None => return Ok(0),
            }
        }
        let len = self.rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&self.rest.split_to(len));
        Ok(len)
    }
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
