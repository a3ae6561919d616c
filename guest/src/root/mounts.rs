//! The user's mounts over the root: memory, shared directories, disks. Called by `root::set_up`, parents before what lies inside them.

use std::cell::Cell;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use msb_protocol::guest::{GuestMount, GuestMountSource};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount, mount_bind, mount_remount};

use super::directory::{RootDirectory, path_of};
use super::{RootError, Trying, disks};

const STAGE: &str = "mounts";
/// Most mounts of one guest.
const MOUNTS_MAX: usize = 64;
/// Where the shared file system is mounted for the agent, out of the workload's sight.
pub const SHARES: &str = "/shares";
/// The tag of the one shared file system.
const SHARES_TAG: &str = "msb";
/// Where disks are mounted for the agent.
const DISKS: &str = "/disks";

/// Mounts everything; gives the roots of disks, which are flushed at the end.
///
/// # Errors
/// As mount(2), naming the target.
pub fn apply(
    root: &RootDirectory,
    mounts: &[GuestMount],
    shares: &Shares,
    owner: (u32, u32),
) -> Result<Vec<OwnedFd>, RootError> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    if mounts.len() > MOUNTS_MAX {
        return Err(invalid()).trying(STAGE, "too many mounts");
    }
    let mut order: Vec<&GuestMount> = mounts.iter().collect();
    order.sort_by_key(|mount| parts(&mount.target));
    if order.iter().any(|mount| matches!(mount.source, Some(GuestMountSource::Share(_)))) {
        shares.set_owner(owner).trying(STAGE, "cannot mount the shared directories (virtiofs)")?;
    }
    let mut flushed = Vec::new();
    for mount in order {
        let flags = flags(&mount.options).ok_or_else(invalid).trying(STAGE, "cannot read the options")?;
        let what = format!("cannot mount {}", mount.target);
        if parts(&mount.target).is_empty() {
            return Err(invalid()).trying(STAGE, &what);
        }
        match &mount.source {
            Some(GuestMountSource::Tmpfs(size_bytes)) => {
                tmpfs(root, &mount.target, *size_bytes, flags).trying(STAGE, &what)?
            }
            Some(GuestMountSource::Share(name)) => {
                shares.path(name).and_then(|source| share(root, &mount.target, &source, flags)).trying(STAGE, &what)?
            }
            Some(GuestMountSource::Disk(serial)) => flushed.push(disk(root, &mount.target, serial, flags)?),
            None => return Err(invalid()).trying(STAGE, &what),
        }
    }
    Ok(flushed)
}

/// The names on the way to a target. Sorted by them, a parent comes before what lies inside it.
fn parts(target: &str) -> Vec<String> {
    Path::new(target)
        .components()
        .filter_map(|part| if let Component::Normal(name) = part { name.to_str().map(String::from) } else { None })
        .collect()
}

/// The flags of an option list; none for a word that is no option.
fn flags(options: &str) -> Option<MountFlags> {
    options.split(',').try_fold(MountFlags::empty(), |flags, word| {
        Some(match word {
            "" | "rw" => flags,
            "ro" => flags | MountFlags::RDONLY,
            "noexec" => flags | MountFlags::NOEXEC,
            "nosuid" => flags | MountFlags::NOSUID,
            "nodev" => flags | MountFlags::NODEV,
            _ => return None,
        })
    })
}

fn tmpfs(root: &RootDirectory, target: &str, size_bytes: u64, flags: MountFlags) -> io::Result<()> {
    let target = root.create_directories(Path::new(target), 0o755)?;
    let size = if size_bytes > 0 { format!(",size={size_bytes}") } else { String::new() };
    let data = CString::new(format!("mode=1777{size}"))?;
    mount("tmpfs", path_of(&target), "tmpfs", flags, Some(data.as_c_str()))?;
    Ok(())
}

/// The one shared file system, mounted when the first share of it is needed.
#[derive(Debug, Default)]
pub struct Shares {
    is_mounted: Cell<bool>,
}

impl Shares {
    fn mount(&self) -> io::Result<()> {
        if !self.is_mounted.replace(true) {
            fs::create_dir_all(SHARES)?;
            mount(SHARES_TAG, SHARES, "virtiofs", MountFlags::empty(), None)?;
        }
        Ok(())
    }

    /// Where a share is.
    ///
    /// # Errors
    /// As mount(2), or a name that is none.
    pub fn path(&self, name: &str) -> io::Result<PathBuf> {
        self.mount()?;
        Ok(Path::new(SHARES).join(Path::new(name).file_name().ok_or(io::ErrorKind::InvalidInput)?))
    }

    /// Tells the server which user of the guest the caller's files belong to.
    fn set_owner(&self, (uid, gid): (u32, u32)) -> io::Result<()> {
        self.mount()?;
        let owner = format!("{uid}:{gid}");
        rustix::fs::setxattr(SHARES, "user.msb.owner", owner.as_bytes(), rustix::fs::XattrFlags::empty())?;
        Ok(())
    }
}

fn share(root: &RootDirectory, target: &str, source: &Path, flags: MountFlags) -> io::Result<()> {
    let path = Path::new(target);
    let is_directory = fs::metadata(source)?.is_dir();
    let over = if is_directory {
        root.create_directories(path, 0o755)?
    } else {
        // What is there already stays as it is under the mount.
        if root.open_path(path, OFlags::PATH, 0).is_err() {
            root.write(path, b"", 0o644)?;
        }
        root.open_path(path, OFlags::PATH, 0)?
    };
    mount_bind(source, path_of(&over))?;
    // A bind takes its flags from the source; its own come with a second call.
    let mounted = root.open_path(path, OFlags::PATH, 0)?;
    mount_remount(path_of(&mounted), flags | MountFlags::BIND, c"")?;
    Ok(())
}

fn disk(root: &RootDirectory, target: &str, serial: &str, flags: MountFlags) -> Result<OwnedFd, RootError> {
    let device = disks::find(serial)?;
    let place: PathBuf = Path::new(DISKS).join(device.file_name().unwrap_or_default());
    let read_only = flags.contains(MountFlags::RDONLY);
    let opened = disks::mount_volume(&device, &place, read_only)?;
    let what = format!("cannot mount {target}");
    let over = root.create_directories(Path::new(target), 0o755).trying(STAGE, &what)?;
    mount_bind(&place, path_of(&over)).trying(STAGE, &what)?;
    let mounted = root.open_path(Path::new(target), OFlags::PATH, 0).trying(STAGE, &what)?;
    mount_remount(path_of(&mounted), flags | MountFlags::BIND, c"").trying(STAGE, &what)?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_before_what_lies_inside_them() {
        let mut targets = ["/a/b/c", "/a-b", "/a", "/z", "/a/b"];
        targets.sort_by_key(|target| parts(target));
        assert_eq!(targets, ["/a", "/a/b", "/a/b/c", "/a-b", "/z"]);
    }

    #[test]
    fn options_are_flags_and_nothing_else() {
        assert_eq!(flags("rw"), Some(MountFlags::empty()));
        assert_eq!(flags("ro,nodev"), Some(MountFlags::RDONLY | MountFlags::NODEV));
        assert_eq!(flags("ro,suid"), None);
    }
}
