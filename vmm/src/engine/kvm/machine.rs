//! Builds the machine on KVM: memory, interrupt controllers, devices, kernel, boot data, vCPUs; up to the first instruction, not it.
//!
//! Called once by [`super::KvmEngine`]'s `boot`, before the jail closes: this is where `/dev/kvm` is opened and files are read.
#![expect(unsafe_code, reason = "hands guest memory and eventfds to KVM")]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::super::{BootError, KernelFile, Machine, Restore};
use super::bus::Bus;
use super::probe;
use super::saved::{SavedMachine, Writer};
use crate::arch::x86_64::boot_data::{self, BootData, Initramfs};
use crate::arch::x86_64::cpuid::{Processor, normalise};
use crate::arch::x86_64::interrupts::set_local_inputs;
use crate::arch::x86_64::kernel::{self, EntryPreference, LoadedKernel, Placement};
use crate::arch::x86_64::layout::{
    IRQ_FIRST, KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS, MMIO_SLOT_COUNT, MMIO_START, MMIO_WINDOW_SIZE, SERIAL_IRQ,
};
use crate::arch::x86_64::registers::{boot_msrs, fpu, general_registers, system_registers};
use crate::devices::virtio::notifier::Notifier;
use crate::launch::phases::Phases;
use crate::memory::GuestRam;
use crate::transport::mmio::MmioTransport;
use crate::transport::mmio::registers::QUEUE_NOTIFY_OFFSET;
use crate::transport::mmio::saved::SavedTransport;

/// The VM and the memory it runs on.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    memory: GuestRam,
}

impl Vm {
    /// A second descriptor of the VM, which keeps it in the kernel until it is closed too.
    pub fn descriptor(&self) -> Option<OwnedFd> {
        // SAFETY: the VM's descriptor is open as long as `fd` is, which this borrows.
        let borrowed = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        borrowed.try_clone_to_owned().ok()
    }

    /// The memory it runs on.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }
}

/// A machine that is built.
pub struct Built {
    /// The VM.
    pub vm: Vm,
    /// Its devices.
    pub bus: Arc<Bus>,
    /// Its processors, with what writes each of them down.
    pub vcpus: Vec<(VcpuFd, Writer)>,
    /// What its devices are to be put back to.
    pub devices: Option<Vec<SavedTransport>>,
}

/// A KVM call that failed, as the boot error it is.
fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> BootError {
    move |error| BootError::System {
        what: format!("kvm: {what}"),
        source: std::io::Error::from_raw_os_error(error.errno()),
    }
}

/// Builds `machine`, in `empty` if that was begun. Nothing of the guest has run when this returns.
pub fn build(machine: Machine, empty: Option<EmptyVm>) -> Result<Built, BootError> {
    let Machine { cpus, memory_mib, kernel, initramfs, command_line, devices, console, phases, restore, .. } = machine;
    if devices.len() > MMIO_SLOT_COUNT {
        return Err(BootError::TooManyDevices { given: devices.len(), engine: "kvm", slots: MMIO_SLOT_COUNT });
    }
    let Made { kvm, vm, memory, content } = match restore {
        Some(restore) => make(empty, &phases, || load_saved(memory_mib, cpus, restore))?,
        None => make(empty, &phases, || {
            load(memory_mib, &kernel, initramfs.as_ref().map(|(_path, file)| file), &command_line)
        })?,
    };
    phases.mark("vm_created");

    if let Content::Kernel { kernel, initramfs } = &content {
        let command_line = with_devices(&command_line, devices.len());
        let data = BootData {
            memory_bytes: memory.size_bytes(),
            cpus,
            command_line: &command_line,
            initramfs: *initramfs,
            random_seed: random()?,
        };
        boot_data::write(memory.map(), kernel, &data).map_err(|error| BootError::Kernel { reason: chain(&error) })?;
    }

    let device_memory = Arc::new(memory.map().clone());
    let mut transports = Vec::with_capacity(devices.len());
    for (slot, device) in devices.into_iter().enumerate() {
        let name = device.name().to_owned();
        let attached = attach(&vm, slot, || {
            let line = Notifier::new()?;
            let transport = MmioTransport::new(device, Arc::clone(&device_memory), line.try_clone()?)
                .map_err(std::io::Error::other)?;
            Ok((transport, line))
        });
        transports.push(attached.map_err(|error| BootError::Device { device: name, reason: error.to_string() })?);
    }
    let serial_line = Notifier::new().map_err(eventfd_failed)?;
    let serial_event = event_of(&serial_line).map_err(eventfd_failed)?;
    vm.register_irqfd(&serial_event, SERIAL_IRQ).map_err(failed("route the serial interrupt"))?;
    let bus = Arc::new(Bus::new(transports, console, serial_line));

    let vm = Arc::new(vm);
    let vcpus = create_vcpus(&kvm, &vm, cpus, &content)?;
    let devices = match content {
        Content::Kernel { .. } => None,
        Content::Saved(saved) => {
            saved.vm.restore(&vm).map_err(|reason| BootError::Restore { reason })?;
            Some(saved.devices)
        }
    };
    phases.mark("machine_built");
    Ok(Built { vm: Vm { fd: vm, memory }, bus, vcpus, devices })
}

/// A VM with its memory, and what is in that.
struct Made {
    kvm: Kvm,
    vm: VmFd,
    memory: GuestRam,
    content: Content,
}

/// A VM without memory that is being made, on a thread of its own: that waits for RCU grace periods in the host kernel (8 ms in the
/// exact lab). Begun by [`build`], or by `main` before it is known what is to run.
pub struct EmptyVm(std::io::Result<JoinHandle<Result<(Kvm, VmFd), BootError>>>);

impl EmptyVm {
    /// Begins to make one.
    pub fn begin() -> Self {
        let making = std::thread::Builder::new().name("make-vm".into()).spawn(make_vm);
        // On a host with one free processor it would else begin to wait when the rest is done, and not before.
        std::thread::yield_now();
        Self(making)
    }

    /// Waits for it.
    ///
    /// # Errors
    /// What KVM says.
    pub fn finish(self) -> Result<(Kvm, VmFd), BootError> {
        let failed = |source| BootError::System { what: "start a thread that makes the VM".into(), source };
        let thread = self.0.map_err(failed)?;
        thread.join().unwrap_or_else(|_| Err(failed(std::io::ErrorKind::Other.into())))
    }
}

/// Makes the VM, unless that was begun, and what `load` makes beside it.
fn make(
    empty: Option<EmptyVm>,
    phases: &Phases,
    load: impl FnOnce() -> Result<(GuestRam, Content), BootError>,
) -> Result<Made, BootError> {
    let making = empty.unwrap_or_else(EmptyVm::begin);
    let loaded = load();
    phases.mark("kernel_loaded");
    let (kvm, vm) = making.finish()?;
    let (memory, content) = loaded?;
    register_memory(&vm, &memory)?;
    Ok(Made { kvm, vm, memory, content })
}

/// The VM with its interrupt controllers and timer, without memory.
fn make_vm() -> Result<(Kvm, VmFd), BootError> {
    let kvm = probe::open().map_err(|finding| BootError::Unavailable { engine: "kvm", reason: finding.to_string() })?;
    let vm = kvm.create_vm().map_err(failed("create the VM"))?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP_ADDRESS).map_err(failed("set the identity map address"))?;
    vm.set_tss_address(KVM_TSS_ADDRESS as usize).map_err(failed("set the TSS address"))?;
    vm.create_irq_chip().map_err(failed("create the interrupt controllers"))?;
    // The timer also answers port 0x61, which kernels without a known TSC frequency calibrate with.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(failed("create the timer"))?;
    Ok((kvm, vm))
}

/// What is in a guest's memory before its first instruction.
enum Content {
    /// A kernel.
    Kernel { kernel: LoadedKernel, initramfs: Option<Initramfs> },
    /// Whatever was there when the machine was saved.
    Saved(Box<SavedMachine>),
}

fn check_size(state: &SavedMachine, memory_mib: u32, cpus: u8) -> Result<(), BootError> {
    if state.memory_mib != memory_mib || state.vcpus.len() != usize::from(cpus) {
        let reason = format!(
            "it has {} MiB of memory and {} processors, {memory_mib} and {cpus} were asked for",
            state.memory_mib,
            state.vcpus.len()
        );
        return Err(BootError::Restore { reason });
    }
    Ok(())
}

fn load_saved(memory_mib: u32, cpus: u8, restore: Restore) -> Result<(GuestRam, Content), BootError> {
    let Restore { memory, written, state } = restore;
    check_size(&state, memory_mib, cpus)?;
    let memory = GuestRam::restored(memory_mib.into(), memory, written)
        .map_err(|error| BootError::Restore { reason: chain(&error) })?;
    Ok((memory, Content::Saved(state)))
}

fn load(
    memory_mib: u32,
    file: &KernelFile,
    initramfs: Option<&File>,
    command_line: &str,
) -> Result<(GuestRam, Content), BootError> {
    let refused = |error: &dyn std::error::Error| BootError::Kernel { reason: chain(error) };
    let memory = GuestRam::private(memory_mib.into()).map_err(|error| BootError::Memory { reason: chain(&error) })?;
    let (map, size_bytes) = (memory.map(), memory.size_bytes());
    let placement = Placement {
        preference: EntryPreference::default(),
        low_end: size_bytes,
        // One that cannot be read is refused below.
        kept_bytes: initramfs
            .and_then(|file| file.metadata().ok())
            .map_or(0, |metadata| metadata.len())
            .next_multiple_of(4096),
        // The word that the unpacker of a bzImage looks for (kernel-parameters.txt).
        random: if command_line.split_whitespace().any(|word| word == "nokaslr") {
            None
        } else {
            Some(u64::from_ne_bytes(random()?))
        },
    };
    let kernel = kernel::load(&file.file, file.format, placement, map).map_err(|error| refused(&error))?;
    let initramfs = initramfs
        .map(|file| boot_data::load_initramfs(file, map, size_bytes, kernel.end))
        .transpose()
        .map_err(|error| refused(&error))?;
    Ok((memory, Content::Kernel { kernel, initramfs }))
}

/// Bytes that nobody can know before.
fn random<const COUNT: usize>() -> Result<[u8; COUNT], BootError> {
    let mut bytes = [0; COUNT];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| BootError::System { what: "random bytes for the guest".into(), source: error.into() })?;
    Ok(bytes)
}

fn eventfd_failed(source: std::io::Error) -> BootError {
    BootError::System { what: "make an eventfd".into(), source }
}

/// An error with its sources, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn register_memory(vm: &VmFd, memory: &GuestRam) -> Result<(), BootError> {
    for (slot, region) in memory.map().iter().enumerate() {
        let region = kvm_userspace_memory_region {
            // One or two regions.
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
        };
        // SAFETY: the region is exactly one mapping of `memory`, which is never unmapped while the process lives.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("give the VM its memory"))?;
    }
    Ok(())
}

/// The same eventfd as kvm-ioctls' type. KVM keeps its own reference, so the copy may be dropped after registering.
fn event_of(notifier: &Notifier) -> std::io::Result<EventFd> {
    let copy = notifier.as_fd().try_clone_to_owned()?;
    // SAFETY: `copy` is an open eventfd and gives its ownership away right here.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}

/// Makes the transport of `slot` and connects its interrupt and its notifications to KVM.
fn attach(
    vm: &VmFd,
    slot: usize,
    make: impl FnOnce() -> std::io::Result<(MmioTransport, Notifier)>,
) -> std::io::Result<MmioTransport> {
    let system = |error: kvm_ioctls::Error| std::io::Error::from_raw_os_error(error.errno());
    let (transport, line) = make()?;
    vm.register_irqfd(&event_of(&line)?, irq_of(slot)).map_err(system)?;
    for (index, kick) in transport.kicks().iter().enumerate() {
        let address = IoEventAddress::Mmio(window_of(slot) + QUEUE_NOTIFY_OFFSET);
        vm.register_ioevent(&event_of(kick)?, &address, index as u32).map_err(system)?;
    }
    Ok(transport)
}

/// Interrupt line of a slot; slots are below [`MMIO_SLOT_COUNT`].
fn irq_of(slot: usize) -> u32 {
    IRQ_FIRST + slot as u32
}

/// First address of a slot's window.
fn window_of(slot: usize) -> u64 {
    MMIO_START + slot as u64 * MMIO_WINDOW_SIZE
}

/// The command line with one `virtio_mmio.device=` word per device, before the words meant for init.
fn with_devices(command_line: &str, count: usize) -> String {
    let words: String =
        (0..count).map(|slot| format!(" virtio_mmio.device=4K@{:#x}:{}", window_of(slot), irq_of(slot))).collect();
    match command_line.split_once(" -- ") {
        Some((kernel, init)) => format!("{kernel}{words} -- {init}"),
        None => format!("{command_line}{words}"),
    }
}

fn create_vcpus(kvm: &Kvm, vm: &Arc<VmFd>, cpus: u8, content: &Content) -> Result<Vec<(VcpuFd, Writer)>, BootError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("read the supported CPUID"))?;
    let tsc_deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    let too_large = |error: vmm_sys_util::fam::Error| BootError::System {
        what: "kvm: too many CPUID leaves".into(),
        source: std::io::Error::other(format!("{error:?}")),
    };
    let msrs = boot_msrs().map_err(too_large)?;
    let saved_msrs = Arc::new(kvm.get_msr_index_list().map_err(failed("list the MSRs"))?.as_slice().to_vec());
    let has_large_state = kvm.check_extension_int(Cap::Xsave2) > size_of::<kvm_bindings::kvm_xsave>() as i32;
    (0..cpus)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(failed("create a vCPU"))?;
            let processor = Processor { id, cpus, tsc_deadline_timer };
            let own = normalise(supported.as_slice(), processor);
            let refused = |reason| BootError::Restore { reason };
            let cpuid = match content {
                Content::Kernel { .. } => own,
                Content::Saved(saved) => {
                    if id == 0 {
                        saved.fits(&own).map_err(refused)?;
                    }
                    saved.vcpus[usize::from(id)].cpuid().to_vec()
                }
            };
            let leaves = CpuId::from_entries(&cpuid).map_err(too_large)?;
            vcpu.set_cpuid2(&leaves).map_err(failed("set CPUID"))?;
            let vm = (id == 0 && !has_large_state).then(|| Arc::clone(vm));
            let writer = Writer { id, cpuid, msrs: Arc::clone(&saved_msrs), vm };
            let entry = match content {
                Content::Kernel { kernel, .. } => kernel.entry,
                Content::Saved(saved) => {
                    saved.vcpus[usize::from(id)].restore(&vcpu).map_err(refused)?;
                    return Ok((vcpu, writer));
                }
            };
            let written = vcpu.set_msrs(&msrs).map_err(failed("set MSRs"))?;
            if written != msrs.as_slice().len() {
                let source = std::io::Error::from(std::io::ErrorKind::Unsupported);
                return Err(BootError::System { what: format!("kvm: MSR number {written} was refused"), source });
            }
            let mut lapic = vcpu.get_lapic().map_err(failed("read the local APIC"))?;
            set_local_inputs(&mut lapic);
            vcpu.set_lapic(&lapic).map_err(failed("set the local APIC"))?;
            // The others wait for INIT and SIPI, which bring their own registers.
            if id == 0 {
                let system = vcpu.get_sregs().map_err(failed("read registers"))?;
                vcpu.set_sregs(&system_registers(system, entry)).map_err(failed("set system registers"))?;
                vcpu.set_regs(&general_registers(entry)).map_err(failed("set registers"))?;
                vcpu.set_fpu(&fpu()).map_err(failed("set the FPU"))?;
            }
            Ok((vcpu, writer))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_announced_before_the_words_for_init() {
        assert_eq!(with_devices("quiet", 0), "quiet");
        let line = with_devices("quiet -- --debug", 2);
        assert_eq!(line, "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 -- --debug");
        let full = with_devices("", MMIO_SLOT_COUNT);
        assert!(full.ends_with("@0xd0012000:23"), "{full}");
    }
}
