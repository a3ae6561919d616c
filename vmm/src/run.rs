//! One run of a VM as all threads of the process see it: where it is, what was said, why it will end.
//!
//! Written by the agent link (hello, ready, main workload, goodbye), the control thread (intents, deadlines) and `main` (the engine's
//! end); read by all of them. A machine that stands by is nobody's run until it is taken. Every change that the daemon must hear of becomes an
//! [`Event`] in a bounded queue, which the control thread empties. Nothing in here waits.

use std::any::Any;
use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{BootId, SandboxId};
use msb_protocol::spec::EngineChoice;
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::vmm::{Event, Phase as PhaseReport, VmSpec, VmState};

use crate::devices::virtio::notifier::Notifier;
use crate::engine::{HaltError, Halter, Saver, Stopper};
use crate::launch::phases::Phases;
use crate::link::handle::LinkHandle;
use crate::logs::console::ConsoleLog;
use crate::logs::workload::WorkloadLog;

/// Events kept while no daemon listens; older ones are dropped, a re-adopting daemon asks for the status.
const EVENTS_MAX: usize = 256;
/// Phase that engines mark when the guest stopped running, before devices are taken down.
pub const GUEST_ENDED: &str = "guest_ended";
/// Time a guest has to turn itself off after its goodbye. One that only halts (as a poweroff without ACPI does) is stopped then.
pub const GOODBYE_GRACE: Duration = Duration::from_secs(3);
/// Time a guest whose agent vanished has to end by itself (its init resets the machine) before it is stopped.
pub const AGENT_LOST_GRACE: Duration = Duration::from_secs(5);

/// Why a boot failed, before it is known how the engine ends.
#[derive(Clone, Debug)]
pub struct BootFailure {
    /// `config`, `engine`, `kernel`, `agent`, `mount`, `setup`, `other`.
    pub stage: String,
    /// The error as users see it.
    pub error: ApiError,
}

/// A machine that was written down and stands; it goes on when this is dropped.
pub struct Saved {
    since: Instant,
    frozen: Option<Box<dyn Any + Send>>,
    halter: Arc<dyn Halter>,
    link: Arc<LinkHandle>,
}

impl Drop for Saved {
    fn drop(&mut self) {
        drop(self.frozen.take());
        self.halter.go_on();
        self.link.thaw();
        let stood_us = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(stood_us, "a machine that was written down goes on");
    }
}

/// What is known of the run.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Where it is.
    pub state: VmState,
    /// The agent's generation, once it said hello.
    pub agent_generation: Option<u32>,
    /// Whether the main workload was started.
    pub main_started: bool,
    /// Its vCPUs are halted on request.
    pub paused: bool,
    /// It is renewed and stands by.
    pub stands: bool,
    /// How it ended.
    pub main_end: Option<ProcessEnd>,
    /// The agent said goodbye: the reset that follows is a clean end.
    pub goodbye: bool,
    /// When the goodbye came.
    pub goodbye_at: Option<Instant>,
    /// The vsock device was stopped (the machine resets, or ends): what its streams do then means nothing.
    pub streams_stopped: bool,
    /// The agent's link ended before a goodbye, while the guest still ran.
    pub agent_lost_at: Option<Instant>,
    /// The cause of a stop the daemon has begun.
    pub expected: Option<EndCause>,
    /// The cause of a kill that was carried out here.
    pub killed: Option<EndCause>,
    /// The boot has failed.
    pub boot_failure: Option<BootFailure>,
}

/// The run that a machine that stood by became.
struct Taken {
    spec: Box<VmSpec>,
    at: Instant,
}

struct Shared {
    boot_id: BootId,
    sandbox_id: SandboxId,
    started: Instant,
    taken: OnceLock<Taken>,
    facts: Mutex<Facts>,
    events: Mutex<VecDeque<Event>>,
    wake: Notifier,
    phases: Phases,
    console: ConsoleLog,
    stopper: OnceLock<Arc<dyn Stopper>>,
    halter: OnceLock<Arc<dyn Halter>>,
    saver: OnceLock<Arc<dyn Saver>>,
    link: OnceLock<Arc<LinkHandle>>,
}

/// The shared state of a run; clones are the same run.
#[derive(Clone)]
pub struct Run(Arc<Shared>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Run {
    /// A run that begins at `started`.
    pub fn new(sandbox_id: SandboxId, boot_id: BootId, started: Instant, console: ConsoleLog) -> std::io::Result<Self> {
        let phases = Phases::new(started, None);
        console.mark_first_byte(phases.clone());
        Ok(Self(Arc::new(Shared {
            boot_id,
            sandbox_id,
            started,
            taken: OnceLock::new(),
            facts: Mutex::new(Facts {
                state: VmState::Booting,
                agent_generation: None,
                main_started: false,
                paused: false,
                stands: false,
                main_end: None,
                goodbye: false,
                goodbye_at: None,
                streams_stopped: false,
                agent_lost_at: None,
                expected: None,
                killed: None,
                boot_failure: None,
            }),
            events: Mutex::new(VecDeque::new()),
            wake: Notifier::new()?,
            phases,
            console,
            stopper: OnceLock::new(),
            halter: OnceLock::new(),
            saver: OnceLock::new(),
            link: OnceLock::new(),
        })))
    }

    /// This run's identity.
    pub fn boot_id(&self) -> BootId {
        self.0.taken.get().map_or(self.0.boot_id, |taken| taken.spec.boot_id)
    }

    /// What it became, if it stood by and was taken.
    pub fn taken(&self) -> Option<&VmSpec> {
        self.0.taken.get().map(|taken| &*taken.spec)
    }

    /// The sandbox.
    pub fn sandbox_id(&self) -> SandboxId {
        self.0.taken.get().map_or(self.0.sandbox_id, |taken| taken.spec.sandbox_id)
    }

    /// When it began.
    pub fn started(&self) -> Instant {
        self.0.taken.get().map_or(self.0.started, |taken| taken.at)
    }

    /// Its phases.
    pub fn phases(&self) -> &Phases {
        &self.0.phases
    }

    /// Its console.
    pub fn console(&self) -> &ConsoleLog {
        &self.0.console
    }

    /// A copy of what is known.
    pub fn facts(&self) -> Facts {
        lock(&self.0.facts).clone()
    }

    /// Sets how the machine is stopped; once.
    pub fn set_stopper(&self, stopper: Arc<dyn Stopper>) {
        let _ = self.0.stopper.set(stopper);
    }

    /// Sets how the machine is halted, if its engine can; once.
    pub fn set_halter(&self, halter: Arc<dyn Halter>) {
        let _ = self.0.halter.set(halter);
    }

    /// Sets what writes the machine down, if its engine can; once.
    pub fn set_saver(&self, saver: Arc<dyn Saver>) {
        let _ = self.0.saver.set(saver);
    }

    /// Sets how the agent is told things; once.
    pub fn set_link(&self, link: Arc<LinkHandle>) {
        let _ = self.0.link.set(link);
    }

    /// The guest is renewed and stands by. It is halted by whoever hears of it.
    pub fn stands(&self) {
        lock(&self.0.facts).stands = true;
        let _ = self.0.wake.notify();
    }

    /// Halts a machine that stands by.
    ///
    /// # Errors
    /// It has ended, or cannot be halted.
    pub fn halt(&self) -> Result<(), ApiError> {
        let halter = self.0.halter.get().ok_or_else(|| ApiError::internal("an engine that cannot stand by"))?;
        halter.halt().map_err(ApiError::internal)
    }

    /// Makes a machine that stands by the run of `spec`, and lets it go on; `log` is that run's.
    ///
    /// # Errors
    /// Its agent cannot be told.
    pub fn take_over(&self, spec: Box<VmSpec>, log: Option<WorkloadLog>) -> Result<(), ApiError> {
        let (Some(halter), Some(link)) = (self.0.halter.get(), self.0.link.get()) else {
            return Err(ApiError::internal("a machine that does not stand by"));
        };
        let (config, at) = (spec.guest.clone(), Instant::now());
        // What happened while it was nobody's is nobody's business.
        self.take_events();
        self.phases().begin_again(at);
        if self.0.taken.set(Taken { spec, at }).is_err() {
            return Err(ApiError::internal("a machine that was taken already"));
        }
        lock(&self.0.facts).stands = false;
        halter.go_on();
        link.renew(self, config, log).map_err(ApiError::internal)
    }

    /// Freezes the workload, halts the machine and writes it down. It goes on when the answer is dropped.
    ///
    /// # Errors
    /// `unsupported_operation`, `sandbox_not_running`, `sandbox_paused`, `sandbox_busy`, `disk_full`; the machine goes on then.
    pub fn save(&self, engine: EngineChoice, memory: &File, state: &File, flush: bool) -> Result<Saved, ApiError> {
        let unsupported = || {
            let message = format!("engine {} cannot write a machine down", engine.as_str());
            ApiError::new(ErrorCode::UnsupportedOperation, message)
        };
        let saver = self.0.saver.get().ok_or_else(unsupported)?;
        let halter = self.0.halter.get().ok_or_else(unsupported)?;
        let link = self.0.link.get().ok_or_else(unsupported)?;
        let facts = self.facts();
        if facts.state != VmState::Ready {
            return Err(ApiError::new(ErrorCode::SandboxNotRunning, "the guest is not up, or on its way down"));
        }
        if facts.paused {
            return Err(ApiError::new(ErrorCode::SandboxPaused, "a halted guest cannot freeze its workload"));
        }
        let mut saved =
            Saved { since: Instant::now(), frozen: None, halter: Arc::clone(halter), link: Arc::clone(link) };
        link.quiesce(facts.agent_generation.unwrap_or(0), flush)?;
        halter.halt().map_err(|error| match error {
            HaltError::Ended => ApiError::new(ErrorCode::SandboxNotRunning, error.to_string()),
            HaltError::Stuck => ApiError::new(ErrorCode::SandboxBusy, error.to_string()),
        })?;
        let frozen = saver.save(memory, state).map_err(|error| {
            let full = matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
            let code = if full { ErrorCode::DiskFull } else { ErrorCode::Internal };
            ApiError::new(code, format!("the machine cannot be written down: {error}"))
        })?;
        saved.frozen = Some(frozen);
        Ok(saved)
    }

    /// Notes which pages its guest has written so far, where somebody wants to know; once.
    pub fn note_written(&self) {
        if let Some(saver) = self.0.saver.get() {
            saver.note_written();
        }
    }

    /// Halts the machine or lets it go on, once its agent is ready.
    ///
    /// # Errors
    /// `unsupported_operation`, `sandbox_not_running`, `sandbox_busy`.
    pub fn set_paused(&self, paused: bool, engine: EngineChoice) -> Result<(), ApiError> {
        let Some(halter) = self.0.halter.get() else {
            let message = format!("engine {} cannot pause a sandbox", engine.as_str());
            return Err(ApiError::new(ErrorCode::UnsupportedOperation, message));
        };
        let facts = self.facts();
        if facts.state != VmState::Ready {
            return Err(ApiError::new(ErrorCode::SandboxNotRunning, "the guest is not up, or on its way down"));
        }
        if paused {
            halter.halt().map_err(|error| match error {
                HaltError::Ended => ApiError::new(ErrorCode::SandboxNotRunning, error.to_string()),
                HaltError::Stuck => ApiError::new(ErrorCode::SandboxBusy, error.to_string()),
            })?;
            // A guest that said goodbye just before is on its way down: it must come to its end.
            let mut facts = lock(&self.0.facts);
            if facts.state != VmState::Ready {
                drop(facts);
                halter.go_on();
                return Err(ApiError::new(ErrorCode::SandboxNotRunning, "the guest is on its way down"));
            }
            facts.paused = true;
        } else {
            lock(&self.0.facts).paused = false;
            halter.go_on();
        }
        Ok(())
    }

    /// Stops the machine, if it exists yet.
    pub fn stop(&self) {
        if let Some(stopper) = self.0.stopper.get() {
            stopper.stop();
        }
    }

    /// Readable while events wait.
    pub fn wake(&self) -> &Notifier {
        &self.0.wake
    }

    /// Takes the events that wait.
    pub fn take_events(&self) -> VecDeque<Event> {
        std::mem::take(&mut *lock(&self.0.events))
    }

    /// Tells the daemon something.
    pub fn announce(&self, event: Event) {
        let mut events = lock(&self.0.events);
        if events.len() >= EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event);
        drop(events);
        let _ = self.0.wake.notify();
    }

    /// The agent said hello.
    pub fn agent_hello(&self, generation: u32) {
        {
            let mut facts = lock(&self.0.facts);
            facts.agent_generation = Some(generation);
            facts.state = VmState::SettingUp;
        }
        self.announce(Event::AgentHello { boot_id: self.boot_id(), generation });
    }

    /// The guest is set up.
    pub fn agent_ready(&self) {
        lock(&self.0.facts).state = VmState::Ready;
        self.announce(Event::AgentReady { boot_id: self.boot_id(), phases: self.phase_report() });
    }

    /// The main workload runs.
    pub fn main_started(&self, pid: u32) {
        lock(&self.0.facts).main_started = true;
        self.announce(Event::MainStarted { boot_id: self.boot_id(), pid });
    }

    /// The main workload ended.
    pub fn main_exited(&self, end: ProcessEnd) {
        lock(&self.0.facts).main_end = Some(end);
        self.announce(Event::MainExited { boot_id: self.boot_id(), end });
    }

    /// The agent has flushed everything.
    pub fn goodbye(&self) {
        {
            let mut facts = lock(&self.0.facts);
            facts.goodbye = true;
            facts.goodbye_at = Some(Instant::now());
            facts.state = VmState::Ending;
        }
        // The control thread recomputes its deadlines.
        let _ = self.0.wake.notify();
    }

    /// The vsock device stops: the agent's link is about to end for no fault of the agent.
    pub fn streams_stopped(&self) {
        lock(&self.0.facts).streams_stopped = true;
    }

    /// The agent's link ended. Means something only while the guest runs and has not said goodbye.
    pub fn agent_lost(&self) {
        if self.phases().has(GUEST_ENDED) {
            return;
        }
        let mut facts = lock(&self.0.facts);
        if !facts.goodbye && !facts.streams_stopped && facts.agent_lost_at.is_none() {
            facts.agent_lost_at = Some(Instant::now());
            drop(facts);
            // The control thread recomputes its deadlines.
            let _ = self.0.wake.notify();
        }
    }

    /// The daemon has begun a stop for this reason.
    pub fn expect_end(&self, cause: EndCause) {
        lock(&self.0.facts).expected = Some(cause);
    }

    /// Ends the machine now for this reason.
    pub fn kill(&self, cause: EndCause) {
        lock(&self.0.facts).killed.get_or_insert(cause);
        self.stop();
    }

    /// Records that the boot failed; the first failure counts.
    pub fn fail_boot(&self, stage: &str, error: ApiError) {
        let failure = BootFailure { stage: stage.to_owned(), error };
        lock(&self.0.facts).boot_failure.get_or_insert(failure);
    }

    /// Phases so far as durations between marks.
    pub fn phase_report(&self) -> Vec<PhaseReport> {
        let mut marks = self.phases().all();
        marks.sort_by_key(|mark| mark.at_us);
        let mut before = 0;
        marks
            .into_iter()
            .map(|mark| {
                let duration_us = mark.at_us - before;
                before = mark.at_us;
                PhaseReport { name: mark.name, duration_us }
            })
            .collect()
    }
}

/// The wall clock in nanoseconds since 1970.
pub fn realtime_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> Run {
        Run::new(SandboxId::generate(), BootId::generate(), Instant::now(), ConsoleLog::in_memory()).expect("run")
    }

    #[test]
    fn a_lost_agent_counts_only_while_the_guest_runs() {
        let lost = run();
        lost.agent_lost();
        assert!(lost.facts().agent_lost_at.is_some());
        let polite = run();
        polite.goodbye();
        polite.agent_lost();
        assert!(polite.facts().agent_lost_at.is_none());
        let reset = run();
        reset.streams_stopped();
        reset.agent_lost();
        assert!(reset.facts().agent_lost_at.is_none());
        let over = run();
        over.phases().mark(GUEST_ENDED);
        over.agent_lost();
        assert!(over.facts().agent_lost_at.is_none());
    }

    #[test]
    fn events_are_bounded_and_wake_the_listener() {
        let run = run();
        for _ in 0..EVENTS_MAX * 2 {
            run.main_started(1);
        }
        assert!(run.wake().drain());
        assert_eq!(run.take_events().len(), EVENTS_MAX);
    }

    #[test]
    fn phases_are_reported_as_durations() {
        let run = run();
        run.phases().mark_at("second", 500);
        run.phases().mark_at("first", 200);
        let report: Vec<_> = run.phase_report().into_iter().map(|phase| (phase.name, phase.duration_us)).collect();
        assert_eq!(report, [("first".to_owned(), 200), ("second".to_owned(), 300)]);
    }
}
