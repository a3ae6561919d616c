//! Disks and shared directories of volumes: checked, opened and made into devices. Called by `launch::machine`.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::vmm::{DiskSpec, ShareSpec, VmSpec};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags, ResolveFlags, flock, openat2};

use super::machine::{failed, invalid, open_upper};
use crate::devices::virtio::block::storage::{Concatenation, SparseFile, Storage};
use crate::devices::virtio::block::{Block, BlockOptions, DiskFullObserver};
use crate::devices::virtio::event_loop::LoopHandle;
use crate::devices::virtio::fs::{Fs, Share};
use crate::jail::{ThreadClass, namespaces};

/// Shares of one machine at most.
const SHARES_MAX: usize = 64;
/// Bytes of a virtio serial.
const SERIAL_BYTES: usize = 20;
/// A disk's length is whole sectors.
const SECTOR_BYTES: u64 = 512;

/// A shared directory or file as the jail is told of it: by its open descriptor, so that it is the one that is shared.
#[derive(Clone, Debug)]
pub struct SharedPath {
    /// A path that means the descriptor.
    pub path: PathBuf,
    /// Whether it may only be read.
    pub read_only: bool,
}

/// The device of all shares.
pub(super) struct Shared {
    pub(super) device: Fs,
    pub(super) event_loop: LoopHandle,
    pub(super) paths: Vec<SharedPath>,
}

/// A volume's disk.
pub(super) struct Disk {
    pub(super) device: Block,
    pub(super) event_loop: LoopHandle,
}

/// Checks names and paths, touching nothing.
pub(super) fn check(spec: &VmSpec) -> Result<(), ApiError> {
    if spec.shares.len() > SHARES_MAX {
        return Err(invalid(format!("{} shared directories are too many (at most {SHARES_MAX})", spec.shares.len())));
    }
    for (index, share) in spec.shares.iter().enumerate() {
        let plain =
            !share.name.is_empty() && share.name.len() <= 32 && share.name.bytes().all(|b| b.is_ascii_alphanumeric());
        if !plain || spec.shares[..index].iter().any(|other| other.name == share.name) || !share.path.is_absolute() {
            return Err(invalid(format!("{:?} is no share", share.name)));
        }
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        let fits = !disk.serial.is_empty() && disk.serial.len() <= SERIAL_BYTES;
        if !fits || spec.disks[..index].iter().any(|other| other.serial == disk.serial) || !disk.path.is_absolute() {
            return Err(invalid(format!("{:?} is no disk", disk.serial)));
        }
    }
    Ok(())
}

/// Opens every share. A link on the way to one is refused: the daemon has given the path without any, so somebody has put it there since.
pub(super) fn open_shares(shares: &[ShareSpec]) -> Result<Option<Shared>, ApiError> {
    if shares.is_empty() {
        return Ok(None);
    }
    let (mut opened, mut paths) = (Vec::with_capacity(shares.len()), Vec::with_capacity(shares.len()));
    for ShareSpec { name, path, read_only, is_root_owned, quota_bytes } in shares {
        let error = |errno: rustix::io::Errno| failed("shared directory", path, &errno.into());
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root: OwnedFd =
            openat2(rustix::fs::CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS).map_err(error)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&root).map_err(error)?.st_mode);
        if !matches!(kind, FileType::Directory | FileType::RegularFile) {
            return Err(invalid(format!("{} is neither a directory nor a regular file", path.display())));
        }
        let root = namespaces::detached(root, *read_only);
        paths.push(SharedPath {
            path: PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd())),
            read_only: *read_only,
        });
        let share =
            Share::new(name.clone(), root, *read_only).map_err(|error| failed("shared directory", path, &error))?;
        opened.push(share.root_owned(*is_root_owned).quota(*quota_bytes));
    }
    let event_loop = LoopHandle::start_as("fs", ThreadClass::Share).map_err(ApiError::internal)?;
    // The guest's kernel has applied the masks of its programs already.
    event_loop.clear_mode_mask().map_err(ApiError::internal)?;
    Ok(Some(Shared { device: Fs::new(opened, event_loop.clone()), event_loop, paths }))
}

/// Opens every disk. One that may be written has one user at a time; those that are only read may have many.
pub(super) fn open_disks(
    disks: &[DiskSpec],
    full_timeout: Duration,
    on_disk_full: &DiskFullObserver,
) -> Result<Vec<Disk>, ApiError> {
    disks
        .iter()
        .map(|DiskSpec { serial, path, read_only }| {
            let error = |error: std::io::Error| failed("disk", path, &error);
            let storage: Box<dyn Storage> = if *read_only {
                let file = File::open(path).map_err(error)?;
                flock(&file, FlockOperation::NonBlockingLockShared).map_err(|_| {
                    let message = format!("the disk {} is being written by another sandbox", path.display());
                    ApiError::new(ErrorCode::VolumeInUse, message)
                })?;
                let len_bytes = file.metadata().map_err(error)?.len();
                Box::new(Concatenation::new(vec![(file, len_bytes - len_bytes % SECTOR_BYTES)]))
            } else {
                let file = open_upper(path).map_err(|error| match error.code {
                    ErrorCode::SandboxBusy => ApiError::new(
                        ErrorCode::VolumeInUse,
                        format!("the disk {} is in use by another sandbox", path.display()),
                    ),
                    _ => error,
                })?;
                Box::new(SparseFile::new(file).map_err(error)?)
            };
            let event_loop = LoopHandle::start(&format!("blk-{serial}")).map_err(ApiError::internal)?;
            let on_disk_full = (!read_only).then(|| Arc::clone(on_disk_full));
            let options = BlockOptions { serial: serial.clone(), full_timeout, on_disk_full };
            Ok(Disk { device: Block::new(storage, options, event_loop.clone()), event_loop })
        })
        .collect()
}
