//! A tar stream becomes a tree beneath one directory. Called by the SDK for what a guest sends, and by the agent for what a host sends.
//!
//! ```text
//!  a name that is free:   everything is made under `.msb-copy-…`, which gets the name when the stream has ended whole
//!  a name that is taken:  a directory is filled, file by file; each is written beside its place and renamed
//! ```
//!
//! The stream is hostile. Each component of a path is opened by itself, relative to the directory above it and without following a
//! link; `..` and absolute paths are refused, so are entries outside of the one name that was asked for. What fails, or is given up,
//! leaves nothing half under a final name.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::read::{Entries, Entry, EntryKind};
use crate::remove::remove_unfinished;
use crate::{DEPTH_MAX, PATH_LEN_MAX, Summary, TreeError, Warnings, shown};

/// Bytes written at once.
const CHUNK_LEN: usize = 128 << 10;
/// Longest name of a directory entry.
const NAME_LEN_MAX: usize = 255;

/// Who owns what is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The caller; bits that lend a file's owner to whoever runs it are left out, so are attributes beyond `user.`.
    Caller,
    /// Whom the stream names, as far as the caller may; with all bits and attributes.
    Stream,
}

/// How to unpack.
#[derive(Clone, Copy, Debug)]
pub struct UnpackOptions<'a> {
    /// The one name in the directory that the stream may make: every path begins with it. None: the directory itself is filled.
    pub name: Option<&'a [u8]>,
    /// Who owns what is made.
    pub owner: Owner,
}

/// Makes the tree of a stream in a directory, reading the stream to its end.
///
/// # Errors
/// [`TreeError`]. Files that were whole by then stay where a directory was filled; a name that was free is free again.
pub fn unpack(
    directory: BorrowedFd<'_>,
    options: UnpackOptions<'_>,
    input: impl Read,
    tell: &mut dyn FnMut(String),
) -> Result<Summary, TreeError> {
    if options.name.is_some_and(|name| !is_name(name)) {
        return Err(TreeError::Refused {
            path: shown(options.name.unwrap_or_default()),
            why: "it is no name of one file",
        });
    }
    let mut entries = Entries::new(input);
    let mut unpacker = Unpacker {
        directory,
        options,
        staging: None,
        levels: Vec::new(),
        buffer: vec![0; CHUNK_LEN],
        summary: Summary::default(),
        warnings: Warnings { count: 0, tell },
        owner_warned: false,
        xattr_warned: false,
    };
    let outcome = unpacker.run(&mut entries).and_then(|()| entries.finish()).and_then(|()| unpacker.commit());
    if outcome.is_err() {
        unpacker.give_up();
    }
    outcome?;
    Ok(Summary { warnings: unpacker.warnings.count, ..unpacker.summary })
}

struct Unpacker<'a> {
    directory: BorrowedFd<'a>,
    options: UnpackOptions<'a>,
    /// The name that stands for `options.name` until the end.
    staging: Option<CString>,
    /// The directories from the first component down to where the last entry was.
    levels: Vec<Level>,
    buffer: Vec<u8>,
    summary: Summary,
    warnings: Warnings<'a>,
    owner_warned: bool,
    xattr_warned: bool,
}

struct Level {
    name: Vec<u8>,
    directory: Rc<OwnedFd>,
    /// What to set once everything in it is there.
    entry: Option<Entry>,
}

/// A file under a name of its own until it is whole.
struct Temporary<'a> {
    parent: BorrowedFd<'a>,
    name: Option<CString>,
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // There is nobody to tell, and the name says what it is.
            let _ = rustix::fs::unlinkat(self.parent, name.as_c_str(), AtFlags::empty());
        }
    }
}

impl Unpacker<'_> {
    fn run<R: Read>(&mut self, entries: &mut Entries<R>) -> Result<(), TreeError> {
        while let Some(entry) = entries.next_entry()? {
            let components = components(&entry.path)?;
            let Some((last, above)) = components.split_last() else {
                // The directory that is filled, under the name of itself: it is the receiver's, and stays as it is.
                if self.options.name.is_some() || entry.kind != EntryKind::Directory {
                    return Err(TreeError::Refused {
                        path: shown(&entry.path),
                        why: "it names the destination itself",
                    });
                }
                continue;
            };
            self.begin(&entry, components[0])?;
            if let EntryKind::Special(kind) = entry.kind {
                self.warnings.add(|| format!("left out '{}': it is a {kind}", shown(&entry.path)));
                continue;
            }
            self.enter(above, &entry.path)?;
            self.summary.entries += 1;
            match &entry.kind {
                EntryKind::Directory => self.make_directory(&entry, last)?,
                EntryKind::File => self.file(entries, &entry, last)?,
                EntryKind::Symlink(target) => self.symlink(&entry, last, target)?,
                EntryKind::HardLink(target) => self.hard_link(&entry, last, target)?,
                EntryKind::Special(_) => {}
            }
        }
        self.leave(0)
    }

    /// Checks the first component, and decides at the first entry whether its name is free.
    fn begin(&mut self, entry: &Entry, first: &[u8]) -> Result<(), TreeError> {
        let Some(name) = self.options.name else { return Ok(()) };
        if first != name {
            return Err(TreeError::Refused { path: shown(&entry.path), why: "it is outside of what was asked for" });
        }
        if self.staging.is_none() && self.summary.entries == 0 {
            let taken = rustix::fs::statat(self.directory, c_name(name)?.as_c_str(), AtFlags::SYMLINK_NOFOLLOW);
            match taken {
                Ok(_) => {}
                Err(Errno::NOENT) => self.staging = Some(hidden_name(name)?),
                Err(errno) => return Err(TreeError::file("look at", name)(errno)),
            }
        }
        Ok(())
    }

    /// The name on the disk of a component at a depth.
    fn on_disk(&self, depth: usize, component: &[u8]) -> Result<CString, TreeError> {
        match &self.staging {
            Some(staging) if depth == 0 => Ok(staging.clone()),
            _ => c_name(component),
        }
    }

    fn parent(&self) -> BorrowedFd<'_> {
        self.levels.last().map_or(self.directory, |level| level.directory.as_fd())
    }

    /// Opens the directories of a path, making those that are missing.
    fn enter(&mut self, components: &[&[u8]], path: &[u8]) -> Result<(), TreeError> {
        if components.len() >= DEPTH_MAX {
            return Err(TreeError::Limit { path: shown(path), limit: "a tree is at most 256 levels deep" });
        }
        let common = self.levels.iter().zip(components).take_while(|(level, name)| level.name == **name).count();
        self.leave(common)?;
        for component in &components[common..] {
            let name = self.on_disk(self.levels.len(), component)?;
            let directory = match open_directory(self.parent(), &name) {
                Err(Errno::NOENT) => rustix::fs::mkdirat(self.parent(), name.as_c_str(), Mode::from_raw_mode(0o755))
                    .and_then(|()| open_directory(self.parent(), &name)),
                outcome => outcome,
            };
            let directory = directory.map_err(|errno| blocked(errno, path))?;
            self.levels.push(Level { name: component.to_vec(), directory: Rc::new(directory), entry: None });
        }
        Ok(())
    }

    /// Finishes directories until so many are left.
    fn leave(&mut self, depth: usize) -> Result<(), TreeError> {
        while self.levels.len() > depth {
            let Some(level) = self.levels.pop() else { break };
            if let Some(entry) = level.entry {
                self.dress(level.directory.as_fd(), &entry)?;
            }
        }
        Ok(())
    }

    fn make_directory(&mut self, entry: &Entry, last: &[u8]) -> Result<(), TreeError> {
        let name = self.on_disk(self.levels.len(), last)?;
        match rustix::fs::mkdirat(self.parent(), name.as_c_str(), Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(TreeError::file("make the directory", &entry.path)(errno)),
        }
        let directory = open_directory(self.parent(), &name).map_err(|errno| blocked(errno, &entry.path))?;
        self.levels.push(Level { name: last.to_vec(), directory: Rc::new(directory), entry: Some(entry.clone()) });
        Ok(())
    }

    fn file<R: Read>(&mut self, entries: &mut Entries<R>, entry: &Entry, last: &[u8]) -> Result<(), TreeError> {
        let name = self.on_disk(self.levels.len(), last)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let outcome = self.place(entry, &name, |this, parent, name| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            // With the bits that it may have from the start: mostly nothing is left to change once it is written.
            let mode = Mode::from_raw_mode(entry.mode & 0o777);
            let file = rustix::fs::openat(parent, name, flags, mode);
            let file = match file {
                Ok(file) => file,
                Err(errno) => return Ok(Err(errno)),
            };
            // From here on the name is there: whoever called takes it away if this fails.
            this.content(entries, entry, &file, &mut buffer)?;
            this.dress(file.as_fd(), entry)?;
            Ok(Ok(()))
        });
        self.buffer = buffer;
        outcome
    }

    fn content<R: Read>(
        &mut self,
        entries: &mut Entries<R>,
        entry: &Entry,
        file: &OwnedFd,
        buffer: &mut [u8],
    ) -> Result<(), TreeError> {
        let whole = [(0, entry.size)];
        let map = entry.sparse.as_ref().map_or(&whole[..], |(_, map)| map);
        for (offset, len) in map {
            let (mut offset, end) = (*offset, offset + len);
            while offset < end {
                let want = usize::try_from(end - offset).unwrap_or(usize::MAX).min(buffer.len());
                // Full buffers: one write for many small pieces of the stream.
                let mut filled = 0;
                while filled < want {
                    match entries.read_content(&mut buffer[filled..want])? {
                        0 => return Err(TreeError::Malformed("a file is shorter than its header says")),
                        len => filled += len,
                    }
                }
                let mut rest = &buffer[..filled];
                while !rest.is_empty() {
                    match rustix::io::pwrite(file, rest, offset) {
                        Ok(len) => {
                            rest = &rest[len..];
                            offset += len as u64;
                        }
                        Err(Errno::INTR) => {}
                        Err(errno) => return Err(TreeError::file("write", &entry.path)(errno)),
                    }
                }
                self.summary.bytes += filled as u64;
            }
        }
        if let Some((real, _)) = &entry.sparse {
            rustix::fs::ftruncate(file, *real).map_err(TreeError::file("write", &entry.path))?;
        }
        Ok(())
    }

    fn symlink(&mut self, entry: &Entry, last: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let refused = |why| TreeError::Refused { path: shown(&entry.path), why };
        if target.is_empty() || target.len() >= PATH_LEN_MAX {
            return Err(refused("the link leads nowhere"));
        }
        let target = CString::new(target).map_err(|_| refused("the link's target has a zero byte"))?;
        let name = self.on_disk(self.levels.len(), last)?;
        self.place(entry, &name, |this, parent, name| {
            if let Err(errno) = rustix::fs::symlinkat(&target, parent, name) {
                return Ok(Err(errno));
            }
            if this.options.owner == Owner::Stream {
                let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
                if rustix::fs::chownat(parent, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).is_err() {
                    this.warn_owner(entry);
                }
            }
            // A file system may have no times for links.
            let _ = rustix::fs::utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW);
            Ok(Ok(()))
        })
    }

    fn hard_link(&mut self, entry: &Entry, last: &[u8], target: &[u8]) -> Result<(), TreeError> {
        let refused = |why| TreeError::Refused { path: shown(&entry.path), why };
        let components = components(target)?;
        let Some((target_last, above)) = components.split_last() else {
            return Err(refused("the hard link leads to the destination itself"));
        };
        if self.options.name.is_some_and(|name| components[0] != name) {
            return Err(refused("the hard link leads out of what was asked for"));
        }
        let mut place: Option<OwnedFd> = None;
        for (depth, component) in above.iter().enumerate().take(DEPTH_MAX) {
            let name = self.on_disk(depth, component)?;
            let at = place.as_ref().map_or(self.directory, OwnedFd::as_fd);
            let below =
                open_directory(at, &name).map_err(|_| refused("the hard link leads to nothing that was copied"))?;
            place = Some(below);
        }
        let from = place.as_ref().map_or(self.directory, OwnedFd::as_fd);
        let from_name = self.on_disk(above.len(), target_last)?;
        let is_file = rustix::fs::statat(from, from_name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        if !is_file {
            return Err(refused("the hard link leads to nothing that was copied"));
        }
        let name = self.on_disk(self.levels.len(), last)?;
        self.place(entry, &name, |_, parent, name| {
            Ok(rustix::fs::linkat(from, from_name.as_c_str(), parent, name, AtFlags::empty()))
        })
    }

    /// Makes something under its name. What nobody sees yet is made there at once; else, or if the name is taken, it is made beside
    /// it and renamed. `make` says `Err` of the inner kind if nothing was made.
    fn place(
        &mut self,
        entry: &Entry,
        name: &CString,
        mut make: impl FnMut(&mut Self, BorrowedFd<'_>, &std::ffi::CStr) -> Result<Result<(), Errno>, TreeError>,
    ) -> Result<(), TreeError> {
        let parent = self.levels.last().map(|level| Rc::clone(&level.directory));
        let parent = parent.as_ref().map_or(self.directory, |parent| parent.as_fd());
        if self.staging.is_some() {
            match make(self, parent, name)? {
                Ok(()) => return Ok(()),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(TreeError::file("make", &entry.path)(errno)),
            }
        }
        // Renaming over a device would take it away from everybody.
        if let Ok(there) = rustix::fs::statat(parent, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW)
            && !matches!(FileType::from_raw_mode(there.st_mode), FileType::RegularFile | FileType::Symlink)
        {
            let is_directory = FileType::from_raw_mode(there.st_mode) == FileType::Directory;
            let why = if is_directory { "a directory is there" } else { "a device, a pipe or a socket is there" };
            return Err(TreeError::InTheWay { path: shown(&entry.path), why });
        }
        let hidden = hidden_name(&entry.path)?;
        let mut temporary = Temporary { parent, name: Some(hidden.clone()) };
        match make(self, parent, &hidden)? {
            Ok(()) => {}
            Err(errno) => {
                temporary.name = None;
                return Err(TreeError::file("make", &entry.path)(errno));
            }
        }
        rustix::fs::renameat(parent, hidden.as_c_str(), parent, name.as_c_str()).map_err(|errno| match errno {
            Errno::ISDIR | Errno::NOTEMPTY => {
                TreeError::InTheWay { path: shown(&entry.path), why: "a directory is there" }
            }
            errno => TreeError::file("rename to", &entry.path)(errno),
        })?;
        // Two names of one file are renamed to each other by doing nothing; then the hidden one is still there.
        if !matches!(entry.kind, EntryKind::HardLink(_)) {
            temporary.name = None;
        }
        Ok(())
    }

    /// Owner, mode, attributes and times of what is open. To look is much cheaper than to set what is so already: each change is one of
    /// the file system's journal.
    fn dress(&mut self, file: BorrowedFd<'_>, entry: &Entry) -> Result<(), TreeError> {
        let keep = self.options.owner == Owner::Stream;
        let now = rustix::fs::fstat(file).map_err(TreeError::file("look at", &entry.path))?;
        let is_owned = (now.st_uid, now.st_gid) == (entry.uid, entry.gid);
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        if keep && !is_owned && rustix::fs::fchown(file, Some(uid), Some(gid)).is_err() {
            self.warn_owner(entry);
        }
        let mode = entry.mode & if keep && !self.owner_warned { 0o7777 } else { 0o1777 };
        // A change of the owner takes bits away.
        if (keep && !is_owned) || now.st_mode & 0o7777 != mode {
            rustix::fs::fchmod(file, Mode::from_raw_mode(mode))
                .map_err(TreeError::file("change the mode of", &entry.path))?;
        }
        for (name, value) in &entry.xattrs {
            if !keep && !name.starts_with(b"user.") {
                continue;
            }
            let set = CString::new(name.as_slice())
                .map_err(|_| Errno::INVAL)
                .and_then(|name| rustix::fs::fsetxattr(file, &name, value, XattrFlags::empty()));
            match set {
                Ok(()) => {}
                Err(errno @ (Errno::NOSPC | Errno::DQUOT)) if entry.kind == EntryKind::File => {
                    return Err(TreeError::file("write the attributes of", &entry.path)(errno));
                }
                Err(errno) if !self.xattr_warned => {
                    self.xattr_warned = true;
                    self.warnings.add(|| {
                        format!(
                            "cannot keep the attribute '{}' of '{}', and maybe others: {errno}",
                            shown(name),
                            shown(&entry.path)
                        )
                    });
                }
                Err(_) => {}
            }
        }
        rustix::fs::futimens(file, &times(entry)).map_err(TreeError::file("change the times of", &entry.path))
    }

    fn warn_owner(&mut self, entry: &Entry) {
        if !self.owner_warned {
            self.owner_warned = true;
            self.warnings
                .add(|| format!("cannot keep the owner of '{}', and maybe others: only root may", shown(&entry.path)));
        }
    }

    /// Everything is there: the name is given.
    fn commit(&mut self) -> Result<(), TreeError> {
        let (Some(staging), Some(name)) = (self.staging.clone(), self.options.name) else { return Ok(()) };
        if self.summary.entries == 0 {
            self.staging = None;
            return Ok(());
        }
        let c_name = c_name(name)?;
        let renamed =
            rustix::fs::renameat_with(self.directory, &staging, self.directory, &c_name, RenameFlags::NOREPLACE);
        let renamed = match renamed {
            // A file system without this kind of rename.
            Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::renameat(self.directory, &staging, self.directory, &c_name),
            outcome => outcome,
        };
        match renamed {
            Ok(()) => {
                self.staging = None;
                Ok(())
            }
            Err(Errno::EXIST) => {
                Err(TreeError::InTheWay { path: shown(name), why: "somebody made it while the copy was under way" })
            }
            Err(errno) => Err(TreeError::file("rename to", name)(errno)),
        }
    }

    fn give_up(&mut self) {
        if let Some(staging) = self.staging.take() {
            self.levels.clear();
            // What cannot be removed stays under a name that says what it is.
            let _ = remove_unfinished(self.directory, &staging);
        }
        // Directories that were filled and are not finished get what the stream said of them: nothing is left closed to its owner.
        while let Some(level) = self.levels.pop() {
            if let Some(entry) = level.entry {
                let _ = self.dress(level.directory.as_fd(), &entry);
            }
        }
    }
}

fn times(entry: &Entry) -> Timestamps {
    let (seconds, nanoseconds) = entry.modified;
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: i64::from(nanoseconds) },
    }
}

/// The components of a path without empty ones and dots.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, TreeError> {
    let refused = |why| TreeError::Refused { path: shown(&path[..path.len().min(PATH_LEN_MAX)]), why };
    if path.starts_with(b"/") {
        return Err(refused("it is an absolute path"));
    }
    if path.len() > PATH_LEN_MAX {
        return Err(refused("a path has at most 4096 bytes"));
    }
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(refused("it leads out of the destination")),
            name if is_name(name) => components.push(name),
            _ => return Err(refused("it has a name that no file can have")),
        }
    }
    Ok(components)
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_LEN_MAX
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}

fn c_name(name: &[u8]) -> Result<CString, TreeError> {
    CString::new(name).map_err(|_| TreeError::Refused { path: shown(name), why: "it has a zero byte" })
}

/// A name that nobody guesses.
fn hidden_name(path: &[u8]) -> Result<CString, TreeError> {
    let mut random = [0; 8];
    let mut filled = 0;
    while filled < random.len() {
        match rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(len) => filled += len,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(TreeError::file("make", path)(errno)),
        }
    }
    c_name(format!(".msb-copy-{:016x}", u64::from_ne_bytes(random)).as_bytes())
}

fn open_directory(parent: BorrowedFd<'_>, name: &CString) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(parent, name.as_c_str(), flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

fn blocked(errno: Errno, path: &[u8]) -> TreeError {
    match errno {
        Errno::LOOP => TreeError::InTheWay { path: shown(path), why: "a symbolic link is where a directory should be" },
        Errno::NOTDIR => TreeError::InTheWay { path: shown(path), why: "a file is where a directory should be" },
        errno => TreeError::file("open the directory of", path)(errno),
    }
}
