//! Copies a directory tree with modes, owners, times, extended attributes, links and device nodes, without following any link.
//! Called by `volumes`. The tree comes from an image and is hostile: depth and remembered hard links are bounded.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::directory::path_of;

/// Deepest directory that is copied.
const DEPTH_MAX: usize = 512;
/// Most files with several names that are remembered; the names of more become files of their own.
const LINKS_MAX: usize = 100_000;
/// Longest extended attribute (XATTR_SIZE_MAX) and list of names (XATTR_LIST_MAX), in bytes.
const XATTR_LEN_MAX: usize = 64 << 10;
/// Piece of a file that is copied at once, in bytes.
const COPY_LEN: usize = 1 << 20;

/// Copies what is in `source` into `target`, which is empty, and gives `target` the attributes of `source`. Says how many entries
/// there were.
///
/// # Errors
/// As the file calls; InvalidData for a tree that is too deep.
pub fn copy_tree(source: &OwnedFd, target: &OwnedFd) -> io::Result<u64> {
    let mut copier = Copier { links: HashMap::new(), entries: 0, root: rustix::io::fcntl_dupfd_cloexec(target, 3)? };
    copier.directory(source.as_fd(), target.as_fd(), &[], 0)?;
    Ok(copier.entries)
}

struct Copier {
    /// Inode of the source to its first name in the target, relative to the root.
    links: HashMap<u64, CString>,
    root: OwnedFd,
    entries: u64,
}

impl Copier {
    fn directory(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        prefix: &[u8],
        depth: usize,
    ) -> io::Result<()> {
        if depth > DEPTH_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "directories are nested too deep"));
        }
        for entry in Dir::read_from(source)? {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                self.entry(source, target, name, prefix, depth)?;
            }
        }
        let stat = rustix::fs::fstat(source)?;
        copy_xattrs(&inside(source, c".")?, &inside(target, c".")?)?;
        rustix::fs::fchown(target, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
        rustix::fs::fchmod(target, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
        rustix::fs::futimens(target, &times(&stat))?;
        Ok(())
    }

    fn entry(
        &mut self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        name: &CStr,
        prefix: &[u8],
        depth: usize,
    ) -> io::Result<()> {
        self.entries += 1;
        let stat = rustix::fs::statat(source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut path = prefix.to_vec();
        path.extend_from_slice(name.to_bytes());
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&stat.st_ino) {
                rustix::fs::linkat(&self.root, first.as_c_str(), target, name, AtFlags::empty())?;
                return Ok(());
            }
            if self.links.len() < LINKS_MAX {
                self.links.insert(stat.st_ino, CString::new(path.clone())?);
            }
        }
        let open_new = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match kind {
            FileType::Directory => {
                rustix::fs::mkdirat(target, name, Mode::from_raw_mode(0o700))?;
                let from =
                    rustix::fs::openat(source, name, OFlags::RDONLY | OFlags::DIRECTORY | open_new, Mode::empty())?;
                let to =
                    rustix::fs::openat(target, name, OFlags::RDONLY | OFlags::DIRECTORY | open_new, Mode::empty())?;
                path.push(b'/');
                return self.directory(from.as_fd(), to.as_fd(), &path, depth + 1);
            }
            FileType::RegularFile => {
                let from = rustix::fs::openat(source, name, OFlags::RDONLY | open_new, Mode::empty())?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | open_new;
                let to = rustix::fs::openat(target, name, flags, Mode::from_raw_mode(0o600))?;
                copy_data(&from, &to, u64::try_from(stat.st_size).unwrap_or(0))?;
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(source, name, Vec::new())?;
                rustix::fs::symlinkat(link.as_c_str(), target, name)?;
            }
            kind => rustix::fs::mknodat(target, name, kind, Mode::from_raw_mode(stat.st_mode & 0o7777), stat.st_rdev)?,
        }
        copy_xattrs(&inside(source, name)?, &inside(target, name)?)?;
        rustix::fs::chownat(
            target,
            name,
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
        if kind != FileType::Symlink {
            // After the change of owner, which takes set-id bits away.
            rustix::fs::chmodat(target, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())?;
        }
        rustix::fs::utimensat(target, name, &times(&stat), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }
}

fn times(stat: &rustix::fs::Stat) -> Timestamps {
    let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: i64::try_from(nanoseconds).unwrap_or(0) };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

/// A path to a name in an open directory.
fn inside(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<CString> {
    let mut path = path_of(directory).into_bytes();
    path.push(b'/');
    path.extend_from_slice(name.to_bytes());
    Ok(CString::new(path)?)
}

/// Copies contents, keeping holes.
fn copy_data(from: &OwnedFd, to: &OwnedFd, len: u64) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom, Write};
    let mut from = std::fs::File::from(rustix::io::fcntl_dupfd_cloexec(from, 3)?);
    let mut to = std::fs::File::from(rustix::io::fcntl_dupfd_cloexec(to, 3)?);
    let mut at = 0;
    while at < len {
        let data = match rustix::fs::seek(&from, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        let hole = rustix::fs::seek(&from, rustix::fs::SeekFrom::Hole(data)).unwrap_or(len).max(data + 1);
        from.seek(SeekFrom::Start(data))?;
        to.seek(SeekFrom::Start(data))?;
        let mut left = (hole - data).min(len.saturating_sub(data));
        let mut buffer = vec![0; usize::try_from(left).unwrap_or(COPY_LEN).min(COPY_LEN)];
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(COPY_LEN).min(buffer.len());
            let read = from.read(&mut buffer[..piece])?;
            if read == 0 {
                break;
            }
            to.write_all(&buffer[..read])?;
            left -= read as u64;
        }
        at = hole;
    }
    to.set_len(len)
}

/// Copies extended attributes of what two paths name, without following a last link. The overlay's own marks stay behind.
fn copy_xattrs(from: &CStr, to: &CStr) -> io::Result<()> {
    let mut names = vec![0u8; XATTR_LEN_MAX];
    let listed = match rustix::fs::llistxattr(from, names.as_mut_slice()) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    if listed == 0 {
        return Ok(());
    }
    let mut value = vec![0u8; XATTR_LEN_MAX];
    for name in names[..listed]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && !name.starts_with(b"trusted.overlay."))
    {
        let name = CString::new(name)?;
        let len = rustix::fs::lgetxattr(from, name.as_c_str(), value.as_mut_slice())?;
        match rustix::fs::lsetxattr(to, name.as_c_str(), &value[..len], XattrFlags::empty()) {
            // What the target cannot hold is left out, as docker does.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_tree_arrives_with_all_that_belongs_to_it() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(from.path().join("d")).unwrap();
        fs::write(from.path().join("d/file"), "text").unwrap();
        fs::set_permissions(from.path().join("d/file"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::hard_link(from.path().join("d/file"), from.path().join("same")).unwrap();
        symlink("/etc/passwd", from.path().join("link")).unwrap();
        let sparse = fs::File::create(from.path().join("sparse")).unwrap();
        sparse.set_len(32 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", 20 << 20).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, from.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0)
            .unwrap();
        let has_xattrs =
            rustix::fs::lsetxattr(from.path().join("d"), "user.note", b"kept", XattrFlags::empty()).is_ok();
        fs::set_permissions(from.path().join("d"), fs::Permissions::from_mode(0o1500)).unwrap();

        let open = |path: &std::path::Path| OwnedFd::from(fs::File::open(path).unwrap());
        assert_eq!(copy_tree(&open(from.path()), &open(to.path())).unwrap(), 6);

        let at = |name: &str| fs::symlink_metadata(to.path().join(name)).unwrap();
        assert_eq!(fs::read(to.path().join("d/file")).unwrap(), b"text");
        assert_eq!(
            (at("d").mode() & 0o7777, at("d/file").mode() & 0o7777, at("fifo").mode() & 0o7777),
            (0o1500, 0o4751, 0o640)
        );
        assert_eq!((at("d/file").ino(), at("d/file").nlink()), (at("same").ino(), 2));
        assert_eq!(fs::read_link(to.path().join("link")).unwrap().to_str(), Some("/etc/passwd"));
        assert_eq!(at("sparse").len(), 32 << 20);
        assert!(at("sparse").blocks() * 512 < 4 << 20, "the hole was filled");
        assert_eq!(&fs::read(to.path().join("sparse")).unwrap()[20 << 20..(20 << 20) + 3], b"end");
        assert_eq!(at("d/file").mtime_nsec(), fs::symlink_metadata(from.path().join("d/file")).unwrap().mtime_nsec());
        if has_xattrs {
            let mut value = [0u8; 8];
            let len = rustix::fs::lgetxattr(to.path().join("d"), "user.note", &mut value[..]).unwrap();
            assert_eq!(&value[..len], b"kept");
        }
    }
}
