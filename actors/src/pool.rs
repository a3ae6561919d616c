//! Ready forks of templates: for each template that asks for them, copies of its disk beside VM processes that stand by with its memory, so
//! that a sandbox which begins with it only has to be told who it is.
//!
//! ```text
//!  Mind ─► the index of snapshots ─► what each template wants ─► fill: one at a time ─► stands
//!                                                                  ▲    │ failed: again later
//!  Take (a sandbox's first start) ─► the oldest that lives ────────┘    └─ the template is gone: let go
//! ```
//!
//! Nothing of a guest has run in a ready fork: it has no identity, no network and no clock, and is like any other copy from the moment
//! a sandbox has it. None is kept for ever: they end with the service, and what the one before left is swept away. This actor never
//! makes a sandbox; without a ready fork a start makes everything itself.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use actix::prelude::*;
use msb_image::snapshot::SnapshotFiles;
use msb_protocol::error::ApiError;
use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::ReadyForks;
use msb_protocol::vmm::StandBySpec;

use crate::clock::Clock;
use crate::faults;
use crate::inspect::{ActorReport, Inspect};
use crate::kept::{Kept, Life};
use crate::sandbox::actor::LetGo;
use crate::snapshots::{ListSnapshots, Snapshot, Snapshots};
use crate::vm::{Launcher, Spare};

/// Messages that wait for the actor.
const MAILBOX_LEN: usize = 1_024;
/// Ready forks of all templates together.
const READY_MAX: usize = 64;
/// Wait between a fork that was taken and the making of the next, in milliseconds: the sandbox that took it has the processors first.
const REFILL_WAIT_MS: u64 = 1_000;
/// Wait after one that could not be made, in milliseconds.
const RETRY_WAIT_MS: u64 = 60_000;

/// A copy of a template's disk that nobody has yet; its file goes with it unless it was moved away.
#[derive(Debug)]
pub struct ReadyDisk(PathBuf);

impl ReadyDisk {
    /// Its file, to be moved away.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ReadyDisk {
    fn drop(&mut self) {
        // It was moved away, or is swept away by the next service.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A ready fork.
pub struct Ready {
    /// Its disk.
    pub disk: ReadyDisk,
    /// Its VM process, and the memory it stands by with.
    pub spare: Box<dyn Spare>,
}

/// A template that asks for ready forks.
struct Template {
    snapshot: Snapshot,
    ready: VecDeque<Ready>,
    /// None is made before this time.
    not_before_ms: u64,
    failure: Option<String>,
}

impl Template {
    fn wanted(&self) -> usize {
        self.snapshot.manifest.pool_size()
    }
}

/// Keeps them.
pub struct PoolActor {
    directory: PathBuf,
    snapshots: Snapshots,
    launcher: Arc<dyn Launcher>,
    clock: Arc<dyn Clock>,
    /// By the identity of their snapshots.
    templates: BTreeMap<String, Template>,
    is_making: bool,
    made: u64,
    taken: u64,
    handled: u64,
    timer: Option<SpawnHandle>,
    life: Life,
}

impl PoolActor {
    /// Starts it; what an earlier service left in `directory` is removed.
    #[must_use]
    pub fn keep(
        directory: PathBuf,
        snapshots: Snapshots,
        launcher: Arc<dyn Launcher>,
        clock: Arc<dyn Clock>,
    ) -> Kept<Self> {
        let keepers_clock = Arc::clone(&clock);
        Kept::keep("pool", keepers_clock, move |life| Self {
            directory: directory.clone(),
            snapshots: snapshots.clone(),
            launcher: Arc::clone(&launcher),
            clock: Arc::clone(&clock),
            templates: BTreeMap::new(),
            is_making: false,
            made: 0,
            taken: 0,
            handled: 0,
            timer: None,
            life,
        })
    }

    /// Looks at the index again.
    fn mind(&self, ctx: &mut Context<Self>) {
        let index = self.snapshots.actor.clone();
        let asked = async move { index.send(ListSnapshots).await };
        ctx.spawn(asked.into_actor(self).map(|listed, this, ctx| {
            // An actor of snapshots that ends takes the service along.
            if let Ok(listed) = listed {
                this.see(listed);
                this.fill(ctx);
            }
        }));
    }

    fn see(&mut self, listed: Vec<Snapshot>) {
        let mut left = std::mem::take(&mut self.templates);
        for snapshot in listed.into_iter().filter(|snapshot| snapshot.manifest.pool_size() > 0) {
            let id = snapshot.id.clone();
            let fresh = || Template { snapshot, ready: VecDeque::new(), not_before_ms: 0, failure: None };
            let template = left.remove(&id).unwrap_or_else(fresh);
            self.templates.insert(id, template);
        }
        // Large files take a moment to go.
        tokio::task::spawn_blocking(move || drop(left));
    }

    /// Makes one if one is missing and none is being made; else comes back when it may.
    fn fill(&mut self, ctx: &mut Context<Self>) {
        if self.is_making || self.standing() >= READY_MAX {
            return;
        }
        let missing = self.templates.iter().filter(|(_, template)| template.ready.len() < template.wanted());
        // The emptiest first.
        let Some((id, template)) = missing.min_by_key(|(_, template)| (template.not_before_ms, template.ready.len()))
        else {
            return;
        };
        if template.not_before_ms > self.clock.now_ms() {
            return self.come_back(template.not_before_ms, ctx);
        }
        self.is_making = true;
        self.made += 1;
        let (id, file) = (id.clone(), self.directory.join(format!("{}.img", self.made)));
        let snapshot = template.snapshot.clone();
        let making = make(self.snapshots.files.clone(), Arc::clone(&self.launcher), snapshot, file);
        ctx.spawn(making.into_actor(self).map(move |made, this, ctx| {
            this.is_making = false;
            this.stands(&id, made);
            this.fill(ctx);
        }));
    }

    /// Ready forks of all templates.
    fn standing(&self) -> usize {
        self.templates.values().map(|template| template.ready.len()).sum()
    }

    fn stands(&mut self, id: &str, made: Result<Ready, ApiError>) {
        let retry_ms = self.clock.now_ms().saturating_add(RETRY_WAIT_MS);
        // One whose template went meanwhile goes too.
        let Some(template) = self.templates.get_mut(id) else { return };
        match made {
            Ok(ready) => {
                template.ready.push_back(ready);
                template.failure = None;
            }
            Err(error) => {
                template.not_before_ms = retry_ms;
                // Once, however often it happens.
                if template.failure.as_ref() != Some(&error.message) {
                    tracing::warn!(template = %template.snapshot.name, error = %error.message, "no ready fork could be made; sandboxes start without");
                    template.failure = Some(error.message);
                }
            }
        }
    }

    fn come_back(&mut self, at_ms: u64, ctx: &mut Context<Self>) {
        if let Some(timer) = self.timer.take() {
            ctx.cancel_future(timer);
        }
        let pause = self.clock.sleep_until(at_ms);
        self.timer = Some(ctx.spawn(pause.into_actor(self).map(|(), this, ctx| this.fill(ctx))));
    }
}

async fn make(
    files: SnapshotFiles,
    launcher: Arc<dyn Launcher>,
    Snapshot { name, manifest, .. }: Snapshot,
    file: PathBuf,
) -> Result<Ready, ApiError> {
    let stand_by = StandBySpec {
        cpus: manifest.spec.cpus,
        memory_mib: manifest.spec.memory_mib,
        restore: files.memory_files(&name),
    };
    let size_bytes = manifest.disk.size_bytes;
    let cloned = tokio::task::spawn_blocking(move || {
        let disk = ReadyDisk(file);
        files.clone_disk(&name, size_bytes, disk.path(), size_bytes)?;
        Ok::<_, ApiError>(disk)
    });
    let disk = cloned.await.map_err(ApiError::internal)??;
    Ok(Ready { disk, spare: launcher.stand_by(stand_by).await? })
}

impl Actor for PoolActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_LEN);
        let directory = self.directory.clone();
        let swept = tokio::task::spawn_blocking(move || {
            let _ = std::fs::remove_dir_all(&directory);
            std::fs::create_dir_all(&directory)
        });
        ctx.wait(swept.into_actor(self).map(|swept, this, ctx| {
            if let Ok(Err(error)) = swept {
                tracing::warn!(directory = %this.directory.display(), %error, "there is no place for ready forks");
            }
            this.mind(ctx);
        }));
    }
}

/// Templates have come or gone.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct Mind;

impl Handler<Mind> for PoolActor {
    type Result = ();
    fn handle(&mut self, _: Mind, ctx: &mut Self::Context) {
        faults::here("pool/mind");
        self.handled += 1;
        self.mind(ctx);
    }
}

/// A ready fork of the snapshot of this identity, if one stands.
#[derive(Clone, Debug, Message)]
#[rtype(result = "Option<Ready>")]
pub struct Take(pub String);

impl Handler<Take> for PoolActor {
    type Result = Option<Ready>;

    fn handle(&mut self, Take(id): Take, ctx: &mut Self::Context) -> Self::Result {
        faults::here("pool/take");
        self.handled += 1;
        let refill_ms = self.clock.now_ms().saturating_add(REFILL_WAIT_MS);
        let template = self.templates.get_mut(&id)?;
        let taken = std::iter::from_fn(|| template.ready.pop_front()).find(|ready| ready.spare.is_alive());
        self.taken += u64::from(taken.is_some());
        template.not_before_ms = template.not_before_ms.max(refill_ms);
        self.come_back(refill_ms, ctx);
        taken
    }
}

/// How many stand, and are wanted, of each template.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "BTreeMap<SandboxName, ReadyForks>")]
pub struct Count;

impl Handler<Count> for PoolActor {
    type Result = MessageResult<Count>;
    fn handle(&mut self, _: Count, _: &mut Self::Context) -> Self::Result {
        faults::here("pool/count");
        self.handled += 1;
        let count = |template: &Template| {
            let forks = ReadyForks { ready: template.ready.len() as u64, wanted: template.wanted() as u64 };
            (template.snapshot.name.clone(), forks)
        };
        MessageResult(self.templates.values().map(count).collect())
    }
}

/// End; what stands by ends too.
impl Handler<LetGo> for PoolActor {
    type Result = ();
    fn handle(&mut self, _: LetGo, ctx: &mut Self::Context) {
        self.life.disarm();
        ctx.stop();
    }
}

impl Handler<Inspect> for PoolActor {
    type Result = MessageResult<Inspect>;
    fn handle(&mut self, _: Inspect, _: &mut Self::Context) -> Self::Result {
        faults::here("pool/inspect");
        let (standing, templates, taken) = (self.standing(), self.templates.len(), self.taken);
        MessageResult(ActorReport {
            handled: self.handled,
            state: format!("{standing} ready forks of {templates} templates, {taken} taken"),
        })
    }
}
