//! Snapshots as handles of a type. The functions use the service of this environment, those ending in `_on` a given one.

use std::path::Path;

use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::{
    CreateSnapshot, ImportSnapshot, SnapshotCheck, SnapshotDetail, SnapshotSummary, snapshot_name,
};
use tokio_util::io::ReaderStream;

use crate::builder::SandboxBuilder;
use crate::client::Client;
use crate::error::Error;
use crate::image::{self, ARCHIVE_CHUNK_LEN};

/// A snapshot, as it was when it was asked for.
#[derive(Clone, Debug)]
pub struct Snapshot {
    client: Client,
    detail: SnapshotDetail,
}

impl Snapshot {
    /// Takes a snapshot of a stopped sandbox.
    ///
    /// # Errors
    /// `sandbox_still_running`, `snapshot_already_exists`, `disk_full`.
    pub async fn create(name: &str, from: &str) -> Result<Self, Error> {
        let name = parse(name)?;
        let from = SandboxName::parse(from).map_err(Error::InvalidConfig)?;
        let request = CreateSnapshot { name, from, labels: Default::default(), memory: false };
        Self::create_on(&Client::connect().await?, &request).await
    }

    /// Takes a snapshot on a given service.
    ///
    /// # Errors
    /// As [`Snapshot::create`].
    pub async fn create_on(client: &Client, request: &CreateSnapshot) -> Result<Self, Error> {
        Ok(Self { client: client.clone(), detail: client.create_snapshot(request).await? })
    }

    /// The snapshot of this name.
    ///
    /// # Errors
    /// `snapshot_not_found`.
    pub async fn get(name: &str) -> Result<Self, Error> {
        Self::get_on(&Client::connect().await?, name).await
    }

    /// One snapshot of a given service.
    ///
    /// # Errors
    /// As [`Snapshot::get`].
    pub async fn get_on(client: &Client, name: &str) -> Result<Self, Error> {
        Ok(Self { client: client.clone(), detail: client.snapshot(&parse(name)?).await? })
    }

    /// Every snapshot, by name.
    ///
    /// # Errors
    /// Those of [`Client::connect`].
    pub async fn list() -> Result<Vec<SnapshotSummary>, Error> {
        Ok(Client::connect().await?.snapshots().await?.snapshots)
    }

    /// Takes an archive in, under the name it was taken under or another. It is there once every byte of it was compared.
    ///
    /// # Errors
    /// `path_not_found`, `invalid_archive`, `digest_mismatch`, `image_not_found` for an image that is not in the store, `disk_full`.
    pub async fn import(archive: impl AsRef<Path>, name: Option<&str>) -> Result<Self, Error> {
        let path = archive.as_ref();
        let file = tokio::fs::File::open(path).await.map_err(|error| image::file_error(path, &error))?;
        let client = Client::connect().await?;
        let how = ImportSnapshot { name: name.map(str::to_owned) };
        let detail = client.import_snapshot(ReaderStream::with_capacity(file, ARCHIVE_CHUNK_LEN), &how).await?;
        Ok(Self { client, detail })
    }

    /// Describes a new sandbox that begins with this snapshot's disk, image, environment and size.
    #[must_use]
    pub fn sandbox(&self, name: impl Into<String>) -> SandboxBuilder {
        SandboxBuilder::of_snapshot(Some(name.into()), &self.detail)
    }

    /// What it was when it was asked for.
    #[must_use]
    pub fn detail(&self) -> &SnapshotDetail {
        &self.detail
    }

    /// Compares every byte with what was written.
    ///
    /// # Errors
    /// `snapshot_not_found` if it is gone; damage is in the answer.
    pub async fn verify(&self) -> Result<SnapshotCheck, Error> {
        self.client.verify_snapshot(&self.detail.summary.name).await
    }

    /// Writes it as one `.tar.zst`. The file is there whole or not at all.
    ///
    /// # Errors
    /// `snapshot_damaged`, and what the file system says.
    pub async fn export(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let archive = self.client.export_snapshot(&self.detail.summary.name).await?;
        image::write_whole(archive, path.as_ref()).await
    }

    /// Removes it.
    ///
    /// # Errors
    /// `snapshot_in_use` naming the snapshots that were taken on top of it.
    pub async fn remove(self) -> Result<(), Error> {
        self.client.remove_snapshot(&self.detail.summary.name).await
    }
}

fn parse(name: &str) -> Result<SandboxName, Error> {
    snapshot_name(name).map_err(Error::InvalidConfig)
}
