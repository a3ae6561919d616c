//! What the narrower profiles do to the root: no device below the file systems, nothing of the kernel's to write, and for `strict` a
//! root that cannot be written. Called by `root::set_up`, after everything is mounted and written.
//!
//! None of it can be undone from inside: mounts need CAP_SYS_ADMIN, and in a user namespace of the workload's these mounts are locked.

use std::path::Path;

use msb_protocol::security::SecurityProfile;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_bind_recursive, mount_remount};

use super::directory::{RootDirectory, path_of};
use super::{RootError, Trying};

const STAGE: &str = "hardening";

/// Parts of /proc and /sys that stay to be read.
const READ_ONLY: [&str; 5] = ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs"];
/// Files that show the kernel's memory or addresses: /dev/null lies over them.
const MASKED: [&str; 7] = [
    "/proc/kcore",
    "/proc/kallsyms",
    "/proc/keys",
    "/proc/timer_list",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/kpagecgroup",
];
/// Kernel settings: (path, value).
const SETTINGS: [(&str, &str); 5] = [
    ("/proc/sys/kernel/dmesg_restrict", "1"),
    ("/proc/sys/kernel/kptr_restrict", "2"),
    ("/proc/sys/kernel/perf_event_paranoid", "3"),
    ("/proc/sys/kernel/unprivileged_bpf_disabled", "1"),
    ("/proc/sys/kernel/yama/ptrace_scope", "1"),
];
/// Directories that stay writable in memory when the root is not.
const SCRATCH: [(&str, &std::ffi::CStr); 3] =
    [("/tmp", c"mode=1777"), ("/run", c"mode=0755"), ("/var/tmp", c"mode=1777")];
/// Devices of a narrow /dev: name, major, minor.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Mounts a /dev with nothing but [`DEVICES`]: devtmpfs has the disks.
///
/// # Errors
/// As mount(2) and mknod(2).
pub fn mount_devices(root: &RootDirectory) -> Result<(), RootError> {
    let target = root.create_directories(Path::new("/dev"), 0o755).trying(STAGE, "cannot open /dev")?;
    mount("tmpfs", path_of(&target), "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, Some(c"mode=0755,size=64k"))
        .trying(STAGE, "cannot mount /dev")?;
    let directory = root.open_path(Path::new("/dev"), OFlags::DIRECTORY, 0).trying(STAGE, "cannot open /dev")?;
    for (name, major, minor) in DEVICES {
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(&directory, name, FileType::CharacterDevice, Mode::from_raw_mode(0o666), device)
            .and_then(|()| {
                rustix::fs::chmodat(&directory, name, Mode::from_raw_mode(0o666), rustix::fs::AtFlags::empty())
            })
            .trying(STAGE, "cannot make the devices")?;
    }
    rustix::fs::symlinkat("pts/ptmx", &directory, "ptmx").trying(STAGE, "cannot make /dev/ptmx")
}

/// Hardens the finished root.
///
/// # Errors
/// As mount(2).
pub fn apply(root: &RootDirectory, profile: SecurityProfile) -> Result<(), RootError> {
    if !profile.confines() {
        return Ok(());
    }
    for (path, value) in SETTINGS {
        match std::fs::write(path, value) {
            // A kernel without the setting has nothing to set.
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).trying(STAGE, path),
            _ => {}
        }
    }
    for path in READ_ONLY {
        over_itself(root, path, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC)?;
    }
    for path in MASKED {
        let Some(target) = existing(root, path)? else { continue };
        mount_bind("/dev/null", path_of(&target)).trying(STAGE, path)?;
    }
    remount(root, "/sys", MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC)?;
    if profile == SecurityProfile::Strict {
        let cgroup = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        remount(root, "/sys/fs/cgroup", cgroup)?;
        std::fs::write("/proc/sys/user/max_user_namespaces", "0").trying(STAGE, "cannot forbid user namespaces")?;
    }
    Ok(())
}

/// Mounts what stays writable when the root does not, but where the user has mounted something. Before the user's mounts.
///
/// # Errors
/// As mount(2).
pub fn mount_scratch(root: &RootDirectory, taken: impl Fn(&str) -> bool) -> Result<(), RootError> {
    for (path, data) in SCRATCH {
        if taken(path) {
            continue;
        }
        let target = root.create_directories(Path::new(path), 0o755).trying(STAGE, path)?;
        mount("tmpfs", path_of(&target), "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(data))
            .trying(STAGE, path)?;
    }
    Ok(())
}

/// Sets the flags of the root's own mount: the last thing that is done to it.
///
/// # Errors
/// As mount(2).
pub fn close_root(root: &Path, profile: SecurityProfile) -> Result<(), RootError> {
    if !profile.confines() {
        return Ok(());
    }
    // Device nodes of the image would open the disks too.
    let mut flags = MountFlags::BIND | MountFlags::NODEV | MountFlags::NOSUID;
    if profile == SecurityProfile::Strict {
        flags |= MountFlags::RDONLY;
    }
    mount_remount(root, flags, c"").trying(STAGE, "cannot close the root")
}

fn existing(root: &RootDirectory, path: &str) -> Result<Option<std::os::fd::OwnedFd>, RootError> {
    match root.open_path(Path::new(path), OFlags::PATH, 0) {
        Ok(target) => Ok(Some(target)),
        Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(None),
        Err(error) => Err(error).trying(STAGE, path),
    }
}

/// Binds a path over itself, so that it has flags of its own.
fn over_itself(root: &RootDirectory, path: &str, flags: MountFlags) -> Result<(), RootError> {
    let Some(target) = existing(root, path)? else { return Ok(()) };
    mount_bind_recursive(path_of(&target), path_of(&target)).trying(STAGE, path)?;
    remount(root, path, flags)
}

/// Changes the flags of the mount at a path.
fn remount(root: &RootDirectory, path: &str, flags: MountFlags) -> Result<(), RootError> {
    // Opened anew: a descriptor from before the mount means what lies below it.
    let Some(target) = existing(root, path)? else { return Ok(()) };
    mount_remount(path_of(&target), flags | MountFlags::BIND, c"").trying(STAGE, path)
}
