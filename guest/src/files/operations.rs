//! One file operation, one answer: plain system calls of a thread that is the session's user already. Called by `session`.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use msb_protocol::files::{
    DIRECTORY_BATCH, FILE_DATA_MAX, FILE_HANDLES_MAX, FILE_PATH_MAX, FileAttributes, FileChange, FileDone, FileEntries,
    FileEntry, FileFailure, FileHandle, FileMakeDirectory, FileOpen, FileOperation, FileOutcome, FileRead,
    FileRemoveKind, FileRename, FileSystemStat, FileTime, FileWrite,
};
use rustix::fs::{
    AtFlags, CWD, Dir, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::person::Place;

/// How often a change under our feet makes openat2 ask for another try.
const RETRIES_MAX: usize = 16;

/// What a session has open.
pub(super) struct Operations {
    place: Place,
    handles: HashMap<u32, Open>,
    next: u32,
}

enum Open {
    File(OwnedFd),
    Directory(Dir),
}

type Answer = Result<FileOutcome, Errno>;

impl Operations {
    pub(super) fn new(place: Place) -> Self {
        Self { place, handles: HashMap::new(), next: 0 }
    }

    /// Carries a request out. A failure names what was tried, with the path.
    pub(super) fn perform(&mut self, operation: FileOperation) -> FileOutcome {
        let (what, path) = describe(&operation);
        self.attempt(operation).unwrap_or_else(|errno| failure(what, path.as_deref(), errno))
    }

    fn attempt(&mut self, operation: FileOperation) -> Answer {
        match operation {
            FileOperation::Open(open) => self.open(&open),
            FileOperation::Close(handle) => {
                self.handles.remove(&handle.handle).ok_or(Errno::BADF)?;
                done()
            }
            FileOperation::Read(read) => self.read(read),
            FileOperation::Write(write) => self.write(&write),
            FileOperation::Stat(path) => {
                let stat = rustix::fs::statat(CWD, c_path(&path.path)?, follow(path.no_follow))?;
                Ok(FileOutcome::Attributes(attributes(&stat)))
            }
            FileOperation::StatHandle(handle) => {
                let stat = match self.handle(handle.handle)? {
                    Open::File(file) => rustix::fs::fstat(file)?,
                    Open::Directory(directory) => directory.stat()?,
                };
                Ok(FileOutcome::Attributes(attributes(&stat)))
            }
            FileOperation::SetStat(set) => {
                change_path(&c_path(&set.path)?, set.no_follow, &set.change.unwrap_or_default())?;
                done()
            }
            FileOperation::SetStatHandle(set) => {
                change_open(self.file(set.handle)?, &set.change.unwrap_or_default())?;
                done()
            }
            FileOperation::OpenDirectory(path) => {
                let mut flags = OFlags::RDONLY | OFlags::DIRECTORY;
                flags.set(OFlags::NOFOLLOW, path.no_follow);
                let directory = Dir::new(open(&c_path(&path.path)?, flags, Mode::empty())?)?;
                self.keep(Open::Directory(directory))
            }
            FileOperation::ReadDirectory(handle) => self.read_directory(handle.handle),
            FileOperation::MakeDirectory(make) => make_directory(&make),
            FileOperation::Remove(it) => {
                let path = c_path(&it.path)?;
                match FileRemoveKind::try_from(it.kind).map_err(|_| Errno::INVAL)? {
                    FileRemoveKind::File => rustix::fs::unlinkat(CWD, path, AtFlags::empty())?,
                    FileRemoveKind::Directory => rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR)?,
                    FileRemoveKind::Tree => msb_tree::remove(CWD, &path)?,
                }
                done()
            }
            FileOperation::Rename(rename) => rename_path(&rename),
            FileOperation::Symlink(link) => {
                rustix::fs::symlinkat(c_path(&link.target)?, CWD, c_path(&link.path)?)?;
                done()
            }
            FileOperation::HardLink(link) => {
                rustix::fs::linkat(CWD, c_path(&link.target)?, CWD, c_path(&link.path)?, AtFlags::empty())?;
                done()
            }
            FileOperation::ReadLink(path) => {
                let target = rustix::fs::readlinkat(CWD, c_path(&path.path)?, Vec::new())?;
                Ok(FileOutcome::Path(target.into_bytes()))
            }
            FileOperation::RealPath(path) => Ok(FileOutcome::Path(self.real_path(&path.path)?)),
            FileOperation::Sync(handle) => {
                rustix::fs::fsync(self.file(handle.handle)?)?;
                done()
            }
            FileOperation::StatFileSystem(path) => {
                let stat = rustix::fs::statvfs(c_path(&path.path)?)?;
                Ok(FileOutcome::FileSystem(FileSystemStat {
                    block_size: stat.f_bsize,
                    fragment_size: stat.f_frsize,
                    blocks: stat.f_blocks,
                    blocks_free: stat.f_bfree,
                    blocks_available: stat.f_bavail,
                    files: stat.f_files,
                    files_free: stat.f_ffree,
                    name_max: stat.f_namemax,
                    flags: stat.f_flag.bits(),
                    id: stat.f_fsid,
                }))
            }
            FileOperation::Watch(_) => Err(Errno::OPNOTSUPP),
        }
    }

    fn handle(&mut self, handle: u32) -> Result<&mut Open, Errno> {
        self.handles.get_mut(&handle).ok_or(Errno::BADF)
    }

    fn file(&mut self, handle: u32) -> Result<&OwnedFd, Errno> {
        match self.handle(handle)? {
            Open::File(file) => Ok(file),
            Open::Directory(_) => Err(Errno::ISDIR),
        }
    }

    fn keep(&mut self, open: Open) -> Answer {
        if self.handles.len() >= FILE_HANDLES_MAX {
            return Err(Errno::MFILE);
        }
        loop {
            self.next = self.next.wrapping_add(1);
            if !self.handles.contains_key(&self.next) {
                break;
            }
        }
        self.handles.insert(self.next, open);
        Ok(FileOutcome::Handle(FileHandle { handle: self.next }))
    }

    fn open(&mut self, wanted: &FileOpen) -> Answer {
        let mut flags = match (wanted.read, wanted.write || wanted.append) {
            (true, true) => OFlags::RDWR,
            (false, true) => OFlags::WRONLY,
            _ => OFlags::RDONLY,
        };
        for (flag, on) in [
            (OFlags::APPEND, wanted.append),
            (OFlags::CREATE, wanted.create),
            (OFlags::TRUNC, wanted.truncate),
            (OFlags::EXCL, wanted.exclusive),
            (OFlags::NOFOLLOW, wanted.no_follow),
        ] {
            flags.set(flag, on);
        }
        let mode =
            if wanted.create { Mode::from_raw_mode(wanted.mode.unwrap_or(0o666) & 0o7777) } else { Mode::empty() };
        let file = open(&c_path(&wanted.path)?, flags, mode)?;
        if rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) == rustix::fs::FileType::Directory {
            return Err(Errno::ISDIR);
        }
        self.keep(Open::File(file))
    }

    fn read(&mut self, read: FileRead) -> Answer {
        let file = self.file(read.handle)?;
        let mut data = vec![0; usize::try_from(read.len).unwrap_or(usize::MAX).min(FILE_DATA_MAX)];
        let mut filled = 0;
        while filled < data.len() {
            let got = match rustix::io::pread(file, &mut data[filled..], read.offset.saturating_add(filled as u64)) {
                // A pipe or a device: there is only one place to read from.
                Err(Errno::SPIPE) => rustix::io::read(file, &mut data[filled..]),
                outcome => outcome,
            };
            match got {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(Errno::INTR) => {}
                // What was read so far is an answer; the next request meets the error again.
                Err(_) if filled > 0 => break,
                Err(errno) => return Err(errno),
            }
        }
        data.truncate(filled);
        Ok(FileOutcome::Data(data))
    }

    fn write(&mut self, write: &FileWrite) -> Answer {
        if write.data.len() > FILE_DATA_MAX {
            return Err(Errno::INVAL);
        }
        let file = self.file(write.handle)?;
        let mut rest = write.data.as_slice();
        let mut offset = write.offset;
        while !rest.is_empty() {
            let wrote = match rustix::io::pwrite(file, rest, offset) {
                Err(Errno::SPIPE) => rustix::io::write(file, rest),
                outcome => outcome,
            };
            match wrote {
                Ok(len) => {
                    rest = &rest[len..];
                    offset = offset.saturating_add(len as u64);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        done()
    }

    fn read_directory(&mut self, handle: u32) -> Answer {
        let Open::Directory(directory) = self.handle(handle)? else { return Err(Errno::NOTDIR) };
        let mut entries = Vec::new();
        while entries.len() < DIRECTORY_BATCH {
            let Some(entry) = directory.read() else { break };
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let stat = rustix::fs::statat(directory.fd()?, name, AtFlags::SYMLINK_NOFOLLOW).ok();
            entries.push(FileEntry { name: name.to_bytes().to_vec(), attributes: stat.as_ref().map(attributes) });
        }
        Ok(FileOutcome::Entries(FileEntries { entries }))
    }

    /// The path without links, dots and doubled slashes. A last component that does not exist is kept as it is.
    fn real_path(&self, path: &[u8]) -> Result<Vec<u8>, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        match open(&c_path(path)?, flags, Mode::empty()) {
            Ok(file) => self.path_of(&file),
            Err(Errno::NOENT) => {
                let path = path.strip_suffix(b"/").unwrap_or(path);
                let at = path.iter().rposition(|byte| *byte == b'/');
                let (parent, name) = match at {
                    Some(at) => (&path[..=at], &path[at + 1..]),
                    None => (&b"."[..], path),
                };
                if name.is_empty() || name == b"." || name == b".." {
                    return Err(Errno::NOENT);
                }
                let parent = open(&c_path(parent)?, flags | OFlags::DIRECTORY, Mode::empty())?;
                let mut real = self.path_of(&parent)?;
                if !real.ends_with(b"/") {
                    real.push(b'/');
                }
                real.extend_from_slice(name);
                Ok(real)
            }
            Err(errno) => Err(errno),
        }
    }

    fn path_of(&self, file: &OwnedFd) -> Result<Vec<u8>, Errno> {
        let link = format!("thread-self/fd/{}", file.as_fd().as_raw_fd());
        Ok(rustix::fs::readlinkat(&self.place.proc, link, Vec::new())?.into_bytes())
    }
}

fn done() -> Answer {
    Ok(FileOutcome::Done(FileDone {}))
}

/// The answer for an error: what was tried, to what, and the system's words.
pub(super) fn failure(what: &str, path: Option<&[u8]>, errno: Errno) -> FileOutcome {
    let path =
        path.map(|path| format!(" '{}'", String::from_utf8_lossy(&path[..path.len().min(512)]))).unwrap_or_default();
    let number = errno.raw_os_error();
    let words = nix::errno::Errno::from_raw(number).desc();
    FileOutcome::Failed(FileFailure { errno: number, message: format!("cannot {what}{path}: {words}") })
}

/// A path of the host as the kernel takes it.
pub(super) fn c_path(path: &[u8]) -> Result<CString, Errno> {
    if path.len() >= FILE_PATH_MAX {
        return Err(Errno::NAMETOOLONG);
    }
    CString::new(path).map_err(|_| Errno::INVAL)
}

/// Opens without ever waiting (a FIFO, a device) and without a magic link.
fn open(path: &CString, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let flags = if flags.contains(OFlags::PATH) { flags } else { flags | OFlags::NONBLOCK | OFlags::NOCTTY };
    for _ in 0..RETRIES_MAX {
        match rustix::fs::openat2(CWD, path.as_c_str(), flags | OFlags::CLOEXEC, mode, ResolveFlags::NO_MAGICLINKS) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            outcome => return outcome,
        }
    }
    Err(Errno::AGAIN)
}

fn follow(no_follow: bool) -> AtFlags {
    if no_follow { AtFlags::SYMLINK_NOFOLLOW } else { AtFlags::empty() }
}

fn attributes(stat: &Stat) -> FileAttributes {
    let time =
        |seconds, nanoseconds: u64| FileTime { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or_default() };
    FileAttributes {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or_default(),
        accessed: time(stat.st_atime, stat.st_atime_nsec),
        modified: time(stat.st_mtime, stat.st_mtime_nsec),
        changed: time(stat.st_ctime, stat.st_ctime_nsec),
        links: stat.st_nlink,
        device: stat.st_rdev,
        inode: stat.st_ino,
        allocated: u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512),
    }
}

/// An owner to set; the kernel's -1 means "no change" and must not be asked for by number.
fn id(wanted: Option<u32>) -> Result<Option<u32>, Errno> {
    if wanted == Some(u32::MAX) { Err(Errno::INVAL) } else { Ok(wanted) }
}

fn times(change: &FileChange) -> Option<Timestamps> {
    let time = |time: Option<FileTime>| match time {
        // A nanosecond field that is no number of nanoseconds would mean "now" or "leave it".
        Some(time) => Timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanoseconds.min(999_999_999)) },
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    (change.accessed.is_some() || change.modified.is_some())
        .then(|| Timestamps { last_access: time(change.accessed), last_modification: time(change.modified) })
}

fn change_path(path: &CString, no_follow: bool, change: &FileChange) -> Result<(), Errno> {
    let (uid, gid) = (id(change.uid)?, id(change.gid)?);
    if let Some(size) = change.size {
        let flags = OFlags::WRONLY | if no_follow { OFlags::NOFOLLOW } else { OFlags::empty() };
        rustix::fs::ftruncate(open(path, flags, Mode::empty())?, size)?;
    }
    if uid.is_some() || gid.is_some() {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        rustix::fs::chownat(CWD, path.as_c_str(), uid, gid, follow(no_follow))?;
    }
    // After the change of owner, which takes set-id bits away.
    if let Some(mode) = change.mode {
        rustix::fs::chmodat(CWD, path.as_c_str(), Mode::from_raw_mode(mode & 0o7777), follow(no_follow))?;
    }
    if let Some(times) = times(change) {
        rustix::fs::utimensat(CWD, path.as_c_str(), &times, follow(no_follow))?;
    }
    Ok(())
}

fn change_open(file: &OwnedFd, change: &FileChange) -> Result<(), Errno> {
    let (uid, gid) = (id(change.uid)?, id(change.gid)?);
    if let Some(size) = change.size {
        rustix::fs::ftruncate(file, size)?;
    }
    if uid.is_some() || gid.is_some() {
        rustix::fs::fchown(file, uid.map(Uid::from_raw), gid.map(Gid::from_raw))?;
    }
    if let Some(mode) = change.mode {
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode & 0o7777))?;
    }
    if let Some(times) = times(change) {
        rustix::fs::futimens(file, &times)?;
    }
    Ok(())
}

fn make_directory(make: &FileMakeDirectory) -> Answer {
    let mode = Mode::from_raw_mode(make.mode.unwrap_or(0o777) & 0o7777);
    let path = c_path(&make.path)?;
    let outcome = rustix::fs::mkdirat(CWD, path.as_c_str(), mode);
    if !make.parents {
        outcome?;
        return done();
    }
    match outcome {
        Ok(()) => return done(),
        Err(Errno::NOENT | Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    // Component by component, as mkdir -p; a link on the way is followed by the kernel as it would be later.
    for end in (1..=make.path.len()).filter(|end| *end == make.path.len() || make.path[*end] == b'/') {
        let prefix = c_path(&make.path[..end])?;
        match rustix::fs::mkdirat(CWD, prefix.as_c_str(), mode) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    let stat = rustix::fs::statat(CWD, path, AtFlags::empty())?;
    if attributes(&stat).is_directory() { done() } else { Err(Errno::EXIST) }
}

fn rename_path(rename: &FileRename) -> Answer {
    let (from, to) = (c_path(&rename.from)?, c_path(&rename.to)?);
    if rename.no_replace {
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?;
    } else {
        rustix::fs::renameat(CWD, from, CWD, to)?;
    }
    done()
}

/// What is tried, for people, and with which path.
fn describe(operation: &FileOperation) -> (&'static str, Option<Vec<u8>>) {
    match operation {
        FileOperation::Open(open) => ("open", Some(open.path.clone())),
        FileOperation::Close(_) => ("close", None),
        FileOperation::Read(_) => ("read the file", None),
        FileOperation::Write(_) => ("write the file", None),
        FileOperation::Stat(path) => ("look at", Some(path.path.clone())),
        FileOperation::StatHandle(_) => ("look at the file", None),
        FileOperation::SetStat(set) => ("change", Some(set.path.clone())),
        FileOperation::SetStatHandle(_) => ("change the file", None),
        FileOperation::OpenDirectory(path) => ("open the directory", Some(path.path.clone())),
        FileOperation::ReadDirectory(_) => ("read the directory", None),
        FileOperation::MakeDirectory(make) => ("make the directory", Some(make.path.clone())),
        FileOperation::Remove(it) => ("remove", Some(it.path.clone())),
        FileOperation::Rename(rename) => ("rename", Some(rename.from.clone())),
        FileOperation::Symlink(link) | FileOperation::HardLink(link) => ("make the link", Some(link.path.clone())),
        FileOperation::ReadLink(path) => ("read the link", Some(path.path.clone())),
        FileOperation::RealPath(path) => ("resolve", Some(path.path.clone())),
        FileOperation::Sync(_) => ("write the file to the disk", None),
        FileOperation::StatFileSystem(path) => ("look at the file system of", Some(path.path.clone())),
        FileOperation::Watch(watch) => ("watch", Some(watch.path.clone())),
    }
}
