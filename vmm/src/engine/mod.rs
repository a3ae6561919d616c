//! The engines: two ways to run the same machine behind one trait.
//!
//! * `kvm`: our own VMM on `/dev/kvm`, devices over `transport/mmio`.
//! * `qemu`: QEMU (software emulation) as a supervised child, the same device backends served to it over `transport/vhost_user`.
//!
//! ```text
//!   launch::prepare ──► Machine ──► Engine::boot ──► Engine::run (blocks) ──► EngineEnd ──► end::Cause
//!                                       │                   ▲
//!                                       └ Stopper ──────────┘  (any thread: kill, deadline, daemon request)
//! ```
//!
//! An engine reports what the *machine* did; what that means (clean end, panic, reboot) is decided in `end`, from the agent's
//! goodbye and the console's tail, in one place for both engines. Engines never talk to the daemon.

pub mod kvm;
pub mod qemu;

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::devices::virtio::device::VirtioDevice;
use crate::launch::phases::Phases;
use crate::memory::written::Written;

/// Where serial output of the guest goes: bounded, never blocks on a slow reader (see `logs::console`).
pub type ConsoleSink = Box<dyn Write + Send>;

/// The kernel, opened once so that what was checked is what boots.
#[derive(Debug)]
pub struct KernelFile {
    /// Path, for messages and for QEMU's `-kernel`.
    pub path: PathBuf,
    /// The opened file (read-only).
    pub file: File,
    /// What its magic says.
    pub format: KernelFormat,
    /// What tells it from every other kernel.
    pub fingerprint: String,
}

/// The kernel formats both engines take; anything else is refused before an engine starts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum KernelFormat {
    /// 64-bit x86 ELF (`vmlinux`), executable, with a PVH note or the 64-bit entry.
    Elf,
    /// `bzImage` with boot protocol 2.06 or newer and a 64-bit entry.
    BzImage,
}

/// A machine ready to boot: everything validated, every file open, no device active.
pub struct Machine {
    /// vCPUs, 1 to 32.
    pub cpus: u8,
    /// Guest memory in MiB, 64 to 65,536.
    pub memory_mib: u32,
    /// The guest kernel.
    pub kernel: KernelFile,
    /// The initramfs, uncompressed cpio; none for kernels that carry their own.
    pub initramfs: Option<(PathBuf, File)>,
    /// The kernel command line both engines share; an engine appends only what it must (`launch::command_line`).
    pub command_line: String,
    /// Devices in slot order.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    /// Receives the serial console's bytes.
    pub console: ConsoleSink,
    /// A private directory for sockets an engine needs (0700, removed by the caller).
    pub work_directory: PathBuf,
    /// A saved machine to go on with, in place of booting the kernel.
    pub restore: Option<Restore>,
    /// Where phases of the boot are marked.
    pub phases: Phases,
}

/// What became of the machine.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum EngineEnd {
    /// The guest asked for a reset (reboot, `reboot=t`, triple fault); there is no second boot.
    Reset,
    /// The guest powered itself off by a means the engine sees.
    PowerOff,
    /// All vCPUs are halted with interrupts off, where the engine can tell.
    Halted,
    /// [`Stopper::stop`] was called.
    Stopped,
    /// The engine itself failed: a crash of QEMU, a KVM error, a lost device thread. The text is for people.
    Failed {
        /// What was seen (exit status, ioctl, last words).
        detail: String,
    },
}

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// the engine cannot work on this host
    #[error("engine {engine} is unavailable: {reason}")]
    Unavailable {
        /// `kvm` or `qemu`.
        engine: &'static str,
        /// What is missing or forbidden, and how to get it.
        reason: String,
    },
    /// the kernel or initramfs could not be loaded
    #[error("kernel could not be loaded: {reason}")]
    Kernel {
        /// What is wrong with the file.
        reason: String,
    },
    /// a saved machine that cannot go on here
    #[error("the saved machine cannot go on here: {reason}")]
    Restore {
        /// What is missing or wrong.
        reason: String,
    },
    /// guest memory could not be had
    #[error("guest memory could not be set up: {reason}")]
    Memory {
        /// The failing call or limit.
        reason: String,
    },
    /// more devices than the engine has slots
    #[error("too many devices: {given}, engine {engine} has {slots} slots")]
    TooManyDevices {
        /// Devices asked for.
        given: usize,
        /// `kvm` or `qemu`.
        engine: &'static str,
        /// Slots the engine has.
        slots: usize,
    },
    /// a device could not be attached
    #[error("device {device} could not be attached: {reason}")]
    Device {
        /// The device's name.
        device: String,
        /// What failed.
        reason: String,
    },
    /// an operating-system call on the way failed
    #[error("{what}")]
    System {
        /// What was being done.
        what: String,
        /// The error of the operating system.
        #[source]
        source: std::io::Error,
    },
}

/// Ends a running machine from any thread. Idempotent, does not wait.
pub trait Stopper: Send + Sync {
    /// Makes [`Engine::run`] return [`EngineEnd::Stopped`] soon.
    fn stop(&self);
}

/// Why a machine was not halted.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HaltError {
    /// It has ended.
    #[error("the machine has ended")]
    Ended,
    /// A vCPU did not leave the guest in time; all of them go on.
    #[error("a vCPU did not leave the guest in time")]
    Stuck,
}

/// Halts a running machine's vCPUs and lets them go on, from any thread.
pub trait Halter: Send + Sync {
    /// Returns once no vCPU runs guest code, until [`Halter::go_on`]. Devices go on: what they do is in guest memory when it does.
    fn halt(&self) -> Result<(), HaltError>;

    /// Lets every vCPU go on. Does nothing to a machine that is not halted.
    fn go_on(&self);
}

/// Writes a halted machine down, from any thread.
pub trait Saver: Send + Sync {
    /// Writes its memory into the empty file `memory` and everything else into the empty file `state`. Its devices stand from then on
    /// until the answer is dropped, so that its disks can be copied as the memory knows them.
    ///
    /// # Errors
    /// In words, or what the files say. Nothing stands then.
    fn save(&self, memory: &File, state: &File) -> std::io::Result<Box<dyn Any + Send>>;
    /// Notes which pages the guest has written so far, where somebody wants to know; once.
    fn note_written(&self);
}

/// What a machine is made of in place of a kernel: the files of a saved one.
pub struct Restore {
    /// Its memory.
    pub memory: File,
    /// The pages of it that are written first.
    pub written: Option<Written>,
    /// Everything else.
    pub state: Box<kvm::saved::SavedMachine>,
}

/// One engine with one machine in it.
pub trait Engine: Send {
    /// `kvm` or `qemu`, as in specs and messages.
    fn name(&self) -> &'static str;

    /// A handle that ends the machine; usable from the moment `boot` is called.
    fn stopper(&self) -> Arc<dyn Stopper>;

    /// What halts the machine, if this engine can.
    fn halter(&self) -> Option<Arc<dyn Halter>> {
        None
    }

    /// What writes the machine down, once it is booted and if this engine can.
    fn saver(&self) -> Option<Arc<dyn Saver>> {
        None
    }

    /// Builds the machine up to the point where the guest's first instruction may run. Called once.
    /// The jail is closed between `boot` and `run`: whatever needs spawning or opening is done here.
    fn boot(&mut self, machine: Machine) -> Result<(), BootError>;

    /// Runs the guest until it ends, then stops every device worker. Called once, after a successful `boot`.
    fn run(&mut self) -> EngineEnd;

    /// Virtio slots this engine has.
    fn device_slots(&self) -> usize;

    /// What of a machine that has ended takes long to close, for somebody who has the time. Nothing runs in it any more.
    fn take_remains(&mut self) -> Option<OwnedFd> {
        None
    }

    /// Process ids outside this process that belong to the machine (QEMU), for accounting by the daemon.
    fn child_pids(&self) -> Vec<u32> {
        Vec::new()
    }
}
