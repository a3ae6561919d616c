//! Ready forks of templates: for each template that asks for them, copies of its disk beside machines that stand by with its memory, so that a
//! sandbox which begins with it only has to be told who it is.
//!
//! ```text
//!  Mind ─► the index of snapshots ─► what each template wants ─► fill: one at a time ─► stands
//!                                                                  ▲    │ failed: again later
//!  Take (a sandbox's first start) ─► the oldest that lives ────────┘    └─ the template is gone: let go
//! ```
//!
//! A ready fork was made of the template's memory, was renewed as any copy is, and is halted soon after; its workload is frozen and never ran. It is renewed
//! again for whoever takes it. It is made as `msb run TEMPLATE` would be without options, and only a start that asks for nothing else takes it.
//! None is kept for ever: they end with the service, and what the one before left is swept away. This actor never
//! makes a sandbox; without a ready fork a start makes everything itself.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use actix::prelude::*;
use msb_protocol::error::ApiError;
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::network::NetworkSpec;
use msb_protocol::paths::HomeLayout;
use msb_protocol::snapshot::ReadyForks;
use msb_protocol::spec::{EngineChoice, SandboxSpec, Workload};
use msb_protocol::vmm::VmSpec;

use crate::clock::Clock;
use crate::faults;
use crate::images::{ImageActor, Prepare, PreparedImage};
use crate::inspect::{ActorReport, Inspect};
use crate::kept::{Kept, Life};
use crate::sandbox::actor::LetGo;
use crate::sandbox::directories::Directories;
use crate::sandbox::machine::Run;
use crate::sandbox::plan::{self, HostSettings};
use crate::snapshots::{ListSnapshots, Snapshot, Snapshots};
use crate::vm::{Launcher, Spare};
use crate::volumes::Volumes;

/// Messages that wait for the actor.
const MAILBOX_LEN: usize = 1_024;
/// Ready forks of all templates together.
const READY_MAX: usize = 64;
/// Wait between a fork that was taken and the making of the next, in milliseconds: the sandbox that took it has the processors first.
const REFILL_WAIT_MS: u64 = 1_000;
/// Wait after one that could not be made, in milliseconds.
const RETRY_WAIT_MS: u64 = 60_000;

/// The folders of a ready fork; they go with it unless they were moved away.
#[derive(Debug)]
pub struct ReadyPlace(Directories);

impl ReadyPlace {
    /// Makes its folders and its disk those of a sandbox, whose folders are there and empty.
    ///
    /// # Errors
    /// As rename(2); then it is of no use to anybody.
    pub fn move_to(&self, own: &Directories) -> std::io::Result<()> {
        std::fs::rename(&self.0.logs, &own.logs)?;
        std::fs::rename(&self.0.run, &own.run)?;
        // The last: a disk that is there is a start that found its fork.
        std::fs::rename(&self.0.upper, &own.upper)
    }
}

impl Drop for ReadyPlace {
    fn drop(&mut self) {
        // What was moved away is not there; what stays is swept away by the next service.
        let _ = std::fs::remove_dir_all(&self.0.root);
        let _ = std::fs::remove_dir_all(&self.0.run);
    }
}

/// A ready fork.
pub struct Ready {
    /// Its machine.
    pub spare: Box<dyn Spare>,
    /// Where it is.
    pub place: ReadyPlace,
    /// What stands.
    spec: Box<VmSpec>,
    /// Its image stays while it does.
    _image: PreparedImage,
}

/// What a machine is made with, beside its template.
pub struct Workshop {
    /// Files.
    pub home: HomeLayout,
    /// Sockets.
    pub runtime_dir: PathBuf,
    /// What the host brings to every boot.
    pub host: HostSettings,
    /// Images.
    pub images: Kept<ImageActor>,
    /// Snapshots.
    pub snapshots: Snapshots,
    /// Whatever runs VMs.
    pub launcher: Arc<dyn Launcher>,
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
    workshop: Arc<Workshop>,
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
    /// Starts it; the disks that an earlier service left are removed.
    #[must_use]
    pub fn keep(workshop: Workshop, clock: Arc<dyn Clock>) -> Kept<Self> {
        let (workshop, keepers_clock) = (Arc::new(workshop), Arc::clone(&clock));
        Kept::keep("pool", keepers_clock, move |life| Self {
            workshop: Arc::clone(&workshop),
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
        let index = self.workshop.snapshots.actor.clone();
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
        let (id, snapshot) = (id.clone(), template.snapshot.clone());
        let making = make(Arc::clone(&self.workshop), snapshot, self.made);
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

/// The machine of a sandbox that begins with the template and asks for nothing else.
fn spec_of(
    workshop: &Workshop,
    Snapshot { name, manifest, .. }: &Snapshot,
    image: &PreparedImage,
    id: SandboxId,
    directories: &Directories,
) -> Result<VmSpec, ApiError> {
    let has_network = manifest.memory.as_ref().is_some_and(|memory| memory.network);
    let network = NetworkSpec { enabled: has_network, ..manifest.spec.network.clone() };
    // Nothing else goes on with a saved machine.
    let spec = SandboxSpec { engine: EngineChoice::Kvm, workload: Workload::None, network, ..manifest.spec.clone() };
    let run = Run { boot_id: BootId::generate(), hold_main: false, by_policy: false, wakes: None };
    let image = (&image.config, image.lower.clone());
    let volumes = Volumes::new(workshop.home.volumes());
    let spec = plan::vm_spec((id, name), (&spec, &[]), run, image, &workshop.host, directories, &volumes)?;
    Ok(VmSpec { restore: Some(workshop.snapshots.files.memory_files(name)), ..spec })
}

async fn make(workshop: Arc<Workshop>, snapshot: Snapshot, number: u64) -> Result<Ready, ApiError> {
    let lost = |error| ApiError::internal(format!("the image actor: {error}"));
    let image = workshop.images.send(Prepare(snapshot.manifest.image.digest.clone())).await.map_err(lost)??;
    let id = SandboxId::generate();
    let root = workshop.home.pool().join(number.to_string());
    let directories = Directories::at(root, &workshop.home, &workshop.runtime_dir, id);
    let spec = Box::new(spec_of(&workshop, &snapshot, &image, id, &directories)?);
    let (files, size_bytes) = (workshop.snapshots.files.clone(), snapshot.manifest.disk.size_bytes);
    let prepared = tokio::task::spawn_blocking(move || {
        let place = ReadyPlace(directories);
        place.0.prepare()?;
        files.clone_disk(&snapshot.name, size_bytes, &place.0.upper, size_bytes)?;
        Ok::<_, ApiError>(place)
    });
    let place = prepared.await.map_err(ApiError::internal)??;
    Ok(Ready { spare: workshop.launcher.stand_by(spec.clone()).await?, place, spec, _image: image })
}

impl Actor for PoolActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_LEN);
        let directory = self.workshop.home.pool();
        let swept = tokio::task::spawn_blocking(move || {
            let _ = std::fs::remove_dir_all(&directory);
            std::fs::create_dir_all(&directory)
        });
        ctx.wait(swept.into_actor(self).map(|swept, this, ctx| {
            if let Ok(Err(error)) = swept {
                tracing::warn!(directory = %this.workshop.home.pool().display(), %error, "there is no place for ready forks");
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

/// A ready fork, if one stands that can become what is wanted.
#[derive(Clone, Debug, Message)]
#[rtype(result = "Option<Ready>")]
pub struct Take {
    /// The identity of its snapshot.
    pub snapshot: String,
    /// What is wanted, as it would be without one.
    pub spec: Box<VmSpec>,
}

impl Handler<Take> for PoolActor {
    type Result = Option<Ready>;

    fn handle(&mut self, Take { snapshot, mut spec }: Take, ctx: &mut Self::Context) -> Self::Result {
        faults::here("pool/take");
        self.handled += 1;
        let refill_ms = self.clock.now_ms().saturating_add(REFILL_WAIT_MS);
        let template = self.templates.get_mut(&snapshot)?;
        spec.restore = Some(self.workshop.snapshots.files.memory_files(&template.snapshot.name));
        template.ready.retain(|ready| ready.spare.is_alive());
        let fits = template.ready.front().is_none_or(|ready| spec.takes_over(&ready.spec));
        let taken = if fits { template.ready.pop_front() } else { None };
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
