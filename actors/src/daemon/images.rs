//! What a daemon can do with images and the disk they take. Each function is one request of the API.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use msb_protocol::control::{CreateRequest, ImageDetail, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::ApiError;
use msb_protocol::images::{
    DiskUsage, DiskUsageRow, ImageRemoval, LoginReport, LoginRequest, PinRequest, PruneReport, PruneRequest, PullEvent,
    PullPolicy, PullRequest, RegistryList, SaveRequest, TagRequest, neither_here_nor_fetched,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Daemon, mailbox};
use crate::images::{
    ArchiveSource, CheckStore, ImageActor, ImageStore, ImageUsers, InspectImage, ListImages, LoadImage, LoadOptions,
    Prepare, PreparedImage, Work,
};
use crate::kept::Kept;
use crate::sandbox::directories::Directories;
use crate::supervisor::{ListImageUsers, Views};

impl Daemon {
    fn images(&self) -> &Kept<ImageActor> {
        &self.surroundings.images
    }

    /// Every image.
    ///
    /// # Errors
    /// `store_corrupt`.
    pub async fn list_images(&self) -> Result<Vec<ImageSummary>, ApiError> {
        self.images().send(ListImages).await.map_err(mailbox)?
    }

    /// One image.
    ///
    /// # Errors
    /// `image_not_found`.
    pub async fn inspect_image(&self, reference: String) -> Result<ImageDetail, ApiError> {
        let users = self.image_users().await?;
        self.images().send(InspectImage { reference, users }).await.map_err(mailbox)?
    }

    /// Removes an image.
    ///
    /// # Errors
    /// `image_in_use`, `image_not_found`.
    pub async fn remove_image(&self, reference: String, force: bool) -> Result<ImageRemoval, ApiError> {
        let users = self.image_users().await?;
        self.work(move |store| store.remove(&reference, force, &users)).await
    }

    /// Gives an image another name.
    ///
    /// # Errors
    /// `image_not_found`, `invalid_reference`.
    pub async fn tag_image(&self, request: TagRequest) -> Result<ImageSummary, ApiError> {
        self.work(move |store| store.tag(&request.reference, &request.name)).await
    }

    /// Keeps prune from an image, or no more.
    ///
    /// # Errors
    /// `image_not_found`.
    pub async fn pin_image(&self, request: PinRequest) -> Result<ImageSummary, ApiError> {
        self.work(move |store| store.pin(&request.reference, request.pinned)).await
    }

    /// Removes the images that the request allows and nobody needs.
    ///
    /// # Errors
    /// `invalid_label`.
    pub async fn prune_images(&self, request: PruneRequest) -> Result<PruneReport, ApiError> {
        let users = self.image_users().await?;
        self.work(move |store| store.prune(&request, &users)).await
    }

    /// Writes images as one archive to `out`, on the blocking pool.
    ///
    /// # Errors
    /// `image_not_found`, before anything is written; what `out` says.
    pub async fn save_images(&self, what: SaveRequest, mut out: Box<dyn Write + Send>) -> Result<(), ApiError> {
        self.work(move |store| store.save(&what, &mut *out)).await
    }

    /// What uses how much of the disk.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn disk_usage(&self) -> Result<DiskUsage, ApiError> {
        let users = self.image_users().await?;
        let mut rows = self.work(move |store| store.usage(&users)).await?;
        let views = self.supervisor.send(Views).await.map_err(mailbox)?;
        let places: Vec<_> = views
            .iter()
            .map(|view| {
                let summary = &view.detail.summary;
                (self.surroundings.directories(&summary.name, summary.id), view.state().is_live())
            })
            .collect();
        let home = self.surroundings.home.home.clone();
        let pool = self.surroundings.home.pool();
        let measure = move || (sandbox_rows(&places), ready_forks_row(&pool), free_bytes(&home));
        let measured = tokio::task::spawn_blocking(measure).await;
        let (sandboxes, ready_forks, free_bytes) = measured.map_err(ApiError::internal)?;
        rows.extend(sandboxes);
        rows.extend([self.snapshots_row().await?, ready_forks]);
        Ok(DiskUsage { rows, free_bytes })
    }

    /// Fetches an image from its registry, until the caller cancels.
    ///
    /// # Errors
    /// `registry_failed`, `registry_denied`, `image_not_found`, `cancelled`, and what is wrong with what came.
    pub async fn pull_image(
        &self,
        request: PullRequest,
        cancelled: CancellationToken,
        progress: mpsc::Sender<PullEvent>,
    ) -> Result<(ImageSummary, bool), ApiError> {
        let pulled = self
            .work(move |store| {
                store.pull(&request, &cancelled, &mut |event| match event {
                    // The next one says the same and more.
                    PullEvent::Layer { .. } => drop(progress.try_send(event)),
                    // A caller that went away has cancelled.
                    event => drop(progress.blocking_send(event)),
                })
            })
            .await?;
        self.relieve(std::iter::once(pulled.0.digest.clone())).await;
        Ok(pulled)
    }

    /// Makes room where the configuration says so; what has just come stays. A failure here is none of the request's.
    async fn relieve(&self, newest: impl Iterator<Item = String>) {
        let outcome = match self.image_users().await {
            Ok(mut users) => {
                users.extend(newest.map(|digest| (digest, Vec::new())));
                self.work(move |store| store.relieve(&users)).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, "unused images could not be removed");
        }
    }

    /// Has the image of a sandbox that is to be created, as the request's policy says; the lease is of what was fetched.
    pub(super) async fn fetch_for(&self, request: &CreateRequest) -> Result<Option<PreparedImage>, ApiError> {
        if request.spec.root.is_local() {
            return Ok(None);
        }
        let reference = request.spec.image.clone();
        let missing = match request.pull {
            PullPolicy::Never => return Ok(None),
            PullPolicy::Always => false,
            PullPolicy::IfMissing => {
                let wanted = reference.clone();
                if self.work(move |store| store.has(&wanted)).await? {
                    return Ok(None);
                }
                true
            }
        };
        let (progress, mut unread) = mpsc::channel(1);
        let reading = async { while unread.recv().await.is_some() {} };
        // Dropped with this future: a caller that gives up ends the pull.
        let cancelled = CancellationToken::new();
        let _guard = cancelled.clone().drop_guard();
        let pull = PullRequest { reference: reference.clone(), ..PullRequest::default() };
        let (pulled, ()) = tokio::join!(self.pull_image(pull, cancelled, progress), reading);
        let prepared = || async { self.images().send(Prepare(reference.clone())).await.map_err(mailbox)? };
        match pulled {
            Ok(_) => prepared().await.map(Some),
            Err(error) if missing => match prepared().await {
                // What it says of the image that is not there names those that are.
                Err(absent) => Err(neither_here_nor_fetched(&absent, error)),
                Ok(_) => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    /// Keeps a credential for a registry, once the registry has taken it.
    ///
    /// # Errors
    /// `registry_denied`, `registry_failed`.
    pub async fn login(&self, request: LoginRequest) -> Result<LoginReport, ApiError> {
        self.work(move |store| store.login(&request)).await
    }

    /// Forgets the credential of a registry.
    ///
    /// # Errors
    /// There is none.
    pub async fn logout(&self, registry: String) -> Result<(), ApiError> {
        self.work(move |store| store.logout(&registry)).await
    }

    /// Registries that there are credentials or settings for.
    ///
    /// # Errors
    /// The file of logins cannot be read.
    pub async fn registries(&self) -> Result<RegistryList, ApiError> {
        Ok(RegistryList { registries: self.work(|store| store.registries()).await? })
    }

    async fn image_users(&self) -> Result<ImageUsers, ApiError> {
        let mut users = self.supervisor.send(ListImageUsers).await.map_err(mailbox)?;
        self.add_snapshot_images(&mut users).await?;
        Ok(users)
    }

    /// One call of the store.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn ImageStore) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        self.images().send(Work::new(work)).await.map_err(mailbox)?
    }

    /// Takes an archive in.
    ///
    /// # Errors
    /// What is wrong with the archive or the disk.
    pub async fn load_image(
        &self,
        archive: ArchiveSource,
        how: LoadOptions,
        progress: mpsc::Sender<LoadEvent>,
    ) -> Result<Vec<ImageSummary>, ApiError> {
        let images = self.images().send(LoadImage { archive, how, progress }).await.map_err(mailbox)??;
        self.relieve(images.iter().map(|image| image.digest.clone())).await;
        Ok(images)
    }

    /// Checks the image store.
    ///
    /// # Errors
    /// It cannot be read at all.
    pub async fn check_store(&self) -> Result<StoreReport, ApiError> {
        self.images().send(CheckStore).await.map_err(mailbox)?
    }
}

/// Writable disks and logs of sandboxes. A resting sandbox's disk could go, with `msb rm`.
fn sandbox_rows(places: &[(Directories, bool)]) -> [DiskUsageRow; 2] {
    let mut disks = DiskUsageRow { kind: "sandboxes".into(), ..DiskUsageRow::default() };
    let mut logs = DiskUsageRow { kind: "logs".into(), ..DiskUsageRow::default() };
    for (directories, live) in places {
        let disk = allocated_bytes(&directories.upper);
        let entries = std::fs::read_dir(&directories.logs).into_iter().flatten().flatten();
        let log: u64 = entries.map(|entry| allocated_bytes(&entry.path())).sum();
        for (row, bytes) in [(&mut disks, disk), (&mut logs, log)] {
            row.count += 1;
            row.bytes += bytes;
            if *live {
                row.active += 1;
            } else {
                row.reclaimable_bytes += bytes;
            }
        }
    }
    [disks, logs]
}

/// Disks of ready forks. They are made again as they are taken: what gives their space back is a smaller pool.
fn ready_forks_row(pool: &Path) -> DiskUsageRow {
    let disks = std::fs::read_dir(pool).into_iter().flatten().flatten();
    let (count, bytes) =
        disks.fold((0, 0), |(count, bytes), fork| (count + 1, bytes + allocated_bytes(&fork.path().join("upper.img"))));
    DiskUsageRow { kind: "ready forks".into(), count, active: count, bytes, ..DiskUsageRow::default() }
}

fn allocated_bytes(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).map_or(0, |file| file.blocks() * 512)
}

fn free_bytes(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
}
