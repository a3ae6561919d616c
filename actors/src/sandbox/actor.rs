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

mod asks;
mod beats;
mod care;
mod effects;
mod ends;
mod pause;
mod ports;
mod saving;
mod sleeping;
mod steps;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use actix::prelude::*;
use jiff::SignedDuration;
use msb_protocol::error::ApiError;
use msb_protocol::id::BootId;
use msb_protocol::spec::EngineChoice;
use msb_protocol::state::EndCause;
use tokio::sync::{mpsc, oneshot, watch};

use self::effects::News;
use self::steps::Step;
use super::activity::Activity;
use super::directories::Directories;
use super::disk_hold::DiskHolds;
use super::heartbeat::BeatWatch;
use super::machine::{Denial, Effect, Event, Machine, Moment, Policy, State};
use super::network::{BoundPorts, PortWatch};
use super::ssh::SshForwarder;
use super::view::{self, View};
use crate::faults;
use crate::identity::{self, ProcessIdentity};
use crate::images::PreparedImage;
use crate::inspect::{ActorReport, Inspect};
use crate::journal::{Change, EventDraft, SandboxRecord};
use crate::metrics::meter::Meter;
use crate::starts::Turn;
use crate::supervisor::{DeathGuard, Surroundings};
use crate::vm::{Gone, VmEvent, VmHandle};

pub use asks::{Ask, Explain, HoldDisk, OpenSsh};
pub use care::Relabel;
pub use pause::Halt;
pub use saving::HoldMachine;

/// Messages that wait for one sandbox before their senders are told `sandbox_busy`.
const MAILBOX_LEN: usize = 64;
/// How often a sandbox with an idle timeout looks again while something is active in it, in milliseconds.
const IDLE_LOOK_MS: u64 = 1_000;

/// Set by tests to see what a panic in each handler does.
#[cfg(any(test, feature = "simulation"))]
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct PanicNow;

/// Let go of everything and end; the VM goes on for the next daemon.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct LetGo;

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
    /// Its place in the queue of starts, left when this is dropped.
    queued: Option<oneshot::Sender<()>>,
    /// Its turn to boot.
    turn: Option<Turn>,
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
            queued: None,
            turn: None,
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
        self.mind_turn();
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
