//! The requests that change something. Each asks [`Server::writable`] first.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::attributes::{self, Change, Stat, host_mode, host_stat, key_of, path_of};
use super::nodes::{TOP, open_entry};
use super::quota::ENTRY_BYTES;
use super::server::{Handle, Outcome, Server};
use super::wire::{self, Header, Reader};

/// Bits of `fuse_setattr_in.valid`.
const MODE: u32 = 1;
const UID: u32 = 1 << 1;
const GID: u32 = 1 << 2;
const SIZE: u32 = 1 << 3;
const ACCESS_TIME: u32 = 1 << 4;
const MODIFICATION_TIME: u32 = 1 << 5;
const BY_HANDLE: u32 = 1 << 6;
const ACCESS_NOW: u32 = 1 << 7;
const MODIFICATION_NOW: u32 = 1 << 8;
const KILL_SET_ID: u32 = 1 << 11;
/// Most bytes of a value that a guest may give an extended attribute.
const XATTR_BYTES_MAX: usize = 64 << 10;
/// Type and permissions.
const MODE_MASK: u32 = 0o177_777;
/// Longest text of a link (PATH_MAX).
const LINK_LEN_MAX: usize = 4096;

/// A descriptor that only means an open file: what the guest knows it by must not keep it open for writing.
fn as_path(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path_of(file.as_fd()), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

impl Server {
    /// Requests that change something; whatever is left is not spoken.
    pub(super) fn change(&mut self, header: &Header, reader: &mut Reader<'_>) -> Outcome {
        match header.opcode {
            wire::SETATTR => self.set_attributes(header.node, reader),
            wire::CREATE => self.create(header, reader),
            wire::MKNOD => self.make_node(header, reader),
            wire::MKDIR => self.make_directory(header, reader),
            wire::SYMLINK => self.make_link(header, reader),
            wire::LINK => self.link(header.node, reader),
            wire::UNLINK => self.remove(header.node, reader, AtFlags::empty()),
            wire::RMDIR => self.remove(header.node, reader, AtFlags::REMOVEDIR),
            wire::RENAME => {
                let to = reader.u64()?;
                self.rename(header.node, to, 0, reader)
            }
            wire::RENAME2 => {
                let (to, flags) = (reader.u64()?, reader.u32()?);
                reader.skip(4)?;
                self.rename(header.node, to, flags, reader)
            }
            wire::SETXATTR => self.set_xattr(header.node, reader),
            wire::REMOVEXATTR => {
                self.writable(header.node)?;
                let (file, name) = self.xattr(header.node, reader.text()?)?;
                rustix::fs::removexattr(path_of(file.as_fd()), name)?;
                Ok(Vec::new())
            }
            wire::FALLOCATE => self.allocate(reader),
            _ => Err(Errno::NOSYS),
        }
    }

    fn set_attributes(&mut self, number: u64, reader: &mut Reader<'_>) -> Outcome {
        let valid = reader.u32()?;
        reader.skip(4)?;
        let (handle, size) = (reader.u64()?, reader.u64()?);
        reader.skip(8)?;
        let (accessed, modified) = (reader.u64()?, reader.u64()?);
        reader.skip(8)?;
        let (accessed_nanoseconds, modified_nanoseconds) = (reader.u32()?, reader.u32()?);
        reader.skip(4)?;
        let mode = reader.u32()?;
        reader.skip(4)?;
        let (uid, gid) = (reader.u32()?, reader.u32()?);
        let file = self.writable(number)?;
        let given = |bit: u32, value: u32| (valid & bit != 0).then_some(value);
        let change = Change { mode: given(MODE, mode), uid: given(UID, uid), gid: given(GID, gid) };
        let mut known = None;
        if change.mode.is_some() || change.uid.is_some() || change.gid.is_some() {
            known = Some(attributes::change(file.as_fd(), change, &self.owner)?);
        }
        if valid & (SIZE | ACCESS_TIME | MODIFICATION_TIME) != 0 {
            known = None;
        }
        if valid & SIZE != 0 {
            let share = self.nodes.get(number)?.share;
            self.counted(share, file.as_fd(), |server| {
                if valid & BY_HANDLE != 0 {
                    rustix::fs::ftruncate(&server.handle(handle)?.file, size)
                } else {
                    rustix::fs::ftruncate(server.reopen(number, OFlags::WRONLY)?, size)
                }
            })?;
            if valid & KILL_SET_ID != 0 {
                attributes::strip_set_id(file.as_fd(), &self.owner);
            }
        }
        if valid & (ACCESS_TIME | MODIFICATION_TIME) != 0 {
            let time = |given: u32, now: u32, seconds: u64, nanoseconds: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: match (valid & given != 0, valid & now != 0) {
                    (false, _) => rustix::fs::UTIME_OMIT,
                    (true, true) => rustix::fs::UTIME_NOW,
                    (true, false) => i64::from(nanoseconds.min(999_999_999)),
                },
            };
            let times = Timestamps {
                last_access: time(ACCESS_TIME, ACCESS_NOW, accessed, accessed_nanoseconds),
                last_modification: time(MODIFICATION_TIME, MODIFICATION_NOW, modified, modified_nanoseconds),
            };
            rustix::fs::utimensat(CWD, path_of(file.as_fd()), &times, AtFlags::empty())?;
        }
        let Some((stat, shown)) = known else { return self.get_attributes(number) };
        let mut out = Vec::with_capacity(104);
        wire::put_attributes(&mut out, &attributes::told(&stat, shown));
        Ok(out)
    }

    /// A directory in which something may be made, now that there is room for it.
    fn room_in(&mut self, directory: u64) -> Result<Arc<OwnedFd>, Errno> {
        let file = self.writable(directory)?;
        let share = self.nodes.get(directory)?.share;
        self.admit(share, ENTRY_BYTES)?;
        if let Some(quota) = self.quota(share) {
            quota.changed(0, ENTRY_BYTES);
            // It may take less, or come to nothing.
            quota.freed();
        }
        Ok(file)
    }

    /// Tells the guest of what it has just made, and remembers who made it.
    fn made(&mut self, header: &Header, name: &[u8], file: OwnedFd, mode: u32, device: u32) -> Outcome {
        let wanted = Stat { uid: header.uid, gid: header.gid, mode: mode & MODE_MASK, device };
        let (stat, shown) = match attributes::adopt(file.as_fd(), wanted, &self.owner) {
            Ok(adopted) => adopted,
            Err(errno) => {
                // A pipe or a device that the file system cannot remember would be an ordinary file.
                let directory = self.nodes.file(header.node)?;
                let _ = rustix::fs::unlinkat(directory.as_fd(), name, AtFlags::empty());
                return Err(errno);
            }
        };
        let (number, _) = self.nodes.tell(header.node, name, file, &stat)?;
        let mut out = Vec::with_capacity(wire::ENTRY_BYTES + 16);
        wire::put_entry(&mut out, number, &attributes::told(&stat, shown));
        Ok(out)
    }

    fn create(&mut self, header: &Header, reader: &mut Reader<'_>) -> Outcome {
        let (flags, mode) = (reader.u32()?, reader.u32()?);
        reader.skip(8)?;
        let name = reader.name()?;
        let directory = self.room_in(header.node)?;
        let share = self.nodes.get(header.node)?.share;
        let exclusive = OFlags::from_bits_retain(flags).contains(OFlags::EXCL);
        let flags = self.open_flags(share, flags)?;
        let make = flags | OFlags::CREATE | OFlags::EXCL;
        let (mut out, file) = match open_entry(directory.as_fd(), name, make, host_mode(mode, false)) {
            Ok(file) => {
                let mode = FileType::RegularFile.as_raw_mode() | mode & 0o7777;
                (self.made(header, name, as_path(&file)?, mode, 0)?, file)
            }
            // Somebody on the host was faster: it is opened as if it had been there.
            Err(Errno::EXIST) if !exclusive => {
                let (number, attributes) = self.find(header.node, name)?;
                let mut out = Vec::with_capacity(wire::ENTRY_BYTES + 16);
                wire::put_entry(&mut out, number, &attributes);
                (out, self.reopen(number, flags)?)
            }
            Err(errno) => return Err(errno),
        };
        let number = out.get(..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes);
        out.extend(self.keep_open(file, number, share, false)?);
        Ok(out)
    }

    fn make_node(&mut self, header: &Header, reader: &mut Reader<'_>) -> Outcome {
        let (mode, device) = (reader.u32()?, reader.u32()?);
        reader.skip(8)?;
        let name = reader.name()?;
        let directory = self.room_in(header.node)?;
        let kind = FileType::from_raw_mode(mode);
        let known =
            [FileType::RegularFile, FileType::CharacterDevice, FileType::BlockDevice, FileType::Fifo, FileType::Socket];
        if !known.contains(&kind) {
            return Err(Errno::INVAL);
        }
        // Whatever it is to the guest, on the host it is an empty file.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let file = open_entry(directory.as_fd(), name, flags, host_mode(mode, false))?;
        self.made(header, name, as_path(&file)?, mode, device)
    }

    fn make_directory(&mut self, header: &Header, reader: &mut Reader<'_>) -> Outcome {
        let mode = reader.u32()?;
        reader.skip(4)?;
        let name = reader.name()?;
        let directory = self.room_in(header.node)?;
        rustix::fs::mkdirat(directory.as_fd(), name, Mode::from_raw_mode(host_mode(mode, true)))?;
        let file = open_entry(directory.as_fd(), name, OFlags::PATH, 0)?;
        self.made(header, name, file, FileType::Directory.as_raw_mode() | mode & 0o7777, 0)
    }

    fn make_link(&mut self, header: &Header, reader: &mut Reader<'_>) -> Outcome {
        let (name, target) = (reader.name()?, reader.text()?);
        if target.len() >= LINK_LEN_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let directory = self.room_in(header.node)?;
        rustix::fs::symlinkat(target, directory.as_fd(), name)?;
        self.look_up(header.node, name)
    }

    fn link(&mut self, to: u64, reader: &mut Reader<'_>) -> Outcome {
        let from = reader.u64()?;
        let name = reader.name()?;
        let (file, directory) = (self.writable(from)?, self.writable(to)?);
        if self.nodes.get(from)?.share != self.nodes.get(to)?.share {
            return Err(Errno::XDEV);
        }
        rustix::fs::linkat(CWD, path_of(file.as_fd()), directory.as_fd(), name, AtFlags::SYMLINK_FOLLOW)?;
        self.look_up(to, name)
    }

    fn freed(&mut self, node: u64) -> Result<(), Errno> {
        let share = self.nodes.get(node)?.share;
        if let Some(quota) = self.quota(share) {
            quota.freed();
        }
        Ok(())
    }

    fn remove(&mut self, parent: u64, reader: &mut Reader<'_>, flags: AtFlags) -> Outcome {
        let name = reader.name()?;
        let directory = self.writable(parent)?;
        rustix::fs::unlinkat(directory.as_fd(), name, flags)?;
        self.freed(parent)?;
        Ok(Vec::new())
    }

    fn rename(&mut self, from: u64, to: u64, flags: u32, reader: &mut Reader<'_>) -> Outcome {
        let (old, new) = (reader.name()?, reader.name()?);
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let (source, target) = (self.writable(from)?, self.writable(to)?);
        let share = self.nodes.get(from)?.share;
        if share != self.nodes.get(to)?.share {
            return Err(Errno::XDEV);
        }
        let key = |directory: &std::os::fd::OwnedFd, name: &[u8]| {
            let file = open_entry(directory.as_fd(), name, OFlags::PATH, 0).ok()?;
            let (device, inode) = key_of(&host_stat(file.as_fd()).ok()?);
            Some((share, device, inode))
        };
        let moved = key(&source, old);
        let exchanged = if flags.contains(RenameFlags::EXCHANGE) { key(&target, new) } else { None };
        if flags.is_empty() {
            rustix::fs::renameat(source.as_fd(), old, target.as_fd(), new)?;
        } else {
            rustix::fs::renameat_with(source.as_fd(), old, target.as_fd(), new, flags)?;
        }
        // What had the new name may be gone.
        self.freed(to)?;
        if let Some(moved) = moved {
            self.nodes.renamed(moved, to, new);
        }
        if let Some(exchanged) = exchanged {
            self.nodes.renamed(exchanged, from, old);
        }
        Ok(Vec::new())
    }

    fn set_xattr(&mut self, number: u64, reader: &mut Reader<'_>) -> Outcome {
        let (size, flags) = (reader.u32()? as usize, reader.u32()?);
        let name = reader.text()?;
        let value = reader.rest().get(..size).filter(|value| value.len() <= XATTR_BYTES_MAX).ok_or(Errno::INVAL)?;
        if number == TOP && name == b"user.msb.owner" {
            return self.set_owner(value);
        }
        self.writable(number)?;
        let share = self.nodes.get(number)?.share;
        self.admit(share, value.len() as u64)?;
        let (file, name) = self.xattr(number, name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        self.counted(share, file.as_fd(), |_| rustix::fs::setxattr(path_of(file.as_fd()), name, value, flags))?;
        Ok(Vec::new())
    }

    fn allocate(&mut self, reader: &mut Reader<'_>) -> Outcome {
        let (handle, offset, len, mode) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u32()?);
        let allowed = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode = FallocateFlags::from_bits(mode).filter(|mode| allowed.contains(*mode)).ok_or(Errno::OPNOTSUPP)?;
        let Handle { node, share, .. } = *self.handle(handle)?;
        if self.is_read_only(share) {
            return Err(Errno::ROFS);
        }
        self.admit(share, if mode.contains(FallocateFlags::PUNCH_HOLE) { 0 } else { len })?;
        let file = self.nodes.file(node)?;
        self.counted(share, file.as_fd(), |server| {
            rustix::fs::fallocate(&server.handle(handle)?.file, mode, offset, len)
        })?;
        Ok(Vec::new())
    }
}
