//! vCPU threads: parked until the machine starts, then in and out of the guest until it ends.
//!
//! ```text
//!  parked ──gate──► jail ──► KVM_RUN ◄──► exit: port or memory access ─► bus
//!                               │
//!                               ├ kick while halting ─► parked until it goes on
//!                               └ shutdown, reset line, KVM error, kick while over ─► Ending, thread returns its vCPU
//! ```
//!
//! A kick is a signal plus KVM's `immediate_exit` byte: the byte catches the signal that comes just before KVM_RUN. Created by
//! [`super::KvmEngine`]. A vCPU thread never opens, allocates by the guest's word, or logs per exit.
#![expect(
    unsafe_code,
    reason = "kicks vCPUs: a signal to a thread, a byte in memory shared with KVM, a signal handler"
)]

use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{register_signal_handler, unblock_signal};

use super::super::{BootError, EngineEnd};
use super::bus::{Bus, Effect};
use super::ending::{Ending, Kick};
use super::saved::Writer;
use crate::jail::{self, ThreadClass};

/// Exits are handled with shallow calls; device set-up runs here too.
const STACK_BYTES: usize = 256 * 1024;

/// The signal that gets a thread out of KVM_RUN: the first real-time one glibc leaves alone, which nothing else in this process uses.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Whether the threads may start: opened once.
#[derive(Debug, Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = self.changed.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Gets one vCPU thread out of the guest.
struct VcpuKick {
    thread: libc::pthread_t,
    immediate_exit: *mut u8,
}

// SAFETY: the pointer is only used for atomic stores, and it stays valid until `Ending::clear_kicks` has dropped this kick: threads
// return their vCPU (and with it the mapping) instead of dropping it.
unsafe impl Send for VcpuKick {}

impl Kick for VcpuKick {
    fn kick(&self) {
        // SAFETY: see above: the mapping of kvm_run is alive, one byte is always aligned, and KVM reads the byte atomically.
        let immediate_exit = unsafe { AtomicU8::from_ptr(self.immediate_exit) };
        immediate_exit.store(1, Ordering::SeqCst);
        // SAFETY: the thread has not been joined while this kick exists, so the id is its own; the signal has a handler.
        unsafe { libc::pthread_kill(self.thread, kick_signal()) };
    }
}

/// All vCPU threads of a machine.
pub struct VcpuThreads {
    gate: Arc<Gate>,
    ending: Arc<Ending>,
    threads: Vec<JoinHandle<VcpuFd>>,
}

impl VcpuThreads {
    /// Starts one thread per vCPU; each waits at the gate.
    pub fn park(vcpus: Vec<(VcpuFd, Writer)>, bus: &Arc<Bus>, ending: &Arc<Ending>) -> Result<Self, BootError> {
        install_handler()?;
        let mut parked =
            Self { gate: Arc::default(), ending: Arc::clone(ending), threads: Vec::with_capacity(vcpus.len()) };
        for (mut vcpu, writer) in vcpus {
            let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
            let (gate, bus, ending_of_thread) = (Arc::clone(&parked.gate), Arc::clone(bus), Arc::clone(ending));
            let spawned = std::thread::Builder::new()
                .name(format!("vcpu-{}", writer.id))
                .stack_size(STACK_BYTES)
                .spawn(move || thread_main(vcpu, &writer, &gate, &bus, &ending_of_thread));
            let thread = spawned.map_err(|source| BootError::System { what: "start a vCPU thread".into(), source })?;
            ending.add_kick(Box::new(VcpuKick { thread: thread.as_pthread_t(), immediate_exit }));
            parked.threads.push(thread);
        }
        Ok(parked)
    }

    /// Lets the guest run.
    pub fn start(&self) {
        self.gate.open();
    }

    /// Gets every thread out and waits for it. The machine counts as stopped if nothing ended it before.
    pub fn stop(&mut self) {
        self.ending.finish(EngineEnd::Stopped);
        self.gate.open();
        let mut returned = Vec::with_capacity(self.threads.len());
        for thread in self.threads.drain(..) {
            returned.push(thread.join());
        }
        // Kicks point into the mappings of `returned`: they go first.
        self.ending.clear_kicks();
        drop(returned);
    }
}

impl Drop for VcpuThreads {
    /// A boot that was given up gets here with parked threads: they leave at the gate.
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.stop();
        }
    }
}

/// The handler does nothing: being interrupted is the point.
extern "C" fn ignore_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn install_handler() -> Result<(), BootError> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| result = register_signal_handler(kick_signal(), ignore_signal));
    result.map_err(|error| BootError::System {
        what: "install the vCPU signal handler".into(),
        source: std::io::Error::from_raw_os_error(error.errno()),
    })
}

fn thread_main(mut vcpu: VcpuFd, writer: &Writer, gate: &Gate, bus: &Bus, ending: &Ending) -> VcpuFd {
    gate.wait();
    // A build that aborts on panic never returns here; one that unwinds (tests) must not lose the vCPU that kicks point into.
    let end = catch_unwind(AssertUnwindSafe(|| {
        if ending.is_over() {
            return None;
        }
        if let Err(error) = unblock_signal(kick_signal()) {
            return Some(EngineEnd::Failed { detail: format!("vCPU signal: {error:?}") });
        }
        if let Err(error) = jail::enter(ThreadClass::Vcpu) {
            return Some(EngineEnd::Failed { detail: format!("jail of a vCPU thread: {error}") });
        }
        run(&mut vcpu, writer, bus, ending)
    }));
    match end {
        Ok(None) => {}
        Ok(Some(end)) => ending.finish(end),
        Err(_) => ending.finish(EngineEnd::Failed { detail: "a vCPU thread panicked".into() }),
    }
    vcpu
}

/// Exits by kind, for the benchmark's table.
#[derive(Debug, Default)]
struct ExitCounts {
    port: u64,
    mmio: u64,
    interrupted: u64,
    other: u64,
}

/// Runs the guest until it ends; `None` when somebody else ended it.
fn run(vcpu: &mut VcpuFd, writer: &Writer, bus: &Bus, ending: &Ending) -> Option<EngineEnd> {
    let mut counts = ExitCounts::default();
    let end = loop {
        if ending.is_over() {
            break None;
        }
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                counts.mmio += 1;
                bus.mmio_read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counts.mmio += 1;
                bus.mmio_write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                counts.port += 1;
                bus.port_read(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                counts.port += 1;
                if bus.port_write(port, data) == Effect::Reset {
                    break Some(EngineEnd::Reset);
                }
            }
            // A triple fault: what `reboot=t` does on purpose.
            Ok(VcpuExit::Shutdown) => break Some(EngineEnd::Reset),
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => break Some(EngineEnd::PowerOff),
                KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH => break Some(EngineEnd::Reset),
                other => break Some(EngineEnd::Failed { detail: format!("unknown KVM system event {other}") }),
            },
            // Cannot happen with in-kernel interrupt controllers; if it does, the guest waits for what will not come.
            Ok(VcpuExit::Hlt) => break Some(EngineEnd::Halted),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let detail = format!("the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})");
                break Some(EngineEnd::Failed { detail });
            }
            Ok(VcpuExit::InternalError) => break Some(EngineEnd::Failed { detail: internal_error(vcpu) }),
            // Returned for signals and on pages that are being reclaimed: go on.
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => counts.other += 1,
            Ok(other) => {
                break Some(EngineEnd::Failed { detail: format!("unexpected KVM exit {other:?}") });
            }
            Err(error) if error.errno() == libc::EINTR => {
                counts.interrupted += 1;
                // Cleared before `is_over` and `is_halting` are asked: a kick that comes in between has set them first. An access
                // that was being answered is complete: KVM does that before it looks at the byte.
                vcpu.set_kvm_immediate_exit(0);
                if ending.is_halting() {
                    // A guest without the clock it is told by refuses to hear that it stood still; then its watchdogs may complain.
                    let _ = vcpu.kvmclock_ctrl();
                    ending.park(|| writer.write(vcpu));
                }
            }
            // A vCPU that waits for its start signal.
            Err(error) if error.errno() == libc::EAGAIN => counts.other += 1,
            Err(error) => {
                break Some(EngineEnd::Failed {
                    detail: format!("KVM_RUN failed: {}", std::io::Error::from_raw_os_error(error.errno())),
                });
            }
        }
    };
    tracing::debug!(?counts, "vCPU stopped");
    end
}

/// What KVM says about an error of its own, and where the guest was.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: after KVM_EXIT_INTERNAL_ERROR this member of the union is the valid one, and any bits are a valid u32.
    let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let cause = match suberror {
        1 => "an instruction could not be emulated",
        2 => "two exceptions at once",
        3 => "delivery of an event failed",
        4 => "unexpected exit reason",
        _ => "unknown",
    };
    match vcpu.get_regs() {
        Ok(registers) => format!("KVM internal error {suberror} ({cause}) at rip {:#x}", registers.rip),
        Err(_) => format!("KVM internal error {suberror} ({cause})"),
    }
}
