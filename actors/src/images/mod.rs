//! Images as the rest of the daemon sees them: a blocking store behind [`ImageStore`], and the actor that runs its work on the
//! blocking pool, one at a time for each reference (single flight).
//!
//! The store of real images is `images::store`; the simulator brings its own.

pub mod store;

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use actix::prelude::*;
use msb_protocol::control::{ImageConfigDetail, ImageDetail, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::ApiError;
use msb_protocol::id::SandboxName;
use msb_protocol::images::{
    DiskUsageRow, ImageRemoval, LoginReport, LoginRequest, PruneReport, PruneRequest, PullEvent, PullRequest,
    RegistryRow, SaveRequest,
};
use msb_protocol::vmm::DiskPart;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::faults;
use crate::inspect::{ActorReport, Inspect};
use crate::kept::{Kept, Life};

/// Messages that wait for the actor before their senders are told to.
const MAILBOX_LEN: usize = 1_024;

/// Who needs an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageUser {
    /// A sandbox, running or not.
    Sandbox(SandboxName),
    /// A snapshot.
    Snapshot(SandboxName),
}

impl std::fmt::Display for ImageUser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sandbox(name) => name.fmt(f),
            Self::Snapshot(name) => write!(f, "snapshot {name}"),
        }
    }
}

/// Who needs an image, by its digest.
pub type ImageUsers = BTreeMap<String, Vec<ImageUser>>;

/// An image that is ready to boot from.
#[derive(Clone)]
pub struct PreparedImage {
    /// Digest of the manifest; the path of a root that is no image.
    pub digest: String,
    /// What it says about running it.
    pub config: ImageConfigDetail,
    /// The parts of the read-only root device.
    pub lower: Vec<DiskPart>,
    /// While a clone lives, prune leaves the image alone.
    pub lease: Arc<dyn Any + Send + Sync>,
}

impl PreparedImage {
    /// What stands for an image where the root is a directory or disk of the host: nobody has to hold on to it here, and it says
    /// nothing about running it.
    #[must_use]
    pub fn local(path: &str) -> Self {
        Self { digest: path.to_owned(), config: ImageConfigDetail::default(), lower: Vec::new(), lease: Arc::new(()) }
    }
}

/// A store of images. Every method blocks.
pub trait ImageStore: Send + Sync + 'static {
    /// Finds an image and makes it bootable.
    ///
    /// # Errors
    /// `image_not_found` naming what exists, `invalid_reference`, `store_corrupt`, `disk_full`.
    fn prepare(&self, reference: &str) -> Result<PreparedImage, ApiError>;
    /// Makes a fresh writable disk of this size.
    ///
    /// # Errors
    /// `disk_full`, or what else the file system says.
    fn make_upper(&self, path: &Path, size_mib: u32) -> Result<(), ApiError>;
    /// Every image, newest first.
    ///
    /// # Errors
    /// `store_corrupt`.
    fn list(&self) -> Result<Vec<ImageSummary>, ApiError>;
    /// One image.
    ///
    /// # Errors
    /// As [`ImageStore::prepare`].
    fn inspect(&self, reference: &str) -> Result<ImageDetail, ApiError>;
    /// Removes an image or one of its names.
    ///
    /// # Errors
    /// `image_in_use` naming who uses it, `image_not_found`.
    fn remove(&self, reference: &str, force: bool, users: &ImageUsers) -> Result<ImageRemoval, ApiError>;
    /// Takes an archive in.
    ///
    /// # Errors
    /// `invalid_archive`, `digest_mismatch`, `limit_exceeded`, `disk_full`; and where `progress` breaks off, because nobody waits any more.
    fn load(
        &self,
        archive: ArchiveSource,
        how: &LoadOptions,
        progress: &mut dyn FnMut(LoadEvent) -> ControlFlow<()>,
    ) -> Result<Vec<ImageSummary>, ApiError>;
    /// Writes images as one archive. Nothing is written before every name is known to exist.
    ///
    /// # Errors
    /// As [`ImageStore::prepare`].
    fn save(&self, what: &SaveRequest, out: &mut dyn Write) -> Result<(), ApiError>;
    /// Gives an image another name.
    ///
    /// # Errors
    /// As [`ImageStore::inspect`].
    fn tag(&self, reference: &str, name: &str) -> Result<ImageSummary, ApiError>;
    /// Keeps prune from an image, or no more.
    ///
    /// # Errors
    /// As [`ImageStore::inspect`].
    fn pin(&self, reference: &str, pinned: bool) -> Result<ImageSummary, ApiError>;
    /// Removes what the request allows and nobody needs.
    ///
    /// # Errors
    /// `invalid_label` for a filter that is none, and what the file system says.
    fn prune(&self, request: &PruneRequest, users: &ImageUsers) -> Result<PruneReport, ApiError>;
    /// Removes the longest unused images where the configuration sets a limit and it is passed. Returns the bytes freed.
    ///
    /// # Errors
    /// What the file system says.
    fn relieve(&self, _users: &ImageUsers) -> Result<u64, ApiError> {
        Ok(0)
    }
    /// What it uses on disk.
    ///
    /// # Errors
    /// The store cannot be read.
    fn usage(&self, users: &ImageUsers) -> Result<Vec<DiskUsageRow>, ApiError>;
    /// Whether it has an image.
    ///
    /// # Errors
    /// `invalid_reference`.
    fn has(&self, reference: &str) -> Result<bool, ApiError>;
    /// Fetches an image from its registry. What has come when it fails is kept for the next try.
    ///
    /// # Errors
    /// `registry_failed`, `registry_denied`, `image_not_found`, `digest_mismatch`, `limit_exceeded`, `disk_full`, `cancelled`.
    fn pull(
        &self,
        request: &PullRequest,
        cancelled: &CancellationToken,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<(ImageSummary, bool), ApiError>;
    /// Keeps a credential for a registry, once the registry has taken it.
    ///
    /// # Errors
    /// `registry_denied`, `registry_failed`.
    fn login(&self, request: &LoginRequest) -> Result<LoginReport, ApiError>;
    /// Forgets the credential of a registry.
    ///
    /// # Errors
    /// `registry_failed` where there is none, or the keyring refuses.
    fn logout(&self, registry: &str) -> Result<(), ApiError>;
    /// Registries that there are credentials or settings for.
    ///
    /// # Errors
    /// The file of logins cannot be read.
    fn registries(&self) -> Result<Vec<RegistryRow>, ApiError>;
    /// Checks everything.
    ///
    /// # Errors
    /// The store cannot be read at all.
    fn check(&self) -> Result<StoreReport, ApiError>;
}

/// How an archive is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// `NAME` for the first image of the archive, or `OLD=NEW`.
    pub tags: Vec<String>,
    /// The platform where the archive has several; the host's if absent.
    pub platform: Option<String>,
}

/// Where an archive comes from.
pub enum ArchiveSource {
    /// A request's body.
    Stream(Box<dyn Read + Send>),
    /// A file of this machine, in which what the store has is passed over.
    File(File),
}

/// Owns the store.
pub struct ImageActor {
    store: Arc<dyn ImageStore>,
    in_flight: HashMap<String, Vec<oneshot::Sender<Result<PreparedImage, ApiError>>>>,
    handled: u64,
    _life: Life,
}

impl ImageActor {
    /// Starts the actor of a store.
    #[must_use]
    pub fn keep(store: Arc<dyn ImageStore>, clock: Arc<dyn Clock>) -> Kept<Self> {
        Kept::keep("images", clock, move |life| Self {
            store: store.clone(),
            in_flight: HashMap::new(),
            handled: 0,
            _life: life,
        })
    }

    fn blocking<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&dyn ImageStore) -> Result<T, ApiError> + Send + 'static,
    ) -> ResponseFuture<Result<T, ApiError>> {
        self.handled += 1;
        let store = self.store.clone();
        Box::pin(async move { on_pool(move || work(&*store)).await })
    }
}

async fn on_pool<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(ApiError::internal(format!("work on images ended early: {error}"))),
    }
}

impl Actor for ImageActor {
    type Context = Context<Self>;
    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_LEN);
    }
}

/// Find an image and make it bootable.
#[derive(Message)]
#[rtype(result = "Result<PreparedImage, ApiError>")]
pub struct Prepare(pub String);

impl Handler<Prepare> for ImageActor {
    type Result = ResponseFuture<Result<PreparedImage, ApiError>>;

    fn handle(&mut self, Prepare(reference): Prepare, ctx: &mut Self::Context) -> Self::Result {
        faults::here("images/prepare");
        self.handled += 1;
        let (reply, answer) = oneshot::channel();
        let waiting = self.in_flight.entry(reference.clone()).or_default();
        waiting.push(reply);
        if waiting.len() == 1 {
            let (store, wanted) = (self.store.clone(), reference.clone());
            let work = async move { on_pool(move || store.prepare(&wanted)).await };
            ctx.spawn(work.into_actor(self).map(move |outcome, this, _| {
                for reply in this.in_flight.remove(&reference).unwrap_or_default() {
                    // Whoever went away gave the lease back with its clone.
                    let _ = reply.send(outcome.clone());
                }
            }));
        }
        Box::pin(async move { answer.await.unwrap_or_else(|_| Err(ApiError::internal("the image actor ended"))) })
    }
}

/// Make a fresh writable disk.
#[derive(Message)]
#[rtype(result = "Result<(), ApiError>")]
pub struct MakeUpper {
    /// Where.
    pub path: PathBuf,
    /// How large.
    pub size_mib: u32,
}

impl Handler<MakeUpper> for ImageActor {
    type Result = ResponseFuture<Result<(), ApiError>>;
    fn handle(&mut self, message: MakeUpper, _: &mut Self::Context) -> Self::Result {
        faults::here("images/make_upper");
        self.blocking(move |store| store.make_upper(&message.path, message.size_mib))
    }
}

/// Every image.
#[derive(Message)]
#[rtype(result = "Result<Vec<ImageSummary>, ApiError>")]
pub struct ListImages;

impl Handler<ListImages> for ImageActor {
    type Result = ResponseFuture<Result<Vec<ImageSummary>, ApiError>>;
    fn handle(&mut self, _: ListImages, _: &mut Self::Context) -> Self::Result {
        faults::here("images/list");
        self.blocking(|store| store.list())
    }
}

/// One image.
#[derive(Message)]
#[rtype(result = "Result<ImageDetail, ApiError>")]
pub struct InspectImage {
    /// Which.
    pub reference: String,
    /// Who uses which image.
    pub users: ImageUsers,
}

impl Handler<InspectImage> for ImageActor {
    type Result = ResponseFuture<Result<ImageDetail, ApiError>>;
    fn handle(&mut self, message: InspectImage, _: &mut Self::Context) -> Self::Result {
        faults::here("images/inspect");
        self.blocking(move |store| {
            let mut detail = store.inspect(&message.reference)?;
            for user in message.users.get(&detail.summary.digest).into_iter().flatten() {
                match user {
                    ImageUser::Sandbox(name) => detail.used_by.push(name.clone()),
                    ImageUser::Snapshot(name) => detail.used_by_snapshots.push(name.clone()),
                }
            }
            Ok(detail)
        })
    }
}

/// What is asked of a store.
type Call<T> = Box<dyn FnOnce(&dyn ImageStore) -> Result<T, ApiError> + Send>;

/// Any one call of the store, on the blocking pool: the requests that need no state of the actor.
#[derive(Message)]
#[rtype(result = "Result<T, ApiError>")]
pub struct Work<T: Send + 'static>(Call<T>);

impl<T: Send + 'static> Work<T> {
    /// A call.
    pub fn new(work: impl FnOnce(&dyn ImageStore) -> Result<T, ApiError> + Send + 'static) -> Self {
        Self(Box::new(work))
    }
}

impl<T: Send + 'static> Handler<Work<T>> for ImageActor {
    type Result = ResponseFuture<Result<T, ApiError>>;
    fn handle(&mut self, Work(work): Work<T>, _: &mut Self::Context) -> Self::Result {
        faults::here("images/work");
        self.blocking(work)
    }
}

/// Take an archive in.
#[derive(Message)]
#[rtype(result = "Result<Vec<ImageSummary>, ApiError>")]
pub struct LoadImage {
    /// The archive.
    pub archive: ArchiveSource,
    /// What to take of it and how to call that.
    pub how: LoadOptions,
    /// Where progress goes; what it has no room for is left out.
    pub progress: mpsc::Sender<LoadEvent>,
}

impl Handler<LoadImage> for ImageActor {
    type Result = ResponseFuture<Result<Vec<ImageSummary>, ApiError>>;
    fn handle(&mut self, message: LoadImage, _: &mut Self::Context) -> Self::Result {
        faults::here("images/load");
        self.blocking(move |store| {
            let LoadImage { archive, how, progress } = message;
            store.load(archive, &how, &mut |event| {
                let heard = match event {
                    // The next one says the same and more.
                    LoadEvent::Progress { .. } => !matches!(progress.try_send(event), Err(TrySendError::Closed(_))),
                    event => progress.blocking_send(event).is_ok(),
                };
                if heard { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
        })
    }
}

/// Check the store.
#[derive(Message)]
#[rtype(result = "Result<StoreReport, ApiError>")]
pub struct CheckStore;

impl Handler<CheckStore> for ImageActor {
    type Result = ResponseFuture<Result<StoreReport, ApiError>>;
    fn handle(&mut self, _: CheckStore, _: &mut Self::Context) -> Self::Result {
        faults::here("images/check");
        self.blocking(|store| store.check())
    }
}

impl Handler<Inspect> for ImageActor {
    type Result = MessageResult<Inspect>;
    fn handle(&mut self, _: Inspect, _: &mut Self::Context) -> Self::Result {
        faults::here("images/inspect_actor");
        MessageResult(ActorReport {
            handled: self.handled,
            state: format!("{} images being prepared", self.in_flight.len()),
        })
    }
}
