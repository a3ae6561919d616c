//! Makes the workload's root: disks by serial, EROFS below, ext4 above, an overlay of both, volumes, and the file systems and files
//! that a container user expects. Called once per boot by `agent`, before any thread exists; every step is timed and named.
//!
//! ```text
//!  /          initramfs: init and agent live here for good, out of reach of paths inside the workload's root
//!  /lower     EROFS (or ext4), read-only /upper     ext4: msb/{upper,work}, msb/volumes/*
//!  /shares    virtiofs: the host's shared directories        /disks/*   ext4 of disk volumes
//!  /workload  overlay(lower or a share, upper) ── + volumes, patches, /proc, /sys, /dev, mounts … ── moved over / ──► what sessions change to
//! ```
//!
//! The overlay is moved over `/` because the kernel refuses user namespaces to a process whose root is not the topmost mount there.

pub mod copy;
pub mod directory;
pub mod disks;
pub mod environment;
pub mod hardening;
pub mod mounts;
mod netlink;
pub mod network;
pub mod patches;
pub mod volumes;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use msb_protocol::guest::GuestConfig;
use msb_protocol::security::SecurityProfile;
use rustix::mount::{MountFlags, mount, mount_move};

use self::directory::RootDirectory;
use self::mounts::Shares;
use crate::cgroup::{self, WorkloadGroup};

/// Where the image is mounted.
const LOWER: &str = "/lower";
/// Where the writable disk is mounted.
pub const UPPER: &str = "/upper";
/// Where the overlay is put together.
const WORKLOAD: &str = "/workload";

/// The finished root.
#[derive(Debug)]
pub struct Root {
    /// The directory sessions change to.
    pub directory: RootDirectory,
    /// The workload's devpts.
    pub terminals: OwnedFd,
    /// The workload's cgroup.
    pub workload: WorkloadGroup,
    /// The writable disk's file system, then those of disk volumes.
    pub disks: Vec<OwnedFd>,
}

/// A step of the set-up that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct RootError {
    /// The step's name.
    pub stage: &'static str,
    /// What was tried.
    pub what: String,
    /// The system's answer.
    pub source: io::Error,
}

impl RootError {
    /// Whether it is about disks and mounts, and not about what is written into them.
    #[must_use]
    pub fn is_mount(&self) -> bool {
        !matches!(self.stage, "cgroup" | "identity" | "network")
    }
}

/// Names what was tried.
pub(crate) trait Trying<T> {
    /// Adds step and words to an error.
    fn trying(self, stage: &'static str, what: &str) -> Result<T, RootError>;
}

impl<T, E: Into<io::Error>> Trying<T> for Result<T, E> {
    fn trying(self, stage: &'static str, what: &str) -> Result<T, RootError> {
        self.map_err(|source| RootError { stage, what: what.to_owned(), source: source.into() })
    }
}

/// Makes the root. `step` is told the name of each step when it is done.
///
/// # Errors
/// [`RootError`] of the step that failed; the guest cannot go on then.
pub fn set_up(config: &GuestConfig, mut step: impl FnMut(&'static str)) -> Result<Root, RootError> {
    let device = if config.lower_share.is_empty() { Some(disks::find(&config.lower_serial)?) } else { None };
    let upper = disks::find(&config.upper_serial)?;
    step("disks");
    let shares = Shares::default();
    let lower = match device {
        Some(device) => {
            disks::mount_lower(&device, Path::new(LOWER))?;
            PathBuf::from(LOWER)
        }
        None => shares.path(&config.lower_share).trying("lower", "cannot use the shared directory")?,
    };
    step("lower");
    let upper = disks::mount_upper(&upper, Path::new(UPPER))?;
    step("upper");
    mount_overlay(&lower)?;
    let directory = RootDirectory::open(Path::new(WORKLOAD)).trying("overlay", "cannot open the root")?;
    step("overlay");
    volumes::bind_all(&directory, Path::new(UPPER), &config.volume_paths)?;
    step("volumes");
    if !config.patches.is_empty() {
        patches::apply(&directory, &config.patches)?;
        step("patches");
    }
    let profile = SecurityProfile::from_wire(&config.security);
    environment::mount_file_systems(&directory, profile.confines())?;
    let terminals = directory
        .open_path(Path::new("/dev/pts"), rustix::fs::OFlags::DIRECTORY, 0)
        .trying("file systems", "cannot open /dev/pts")?;
    step("file systems");
    if profile == SecurityProfile::Strict {
        let taken =
            |path: &str| config.volume_paths.iter().chain(config.mounts.iter().map(|m| &m.target)).any(|at| at == path);
        hardening::mount_scratch(&directory, taken)?;
    }
    let mut disks = vec![upper];
    if !config.mounts.is_empty() {
        disks.extend(mounts::apply(&directory, &config.mounts, &shares, owner_of_shares(&directory, config))?);
        step("mounts");
    }
    // Without a number there is no limit, which is better than no sandbox.
    let memory_max = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|meminfo| workload_memory_max(&meminfo, config.memory_reserve_bytes))
        .unwrap_or(0);
    let workload =
        WorkloadGroup::create(Path::new(cgroup::MOUNT), memory_max, || environment::mount_cgroup(&directory))
            .trying("cgroup", "cannot set up the workload's cgroup")?;
    step("cgroup");
    environment::write_files(&directory, config)?;
    environment::set_kernel(config)?;
    step("identity");
    if let Some(network) = &config.network {
        network::set_up(network)?;
        step("network");
    }
    hardening::apply(&directory, profile)?;
    hardening::close_root(Path::new(WORKLOAD), profile)?;
    mount_move(WORKLOAD, "/").trying("switch", "cannot move the root over /")?;
    step("switch");
    Ok(Root { directory, terminals, workload, disks })
}

/// The user to whom the caller's files on shared directories belong: the one that processes run as. Root if there is no such user,
/// which the first process will then complain about with the better words.
fn owner_of_shares(root: &RootDirectory, config: &GuestConfig) -> (u32, u32) {
    let read = |path: &str| root.read(Path::new(path), crate::account::FILE_LEN_MAX).unwrap_or_default();
    let user = if config.user.is_empty() { "0" } else { config.user.as_str() };
    crate::account::resolve(user, &read("/etc/passwd"), &read("/etc/group"))
        .map_or((0, 0), |identity| (identity.uid, identity.gid))
}

fn mount_overlay(lower: &Path) -> Result<(), RootError> {
    let make = |path: String| match std::fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(error) => Err(error).trying("overlay", "cannot make the writable directories"),
    };
    let upper = make(format!("{UPPER}/msb/upper"))?;
    let work = make(format!("{UPPER}/msb/work"))?;
    make(WORKLOAD.into())?;
    // redirect_dir: a directory of the image can be renamed. Hard links keep docker's meaning (a copy-up parts them).
    let lower = lower.display();
    let data = format!("lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on,metacopy=off,index=off");
    let data =
        std::ffi::CString::new(data).map_err(io::Error::from).trying("overlay", "cannot name the directories")?;
    mount("overlay", WORKLOAD, "overlay", MountFlags::empty(), Some(data.as_c_str()))
        .trying("overlay", "cannot mount the overlay")
}

/// What the workload may use, in bytes: what is left now that the kernel and the agent have theirs, less the reserve. Measured from
/// the total, the limit would lie beyond what there is: the kernel would run out before the workload's group did, and then it looks for
/// its victim in the whole machine.
fn workload_memory_max(meminfo: &str, reserve_bytes: u64) -> Option<u64> {
    let available = memory_field(meminfo, "MemAvailable")?;
    // In the smallest machines the reserve would be most of it.
    Some(available.saturating_sub(reserve_bytes).max(available / 2))
}

/// One field of /proc/meminfo in bytes.
pub fn memory_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::{memory_field, workload_memory_max};

    #[test]
    fn the_workload_gets_what_is_left_less_the_reserve_and_never_less_than_half() {
        let meminfo = |kib: u64| format!("MemTotal: 999999 kB\nMemAvailable: {kib} kB\n");
        assert_eq!(workload_memory_max(&meminfo(80 << 10), 16 << 20), Some(64 << 20));
        assert_eq!(workload_memory_max(&meminfo(20 << 10), 16 << 20), Some(10 << 20));
        assert_eq!(workload_memory_max("MemTotal: 1 kB\n", 0), None);
    }

    #[test]
    fn memory_is_read_in_bytes_by_whole_name() {
        let text =
            "MemTotal:         247000 kB\nMemFree:           10 kB\nMemAvailable:     5 kB\nHugePages_Total:       0\n";
        assert_eq!(memory_field(text, "MemTotal"), Some(247_000 * 1024));
        assert_eq!(memory_field(text, "MemAvailable"), Some(5120));
        assert_eq!((memory_field(text, "Mem"), memory_field(text, "HugePages_Total")), (None, None));
    }
}
