//! Images of the store, as handles of a type.
//!
//! What takes long (pull, load, save) is a stream of progress with an end; [`Pull::finish`] and [`Load::finish`] follow it for those who only
//! want the end. The functions of [`Image`] use the service of this environment, those ending in `_on` a given one.

use std::path::Path;

use bytes::Bytes;
use futures_util::Stream;
use msb_protocol::control::{ImageDetail, ImageSummary, LoadEvent};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{
    ImageRemoval, PinRequest, PruneReport, PruneRequest, PullEvent, PullRequest, SaveRequest, TagRequest,
};
use tokio::io::AsyncWriteExt;

use crate::client::{Archive, Client, JsonLines, LoadOptions};
use crate::error::Error;

/// Bytes of an archive that are read and sent at a time.
pub const ARCHIVE_CHUNK_LEN: usize = 256 << 10;

/// An image of the store, as it was when it was asked for.
#[derive(Clone, Debug)]
pub struct Image {
    client: Client,
    summary: ImageSummary,
}

impl Image {
    /// Fetches an image from its registry: [`Image::start_pull`], followed to its end.
    ///
    /// # Errors
    /// `registry_failed`, `registry_denied`, `image_not_found`, `digest_mismatch`, `disk_full`.
    pub async fn pull(reference: &str) -> Result<Self, Error> {
        let request = PullRequest { reference: reference.to_owned(), ..PullRequest::default() };
        Self::start_pull(&Client::connect().await?, &request).await?.finish().await
    }

    /// Begins to fetch an image. Dropping the pull cancels it; what has come is kept for the next one.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn start_pull(client: &Client, request: &PullRequest) -> Result<Pull, Error> {
        Ok(Pull { client: client.clone(), events: client.pull_image(request).await? })
    }

    /// Loads every image of a docker or OCI archive, also a compressed one.
    ///
    /// # Errors
    /// `path_not_found`, `invalid_archive`, `digest_mismatch`, `limit_exceeded`, `disk_full`.
    pub async fn load(archive: impl AsRef<Path>) -> Result<Vec<Self>, Error> {
        let file = std::fs::File::open(archive.as_ref()).map_err(|error| file_error(archive.as_ref(), &error))?;
        let client = Client::connect().await?;
        let events = client.load_file(file, &LoadOptions::default()).await?;
        Load { client, events }.finish().await
    }

    /// Begins to load an archive.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn start_load<S>(client: &Client, archive: S, how: &LoadOptions) -> Result<Load, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        Ok(Load { client: client.clone(), events: client.load_image(archive, how).await? })
    }

    /// Saves images as one archive. The file is there whole or not at all.
    ///
    /// # Errors
    /// `image_not_found`, and what the file system says.
    pub async fn save_all(client: &Client, request: &SaveRequest, path: impl AsRef<Path>) -> Result<(), Error> {
        write_whole(client.save_images(request).await?, path.as_ref()).await
    }

    /// Every image, newest first.
    ///
    /// # Errors
    /// Those of [`Client::connect`].
    pub async fn list() -> Result<Vec<Self>, Error> {
        let client = Client::connect().await?;
        let images = client.images().await?.images;
        Ok(images.into_iter().map(|summary| Self { client: client.clone(), summary }).collect())
    }

    /// One image, by name, digest, or a digest's first digits.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn get(reference: &str) -> Result<Self, Error> {
        Self::get_on(&Client::connect().await?, reference).await
    }

    /// One image of a given service.
    ///
    /// # Errors
    /// As [`Image::get`].
    pub async fn get_on(client: &Client, reference: &str) -> Result<Self, Error> {
        let summary = client.image(reference).await?.summary;
        Ok(Self { client: client.clone(), summary })
    }

    /// Removes the images that the request allows and nothing needs.
    ///
    /// # Errors
    /// `invalid_label` for a filter that is none.
    pub async fn prune(request: &PruneRequest) -> Result<PruneReport, Error> {
        Client::connect().await?.prune_images(request).await
    }

    /// What it was when it was asked for.
    #[must_use]
    pub fn summary(&self) -> &ImageSummary {
        &self.summary
    }

    /// Digest of its manifest.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.summary.digest
    }

    /// Everything about it, as it is now.
    ///
    /// # Errors
    /// `image_not_found` if it is gone.
    pub async fn inspect(&self) -> Result<ImageDetail, Error> {
        self.client.image(&self.summary.digest).await
    }

    /// Removes it with all its names. With `force` one that is in use only loses its names.
    ///
    /// # Errors
    /// `image_in_use`: [`Error::image_users`] names the sandboxes.
    pub async fn remove(&self, force: bool) -> Result<ImageRemoval, Error> {
        self.client.remove_image(&self.summary.digest, force).await
    }

    /// Saves it as a docker archive.
    ///
    /// # Errors
    /// As [`Image::save_all`].
    pub async fn save(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let request = SaveRequest { references: vec![self.summary.digest.clone()], ..SaveRequest::default() };
        Self::save_all(&self.client, &request, path).await
    }

    /// Gives it another name.
    ///
    /// # Errors
    /// `invalid_reference`, `image_not_found` if it is gone.
    pub async fn tag(&self, name: &str) -> Result<Self, Error> {
        let request = TagRequest { reference: self.summary.digest.clone(), name: name.to_owned() };
        Ok(Self { client: self.client.clone(), summary: self.client.tag_image(&request).await? })
    }

    /// Keeps prune from it, or no more.
    ///
    /// # Errors
    /// `image_not_found` if it is gone.
    pub async fn pin(&self, pinned: bool) -> Result<Self, Error> {
        let request = PinRequest { reference: self.summary.digest.clone(), pinned };
        Ok(Self { client: self.client.clone(), summary: self.client.pin_image(&request).await? })
    }
}

/// A pull under way.
pub struct Pull {
    client: Client,
    events: JsonLines<PullEvent>,
}

impl Pull {
    /// The next step; `None` after the last.
    ///
    /// # Errors
    /// `daemon_unavailable` if the answer breaks off.
    pub async fn next(&mut self) -> Result<Option<PullEvent>, Error> {
        self.events.next().await
    }

    /// Follows it to its end.
    ///
    /// # Errors
    /// The pull's own error, or `daemon_unavailable` if the answer breaks off.
    pub async fn finish(mut self) -> Result<Image, Error> {
        while let Some(event) = self.next().await? {
            match event {
                PullEvent::Done { image, .. } => return Ok(Image { client: self.client, summary: *image }),
                PullEvent::Error { error } => return Err(Error::Api(error)),
                _ => {}
            }
        }
        Err(Error::unavailable("the pull ended without an answer"))
    }
}

/// A load under way.
pub struct Load {
    client: Client,
    events: JsonLines<LoadEvent>,
}

impl Load {
    /// The next step; `None` after the last.
    ///
    /// # Errors
    /// `daemon_unavailable` if the answer breaks off.
    pub async fn next(&mut self) -> Result<Option<LoadEvent>, Error> {
        self.events.next().await
    }

    /// Follows it to its end.
    ///
    /// # Errors
    /// The load's own error, or `daemon_unavailable` if the answer breaks off.
    pub async fn finish(mut self) -> Result<Vec<Image>, Error> {
        while let Some(event) = self.next().await? {
            match event {
                LoadEvent::Done { images } => {
                    let handle = |summary| Image { client: self.client.clone(), summary };
                    return Ok(images.into_iter().map(handle).collect());
                }
                LoadEvent::Error { error } => return Err(Error::Api(error)),
                LoadEvent::Progress { .. } | LoadEvent::Layer { .. } | LoadEvent::Warning { .. } => {}
            }
        }
        Err(Error::unavailable("the load ended without an answer"))
    }
}

/// Writes an archive to a file that is there whole or not at all.
pub(crate) async fn write_whole(mut archive: Archive, path: &Path) -> Result<(), Error> {
    let failed = |error: std::io::Error| file_error(path, &error);
    let name = path.file_name().ok_or_else(|| failed(std::io::ErrorKind::IsADirectory.into()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(hidden);
    let write = async {
        let mut file = tokio::fs::File::create_new(&temporary).await.map_err(failed)?;
        while let Some(piece) = archive.next().await? {
            file.write_all(&piece).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        tokio::fs::rename(&temporary, path).await.map_err(failed)
    };
    let outcome = write.await;
    if outcome.is_err() {
        // The error of the archive itself is the one to tell.
        let _ = tokio::fs::remove_file(&temporary).await;
    }
    outcome
}

pub(crate) fn file_error(path: &Path, error: &std::io::Error) -> Error {
    let code = match error.kind() {
        std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
        _ => ErrorCode::PathNotFound,
    };
    Error::InvalidConfig(ApiError::new(code, format!("{}: {error}", path.display())))
}
