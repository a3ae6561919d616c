//! Images of the store, as functions of a type.

use std::path::Path;

use msb_protocol::control::{ImageDetail, ImageSummary, LoadEvent};
use msb_protocol::error::{ApiError, ErrorCode};
use tokio_util::io::ReaderStream;

use crate::client::{Client, JsonLines};
use crate::error::Error;

/// Bytes of an archive that are read and sent at a time.
pub const ARCHIVE_CHUNK_LEN: usize = 256 << 10;

/// The images of the service of this environment.
#[derive(Clone, Copy, Debug)]
pub struct Image;

impl Image {
    /// Loads a docker or OCI archive.
    ///
    /// # Errors
    /// `path_not_found`, `invalid_archive`, `digest_mismatch`, `limit_exceeded`, `disk_full`.
    pub async fn load(archive: impl AsRef<Path>) -> Result<Vec<ImageSummary>, Error> {
        let path = archive.as_ref();
        let file = tokio::fs::File::open(path).await.map_err(|error| {
            let code = match error.kind() {
                std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
                _ => ErrorCode::PathNotFound,
            };
            Error::InvalidConfig(ApiError::new(code, format!("{}: {error}", path.display())))
        })?;
        let client = Client::connect().await?;
        let events = client.load_image(ReaderStream::with_capacity(file, ARCHIVE_CHUNK_LEN), None).await?;
        Self::finish(events).await
    }

    /// Follows a load to its end.
    ///
    /// # Errors
    /// The load's own error, or `daemon_unavailable` if the answer breaks off.
    pub async fn finish(mut events: JsonLines<LoadEvent>) -> Result<Vec<ImageSummary>, Error> {
        while let Some(event) = events.next().await? {
            match event {
                LoadEvent::Done { images } => return Ok(images),
                LoadEvent::Error { error } => return Err(Error::Api(error)),
                LoadEvent::Progress { .. } | LoadEvent::Layer { .. } | LoadEvent::Warning { .. } => {}
            }
        }
        Err(Error::unavailable("the load ended without an answer"))
    }

    /// Every image, newest first.
    ///
    /// # Errors
    /// Those of [`Client::connect`].
    pub async fn list() -> Result<Vec<ImageSummary>, Error> {
        Ok(Client::connect().await?.images().await?.images)
    }

    /// Everything about one image.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn get(reference: &str) -> Result<ImageDetail, Error> {
        Client::connect().await?.image(reference).await
    }

    /// Removes an image that no sandbox uses.
    ///
    /// # Errors
    /// `image_not_found`, `image_in_use`.
    pub async fn remove(reference: &str) -> Result<(), Error> {
        Client::connect().await?.remove_image(reference, false).await
    }
}
