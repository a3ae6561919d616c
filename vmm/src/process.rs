//! The life of a VM process, from its launch request to its exit code. Called by `main` alone.
//!
//! ```text
//!  Launch or StandBy ──► check ──► directories, sockets, run ──► engine chosen ──► machine prepared ──► reply
//!                                  │ any failure: evidence, end.json, Ended, exit code
//!        boot ──► run ──► verdict ─┴──────────────────────────────────────────────────────► exit
//! ```

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::spec::{EngineChoice, SandboxSpec};
use msb_protocol::state::EndCause;
use msb_protocol::version::VMM_GENERATION;
use msb_protocol::vmm::{
    BootError as BootEvidence, CONSOLE_LOG_FILE, CONTROL_SOCKET, EndRecord, Event, JailReport, Message, Reply,
    VSOCK_SOCKET, VmSpec, VmState, VmStatus,
};

use crate::control::{Connection, Control, ControlOptions, StandBy};
use crate::devices::virtio::event_loop::LoopHandle;
use crate::end::{self, EVIDENCE_BYTES, Verdict};
use crate::engine::kvm::KvmEngine;
use crate::engine::kvm::machine::EmptyVm;
use crate::engine::qemu::QemuEngine;
use crate::engine::{Engine, EngineEnd};
use crate::jail::{self, FilePlan, JailPlan};
use crate::launch::engine_choice::{self, Chosen};
use crate::launch::machine::{self, boot_error};
use crate::launch::volumes::SharedPath;
use crate::link::thread::{self as link_thread, LinkOptions, Renewal};
use crate::logs::console::ConsoleLog;
use crate::logs::workload::WorkloadLog;
use crate::run::{Run, realtime_ns};

/// Who asked for the launch, and under which request id.
pub struct Launcher {
    /// The daemon's connection.
    pub connection: Connection,
    /// The id of its request.
    pub request_id: u64,
    /// Whether the machine is to stand by, until a launch takes it.
    pub stands_by: bool,
    /// The VM, if that was begun before the request came.
    pub empty_vm: Option<EmptyVm>,
}

/// Runs one machine from beginning to end; gives the exit code.
pub fn run(spec: &VmSpec, mut launcher: Option<Launcher>, started: Instant) -> u8 {
    // A session of our own: signals for the daemon's terminal are not for us. Fails when we lead one already.
    let _ = rustix::process::setsid();
    let prepared = machine::check(spec)
        .and_then(|()| machine::make_directory(&spec.run_dir))
        .and_then(|()| machine::make_directory(&spec.log_dir));
    if let Err(error) = prepared {
        tracing::error!(message = error.message, "launch is refused");
        return refuse(launcher, error);
    }
    let console = ConsoleLog::open(&spec.log_dir.join(CONSOLE_LOG_FILE), spec.log_size_max_bytes, spec.log_files_max);
    let run = match Run::new(spec.sandbox_id, spec.boot_id, started, console) {
        Ok(run) => run,
        Err(error) => return refuse(launcher, ApiError::internal(error)),
    };
    tracing::info!(boot_id = %spec.boot_id, sandbox = %spec.name, cpus = spec.cpus, memory_mib = spec.memory_mib, "launch");

    let outcome = boot_and_run(spec, &run, &mut launcher);
    let (end, control, mut engine) = match outcome {
        Ok(Outcome { end, control, engine }) => (end, Some(control), Some(engine)),
        Err(error) => {
            let stage = match error.code {
                ErrorCode::InvalidKernel => "kernel",
                ErrorCode::EngineUnavailable => "engine",
                _ => "config",
            };
            run.fail_boot(stage, error);
            (EngineEnd::Stopped, None, None)
        }
    };
    let facts = run.facts();
    let spec = run.taken().unwrap_or(spec);
    let verdict = end::decide(&end, &facts, run.console().panic_line().as_deref(), run.console().has_output());
    let mut record = record(spec, &run, &verdict);
    record.sample = control.as_ref().map(|control| Box::new(control.sample()));
    tracing::info!(boot_id = %spec.boot_id, cause = verdict.cause.as_str(), message = verdict.message, "end");
    let phases: Vec<String> =
        run.phases().all().iter().map(|mark| format!("{} {:.1} ms", mark.name, mark.at_us as f64 / 1000.0)).collect();
    tracing::info!(reached = phases.join(", "), "phases");
    if let Some(error) = &record.boot_error
        && let Err(error) = end::write_boot_error(&spec.log_dir, error)
    {
        tracing::error!(%error, "evidence of the failed boot could not be written");
    }
    if let Err(error) = end::write_end(&spec.run_dir, &record) {
        tracing::error!(%error, "end record could not be written");
    }
    // Before the daemon hears of the end: what it finds in the run directory then is the record alone.
    let _ = std::fs::remove_file(spec.run_dir.join(VSOCK_SOCKET));
    let _ = std::fs::remove_file(spec.run_dir.join(CONTROL_SOCKET));
    let ended = Event::Ended { record: Box::new(record) };
    match (control, launcher) {
        (Some(control), _) => control.finish(ended, engine.as_mut().and_then(|engine| engine.take_remains())),
        (None, Some(mut launcher)) => {
            launcher.connection.send(&Message::Event { event: ended });
        }
        (None, None) => {}
    }
    drop(engine);
    end::exit_code(verdict.cause)
}

/// Tells the daemon why its request is refused.
fn refused(launcher: &mut Option<Launcher>, error: ApiError) -> ApiError {
    if let Some(launcher) = launcher {
        let message = Message::Reply { id: launcher.request_id, result: Err(error.clone()) };
        launcher.connection.send(&message);
    }
    error
}

/// Everything between a checked spec and the machine's end. An error means that no machine ran.
fn boot_and_run(spec: &VmSpec, run: &Run, launcher: &mut Option<Launcher>) -> Result<Outcome, ApiError> {
    if launcher.as_ref().is_some_and(|launcher| launcher.stands_by) && spec.restore.is_none() {
        let error = ApiError::new(ErrorCode::InvalidRequest, "only a saved machine can stand by");
        return Err(refused(launcher, error));
    }
    let qemu = engine_choice::find_qemu(spec.qemu.as_deref());
    let listeners = launcher.as_mut().map(|launcher| launcher.connection.take_descriptors()).unwrap_or_default();
    let ready = engine_choice::choose(spec.engine, qemu.as_deref()).and_then(|chosen| {
        if spec.restore.is_some() && chosen.engine == EngineChoice::Qemu {
            let message = "engine qemu cannot go on with a saved machine: this needs engine kvm";
            return Err(ApiError::new(ErrorCode::UnsupportedOperation, message));
        }
        if spec.suspends && chosen.engine == EngineChoice::Qemu {
            return Err(SandboxSpec::no_suspension());
        }
        // The control thread gives them to a daemon that adopts this process.
        let kept = duplicate(&listeners)?;
        let prepared = machine::prepare(spec, chosen.engine, run, listeners)?;
        Ok((chosen, prepared, kept, machine::bind(&spec.run_dir.join(CONTROL_SOCKET))?))
    });
    let (chosen, prepared, ports, listener) = ready.map_err(|error| refused(launcher, error))?;
    let stand_by = launcher.as_ref().filter(|launcher| launcher.stands_by);
    let stand_by = stand_by.map(|launcher| StandBy {
        request_id: launcher.request_id,
        spec: Box::new(spec.clone()),
        stands: false,
        halted_at: None,
    });
    // One that stands by writes that of whoever takes it.
    let log = if stand_by.is_none() { WorkloadLog::open_of(spec) } else { None };
    run.phases().mark("prepare");
    if let Some(launcher) = launcher.as_mut().filter(|_| stand_by.is_none()) {
        let status = launch_status(run, &chosen);
        let reply = Message::Reply { id: launcher.request_id, result: Ok(Reply::Status(Box::new(status))) };
        launcher.connection.send(&reply);
    }

    let empty_vm = launcher.as_mut().and_then(|launcher| launcher.empty_vm.take());
    let mut engine = make_engine(chosen.engine, qemu, empty_vm);
    run.set_stopper(engine.stopper());
    if let Some(halter) = engine.halter() {
        run.set_halter(halter);
    }
    let renewal = spec.restore.as_ref().map(|_| match &stand_by {
        Some(_) => Renewal::StandBy,
        None => Renewal::GoOn,
    });
    let control = Control::start(ControlOptions {
        listener,
        first: launcher.take().map(|launcher| launcher.connection),
        run: run.clone(),
        engine: chosen.engine,
        engine_reason: chosen.reason,
        meters: prepared.meters,
        ports,
        boot_timeout_ms: spec.boot_timeout_ms,
        stand_by,
    })
    .map_err(ApiError::internal)?;
    let link = LinkOptions { stream: prepared.link, renewal, config: spec.guest.clone(), run: run.clone(), log };
    let link = link_thread::start(link).map_err(ApiError::internal);
    let end = match link.and_then(|link| engine.boot(prepared.machine).map_err(boot_error).map(|()| link)) {
        Ok(link) => {
            let child_pids = engine.child_pids();
            if let Some(saver) = engine.saver() {
                run.set_saver(saver);
            }
            let end = match close_jail(spec, &prepared.loops, &prepared.shares, &child_pids) {
                Ok(report) => {
                    control.set_jail(report);
                    control.set_machine_pids(&child_pids);
                    engine.run()
                }
                Err(error) => {
                    // With the machine its vsock device goes, which the link below waits for.
                    engine = Box::new(KvmEngine::default());
                    EngineEnd::Failed { detail: format!("the jail could not be closed: {error}") }
                }
            };
            // The vsock device is gone by now and with it the other end of the link: its last output is in the log when this returns.
            if link.join().is_err() {
                tracing::error!("agent link thread panicked");
            }
            end
        }
        Err(error) => {
            let stage = if error.code == ErrorCode::InvalidKernel { "kernel" } else { "engine" };
            run.fail_boot(stage, error);
            EngineEnd::Stopped
        }
    };
    Ok(Outcome { end, control, engine })
}

/// Second handles on the listeners of published ports.
fn duplicate(listeners: &[OwnedFd]) -> Result<Vec<OwnedFd>, ApiError> {
    listeners.iter().map(|listener| listener.try_clone().map_err(ApiError::internal)).collect()
}

/// What is left of a machine that has run.
struct Outcome {
    end: EngineEnd,
    control: Control,
    /// Dropped last. Closing a VM takes KVM tens of milliseconds, which is left to the daemon, if there is one.
    engine: Box<dyn Engine>,
}

/// Confines this process before the guest's first instruction: its own directories, its own figures in /proc, nothing else.
fn close_jail(
    spec: &VmSpec,
    loops: &[LoopHandle],
    shares: &[SharedPath],
    child_pids: &[u32],
) -> Result<JailReport, String> {
    let mut read = vec![PathBuf::from("/proc/self")];
    read.extend(child_pids.iter().map(|pid| PathBuf::from(format!("/proc/{pid}"))));
    read.extend(shares.iter().filter(|share| share.read_only).map(|share| share.path.clone()));
    let files = FilePlan {
        read,
        write: vec![spec.run_dir.clone(), spec.log_dir.clone()],
        shares: shares.iter().filter(|share| !share.read_only).map(|share| share.path.clone()).collect(),
        network: spec.network.is_some(),
        ..FilePlan::default()
    };
    let plan = JailPlan { files, has_child: !child_pids.is_empty(), has_shares: !shares.is_empty() };
    let report = jail::close(&plan).map_err(|error| error.to_string())?;
    for handle in loops {
        handle.enter_jail().map_err(|error| error.to_string())?;
    }
    Ok(report)
}

fn make_engine(engine: EngineChoice, qemu: Option<PathBuf>, empty_vm: Option<EmptyVm>) -> Box<dyn Engine> {
    match (engine, qemu) {
        (EngineChoice::Qemu, Some(program)) => {
            // Nobody's; its thread is over before the jail closes.
            drop(empty_vm.map(EmptyVm::finish));
            Box::new(QemuEngine::new(program))
        }
        _ => Box::new(KvmEngine::new(empty_vm)),
    }
}

fn launch_status(run: &Run, chosen: &Chosen) -> VmStatus {
    VmStatus {
        generation: VMM_GENERATION,
        version: env!("CARGO_PKG_VERSION").into(),
        sandbox_id: run.sandbox_id(),
        boot_id: run.boot_id(),
        pid: std::process::id(),
        engine: chosen.engine,
        engine_reason: chosen.reason.clone(),
        state: VmState::Booting,
        agent_generation: None,
        main_end: None,
        main_started: false,
        paused: false,
        phases: run.phase_report(),
        jail: JailReport::default(),
    }
}

fn record(spec: &VmSpec, run: &Run, verdict: &Verdict) -> EndRecord {
    let at_ns = realtime_ns();
    let boot_error = verdict.boot_failure.as_ref().map(|failure| BootEvidence {
        boot_id: spec.boot_id,
        at_ns,
        stage: failure.stage.clone(),
        error: failure.error.clone(),
        console_tail: run.console().tail(EVIDENCE_BYTES),
    });
    EndRecord {
        boot_id: spec.boot_id,
        cause: verdict.cause,
        main_end: run.facts().main_end,
        message: verdict.message.clone(),
        at_ns,
        boot_error,
        sample: None,
    }
}

/// A launch that could not even leave a record behind.
fn refuse(launcher: Option<Launcher>, error: ApiError) -> u8 {
    if let Some(mut launcher) = launcher {
        launcher.connection.send(&Message::Reply { id: launcher.request_id, result: Err(error) });
    }
    end::exit_code(EndCause::BootFailed)
}
