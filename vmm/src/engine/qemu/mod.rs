//! Engine qemu: QEMU's software emulation as a supervised child, the same device back ends served to it over vhost-user.
//!
//! ```text
//!  msb-vmm ── exec /proc/self/exe --qemu-child ──► dies with its parent, then becomes qemu-system-x86_64
//!     │            socket pairs, inherited: one per device (vhost-user), one for the serial console
//!     │ boot: spawn        run: wait for the child ──► exit status ──► EngineEnd        stop: SIGKILL through a pidfd
//! ```
//!
//! QEMU gets no network, no disk, no monitor and no file but kernel and initramfs; its own sandbox forbids it to spawn, to change its
//! privileges or its limits. It is slow and not a security boundary, and it is announced as that (`launch::engine_choice`).
//!
//! TCG does not see writes to guest memory by another process: a page that the guest executes after a device filled it may run stale
//! code. With `init_on_alloc=1` the guest writes every page itself before, which makes TCG drop its old translation. Never without.

mod arguments;
pub mod child;
mod clock;
mod streams;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{BootError, Engine, EngineEnd, Machine, Stopper};
use crate::devices::virtio::device::{DeviceType, VirtioDevice};
use crate::jail::namespaces;
use crate::launch::phases::Phases;
use crate::run::GUEST_ENDED;
use crate::transport::vhost_user::{Served, serve, serve_accepted};
use arguments::{Arguments, Attachment};
use streams::Complaints;

/// virtio-mmio slots of QEMU's microvm machine.
const DEVICE_SLOTS: usize = 8;
/// Socket of the network card in the run directory, there until QEMU has connected.
const NETWORK_SOCKET: &str = "net.sock";
/// Words for the kernel that this engine always adds (see the header; the TSC is the host's, so it is good on every vCPU).
const KERNEL_WORDS: &str = "init_on_alloc=1 tsc=reliable";

/// One machine in QEMU.
pub struct QemuEngine {
    program: PathBuf,
    ending: Arc<Ending>,
    booted: Option<Booted>,
    child_pid: Option<u32>,
}

struct Booted {
    child: Child,
    devices: Vec<Served>,
    console: JoinHandle<()>,
    complaints: Complaints,
    phases: Phases,
}

/// How the child is reached from other threads.
#[derive(Default)]
struct Ending {
    stopped: AtomicBool,
    child: Mutex<Option<OwnedFd>>,
}

impl Stopper for Ending {
    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        if let Some(child) = &*self.child.lock().unwrap_or_else(PoisonError::into_inner) {
            // Fails only when it is gone already.
            let _ = pidfd_send_signal(child, Signal::KILL);
        }
    }
}

impl QemuEngine {
    /// An engine that will start `program`.
    pub fn new(program: PathBuf) -> Self {
        Self { program, ending: Arc::default(), booted: None, child_pid: None }
    }
}

fn system(what: &str) -> impl FnOnce(std::io::Error) -> BootError {
    let what = what.to_owned();
    move |source| BootError::System { what, source }
}

/// A socket pair of which QEMU inherits one end under the same number.
fn inherited_pair() -> std::io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    fcntl_setfd(&theirs, FdFlags::empty())?;
    Ok((ours, theirs))
}

/// A file that QEMU inherits under the same number.
fn inherited_file(file: &File) -> std::io::Result<File> {
    let copy = file.try_clone()?;
    fcntl_setfd(&copy, FdFlags::empty())?;
    Ok(copy)
}

fn attach(device: &dyn VirtioDevice, socket: &UnixStream) -> Result<Attachment, BootError> {
    Attachment::new(device.device_type(), device.name(), socket.as_raw_fd())
        .map_err(|reason| BootError::Device { device: device.name().to_owned(), reason })
}

/// Serves the network card on a socket that QEMU will connect to, by the descriptor that comes back: its path is taken away at once, so that
/// nobody else can.
fn attach_network(device: Box<dyn VirtioDevice>, path: &Path) -> std::io::Result<(Attachment, Served, OwnedFd)> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    let name = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty());
    std::fs::remove_file(path)?;
    let name = name?;
    let mut mac = [0; 6];
    device.read_config(0, &mut mac);
    let attachment = Attachment::network(device.name(), mac, name.as_raw_fd());
    Ok((attachment, serve_accepted(device, listener)?, name))
}

/// The shared kernel line with what this engine adds.
fn kernel_line(shared: &str, tsc_khz: Option<u64>) -> String {
    match tsc_khz {
        Some(khz) => format!("{shared} {KERNEL_WORDS} tsc_early_khz={khz}"),
        None => format!("{shared} {KERNEL_WORDS}"),
    }
}

impl Engine for QemuEngine {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn stopper(&self) -> Arc<dyn Stopper> {
        Arc::<Ending>::clone(&self.ending)
    }

    fn boot(&mut self, machine: Machine) -> Result<(), BootError> {
        if machine.devices.len() > DEVICE_SLOTS {
            return Err(BootError::TooManyDevices {
                given: machine.devices.len(),
                engine: self.name(),
                slots: DEVICE_SLOTS,
            });
        }
        // What the child inherits lives until it is spawned: nothing else is spawned meanwhile.
        let mut inherited: Vec<OwnedFd> = Vec::new();
        let mut attachments = Vec::new();
        let mut devices = Vec::new();
        for device in machine.devices {
            if device.device_type() == DeviceType::Net {
                let path = machine.work_directory.join(NETWORK_SOCKET);
                let (attachment, served, name) = attach_network(device, &path).map_err(system("network socket"))?;
                attachments.push(attachment);
                devices.push(served);
                inherited.push(name);
                continue;
            }
            let (ours, theirs) = inherited_pair().map_err(system("device socket could not be made"))?;
            attachments.push(attach(&*device, &theirs)?);
            devices.push(serve(device, ours).map_err(system("device thread could not be started"))?);
            inherited.push(theirs.into());
        }
        let (console_ours, console_theirs) = inherited_pair().map_err(system("console socket could not be made"))?;
        let kernel = inherited_file(&machine.kernel.file).map_err(system("kernel could not be passed on"))?;
        let initramfs = match &machine.initramfs {
            Some((_, file)) => Some(inherited_file(file).map_err(system("initramfs could not be passed on"))?),
            None => None,
        };
        let arguments = Arguments {
            cpus: machine.cpus,
            memory_mib: machine.memory_mib,
            kernel_fd: kernel.as_raw_fd(),
            initramfs_fd: initramfs.as_ref().map(AsRawFd::as_raw_fd),
            command_line: kernel_line(&machine.command_line, clock::tsc_khz()),
            console_fd: console_theirs.as_raw_fd(),
            attachments,
        };

        let (ours, theirs) = UnixStream::pair().map_err(system("a socket for QEMU could not be made"))?;
        let mut child = Command::new("/proc/self/exe")
            .args(child::arguments(&self.program, arguments.to_words()))
            .env_clear()
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| BootError::System {
                what: format!("{} could not be started", self.program.display()),
                source,
            })?;
        drop((inherited, console_theirs, kernel, initramfs));
        self.child_pid = Some(child.id());
        let complaints = match child.stderr.take() {
            Some(stderr) => Complaints::collect(stderr).map_err(system("thread could not be started"))?,
            None => Complaints::none(),
        };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let watched = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
        match watched {
            Some(Ok(pidfd)) => *self.ending.child.lock().unwrap_or_else(PoisonError::into_inner) = Some(pidfd),
            Some(Err(error)) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(BootError::System {
                    what: "QEMU's process cannot be watched".into(),
                    source: error.into(),
                });
            }
            None => {}
        }
        // A stop that came before there was anything to kill.
        if self.ending.stopped.load(Ordering::SeqCst) {
            self.ending.stop();
        }
        let shares_root = child::hear(ours).map_err(system("QEMU does not come"))?;
        if !shares_root.is_empty() {
            namespaces::keep_root(format!("QEMU could not have one: {shares_root}"));
        }
        let console =
            streams::copy_console(console_ours, machine.console).map_err(system("thread could not be started"))?;
        machine.phases.mark("engine_start");
        self.booted = Some(Booted { child, devices, console, complaints, phases: machine.phases });
        Ok(())
    }

    fn run(&mut self) -> EngineEnd {
        let Some(mut booted) = self.booted.take() else {
            return EngineEnd::Failed { detail: "run without boot".into() };
        };
        let status = booted.child.wait();
        booted.phases.mark(GUEST_ENDED);
        // QEMU is gone, so its ends of all sockets are closed: each thread sees that and ends.
        if booted.console.join().is_err() {
            tracing::error!("console thread panicked");
        }
        let complaints = booted.complaints.finish();
        for device in booted.devices {
            device.finish();
        }
        judge(status, self.ending.stopped.load(Ordering::SeqCst), &complaints)
    }

    fn device_slots(&self) -> usize {
        DEVICE_SLOTS
    }

    fn child_pids(&self) -> Vec<u32> {
        self.child_pid.into_iter().collect()
    }
}

/// What QEMU's end says about the machine. With `-no-reboot` and without a monitor it exits with 0 only when the guest resets itself.
fn judge(status: std::io::Result<ExitStatus>, stopped: bool, complaints: &str) -> EngineEnd {
    if stopped {
        return EngineEnd::Stopped;
    }
    let what = match status {
        Ok(status) if status.success() => return EngineEnd::Reset,
        Ok(status) => match status.signal() {
            Some(signal) => format!("QEMU was killed by signal {signal}"),
            None => format!("QEMU ended with status {}", status.code().unwrap_or(-1)),
        },
        Err(error) => format!("QEMU cannot be waited for: {error}"),
    };
    let detail = if complaints.is_empty() { what } else { format!("{what}: {complaints}") };
    EngineEnd::Failed { detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_boot_initialises_pages_and_trusts_the_tsc() {
        for line in [kernel_line("quiet", None), kernel_line("quiet", Some(2_500_000))] {
            assert!(line.starts_with("quiet init_on_alloc=1 tsc=reliable"));
        }
        assert!(kernel_line("quiet", Some(2_500_000)).ends_with(" tsc_early_khz=2500000"));
    }

    #[test]
    fn qemus_end_is_told_truly() {
        let exited = |code: i32| Ok(ExitStatus::from_raw(code << 8));
        let signalled = |signal: i32| Ok(ExitStatus::from_raw(signal));
        assert_eq!(judge(exited(0), false, ""), EngineEnd::Reset);
        assert_eq!(judge(signalled(9), true, ""), EngineEnd::Stopped);
        let EngineEnd::Failed { detail } = judge(signalled(11), false, "") else { panic!("a crash") };
        assert!(detail.contains("signal 11"));
        let EngineEnd::Failed { detail } = judge(exited(1), false, "no such machine") else { panic!("a crash") };
        assert!(detail.contains("status 1") && detail.contains("no such machine"));
    }
}
