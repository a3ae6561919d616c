//! The calls about snapshots. Part of [`Client`].

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper::{Method, header};
use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::{CreateSnapshot, ImportSnapshot, SnapshotCheck, SnapshotDetail, SnapshotList};

use super::answer::{Archive, parse};
use super::query::with_query;
use super::{Client, request};
use crate::connection;
use crate::error::Error;

impl Client {
    /// Every snapshot.
    ///
    /// # Errors
    /// Those of the service.
    pub async fn snapshots(&self) -> Result<SnapshotList, Error> {
        self.get("/v1/snapshots").await
    }

    /// One snapshot.
    ///
    /// # Errors
    /// `snapshot_not_found`.
    pub async fn snapshot(&self, name: &SandboxName) -> Result<SnapshotDetail, Error> {
        self.get(&format!("/v1/snapshots/{name}")).await
    }

    /// Takes a snapshot of a stopped sandbox, or of a running one with its memory; answers once it is durable.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`, `snapshot_already_exists`, `disk_full`.
    pub async fn create_snapshot(&self, request: &CreateSnapshot) -> Result<SnapshotDetail, Error> {
        self.post("/v1/snapshots", request).await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// `snapshot_not_found`, `snapshot_in_use` with the snapshots on top of it as details.
    pub async fn remove_snapshot(&self, name: &SandboxName) -> Result<(), Error> {
        self.delete(&format!("/v1/snapshots/{name}")).await
    }

    /// Compares every byte of a snapshot with what was written.
    ///
    /// # Errors
    /// `snapshot_not_found`; damage is in the answer.
    pub async fn verify_snapshot(&self, name: &SandboxName) -> Result<SnapshotCheck, Error> {
        self.post(&format!("/v1/snapshots/{name}/verify"), &serde_json::json!({})).await
    }

    /// Exports a snapshot as one `.tar.zst`. It is whole only if [`Archive::next`] came to its end.
    ///
    /// # Errors
    /// `snapshot_not_found`, `snapshot_damaged`.
    pub async fn export_snapshot(&self, name: &SandboxName) -> Result<Archive, Error> {
        let mut connection = self.fresh().await?;
        let path = format!("/v1/snapshots/{name}/archive");
        let response = connection::send(&mut connection, request(Method::GET, &path, connection::empty())?).await?;
        Ok(Archive { body: response.into_body(), _connection: connection })
    }

    /// Takes an archive in; answers once every byte of it was compared.
    ///
    /// # Errors
    /// `invalid_archive`, `digest_mismatch`, `image_not_found`, `snapshot_already_exists`, `disk_full`.
    pub async fn import_snapshot<S>(&self, archive: S, how: &ImportSnapshot) -> Result<SnapshotDetail, Error>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let pairs: Vec<_> = how.name.clone().map(|name| ("name", name)).into_iter().collect();
        let body = StreamBody::new(archive.map_ok(Frame::data)).boxed_unsync();
        let mut connection = self.fresh().await?;
        let mut request = request(Method::POST, &with_query("/v1/snapshot-archives", &pairs), body)?;
        request.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/zstd"));
        let response = connection::send(&mut connection, request).await?;
        parse(&connection::collect(response).await?)
    }
}
