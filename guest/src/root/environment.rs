//! What a container user expects around the files of the image: /proc, /sys, /dev, the network's files, host name and sysctls.
//! Called by `root::set_up`.

use std::ffi::CStr;
use std::io;
use std::path::Path;

use msb_protocol::guest::GuestConfig;
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};

use super::directory::{RootDirectory, path_of};
use super::{RootError, Trying, hardening};
use crate::sys;

/// A file system of the root.
struct FileSystem {
    target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    data: Option<&'static CStr>,
}

const NO_EXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const NO_SUID: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

/// In the order of mounting. /dev is the kernel's own: a virtual machine's disks and loop devices appear there by themselves.
const FILE_SYSTEMS: [FileSystem; 6] = [
    FileSystem { target: "/proc", kind: "proc", flags: NO_EXEC, data: None },
    FileSystem { target: "/sys", kind: "sysfs", flags: NO_EXEC, data: None },
    FileSystem { target: "/dev", kind: "devtmpfs", flags: MountFlags::NOSUID, data: Some(c"mode=0755") },
    FileSystem {
        target: "/dev/pts",
        kind: "devpts",
        flags: NO_SUID,
        data: Some(c"newinstance,gid=5,mode=0620,ptmxmode=0666"),
    },
    FileSystem { target: "/dev/shm", kind: "tmpfs", flags: NO_EXEC, data: Some(c"mode=1777") },
    FileSystem { target: "/dev/mqueue", kind: "mqueue", flags: NO_EXEC, data: None },
];

/// Links of /dev that programs rely on.
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
];

/// Kernel settings that docker gives a container.
const SYSCTLS: [(&str, &str); 2] =
    [("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"), ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")];

/// Mounts [`FILE_SYSTEMS`] and makes [`LINKS`]. `narrow_devices`: /dev has only what every program needs, and no disk.
///
/// # Errors
/// As mount(2).
pub fn mount_file_systems(root: &RootDirectory, narrow_devices: bool) -> Result<(), RootError> {
    const STAGE: &str = "file systems";
    for file_system in &FILE_SYSTEMS {
        if narrow_devices && file_system.target == "/dev" {
            hardening::mount_devices(root)?;
            continue;
        }
        let what = format!("cannot mount {}", file_system.target);
        mount_inside(root, file_system).trying(STAGE, &what)?;
    }
    let dev = root.open_path(Path::new("/dev"), rustix::fs::OFlags::DIRECTORY, 0).trying(STAGE, "cannot open /dev")?;
    for (to, name) in LINKS {
        match rustix::fs::symlinkat(to, &dev, name) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno).trying(STAGE, "cannot make the links of /dev"),
        }
    }
    Ok(())
}

fn mount_inside(root: &RootDirectory, file_system: &FileSystem) -> io::Result<()> {
    let target = root.create_directories(Path::new(file_system.target), 0o755)?;
    mount(file_system.kind, path_of(&target), file_system.kind, file_system.flags, file_system.data)?;
    Ok(())
}

/// Mounts the cgroup hierarchy as the calling thread's cgroup namespace shows it.
///
/// # Errors
/// As mount(2).
pub fn mount_cgroup(root: &RootDirectory) -> io::Result<()> {
    let file_system =
        FileSystem { target: "/sys/fs/cgroup", kind: "cgroup2", flags: NO_EXEC, data: Some(c"nsdelegate") };
    mount_inside(root, &file_system)
}

/// Writes hostname, hosts and resolv.conf.
///
/// # Errors
/// As open(2) and write(2).
pub fn write_names(root: &RootDirectory, config: &GuestConfig) -> Result<(), RootError> {
    let hostname = format!("{}\n", config.hostname);
    for (path, text) in
        [("/etc/hostname", &hostname), ("/etc/hosts", &config.hosts), ("/etc/resolv.conf", &config.resolv_conf)]
    {
        root.write(Path::new(path), text.as_bytes(), 0o644).trying("identity", &format!("cannot write {path}"))?;
    }
    Ok(())
}

/// Lays a new boot id over the kernel's, which drew it once and was copied since.
///
/// # Errors
/// As mount(2).
pub fn renew_boot_id(root: &RootDirectory) -> io::Result<()> {
    /// In the agent's own root, which the workload does not see.
    const PLACE: &str = "/boot_id";
    let target = Path::new("/proc/sys/kernel/random/boot_id");
    let is_laid = Path::new(PLACE).exists();
    // The one source of UUIDs in the kernel; it has been seeded anew.
    std::fs::write(PLACE, std::fs::read("/proc/sys/kernel/random/uuid")?)?;
    if is_laid {
        // A copy of a copy: what lies over the kernel's is this file.
        return Ok(());
    }
    let over = root.open_path(target, OFlags::PATH, 0)?;
    mount_bind(PLACE, path_of(&over))?;
    let laid = root.open_path(target, OFlags::PATH, 0)?;
    mount_remount(path_of(&laid), MountFlags::BIND | MountFlags::RDONLY | NO_EXEC, c"")?;
    Ok(())
}

/// Writes hostname, hosts and resolv.conf, makes /etc/mtab if the image has none, and makes the working directory.
///
/// # Errors
/// As open(2) and write(2).
pub fn write_files(root: &RootDirectory, config: &GuestConfig) -> Result<(), RootError> {
    const STAGE: &str = "identity";
    write_names(root, config)?;
    let etc = root.create_directories(Path::new("/etc"), 0o755).trying(STAGE, "cannot open /etc")?;
    // One that exists stays as the image has it.
    let _ = rustix::fs::symlinkat("/proc/mounts", &etc, "mtab");
    if !config.workdir.is_empty() {
        let what = format!("cannot make the working directory '{}'", config.workdir);
        root.create_directories(Path::new(&config.workdir), 0o755).trying(STAGE, &what)?;
    }
    Ok(())
}

/// Sets the host name, the loopback interface and [`SYSCTLS`].
///
/// # Errors
/// As sethostname(2); a sysctl that this kernel lacks is no error.
pub fn set_kernel(config: &GuestConfig) -> Result<(), RootError> {
    const STAGE: &str = "identity";
    rustix::system::sethostname(config.hostname.as_bytes()).trying(STAGE, "cannot set the host name")?;
    sys::bring_loopback_up().trying(STAGE, "cannot set the loopback interface up")?;
    for (path, value) in SYSCTLS {
        match std::fs::write(path, value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).trying(STAGE, path),
            _ => {}
        }
    }
    Ok(())
}
