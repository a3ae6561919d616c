//! Turns a `VmSpec` into a [`Machine`]: checks everything, opens everything, makes the devices.
//!
//! Fails with the error a user sees and with nothing left behind but the two sockets, which the next launch replaces.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::guest::{AGENT_PORT, GUEST_CID, LINK_PORT};
use msb_protocol::paths::SOCKET_PATH_LEN_MAX;
use msb_protocol::spec::{CPUS_MAX, EngineChoice, MEMORY_MIB_MAX, MEMORY_MIB_MIN};
use msb_protocol::vmm::{
    DECISION_LOG_FILE, DiskPart, Event, LOWER_SERIAL, LOWER_SHARE, RestoreSpec, UPPER_SERIAL, VSOCK_SOCKET, VmSpec,
};
use rustix::fs::{FlockOperation, flock};

use super::volumes::{self, SharedPath};
use super::{command_line, kernel_file};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::storage::{Concatenation, SparseFile};
use crate::devices::virtio::block::{Block, BlockCounters, BlockOptions, DiskFullObserver};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::event_loop::LoopHandle;
use crate::devices::virtio::net::{Net, NetHandle, NetOptions};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{GuestPort, Vsock, VsockCounters, VsockOptions};
use crate::engine::kvm::saved::{SavedError, SavedMachine};
use crate::engine::{BootError, KernelFile, Machine, Restore};
use crate::jail::ThreadClass;
use crate::logs::decisions::DecisionLog;
use crate::memory::written::Written;
use crate::run::Run;

/// Files of a read-only root at most: an image's layers and its metadata, with room.
const DISK_PARTS_MAX: usize = 512;
/// Alignment of every part of the root, in bytes.
const PART_ALIGNMENT: u64 = 4096;

/// What a machine leaves behind for the rest of the process.
pub struct Prepared {
    /// To be booted.
    pub machine: Machine,
    /// The host's end of the agent link.
    pub link: UnixStream,
    /// What `Sample` reads.
    pub meters: Meters,
    /// The threads of the devices' workers, to be sent into the jail.
    pub loops: Vec<LoopHandle>,
    /// The shared directories, as the jail is told of them.
    pub shares: Vec<SharedPath>,
}

/// The devices' counters and what else a sample needs.
#[derive(Clone)]
pub struct Meters {
    /// One per disk.
    pub disks: Vec<Arc<BlockCounters>>,
    /// The vsock device's.
    pub vsock: Arc<VsockCounters>,
    /// A handle on the writable disk, for its allocated size.
    pub upper: Arc<File>,
    /// Memory the guest was given, in bytes.
    pub memory_limit_bytes: u64,
    /// The network and its decision log, if there is one.
    pub network: Option<(NetHandle, DecisionLog)>,
}

pub(super) fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidConfig, message)
}

pub(super) fn failed(what: &str, path: &Path, error: &std::io::Error) -> ApiError {
    let code = match error.kind() {
        std::io::ErrorKind::NotFound => ErrorCode::PathNotFound,
        std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
        std::io::ErrorKind::StorageFull => ErrorCode::DiskFull,
        _ => ErrorCode::BootFailed,
    };
    ApiError::new(code, format!("{what} {}: {error}", path.display()))
}

/// An engine's refusal as users see it.
pub fn boot_error(error: BootError) -> ApiError {
    let code = match &error {
        BootError::Unavailable { .. } => ErrorCode::EngineUnavailable,
        BootError::Kernel { .. } => ErrorCode::InvalidKernel,
        BootError::TooManyDevices { .. } => ErrorCode::InvalidConfig,
        BootError::Restore { .. } => ErrorCode::UnsupportedOperation,
        BootError::Memory { .. } | BootError::Device { .. } | BootError::System { .. } => ErrorCode::BootFailed,
    };
    let mut message = error.to_string();
    if let BootError::System { source, .. } = &error {
        message = format!("{message}: {source}");
    }
    ApiError::new(code, message)
}

/// Checks the numbers and texts of a spec, touching nothing.
///
/// # Errors
/// `invalid_config` naming the value.
pub fn check(spec: &VmSpec) -> Result<(), ApiError> {
    if spec.cpus == 0 || spec.cpus > CPUS_MAX {
        return Err(invalid(format!("cpus must be 1 to {CPUS_MAX}, not {}", spec.cpus)));
    }
    if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&spec.memory_mib) {
        return Err(invalid(format!(
            "memory must be {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX} MiB, not {}",
            spec.memory_mib
        )));
    }
    let local_roots = spec.shares.iter().filter(|share| share.name == LOWER_SHARE).count()
        + spec.disks.iter().filter(|disk| disk.serial == LOWER_SERIAL).count();
    if usize::from(!spec.lower.is_empty()) + local_roots != 1 {
        return Err(invalid("a root is files, a disk or a shared directory, and one of them"));
    }
    if spec.lower.len() > DISK_PARTS_MAX {
        return Err(invalid(format!("a root has at most {DISK_PARTS_MAX} files, not {}", spec.lower.len())));
    }
    for DiskPart { path, len_bytes } in &spec.lower {
        if len_bytes % PART_ALIGNMENT != 0 || *len_bytes > 1 << 50 {
            return Err(invalid(format!("{} bytes of {} are not whole pages", len_bytes, path.display())));
        }
    }
    if spec.boot_timeout_ms == 0 {
        return Err(invalid("the boot timeout must be greater than 0"));
    }
    for directory in [&spec.run_dir, &spec.log_dir] {
        if !directory.is_absolute() {
            return Err(invalid(format!("{} is not an absolute path", directory.display())));
        }
    }
    if spec.run_dir.join(VSOCK_SOCKET).as_os_str().len() > SOCKET_PATH_LEN_MAX {
        return Err(invalid(format!("{} is too long for sockets", spec.run_dir.display())));
    }
    command_line::build(&spec.cmdline_extra).map_err(invalid)?;
    if let Some(network) = &spec.network {
        network.spec.check()?;
    }
    volumes::check(spec)
}

/// Makes `directory` (0700) if logind or a cleaner has deleted it.
///
/// # Errors
/// Its path and why.
pub fn make_directory(directory: &Path) -> Result<(), ApiError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(|error| failed("directory cannot be made:", directory, &error))
}

/// Binds a Unix socket (0600), in place of whatever an earlier run left there.
///
/// # Errors
/// Its path and why.
pub fn bind(path: &Path) -> Result<UnixListener, ApiError> {
    let _ = fs::remove_file(path);
    let listener = UnixListener::bind(path).map_err(|error| failed("socket cannot be bound:", path, &error))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(|error| failed("socket's mode cannot be set:", path, &error))?;
    Ok(listener)
}

/// Room for as many sockets as the network may have. What the host's hard limit does not allow is refused connection by connection.
fn allow_descriptors(connections_max: u32) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    /// Everything else that a VM process has open, with room.
    const OTHERS: u64 = 4096 + 512;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let wanted = (u64::from(connections_max) + OTHERS).min(hard);
        if wanted > soft {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted, hard);
        }
    }
}

fn open_lower(parts: &[DiskPart]) -> Result<Concatenation, ApiError> {
    let mut files = Vec::with_capacity(parts.len());
    for DiskPart { path, len_bytes } in parts {
        let file = File::open(path).map_err(|error| failed("root file", path, &error))?;
        let length = file.metadata().map_err(|error| failed("root file", path, &error))?.len();
        if length < *len_bytes {
            let message = format!("root file {} has {length} bytes, {len_bytes} are needed", path.display());
            return Err(ApiError::new(ErrorCode::StoreCorrupt, message));
        }
        files.push((file, *len_bytes));
    }
    Ok(Concatenation::new(files))
}

pub(super) fn open_upper(path: &Path) -> Result<File, ApiError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|error| failed("writable disk", path, &error))?;
    // Two machines on one disk would destroy it.
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        ApiError::new(ErrorCode::SandboxBusy, format!("the writable disk {} is in use by another VM", path.display()))
    })?;
    Ok(file)
}

/// A stream to the agent, which is there once the guest runs.
fn call_agent(socket: &Path) -> std::io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes())?;
    Ok(stream)
}

/// Opens the files of a saved machine and reads the smaller one.
fn open_saved(spec: &RestoreSpec) -> Result<(File, Box<SavedMachine>), ApiError> {
    let open = |path: &Path| {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
        file.map_err(|error| failed("saved machine", path, &error))
    };
    let state = SavedMachine::read(open(&spec.state)?).map_err(|error| {
        let code = match error {
            SavedError::Format(_) => ErrorCode::UnsupportedOperation,
            SavedError::Damaged(_) => ErrorCode::SnapshotDamaged,
        };
        ApiError::new(code, format!("the saved machine {} cannot go on here: {error}", spec.state.display()))
    })?;
    Ok((open(&spec.memory)?, Box::new(state)))
}

/// Refuses a saved machine whose kernel is not the one that it would boot.
fn check_kernel(saved: &SavedMachine, spec: &RestoreSpec, kernel: &KernelFile) -> Result<(), ApiError> {
    let Some(saved) = saved.kernel.as_ref().filter(|saved| **saved != kernel.fingerprint) else { return Ok(()) };
    // It would run: but what is told of this kernel, and what was mended in it, would not be true of it.
    let (path, own) = (kernel.path.display(), &kernel.fingerprint);
    let message = format!(
        "the saved machine {} cannot go on here: its guest kernel is {saved}, and {path} is {own}",
        spec.state.display()
    );
    Err(ApiError::new(ErrorCode::UnsupportedOperation, message)
        .with_hint("take it anew with this kernel, or bring back the one that it was saved with"))
}

/// Opens and builds everything of `spec`, which `check` has accepted, for `engine`, which was chosen. `listeners` are those of its published ports.
///
/// # Errors
/// What is wrong, for users.
pub fn prepare(spec: &VmSpec, engine: EngineChoice, run: &Run, listeners: Vec<OwnedFd>) -> Result<Prepared, ApiError> {
    let kernel = kernel_file::open(&spec.kernel)?;
    let initramfs = File::open(&spec.initramfs).map_err(|error| failed("initramfs", &spec.initramfs, &error))?;
    let upper = open_upper(&spec.upper)?;
    let upper_handle = upper.try_clone().map(Arc::new).map_err(|error| failed("writable disk", &spec.upper, &error))?;
    let upper = SparseFile::new(upper).map_err(|error| failed("writable disk", &spec.upper, &error))?;
    let listener = bind(&spec.run_dir.join(VSOCK_SOCKET))?;
    let internal = |error: &dyn std::fmt::Display| ApiError::internal(error);
    // A guest that was made of a saved one is called by its host: it has had its one call.
    let (link, guest_ports) = match &spec.restore {
        None => {
            let (link, guest_end) = UnixStream::pair().map_err(|error| internal(&error))?;
            (link, vec![GuestPort { port: LINK_PORT, stream: guest_end }])
        }
        Some(_) => (call_agent(&spec.run_dir.join(VSOCK_SOCKET)).map_err(|error| internal(&error))?, Vec::new()),
    };

    let start_loop = |name: &str| LoopHandle::start(name).map_err(|error| ApiError::internal(&error));
    // A thread per disk: its system calls wait for the host's disk. vsock, rng and balloon never wait and share one.
    let streams = start_loop("streams")?;
    let upper_loop = start_loop("blk-upper")?;
    let mut loops = vec![streams.clone(), upper_loop.clone()];
    let full_timeout = Duration::from_millis(spec.disk_full_timeout_ms);
    let announcer = run.clone();
    let on_disk_full: DiskFullObserver = Arc::new(move |full| {
        announcer.announce(Event::HostDiskFull { boot_id: announcer.boot_id(), full });
    });
    // A root that is a disk of the user's or a shared directory is among those.
    let root = if spec.lower.is_empty() {
        None
    } else {
        let lower = open_lower(&spec.lower)?;
        let root_loop = start_loop("blk-root")?;
        loops.push(root_loop.clone());
        let options = BlockOptions { serial: LOWER_SERIAL.into(), full_timeout, on_disk_full: None };
        Some(Block::new(Box::new(lower), options, root_loop))
    };
    let upper = Block::new(
        Box::new(upper),
        BlockOptions { serial: UPPER_SERIAL.into(), full_timeout, on_disk_full: Some(Arc::clone(&on_disk_full)) },
        upper_loop,
    );
    let stopper = run.clone();
    let vsock_options = VsockOptions {
        guest_cid: u64::from(GUEST_CID),
        listener,
        guest_ports,
        has_strangers: spec.restore.is_some(),
        on_stop: Some(Arc::new(move || stopper.streams_stopped())),
    };
    let vsock = Vsock::new(vsock_options, streams.clone()).map_err(|error| internal(&error))?;
    let network = match &spec.network {
        None => None,
        Some(network) => {
            let log =
                DecisionLog::open(&spec.log_dir.join(DECISION_LOG_FILE), spec.log_size_max_bytes, spec.log_files_max);
            allow_descriptors(network.spec.connections_max);
            let (lines, waker) = (log.clone(), run.clone());
            let options = NetOptions {
                network: network.clone(),
                listeners,
                on_decision: Arc::new(move |line| {
                    lines.push(line);
                    let _ = waker.wake().notify();
                }),
            };
            let event_loop =
                LoopHandle::start_as("net", ThreadClass::Network).map_err(|error| ApiError::internal(&error))?;
            loops.push(event_loop.clone());
            let net = Net::new(options, event_loop).map_err(|error| invalid(format!("network: {error}")))?;
            Some((net, log))
        }
    };
    let mut meters = Meters {
        disks: root.iter().chain([&upper]).map(Block::counters).collect(),
        vsock: vsock.counters(),
        upper: upper_handle,
        memory_limit_bytes: u64::from(spec.memory_mib) << 20,
        network: network.as_ref().map(|(net, log)| (net.handle(), log.clone())),
    };
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    devices.extend(root.map(|root| Box::new(root) as Box<dyn VirtioDevice>));
    let always: [Box<dyn VirtioDevice>; 3] = [Box::new(upper), Box::new(vsock), Box::new(Rng::new(streams.clone()))];
    devices.extend(always);
    if engine == EngineChoice::Kvm {
        devices.push(Box::new(Balloon::new(streams)));
    }
    devices.extend(network.map(|(net, _)| Box::new(net) as Box<dyn VirtioDevice>));
    for disk in volumes::open_disks(&spec.disks, full_timeout, &on_disk_full)? {
        meters.disks.push(disk.device.counters());
        loops.push(disk.event_loop);
        devices.push(Box::new(disk.device));
    }
    let mut shares = Vec::new();
    if let Some(shared) = volumes::open_shares(&spec.shares)? {
        shares = shared.paths;
        loops.push(shared.event_loop);
        devices.push(Box::new(shared.device));
    }
    let restore = match &spec.restore {
        None => None,
        Some(saved) => {
            let (memory, state) = open_saved(saved)?;
            check_kernel(&state, saved, &kernel)?;
            // Without it all goes the same way, a little later.
            let written = saved.written.as_ref().and_then(|path| {
                let opened = Written::open(path, &memory);
                opened.inspect_err(|error| tracing::debug!(%error, "no note of pages that are written first")).ok()
            });
            Some(Restore { memory, written, state })
        }
    };
    let machine = Machine {
        cpus: u8::try_from(spec.cpus).map_err(|_| invalid("too many cpus"))?,
        memory_mib: spec.memory_mib,
        kernel,
        initramfs: Some((spec.initramfs.clone(), initramfs)),
        command_line: command_line::build(&spec.cmdline_extra).map_err(invalid)?,
        devices,
        console: Box::new(run.console().clone()),
        work_directory: PathBuf::from(&spec.run_dir),
        restore,
        phases: run.phases().clone(),
    };
    Ok(Prepared { machine, link, meters, loops, shares })
}
