//! What each request does: paths, open files and directories of one client, answers with errno turned into the draft's codes and
//! its words. Called by `serve`; holds nothing but the table of open handles.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions, ReadDir};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, RenameFlags, StatVfs, Timespec, Timestamps};

use super::wire::{Attributes, Fields, PACKET_LEN_MAX, Reply, kind, long_name};

/// Version of the protocol.
const VERSION: u32 = 3;
/// Most open files and directories.
const HANDLES_MAX: usize = 1024;
/// Most bytes of one read: a packet with room for what stands before the data.
const READ_LEN_MAX: usize = PACKET_LEN_MAX - 1024;
/// Most entries of one answer about a directory.
const ENTRIES_MAX: usize = 100;
/// Bytes of one answer about a directory after which no further entry is added.
const ENTRIES_LEN: usize = 128 << 10;

const OK: u32 = 0;
const END_OF_FILE: u32 = 1;
const NO_SUCH_FILE: u32 = 2;
const PERMISSION_DENIED: u32 = 3;
const FAILURE: u32 = 4;
const BAD_MESSAGE: u32 = 5;
const UNSUPPORTED: u32 = 8;

const OPEN_READ: u32 = 1;
const OPEN_WRITE: u32 = 2;
const OPEN_APPEND: u32 = 4;
const OPEN_CREATE: u32 = 8;
const OPEN_TRUNCATE: u32 = 16;
const OPEN_EXCLUSIVE: u32 = 32;

const EXTENSIONS: [(&str, &str); 7] = [
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
];

enum Handle {
    File { file: File, append: bool },
    Directory(PathBuf, ReadDir),
}

/// Why a request has no other answer.
enum Refusal {
    System(io::Error),
    EndOfFile,
    Malformed,
    Unsupported,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

impl From<rustix::io::Errno> for Refusal {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::System(errno.into())
    }
}

type Outcome = Result<(), Refusal>;

/// One client's server.
#[derive(Default)]
pub(super) struct Server {
    handles: HashMap<u32, Handle>,
    next: u32,
}

impl Server {
    /// Answers one packet.
    pub(super) fn handle(&mut self, packet: &[u8], out: &mut Vec<u8>) {
        let Some((&request, body)) = packet.split_first() else { return };
        if request == kind::INIT {
            let mut reply = Reply::bare(out, kind::VERSION);
            reply.number(VERSION);
            for (name, version) in EXTENSIONS {
                reply.bytes(name.as_bytes()).bytes(version.as_bytes());
            }
            return reply.finish();
        }
        let mut fields = Fields(body);
        // A request without a number cannot be answered.
        let Some(id) = fields.number() else { return };
        let before = out.len();
        let (code, message) = match self.answer(request, id, fields, out) {
            Ok(()) if out.len() > before => return,
            Ok(()) => (OK, "Success".to_owned()),
            Err(Refusal::EndOfFile) => (END_OF_FILE, "End of file".to_owned()),
            Err(Refusal::Malformed) => (BAD_MESSAGE, "Bad message".to_owned()),
            Err(Refusal::Unsupported) => (UNSUPPORTED, "Operation unsupported".to_owned()),
            Err(Refusal::System(error)) => (code_of(&error), words_of(&error)),
        };
        out.truncate(before);
        Reply::begin(out, kind::STATUS, id).number(code).bytes(message.as_bytes()).bytes(b"en").finish();
    }

    /// Writes the answer, or nothing if a bare success is one.
    fn answer(&mut self, request: u8, id: u32, mut fields: Fields<'_>, out: &mut Vec<u8>) -> Outcome {
        match request {
            kind::OPEN => {
                let (path, flags, wanted) = (path(&mut fields)?, number(&mut fields)?, attributes(&mut fields)?);
                let handle = open(&path, flags, wanted)?;
                self.admit(handle, id, out)
            }
            kind::OPENDIR => {
                let path = path(&mut fields)?;
                let entries = std::fs::read_dir(&path)?;
                self.admit(Handle::Directory(path, entries), id, out)
            }
            kind::CLOSE => self.handles.remove(&handle(&mut fields)?).map(drop).ok_or(Refusal::Malformed),
            kind::READ => {
                let (file, offset) = (handle(&mut fields)?, large(&mut fields)?);
                let len = usize::try_from(number(&mut fields)?).unwrap_or(READ_LEN_MAX).min(READ_LEN_MAX);
                let file = self.file(file)?;
                Reply::begin(out, kind::DATA, id).fill(len, |room| match read_full(file, room, offset)? {
                    0 if len > 0 => Err(Refusal::EndOfFile),
                    len => Ok(len),
                })
            }
            kind::WRITE => {
                let (file, offset) = (handle(&mut fields)?, large(&mut fields)?);
                let data = fields.bytes().ok_or(Refusal::Malformed)?;
                match self.handles.get_mut(&file) {
                    Some(Handle::File { file, append: true }) => Ok(io::Write::write_all(file, data)?),
                    Some(Handle::File { file, append: false }) => Ok(file.write_all_at(data, offset)?),
                    _ => Err(Refusal::Malformed),
                }
            }
            kind::LSTAT => stat(&std::fs::symlink_metadata(path(&mut fields)?)?, id, out),
            kind::STAT => stat(&std::fs::metadata(path(&mut fields)?)?, id, out),
            kind::FSTAT => {
                let file = handle(&mut fields)?;
                stat(&self.file(file)?.metadata()?, id, out)
            }
            kind::SETSTAT => {
                let (path, wanted) = (path(&mut fields)?, attributes(&mut fields)?);
                set_by_path(&path, wanted, AtFlags::empty())
            }
            kind::FSETSTAT => {
                let (file, wanted) = (handle(&mut fields)?, attributes(&mut fields)?);
                set_by_handle(self.file(file)?, wanted)
            }
            kind::READDIR => {
                let directory = handle(&mut fields)?;
                self.read_directory(directory, id, out)
            }
            kind::REMOVE => {
                let path = path(&mut fields)?;
                // unlink(2) on a directory says EISDIR, which clients of this protocol expect as a plain failure.
                Ok(std::fs::remove_file(path)?)
            }
            kind::MKDIR => {
                let (path, wanted) = (path(&mut fields)?, attributes(&mut fields)?);
                Ok(std::fs::DirBuilder::new().mode(wanted.mode.unwrap_or(0o777)).create(path)?)
            }
            kind::RMDIR => Ok(std::fs::remove_dir(path(&mut fields)?)?),
            kind::REALPATH => {
                let path = real_path(&path(&mut fields)?)?;
                name(path.as_os_str().as_bytes(), id, out);
                Ok(())
            }
            kind::READLINK => {
                let target = std::fs::read_link(path(&mut fields)?)?;
                name(target.as_os_str().as_bytes(), id, out);
                Ok(())
            }
            kind::RENAME => {
                let (from, to) = (path(&mut fields)?, path(&mut fields)?);
                // Version 3 never replaces a file by a rename.
                Ok(rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE)?)
            }
            kind::SYMLINK => {
                // OpenSSH's order, which everybody follows, is the reverse of the draft's: target, then link.
                let (target, link) = (path(&mut fields)?, path(&mut fields)?);
                Ok(std::os::unix::fs::symlink(target, link)?)
            }
            kind::EXTENDED => self.extended(id, fields, out),
            _ => Err(Refusal::Unsupported),
        }
    }

    fn extended(&mut self, id: u32, mut fields: Fields<'_>, out: &mut Vec<u8>) -> Outcome {
        match fields.bytes().ok_or(Refusal::Malformed)? {
            b"posix-rename@openssh.com" => {
                let (from, to) = (path(&mut fields)?, path(&mut fields)?);
                Ok(std::fs::rename(from, to)?)
            }
            b"hardlink@openssh.com" => {
                let (from, to) = (path(&mut fields)?, path(&mut fields)?);
                Ok(std::fs::hard_link(from, to)?)
            }
            b"fsync@openssh.com" => {
                let file = handle(&mut fields)?;
                Ok(self.file(file)?.sync_all()?)
            }
            b"statvfs@openssh.com" => {
                space(&rustix::fs::statvfs(&path(&mut fields)?)?, id, out);
                Ok(())
            }
            b"fstatvfs@openssh.com" => {
                let file = handle(&mut fields)?;
                space(&rustix::fs::fstatvfs(self.file(file)?)?, id, out);
                Ok(())
            }
            b"lsetstat@openssh.com" => {
                let (path, wanted) = (path(&mut fields)?, attributes(&mut fields)?);
                set_by_path(&path, wanted, AtFlags::SYMLINK_NOFOLLOW)
            }
            b"limits@openssh.com" => {
                let (packet, data, handles) = (PACKET_LEN_MAX as u64, READ_LEN_MAX as u64, HANDLES_MAX as u64);
                Reply::begin(out, kind::EXTENDED_REPLY, id)
                    .large(packet)
                    .large(data)
                    .large(data)
                    .large(handles)
                    .finish();
                Ok(())
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    fn admit(&mut self, handle: Handle, id: u32, out: &mut Vec<u8>) -> Outcome {
        if self.handles.len() >= HANDLES_MAX {
            return Err(rustix::io::Errno::MFILE.into());
        }
        while self.handles.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        self.handles.insert(number, handle);
        Reply::begin(out, kind::HANDLE, id).bytes(&number.to_be_bytes()).finish();
        Ok(())
    }

    fn file(&self, number: u32) -> Result<&File, Refusal> {
        match self.handles.get(&number) {
            Some(Handle::File { file, .. }) => Ok(file),
            _ => Err(Refusal::Malformed),
        }
    }

    fn read_directory(&mut self, number: u32, id: u32, out: &mut Vec<u8>) -> Outcome {
        let Some(Handle::Directory(path, entries)) = self.handles.get_mut(&number) else {
            return Err(Refusal::Malformed);
        };
        let mut list: Vec<(Vec<u8>, Metadata)> = Vec::new();
        let mut len = 0;
        while list.len() < ENTRIES_MAX && len < ENTRIES_LEN {
            let Some(entry) = entries.next() else { break };
            let name = entry?.file_name().as_bytes().to_vec();
            // One that was removed meanwhile is no entry any more.
            let Ok(file) = std::fs::symlink_metadata(path.join(OsStr::from_bytes(&name))) else { continue };
            len += 2 * name.len() + 128;
            list.push((name, file));
        }
        if list.is_empty() {
            return Err(Refusal::EndOfFile);
        }
        let mut reply = Reply::begin(out, kind::NAME, id);
        reply.number(u32::try_from(list.len()).unwrap_or(0));
        for (name, file) in &list {
            reply.bytes(name).bytes(&long_name(name, file)).attributes(file);
        }
        reply.finish();
        Ok(())
    }
}

fn number(fields: &mut Fields<'_>) -> Result<u32, Refusal> {
    fields.number().ok_or(Refusal::Malformed)
}

fn large(fields: &mut Fields<'_>) -> Result<u64, Refusal> {
    fields.large().ok_or(Refusal::Malformed)
}

fn attributes(fields: &mut Fields<'_>) -> Result<Attributes, Refusal> {
    fields.attributes().ok_or(Refusal::Malformed)
}

fn handle(fields: &mut Fields<'_>) -> Result<u32, Refusal> {
    let bytes = fields.bytes().ok_or(Refusal::Malformed)?;
    bytes.try_into().map(u32::from_be_bytes).map_err(|_| Refusal::Malformed)
}

/// A path; an empty one is the directory the session began in.
fn path(fields: &mut Fields<'_>) -> Result<PathBuf, Refusal> {
    let bytes = fields.bytes().ok_or(Refusal::Malformed)?;
    if bytes.contains(&0) {
        return Err(Refusal::Malformed);
    }
    Ok(PathBuf::from(OsStr::from_bytes(if bytes.is_empty() { b"." } else { bytes })))
}

fn open(path: &Path, flags: u32, wanted: Attributes) -> Result<Handle, Refusal> {
    let has = |flag: u32| flags & flag != 0;
    let mut options = OpenOptions::new();
    options.read(has(OPEN_READ)).write(has(OPEN_WRITE)).append(has(OPEN_APPEND) && has(OPEN_WRITE));
    if has(OPEN_WRITE) {
        options.create(has(OPEN_CREATE)).truncate(has(OPEN_TRUNCATE) && !has(OPEN_APPEND));
        options.create_new(has(OPEN_CREATE) && has(OPEN_EXCLUSIVE));
    }
    // A FIFO or a device must not hold the server; regular files know no such waiting.
    options.mode(wanted.mode.unwrap_or(0o666)).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path)?;
    if file.metadata()?.is_dir() {
        return Err(rustix::io::Errno::ISDIR.into());
    }
    Ok(Handle::File { file, append: has(OPEN_APPEND) })
}

/// Reads as much as there is, so that a short answer means the end.
fn read_full(file: &File, room: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut len = 0;
    while len < room.len() {
        match file.read_at(&mut room[len..], offset.saturating_add(len as u64)) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if len > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

fn stat(file: &Metadata, id: u32, out: &mut Vec<u8>) -> Outcome {
    Reply::begin(out, kind::ATTRS, id).attributes(file).finish();
    Ok(())
}

fn name(name: &[u8], id: u32, out: &mut Vec<u8>) {
    // One name, its long form, no attributes.
    Reply::begin(out, kind::NAME, id).number(1).bytes(name).bytes(name).number(0).finish();
}

fn space(fs: &StatVfs, id: u32, out: &mut Vec<u8>) {
    let mut reply = Reply::begin(out, kind::EXTENDED_REPLY, id);
    for number in [fs.f_bsize, fs.f_frsize, fs.f_blocks, fs.f_bfree, fs.f_bavail, fs.f_files, fs.f_ffree, fs.f_favail] {
        reply.large(number);
    }
    let flags = u64::from(fs.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
        | u64::from(fs.f_flag.contains(rustix::fs::StatVfsMountFlags::NOSUID)) << 1;
    reply.large(fs.f_fsid).large(flags).large(fs.f_namemax).finish();
}

fn times_of((accessed, modified): (u32, u32)) -> Timestamps {
    let time = |seconds: u32| Timespec { tv_sec: i64::from(seconds), tv_nsec: 0 };
    Timestamps { last_access: time(accessed), last_modification: time(modified) }
}

fn owner_of((user, group): (u32, u32)) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    // All ones is "leave it" to the kernel, and no id.
    let known = |id: u32| (id != u32::MAX).then_some(id);
    (known(user).map(rustix::fs::Uid::from_raw), known(group).map(rustix::fs::Gid::from_raw))
}

fn set_by_path(path: &Path, wanted: Attributes, flags: AtFlags) -> Outcome {
    if let Some(size) = wanted.size {
        OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?.set_len(size)?;
    }
    if let Some(owner) = wanted.owner {
        let (user, group) = owner_of(owner);
        rustix::fs::chownat(CWD, path, user, group, flags)?;
    }
    if let Some(mode) = wanted.mode {
        if flags.contains(AtFlags::SYMLINK_NOFOLLOW) && std::fs::symlink_metadata(path)?.is_symlink() {
            return Err(rustix::io::Errno::OPNOTSUPP.into());
        }
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode))?;
    }
    if let Some(times) = wanted.times {
        rustix::fs::utimensat(CWD, path, &times_of(times), flags)?;
    }
    Ok(())
}

fn set_by_handle(file: &File, wanted: Attributes) -> Outcome {
    if let Some(size) = wanted.size {
        file.set_len(size)?;
    }
    if let Some(owner) = wanted.owner {
        let (user, group) = owner_of(owner);
        rustix::fs::fchown(file, user, group)?;
    }
    if let Some(mode) = wanted.mode {
        file.set_permissions(PermissionsExt::from_mode(mode))?;
    }
    if let Some(times) = wanted.times {
        rustix::fs::futimens(file, &times_of(times))?;
    }
    Ok(())
}

/// The path without links and dots; its last part may not exist yet.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    match std::fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let (Some(parent), Some(last)) = (path.parent(), path.file_name()) else { return Err(error) };
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(std::fs::canonicalize(parent)?.join(last))
        }
        outcome => outcome,
    }
}

fn code_of(error: &io::Error) -> u32 {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => NO_SUCH_FILE,
        Some(libc::EACCES | libc::EPERM | libc::EFAULT) => PERMISSION_DENIED,
        Some(libc::ENAMETOOLONG | libc::EINVAL) => BAD_MESSAGE,
        Some(libc::ENOSYS) => UNSUPPORTED,
        _ => FAILURE,
    }
}

/// The words of an errno; clients show them.
fn words_of(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |errno| nix::errno::Errno::from_raw(errno).desc().to_owned())
}
