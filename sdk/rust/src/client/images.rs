//! The calls about images, the store that keeps them and the registries that they come from. Part of [`Client`].

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Method, header};
use msb_protocol::control::{ImageDetail, ImageList, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::ErrorCode;
use msb_protocol::images::{
    DiskUsage, ImageRemoval, LoginReport, LoginRequest, PinRequest, PruneReport, PruneRequest, PullEvent, PullRequest,
    RegistryList, SaveRequest, TagRequest,
};
use tokio_util::io::ReaderStream;

use super::answer::{Archive, JsonLines, parse};
use super::query::{flag, with_query};
use super::{Client, json_request, request};
use crate::archive;
use crate::connection::{self, RequestBody};
use crate::error::Error;
use crate::image::ARCHIVE_CHUNK_LEN;

/// How an archive is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// `NAME` for the first image of the archive, or `OLD=NEW` for the one it calls OLD.
    pub tags: Vec<String>,
    /// The platform where the archive has several, as `linux/amd64`; the host's if absent.
    pub platform: Option<String>,
}

impl Client {
    /// The images of the store.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn images(&self) -> Result<ImageList, Error> {
        self.get("/v1/images").await
    }

    /// Everything about one image.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn image(&self, reference: &str) -> Result<ImageDetail, Error> {
        self.get(&with_query("/v1/image", &[("reference", reference.to_owned())])).await
    }

    /// Removes an image; `force` untags it even where sandboxes use it.
    ///
    /// # Errors
    /// `image_not_found`, `image_in_use` with the sandboxes as details.
    pub async fn remove_image(&self, reference: &str, force: bool) -> Result<ImageRemoval, Error> {
        let mut pairs = vec![("reference", reference.to_owned())];
        pairs.extend(flag("force", force));
        let request = request(Method::DELETE, &with_query("/v1/image", &pairs), connection::empty())?;
        parse(&self.call(request).await?)
    }

    /// Gives an image another name.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn tag_image(&self, request: &TagRequest) -> Result<ImageSummary, Error> {
        self.post("/v1/images/tag", request).await
    }

    /// Keeps prune from an image, or no more.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn pin_image(&self, request: &PinRequest) -> Result<ImageSummary, Error> {
        self.post("/v1/images/pin", request).await
    }

    /// Removes the images that the request allows and nothing needs.
    ///
    /// # Errors
    /// `invalid_label` for a filter that is none.
    pub async fn prune_images(&self, request: &PruneRequest) -> Result<PruneReport, Error> {
        self.post("/v1/images/prune", request).await
    }

    /// What uses how much of the disk.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn disk_usage(&self) -> Result<DiskUsage, Error> {
        self.get("/v1/store/usage").await
    }

    /// Fetches an image from its registry. The last event is `done` or `error`; dropping the lines cancels the pull, and what has come is
    /// kept for the next one.
    ///
    /// # Errors
    /// `invalid_request` and others of the service, here or as the last event.
    pub async fn pull_image(&self, request: &PullRequest) -> Result<JsonLines<PullEvent>, Error> {
        let mut connection = self.fresh().await?;
        let response = connection::send(&mut connection, json_request("/v1/images/pull", request)?).await?;
        Ok(JsonLines::new(response, Some(connection)))
    }

    /// Logs in to a registry; the service keeps the credential.
    ///
    /// # Errors
    /// `registry_denied`, `registry_failed`.
    pub async fn login(&self, request: &LoginRequest) -> Result<LoginReport, Error> {
        self.post("/v1/registries/login", request).await
    }

    /// Forgets the credential of a registry.
    ///
    /// # Errors
    /// `invalid_config` if there is none.
    pub async fn logout(&self, registry: &str) -> Result<(), Error> {
        self.delete(&with_query("/v1/registries/login", &[("registry", registry.to_owned())])).await
    }

    /// Registries that the service has credentials or settings for; never a secret.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn registries(&self) -> Result<RegistryList, Error> {
        self.get("/v1/registries").await
    }

    /// Saves images as one archive. An archive is whole only if [`Archive::next`] came to its end.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn save_images(&self, request: &SaveRequest) -> Result<Archive, Error> {
        let mut connection = self.fresh().await?;
        let response = connection::send(&mut connection, json_request("/v1/images/save", request)?).await?;
        Ok(Archive { body: response.into_body(), _connection: connection })
    }

    /// Loads an archive (docker or OCI, also compressed) into the store. The last event is `done` or `error`.
    ///
    /// # Errors
    /// `invalid_archive` and others of the service, here or as the last event.
    pub async fn load_image<S>(&self, archive: S, how: &LoadOptions) -> Result<JsonLines<LoadEvent>, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        self.load([], how, StreamBody::new(archive.map_ok(Frame::data)).boxed_unsync()).await
    }

    /// As [`Self::load_image`], of an archive that is a file: the service reads it in its place, if it sees the same file, and passes over
    /// what the store has.
    ///
    /// # Errors
    /// As there.
    pub async fn load_file(&self, file: std::fs::File, how: &LoadOptions) -> Result<JsonLines<LoadEvent>, Error> {
        if let Some(place) = archive::place(&file) {
            match self.load(place, how, connection::empty()).await {
                // It sees another file there, or is of a version that only takes what is sent.
                Err(error) if matches!(error.code(), ErrorCode::PathNotFound | ErrorCode::InvalidRequest) => {}
                answer => return answer,
            }
        }
        self.load_image(ReaderStream::with_capacity(tokio::fs::File::from_std(file), ARCHIVE_CHUNK_LEN), how).await
    }

    async fn load(
        &self,
        place: impl IntoIterator<Item = (&'static str, String)>,
        how: &LoadOptions,
        body: RequestBody,
    ) -> Result<JsonLines<LoadEvent>, Error> {
        let mut pairs: Vec<_> = how.tags.iter().map(|tag| ("tag", tag.clone())).collect();
        pairs.extend(how.platform.clone().map(|platform| ("platform", platform)));
        pairs.extend(place);
        // An upload is not sent on an idle connection: the service may have closed it, and the archive can be read only once.
        let mut connection = self.fresh().await?;
        let mut request = request(Method::POST, &with_query("/v1/images/load", &pairs), body)?;
        request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/x-tar"));
        let response = connection::send(&mut connection, request).await?;
        Ok(JsonLines::new(response, Some(connection)))
    }

    /// Checks the image store.
    ///
    /// # Errors
    /// Those of the service; damage is in the report.
    pub async fn check_store(&self) -> Result<StoreReport, Error> {
        self.get("/v1/store/check").await
    }
}
