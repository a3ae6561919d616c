//! The two disks: found by virtio serial, mounted, and the writable one grown to its device while mounted. Called by `root::set_up`.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};

use super::{RootError, Trying};
use crate::sys;

/// How long a disk may take to appear after the kernel's start.
const APPEAR_LIMIT: Duration = Duration::from_secs(3);
/// Where the superblock of ext4 begins, in bytes.
const SUPERBLOCK_OFFSET: u64 = 1024;
/// `s_magic` of ext4.
const EXT4_MAGIC: u16 = 0xef53;

/// Finds the block device with a virtio serial.
///
/// # Errors
/// Not found within [`APPEAR_LIMIT`]; the error lists the serials that exist.
pub fn find(serial: &str) -> Result<PathBuf, RootError> {
    let until = Instant::now() + APPEAR_LIMIT;
    loop {
        let seen = serials();
        if let Some((name, _)) = seen.iter().find(|(_, found)| found == serial) {
            return Ok(Path::new("/dev").join(name));
        }
        if Instant::now() >= until {
            let serials =
                seen.iter().map(|(name, serial)| format!("{name} has '{serial}'")).collect::<Vec<_>>().join(", ");
            let error =
                io::Error::new(io::ErrorKind::NotFound, format!("no disk has the serial '{serial}' ({serials})"));
            return Err(error).trying("disks", "cannot find a disk");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Names and serials of all virtio disks.
fn serials() -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("vd"))
        .filter_map(|name| {
            let serial = fs::read_to_string(format!("/sys/block/{name}/serial")).ok()?;
            Some((name, serial.trim_end_matches(['\n', '\0']).to_owned()))
        })
        .collect()
}

/// Mounts the image: EROFS, as msb writes it, or ext4 where the user brought a disk. A journal that was not emptied is not replayed.
///
/// # Errors
/// As mount(2).
pub fn mount_lower(device: &Path, target: &Path) -> Result<(), RootError> {
    fs::create_dir_all(target).trying("lower", "cannot make the mount point")?;
    let mut superblock = [0; 1024];
    let is_ext4 = fs::File::open(device)
        .and_then(|file| file.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET))
        .is_ok_and(|()| parse_superblock(&superblock).is_some());
    let (kind, options) = if is_ext4 { ("ext4", Some(c"noload")) } else { ("erofs", None) };
    mount(device, target, kind, MountFlags::RDONLY, options)
        .trying("lower", if is_ext4 { "cannot mount the root (ext4)" } else { "cannot mount the root (erofs)" })
}

/// Mounts the writable disk and grows its file system to the device. Gives its root directory.
///
/// # Errors
/// As mount(2); growing is refused by a file system without the room for it.
pub fn mount_upper(device: &Path, target: &Path) -> Result<OwnedFd, RootError> {
    mount_ext4("upper", device, target, false)
}

/// Mounts the disk of a volume, as [`mount_upper`].
///
/// # Errors
/// As [`mount_upper`].
pub fn mount_volume(device: &Path, target: &Path, read_only: bool) -> Result<OwnedFd, RootError> {
    mount_ext4("mounts", device, target, read_only)
}

fn mount_ext4(stage: &'static str, device: &Path, target: &Path, read_only: bool) -> Result<OwnedFd, RootError> {
    fs::create_dir_all(target).trying(stage, "cannot make the mount point")?;
    // discard: what is deleted frees the host's disk. noinit_itable: the device reads zeros where nothing was written, so writing
    // zeros in the background would only make the sparse file grow. noload: a device that cannot be written cannot replay its journal.
    let (flags, data) = if read_only {
        (MountFlags::RDONLY, c"noload,errors=remount-ro")
    } else {
        (MountFlags::empty(), c"discard,noinit_itable,errors=remount-ro")
    };
    mount(device, target, "ext4", flags, Some(data)).trying(stage, "cannot mount a disk (ext4)")?;
    let directory = OwnedFd::from(fs::File::open(target).trying(stage, "cannot open a disk")?);
    if read_only {
        return Ok(directory);
    }
    let size = size_of_file_system(device).trying(stage, "cannot read the superblock")?;
    let device_blocks = device_len(device).trying(stage, "cannot read the size of a disk")? / size.block_len;
    if device_blocks > size.blocks {
        sys::grow_ext4(&directory, device_blocks).trying(stage, "cannot grow a disk")?;
    }
    Ok(directory)
}

/// Length of a block device in bytes.
fn device_len(device: &Path) -> io::Result<u64> {
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let sectors = fs::read_to_string(format!("/sys/block/{name}/size"))?;
    let sectors: u64 = sectors.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(sectors.saturating_mul(512))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    blocks: u64,
    block_len: u64,
}

fn size_of_file_system(device: &Path) -> io::Result<Size> {
    let mut superblock = [0; 1024];
    fs::File::open(device)?.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET)?;
    parse_superblock(&superblock).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an ext4 superblock"))
}

/// Blocks and block length of an ext4 superblock (kernel documentation, filesystems/ext4/super).
fn parse_superblock(superblock: &[u8; 1024]) -> Option<Size> {
    let word = |at: usize| superblock.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
    let magic = superblock.get(0x38..0x3a).and_then(|bytes| bytes.try_into().ok()).map(u16::from_le_bytes)?;
    let shift = word(0x18).filter(|shift| *shift <= 6)?;
    // INCOMPAT_64BIT: the upper half of the count is valid.
    let high = if word(0x60)? & 0x80 != 0 { word(0x150)? } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(word(0x4)?);
    (magic == EXT4_MAGIC).then_some(Size { blocks, block_len: 1024 << shift })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_are_checked_before_they_are_believed() {
        let mut superblock = [0; 1024];
        assert_eq!(parse_superblock(&superblock), None);
        superblock[0x38..0x3a].copy_from_slice(&EXT4_MAGIC.to_le_bytes());
        superblock[0x4..0x8].copy_from_slice(&7u32.to_le_bytes());
        superblock[0x18] = 2;
        superblock[0x150] = 1;
        assert_eq!(parse_superblock(&superblock), Some(Size { blocks: 7, block_len: 4096 }));
        superblock[0x60] = 0x80;
        assert_eq!(parse_superblock(&superblock), Some(Size { blocks: (1 << 32) + 7, block_len: 4096 }));
        superblock[0x18] = 60;
        assert_eq!(parse_superblock(&superblock), None);
    }
}
