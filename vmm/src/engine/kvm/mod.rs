//! Engine kvm: our own VMM on `/dev/kvm`. In-kernel interrupt controllers and timer, virtio over MMIO, a serial port, nothing else.
//!
//! ```text
//!  boot:  machine::build ─► memory, irqchip, devices (irqfd, ioeventfd), kernel, boot data, vCPUs ─► threads, parked
//!  run:   gate opens ─► each vCPU thread enters its jail, then KVM_RUN until an exit ends the machine
//!                          │ MMIO, port I/O                     │ shutdown, reset, error, stop
//!                          ▼                                    ▼
//!                      bus (devices, serial)                 Ending ─► kick all, join all, reset devices
//! ```
//!
//! Created by `launch`, driven by it through [`Engine`]. A guest can end its own machine in several ways and do nothing else: what it
//! writes goes to `bus`, whose devices take anything; KVM's own complaints become [`EngineEnd::Failed`]. There is no second boot.

pub mod bus;
pub mod ending;
pub mod machine;
pub mod probe;
pub mod saved;
pub mod vcpu;

use std::any::Any;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::{BootError, Engine, EngineEnd, Halter, Machine, Saver, Stopper};
use crate::arch::x86_64::layout::MMIO_SLOT_COUNT;
use crate::launch::phases::Phases;
use crate::memory::GuestRam;
use crate::run::GUEST_ENDED;
use crate::transport::mmio::saved::SavedTransport;

use bus::Bus;
use ending::Ending;
use machine::EmptyVm;
use saved::SavedMachine;
use vcpu::VcpuThreads;

/// One machine on KVM.
#[derive(Default)]
pub struct KvmEngine {
    /// Begun before the machine was known.
    empty: Option<EmptyVm>,
    ending: Arc<Ending>,
    booted: Option<Booted>,
    /// The VM after its end. Closing it makes KVM wait for grace periods (36 ms in the exact lab), for which whoever waits for the end has no
    /// time: see [`Engine::take_remains`].
    ended: Option<machine::Vm>,
}

/// What exists between `boot` and the end of `run`.
struct Booted {
    // Order matters on drop: threads (with the vCPUs) before the VM and its memory.
    threads: VcpuThreads,
    bus: Arc<Bus>,
    phases: Phases,
    vm: machine::Vm,
    /// The fingerprint of the guest's kernel.
    kernel: String,
    /// Devices to be put back before the guest goes on.
    devices: Option<Vec<SavedTransport>>,
}

/// Writes the machine down.
struct KvmSaver {
    ending: Arc<Ending>,
    bus: Arc<Bus>,
    memory: GuestRam,
    kernel: String,
}

impl Saver for KvmSaver {
    fn save(&self, memory: &File, mut state: &File) -> io::Result<Box<dyn Any + Send>> {
        let (devices, frozen) = self.bus.save_devices().map_err(io::Error::other)?;
        let parts = self.ending.collect().map_err(io::Error::other)?;
        let memory_mib = u32::try_from(self.memory.size_bytes() >> 20).unwrap_or(u32::MAX);
        let saved = SavedMachine::of(memory_mib, self.kernel.clone(), devices, parts).map_err(io::Error::other)?;
        state.write_all(&serde_json::to_vec(&saved)?)?;
        self.memory.save(memory)?;
        Ok(Box::new(frozen))
    }

    fn note_written(&self) {
        self.memory.note_written();
    }
}

impl KvmEngine {
    /// An engine without a machine yet, that makes it in `empty` if that was begun.
    pub fn new(empty: Option<EmptyVm>) -> Self {
        Self { empty, ..Self::default() }
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn stopper(&self) -> Arc<dyn Stopper> {
        Arc::<Ending>::clone(&self.ending)
    }

    fn halter(&self) -> Option<Arc<dyn Halter>> {
        Some(Arc::<Ending>::clone(&self.ending))
    }

    fn saver(&self) -> Option<Arc<dyn Saver>> {
        let booted = self.booted.as_ref()?;
        let (ending, bus, memory) = (Arc::clone(&self.ending), Arc::clone(&booted.bus), booted.vm.memory().clone());
        Some(Arc::new(KvmSaver { ending, bus, memory, kernel: booted.kernel.clone() }))
    }

    fn boot(&mut self, machine: Machine) -> Result<(), BootError> {
        let (phases, kernel) = (machine.phases.clone(), machine.kernel.fingerprint.clone());
        let machine::Built { vm, bus, vcpus, devices } = machine::build(machine, self.empty.take())?;
        let threads = VcpuThreads::park(vcpus, &bus, &self.ending)?;
        phases.mark("vcpus_parked");
        self.booted = Some(Booted { threads, bus, phases, vm, kernel, devices });
        Ok(())
    }

    fn run(&mut self) -> EngineEnd {
        let Some(mut booted) = self.booted.take() else {
            return EngineEnd::Failed { detail: "run without boot".into() };
        };
        if let Some(devices) = booted.devices.take()
            && let Err(reason) = booted.bus.restore_devices(devices)
        {
            self.ending.finish(EngineEnd::Failed { detail: format!("the saved machine cannot go on here: {reason}") });
        }
        booted.phases.mark("guest_started");
        booted.threads.start();
        let end = self.ending.wait();
        booted.phases.mark(GUEST_ENDED);
        booted.threads.stop();
        booted.bus.reset_devices();
        self.ended = Some(booted.vm);
        end
    }

    fn take_remains(&mut self) -> Option<OwnedFd> {
        self.ended.as_ref().and_then(machine::Vm::descriptor)
    }

    fn device_slots(&self) -> usize {
        MMIO_SLOT_COUNT
    }
}
