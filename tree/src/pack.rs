//! A tree becomes a tar stream: depth first, in the order of its directories, with one buffer and one descriptor for each level. Called by
//! the agent (a tree of the guest) and by the SDK (a tree of the host). It follows no link below its root, and never opens a device.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;
use tar::EntryType;

use crate::header::{self, BLOCK_LEN, Described, padding};
use crate::read::{EXTENSION_LEN_MAX, EXTENTS_MAX};
use crate::{DEPTH_MAX, PATH_LEN_MAX, Summary, TreeError, Warnings, shown};

/// Bytes handed on at once.
const CHUNK_LEN: usize = 64 << 10;
/// Most bytes of paths that are kept to find hard links again; what is beyond becomes a file of its own.
const LINKS_LEN_MAX: usize = 4 << 20;
/// Most bytes of extended attributes of one entry.
const XATTRS_LEN_MAX: usize = (EXTENSION_LEN_MAX / 2) as usize;
/// `st_blocks` counts these.
const STAT_BLOCK_LEN: i64 = 512;

/// What to pack.
#[derive(Clone, Copy, Debug)]
pub struct PackOptions<'a> {
    /// The path of the root. A symbolic link in its last component is packed itself, unless a slash follows it.
    pub path: &'a CStr,
    /// The root's name in the stream; `.` for a directory whose entries are meant.
    pub name: &'a [u8],
    /// Follows a link in the last component of `path`.
    pub follow: bool,
}

/// Writes a tree as a whole tar archive.
///
/// # Errors
/// [`TreeError`]; what was written until then is not whole.
pub fn pack(options: PackOptions<'_>, out: impl Write, tell: &mut dyn FnMut(String)) -> Result<Summary, TreeError> {
    let mut packer = Packer {
        out: Sink { out, buffer: vec![0; CHUNK_LEN], filled: 0 },
        path: options.name.to_vec(),
        links: HashMap::new(),
        links_len: 0,
        head: Vec::new(),
        summary: Summary::default(),
        warnings: Warnings { count: 0, tell },
    };
    packer.root(options)?;
    packer.out.put(&[0; 2 * BLOCK_LEN])?;
    packer.out.flush()?;
    Ok(Summary { warnings: packer.warnings.count, ..packer.summary })
}

struct Packer<'a, W> {
    out: Sink<W>,
    /// Path of the current entry in the stream.
    path: Vec<u8>,
    /// The first name of each file that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
    links_len: usize,
    head: Vec<u8>,
    summary: Summary,
    warnings: Warnings<'a>,
}

struct Level {
    directory: Dir,
    /// Length of its path.
    len: usize,
    device: u64,
}

/// What became of one entry.
enum Outcome {
    Done,
    /// A directory: its entries come next.
    Enter(Box<Level>),
}

impl<W: Write> Packer<'_, W> {
    fn root(&mut self, options: PackOptions<'_>) -> Result<(), TreeError> {
        let path = options.path;
        let failed = |what| TreeError::file(what, path.to_bytes());
        let nofollow = if options.follow { OFlags::empty() } else { OFlags::NOFOLLOW };
        let found = open(CWD, path, OFlags::PATH | nofollow).map_err(failed("open"))?;
        let stat = rustix::fs::fstat(&found).map_err(failed("look at"))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if options.name == b"." && kind != FileType::Directory {
            return Err(failed("open")(Errno::NOTDIR));
        }
        let outcome = match kind {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&found, c"", Vec::new()).map_err(failed("read"))?;
                self.symlink(&stat, target.to_bytes())?;
                Outcome::Done
            }
            FileType::Directory | FileType::RegularFile => {
                drop(found);
                let opened = open(CWD, path, READ | nofollow).map_err(failed("open"))?;
                self.opened(opened, None)?
            }
            other => return Err(TreeError::Special { path: shown(path.to_bytes()), kind: name_of(other) }),
        };
        if let Outcome::Enter(level) = outcome {
            self.walk(*level)?;
        }
        Ok(())
    }

    fn walk(&mut self, top: Level) -> Result<(), TreeError> {
        let mut levels = vec![top];
        while let Some(level) = levels.last_mut() {
            self.path.truncate(level.len);
            let entry = match level.directory.read() {
                None => {
                    levels.pop();
                    continue;
                }
                Some(entry) => entry.map_err(TreeError::file("read", &self.path))?,
            };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.path.push(b'/');
            self.path.extend_from_slice(name.to_bytes());
            if self.path.len() > PATH_LEN_MAX {
                return Err(TreeError::Limit { path: shown(&self.path), limit: "a path has at most 4096 bytes" });
            }
            let (name, kind, device) = (name.to_owned(), entry.file_type(), level.device);
            let directory = level.directory.fd().map_err(TreeError::file("read", &self.path))?;
            if let Outcome::Enter(below) = self.entry(directory, &name, kind, device)? {
                if levels.len() >= DEPTH_MAX {
                    return Err(TreeError::Limit {
                        path: shown(&self.path),
                        limit: "a tree is at most 256 levels deep",
                    });
                }
                levels.push(*below);
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CString,
        kind: FileType,
        device: u64,
    ) -> Result<Outcome, TreeError> {
        let look = || rustix::fs::statat(parent, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW);
        let mut kind = kind;
        if kind == FileType::Unknown {
            match look() {
                Ok(stat) => kind = FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => return Ok(self.vanished()),
                Err(errno) => return Err(TreeError::file("look at", &self.path)(errno)),
            }
        }
        match kind {
            FileType::Symlink => {
                let found =
                    look().and_then(|stat| Ok((stat, rustix::fs::readlinkat(parent, name.as_c_str(), Vec::new())?)));
                match found {
                    Ok((stat, target)) => self.symlink(&stat, target.to_bytes())?,
                    Err(Errno::NOENT | Errno::INVAL) => return Ok(self.vanished()),
                    Err(errno) => return Err(TreeError::file("read", &self.path)(errno)),
                }
                Ok(Outcome::Done)
            }
            FileType::RegularFile | FileType::Directory => {
                match rustix::fs::openat(
                    parent,
                    name.as_c_str(),
                    READ | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                ) {
                    Ok(opened) => self.opened(opened, Some(device)),
                    // Something else stands there by now.
                    Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => Ok(self.vanished()),
                    Err(errno) => Err(TreeError::file("open", &self.path)(errno)),
                }
            }
            other => {
                let path = &self.path;
                self.warnings.add(|| format!("left out '{}': it is a {}", shown(path), name_of(other)));
                Ok(Outcome::Done)
            }
        }
    }

    fn vanished(&mut self) -> Outcome {
        let path = &self.path;
        self.warnings.add(|| format!("left out '{}': it vanished meanwhile", shown(path)));
        Outcome::Done
    }

    /// An open file or directory. `device`: where its parent is; none for the root.
    fn opened(&mut self, opened: OwnedFd, device: Option<u64>) -> Result<Outcome, TreeError> {
        let stat = rustix::fs::fstat(&opened).map_err(TreeError::file("look at", &self.path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                if device.is_some_and(|device| device != stat.st_dev) && is_kernel_made(&opened) {
                    let path = &self.path;
                    self.warnings.add(|| format!("left out '{}': the kernel makes its files up", shown(path)));
                    return Ok(Outcome::Done);
                }
                let xattrs = self.xattrs(opened.as_fd());
                self.describe(&stat, EntryType::Directory, b"", 0, None, &xattrs)?;
                let directory = Dir::new(opened).map_err(TreeError::file("read", &self.path))?;
                Ok(Outcome::Enter(Box::new(Level { directory, len: self.path.len(), device: stat.st_dev })))
            }
            FileType::RegularFile => {
                self.file(&opened, &stat)?;
                Ok(Outcome::Done)
            }
            other if device.is_none() => Err(TreeError::Special { path: shown(&self.path), kind: name_of(other) }),
            _ => Ok(self.vanished()),
        }
    }

    fn symlink(&mut self, stat: &Stat, target: &[u8]) -> Result<(), TreeError> {
        self.describe(stat, EntryType::Symlink, target, 0, None, &[])
    }

    fn file(&mut self, file: &OwnedFd, stat: &Stat) -> Result<(), TreeError> {
        if stat.st_nlink > 1 {
            let identity = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&identity) {
                let first = first.clone();
                return self.describe(stat, EntryType::Link, &first, 0, None, &[]);
            }
            if self.links_len + self.path.len() <= LINKS_LEN_MAX {
                self.links_len += self.path.len();
                self.links.insert(identity, self.path.clone());
            }
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let xattrs = self.xattrs(file.as_fd());
        let extents = if stat.st_blocks < stat.st_size / STAT_BLOCK_LEN { extents(file, size) } else { None };
        let Some(extents) = extents else {
            self.describe(stat, EntryType::Regular, b"", size, None, &xattrs)?;
            self.content(file, 0, size)?;
            return self.pad(size);
        };
        let mut map = format!("{}\n", extents.len()).into_bytes();
        for (offset, len) in &extents {
            map.extend_from_slice(format!("{offset}\n{len}\n").as_bytes());
        }
        map.resize(map.len() + padding(map.len() as u64), 0);
        let stored = map.len() as u64 + extents.iter().map(|(_, len)| len).sum::<u64>();
        self.describe(stat, EntryType::Regular, b"", stored, Some(size), &xattrs)?;
        self.out.put(&map)?;
        for (offset, len) in extents {
            self.content(file, offset, len)?;
        }
        self.pad(stored)
    }

    /// Exactly `len` bytes, whatever becomes of the file meanwhile.
    fn content(&mut self, file: &OwnedFd, mut offset: u64, len: u64) -> Result<(), TreeError> {
        let end = offset + len;
        self.summary.bytes += len;
        while offset < end {
            let space = self.out.space()?;
            let len = usize::try_from(end - offset).unwrap_or(usize::MAX).min(space.len());
            match rustix::io::pread(file, &mut space[..len], offset) {
                Ok(0) => break,
                Ok(len) => {
                    self.out.filled += len;
                    offset += len as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(TreeError::file("read", &self.path)(errno)),
            }
        }
        if offset < end {
            let path = &self.path;
            self.warnings.add(|| format!("'{}' became shorter while it was copied; its end is zeros", shown(path)));
        }
        while offset < end {
            let space = self.out.space()?;
            let len = usize::try_from(end - offset).unwrap_or(usize::MAX).min(space.len());
            space[..len].fill(0);
            self.out.filled += len;
            offset += len as u64;
        }
        Ok(())
    }

    fn pad(&mut self, size: u64) -> Result<(), TreeError> {
        Ok(self.out.put(&[0; BLOCK_LEN][..padding(size)])?)
    }

    fn describe(
        &mut self,
        stat: &Stat,
        kind: EntryType,
        link: &[u8],
        size: u64,
        sparse_size: Option<u64>,
        xattrs: &[(Vec<u8>, Vec<u8>)],
    ) -> Result<(), TreeError> {
        self.head.clear();
        let len = self.path.len();
        if kind == EntryType::Directory {
            self.path.push(b'/');
        }
        let mtime = (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0));
        let (path, mode) = (self.path.as_slice(), stat.st_mode);
        header::write(
            &Described { path, kind, link, mode, uid: stat.st_uid, gid: stat.st_gid, mtime, size, sparse_size, xattrs },
            &mut self.head,
        );
        self.path.truncate(len);
        self.summary.entries += 1;
        Ok(self.out.put(&self.head)?)
    }

    fn xattrs(&mut self, file: BorrowedFd<'_>) -> Vec<(Vec<u8>, Vec<u8>)> {
        // Most files have none, and then one system call says so.
        let Ok(len @ 1..) = rustix::fs::flistxattr_query(file) else { return Vec::new() };
        let mut names = vec![0; len + 256];
        let Ok(len) = rustix::fs::flistxattr(file, names.as_mut_slice()) else { return Vec::new() };
        names.truncate(len);
        let mut found = Vec::new();
        let mut sum = 0;
        for name in names.split(|byte| *byte == 0).filter(|name| is_kept(name)) {
            let Ok(c_name) = CString::new(name) else { continue };
            let mut value = vec![0; 64 << 10];
            // One that vanished, or that this caller may not read.
            let Ok(len) = rustix::fs::fgetxattr(file, c_name.as_c_str(), value.as_mut_slice()) else { continue };
            value.truncate(len);
            sum += name.len() + value.len();
            if sum > XATTRS_LEN_MAX {
                let path = &self.path;
                self.warnings.add(|| format!("'{}' has more extended attributes than are copied", shown(path)));
                break;
            }
            found.push((name.to_vec(), value));
        }
        found
    }
}

/// Attributes that mean something elsewhere: not the overlay's own, not labels of this system's policy.
fn is_kept(name: &[u8]) -> bool {
    !name.is_empty()
        && !name.starts_with(b"trusted.")
        && ![&b"security.selinux"[..], b"security.ima", b"security.evm", b"security.apparmor"].contains(&name)
}

const READ: OFlags = OFlags::RDONLY.union(OFlags::NONBLOCK).union(OFlags::NOCTTY);

/// Opens the root. Links of /proc, which lead out of every root, are not followed.
fn open(at: impl AsFd, path: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    loop {
        match rustix::fs::openat2(&at, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_MAGICLINKS) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

/// The pieces of data of a file, if it has holes and its file system tells.
fn extents(file: &OwnedFd, size: u64) -> Option<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        if data >= size {
            break;
        }
        // The last one that is kept goes on to the end.
        let hole = if found.len() + 1 == EXTENTS_MAX {
            size
        } else {
            rustix::fs::seek(file, SeekFrom::Hole(data)).ok()?.clamp(data, size)
        };
        if hole > data {
            found.push((data, hole - data));
        }
        at = hole.max(at + 1);
    }
    if found == [(0, size)] {
        return None;
    }
    // GNU tar learns the size from the last piece: one of nothing, if the file ends with a hole.
    if found.last().is_none_or(|(offset, len)| offset + len < size) {
        found.push((size, 0));
    }
    Some(found)
}

/// Whether a directory is on a file system without files of its own.
fn is_kernel_made(directory: &OwnedFd) -> bool {
    // linux/magic.h: proc, sysfs, cgroup2, cgroup, devpts, debugfs, tracefs, securityfs, bpf, configfs, pstore, mqueue, binfmt_misc.
    const MAGICS: [u32; 13] = [
        0x9fa0,
        0x6265_6572,
        0x6367_7270,
        0x0027_e0eb,
        0x1cd1,
        0x6462_6720,
        0x7472_6163,
        0x7363_6673,
        0xcafe_4a11,
        0x6265_6570,
        0x6165_676c,
        0x1980_0202,
        0x4249_4e4d,
    ];
    // The numbers are 32 bits wide whatever the type.
    rustix::fs::fstatfs(directory).is_ok_and(|stat| MAGICS.contains(&(stat.f_type as u32)))
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
        FileType::CharacterDevice | FileType::BlockDevice => "device",
        _ => "thing of an unknown kind",
    }
}

/// Collects what is written to chunks.
struct Sink<W> {
    out: W,
    buffer: Vec<u8>,
    filled: usize,
}

impl<W: Write> Sink<W> {
    fn flush(&mut self) -> io::Result<()> {
        self.out.write_all(&self.buffer[..self.filled])?;
        self.filled = 0;
        self.out.flush()
    }

    /// Room for at least one byte; what is put there counts once `filled` says so.
    fn space(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.out.write_all(&self.buffer)?;
            self.filled = 0;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let space = self.space()?;
            let len = space.len().min(bytes.len());
            space[..len].copy_from_slice(&bytes[..len]);
            self.filled += len;
            bytes = &bytes[len..];
        }
        Ok(())
    }
}
