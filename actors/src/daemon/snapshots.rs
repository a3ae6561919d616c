//! What a daemon can do with snapshots. Each function is one request of the API.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use msb_image::snapshot::Importing;
use msb_protocol::control::{CreateRequest, SandboxDetail};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::images::{DiskUsageRow, PullPolicy};
use msb_protocol::network::NetworkSpec;
use msb_protocol::snapshot::{
    CreateSnapshot, FORKS_MAX, ForkRequest, SnapshotCheck, SnapshotDetail, SnapshotManifest, SnapshotSummary,
    snapshot_name,
};
use msb_protocol::spec::{EngineChoice, SandboxSpec, Workload};

use super::{Daemon, mailbox};
use crate::images::{ImageUser, ImageUsers, Prepare, PreparedImage};
use crate::pool::{Count, Mind};
use crate::sandbox::actor::{HoldDisk, HoldMachine};
use crate::snapshots::{ListSnapshots, Make, RemoveSnapshot, Snapshot, Snapshots};
use crate::supervisor::SandboxRef;

/// Copies of one fork that start at the same time.
const STARTS_MAX: usize = 8;

/// A machine goes on as it was: what would make it another one is refused, naming it.
fn check_memory(name: &SandboxName, request: &mut CreateRequest, manifest: &SnapshotManifest) -> Result<(), ApiError> {
    let Some(memory) = &manifest.memory else { return Ok(()) };
    if memory.main {
        request.spec.workload = Workload::Main;
    }
    let (spec, saved) = (&request.spec, &manifest.spec);
    let refuse = |what: &str| {
        let message = format!("snapshot {name} has memory, and its machine goes on as it was: {what}");
        Err(ApiError::new(ErrorCode::InvalidConfig, message).with_hint("a snapshot of its disk alone leaves that open"))
    };
    if spec.engine == EngineChoice::Qemu {
        let message = format!("snapshot {name} has memory, which engine qemu cannot go on with");
        return Err(ApiError::new(ErrorCode::UnsupportedOperation, message).with_hint("this needs engine kvm"));
    }
    if (spec.cpus, spec.memory_mib) != (saved.cpus, saved.memory_mib) {
        return refuse("processors and memory cannot change");
    }
    if spec.network.enabled != memory.network {
        return refuse(if memory.network { "it has a network card" } else { "it has no network card" });
    }
    let usual = NetworkSpec::default().addresses();
    if spec.network.enabled && spec.network.addresses() != usual {
        return refuse("its addresses cannot change");
    }
    if !spec.mounts.is_empty() {
        return refuse("nothing can be mounted into it");
    }
    if memory.main {
        if (&spec.entrypoint, &spec.command) != (&saved.entrypoint, &saved.command) {
            return refuse("its command runs and cannot change");
        }
        if request.hold_main {
            return refuse("its command runs already: `msb run -d --snapshot`, then `msb attach`");
        }
    }
    if (&spec.env, &spec.user, &spec.workdir, &spec.rlimits)
        != (&saved.env, &saved.user, &saved.workdir, &saved.rlimits)
    {
        return refuse("environment, user, working directory and limits cannot change");
    }
    if spec.security != saved.security || spec.kernel.is_some() || spec.root_size_mib != saved.root_size_mib {
        return refuse("kernel, security profile and the size of its disk cannot change");
    }
    Ok(())
}

/// One name for each copy; none where it is to be invented.
fn fork_names(request: &ForkRequest) -> Result<Vec<Option<SandboxName>>, ApiError> {
    match (&request.name, request.count) {
        (Some(name), 1) => Ok(vec![Some(name.clone())]),
        (Some(name), count) => {
            (1..=count).map(|number| SandboxName::parse(&format!("{name}-{number}")).map(Some)).collect()
        }
        (None, count) => Ok((0..count).map(|_| None).collect()),
    }
}

impl Daemon {
    pub(super) fn snapshots(&self) -> &Snapshots {
        &self.surroundings.snapshots
    }

    /// Every snapshot, by name.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn list_snapshots(&self) -> Result<Vec<SnapshotSummary>, ApiError> {
        let mut all = self.snapshots().actor.send(ListSnapshots).await.map_err(mailbox)?;
        all.retain(|snapshot| !snapshot.manifest.transient);
        let files = self.snapshots().files.clone();
        let shown = tokio::task::spawn_blocking(move || all.iter().map(|snapshot| snapshot.summary(&files)).collect());
        let mut shown: Vec<SnapshotSummary> = shown.await.map_err(ApiError::internal)?;
        let pool = self.surroundings.pool.send(Count).await.map_err(mailbox)?;
        for summary in &mut shown {
            summary.ready_forks = pool.get(&summary.name).copied();
        }
        Ok(shown)
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
        let shown = tokio::task::spawn_blocking(move || snapshot.detail(&files));
        let mut shown = shown.await.map_err(ApiError::internal)?;
        let mut pool = self.surroundings.pool.send(Count).await.map_err(mailbox)?;
        shown.summary.ready_forks = pool.remove(&shown.summary.name);
        Ok(shown)
    }

    /// The pool looks at the templates again.
    async fn mind_pool(&self) -> Result<(), ApiError> {
        self.surroundings.pool.send(Mind).await.map_err(mailbox)
    }

    /// Takes a snapshot of a sandbox at rest, or of a running one with its memory.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running`, `snapshot_already_exists`, `disk_full`; nothing is left then.
    pub async fn take_snapshot(&self, request: CreateSnapshot) -> Result<SnapshotDetail, ApiError> {
        msb_protocol::labels::check_all(&request.labels)?;
        self.take(request, false).await
    }

    async fn take(&self, request: CreateSnapshot, transient: bool) -> Result<SnapshotDetail, ApiError> {
        let sandbox = self.find(&request.from).await?;
        let busy = || {
            ApiError::new(ErrorCode::SandboxBusy, format!("the actor of sandbox {} is being made again", request.from))
        };
        let address = sandbox.address.as_ref().ok_or_else(busy)?;
        let (mut source, commands) = if request.memory {
            let (source, commands) = address.send(HoldMachine).await.map_err(|_| busy())??;
            (source, Some(commands))
        } else {
            (address.send(HoldDisk).await.map_err(|_| busy())??, None)
        };
        // A parent that is gone is no parent: nothing would ever keep it.
        source.parent = match source.parent {
            Some(parent) => self.snapshots().find(&parent.id).await.is_ok().then_some(parent),
            None => None,
        };
        let clock = &self.surroundings.clock;
        let make = match commands {
            Some(commands) => Make::of_machine(request.name, request.labels, source, commands, clock, transient),
            None => Make::of_sandbox(request.name, request.labels, source, clock),
        };
        let made = self.snapshots().actor.send(make).await.map_err(mailbox)??;
        if made.manifest.pool_size() > 0 {
            self.mind_pool().await?;
        }
        self.shown(made).await
    }

    /// Makes copies of a running sandbox, its memory included, and waits until they are up: all of them, or none.
    ///
    /// # Errors
    /// As [`Daemon::take_snapshot`] with memory and [`Daemon::create`].
    pub async fn fork(&self, from: &SandboxName, request: ForkRequest) -> Result<Vec<SandboxDetail>, ApiError> {
        if !(1..=FORKS_MAX).contains(&request.count) {
            let message = format!("1 to {FORKS_MAX} copies can be made at once, not {}", request.count);
            return Err(ApiError::new(ErrorCode::InvalidRequest, message));
        }
        let source = self.find(from).await?.view.borrow().detail.spec.clone();
        let names = fork_names(&request)?;
        self.surroundings.expect_start(&source);
        // Of no interest once the copies are there: what they share with it stays theirs without its name.
        let name = snapshot_name(&format!("fork-{}", SandboxId::generate()))?;
        let taking = CreateSnapshot { name: name.clone(), from: from.clone(), labels: BTreeMap::new(), memory: true };
        let snapshot = self.take(taking, true).await?;
        let mut network = source.network.clone();
        network.ports.clear();
        let mut begun = Vec::with_capacity(names.len());
        let mut made: Vec<SandboxDetail> = Vec::with_capacity(names.len());
        let mut failure = None;
        for own in names {
            if let Some(oldest) = begun.len().checked_sub(STARTS_MAX)
                && failure.is_none()
            {
                failure = Self::until_up(&begun[oldest], &mut made).await;
            }
            if failure.is_some() {
                break;
            }
            let spec = SandboxSpec {
                name: own,
                snapshot: Some(name.clone()),
                detached: true,
                network: network.clone(),
                labels: source.labels.clone(),
                engine: source.engine,
                ..snapshot.spec.clone()
            };
            let asked = CreateRequest { spec, hold_main: false, replace_grace_ms: None, pull: PullPolicy::IfMissing };
            match self.begin(asked, None).await {
                Ok((sandbox, lease)) => begun.push((sandbox, lease)),
                Err(error) => failure = Some(error),
            }
        }
        for sandbox in begun.get(made.len()..).unwrap_or_default() {
            if failure.is_none() {
                failure = Self::until_up(sandbox, &mut made).await;
            }
        }
        if failure.is_some() {
            for (sandbox, _lease) in begun {
                self.remove_copy(sandbox).await;
            }
        }
        // Last: a copy that is still being made reads it.
        if let Err(error) = self.remove_snapshot(name).await {
            tracing::warn!(error = %error.message, "the snapshot of a fork stays");
        }
        failure.map_or(Ok(made), Err)
    }

    /// Removes one copy of a fork that failed; one that could not start removes itself, and is waited for.
    async fn remove_copy(&self, sandbox: SandboxRef) {
        let removed = match self.remove(&sandbox.name, true).await {
            Err(error) if error.code == ErrorCode::SandboxNotFound => {
                Self::until(sandbox, |view| view.gone.then_some(Ok(()))).await
            }
            removed => removed,
        };
        if let Err(error) = removed {
            tracing::warn!(error = %error.message, "a copy of a fork that failed stays");
        }
    }

    /// Waits for one copy of a fork; why it is not there, if it is not.
    async fn until_up(begun: &(SandboxRef, Option<PreparedImage>), made: &mut Vec<SandboxDetail>) -> Option<ApiError> {
        match Self::until_ready(begun.0.clone(), 0, 0).await {
            Ok(detail) => {
                made.push(detail);
                None
            }
            Err(error) => Some(error),
        }
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// `snapshot_not_found`, `snapshot_in_use` naming its children.
    pub async fn remove_snapshot(&self, name: SandboxName) -> Result<(), ApiError> {
        self.snapshots().actor.send(RemoveSnapshot(name)).await.map_err(mailbox)??;
        self.mind_pool().await
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
        let Some(name) = request.spec.snapshot.clone() else { return Ok(None) };
        let snapshot = self.snapshots().find(name.as_str()).await?;
        let image = self.image_of(&name, &snapshot.manifest.image).await?;
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
        check_memory(&name, request, &snapshot.manifest)?;
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
