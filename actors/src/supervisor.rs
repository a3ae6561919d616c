//! The parent of all sandbox actors: makes them, learns of their death, and makes them again from the journal.
//!
//! ```text
//!  Create ─► record ─► SandboxActor (incarnation 1) ──panic──► DeathGuard ─► Death ─► load(record) ─► incarnation 2
//!                                       │                                     │ (back-off; budget)
//!                                       └── removed ─► Death(left) ─► child forgotten
//! ```
//!
//! actix's own `Supervisor` neither rebuilds a state nor survives a panic (a test in `tests.rs` pins what it does), so this one
//! holds what a child is made from and hears of its end through a guard that the child drops. What must outlive an incarnation
//! (activity of sessions, the view that callers watch) is held here and lent. The supervisor never waits for a child. It is itself
//! kept ([`Kept`]): one that dies leaves its children to the next one, and they notice nothing.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use actix::dev::ToEnvelope;
use actix::prelude::*;
use msb_protocol::control::{ActorRow, CreateRequest};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::mount::MountSource;
use msb_protocol::paths::HomeLayout;
use msb_protocol::snapshot::SnapshotParent;
use msb_protocol::spec::{EngineChoice, SandboxSpec};
use tokio::sync::{mpsc, watch};

use crate::clock::Clock;
use crate::faults;
use crate::identity::ProcessIdentity;
use crate::images::{ImageActor, ImageUser, ImageUsers};
use crate::journal::{Journal, SandboxRecord};
use crate::kept::{Kept, Life, Ticket};
use crate::metrics::MetricsHandle;
use crate::pool::PoolActor;
use crate::pressure::Pressure;
use crate::sandbox::activity::Activity;
use crate::sandbox::actor::{Birth, LetGo, SandboxActor};
use crate::sandbox::directories::Directories;
use crate::sandbox::disk_hold::DiskHolds;
use crate::sandbox::heartbeat::HeartbeatWriter;
use crate::sandbox::machine::{By, Event, Machine, Policy, back_off_ms};
use crate::sandbox::plan::HostSettings;
use crate::sandbox::view::{self, View};
use crate::snapshots::{Snapshot, Snapshots};
use crate::starts::Starts;
use crate::vm::Launcher;
use crate::volumes::Volumes;

/// Messages that wait for the supervisor.
const MAILBOX_LEN: usize = 4_096;
/// How often a death is told to a supervisor that dies of hearing it.
const BURIAL_TRIES: u32 = 3;
/// Deaths within [`DEATH_WINDOW_MS`] after which a child is not made again until somebody asks for it.
pub const DEATH_BUDGET: usize = 20;
/// Time in which deaths are counted, in milliseconds.
pub const DEATH_WINDOW_MS: u64 = 60_000;
/// Most sandboxes of one daemon.
pub const SANDBOXES_MAX: usize = 20_000;

/// What every sandbox lives among.
pub struct Surroundings {
    /// Files.
    pub home: HomeLayout,
    /// Sockets.
    pub runtime_dir: PathBuf,
    /// What the host brings to every boot.
    pub host: HostSettings,
    /// The queue for booting one.
    pub starts: Starts,
    /// How much of the host's processors is to be had.
    pub pressure: Pressure,
    /// Whatever runs VMs.
    pub launcher: Arc<dyn Launcher>,
    /// Images.
    pub images: Kept<ImageActor>,
    /// Snapshots.
    pub snapshots: Snapshots,
    /// Ready forks of templates.
    pub pool: Kept<PoolActor>,
    /// Samples.
    pub metrics: MetricsHandle,
    /// What is durable.
    pub journal: Journal,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Heartbeat files.
    pub heartbeats: HeartbeatWriter,
}

impl Surroundings {
    /// Where a sandbox's files are.
    #[must_use]
    pub fn directories(&self, name: &SandboxName, id: SandboxId) -> Directories {
        Directories::new(&self.home, &self.runtime_dir, name, id)
    }

    /// Named volumes. Without links on the way: the VM process follows none.
    #[must_use]
    pub fn volumes(&self) -> Volumes {
        let home = self.home.home.canonicalize().unwrap_or_else(|_| self.home.home.clone());
        Volumes::new(HomeLayout::new(home).volumes())
    }

    /// A start of a sandbox like this is on its way: what any machine on KVM needs is begun meanwhile.
    pub fn expect_start(&self, spec: &SandboxSpec) {
        let engine = if spec.engine == EngineChoice::Auto { self.host.engine } else { spec.engine };
        // Those with files of the host's are given to a process that starts now: it sees what is mounted now.
        let is_apart =
            !spec.root.is_local() && spec.mounts.iter().all(|mount| matches!(mount.source, MountSource::Tmpfs { .. }));
        if engine != EngineChoice::Qemu && is_apart {
            self.launcher.expect();
        }
    }
}

/// An incarnation's end. Sent without a bound, because there is at most one for each live child.
#[derive(Clone, Debug)]
struct Death {
    name: SandboxName,
    id: SandboxId,
    incarnation: u64,
    /// Why, if it was not meant to end.
    cause: Option<String>,
}

/// Held by an incarnation; tells the supervisor when that is dropped.
#[derive(Debug)]
pub struct DeathGuard {
    deaths: mpsc::UnboundedSender<Death>,
    name: SandboxName,
    id: SandboxId,
    incarnation: u64,
    expected: bool,
}

impl DeathGuard {
    /// The end that follows is meant.
    pub fn disarm(&mut self) {
        self.expected = true;
    }

    /// The incarnation is over.
    pub fn report(&mut self, cause: &str) {
        let cause = (!self.expected).then(|| cause.to_owned());
        // A supervisor that is gone itself has no use for it.
        let _ = self.deaths.send(Death { name: self.name.clone(), id: self.id, incarnation: self.incarnation, cause });
    }
}

struct Child {
    id: SandboxId,
    address: Option<Addr<SandboxActor>>,
    activity: Arc<Activity>,
    disk: Arc<DiskHolds>,
    view: Arc<watch::Sender<Arc<View>>>,
    incarnation: u64,
    deaths: VecDeque<u64>,
    restarts: u32,
    last_cause: Option<String>,
    gave_up: bool,
    waiting: Arc<AtomicUsize>,
}

/// One sandbox, as others hold it.
#[derive(Clone)]
pub struct SandboxRef {
    /// Its name.
    pub name: SandboxName,
    /// Its identity.
    pub id: SandboxId,
    /// Its actor; none while it is being made again.
    pub address: Option<Addr<SandboxActor>>,
    /// Its activity.
    pub activity: Arc<Activity>,
    /// What is seen of it.
    pub view: watch::Receiver<Arc<View>>,
    waiting: Arc<AtomicUsize>,
}

impl SandboxRef {
    /// Sends a message to its actor.
    ///
    /// # Errors
    /// `sandbox_not_found` if it is gone, `sandbox_busy` while its actor is being made again.
    pub async fn send<M>(&self, message: M) -> Result<M::Result, ApiError>
    where
        SandboxActor: Handler<M>,
        Context<SandboxActor>: ToEnvelope<SandboxActor, M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let busy =
            || ApiError::new(ErrorCode::SandboxBusy, format!("the actor of sandbox {} is being made again", self.name));
        let address = self.address.as_ref().ok_or_else(busy)?;
        let _ticket = Ticket::new(&self.waiting);
        match address.send(message).await {
            Ok(answer) => Ok(answer),
            Err(MailboxError::Closed) if self.view.borrow().gone => {
                Err(ApiError::new(ErrorCode::SandboxNotFound, format!("no sandbox is called {}", self.name)))
            }
            Err(_) => Err(busy()),
        }
    }
}

/// What one incarnation of the supervisor leaves to the next.
#[derive(Default)]
struct Estate {
    children: BTreeMap<SandboxName, Child>,
    /// What the journal knew when the daemon started; empty once they are children.
    found: Vec<SandboxRecord>,
}

/// The parent.
pub struct SupervisorActor {
    surroundings: Arc<Surroundings>,
    children: BTreeMap<SandboxName, Child>,
    deaths: mpsc::UnboundedSender<Death>,
    estate: Arc<Mutex<Estate>>,
    handled: u64,
    life: Life,
}

impl Drop for SupervisorActor {
    fn drop(&mut self) {
        let mut estate = self.estate.lock().unwrap_or_else(PoisonError::into_inner);
        estate.children.append(&mut self.children);
    }
}

impl SupervisorActor {
    /// Starts the supervisor of the sandboxes that the journal knows.
    #[must_use]
    pub fn keep(surroundings: Arc<Surroundings>, found: Vec<SandboxRecord>) -> Kept<Self> {
        let (deaths, mut dead) = mpsc::unbounded_channel::<Death>();
        let estate = Arc::new(Mutex::new(Estate { children: BTreeMap::new(), found }));
        let clock = surroundings.clock.clone();
        let kept = Kept::keep("supervisor", clock, move |life| Self {
            surroundings: surroundings.clone(),
            children: std::mem::take(&mut estate.lock().unwrap_or_else(PoisonError::into_inner).children),
            deaths: deaths.clone(),
            estate: estate.clone(),
            handled: 0,
            life,
        });
        // Deaths are told beside the actor, so that none is lost with one of its incarnations.
        let supervisor = kept.downgrade();
        actix::spawn(async move {
            while let Some(death) = dead.recv().await {
                for _ in 0..BURIAL_TRIES {
                    let Some(supervisor) = supervisor.upgrade() else { return };
                    if supervisor.send(Bury(death.clone())).await.is_ok() {
                        break;
                    }
                }
            }
        });
        kept
    }

    fn reference(&self, name: &SandboxName, child: &Child) -> SandboxRef {
        SandboxRef {
            name: name.clone(),
            id: child.id,
            address: child.address.clone(),
            activity: child.activity.clone(),
            view: child.view.subscribe(),
            waiting: child.waiting.clone(),
        }
    }

    /// A child that is not gone.
    fn child(&self, name: &SandboxName) -> Option<&Child> {
        self.children.get(name).filter(|child| !child.view.borrow().gone)
    }

    /// Puts a child into the world for the first time in this daemon.
    fn adopt_child(&mut self, record: SandboxRecord, creator: Option<OwnedFd>, first: Option<Event>) -> SandboxRef {
        let name = record.name.clone();
        let directories = self.surroundings.directories(&name, record.id);
        let machine = match &first {
            Some(_) => Machine::new(Policy::of(&record.spec), record.spec.detached),
            None => Machine::recover(Policy::of(&record.spec), &record.machine, self.surroundings.clock.now_ms()).0,
        };
        let detail = view::detail(&record, &machine, &directories, None);
        let view = View {
            metrics_who: view::who(&detail).encode(),
            detail,
            runs_ready: 0,
            starts_failed: 0,
            failure: None,
            gone: false,
            recovering: true,
            memory: None,
            falling_asleep: false,
            orphaned: false,
        };
        let child = Child {
            id: record.id,
            address: None,
            activity: Activity::new(self.surroundings.clock.clone()),
            disk: Arc::default(),
            view: Arc::new(watch::Sender::new(Arc::new(view))),
            incarnation: 0,
            deaths: VecDeque::new(),
            restarts: 0,
            last_cause: None,
            gave_up: false,
            waiting: Arc::default(),
        };
        self.children.insert(name.clone(), child);
        self.give_birth(&name, record, creator, first);
        self.reference(&name, &self.children[&name])
    }

    /// The factory: an incarnation of a child from its record.
    fn give_birth(
        &mut self,
        name: &SandboxName,
        record: SandboxRecord,
        creator: Option<OwnedFd>,
        first: Option<Event>,
    ) {
        let (surroundings, deaths) = (self.surroundings.clone(), self.deaths.clone());
        let Some(child) = self.children.get_mut(name) else { return };
        child.incarnation += 1;
        let guard =
            DeathGuard { deaths, name: name.clone(), id: child.id, incarnation: child.incarnation, expected: false };
        let birth = Birth {
            record,
            surroundings,
            activity: child.activity.clone(),
            disk: child.disk.clone(),
            view: child.view.clone(),
            guard,
            creator,
            first,
        };
        child.address = Some(SandboxActor::new(birth).start());
    }

    fn bury(&mut self, death: Death, ctx: &mut Context<Self>) {
        let now_ms = self.surroundings.clock.now_ms();
        let Some(child) = self
            .children
            .get_mut(&death.name)
            .filter(|child| child.id == death.id && child.incarnation == death.incarnation)
        else {
            return;
        };
        let Some(cause) = death.cause else {
            self.children.remove(&death.name);
            return;
        };
        child.address = None;
        child.deaths.push_back(now_ms);
        while child.deaths.front().is_some_and(|at| at.saturating_add(DEATH_WINDOW_MS) < now_ms) {
            child.deaths.pop_front();
        }
        child.restarts += 1;
        child.last_cause = Some(cause.clone());
        let view = Arc::new(View { orphaned: true, ..View::clone(&child.view.borrow()) });
        child.view.send_replace(view);
        let deaths = child.deaths.len();
        if deaths > DEATH_BUDGET {
            child.gave_up = true;
            tracing::error!(sandbox = %death.name, cause, deaths, "the actor of a sandbox died too often; it is made again when somebody asks for the sandbox");
            return;
        }
        tracing::error!(sandbox = %death.name, cause, deaths, "the actor of a sandbox died and is made again");
        // The first one at once: one accident should cost nothing.
        let wait_ms = if deaths == 1 { 0 } else { back_off_ms(u32::try_from(deaths - 2).unwrap_or(u32::MAX)) };
        self.rebuild(death.name, death.id, wait_ms, ctx);
    }

    fn rebuild(&mut self, name: SandboxName, id: SandboxId, wait_ms: u64, ctx: &mut Context<Self>) {
        let (clock, journal) = (self.surroundings.clock.clone(), self.surroundings.journal.clone());
        let load = async move {
            if wait_ms > 0 {
                clock.sleep_until(clock.now_ms().saturating_add(wait_ms)).await;
            }
            journal.load(id).await
        };
        ctx.spawn(load.into_actor(self).map(move |record, this, _| match record {
            Some(record) if this.children.get(&name).is_some_and(|child| child.id == id && child.address.is_none()) => {
                this.give_birth(&name, record, None, None);
            }
            Some(_) => {}
            None => {
                // It died before its record was durable: nothing was made of it yet.
                if let Some(child) = this.children.get(&name).filter(|child| child.id == id) {
                    // Copied first: a view cannot be replaced while it is borrowed.
                    let last = View::clone(&child.view.borrow());
                    child.view.send_replace(Arc::new(View { gone: true, ..last }));
                    this.children.remove(&name);
                }
            }
        }));
    }
}

impl Actor for SupervisorActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX_LEN);
        faults::here("supervisor/started");
        let found = std::mem::take(&mut self.estate.lock().unwrap_or_else(PoisonError::into_inner).found);
        for record in found {
            self.adopt_child(record, None, None);
        }
        // Children that an earlier incarnation was about to make.
        let unborn: Vec<_> = self
            .children
            .iter()
            .filter(|(_, child)| child.address.is_none() && !child.gave_up)
            .map(|(name, child)| (name.clone(), child.id))
            .collect();
        for (name, id) in unborn {
            self.rebuild(name, id, 0, ctx);
        }
    }
}

/// A child's incarnation is over.
#[derive(Message)]
#[rtype(result = "()")]
struct Bury(Death);

impl Handler<Bury> for SupervisorActor {
    type Result = ();
    fn handle(&mut self, Bury(death): Bury, ctx: &mut Self::Context) {
        faults::here("supervisor/bury");
        self.handled += 1;
        self.bury(death, ctx);
    }
}

/// Make a sandbox. The answer comes when its actor exists; what follows is seen in its view.
#[derive(Message)]
#[rtype(result = "Result<SandboxRef, ApiError>")]
pub struct Create {
    /// What was asked for; checked by the caller.
    pub request: CreateRequest,
    /// Who asked, if it is attached: its identity and a pidfd.
    pub creator: Option<(ProcessIdentity, OwnedFd)>,
    /// The snapshot that the request names.
    pub snapshot: Option<Snapshot>,
}

impl Handler<Create> for SupervisorActor {
    type Result = Result<SandboxRef, ApiError>;

    fn handle(&mut self, Create { request, creator, snapshot }: Create, _: &mut Self::Context) -> Self::Result {
        faults::here("supervisor/create");
        self.handled += 1;
        if self.children.len() >= SANDBOXES_MAX {
            return Err(ApiError::new(
                ErrorCode::LimitExceeded,
                format!("there are {SANDBOXES_MAX} sandboxes already"),
            ));
        }
        let id = SandboxId::generate();
        let mut spec = request.spec;
        let name = match spec.name.clone() {
            Some(name) => name,
            None => (0..)
                .map(|try_number| invented_name(id, try_number))
                .find(|name| self.child(name).is_none())
                .unwrap_or_else(|| invented_name(id, 0)),
        };
        if self.child(&name).is_some() {
            return Err(ApiError::new(ErrorCode::SandboxAlreadyExists, format!("sandbox {name} exists already")));
        }
        spec.name = Some(name.clone());
        let (identity, pidfd) = creator.unzip();
        let machine = Machine::new(Policy::of(&spec), spec.detached).stored();
        let record = SandboxRecord {
            id,
            name,
            labels: spec.labels.clone(),
            // A snapshot's disk fits one image and no other of the same name.
            image_digest: snapshot.as_ref().map(|snapshot| snapshot.manifest.image.digest.clone()).unwrap_or_default(),
            snapshot: snapshot.map(|snapshot| SnapshotParent { id: snapshot.id, name: snapshot.name }),
            command: spec.command.clone().unwrap_or_default(),
            created_at: self.surroundings.clock.wall(),
            started_at: None,
            machine,
            vmm: None,
            creator: identity,
            last_end: None,
            boot_error: None,
            engine: None,
            engine_reason: None,
            boot_phases: Vec::new(),
            jail: Default::default(),
            ports: Vec::new(),
            spec,
        };
        Ok(self.adopt_child(record, pidfd, Some(Event::Start { by: By::User, hold_main: request.hold_main })))
    }
}

/// One sandbox.
#[derive(Message)]
#[rtype(result = "Result<SandboxRef, ApiError>")]
pub struct Find(pub SandboxName);

impl Handler<Find> for SupervisorActor {
    type Result = Result<SandboxRef, ApiError>;

    fn handle(&mut self, Find(name): Find, ctx: &mut Self::Context) -> Self::Result {
        faults::here("supervisor/find");
        self.handled += 1;
        let child = self
            .child(&name)
            .ok_or_else(|| ApiError::new(ErrorCode::SandboxNotFound, format!("no sandbox is called {name}")))?;
        let (reference, id, gave_up) = (self.reference(&name, child), child.id, child.gave_up);
        if gave_up {
            if let Some(child) = self.children.get_mut(&name) {
                child.gave_up = false;
                child.deaths.clear();
            }
            self.rebuild(name, id, 0, ctx);
        }
        Ok(reference)
    }
}

/// Every sandbox, newest first.
#[derive(Message)]
#[rtype(result = "Vec<SandboxRef>")]
pub struct All;

/// What is seen of every sandbox, newest first: for whoever only looks at a thousand of them each second.
#[derive(Message)]
#[rtype(result = "Vec<Arc<View>>")]
pub struct Views;

impl Handler<Views> for SupervisorActor {
    type Result = MessageResult<Views>;

    fn handle(&mut self, _: Views, _: &mut Self::Context) -> Self::Result {
        faults::here("supervisor/views");
        self.handled += 1;
        let views = self.children.values().map(|child| (child.id, Arc::clone(&child.view.borrow())));
        let mut views: Vec<_> = views.filter(|(_, view)| !view.gone).collect();
        // Identities are ordered by time of creation.
        views.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(*id));
        MessageResult(views.into_iter().map(|(_, view)| view).collect())
    }
}

impl Handler<All> for SupervisorActor {
    type Result = MessageResult<All>;

    fn handle(&mut self, _: All, _: &mut Self::Context) -> Self::Result {
        faults::here("supervisor/all");
        self.handled += 1;
        let mut all: Vec<SandboxRef> = self
            .children
            .iter()
            .filter(|(_, child)| !child.view.borrow().gone)
            .map(|(name, child)| self.reference(name, child))
            .collect();
        // Identities are ordered by time of creation.
        all.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.id));
        MessageResult(all)
    }
}

/// End with all children; VMs go on for the next daemon.
impl Handler<LetGo> for SupervisorActor {
    type Result = ();
    fn handle(&mut self, _: LetGo, ctx: &mut Self::Context) {
        for child in self.children.values() {
            // A mailbox that is full belongs to a child that ends with the process.
            if child.address.as_ref().is_some_and(|address| address.try_send(LetGo).is_err()) {
                tracing::debug!("a busy sandbox is left to the end of the process");
            }
        }
        self.life.disarm();
        ctx.stop();
    }
}

/// Who uses which image.
#[derive(Message)]
#[rtype(result = "ImageUsers")]
pub struct ListImageUsers;

impl Handler<ListImageUsers> for SupervisorActor {
    type Result = MessageResult<ListImageUsers>;

    fn handle(&mut self, _: ListImageUsers, _: &mut Self::Context) -> Self::Result {
        faults::here("supervisor/image_users");
        self.handled += 1;
        let mut users = ImageUsers::new();
        for (name, child) in &self.children {
            let view = child.view.borrow();
            if !view.gone && !view.detail.image_digest.is_empty() {
                users.entry(view.detail.image_digest.clone()).or_default().push(ImageUser::Sandbox(name.clone()));
            }
        }
        MessageResult(users)
    }
}

/// The supervisor's and its children's rows, without asking them; a row's state is what its view shows.
#[derive(Message)]
#[rtype(result = "Vec<(ActorRow, Option<SandboxRef>)>")]
pub struct Rows;

impl Handler<Rows> for SupervisorActor {
    type Result = MessageResult<Rows>;

    fn handle(&mut self, _: Rows, _: &mut Self::Context) -> Self::Result {
        faults::here("supervisor/rows");
        self.handled += 1;
        let own = ActorRow {
            name: "supervisor".into(),
            parent: String::new(),
            handled: self.handled,
            mailbox: 0,
            restarts: 0,
            last_cause: None,
            state: format!("{} children", self.children.len()),
        };
        let children = self.children.iter().map(|(name, child)| {
            let state = match (&child.address, child.gave_up) {
                (_, true) => "given up: its actor died too often".into(),
                (None, false) => "its actor is being made again".into(),
                (Some(_), false) => child.view.borrow().state().as_str().to_owned(),
            };
            let row = ActorRow {
                name: format!("sandbox/{name}"),
                parent: "supervisor".into(),
                handled: 0,
                mailbox: child.waiting.load(Ordering::Relaxed) as u64,
                restarts: child.restarts,
                last_cause: child.last_cause.clone(),
                state,
            };
            let reference = child.address.is_some().then(|| self.reference(name, child));
            (row, reference)
        });
        MessageResult(std::iter::once((own, None)).chain(children).collect())
    }
}

/// A name for a sandbox that was given none: two words and four digits of its identity.
fn invented_name(id: SandboxId, try_number: u32) -> SandboxName {
    const FIRST: [&str; 16] = [
        "amber", "brisk", "calm", "deft", "early", "fresh", "glad", "hazel", "ivory", "keen", "lucid", "mild", "neat",
        "plain", "quiet", "swift",
    ];
    const SECOND: [&str; 16] = [
        "birch", "brook", "cedar", "cliff", "dune", "fern", "field", "grove", "heath", "lake", "maple", "marsh",
        "pine", "reef", "ridge", "stone",
    ];
    // The last bytes of a version 7 UUID are random.
    let bytes = id.0.as_bytes();
    let words = (FIRST[usize::from(bytes[10] & 15)], SECOND[usize::from(bytes[11] & 15)]);
    let number = u32::from(u16::from_be_bytes([bytes[14], bytes[15]])).wrapping_add(try_number);
    let text = format!("{}-{}-{:04x}", words.0, words.1, number & 0xffff);
    // Made of letters, digits and dashes, so it always parses.
    SandboxName::parse(&text).unwrap_or_else(|error| panic!("an invented name is wrong: {error}"))
}
