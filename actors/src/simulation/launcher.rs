//! A launcher whose VMs are tasks.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::guest::Beat;
use msb_protocol::id::BootId;
use msb_protocol::network::VmNetwork;
use msb_protocol::spec::EngineChoice;
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::version::VMM_GENERATION;
use msb_protocol::vmm::{NetworkExplanation, Phase, Sample, VmSpec, VmState, VmStatus};
use tokio::sync::mpsc;

use super::agent;
use crate::clock::Clock;
use crate::identity::{self, ProcessIdentity};
use crate::vm::unhurried::LOOK_INTERVAL_MS;
use crate::vm::{
    AdoptRequest, Adoption, AgentIo, Boxed, EventSink, Gone, Launcher, Spare, VmCommand, VmEvent, VmHandle,
};

/// What goes wrong from now on.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Launches fail.
    pub launch: bool,
    /// Boots end before the agent is ready.
    pub boot: bool,
    /// The agent is never ready.
    pub silent_boot: bool,
    /// The agent is ready before the launch has returned.
    pub early_ready: bool,
    /// Shutdowns are ignored; only a kill helps.
    pub deaf: bool,
    /// Kills are ignored too, this many times.
    pub stubborn_kills: u32,
    /// No beats are sent.
    pub no_beats: bool,
    /// Time of a boot in milliseconds of the clock.
    pub boot_ms: u64,
    /// Time of a flush in milliseconds of the clock.
    pub flush_ms: u64,
    /// A machine cannot be written down: the disk is full.
    pub save: bool,
    /// A machine that was written down cannot go on.
    pub restore: bool,
    /// No VM can stand by.
    pub stand_by: bool,
    /// Those that stood by are gone.
    pub spares_died: bool,
    /// The VM processes are of this generation, not of this build's.
    pub vmm_generation: Option<u32>,
}

/// A VM of the simulator.
#[derive(Debug)]
struct FakeVm {
    spec: VmSpec,
    identity: ProcessIdentity,
    listeners: Vec<Arc<OwnedFd>>,
    inbox: mpsc::UnboundedSender<Input>,
    paused: AtomicBool,
    generation: u32,
    gone: Mutex<Option<Gone>>,
}

#[derive(Debug)]
enum Input {
    Adopt(EventSink, mpsc::Receiver<VmCommand>),
    End(Gone),
    Raw(VmEvent),
    Counted(Box<Sample>),
    ReadyNow,
    Silence,
}

/// Runs fake VMs. One outlives every daemon of a test, as the processes of real VMs do.
#[derive(Debug)]
pub struct FakeLauncher {
    clock: Arc<dyn Clock>,
    faults: Mutex<Faults>,
    vms: Mutex<HashMap<PathBuf, Arc<FakeVm>>>,
    pids: AtomicU32,
    launched: AtomicU64,
    expected: AtomicU64,
    launched_standing: AtomicU64,
    boots: Mutex<Vec<BootId>>,
}

/// A fake VM that stands by.
struct FakeSpare(Arc<FakeLauncher>);

impl Spare for FakeSpare {
    fn is_alive(&self) -> bool {
        !self.0.faults().spares_died
    }

    fn launch(
        self: Box<Self>,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Boxed<Result<VmHandle, ApiError>> {
        self.0.launched_standing.fetch_add(1, Ordering::Relaxed);
        self.0.launch(spec, listeners, events)
    }
}

impl FakeLauncher {
    /// A launcher on a clock.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            clock,
            faults: Mutex::default(),
            vms: Mutex::default(),
            pids: AtomicU32::new(4_000_000),
            launched: AtomicU64::new(0),
            expected: AtomicU64::new(0),
            launched_standing: AtomicU64::new(0),
            boots: Mutex::default(),
        })
    }

    /// Changes what goes wrong.
    pub fn fault(&self, edit: impl FnOnce(&mut Faults)) {
        edit(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn faults(&self) -> Faults {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn vm(&self, run_dir: &Path) -> Option<Arc<FakeVm>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).get(run_dir).cloned()
    }

    fn named(&self, name: &str) -> Option<Arc<FakeVm>> {
        let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        // Identities are ordered by time: the newest sandbox of this name.
        vms.values().filter(|vm| vm.spec.name.as_str() == name).max_by_key(|vm| vm.spec.boot_id).cloned()
    }

    /// How many VMs are up.
    #[must_use]
    pub fn alive(&self) -> usize {
        let vms = self.vms.lock().unwrap_or_else(PoisonError::into_inner);
        vms.values().filter(|vm| vm.gone.lock().unwrap_or_else(PoisonError::into_inner).is_none()).count()
    }

    /// How often a launch was said to be on its way.
    #[must_use]
    pub fn expected(&self) -> u64 {
        self.expected.load(Ordering::Relaxed)
    }

    /// How many were ever launched.
    #[must_use]
    pub fn launched(&self) -> u64 {
        self.launched.load(Ordering::Relaxed)
    }

    /// How many of them stood by before.
    #[must_use]
    pub fn launched_standing(&self) -> u64 {
        self.launched_standing.load(Ordering::Relaxed)
    }

    /// Every boot id in the order of launches.
    #[must_use]
    pub fn boots(&self) -> Vec<BootId> {
        self.boots.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The spec that the newest VM of a sandbox was launched with.
    #[must_use]
    pub fn spec_of(&self, name: &str) -> Option<VmSpec> {
        self.named(name).map(|vm| vm.spec.clone())
    }

    /// The VM process of a sandbox dies.
    pub fn crash(&self, name: &str, cause: EndCause) {
        if let Some(vm) = self.named(name) {
            // A VM that is gone cannot die again.
            let _ = vm.inbox.send(Input::End(Gone {
                cause,
                main_end: None,
                message: "injected".into(),
                boot_error: None,
                sample: None,
            }));
        }
    }

    /// The main workload of a sandbox ends.
    pub fn exit_main(&self, name: &str, end: ProcessEnd) {
        if let Some(vm) = self.named(name) {
            let _ = vm.inbox.send(Input::Raw(VmEvent::MainExited(end)));
            let _ = vm.inbox.send(Input::End(Gone {
                cause: EndCause::Completed,
                main_end: Some(end),
                message: String::new(),
                boot_error: None,
                sample: None,
            }));
        }
    }

    /// The VM process of a sandbox counts this.
    pub fn tell(&self, name: &str, sample: Sample) {
        if let Some(vm) = self.named(name) {
            let _ = vm.inbox.send(Input::Counted(Box::new(sample)));
        }
    }

    /// The agent of a sandbox beats no more, to nobody.
    pub fn silence(&self, name: &str) {
        if let Some(vm) = self.named(name) {
            let _ = vm.inbox.send(Input::Silence);
        }
    }

    /// The agent of a silent boot is ready after all.
    pub fn ready(&self, name: &str) {
        if let Some(vm) = self.named(name) {
            let _ = vm.inbox.send(Input::ReadyNow);
        }
    }
}

impl Launcher for Arc<FakeLauncher> {
    fn launch(
        &self,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Boxed<Result<VmHandle, ApiError>> {
        (**self).launch(spec, listeners, events)
    }
    fn expect(&self) {
        (**self).expect();
    }
    fn stand_by(&self, _: Box<VmSpec>) -> Boxed<Result<Box<dyn Spare>, ApiError>> {
        let made = match self.faults().stand_by {
            true => Err(ApiError::new(ErrorCode::EngineUnavailable, "injected: nothing stands by")),
            false => Ok(Box::new(FakeSpare(Arc::clone(self))) as Box<dyn Spare>),
        };
        Box::pin(async move { made })
    }
    fn adopt(&self, request: AdoptRequest, events: EventSink) -> Boxed<Adoption> {
        (**self).adopt(request, events)
    }
    fn connect(&self, run_dir: &Path) -> Boxed<std::io::Result<Box<dyn AgentIo>>> {
        (**self).connect(run_dir)
    }
    fn explain(&self, network: VmNetwork, target: String) -> Boxed<Result<NetworkExplanation, ApiError>> {
        (**self).explain(network, target)
    }
}

impl Launcher for FakeLauncher {
    fn launch(
        &self,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Boxed<Result<VmHandle, ApiError>> {
        let faults = self.faults();
        if faults.launch {
            return Box::pin(async { Err(ApiError::new(ErrorCode::EngineUnavailable, "injected: no engine")) });
        }
        self.launched.fetch_add(1, Ordering::Relaxed);
        self.boots.lock().unwrap_or_else(PoisonError::into_inner).push(spec.boot_id);
        let pid = self.pids.fetch_add(1, Ordering::Relaxed);
        let identity =
            ProcessIdentity { pid, start_ticks: u64::from(pid), host_boot_id: identity::host_boot_id().into() };
        let (inbox, inputs) = mpsc::unbounded_channel();
        let vm = Arc::new(FakeVm {
            spec: *spec,
            identity: identity.clone(),
            listeners,
            inbox,
            paused: AtomicBool::new(false),
            generation: faults.vmm_generation.unwrap_or(VMM_GENERATION),
            gone: Mutex::new(None),
        });
        self.vms.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.spec.run_dir.clone(), vm.clone());
        let (commands, queue) = mpsc::channel(16);
        if faults.early_ready {
            // The channel is new: there is room.
            let _ = events.try_send(VmEvent::AgentReady { phases: Vec::new() });
        }
        tokio::spawn(live(vm, faults, self.clock.clone(), events, queue, inputs));
        Box::pin(async move { Ok(VmHandle { identity, commands }) })
    }

    fn expect(&self) {
        self.expected.fetch_add(1, Ordering::Relaxed);
    }

    fn stand_by(&self, _: Box<VmSpec>) -> Boxed<Result<Box<dyn Spare>, ApiError>> {
        Box::pin(async { Err(ApiError::internal("a fake stands by for a shared launcher only")) })
    }

    fn adopt(&self, request: AdoptRequest, events: EventSink) -> Boxed<Adoption> {
        let gone = |message: &str| Gone {
            cause: EndCause::VmmCrash,
            main_end: None,
            message: message.into(),
            boot_error: None,
            sample: None,
        };
        let outcome = match self.vm(&request.run_dir).filter(|vm| vm.spec.boot_id == request.boot_id) {
            None => Adoption::Gone(gone("there is no such VM")),
            Some(vm) => match vm.gone.lock().unwrap_or_else(PoisonError::into_inner).clone() {
                Some(end) => Adoption::Gone(end),
                None => {
                    let (commands, queue) = mpsc::channel(16);
                    let _ = vm.inbox.send(Input::Adopt(events, queue));
                    let status = status(&vm, VmState::Ready);
                    let listeners = vm.listeners.iter().filter_map(|listener| listener.try_clone().ok()).collect();
                    Adoption::Alive(VmHandle { identity: vm.identity.clone(), commands }, Box::new(status), listeners)
                }
            },
        };
        Box::pin(async move { outcome })
    }

    fn explain(&self, _: VmNetwork, _: String) -> Boxed<Result<NetworkExplanation, ApiError>> {
        Box::pin(async { Err(no_policy()) })
    }

    fn connect(&self, run_dir: &Path) -> Boxed<std::io::Result<Box<dyn AgentIo>>> {
        let vm = self.vm(run_dir).filter(|vm| vm.gone.lock().unwrap_or_else(PoisonError::into_inner).is_none());
        Box::pin(async move {
            let vm = vm.ok_or(std::io::ErrorKind::ConnectionRefused)?;
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            let inbox = vm.inbox.clone();
            let boot_id = vm.spec.boot_id;
            tokio::spawn(agent::serve(theirs, boot_id, move |end| {
                let _ = inbox.send(Input::Raw(VmEvent::MainExited(end)));
                let _ = inbox.send(Input::End(Gone {
                    cause: EndCause::Completed,
                    main_end: Some(end),
                    message: String::new(),
                    boot_error: None,
                    sample: None,
                }));
            }));
            Ok(Box::new(ours) as Box<dyn AgentIo>)
        })
    }
}

fn no_policy() -> ApiError {
    ApiError::internal("a simulated VM has no policy")
}

fn status(vm: &FakeVm, state: VmState) -> VmStatus {
    VmStatus {
        generation: vm.generation,
        version: "fake".into(),
        sandbox_id: vm.spec.sandbox_id,
        boot_id: vm.spec.boot_id,
        pid: vm.identity.pid,
        engine: EngineChoice::Kvm,
        engine_reason: Some("simulated".into()),
        state,
        agent_generation: Some(1),
        main_end: None,
        main_started: true,
        paused: vm.paused.load(Ordering::Relaxed),
        phases: Vec::new(),
        jail: Default::default(),
    }
}

fn disk_full() -> ApiError {
    ApiError::new(ErrorCode::DiskFull, "injected: no room for the memory")
}

/// A fake machine's memory is a word in it.
fn write_down(vm: &FakeVm, memory: OwnedFd, state: OwnedFd) -> Result<(), ApiError> {
    use std::io::Write;
    let (mut memory, mut state) = (std::fs::File::from(memory), std::fs::File::from(state));
    let written = memory
        .write_all(vm.spec.boot_id.to_string().as_bytes())
        .and_then(|()| memory.set_len(u64::from(vm.spec.memory_mib) << 20))
        .and_then(|()| state.write_all(b"{}"));
    written.map_err(ApiError::internal)
}

/// Counters of a VM that is busy half of the time and writes a page each second.
fn sample(seconds: u64) -> Sample {
    Sample {
        at_ns: (1_700_000_000 + seconds) * 1_000_000_000,
        started_at_ns: 1_700_000_000_000_000_000,
        uptime_ms: seconds * 1_000,
        cpu_time_us: seconds * 500_000,
        memory_limit_bytes: 512 << 20,
        memory_resident_bytes: 64 << 20,
        disk_written_bytes: seconds * 4096,
        disk_write_operations: seconds,
        ..Sample::default()
    }
}

fn count(events: &EventSink, sample: Sample) {
    if let Some(meter) = events.meter() {
        meter.sample(sample);
    }
}

/// When the workload ends by itself, in milliseconds after ready, and how.
fn fate(spec: &VmSpec) -> Option<(u64, ProcessEnd)> {
    let main = spec.guest.main.as_ref().filter(|main| main.autostart)?;
    let argv = &main.exec.as_ref()?.argv;
    match argv.first()?.as_str() {
        "true" => Some((0, ProcessEnd::exited(0))),
        "false" => Some((0, ProcessEnd::exited(1))),
        "sleep" => Some((argv.get(1)?.parse::<u64>().ok()?.saturating_mul(1_000), ProcessEnd::exited(0))),
        _ => None,
    }
}

async fn live(
    vm: Arc<FakeVm>,
    mut faults: Faults,
    clock: Arc<dyn Clock>,
    mut events: EventSink,
    mut commands: mpsc::Receiver<VmCommand>,
    mut inputs: mpsc::UnboundedReceiver<Input>,
) {
    let end = |cause, main_end| Gone { cause, main_end, message: "simulated".into(), boot_error: None, sample: None };
    // Sends may fail: nobody listens between two daemons.
    let _ = events.send(VmEvent::Status(Box::new(status(&vm, VmState::Booting)))).await;
    let mut ready = false;
    let mut next_ms = clock.now_ms() + faults.boot_ms;
    let mut finish: Option<(u64, Gone)> = None;
    let mut sequence = 0;
    let mut stubborn = faults.stubborn_kills;
    let mut can_boot = !faults.silent_boot;
    let gone = loop {
        let wake_ms = finish
            .as_ref()
            .map_or(u64::MAX, |(at, _)| *at)
            .min(if ready && faults.no_beats || !ready && !can_boot { u64::MAX } else { next_ms });
        // Nothing happens in a halted VM.
        let wake_ms = if vm.paused.load(Ordering::Relaxed) { u64::MAX } else { wake_ms };
        tokio::select! {
            biased;
            input = inputs.recv() => match input {
                Some(Input::Adopt(sink, queue)) => {
                    (events, commands) = (sink, queue);
                    if ready && !faults.no_beats {
                        sequence += 1;
                        let _ = events.send(VmEvent::Beat(Beat { sequence, ..Beat::default() })).await;
                    }
                }
                Some(Input::End(gone)) => break gone,
                Some(Input::Raw(event)) => drop(events.send(event).await),
                Some(Input::Counted(sample)) => count(&events, *sample),
                Some(Input::Silence) => faults.no_beats = true,
                Some(Input::ReadyNow) => (can_boot, next_ms) = (true, clock.now_ms()),
                None => return,
            },
            Some(command) = commands.recv() => match command {
                VmCommand::Shutdown { cause, .. } if !faults.deaf => {
                    let main_end = vm.spec.guest.main.is_some().then(|| ProcessEnd::signalled(15));
                    if let Some(end) = main_end {
                        let _ = events.send(VmEvent::MainExited(end)).await;
                    }
                    finish = Some((clock.now_ms() + faults.flush_ms, end(cause, main_end)));
                }
                VmCommand::Shutdown { .. } => {}
                VmCommand::Kill { .. } if stubborn > 0 => stubborn -= 1,
                VmCommand::Kill { cause } => break end(cause, None),
                VmCommand::Pause(reply) => {
                    vm.paused.store(true, Ordering::Relaxed);
                    let _ = reply.send(Ok(()));
                }
                VmCommand::Resume(reply) => {
                    vm.paused.store(false, Ordering::Relaxed);
                    next_ms = next_ms.max(clock.now_ms());
                    let _ = reply.send(Ok(()));
                }
                VmCommand::Save { memory, state, reply, .. } => {
                    drop(reply.send(if faults.save { Err(disk_full()) } else { write_down(&vm, memory, state) }));
                }
                VmCommand::Release => {}
                VmCommand::ConsoleTail(reply) => drop(reply.send(Ok(String::new()))),
                VmCommand::ExplainNetwork(_, reply) => drop(reply.send(Err(no_policy()))),
            },
            () = clock.sleep_until(wake_ms) => {
                let now = clock.now_ms();
                if finish.as_ref().is_some_and(|(at, _)| *at <= now) {
                    let Some((_, gone)) = finish.take() else { continue };
                    if gone.cause == EndCause::Completed && let Some(end) = gone.main_end {
                        let _ = events.send(VmEvent::MainExited(end)).await;
                    }
                    break gone;
                }
                if !ready {
                    if faults.boot || (faults.restore && vm.spec.restore.is_some()) {
                        break end(EndCause::BootFailed, None);
                    }
                    ready = true;
                    let phases = vec![Phase { name: "ready".into(), duration_us: faults.boot_ms * 1_000 }];
                    let _ = events.send(VmEvent::AgentReady { phases }).await;
                    if let Some((after_ms, process)) = fate(&vm.spec) {
                        finish = Some((now + after_ms, end(EndCause::Completed, Some(process))));
                    }
                } else if now >= next_ms {
                    sequence += 1;
                    let _ = events.send(VmEvent::Beat(Beat { sequence, uptime_ms: sequence * 1_000, ..Beat::default() })).await;
                    count(&events, sample(sequence));
                }
                // In the moments in which the service looks, as those of real machines reach it.
                next_ms = (now + 1_000).next_multiple_of(LOOK_INTERVAL_MS);
            }
        }
    };
    *vm.gone.lock().unwrap_or_else(PoisonError::into_inner) = Some(gone.clone());
    let _ = events.send(VmEvent::Gone(Box::new(gone))).await;
}
