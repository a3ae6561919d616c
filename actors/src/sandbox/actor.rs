//! The actor of one sandbox: feeds its machine, makes each change durable, then does what the machine says.
//!
//! ```text
//!  API ── Ask ──────────┐                       ┌─► journal (durable first)
//!  VM events (stream) ──┼─► feed(event) ─► step ┤
//!  timers, creator ─────┘                       └─► perform(effects) ─► image actor, disks, launcher, VM commands
//! ```
//!
//! While a change is being made durable the actor handles nothing else (`ctx.wait`), so effects happen in the order of the steps.
//! It owns the VM's command channel, the watch on the creator, the beats and the timers. It never blocks, never touches a session's
//! bytes, and never decides anything that the machine could.

mod care;
mod effects;
mod pause;
mod saving;
mod sleeping;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use actix::prelude::*;
use jiff::SignedDuration;
use msb_protocol::control::{GuestMetrics, RunEnd};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::BootId;
use msb_protocol::spec::EngineChoice;
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::vmm::{BootError, NetworkExplanation};
use tokio::sync::{mpsc, oneshot, watch};

use self::effects::News;
use super::activity::Activity;
use super::directories::Directories;
use super::disk_hold::DiskHolds;
use super::heartbeat::{BeatWatch, Heartbeat, Verdict};
use super::machine::{By, Denial, Effect, Event, Machine, Moment, Policy, State, Then};
use super::network::{BoundPorts, PortWatch};
use super::ssh::SshForwarder;
use super::view::{self, View};
use crate::daemon::Daemon;
use crate::faults;
use crate::identity::{self, ProcessIdentity};
use crate::images::PreparedImage;
use crate::inspect::{ActorReport, Inspect};
use crate::journal::{Change, EventDraft, SandboxRecord};
use crate::metrics::meter::Meter;
use crate::snapshots::Source;
use crate::supervisor::{DeathGuard, Surroundings};
use crate::vm::{Gone, VmCommand, VmEvent, VmHandle};

pub use care::Relabel;
pub use pause::Halt;
pub use saving::HoldMachine;

/// Messages that wait for one sandbox before their senders are told `sandbox_busy`.
const MAILBOX_LEN: usize = 64;
/// How often a sandbox with an idle timeout looks again while something is active in it, in milliseconds.
const IDLE_LOOK_MS: u64 = 1_000;
/// Wait before a change that the journal refused is offered again, in milliseconds.
const JOURNAL_RETRY_MS: u64 = 1_000;
/// Characters of a message that comes from below.
const MESSAGE_LEN_MAX: usize = 2_048;

/// What the API asks of a sandbox. The answer says whether it was taken; what follows is seen in the [`View`].
#[derive(Clone, Debug, Message)]
#[rtype(result = "Result<(), ApiError>")]
pub enum Ask {
    /// Feed the machine.
    Event(Event),
    /// Let it outlive its creator.
    Detach,
}

/// Set by tests to see what a panic in each handler does.
#[cfg(any(test, feature = "simulation"))]
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct PanicNow;

/// Let go of everything and end; the VM goes on for the next daemon.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct LetGo;

/// The sandbox's SSH forwarder, made if there is none yet.
#[derive(Message)]
#[rtype(result = "Result<Arc<SshForwarder>, ApiError>")]
pub struct OpenSsh(pub Daemon);

impl Handler<OpenSsh> for SandboxActor {
    type Result = ResponseActFuture<Self, Result<Arc<SshForwarder>, ApiError>>;

    fn handle(&mut self, OpenSsh(daemon): OpenSsh, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/ssh");
        self.handled += 1;
        if let Some(forwarder) = &self.ssh {
            return Box::pin(actix::fut::ready(Ok(Arc::clone(forwarder))));
        }
        let (root, keys) = (self.directories.root.clone(), self.surroundings.home.authorized_keys());
        let (name, id) = (self.record.name.clone(), self.record.id);
        let opening = tokio::task::spawn_blocking(move || SshForwarder::open(&root, keys, daemon, name, id));
        Box::pin(opening.into_actor(self).map(|opened, this, _| {
            let opened = opened.map_err(ApiError::internal)??;
            // Two clients may have come at once; the first one's is everybody's.
            Ok(Arc::clone(this.ssh.get_or_insert_with(|| Arc::new(opened))))
        }))
    }
}

/// The sandbox's disk for a snapshot: it neither starts nor goes away while that is held.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "Result<Source, ApiError>")]
pub struct HoldDisk;

impl Handler<HoldDisk> for SandboxActor {
    type Result = Result<Source, ApiError>;

    fn handle(&mut self, _: HoldDisk, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/hold_disk");
        self.handled += 1;
        let (name, state) = (&self.record.name, self.machine.shown());
        // Asleep and restarting ones start by themselves.
        if !matches!(self.machine.state(), State::Stopped | State::Crashed) || self.stepping {
            let message = format!("sandbox {name} is {}: a snapshot is taken of a stopped one", state.as_str());
            return Err(ApiError::new(ErrorCode::SandboxStillRunning, message)
                .with_hint(format!("stop it first: msb stop {name}")));
        }
        self.has_image()?;
        if self.record.image_digest.is_empty() || !self.directories.upper.exists() {
            let message = format!("sandbox {name} has no disk yet: it never started");
            return Err(ApiError::new(ErrorCode::InvalidRequest, message).with_hint("start it once, then stop it"));
        }
        Ok(self.source())
    }
}

impl Handler<LetGo> for SandboxActor {
    type Result = ();
    fn handle(&mut self, _: LetGo, ctx: &mut Self::Context) {
        self.guard.disarm();
        ctx.stop();
    }
}

/// What a new incarnation of a sandbox is made from.
pub struct Birth {
    /// Its record.
    pub record: SandboxRecord,
    /// What it lives among.
    pub surroundings: Arc<Surroundings>,
    /// Its activity, which outlives incarnations.
    pub activity: Arc<Activity>,
    /// Who reads its disk, who outlives them too.
    pub disk: Arc<DiskHolds>,
    /// Where others see it.
    pub view: Arc<watch::Sender<Arc<View>>>,
    /// Tells the supervisor when this incarnation is gone.
    pub guard: DeathGuard,
    /// A pidfd of the creator, from its connection.
    pub creator: Option<OwnedFd>,
    /// The first event of a sandbox that was just asked for; recovered ones have none.
    pub first: Option<Event>,
}

/// One sandbox.
pub struct SandboxActor {
    record: SandboxRecord,
    machine: Machine,
    surroundings: Arc<Surroundings>,
    directories: Directories,
    activity: Arc<Activity>,
    disk: Arc<DiskHolds>,
    view: Arc<watch::Sender<Arc<View>>>,
    guard: DeathGuard,
    creator: Option<OwnedFd>,
    creator_watch: Option<SpawnHandle>,
    first: Option<Event>,
    first_effects: Vec<Effect>,
    vm: Option<VmHandle>,
    /// What the VM process of this run speaks.
    vmm_generation: u32,
    image: Option<PreparedImage>,
    /// The machine that this start goes on with. Only of the disk that was made in this start: one that ran since fits no memory.
    restore: Option<effects::Restore>,
    /// The newest try to write the machine down for its sleep.
    suspension: sleeping::Attempt,
    /// Tries whose answers are not here: the machine may be standing, whatever state it is in.
    suspensions: u32,
    /// Runs whose memory no longer counts and is still there.
    forgotten: Vec<BootId>,
    /// Published ports, bound from the boot until the sandbox rests.
    ports: BoundPorts,
    /// Waits for visitors while the sandbox sleeps.
    port_watch: Option<(PortWatch, SpawnHandle)>,
    beats: Option<BeatWatch>,
    /// Events of a run whose launch or adoption is under way.
    coming: Option<(BootId, mpsc::Receiver<VmEvent>)>,
    care: Option<care::Care>,
    timer: Option<SpawnHandle>,
    beat_timer: Option<SpawnHandle>,
    /// What samples of this run go through, and what its agent says.
    meter: Option<Arc<Meter>>,
    /// Steps whose effects are not done yet, oldest first.
    steps: VecDeque<Step>,
    stepping: bool,
    gone: Option<Gone>,
    ssh: Option<Arc<SshForwarder>>,
    failure: Option<ApiError>,
    runs_ready: u64,
    starts_failed: u64,
    handled: u64,
}

struct Step {
    change: Option<Change>,
    effects: Vec<Effect>,
    /// Who waits for the change to be durable.
    waiting: Option<oneshot::Sender<Result<(), ApiError>>>,
}

impl Step {
    fn new(change: Option<Change>, effects: Vec<Effect>) -> Self {
        Self { change, effects, waiting: None }
    }
}

impl SandboxActor {
    /// An incarnation.
    #[must_use]
    pub fn new(birth: Birth) -> Self {
        let Birth { record, surroundings, activity, disk, view, guard, creator, first } = birth;
        let now_ms = surroundings.clock.now_ms();
        let policy = Policy::of(&record.spec);
        let (machine, first_effects) = if first.is_some() {
            (Machine::new(policy, record.spec.detached), Vec::new())
        } else {
            Machine::recover(policy, &record.machine, now_ms)
        };
        let directories = surroundings.directories(&record.name, record.id);
        let (runs_ready, starts_failed, failure) = {
            let last = view.borrow();
            (last.runs_ready, last.starts_failed, last.failure.clone())
        };
        Self {
            record,
            machine,
            surroundings,
            directories,
            activity,
            disk,
            view,
            guard,
            creator,
            creator_watch: None,
            first,
            first_effects,
            vm: None,
            vmm_generation: 0,
            image: None,
            restore: None,
            suspension: sleeping::Attempt::default(),
            suspensions: 0,
            forgotten: Vec::new(),
            ports: BoundPorts::default(),
            port_watch: None,
            beats: None,
            coming: None,
            care: None,
            timer: None,
            beat_timer: None,
            meter: None,
            steps: VecDeque::new(),
            stepping: false,
            gone: None,
            ssh: None,
            failure,
            runs_ready,
            starts_failed,
            handled: 0,
        }
    }

    fn now_ms(&self) -> u64 {
        self.surroundings.clock.now_ms()
    }

    /// One event. What it changes is durable before any of its effects happens and before anybody sees it.
    fn feed(&mut self, event: Event, ctx: &mut Context<Self>) -> Result<(), Denial> {
        self.feed_and(event, None, ctx)
    }

    /// As [`Self::feed`]; `waiting` hears when the change is durable, and is dropped if nothing changed.
    fn feed_and(
        &mut self,
        event: Event,
        waiting: Option<oneshot::Sender<Result<(), ApiError>>>,
        ctx: &mut Context<Self>,
    ) -> Result<(), Denial> {
        let was_running = matches!(self.machine.state(), State::Running { .. });
        let stood = matches!(self.machine.state(), State::Suspending { .. });
        let memory = self.machine.memory();
        let at = Moment { now_ms: self.now_ms(), next_boot_id: BootId::generate() };
        let before = self.machine.run();
        let adopted = matches!(event, Event::Adopted { .. });
        let effects = self.machine.step(event, at)?;
        self.forgotten.extend(memory.filter(|_| self.machine.memory() != memory));
        if let State::Running { run, .. } = self.machine.state()
            && !was_running
        {
            // One that was halted goes on: its time before that still counts, its idleness begins anew.
            if stood {
                // Whoever asked for it waits to see it up.
                self.runs_ready += 1;
            } else if !matches!(event, Event::Resumed) {
                self.runs_ready += 1;
                self.failure = None;
                self.record.started_at = Some(self.surroundings.clock.wall());
                self.record.boot_error = None;
            }
            self.activity.touch_start();
            let watch = BeatWatch::new(run.boot_id, self.record.engine.unwrap_or(EngineChoice::Qemu), at.now_ms);
            self.beats = Some(if adopted { watch.adopted() } else { watch });
            self.arm_beats(ctx);
            self.begin_care(run.boot_id, ctx);
        } else if was_running && !matches!(self.machine.state(), State::Running { .. }) {
            self.end_care(ctx);
            if matches!(self.machine.state(), State::Paused { .. } | State::Suspending { .. }) {
                // Nothing beats in a halted VM.
                self.beats = None;
            }
        }
        for effect in &effects {
            match effect {
                Effect::EndRun { boot_id, cause } => self.note_end(*boot_id, *cause),
                Effect::FailStart => self.note_failed_start(),
                _ => {}
            }
        }
        let is_lost = self.has_lost_memory(before);
        self.tell_of_sleep(is_lost);
        let change = match effects.first() {
            Some(Effect::Record { by, cause }) => {
                self.record.machine = self.machine.stored();
                let draft = EventDraft {
                    sandbox: self.record.name.clone(),
                    sandbox_id: self.record.id,
                    boot_id: self.machine.run().or(before).map(|run| run.boot_id),
                    event: if matches!(event, Event::Start { .. })
                        && before.is_none()
                        && self.record.started_at.is_none()
                        && self.record.last_end.is_none()
                    {
                        "created".into()
                    } else if is_lost {
                        "memory_lost".into()
                    } else {
                        "state".into()
                    },
                    state: self.machine.shown(),
                    cause: *cause,
                    actor: self.actor_of(event, by.as_str()),
                    message: self
                        .record
                        .last_end
                        .as_ref()
                        .filter(|_| cause.is_some())
                        .map(|end| end.message.clone())
                        .unwrap_or_default(),
                };
                Some(Change::Put(Box::new(self.record.clone()), Some(draft)))
            }
            _ => None,
        };
        self.steps.push_back(Step { waiting, ..Step::new(change, effects) });
        self.advance(ctx);
        Ok(())
    }

    /// Idleness is found by a timer of the daemon but is its own reason to a reader of events.
    fn actor_of(&self, event: Event, word: &str) -> String {
        match (event, self.machine.state()) {
            (
                Event::Tick { .. },
                State::PreStop { cause: EndCause::Idle, .. }
                | State::Draining { cause: EndCause::Idle, .. }
                | State::Suspending { .. },
            ) => "idle".into(),
            _ => word.into(),
        }
    }

    /// Feeds an event that cannot be refused.
    fn tell(&mut self, event: Event, ctx: &mut Context<Self>) {
        if let Err(denial) = self.feed(event, ctx) {
            tracing::debug!(sandbox = %self.record.name, ?event, %denial, "an event came too late");
        }
    }

    /// Does the oldest step: first the journal, then the effects, then the next step.
    fn advance(&mut self, ctx: &mut Context<Self>) {
        if self.stepping {
            return;
        }
        let Some(step) = self.steps.pop_front() else { return self.settle(ctx) };
        match step.change {
            None => {
                self.perform(step.effects, ctx);
                self.advance(ctx);
            }
            Some(change) => {
                self.stepping = true;
                let journal = self.surroundings.journal.clone();
                let durable =
                    async move { journal.write(change).await }.into_actor(self).map(move |outcome, this, ctx| {
                        this.stepping = false;
                        this.go_on(outcome.clone(), step.effects, ctx);
                        // Only now: whoever asked finds what followed at once, in the view and on the host.
                        if let Some(waiting) = step.waiting {
                            // Whoever has gone meanwhile wanted to know no more.
                            let _ = waiting.send(outcome);
                        }
                    });
                ctx.wait(durable);
            }
        }
    }

    /// A running VM cannot wait for the disk: the sandbox goes on, and the record is offered again until it is taken.
    fn journal_refused(&mut self, error: &ApiError, ctx: &mut Context<Self>) {
        tracing::error!(sandbox = %self.record.name, error = %error.message, "a change could not be made durable and will be tried again");
        let at = self.now_ms().saturating_add(JOURNAL_RETRY_MS);
        let pause = self.surroundings.clock.sleep_until(at);
        ctx.spawn(pause.into_actor(self).map(|(), this, ctx| {
            if matches!(this.machine.state(), State::Removed) {
                return;
            }
            let change = Change::Put(Box::new(this.record.clone()), None);
            this.steps.push_back(Step::new(Some(change), Vec::new()));
            this.advance(ctx);
        }));
    }

    /// A step is in the journal, or was refused by it: its effects, then the next one.
    fn go_on(&mut self, written: Result<(), ApiError>, effects: Vec<Effect>, ctx: &mut Context<Self>) {
        match written {
            // Nothing may be made that the journal does not know of.
            Err(error) if effects.contains(&Effect::LeaseImage) => {
                self.failure = Some(error);
                self.tell(Event::PhaseFailed, ctx);
                return;
            }
            Err(error) => self.journal_refused(&error, ctx),
            Ok(()) => {}
        }
        self.perform(effects, ctx);
        self.advance(ctx);
    }

    /// All steps are done: show what is, and wait for what comes.
    fn settle(&mut self, ctx: &mut Context<Self>) {
        self.mind_ports(ctx);
        self.forget_memory();
        self.publish();
        self.arm(ctx);
    }

    /// Published ports are closed when the sandbox rests and watched while it sleeps.
    fn mind_ports(&mut self, ctx: &mut Context<Self>) {
        let asleep = matches!(self.machine.state(), State::Asleep { .. });
        if !asleep && let Some((_, visit)) = self.port_watch.take() {
            ctx.cancel_future(visit);
        }
        if !view::holds_ports(self.machine.shown()) {
            self.ports = BoundPorts::default();
        }
        if !asleep || self.port_watch.is_some() || self.record.ports.is_empty() {
            return;
        }
        if self.ports.is_empty() {
            // A new daemon: the one before it held them and is gone.
            match BoundPorts::bind(&self.record.ports, &[]) {
                Ok(ports) => self.ports = ports,
                Err(error) => {
                    tracing::error!(sandbox = %self.record.name, error = %error.message, "a sleeping sandbox lost its published ports");
                    return;
                }
            }
        }
        let watch = match self.ports.watch() {
            Ok(watch) => watch,
            Err(error) => {
                tracing::error!(sandbox = %self.record.name, %error, "published ports cannot be watched");
                return;
            }
        };
        let visit = ctx.spawn(watch.visited().into_actor(self).map(|visited, this, ctx| {
            if visited {
                this.port_watch = None;
                this.tell(Event::Start { by: By::User, hold_main: false }, ctx);
            }
        }));
        self.port_watch = Some((watch, visit));
    }

    /// Binds the published ports unless they are bound.
    fn bind_ports(&mut self) -> Result<(), ApiError> {
        let network = &self.record.spec.network;
        if !network.enabled || network.ports.is_empty() {
            self.record.ports = Vec::new();
        } else if self.ports.is_empty() {
            self.ports = BoundPorts::bind(&network.ports, &self.record.ports)?;
            self.record.ports = self.ports.ports().to_vec();
        }
        Ok(())
    }

    fn publish(&mut self) {
        let next_try_at = match self.machine.state() {
            State::Restarting { at_ms } => {
                let wait_ms = i64::try_from(at_ms.saturating_sub(self.now_ms())).unwrap_or(i64::MAX);
                self.surroundings.clock.wall().checked_add(SignedDuration::from_millis(wait_ms)).ok()
            }
            _ => None,
        };
        let mut detail = view::detail(&self.record, &self.machine, &self.directories, next_try_at);
        detail.health_report = self.care.as_ref().map(care::Care::report);
        detail.summary.health = detail.health_report.as_ref().map(|report| report.status);
        let metrics_who = view::who(&detail).encode();
        let view = View {
            detail,
            runs_ready: self.runs_ready,
            starts_failed: self.starts_failed,
            failure: self.failure.clone(),
            // Gone is said when the files are.
            gone: false,
            recovering: matches!(self.machine.state(), State::Recovering { .. } | State::Removed),
            memory: self.machine.memory().filter(|_| matches!(self.machine.state(), State::Asleep { .. })),
            falling_asleep: self.machine.is_falling_asleep(),
            orphaned: false,
            metrics_who,
        };
        self.view.send_replace(Arc::new(view));
    }

    fn arm(&mut self, ctx: &mut Context<Self>) {
        if let Some(timer) = self.timer.take() {
            ctx.cancel_future(timer);
        }
        let last = self.last_activity_ms();
        let now = self.now_ms();
        let mut due = self.machine.deadline_ms(last);
        // While something is active idleness has no deadline; its end is noticed by looking.
        if last.is_none()
            && self.record.spec.idle_timeout_ms.is_some()
            && matches!(self.machine.state(), State::Running { .. })
        {
            due = Some(due.unwrap_or(u64::MAX).min(now.saturating_add(IDLE_LOOK_MS)));
        }
        let Some(due) = due else { return };
        let sleep = self.surroundings.clock.sleep_until(due);
        self.timer = Some(ctx.spawn(sleep.into_actor(self).map(|(), this, ctx| {
            faults::here("sandbox/timer");
            this.timer = None;
            let last_activity_ms = this.last_activity_ms();
            this.tell(Event::Tick { last_activity_ms }, ctx);
            if this.timer.is_none() && !this.stepping {
                this.arm(ctx);
            }
        })));
    }

    fn arm_beats(&mut self, ctx: &mut Context<Self>) {
        if let Some(timer) = self.beat_timer.take() {
            ctx.cancel_future(timer);
        }
        let now = self.now_ms();
        let stands = self.disk.is_held() || self.suspensions > 0;
        let Some(watch) = self.beats.as_mut() else { return };
        if stands {
            // Its machine may be standing to be written down: nothing beats then.
            watch.forgive(now);
        }
        match watch.look(now) {
            Verdict::LookAgain(at) => {
                let sleep = self.surroundings.clock.sleep_until(at);
                self.beat_timer = Some(ctx.spawn(sleep.into_actor(self).map(|(), this, ctx| {
                    this.beat_timer = None;
                    this.arm_beats(ctx);
                })));
            }
            Verdict::Silent => {
                self.beats = None;
                tracing::warn!(sandbox = %self.record.name, "the agent stopped beating");
                self.tell(Event::AgentSilent, ctx);
            }
        }
    }

    fn note_end(&mut self, boot_id: BootId, cause: EndCause) {
        let mut gone = self.gone.take();
        let last = gone.as_mut().and_then(|gone| gone.sample.take()).map(|sample| *sample);
        if let Some(meter) = self.meter.take() {
            meter.end(last);
        }
        let process: Option<ProcessEnd> = gone.as_ref().and_then(|gone| gone.main_end);
        let message = gone.as_ref().map(|gone| clean(&gone.message)).unwrap_or_default();
        if let Some(error) = gone.and_then(|gone| gone.boot_error) {
            let (directories, name, evidence) = (self.directories.clone(), self.record.name.clone(), error.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = directories.keep_boot_error(&name, &evidence) {
                    tracing::warn!(sandbox = %name, %error, "the evidence of a failed boot could not be kept");
                }
            });
            self.record.boot_error = Some(error);
        }
        self.record.last_end = Some(RunEnd { boot_id, cause, process, message, at: self.surroundings.clock.wall() });
        self.record.vmm = None;
        self.vm = None;
        self.beats = None;
        self.surroundings.heartbeats.clear(self.record.id, &self.directories.heartbeat);
    }

    fn note_failed_start(&mut self) {
        self.starts_failed += 1;
        if let Some(error) = self.gone.as_ref().and_then(|gone| gone.boot_error.as_ref()) {
            self.failure = Some(boot_failure(error));
        } else if let Some(gone) = &self.gone {
            let error = ApiError::new(
                ErrorCode::BootFailed,
                format!("the virtual machine did not come up: {}", clean(&gone.message)),
            );
            self.failure.get_or_insert(error);
        } else {
            self.failure
                .get_or_insert_with(|| ApiError::new(ErrorCode::Cancelled, "the start was cancelled by a stop"));
        }
    }

    /// Whether its root is an image, which a snapshot can hold on to.
    fn has_image(&self) -> Result<(), ApiError> {
        if !self.record.spec.root.is_local() {
            return Ok(());
        }
        let message = format!("sandbox {} has no image: its root is {}", self.record.name, self.record.spec.image);
        Err(ApiError::new(ErrorCode::InvalidRequest, message)
            .with_hint("a snapshot needs an image that it can hold on to; load the root as one"))
    }

    /// It as a snapshot takes it. While that lives nobody starts or removes it.
    fn source(&self) -> Source {
        Source {
            sandbox: self.record.name.clone(),
            sandbox_id: self.record.id,
            state: self.machine.shown(),
            spec: self.record.spec.clone(),
            image_digest: self.record.image_digest.clone(),
            parent: self.record.snapshot.clone(),
            disk: self.directories.upper.clone(),
            hold: self.disk.hold(),
        }
    }

    fn note_status(&mut self, status: &msb_protocol::vmm::VmStatus) {
        self.record.engine = Some(status.engine);
        self.vmm_generation = status.generation;
        self.record.engine_reason.clone_from(&status.engine_reason);
        self.record.jail = status.jail.clone();
        if !status.phases.is_empty() {
            self.record.boot_phases.clone_from(&status.phases);
        }
    }

    /// Begins to watch the creator, or notices that there is none any more.
    fn watch_creator(&mut self, ctx: &mut Context<Self>) {
        if self.machine.detached() || self.creator_watch.is_some() {
            return;
        }
        let pidfd = self.creator.take().or_else(|| self.record.creator.as_ref().and_then(ProcessIdentity::open));
        match pidfd {
            None => self.tell(Event::CreatorGone, ctx),
            Some(pidfd) => {
                let death = identity::ended(pidfd);
                self.creator_watch = Some(ctx.spawn(death.into_actor(self).map(|(), this, ctx| {
                    this.creator_watch = None;
                    this.tell(Event::CreatorGone, ctx);
                })));
            }
        }
    }
}

/// A failed boot as its caller sees it: the error of the stage, with what the console said last.
fn boot_failure(evidence: &BootError) -> ApiError {
    let mut error = evidence.error.clone();
    error.details.push(format!("stage: {}", evidence.stage));
    if !evidence.console_tail.is_empty() && !error.details.iter().any(|detail| detail.contains(&evidence.console_tail))
    {
        let tail: Vec<&str> = evidence.console_tail.lines().rev().take(20).collect();
        error.details.push(tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
    }
    error
}

/// Text from below, fit for a terminal.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').take(MESSAGE_LEN_MAX).collect()
}

impl Actor for SandboxActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        faults::here("sandbox/started");
        ctx.set_mailbox_capacity(MAILBOX_LEN);
        let effects = std::mem::take(&mut self.first_effects);
        match self.first.take() {
            Some(first) => {
                self.tell(first, ctx);
                self.watch_creator(ctx);
            }
            None => {
                let recovering = matches!(self.machine.state(), State::Recovering { .. } | State::Removed);
                self.sweep_memory(ctx);
                self.steps.push_back(Step::new(None, effects));
                self.advance(ctx);
                if !recovering {
                    self.watch_creator(ctx);
                }
            }
        }
    }
}

impl Handler<Ask> for SandboxActor {
    type Result = Result<(), ApiError>;

    fn handle(&mut self, ask: Ask, ctx: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/ask");
        self.handled += 1;
        match ask {
            Ask::Event(event) => {
                let then_start = matches!(event, Event::Stop { then: Then::Start, .. });
                if self.disk.is_held() && (then_start || matches!(event, Event::Start { .. } | Event::Remove { .. })) {
                    let message = format!("a snapshot of sandbox {} is being taken", self.record.name);
                    return Err(ApiError::new(ErrorCode::SandboxBusy, message));
                }
                self.feed(event, ctx).map_err(|denial| {
                    let code = match (denial, event) {
                        (Denial::Gone, _) => ErrorCode::SandboxNotFound,
                        (Denial::Paused, _) => ErrorCode::SandboxPaused,
                        (Denial::StillRunning(_), _) => ErrorCode::SandboxStillRunning,
                        (Denial::Busy(_), _) => ErrorCode::SandboxBusy,
                    };
                    let asked = match event {
                        Event::Start { .. } => "started",
                        Event::Remove { .. } => "removed",
                        _ if then_start => "restarted",
                        _ => "stopped",
                    };
                    ApiError::new(code, format!("sandbox {} cannot be {asked}: {denial}", self.record.name))
                })
            }
            Ask::Detach => {
                self.machine.detach();
                self.record.spec.detached = true;
                self.record.creator = None;
                self.record.machine = self.machine.stored();
                if let Some(watch) = self.creator_watch.take() {
                    ctx.cancel_future(watch);
                }
                let change = Change::Put(Box::new(self.record.clone()), None);
                self.steps.push_back(Step::new(Some(change), Vec::new()));
                self.advance(ctx);
                Ok(())
            }
        }
    }
}

impl StreamHandler<(BootId, VmEvent)> for SandboxActor {
    fn handle(&mut self, (boot_id, event): (BootId, VmEvent), ctx: &mut Self::Context) {
        faults::here("sandbox/vm_event");
        self.handled += 1;
        if self.machine.run().is_none_or(|run| run.boot_id != boot_id) {
            return;
        }
        match event {
            VmEvent::Status(status) => self.note_status(&status),
            VmEvent::AgentReady { phases } => {
                self.record.boot_phases = phases;
                self.tell(Event::AgentReady, ctx);
            }
            VmEvent::MainStarted => {}
            VmEvent::MainExited(_) => self.tell(Event::MainExited, ctx),
            VmEvent::Beat(beat) => self.hear_beat(boot_id, beat, ctx),
            VmEvent::HostDiskFull(full) => {
                let draft = EventDraft {
                    sandbox: self.record.name.clone(),
                    sandbox_id: self.record.id,
                    boot_id: Some(boot_id),
                    event: if full { "host_disk_full".into() } else { "host_disk_has_room".into() },
                    state: self.machine.shown(),
                    cause: None,
                    actor: "supervisor".into(),
                    message: String::new(),
                };
                self.steps.push_back(Step::new(Some(Change::Event(draft)), Vec::new()));
                self.advance(ctx);
            }
            VmEvent::Gone(gone) => {
                let event =
                    Event::VmEnded { cause: gone.cause, success: gone.main_end.is_some_and(|end| end.success()) };
                self.gone = Some(*gone);
                self.tell(event, ctx);
            }
        }
    }

    /// The end of a run's events is not the end of the actor.
    fn finished(&mut self, _: &mut Self::Context) {}
}

impl SandboxActor {
    fn hear_beat(&mut self, boot_id: BootId, beat: msb_protocol::guest::Beat, ctx: &mut Context<Self>) {
        let now_ms = self.now_ms();
        let Some(watch) = self.beats.as_mut() else { return };
        let due_ms = watch.due_ms();
        if !watch.hear(boot_id, beat.sequence, now_ms) {
            return;
        }
        // The first beat of a machine that was adopted ends the longer wait for it.
        let is_due_sooner = watch.due_ms() < due_ms;
        let heartbeat = Heartbeat::new(boot_id, &beat, self.surroundings.clock.wall());
        self.surroundings.heartbeats.write(self.record.id, &self.directories.heartbeat, heartbeat);
        if let Some(meter) = &self.meter {
            meter.note_guest(GuestMetrics {
                memory_used_bytes: beat.memory_used_bytes,
                memory_total_bytes: beat.memory_total_bytes,
                root_used_bytes: beat.root_used_bytes,
                root_free_bytes: beat.root_free_bytes,
                processes: beat.processes,
            });
        }
        if is_due_sooner || self.beat_timer.is_none() {
            self.arm_beats(ctx);
        }
    }
}

/// Asks the running VM which network rule would decide about a target. The answer comes from the VM process, beside the mailbox.
#[derive(Debug, Message)]
#[rtype(result = "Option<oneshot::Receiver<Result<NetworkExplanation, ApiError>>>")]
pub struct Explain(pub String);

impl Handler<Explain> for SandboxActor {
    type Result = MessageResult<Explain>;
    fn handle(&mut self, Explain(target): Explain, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/explain");
        self.handled += 1;
        let running =
            matches!(self.machine.state(), State::Running { .. } | State::Paused { .. } | State::Draining { .. });
        MessageResult(running.then(|| {
            let (reply, answer) = oneshot::channel();
            self.command(VmCommand::ExplainNetwork(target, reply));
            answer
        }))
    }
}

impl Handler<Inspect> for SandboxActor {
    type Result = MessageResult<Inspect>;
    fn handle(&mut self, _: Inspect, _: &mut Self::Context) -> Self::Result {
        faults::here("sandbox/inspect");
        MessageResult(ActorReport { handled: self.handled, state: self.machine.shown().as_str().into() })
    }
}

#[cfg(any(test, feature = "simulation"))]
impl Handler<PanicNow> for SandboxActor {
    type Result = ();
    #[expect(clippy::panic, reason = "the test is about panics")]
    fn handle(&mut self, _: PanicNow, _: &mut Self::Context) {
        panic!("asked to");
    }
}

impl Drop for SandboxActor {
    fn drop(&mut self) {
        // The next incarnation has a meter of its own.
        if let Some(meter) = self.meter.take() {
            meter.end(None);
        }
        let died = if std::thread::panicking() { "a handler panicked" } else { "its context ended" };
        self.guard.report(died);
    }
}
