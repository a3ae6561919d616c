//! Can this host run guests on KVM at a usable speed? Asked by running a few thousand instructions in a scratch VM.
//!
//! ```text
//!  open /dev/kvm ──► API and extensions ──► scratch VM: count, int3, cmpxchg16b, xsave/xrstor ──► Usable { speed }
//!       │                  │                          │ slow, wrong, stuck
//!       ▼                  ▼                          ▼
//!    Missing/Forbidden   Lacking                   Emulated / Broken
//! ```
//!
//! Opening the device proves nothing: on paravirtual nested hosts `/dev/kvm` opens and VMs are made, yet kernel-mode guest code is
//! interpreted at about a million instructions a second and `int3`, `cmpxchg16b` or `xrstor` end the VM. Such a host must get QEMU.
//!
//! Called by `msb-vmm --probe`, whose JSON `msb doctor` shows, and by `launch` for engine `auto`. The scratch VM runs on a thread of its
//! own with a deadline, so a KVM that never comes back costs a moment and not the caller.
#![expect(unsafe_code, reason = "maps scratch memory into a VM and copies the probe's machine code")]

use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::arch::x86_64::layout::{BOOT_STACK_ADDRESS, IDT_ADDRESS, KVM_IDENTITY_MAP_ADDRESS, KVM_TSS_ADDRESS};
use crate::arch::x86_64::registers::{Entry, fpu, general_registers, system_registers, write_tables};
use crate::memory::GuestMap;

/// Where the kernel offers KVM.
pub const DEVICE: &str = "/dev/kvm";
/// Fewer than this many million guest instructions a second and the host interprets: such hosts reach about 1, hardware over 1,000,
/// and even an emulated machine's emulated SVM on a busy host (the lab) over 30.
const SPEED_MIN_MIPS: f64 = 5.0;
/// The whole scratch run; on hardware it takes a millisecond.
const DEADLINE: Duration = Duration::from_secs(3);
/// The stable API version since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Extensions the engine cannot work without, as the kernel names them.
const EXTENSIONS: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Scratch memory: tables below 64 KiB, then code and data.
const SCRATCH_SIZE: usize = 128 * 1024;
const CODE_ADDRESS: u64 = 0x1_0000;
const DATA_ADDRESS: u64 = 0x1_8000;
/// The port the probe's code reports through.
const REPORT_PORT: u16 = 0x510;
/// Timed rounds; the best counts, because a busy host may take the CPU away in any one of them.
const ROUNDS: u64 = 4;
/// Loop turns in a round, each two instructions.
const ROUND_TURNS: u64 = 10_000;

// The probe's own program: 64-bit, ring 0, position independent. rdi points at 4 KiB of scratch data (64-byte aligned).
// Each `out` reports a finished step; the numbers are `Step`'s.
std::arch::global_asm!(
    ".pushsection .rodata.msb_probe, \"a\"",
    ".global msb_probe_code_start",
    ".global msb_probe_code_breakpoint",
    ".global msb_probe_code_end",
    "msb_probe_code_start:",
    "mov dx, {port}",
    "mov r8d, {rounds}",
    "2:",
    "mov ecx, {turns}",
    "3:",
    "dec ecx",
    "jnz 3b",
    "mov al, 1",
    "out dx, al",
    "dec r8d",
    "jnz 2b",
    // Breakpoints: the kernel patches its own code with them.
    "xor ebx, ebx",
    "int3",
    "cmp ebx, 0x600d",
    "jne 9f",
    "mov al, 2",
    "out dx, al",
    // 16-byte compare and exchange: the slab allocator's fast path. Memory is zero, so it must succeed.
    "mov r9, rdx",
    "xor eax, eax",
    "xor edx, edx",
    "mov ebx, 0x1111",
    "mov ecx, 0x2222",
    "lock cmpxchg16b [rdi]",
    "mov rdx, r9",
    "jnz 9f",
    "cmp qword ptr [rdi], 0x1111",
    "jne 9f",
    "cmp qword ptr [rdi + 8], 0x2222",
    "jne 9f",
    "mov al, 3",
    "out dx, al",
    // Saving and restoring extended state: every context switch.
    "mov eax, 1",
    "xor ecx, ecx",
    "cpuid",
    "mov rdx, r9",
    "bt ecx, 26",
    "jnc 4f",
    "mov rax, cr4",
    "or eax, 0x40600",
    "mov cr4, rax",
    "xor ecx, ecx",
    "mov eax, 3",
    "xor edx, edx",
    "xsetbv",
    "mov eax, 3",
    "xsave [rdi + 256]",
    "mov eax, 3",
    "xrstor [rdi + 256]",
    "mov rdx, r9",
    "4:",
    "mov al, 4",
    "out dx, al",
    "hlt",
    "9:",
    "mov al, 0xee",
    "out dx, al",
    "hlt",
    "msb_probe_code_breakpoint:",
    "mov ebx, 0x600d",
    "iretq",
    "msb_probe_code_end:",
    ".popsection",
    port = const REPORT_PORT,
    rounds = const ROUNDS,
    turns = const ROUND_TURNS,
);

unsafe extern "C" {
    static msb_probe_code_start: u8;
    static msb_probe_code_breakpoint: u8;
    static msb_probe_code_end: u8;
}

/// What the probe's program does, in order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    Count = 1,
    Breakpoint = 2,
    CompareExchange = 3,
    ExtendedState = 4,
}

impl Step {
    fn instruction(self) -> &'static str {
        match self {
            Self::Count => "a counting loop",
            Self::Breakpoint => "int3",
            Self::CompareExchange => "cmpxchg16b",
            Self::ExtendedState => "xsave and xrstor",
        }
    }
}

/// What the probe found.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    /// KVM works; guest speed in million instructions a second.
    Usable {
        /// Million guest instructions a second in a loop.
        speed_mips: f64,
    },
    /// No device node.
    Missing,
    /// The device is there and may not be opened.
    Forbidden {
        /// Group of the device node, by name or number.
        group: String,
    },
    /// The device cannot be opened for another reason.
    Unopenable(String),
    /// KVM lacks something.
    Lacking(String),
    /// It interprets.
    Emulated {
        /// Million guest instructions a second in a loop.
        speed_mips: f64,
    },
    /// It cannot run an instruction every kernel needs, or not even a scratch VM.
    Broken {
        /// What failed.
        what: String,
        /// Million guest instructions a second, if it came to a measurement.
        speed_mips: Option<f64>,
    },
}

impl Finding {
    fn broken(what: String) -> Self {
        Self::Broken { what, speed_mips: None }
    }

    /// Whether engine kvm may be used.
    pub fn is_usable(&self) -> bool {
        matches!(self, Self::Usable { .. })
    }

    /// Million guest instructions a second, where that was measured.
    pub fn speed_mips(&self) -> Option<f64> {
        match self {
            Self::Usable { speed_mips } | Self::Emulated { speed_mips } => Some(*speed_mips),
            Self::Broken { speed_mips, .. } => *speed_mips,
            Self::Missing | Self::Forbidden { .. } | Self::Unopenable(_) | Self::Lacking(_) => None,
        }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Usable { speed_mips } => {
                write!(to, "hardware virtualisation, {speed_mips:.0} million instructions a second")
            }
            Self::Missing => write!(
                to,
                "no {DEVICE}: virtualisation is off in the firmware, the kvm module is not loaded, or this is a machine without it"
            ),
            Self::Forbidden { group } => {
                write!(to, "no permission to open {DEVICE}: add yourself to the group {group} and log in again")
            }
            Self::Unopenable(reason) => write!(to, "cannot open {DEVICE}: {reason}"),
            Self::Lacking(what) => write!(to, "this kernel's KVM lacks {what}"),
            Self::Emulated { speed_mips } => write!(
                to,
                "{DEVICE} only interprets guest code ({speed_mips:.1} million instructions a second), which is slower than QEMU"
            ),
            Self::Broken { what, speed_mips: None } => write!(to, "{DEVICE} cannot run guest kernels: {what}"),
            Self::Broken { what, speed_mips: Some(speed_mips) } => write!(
                to,
                "{DEVICE} cannot run guest kernels: {what}; a loop ran at {speed_mips:.1} million instructions a second"
            ),
        }
    }
}

/// Opens the device, or says why not in a user's words.
pub fn open() -> Result<Kvm, Finding> {
    Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Finding::Missing,
        libc::EACCES | libc::EPERM => Finding::Forbidden { group: device_group() },
        _ => Finding::Unopenable(error.to_string()),
    })
}

/// The group that owns the device node: its name where the system has one, else its number, else what distributions call it.
fn device_group() -> String {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = std::fs::metadata(DEVICE) else { return "kvm".into() };
    let gid = metadata.gid();
    // Not nix's Group::from_gid: a static glibc cannot load NSS modules. The file is what NSS reads on nearly every host.
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _password, id) = (fields.next()?, fields.next()?, fields.next()?);
        (id == gid.to_string()).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| gid.to_string())
}

/// Opens the device and asks what it can do, without running anything: all that a user who insists on kvm waits for, because the scratch
/// VM costs two RCU grace periods of the host.
///
/// # Errors
/// What is missing or forbidden.
pub fn open_complete() -> Result<Kvm, Finding> {
    let kvm = open()?;
    if kvm.get_api_version() != API_VERSION {
        return Err(Finding::Lacking(format!("API version {API_VERSION}")));
    }
    match EXTENSIONS.iter().find(|(extension, _)| !kvm.check_extension(*extension)) {
        Some((_, name)) => Err(Finding::Lacking((*name).to_owned())),
        None => Ok(kvm),
    }
}

/// Probes this host. Takes some milliseconds on hardware, at most [`DEADLINE`].
pub fn probe() -> Finding {
    let kvm = match open_complete() {
        Ok(kvm) => kvm,
        Err(finding) => return finding,
    };
    let (sender, receiver) = mpsc::sync_channel(1);
    let spawned = std::thread::Builder::new().name("kvm-probe".into()).spawn(move || {
        // Only fails when the deadline has passed and nobody listens any more.
        let _ = sender.send(run_scratch(&kvm));
    });
    if let Err(error) = spawned {
        return Finding::broken(format!("no thread for the probe: {error}"));
    }
    match receiver.recv_timeout(DEADLINE) {
        Ok(Ok(run)) => judge(&run),
        Ok(Err(error)) => Finding::broken(format!("scratch VM: {error}")),
        Err(_) => Finding::broken(format!("a scratch VM did not finish within {} s", DEADLINE.as_secs())),
    }
}

/// What the scratch VM did.
#[derive(Debug, Default, PartialEq)]
struct ScratchRun {
    /// Duration of each round in nanoseconds.
    rounds_ns: Vec<u64>,
    /// Last step that reported back.
    last_step: u8,
    /// Why the vCPU stopped, if not by the final halt.
    stopped_by: Option<String>,
}

/// Turns a run into a finding. Pure, so that the judgement is tested without any KVM.
fn judge(run: &ScratchRun) -> Finding {
    let best_ns = run.rounds_ns.iter().copied().min().unwrap_or(u64::MAX).max(1);
    // Two instructions a turn; instructions per nanosecond times 1000 is millions a second.
    let speed_mips = (ROUND_TURNS * 2) as f64 * 1000.0 / best_ns as f64;
    let unfinished = [Step::Count, Step::Breakpoint, Step::CompareExchange, Step::ExtendedState]
        .into_iter()
        .find(|step| *step as u8 > run.last_step);
    if let Some(step) = unfinished {
        let cause = run.stopped_by.as_deref().unwrap_or("wrong result");
        let what = format!("{} failed ({cause})", step.instruction());
        return Finding::Broken { what, speed_mips: (step != Step::Count).then_some(speed_mips) };
    }
    if speed_mips < SPEED_MIN_MIPS { Finding::Emulated { speed_mips } } else { Finding::Usable { speed_mips } }
}

fn run_scratch(kvm: &Kvm) -> Result<ScratchRun, String> {
    let failed = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
    let vm = kvm.create_vm().map_err(failed("create VM"))?;
    // Intel hosts need these two even for a guest that never enters real mode.
    vm.set_identity_map_address(KVM_IDENTITY_MAP_ADDRESS).map_err(failed("set identity map"))?;
    vm.set_tss_address(KVM_TSS_ADDRESS as usize).map_err(failed("set TSS address"))?;

    let memory = GuestMap::from_ranges(&[(GuestAddress(0), SCRATCH_SIZE)]).map_err(|error| error.to_string())?;
    write_program(&memory)?;
    let host_address = memory.get_host_address(GuestAddress(0)).map_err(|error| error.to_string())?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: SCRATCH_SIZE as u64,
        userspace_addr: host_address.addr() as u64,
    };
    // SAFETY: the region is exactly the mapping `memory` owns, and `memory` is declared before the vCPU below, so it is unmapped
    // only after the VM's last run.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("set memory"))?;

    let mut vcpu = vm.create_vcpu(0).map_err(failed("create vCPU"))?;
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(failed("get supported CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("set CPUID"))?;
    let entry = Entry::Long(CODE_ADDRESS);
    let mut system = system_registers(vcpu.get_sregs().map_err(failed("get registers"))?, entry);
    // The breakpoint's gate is entry 3.
    system.idt.limit = 4 * 16 - 1;
    vcpu.set_sregs(&system).map_err(failed("set system registers"))?;
    let mut general = general_registers(entry);
    general.rdi = DATA_ADDRESS;
    general.rsp = BOOT_STACK_ADDRESS;
    vcpu.set_regs(&general).map_err(failed("set registers"))?;
    vcpu.set_fpu(&fpu()).map_err(failed("set FPU"))?;

    let mut run = ScratchRun::default();
    let mut started = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, &[step])) => {
                if step == Step::Count as u8 {
                    run.rounds_ns.push(u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX));
                }
                if step > Step::ExtendedState as u8 {
                    return Ok(run);
                }
                run.last_step = step;
                started = Instant::now();
            }
            Ok(VcpuExit::Hlt) => return Ok(run),
            Ok(VcpuExit::Shutdown) => return Ok(ScratchRun { stopped_by: Some("triple fault".into()), ..run }),
            Ok(other) => {
                let stopped_by = Some(format!("exit {other:?}"));
                return Ok(ScratchRun { stopped_by, ..run });
            }
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Ok(ScratchRun { stopped_by: Some(error.to_string()), ..run }),
        }
    }
}

/// Puts tables, breakpoint gate and program into scratch memory.
fn write_program(memory: &GuestMap) -> Result<(), String> {
    write_tables(memory, Entry::Long(CODE_ADDRESS)).map_err(|error| error.to_string())?;
    let start = &raw const msb_probe_code_start;
    let (length, breakpoint_offset) = (
        (&raw const msb_probe_code_end).addr() - start.addr(),
        (&raw const msb_probe_code_breakpoint).addr() - start.addr(),
    );
    // SAFETY: the three symbols delimit one contiguous, read-only piece of this program's image.
    let code = unsafe { std::slice::from_raw_parts(start, length) };
    memory.write_slice(code, GuestAddress(CODE_ADDRESS)).map_err(|error| error.to_string())?;

    // A 64-bit interrupt gate to the handler through selector 0x10 (SDM volume 3, section 6.14.1).
    let handler = CODE_ADDRESS + breakpoint_offset as u64;
    let mut gate = [0u8; 16];
    gate[..2].copy_from_slice(&(handler as u16).to_le_bytes());
    gate[2..4].copy_from_slice(&0x10u16.to_le_bytes());
    gate[5] = 0x8e;
    gate[6..8].copy_from_slice(&((handler >> 16) as u16).to_le_bytes());
    memory.write_slice(&gate, GuestAddress(IDT_ADDRESS + 3 * 16)).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(best_ns: u64, last_step: u8) -> ScratchRun {
        ScratchRun { rounds_ns: vec![best_ns * 5, best_ns, best_ns * 2], last_step, stopped_by: None }
    }

    #[test]
    fn speed_is_judged_on_both_sides_of_the_limit() {
        // 20,000 instructions in 4 ms are 5 million a second.
        assert!(judge(&run(4_000_000, 4)).is_usable());
        assert!(matches!(judge(&run(4_001_000, 4)), Finding::Emulated { speed_mips } if speed_mips < SPEED_MIN_MIPS));
        assert!(
            matches!(judge(&run(20_000_000, 4)), Finding::Emulated { speed_mips } if (speed_mips - 1.0).abs() < 0.01)
        );
        assert!(judge(&run(0, 4)).is_usable(), "a clock too coarse to see it is no reason to refuse");
    }

    #[test]
    fn the_first_unfinished_step_is_named() {
        for (last_step, name) in [(0, "counting"), (1, "int3"), (2, "cmpxchg16b"), (3, "xrstor")] {
            let finding = judge(&run(1000, last_step));
            assert!(matches!(&finding, Finding::Broken { what, .. } if what.contains(name)), "{finding:?}");
        }
        let stopped = ScratchRun { stopped_by: Some("triple fault".into()), ..run(1000, 1) };
        assert!(judge(&stopped).to_string().contains("int3 failed (triple fault)"));
    }

    #[test]
    fn a_forbidden_device_names_the_group() {
        let text = Finding::Forbidden { group: "kvm".into() }.to_string();
        assert!(text.contains("group kvm") && text.contains(DEVICE), "{text}");
    }

    #[test]
    fn the_program_lies_in_memory_with_its_gate() {
        let memory = GuestMap::from_ranges(&[(GuestAddress(0), SCRATCH_SIZE)]).unwrap();
        write_program(&memory).unwrap();
        let first: [u8; 2] = memory.read_obj(GuestAddress(CODE_ADDRESS)).unwrap();
        assert_eq!(first, [0x66, 0xba], "mov dx, imm16");
        let low: u16 = memory.read_obj(GuestAddress(IDT_ADDRESS + 48)).unwrap();
        let handler: [u8; 5] = memory.read_obj(GuestAddress(0x1_0000 | u64::from(low))).unwrap();
        assert_eq!(handler, [0xbb, 0x0d, 0x60, 0, 0], "mov ebx, 0x600d");
    }

    #[test]
    fn every_host_gets_an_answer_in_time() {
        let started = Instant::now();
        let finding = probe();
        assert!(started.elapsed() < DEADLINE + Duration::from_secs(2));
        assert!(!finding.to_string().is_empty());
    }
}
