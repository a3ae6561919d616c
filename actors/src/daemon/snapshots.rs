//! What a daemon can do with snapshots. Each function is one request of the API.

use std::io::{Read, Write};

use msb_image::snapshot::Importing;
use msb_protocol::control::CreateRequest;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::images::DiskUsageRow;
use msb_protocol::snapshot::{CreateSnapshot, SnapshotCheck, SnapshotDetail, SnapshotSummary};

use super::{Daemon, mailbox};
use crate::images::{ImageUser, ImageUsers, Prepare, PreparedImage};
use crate::sandbox::actor::HoldDisk;
use crate::snapshots::{ListSnapshots, Make, RemoveSnapshot, Snapshot, Snapshots};

impl Daemon {
    pub(super) fn snapshots(&self) -> &Snapshots {
        &self.surroundings.snapshots
    }

    /// Every snapshot, by name.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn list_snapshots(&self) -> Result<Vec<SnapshotSummary>, ApiError> {
        let all = self.snapshots().actor.send(ListSnapshots).await.map_err(mailbox)?;
        let files = self.snapshots().files.clone();
        let shown = tokio::task::spawn_blocking(move || all.iter().map(|snapshot| snapshot.summary(&files)).collect());
        shown.await.map_err(ApiError::internal)
    }

    /// One snapshot, by name or identity.
    ///
    /// # Errors
    /// `snapshot_not_found`.
    pub async fn inspect_snapshot(&self, which: &str) -> Result<SnapshotDetail, ApiError> {
        let snapshot = self.snapshots().find(which).await?;
        self.shown(snapshot).await
    }

    async fn shown(&self, snapshot: Snapshot) -> Result<SnapshotDetail, ApiError> {
        let files = self.snapshots().files.clone();
        tokio::task::spawn_blocking(move || snapshot.detail(&files)).await.map_err(ApiError::internal)
    }

    /// Takes a snapshot of a sandbox at rest.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`, `snapshot_already_exists`, `disk_full`; nothing is left then.
    pub async fn take_snapshot(&self, request: CreateSnapshot) -> Result<SnapshotDetail, ApiError> {
        msb_protocol::labels::check_all(&request.labels)?;
        let sandbox = self.find(&request.from).await?;
        let busy = || {
            ApiError::new(ErrorCode::SandboxBusy, format!("the actor of sandbox {} is being made again", request.from))
        };
        let mut source = sandbox.address.as_ref().ok_or_else(busy)?.send(HoldDisk).await.map_err(|_| busy())??;
        // A parent that is gone is no parent: nothing would ever keep it.
        source.parent = match source.parent {
            Some(parent) => self.snapshots().find(&parent.id).await.is_ok().then_some(parent),
            None => None,
        };
        let make = Make::of_sandbox(request.name, request.labels, source, &self.surroundings.clock);
        let made = self.snapshots().actor.send(make).await.map_err(mailbox)??;
        self.shown(made).await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// `snapshot_not_found`, `snapshot_in_use` naming its children.
    pub async fn remove_snapshot(&self, name: SandboxName) -> Result<(), ApiError> {
        self.snapshots().actor.send(RemoveSnapshot(name)).await.map_err(mailbox)?
    }

    /// Compares every byte of a snapshot with what was written.
    ///
    /// # Errors
    /// `snapshot_not_found`; damage is in the answer.
    pub async fn verify_snapshot(&self, name: &SandboxName) -> Result<SnapshotCheck, ApiError> {
        let Snapshot { name, id, manifest, .. } = self.snapshots().find(name.as_str()).await?;
        let files = self.snapshots().files.clone();
        let work = tokio::task::spawn_blocking(move || {
            let (bytes, problems) = files.verify(&name, &id, &manifest)?;
            Ok(SnapshotCheck { name, bytes, problems })
        });
        work.await.map_err(ApiError::internal)?
    }

    /// Writes a snapshot as one archive to `out`, on the blocking pool.
    ///
    /// # Errors
    /// `snapshot_not_found`, `snapshot_damaged`, both before anything is written; what `out` says.
    pub async fn export_snapshot(&self, name: &SandboxName, mut out: Box<dyn Write + Send>) -> Result<(), ApiError> {
        let Snapshot { name, id, manifest, .. } = self.snapshots().find(name.as_str()).await?;
        let files = self.snapshots().files.clone();
        let work = tokio::task::spawn_blocking(move || Ok(files.export(&name, &id, &manifest, &mut *out)?));
        work.await.map_err(ApiError::internal)?
    }

    /// Takes an archive in. It is seen when every byte of it was compared.
    ///
    /// # Errors
    /// `invalid_archive`, `digest_mismatch`, `image_not_found` for an image that is not here, `snapshot_already_exists`, `disk_full`.
    pub async fn import_snapshot(
        &self,
        name: Option<SandboxName>,
        archive: Box<dyn Read + Send>,
    ) -> Result<SnapshotDetail, ApiError> {
        let opened = tokio::task::spawn_blocking(move || Importing::open(archive));
        let importing = opened.await.map_err(ApiError::internal)??;
        let manifest = importing.manifest();
        let name = name.unwrap_or_else(|| manifest.name.clone());
        let image = self.image_of(&name, &manifest.image).await?;
        let make = Make::of_archive(name, importing, image.lease);
        let made = self.snapshots().actor.send(make).await.map_err(mailbox)??;
        self.shown(made).await
    }

    /// The image that a snapshot needs, held.
    async fn image_of(
        &self,
        name: &SandboxName,
        image: &msb_protocol::snapshot::SnapshotImage,
    ) -> Result<PreparedImage, ApiError> {
        let prepared = self.surroundings.images.send(Prepare(image.digest.clone())).await.map_err(mailbox)?;
        prepared.map_err(|error| match error.code {
            ErrorCode::ImageNotFound => {
                let (reference, digest) = (&image.reference, &image.digest);
                let message = format!("snapshot {name} needs image {reference} ({digest}), which is not in the store");
                ApiError::new(ErrorCode::ImageNotFound, message).with_hint(format!(
                    "where the snapshot comes from: `msb save {reference} -o image.tar`, here `msb load -i image.tar`; or `msb pull {reference}`, \
                     if the registry still has that digest"
                ))
            }
            _ => error,
        })
    }

    /// Completes a request for a sandbox that begins with a snapshot's disk: the image is the snapshot's, the disk is no smaller. The
    /// lease keeps the image until the sandbox holds it itself.
    pub(super) async fn snapshot_for(
        &self,
        request: &mut CreateRequest,
    ) -> Result<Option<(Snapshot, PreparedImage)>, ApiError> {
        let Some(name) = &request.spec.snapshot else { return Ok(None) };
        let snapshot = self.snapshots().find(name.as_str()).await?;
        let image = self.image_of(name, &snapshot.manifest.image).await?;
        let size_mib = snapshot.manifest.disk.size_bytes.div_ceil(1 << 20);
        if u64::from(request.spec.root_size_mib) < size_mib {
            let message = format!(
                "the disk of snapshot {name} has {size_mib} MiB and cannot become smaller; {} were asked for",
                request.spec.root_size_mib
            );
            return Err(
                ApiError::new(ErrorCode::InvalidConfig, message).with_hint("leave --root-size out, or give more")
            );
        }
        request.spec.image.clone_from(&snapshot.manifest.image.reference);
        Ok(Some((snapshot, image)))
    }

    /// Adds the images that snapshots need.
    pub(super) async fn add_snapshot_images(&self, users: &mut ImageUsers) -> Result<(), ApiError> {
        for snapshot in self.snapshots().actor.send(ListSnapshots).await.map_err(mailbox)? {
            let user = ImageUser::Snapshot(snapshot.name);
            users.entry(snapshot.manifest.image.digest).or_default().push(user);
        }
        Ok(())
    }

    /// What snapshots take of the disk. None goes by itself, and only their user knows which could.
    pub(super) async fn snapshots_row(&self) -> Result<DiskUsageRow, ApiError> {
        let all = self.list_snapshots().await?;
        let count = all.len() as u64;
        let bytes = all.iter().map(|snapshot| snapshot.allocated_bytes).sum();
        Ok(DiskUsageRow { kind: "snapshots".into(), count, active: count, bytes, ..DiskUsageRow::default() })
    }
}
