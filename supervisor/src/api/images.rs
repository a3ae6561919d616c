//! Routes of images.

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use msb_actors::images::LoadOptions;
use msb_protocol::control::{ImageDetail, ImageList, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{DiskUsage, ImageRemoval, PinRequest, PruneReport, PruneRequest, SaveRequest, TagRequest};
use tokio::sync::mpsc;

use super::ApiState;
use super::failure::{Failure, body, query};
use super::sandboxes::TERMS_MAX;

/// Progress lines that wait for a slow client.
const PROGRESS_LEN: usize = 64;

/// Pieces of a body that wait for the store.
const PIECES_LEN: usize = 16;

/// Largest piece of an archive on its way to a client, in bytes.
const PIECE_LEN_MAX: usize = 256 << 10;

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

/// What fails before the first byte is an error with its status; what fails later breaks the answer off, so that no client takes a
/// part for the whole.
#[utoipa::path(post, path = "/v1/images/save", request_body = SaveRequest, responses((status = 200, body = String, content_type = "application/x-tar", description = "a docker or OCI archive"), (status = "4XX", body = ApiError)))]
pub(crate) async fn save(State(state): State<ApiState>, bytes: Bytes) -> Result<Response, Failure> {
    let what: SaveRequest = body(&bytes, None)?;
    if what.references.is_empty() {
        return Err(Failure(ApiError::new(ErrorCode::InvalidRequest, "no image is named")));
    }
    let (pieces, mut waiting) = mpsc::channel::<std::io::Result<Bytes>>(PIECES_LEN);
    let out = std::io::BufWriter::with_capacity(PIECE_LEN_MAX, BodyWriter { pieces: pieces.clone() });
    let saving = tokio::spawn(async move { state.daemon.save_images(what, Box::new(out)).await });
    drop(pieces);
    // The first piece says that every name was found.
    let Some(first) = waiting.recv().await else {
        return match saving.await.map_err(ApiError::internal)? {
            Ok(()) => Err(Failure(ApiError::internal("an archive without a byte"))),
            Err(error) => Err(Failure(error)),
        };
    };
    let pieces =
        futures_util::stream::unfold((Some(first), waiting, Some(saving)), |(first, mut waiting, saving)| async {
            if let Some(piece) = first {
                return Some((piece, (None, waiting, saving)));
            }
            if let Some(piece) = waiting.recv().await {
                return Some((piece, (None, waiting, saving)));
            }
            match saving?.await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "a save broke off");
                    Some((Err(std::io::Error::other(error)), (None, waiting, None)))
                }
                Err(error) => Some((Err(std::io::Error::other(error)), (None, waiting, None))),
            }
        });
    Ok(([(CONTENT_TYPE, "application/x-tar")], Body::from_stream(pieces)).into_response())
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

/// An answer's body for a writer that blocks. A client that went away is a broken pipe.
struct BodyWriter {
    pieces: mpsc::Sender<std::io::Result<Bytes>>,
}

impl std::io::Write for BodyWriter {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let piece = Bytes::copy_from_slice(buffer);
        self.pieces.blocking_send(Ok(piece)).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
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
