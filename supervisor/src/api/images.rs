//! Routes of images.

use std::fs::File;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use msb_actors::images::{ArchiveSource, LoadOptions};
use msb_protocol::control::{ImageDetail, ImageList, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{DiskUsage, ImageRemoval, PinRequest, PruneReport, PruneRequest, SaveRequest, TagRequest};
use rustix::fs::OFlags;
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
/// store is then as it was. An archive that is a file of this machine need not be sent: with `path`, `device` and `inode` it is read
/// here, and what the store has of it is not even read.
#[utoipa::path(post, path = "/v1/images/load", params(("tag" = Option<Vec<String>>, Query, description = "NAME for the first image of the archive, or OLD=NEW"), ("platform" = Option<String>, Query, description = "as linux/amd64, where the archive has several"), ("path" = Option<String>, Query, description = "the archive is this file of the service's machine, and the body is empty"), ("device" = Option<u64>, Query, description = "of that file, as stat(2) tells it"), ("inode" = Option<u64>, Query, description = "of that file; path_not_found if the service sees another one")), request_body(content = String, content_type = "application/x-tar", description = "a docker or OCI archive"), responses((status = 200, body = LoadEvent, content_type = "application/x-ndjson", description = "lines; the last one is done or error")))]
pub(crate) async fn load(
    State(state): State<ApiState>,
    pairs: Result<Query<Vec<(String, String)>>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let (how, file) = load_options(query(pairs)?)?;
    let archive = match file {
        Some(file) => {
            ArchiveSource::File(tokio::task::spawn_blocking(|| file.open()).await.map_err(ApiError::internal)??)
        }
        None => ArchiveSource::Stream(Box::new(archives::reader(request.into_body()))),
    };
    let (lines, waiting) = mpsc::channel::<LoadEvent>(PROGRESS_LEN);
    tokio::spawn(async move {
        let last = match state.daemon.load_image(archive, how, lines.clone()).await {
            Ok(images) => LoadEvent::Done { images },
            Err(error) => LoadEvent::Error { error },
        };
        // A client that went away does not read the end.
        let _ = lines.send(last).await;
    });
    Ok(json_lines(waiting))
}

/// A file of this machine, as a client that has it open knows it. Whoever is served may read it: the service runs as its user.
#[derive(Debug, PartialEq, Eq)]
struct OwnFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl OwnFile {
    /// Opens it, if it is the one that the client means: in another mount namespace a path may lead elsewhere.
    fn open(self) -> Result<File, ApiError> {
        let refuse = |why: &str| {
            ApiError::new(ErrorCode::PathNotFound, format!("the service cannot read {}: {why}", self.path.display()))
                .with_hint("send the archive as the request's body")
        };
        let mut options = File::options();
        // Neither a FIFO without a writer nor a terminal may hold the service up or become its own.
        options.read(true).custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed());
        let file = options.open(&self.path).map_err(|error| refuse(&error.to_string()))?;
        let data = file.metadata().map_err(|error| refuse(&error.to_string()))?;
        if !data.is_file() || (data.dev(), data.ino()) != (self.device, self.inode) {
            return Err(refuse("it is another file here"));
        }
        Ok(file)
    }
}

/// How an archive is to be loaded, and the file that it is, where it is not the body.
fn load_options(pairs: Vec<(String, String)>) -> Result<(LoadOptions, Option<OwnFile>), ApiError> {
    if pairs.len() > TERMS_MAX {
        return Err(ApiError::new(ErrorCode::LimitExceeded, format!("a load has at most {TERMS_MAX} tags")));
    }
    let mut how = LoadOptions::default();
    let (mut path, mut numbers) = (None, [None; 2]);
    for (key, value) in pairs {
        match key.as_str() {
            "tag" => how.tags.push(value),
            "platform" => how.platform = Some(value),
            "path" => path = Some(PathBuf::from(value)),
            "device" | "inode" => {
                let number = value.parse::<u64>().map_err(|_| {
                    ApiError::new(ErrorCode::InvalidRequest, format!("{key} must be a number, not {value:?}"))
                })?;
                numbers[usize::from(key == "inode")] = Some(number);
            }
            _ => {
                return Err(ApiError::new(ErrorCode::InvalidRequest, format!("unknown query parameter {key:?}")));
            }
        }
    }
    let file = match (path, numbers) {
        (None, [None, None]) => None,
        (Some(path), [Some(device), Some(inode)]) if path.is_absolute() => Some(OwnFile { path, device, inode }),
        _ => {
            let why = "an archive that is a file needs path (absolute), device and inode";
            return Err(ApiError::new(ErrorCode::InvalidRequest, why));
        }
    };
    Ok((how, file))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> Result<(LoadOptions, Option<OwnFile>), ApiError> {
        load_options(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn a_file_is_named_by_all_three_or_by_none() {
        assert!(options(&[("tag", "a:1")]).unwrap().1.is_none());
        let whole = [("path", "/a.tar"), ("device", "1"), ("inode", "2")];
        let file = OwnFile { path: "/a.tar".into(), device: 1, inode: 2 };
        assert_eq!(options(&whole).unwrap().1, Some(file));
        for part in [&whole[..2], &whole[1..], &[("path", "a.tar"), whole[1], whole[2]], &[("device", "x")]] {
            assert_eq!(options(part).unwrap_err().code, ErrorCode::InvalidRequest, "{part:?}");
        }
    }

    #[test]
    fn only_the_file_that_is_meant_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive.tar");
        std::fs::write(&path, "archive").unwrap();
        let data = path.metadata().unwrap();
        let file = |path: &std::path::Path, inode| OwnFile { path: path.to_owned(), device: data.dev(), inode };
        assert!(file(&path, data.ino()).open().is_ok());
        let folder_inode = folder.path().metadata().unwrap().ino();
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let fifo_inode = fifo.metadata().unwrap().ino();
        let others = [(path.as_path(), data.ino() + 1), (folder.path(), folder_inode), (&fifo, fifo_inode)];
        for (path, inode) in others.into_iter().chain([(folder.path().join("none").as_path(), 1)]) {
            assert_eq!(file(path, inode).open().unwrap_err().code, ErrorCode::PathNotFound, "{}", path.display());
        }
    }
}
