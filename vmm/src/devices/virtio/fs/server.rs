//! What each request does. One server per activation of the device; a new mount of the guest begins with nothing but the shares.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::Share;
use super::attributes::{self, OWN_PREFIX, Owner, host_stat, path_of};
use super::nodes::{Nodes, TOP, open_entry};
use super::quota::{self, Quota};
use super::wire::{self, Attributes, Header, Reader, Writer};

/// Bytes of file contents per request.
pub(super) const DATA_BYTES_MAX: u32 = 1 << 20;
/// Bytes of a reply that is built here: a directory's entries, an extended attribute.
const REPLY_BYTES_MAX: u32 = 128 << 10;
/// Bytes of an extended attribute, of its value and of a list of names (XATTR_SIZE_MAX, XATTR_LIST_MAX).
const XATTR_BYTES_MAX: usize = 64 << 10;
/// Bytes of a directory read from the host at once.
const DIRECTORY_BYTES: usize = 16 << 10;
/// The newest minor version of the protocol that this server knows.
const MINOR: u32 = 31;
/// Oldest minor version that is spoken: older kernels have shorter structures.
const MINOR_MIN: u32 = 28;
/// Set-id bits in an open or a write are to be taken away (FUSE_OPEN_KILL_SUIDGID, FUSE_WRITE_KILL_SUIDGID).
const OPEN_KILLS_SET_ID: u32 = 1;
/// As above, for writes.
pub(super) const WRITE_KILLS_SET_ID: u32 = 1 << 2;

/// What the server offers (linux/fuse.h): asynchronous reads, O_TRUNC in opens, large writes, caches that follow mtime, READDIRPLUS,
/// parallel look-ups, many pages per request, and set-id bits that are taken away here (so that a write needs no question first).
const FEATURES: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 22 | 1 << 28;

/// Flags of open(2) that a guest may choose.
const OPEN_FLAGS: OFlags =
    OFlags::ACCMODE.union(OFlags::APPEND).union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC);

/// An open file.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) file: OwnedFd,
    pub(super) node: u64,
    pub(super) share: usize,
    is_directory: bool,
}

/// The server's state.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) shares: Arc<Vec<Share>>,
    pub(super) nodes: Nodes,
    handles: HashMap<u64, Handle>,
    next_handle: u64,
    files_max: usize,
    pub(super) owner: Owner,
    owner_is_known: bool,
    quotas: Vec<Option<Quota>>,
}

/// What a request comes to.
pub(super) enum Answer {
    /// These bytes after the header.
    Reply(Vec<u8>),
    /// Nothing is answered, as the protocol has it.
    Silence,
}

pub(super) type Outcome = Result<Vec<u8>, Errno>;

impl Server {
    /// A server of these shares that keeps at most `files_max` descriptors for files the guest knows, and as many for open ones.
    pub(super) fn new(shares: Arc<Vec<Share>>, host: (u32, u32), files_max: usize) -> Self {
        Self {
            nodes: Nodes::new(&shares, files_max),
            quotas: shares.iter().map(|share| share.quota_bytes.map(Quota::new)).collect(),
            shares,
            handles: HashMap::new(),
            next_handle: 1,
            files_max,
            owner: Owner { host, guest: (0, 0) },
            owner_is_known: false,
        }
    }

    /// Carries a request out. `data_len` is the room for a reply after its header.
    pub(super) fn answer(&mut self, header: &Header, arguments: &[u8], room: usize) -> Result<Answer, Errno> {
        let mut reader = Reader(arguments);
        let outcome = match header.opcode {
            wire::FORGET => {
                let count = reader.u64()?;
                self.nodes.forget(header.node, count);
                return Ok(Answer::Silence);
            }
            wire::BATCH_FORGET => {
                let count = reader.u32()?;
                reader.skip(4)?;
                // As many as there are bytes for, whatever the count says.
                for _ in 0..count {
                    let (Ok(node), Ok(count)) = (reader.u64(), reader.u64()) else { break };
                    self.nodes.forget(node, count);
                }
                return Ok(Answer::Silence);
            }
            wire::INTERRUPT => return Ok(Answer::Silence),
            wire::INIT => self.initialise(&mut reader),
            wire::DESTROY => {
                self.forget_everything();
                Ok(Vec::new())
            }
            wire::LOOKUP => self.look_up(header.node, reader.name()?),
            wire::GETATTR => self.get_attributes(header.node),
            wire::READLINK => self.read_link(header.node),
            wire::OPEN => self.open(header.node, &mut reader),
            wire::OPENDIR => self.open_directory(header.node),
            wire::READDIR => self.read_directory(&mut reader, room, false),
            wire::READDIRPLUS => self.read_directory(&mut reader, room, true),
            wire::RELEASE | wire::RELEASEDIR => {
                if let Some(Handle { share, .. }) = self.handles.remove(&reader.u64()?)
                    && let Some(quota) = self.quota(share)
                {
                    // It may have been the last of a deleted file.
                    quota.freed();
                }
                Ok(Vec::new())
            }
            wire::STATFS => self.file_system(header.node),
            wire::FSYNC | wire::FSYNCDIR => self.sync(&mut reader),
            wire::GETXATTR => self.get_xattr(header.node, &mut reader),
            wire::LISTXATTR => self.list_xattr(header.node, &mut reader),
            wire::LSEEK => self.seek(&mut reader),
            _ => self.change(header, &mut reader),
        };
        outcome.map(Answer::Reply)
    }

    fn initialise(&mut self, reader: &mut Reader<'_>) -> Outcome {
        let (major, minor, read_ahead, features) = (reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
        if major != 7 || minor < MINOR_MIN {
            return Err(Errno::PROTO);
        }
        self.forget_everything();
        let mut out = Vec::with_capacity(64);
        out.put_u32(7);
        out.put_u32(MINOR);
        out.put_u32(read_ahead);
        out.put_u32(features & FEATURES);
        // Requests in the background, and when the guest should slow down.
        out.put_u16(64);
        out.put_u16(48);
        out.put_u32(DATA_BYTES_MAX);
        // Times are exact to the nanosecond.
        out.put_u32(1);
        out.put_u16(u16::try_from(DATA_BYTES_MAX / 4096).unwrap_or(u16::MAX));
        out.resize(64, 0);
        Ok(out)
    }

    fn forget_everything(&mut self) {
        self.handles.clear();
        self.nodes = Nodes::new(&self.shares, self.files_max);
        self.owner_is_known = false;
    }

    /// Whom files of a share are shown to belong to. (What may be changed is never root's alone, so changes need no such look.)
    fn owner_in(&self, share: usize) -> Owner {
        let is_root_owned = self.shares.get(share).is_some_and(|share| share.is_root_owned);
        Owner { guest: if is_root_owned { (0, 0) } else { self.owner.guest }, ..self.owner }
    }

    /// Whether nothing of a file's share may be changed.
    pub(super) fn is_read_only(&self, share: usize) -> bool {
        self.shares.get(share).is_none_or(|share| share.read_only)
    }

    /// Whether a share has room for so many bytes more.
    pub(super) fn admit(&mut self, share: usize, bytes: u64) -> Result<(), Errno> {
        let Some(Some(quota)) = self.quotas.get_mut(share) else { return Ok(()) };
        let (shares, handles) = (&self.shares, &self.handles);
        quota.admit(bytes, || {
            let named = shares.get(share).map_or(Ok(0), |share| quota::count(share.root.as_fd()))?;
            // A file that is open twice counts twice: rather too early than too late.
            let open = handles.values().filter(|handle| handle.share == share && !handle.is_directory);
            Ok(open.map(|handle| quota::taken_without_name(handle.file.as_fd())).fold(named, u64::saturating_add))
        })
    }

    /// Whether what is to be written has room: a file that takes all its bytes already may be written over. Gives what it takes now, if
    /// its share has a quota; [`Server::wrote`] wants it.
    pub(super) fn room_to_write(&mut self, handle: u64, offset: u64, len: u64) -> Result<Option<u64>, Errno> {
        let (share, file) = (self.handle(handle)?.share, self.handle(handle)?.file.as_fd());
        if self.quotas.get(share).is_none_or(Option::is_none) {
            return Ok(None);
        }
        let stat = host_stat(file)?;
        let before = quota::taken(file)?;
        let is_over_what_is_there = offset.saturating_add(len) <= stat.stx_size && before >= stat.stx_size;
        if !is_over_what_is_there {
            self.admit(share, len)?;
        }
        Ok(Some(before))
    }

    /// Tells a share's quota of a write.
    pub(super) fn wrote(&mut self, handle: u64, before: u64) -> Result<(), Errno> {
        let open = self.handle(handle)?;
        let (share, after) = (open.share, quota::taken(open.file.as_fd())?);
        if let Some(quota) = self.quota(share) {
            quota.changed(before, after);
        }
        Ok(())
    }

    /// The quota of a share, if it has one.
    pub(super) fn quota(&mut self, share: usize) -> Option<&mut Quota> {
        self.quotas.get_mut(share)?.as_mut()
    }

    /// Does what changes what a file takes, and tells its share's quota by how much.
    pub(super) fn counted<T>(
        &mut self,
        share: usize,
        file: BorrowedFd<'_>,
        change: impl FnOnce(&mut Self) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        if self.quota(share).is_none() {
            return change(self);
        }
        let before = quota::taken(file)?;
        let outcome = change(self);
        let after = quota::taken(file)?;
        if let Some(quota) = self.quota(share) {
            quota.changed(before, after);
        }
        outcome
    }

    /// A descriptor of a file whose share may be changed.
    pub(super) fn writable(&mut self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        if number == TOP || self.is_read_only(self.nodes.get(number)?.share) {
            return Err(Errno::ROFS);
        }
        self.nodes.file(number)
    }

    /// Tells the guest of an entry.
    pub(super) fn look_up(&mut self, parent: u64, name: &[u8]) -> Outcome {
        let mut out = Vec::with_capacity(wire::ENTRY_BYTES);
        let (number, attributes) = self.find(parent, name)?;
        wire::put_entry(&mut out, number, &attributes);
        Ok(out)
    }

    pub(super) fn find(&mut self, parent: u64, name: &[u8]) -> Result<(u64, Attributes), Errno> {
        if parent == TOP {
            let place = self.shares.iter().position(|share| share.name.as_bytes() == name).ok_or(Errno::NOENT)?;
            let number = self.nodes.tell_root(place);
            return Ok((number, self.attributes(number)?));
        }
        let directory = self.nodes.file(parent)?;
        let file = open_entry(directory.as_fd(), name, OFlags::PATH, 0)?;
        let stat = host_stat(file.as_fd())?;
        let (number, file) = self.nodes.tell(parent, name, file, &stat)?;
        let owner = self.owner_in(self.nodes.get(number)?.share);
        Ok((number, attributes::attributes(file.as_fd(), &stat, &owner)))
    }

    pub(super) fn attributes(&mut self, number: u64) -> Result<Attributes, Errno> {
        if number == TOP {
            return Ok(Attributes { inode: TOP, mode: 0o040_755, links: 2, block_len: 4096, ..Attributes::default() });
        }
        let file = self.nodes.file(number)?;
        let stat = host_stat(file.as_fd())?;
        let owner = self.owner_in(self.nodes.get(number)?.share);
        Ok(attributes::attributes(file.as_fd(), &stat, &owner))
    }

    pub(super) fn get_attributes(&mut self, number: u64) -> Outcome {
        let attributes = self.attributes(number)?;
        let mut out = Vec::with_capacity(104);
        wire::put_attributes(&mut out, &attributes);
        Ok(out)
    }

    fn read_link(&mut self, number: u64) -> Outcome {
        let file = self.nodes.file(number)?;
        Ok(rustix::fs::readlinkat(file.as_fd(), c"", Vec::new())?.into_bytes())
    }

    /// Opens what a descriptor means for reading or writing; a regular file or nothing.
    pub(super) fn reopen(&mut self, number: u64, flags: OFlags) -> Result<OwnedFd, Errno> {
        if self.nodes.get(number)?.kind != FileType::RegularFile {
            return Err(Errno::PERM);
        }
        let file = self.nodes.file(number)?;
        rustix::fs::openat(
            rustix::fs::CWD,
            path_of(file.as_fd()),
            flags | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        )
    }

    /// The flags of an open that a guest may choose, if it may at all.
    pub(super) fn open_flags(&self, share: usize, flags: u32) -> Result<OFlags, Errno> {
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        let changes = flags.intersection(OFlags::ACCMODE) != OFlags::RDONLY || flags.contains(OFlags::TRUNC);
        if changes && self.is_read_only(share) { Err(Errno::ROFS) } else { Ok(flags) }
    }

    fn open(&mut self, number: u64, reader: &mut Reader<'_>) -> Outcome {
        let (flags, open_flags) = (reader.u32()?, reader.u32()?);
        let share = self.nodes.get(number)?.share;
        let flags = self.open_flags(share, flags)?;
        let file = self.reopen(number, flags)?;
        if flags.contains(OFlags::TRUNC)
            && let Some(quota) = self.quota(share)
        {
            quota.freed();
        }
        if open_flags & OPEN_KILLS_SET_ID != 0 {
            attributes::strip_set_id(file.as_fd(), &self.owner);
        }
        self.keep_open(file, number, share, false)
    }

    fn open_directory(&mut self, number: u64) -> Outcome {
        if number == TOP {
            let mut out = Vec::with_capacity(16);
            wire::put_open(&mut out, 0);
            return Ok(out);
        }
        let node = self.nodes.get(number)?;
        if node.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let share = node.share;
        let file = self.nodes.file(number)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(rustix::fs::CWD, path_of(file.as_fd()), flags, Mode::empty())?;
        self.keep_open(file, number, share, true)
    }

    pub(super) fn keep_open(&mut self, file: OwnedFd, node: u64, share: usize, is_directory: bool) -> Outcome {
        if self.handles.len() >= self.files_max {
            return Err(Errno::NFILE);
        }
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(handle, Handle { file, node, share, is_directory });
        let mut out = Vec::with_capacity(16);
        wire::put_open(&mut out, handle);
        Ok(out)
    }

    /// An open file.
    pub(super) fn handle(&self, handle: u64) -> Result<&Handle, Errno> {
        self.handles.get(&handle).filter(|handle| !handle.is_directory).ok_or(Errno::BADF)
    }

    fn read_directory(&mut self, reader: &mut Reader<'_>, room: usize, with_attributes: bool) -> Outcome {
        let (handle, offset, size) = (reader.u64()?, reader.u64()?, reader.u32()?);
        if handle == 0 {
            // The top shows nothing: its entries are for the agent, which knows them.
            return Ok(Vec::new());
        }
        let size = (size.min(REPLY_BYTES_MAX) as usize).min(room);
        let open = self.handles.get(&handle).filter(|handle| handle.is_directory).ok_or(Errno::BADF)?;
        let node = open.node;
        let directory = rustix::io::fcntl_dupfd_cloexec(&open.file, 3)?;
        rustix::fs::seek(&directory, SeekFrom::Start(offset))?;
        let mut out = Vec::with_capacity(size.min(4096));
        let mut buffer = Vec::with_capacity(DIRECTORY_BYTES);
        let mut entries = RawDir::new(&directory, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            let len = wire::dirent_len(name) + if with_attributes { wire::ENTRY_BYTES } else { 0 };
            if name.len() > wire::NAME_LEN_MAX || out.len() + len > size {
                break;
            }
            let mut kind = entry.file_type().as_raw_mode() >> 12;
            if with_attributes {
                let found = if matches!(name, b"." | b"..") { None } else { self.find(node, name).ok() };
                match found {
                    Some((number, attributes)) => {
                        kind = attributes.mode >> 12;
                        wire::put_entry(&mut out, number, &attributes);
                    }
                    None => wire::put_entry(&mut out, 0, &Attributes::default()),
                }
            }
            wire::put_dirent(&mut out, entry.ino(), entry.next_entry_cookie(), kind, name);
        }
        Ok(out)
    }

    fn file_system(&mut self, number: u64) -> Outcome {
        let mut out = Vec::with_capacity(80);
        if number == TOP {
            out.resize(80, 0);
            return Ok(out);
        }
        let file = self.nodes.file(number)?;
        let mut stat = rustix::fs::fstatfs(file.as_fd())?;
        let share = self.nodes.get(number)?.share;
        if self.quota(share).is_some() {
            // Whoever asks for the room wants it counted.
            let _ = self.admit(share, u64::MAX);
        }
        if let Some(quota) = self.quota(share) {
            let block_bytes = u64::try_from(stat.f_bsize).unwrap_or(4096).max(1);
            let (size, free) = quota.size();
            stat.f_blocks = stat.f_blocks.min(size / block_bytes);
            stat.f_bavail = stat.f_bavail.min(free / block_bytes);
            stat.f_bfree = stat.f_bavail;
        }
        for value in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            out.put_u64(value);
        }
        let small = |value: i64| u32::try_from(value).unwrap_or(4096);
        for value in [small(stat.f_bsize), wire::NAME_LEN_MAX as u32, small(stat.f_frsize), 0] {
            out.put_u32(value);
        }
        out.resize(80, 0);
        Ok(out)
    }

    fn sync(&mut self, reader: &mut Reader<'_>) -> Outcome {
        let (handle, flags) = (reader.u64()?, reader.u32()?);
        if handle == 0 {
            return Ok(Vec::new());
        }
        let handle = self.handles.get(&handle).ok_or(Errno::BADF)?;
        if flags & 1 != 0 {
            rustix::fs::fdatasync(&handle.file)?
        } else {
            rustix::fs::fsync(&handle.file)?
        }
        Ok(Vec::new())
    }

    /// A descriptor of a file that can have extended attributes of a user, and the name if it is one that the guest may see.
    pub(super) fn xattr<'a>(&mut self, number: u64, name: &'a [u8]) -> Result<(Arc<OwnedFd>, &'a [u8]), Errno> {
        if !name.starts_with(b"user.")
            || name.starts_with(OWN_PREFIX)
            || name.len() > wire::NAME_LEN_MAX
            || number == TOP
        {
            return Err(Errno::OPNOTSUPP);
        }
        if !matches!(self.nodes.get(number)?.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::OPNOTSUPP);
        }
        Ok((self.nodes.file(number)?, name))
    }

    fn get_xattr(&mut self, number: u64, reader: &mut Reader<'_>) -> Outcome {
        let size = (reader.u32()? as usize).min(XATTR_BYTES_MAX);
        reader.skip(4)?;
        let (file, name) = self.xattr(number, reader.text()?)?;
        let mut value = vec![0; XATTR_BYTES_MAX];
        let len = rustix::fs::getxattr(path_of(file.as_fd()), name, &mut value)?;
        value.truncate(len);
        sized(value, size)
    }

    fn list_xattr(&mut self, number: u64, reader: &mut Reader<'_>) -> Outcome {
        let size = (reader.u32()? as usize).min(XATTR_BYTES_MAX);
        let mut kept = Vec::new();
        if number != TOP && matches!(self.nodes.get(number)?.kind, FileType::RegularFile | FileType::Directory) {
            let file = self.nodes.file(number)?;
            let mut names = vec![0u8; XATTR_BYTES_MAX];
            let len = rustix::fs::listxattr(path_of(file.as_fd()), &mut names)?;
            for name in names[..len.min(names.len())].split(|byte| *byte == 0) {
                if name.starts_with(b"user.") && !name.starts_with(OWN_PREFIX) {
                    kept.extend_from_slice(name);
                    kept.push(0);
                }
            }
        }
        sized(kept, size)
    }

    /// The agent says, once per mount, to whom the caller's files belong.
    pub(super) fn set_owner(&mut self, value: &[u8]) -> Outcome {
        let text = std::str::from_utf8(value).map_err(|_| Errno::INVAL)?;
        let (uid, gid) = text.split_once(':').ok_or(Errno::INVAL)?;
        let number = |text: &str| text.parse::<u32>().map_err(|_| Errno::INVAL);
        if std::mem::replace(&mut self.owner_is_known, true) {
            return Err(Errno::PERM);
        }
        self.owner.guest = (number(uid)?, number(gid)?);
        Ok(Vec::new())
    }

    fn seek(&mut self, reader: &mut Reader<'_>) -> Outcome {
        let (handle, offset, whence) = (reader.u64()?, reader.u64()?, reader.u32()?);
        let target = match whence {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let found = rustix::fs::seek(&self.handle(handle)?.file, target)?;
        let mut out = Vec::with_capacity(8);
        out.put_u64(found);
        Ok(out)
    }
}

/// A value, or its length if no room was given for it.
fn sized(value: Vec<u8>, size: usize) -> Outcome {
    if size == 0 {
        let mut out = Vec::with_capacity(8);
        out.put_u32(u32::try_from(value.len()).unwrap_or(u32::MAX));
        out.put_u32(0);
        return Ok(out);
    }
    if value.len() > size { Err(Errno::RANGE) } else { Ok(value) }
}
