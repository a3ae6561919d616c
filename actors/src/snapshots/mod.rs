//! Snapshots: the actor that owns their index, and what is asked of it.
//!
//! ```text
//!  Make ─► recorded (journal: Making) ─► filled (draft: disk copied, measured, sealed) ─► published (rename) ─► Ready (journal) ─► seen
//!             │ undo: record removed         │ undo: draft dropped                           │ undo: files removed
//!             └── killed anywhere up to Ready: the next daemon undoes it (`recovery`)
//!
//!  Remove ─► Removing (journal) ─► files out of sight ─► record removed          killed: the next daemon goes on
//! ```
//! What is seen is what the index says, and the index says only what is durable. Work on files runs on the blocking pool; reading a
//! snapshot (verify, export, a disk for a new sandbox) goes past the actor with a record of it. It never decides about sandboxes or
//! images: who may be snapshotted is the sandbox's actor's to say.

pub mod fault;
mod recovery;

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;

use actix::prelude::*;
use msb_image::Digest;
pub use msb_image::snapshot::SnapshotFiles;
use msb_image::snapshot::{DiskContent, Sealed};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::{
    SNAPSHOT_FORMAT, SNAPSHOT_MEMORY_FORMAT, SNAPSHOTS_MAX, SnapshotDetail, SnapshotDisk, SnapshotImage, SnapshotKind,
    SnapshotManifest, SnapshotMemory, SnapshotParent, SnapshotSummary,
};
use msb_protocol::spec::{SandboxSpec, Workload};
use tokio::sync::{mpsc, oneshot};

use crate::clock::Clock;
use crate::faults;
use crate::inspect::{ActorReport, Inspect};
use crate::journal::{Change, EventDraft, Journal, SnapshotPhase, SnapshotRecord};
use crate::kept::{Kept, Life};
use crate::vm::VmCommand;
use fault::Step;

/// Messages that wait for the actor.
const MAILBOX_LEN: usize = 1_024;

/// The snapshots of a daemon: who owns the index, and where the files are.
#[derive(Clone, Debug)]
pub struct Snapshots {
    /// The index.
    pub actor: Kept<SnapshotActor>,
    /// The files.
    pub files: SnapshotFiles,
}

impl Snapshots {
    /// Starts the actor over what the journal knows. It answers once the index agrees with the files.
    #[must_use]
    pub fn start(files: SnapshotFiles, journal: Journal, clock: Arc<dyn Clock>) -> Self {
        let own = files.clone();
        let actor = Kept::keep("snapshots", clock, move |life| SnapshotActor {
            files: own.clone(),
            journal: journal.clone(),
            index: BTreeMap::new(),
            busy: BTreeMap::new(),
            handled: 0,
            _life: life,
        });
        Self { actor, files }
    }

    /// A snapshot by its name or its identity.
    ///
    /// # Errors
    /// `snapshot_not_found`.
    pub async fn find(&self, which: &str) -> Result<Snapshot, ApiError> {
        let found = self.actor.send(FindSnapshot(which.to_owned())).await;
        found.map_err(|error| ApiError::internal(format!("the actor of snapshots: {error}")))?
    }
}

/// A snapshot that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its name.
    pub name: SandboxName,
    /// The digest of its manifest.
    pub id: String,
    /// What it says about itself.
    pub manifest: SnapshotManifest,
    /// Snapshots whose parent it is.
    pub children: Vec<SandboxName>,
}

impl Snapshot {
    /// As lists show it.
    #[must_use]
    pub fn summary(&self, files: &SnapshotFiles) -> SnapshotSummary {
        let manifest = &self.manifest;
        SnapshotSummary {
            name: self.name.clone(),
            id: self.id.clone(),
            kind: manifest.kind,
            created_at: manifest.created_at,
            source: manifest.source.clone(),
            image: manifest.image.clone(),
            parent: manifest.parent.clone(),
            size_bytes: manifest.disk.size_bytes,
            allocated_bytes: files.allocated_bytes(&self.name),
            labels: manifest.labels.clone(),
            ready_forks: None,
        }
    }

    /// Everything about it.
    #[must_use]
    pub fn detail(&self, files: &SnapshotFiles) -> SnapshotDetail {
        SnapshotDetail {
            summary: self.summary(files),
            spec: self.manifest.spec.clone(),
            disk: self.manifest.disk.clone(),
            memory: self.manifest.memory.clone(),
            created_by: self.manifest.created_by.clone(),
            children: self.children.clone(),
            path: files.path(&self.name).display().to_string(),
        }
    }
}

/// What a snapshot of a sandbox is taken from.
#[derive(Debug)]
pub struct Source {
    /// The sandbox.
    pub sandbox: SandboxName,
    /// Its identity, for the event.
    pub sandbox_id: msb_protocol::id::SandboxId,
    /// Its state, for the event.
    pub state: msb_protocol::state::SandboxState,
    /// What it is made of.
    pub spec: SandboxSpec,
    /// Digest of its image.
    pub image_digest: String,
    /// The snapshot it was started from.
    pub parent: Option<SnapshotParent>,
    /// Its writable disk.
    pub disk: std::path::PathBuf,
    /// Keeps the sandbox at rest.
    pub hold: crate::sandbox::disk_hold::DiskHold,
}

/// Makes the files of a draft. Blocks.
type Fill = Box<dyn FnOnce(&SnapshotFiles) -> Result<Sealed, ApiError> + Send>;

/// Make a snapshot.
#[derive(Message)]
#[rtype(result = "Result<Snapshot, ApiError>")]
pub struct Make {
    name: SandboxName,
    parent: Option<String>,
    fill: Fill,
    event: Option<EventDraft>,
    /// Held until the snapshot is seen, or is not.
    guard: Box<dyn Any + Send>,
}

impl Make {
    /// Out of a sandbox at rest.
    #[must_use]
    pub fn of_sandbox(
        name: SandboxName,
        labels: BTreeMap<String, String>,
        source: Source,
        clock: &Arc<dyn Clock>,
    ) -> Self {
        let Source { sandbox, sandbox_id, state, spec, image_digest, parent, disk, hold } = source;
        let event = EventDraft {
            sandbox: sandbox.clone(),
            sandbox_id,
            boot_id: None,
            event: "snapshot".into(),
            state,
            cause: None,
            actor: "user".into(),
            message: format!("snapshot {name} was taken"),
        };
        let parent_id = parent.as_ref().map(|parent| parent.id.clone());
        let (own, created_at) = (name.clone(), clock.wall());
        let fill = move |files: &SnapshotFiles| {
            let draft = files.draft()?;
            fault::reached(Step::Drafted);
            draft.copy_disk(&disk)?;
            fault::reached(Step::Copied);
            let content = draft.measure()?;
            let of = (sandbox, image_digest, parent);
            let manifest = disk_manifest((own, created_at), of, labels, spec.for_snapshot(), &content);
            Ok(draft.seal(&manifest)?)
        };
        Self { name, parent: parent_id, fill: Box::new(fill), event: Some(event), guard: Box::new(hold) }
    }

    /// Out of a running sandbox, its memory included; `commands` lead to its VM. A transient one is not digested.
    #[must_use]
    pub fn of_machine(
        name: SandboxName,
        labels: BTreeMap<String, String>,
        source: Source,
        commands: mpsc::Sender<VmCommand>,
        clock: &Arc<dyn Clock>,
        transient: bool,
    ) -> Self {
        let Source { sandbox, sandbox_id, state, spec, image_digest, parent, disk, hold } = source;
        let event = EventDraft {
            sandbox: sandbox.clone(),
            sandbox_id,
            boot_id: None,
            event: "snapshot".into(),
            state,
            cause: None,
            actor: "user".into(),
            message: if transient {
                "it was copied with its memory, for a fork".into()
            } else {
                format!("snapshot {name} was taken, with memory")
            },
        };
        let parent_id = parent.as_ref().map(|parent| parent.id.clone());
        let (own, created_at) = (name.clone(), clock.wall());
        let fill = move |files: &SnapshotFiles| {
            let draft = files.draft()?;
            fault::reached(Step::Drafted);
            let (memory, machine) = draft.create_memory()?;
            let (reply, answer) = oneshot::channel();
            let gone = || ApiError::new(ErrorCode::SandboxNotRunning, "the virtual machine ended meanwhile");
            // Let go on in any case: of a machine that does not stand this asks nothing.
            let stands = Release(commands.clone());
            commands
                .blocking_send(VmCommand::Save { memory: memory.into(), state: machine.into(), flush: false, reply })
                .map_err(|_| gone())?;
            answer.blocking_recv().map_err(|_| gone())??;
            fault::reached(Step::Saved);
            // As the memory knows it: nothing is on its way to it while the machine stands.
            draft.copy_disk(&disk)?;
            fault::reached(Step::Copied);
            drop(stands);
            let (content, memory, machine) = if transient {
                let (disk_bytes, memory_bytes) = draft.sizes()?;
                let of = |size_bytes| DiskContent { size_bytes, data_bytes: 0, digest: Digest::of(&[]) };
                (of(disk_bytes), of(memory_bytes), Digest::of(&[]))
            } else {
                let (memory, machine) = draft.measure_memory()?;
                (draft.measure()?, memory, machine)
            };
            let network = spec.network.enabled;
            let main = spec.workload == Workload::Main;
            let of = (sandbox, image_digest, parent);
            let manifest = SnapshotManifest {
                format: SNAPSHOT_MEMORY_FORMAT,
                kind: SnapshotKind::Memory,
                memory: Some(SnapshotMemory {
                    size_bytes: memory.size_bytes,
                    data_bytes: memory.data_bytes,
                    digest: memory.digest.to_string(),
                    machine: machine.to_string(),
                    network,
                    main,
                }),
                transient,
                ..disk_manifest((own, created_at), of, labels, spec.for_snapshot(), &content)
            };
            Ok(draft.seal(&manifest)?)
        };
        Self { name, parent: parent_id, fill: Box::new(fill), event: Some(event), guard: Box::new(hold) }
    }

    /// Out of an archive whose manifest was read; `lease` keeps its image.
    #[must_use]
    pub fn of_archive(
        name: SandboxName,
        importing: msb_image::snapshot::Importing,
        lease: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let parent = importing.manifest().parent.as_ref().map(|parent| parent.id.clone());
        let fill = move |files: &SnapshotFiles| Ok(importing.finish(files)?);
        Self { name, parent, fill: Box::new(fill), event: None, guard: Box::new(lease) }
    }
}

/// What is written of a snapshot with a disk alone.
fn disk_manifest(
    (name, created_at): (SandboxName, jiff::Timestamp),
    (source, image_digest, parent): (SandboxName, String, Option<SnapshotParent>),
    labels: BTreeMap<String, String>,
    spec: SandboxSpec,
    content: &DiskContent,
) -> SnapshotManifest {
    SnapshotManifest {
        format: SNAPSHOT_FORMAT,
        kind: SnapshotKind::Disk,
        memory: None,
        transient: false,
        name,
        created_at,
        created_by: env!("CARGO_PKG_VERSION").into(),
        source,
        image: SnapshotImage { reference: spec.image.clone(), digest: image_digest },
        parent,
        labels,
        spec,
        disk: SnapshotDisk {
            size_bytes: content.size_bytes,
            data_bytes: content.data_bytes,
            digest: content.digest.to_string(),
        },
    }
}

/// Lets a machine that was written down go on. On the blocking pool only.
struct Release(mpsc::Sender<VmCommand>);

impl Drop for Release {
    fn drop(&mut self) {
        // A VM that is gone does not stand.
        let _ = self.0.blocking_send(VmCommand::Release);
    }
}

/// Every snapshot, by name.
#[derive(Message)]
#[rtype(result = "Vec<Snapshot>")]
pub struct ListSnapshots;

/// One snapshot, by name or identity.
#[derive(Message)]
#[rtype(result = "Result<Snapshot, ApiError>")]
pub struct FindSnapshot(pub String);

/// Remove a snapshot that no other was taken on top of.
#[derive(Message)]
#[rtype(result = "Result<(), ApiError>")]
pub struct RemoveSnapshot(pub SandboxName);

/// A snapshot of the index.
#[derive(Clone, Debug)]
struct Indexed {
    id: String,
    manifest: SnapshotManifest,
}

/// The owner of the index.
pub struct SnapshotActor {
    files: SnapshotFiles,
    journal: Journal,
    index: BTreeMap<SandboxName, Indexed>,
    /// Names that are being made, with their parents' identities, or removed.
    busy: BTreeMap<SandboxName, Option<String>>,
    handled: u64,
    _life: Life,
}

impl SnapshotActor {
    fn show(&self, name: &SandboxName, indexed: &Indexed) -> Snapshot {
        let children = self.index.iter().filter(|(_, other)| is_child(&other.manifest, &indexed.id));
        Snapshot {
            name: name.clone(),
            id: indexed.id.clone(),
            manifest: indexed.manifest.clone(),
            children: children.map(|(name, _)| name.clone()).collect(),
        }
    }

    /// What of the index is seen: not what is being removed.
    fn seen(&self) -> impl Iterator<Item = (&SandboxName, &Indexed)> {
        self.index.iter().filter(|(name, _)| !self.busy.contains_key(*name))
    }

    fn not_found(&self, which: &str) -> ApiError {
        let names: Vec<&str> = self.seen().map(|(name, _)| name.as_str()).take(10).collect();
        let rest =
            if names.is_empty() { "; there is none".into() } else { format!("; there are {}", names.join(", ")) };
        ApiError::new(ErrorCode::SnapshotNotFound, format!("no snapshot is called {which}{rest}"))
    }
}

fn is_child(manifest: &SnapshotManifest, id: &str) -> bool {
    manifest.parent.as_ref().is_some_and(|parent| parent.id == id)
}

impl Actor for SnapshotActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_LEN);
        let (files, journal) = (self.files.clone(), self.journal.clone());
        let recovered = async move {
            let found = journal.snapshots().await;
            recovery::recover(files, journal, found).await
        };
        ctx.wait(recovered.into_actor(self).map(|index, this, _| {
            this.index = index.into_iter().map(|(name, id, manifest)| (name, Indexed { id, manifest })).collect();
        }));
    }
}

impl Handler<ListSnapshots> for SnapshotActor {
    type Result = MessageResult<ListSnapshots>;
    fn handle(&mut self, _: ListSnapshots, _: &mut Self::Context) -> Self::Result {
        faults::here("snapshots/list");
        self.handled += 1;
        MessageResult(self.seen().map(|(name, indexed)| self.show(name, indexed)).collect())
    }
}

impl Handler<FindSnapshot> for SnapshotActor {
    type Result = Result<Snapshot, ApiError>;
    fn handle(&mut self, FindSnapshot(which): FindSnapshot, _: &mut Self::Context) -> Self::Result {
        faults::here("snapshots/find");
        self.handled += 1;
        let found = self.seen().find(|(name, indexed)| name.as_str() == which || indexed.id == which);
        found.map(|(name, indexed)| self.show(name, indexed)).ok_or_else(|| self.not_found(&which))
    }
}

impl Handler<Make> for SnapshotActor {
    type Result = ResponseActFuture<Self, Result<Snapshot, ApiError>>;

    fn handle(&mut self, make: Make, _: &mut Self::Context) -> Self::Result {
        faults::here("snapshots/make");
        self.handled += 1;
        let Make { name, parent, fill, event, guard } = make;
        let refused = if self.index.contains_key(&name) || self.busy.contains_key(&name) {
            Some(ApiError::new(ErrorCode::SnapshotAlreadyExists, format!("snapshot {name} exists already")))
        } else if self.index.len() + self.busy.len() >= SNAPSHOTS_MAX {
            let message = format!("there are {SNAPSHOTS_MAX} snapshots already");
            Some(ApiError::new(ErrorCode::LimitExceeded, message).with_hint("remove some with `msb snapshot rm`"))
        } else {
            None
        };
        if let Some(error) = refused {
            return Box::pin(actix::fut::ready(Err(error)));
        }
        self.busy.insert(name.clone(), parent);
        let making = carry_out(self.files.clone(), self.journal.clone(), name.clone(), fill, event);
        Box::pin(making.into_actor(self).map(move |made, this, _| {
            this.busy.remove(&name);
            let made = made.map(|(id, manifest)| {
                let indexed = Indexed { id, manifest };
                let shown = this.show(&name, &indexed);
                this.index.insert(name, indexed);
                shown
            });
            // The sandbox may start, the image may go: the index holds what it needs.
            drop(guard);
            made
        }))
    }
}

/// The phases of a snapshot's making, each with its undo.
async fn carry_out(
    files: SnapshotFiles,
    journal: Journal,
    name: SandboxName,
    fill: Fill,
    event: Option<EventDraft>,
) -> Result<(String, SnapshotManifest), ApiError> {
    let record = |phase| SnapshotRecord { name: name.clone(), phase };
    journal.write(Change::PutSnapshot(Box::new(record(SnapshotPhase::Making)), None)).await?;
    fault::reached(Step::Recorded);
    let (on_disk, published) = (files.clone(), name.clone());
    let work = tokio::task::spawn_blocking(move || {
        let sealed = fill(&on_disk)?;
        fault::reached(Step::Sealed);
        let (id, manifest): (Digest, SnapshotManifest) = (sealed.id(), sealed.manifest().clone());
        on_disk.publish(sealed, &published)?;
        fault::reached(Step::Published);
        Ok::<_, ApiError>((id.to_string(), manifest))
    });
    let made = match work.await {
        Err(error) => Err(ApiError::internal(format!("work on a snapshot ended early: {error}"))),
        Ok(Err(error)) => Err(error),
        Ok(Ok((id, manifest))) => {
            let ready = SnapshotPhase::Ready { id: id.clone(), manifest: Box::new(manifest.clone()) };
            let durable = journal.write(Change::PutSnapshot(Box::new(record(ready)), event)).await;
            durable.map(|()| (id, manifest))
        }
    };
    if made.is_err() {
        // What cannot be undone now is undone by the next daemon: the record still says that it was being made.
        let (on_disk, gone) = (files, name.clone());
        match tokio::task::spawn_blocking(move || on_disk.remove(&gone)).await {
            Ok(Ok(())) => drop(journal.write(Change::RemoveSnapshot(name)).await),
            Ok(Err(error)) => tracing::warn!(snapshot = %name, %error, "a failed snapshot leaves files"),
            Err(error) => tracing::warn!(snapshot = %name, %error, "a failed snapshot leaves files"),
        }
    }
    made
}

impl Handler<RemoveSnapshot> for SnapshotActor {
    type Result = ResponseActFuture<Self, Result<(), ApiError>>;

    fn handle(&mut self, RemoveSnapshot(name): RemoveSnapshot, _: &mut Self::Context) -> Self::Result {
        faults::here("snapshots/remove");
        self.handled += 1;
        let Some((_, indexed)) = self.seen().find(|(known, _)| **known == name) else {
            return Box::pin(actix::fut::ready(Err(self.not_found(name.as_str()))));
        };
        let id = indexed.id.clone();
        let made = self.index.iter().filter(|(_, other)| is_child(&other.manifest, &id)).map(|(name, _)| name);
        let making = self.busy.iter().filter(|(_, parent)| parent.as_ref() == Some(&id)).map(|(name, _)| name);
        let children: Vec<String> = made.chain(making).map(ToString::to_string).collect();
        if !children.is_empty() {
            let message = format!("snapshot {name} is the parent of {}", children.join(", "));
            let error = ApiError::new(ErrorCode::SnapshotInUse, message).with_details(children);
            return Box::pin(actix::fut::ready(Err(error)));
        }
        self.busy.insert(name.clone(), None);
        let (files, journal, gone) = (self.files.clone(), self.journal.clone(), name.clone());
        let (manifest, id) = (indexed_manifest(&self.index, &name), id);
        let removing = async move {
            let record = |phase| Change::PutSnapshot(Box::new(SnapshotRecord { name: gone.clone(), phase }), None);
            journal.write(record(SnapshotPhase::Removing)).await?;
            fault::reached(Step::Removing);
            let (on_disk, path) = (files, gone.clone());
            let removed =
                tokio::task::spawn_blocking(move || on_disk.remove(&path)).await.map_err(ApiError::internal)?;
            fault::reached(Step::Removed);
            if let Err(error) = removed {
                // It is whole: it stays.
                if let Some(manifest) = manifest {
                    journal.write(record(SnapshotPhase::Ready { id, manifest: Box::new(manifest) })).await?;
                }
                return Err(error.into());
            }
            journal.write(Change::RemoveSnapshot(gone)).await
        };
        Box::pin(removing.into_actor(self).map(move |outcome: Result<(), ApiError>, this, _| {
            this.busy.remove(&name);
            if outcome.is_ok() {
                this.index.remove(&name);
            }
            outcome
        }))
    }
}

fn indexed_manifest(index: &BTreeMap<SandboxName, Indexed>, name: &SandboxName) -> Option<SnapshotManifest> {
    index.get(name).map(|indexed| indexed.manifest.clone())
}

impl Handler<Inspect> for SnapshotActor {
    type Result = MessageResult<Inspect>;
    fn handle(&mut self, _: Inspect, _: &mut Self::Context) -> Self::Result {
        faults::here("snapshots/inspect");
        MessageResult(ActorReport {
            handled: self.handled,
            state: format!("{} snapshots, {} in work", self.index.len(), self.busy.len()),
        })
    }
}
