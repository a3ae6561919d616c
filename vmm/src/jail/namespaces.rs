//! A user and a mount namespace of the process's own, in which there is nothing but its own directories.
//!
//! ```text
//!  enter()              one thread    user namespace (not as root), mount namespace: everything still looks as it did
//!  detached(fd)                       a shared directory as a mount of its own: above its root there is nothing
//!  hide(plan)           jail closes   an empty root, with the plan's paths mounted in it; what was there before is let go
//!  drop_capabilities()  each thread   none is left, but those that files of others need where root shares directories
//! ```
//!
//! * The user namespace is what lets an ordinary user have the other; its capabilities mean nothing outside. Root has one for the taking,
//!   and a user namespace in which root is root would hold it no better than losing every capability does.
//! * Landlock judges what is opened by path; this is the second line where it is missing, and the first for what it does not judge (stat, chdir).
//!
//! Called by `main`, by the process that becomes QEMU, and by the jail. It never makes a host's refusal an error: what cannot be had is told
//! in the report. Sources: user_namespaces(7), mount_namespaces(7), pivot_root(2), open_tree(2), mount_setattr(2).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::{FilePlan, JailError, JailReport};

/// What keeps ordinary users of Ubuntu from user namespaces: they may make one and find themselves without rights in it.
const APPARMOR_RESTRICTS: &str = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns";
/// Of the files that root shares, many are somebody else's.
pub(super) const FILES_OF_OTHERS: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID);

/// Which namespaces this process has of its own, or why none.
static ENTERED: Mutex<Result<Kind, String>> = Mutex::new(Err(String::new()));

/// Which namespaces were to be had.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// Of an ordinary user: both.
    UserAndMount,
    /// Of root.
    Mount,
}

/// Moves this process, which has one thread, into namespaces of its own, where the host lets it.
pub fn enter() {
    *entered() = try_enter().map_err(|error| error.to_string());
}

/// Leaves this process its root, although it has a mount namespace: a child shares it and would lose its own. Without one nothing changes.
pub fn keep_root(why: String) {
    let mut entered = entered();
    if entered.is_ok() {
        *entered = Err(why);
    }
}

fn entered() -> MutexGuard<'static, Result<Kind, String>> {
    ENTERED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn try_enter() -> io::Result<Kind> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    if user.is_root() {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // Or what is mounted here would be mounted in the host, too.
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        return Ok(Kind::Mount);
    }
    if fs::read(APPARMOR_RESTRICTS).is_ok_and(|text| text.starts_with(b"1")) {
        return Err(io::Error::other(
            "AppArmor keeps ordinary users from it (kernel.apparmor_restrict_unprivileged_userns)",
        ));
    }
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    // Who is not mapped is nobody to itself, and the same to everybody else: nothing is lost when one of these fails but the namespaces' use.
    fs::write("/proc/self/setgroups", "deny")?;
    let (user, group) = (user.as_raw(), group.as_raw());
    fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1"))?;
    Ok(Kind::UserAndMount)
}

/// A mount of a directory or file and of what is mounted below it, that is nowhere but in this descriptor: no path leads up and out of it, no
/// device and no program in it is one, and the kernel itself refuses to write if it is only read. Where the host makes none it is `root`.
pub fn detached(root: OwnedFd, read_only: bool) -> OwnedFd {
    if entered().is_err() {
        return root;
    }
    let only_read = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let attributes = only_read | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let mounted = clone_tree(&root, Path::new("")).map_err(io::Error::from);
    match mounted.and_then(|mounted| restrict(&mounted, attributes).map(|()| mounted)) {
        Ok(mounted) => mounted,
        Err(error) => {
            tracing::warn!(%error, "a shared directory is no mount of its own");
            root
        }
    }
}

fn clone_tree(at: impl std::os::fd::AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // An empty path is the descriptor itself.
    open_tree(at, path, flags | OpenTreeFlags::AT_RECURSIVE | OpenTreeFlags::AT_EMPTY_PATH)
}

#[expect(unsafe_code, reason = "mount_setattr has no wrapper")]
fn restrict(mounted: &OwnedFd, attributes: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is an empty C string and the structure lives through the call, which reads as many bytes of it as its size says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mounted.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the files and directories of the plan all that this process can see, and tells whether they are.
///
/// # Errors
/// The kernel gives up half-way, when the process sees neither the old nor the new.
pub(super) fn hide(plan: &FilePlan, report: &mut JailReport) -> Result<(), JailError> {
    let kind = match &*entered() {
        Ok(kind) => *kind,
        Err(error) => {
            report.missing.push(format!("user and mount namespace: {error}"));
            return Ok(());
        }
    };
    let root = match new_root(&plan.paths()) {
        Ok(root) => root,
        Err(error) => {
            report.missing.push(format!("mount namespace of its own files: {error}"));
            return Ok(());
        }
    };
    become_root(&root).map_err(|errno| JailError::Process { what: "mount namespace", source: errno.into() })?;
    let namespaces = match kind {
        Kind::UserAndMount => "user and mount namespace",
        Kind::Mount => "mount namespace",
    };
    report.in_force.push(format!("{namespaces} of its own files"));
    Ok(())
}

/// An empty file system with these paths in it, mounted over the root. Nobody sees it there, whole or not: the root of a process is what lies below.
fn new_root(paths: &[&Path]) -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    for path in paths {
        // A path that is not there is not needed.
        match clone_tree(CWD, path) {
            Ok(mounted) => place(&root, path, &mounted)?,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(root)
}

/// Makes it the root of this process, all of its threads included, and lets go of the one before (pivot_root(2)).
fn become_root(root: &OwnedFd) -> rustix::io::Result<()> {
    rustix::process::fchdir(root)?;
    // The old one comes to lie upon it, and is taken away from there.
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_remount("/", flags, "")
}

/// Mounts something in the new root, at its old path.
fn place(root: &OwnedFd, path: &Path, mounted: &OwnedFd) -> io::Result<()> {
    let relative = path.strip_prefix("/").map_err(io::Error::other)?;
    let is_directory = FileType::from_raw_mode(fstat(mounted)?.st_mode) == FileType::Directory;
    let directory = if is_directory { Some(relative) } else { relative.parent() };
    let mut made = PathBuf::new();
    for name in directory.into_iter().flatten() {
        made.push(name);
        match mkdirat(root, &made, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if !is_directory {
        openat(root, relative, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;
    }
    Ok(move_mount(mounted, "", root, relative, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Takes every capability but these from the calling thread. A program that is executed after it has no others either, root's included, where
/// no_new_privs is set (capabilities(7)).
pub(super) fn drop_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let kept = capabilities(None)?.permitted & kept;
    Ok(set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?)
}
