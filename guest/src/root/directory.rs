//! The workload's root as a directory that no path leaves: every look-up is openat2 with RESOLVE_IN_ROOT, because the image (and
//! later the workload) chooses the symbolic links. Used while the root is set up and to read accounts for each session.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// How often a change under our feet makes openat2 ask for another try.
const RETRIES_MAX: usize = 16;

/// A root directory.
#[derive(Debug)]
pub struct RootDirectory {
    directory: OwnedFd,
}

impl RootDirectory {
    /// Opens a directory of the agent's own view as a root.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Self { directory: rustix::fs::open(path, flags, Mode::empty())? })
    }

    /// The directory itself.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Opens a path inside, following symbolic links inside.
    ///
    /// # Errors
    /// As openat2(2).
    pub fn open_path(&self, path: &Path, flags: OFlags, mode: u32) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(mode) } else { Mode::empty() };
        for _ in 0..RETRIES_MAX {
            match openat2(&self.directory, path, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::AGAIN) => {}
                outcome => return outcome.map_err(io::Error::from),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// Reads a regular file of at most `len_max` bytes.
    ///
    /// # Errors
    /// As openat2(2) and read(2); InvalidData for another kind of file or a longer one.
    pub fn read(&self, path: &Path, len_max: usize) -> io::Result<Vec<u8>> {
        // NONBLOCK: a FIFO with this name must not hold the agent.
        let file = std::fs::File::from(self.open_path(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, 0)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
        }
        let mut text = Vec::new();
        file.take(len_max as u64 + 1).read_to_end(&mut text)?;
        if text.len() > len_max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than its limit"));
        }
        Ok(text)
    }

    /// Makes a directory with all its parents, and opens it.
    ///
    /// # Errors
    /// As mkdirat(2); ENOTDIR if something else is in the way.
    pub fn create_directories(&self, path: &Path, mode: u32) -> io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY;
        let mut walked = std::path::PathBuf::from("/");
        let mut directory = self.open_path(&walked, flags, 0)?;
        for component in path.components() {
            let Component::Normal(name) = component else { continue };
            walked.push(name);
            directory = match self.open_path(&walked, flags, 0) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(mode))?;
                    self.open_path(&walked, flags, 0)?
                }
                outcome => outcome?,
            };
        }
        Ok(directory)
    }

    /// Makes a regular file hold exactly `text`; leaves it alone if it does already. A symbolic link that leads nowhere is replaced.
    ///
    /// # Errors
    /// As openat2(2) and write(2).
    pub fn write(&self, path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
        if self.read(path, text.len()).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let parent = self.create_directories(path.parent().unwrap_or(Path::new("/")), 0o755)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = match self.open_path(path, flags, mode) {
            Ok(file) => file,
            Err(_) => {
                let name = path.file_name().ok_or(Errno::INVAL)?;
                rustix::fs::unlinkat(&parent, name, rustix::fs::AtFlags::empty())?;
                self.open_path(path, flags | OFlags::EXCL, mode)?
            }
        };
        std::fs::File::from(file).write_all(text)
    }
}

/// A path by which mount(2) reaches an open file or directory, whatever lies on the way to it.
pub fn path_of(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_of_the_image_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        symlink("/etc/passwd", dir.path().join("etc/shadow-of-host")).unwrap();
        symlink("../../../../etc", dir.path().join("up")).unwrap();
        let root = RootDirectory::open(dir.path()).unwrap();
        assert!(root.read(Path::new("/etc/shadow-of-host"), 1 << 20).is_err(), "the host's passwd was read");
        root.write(Path::new("/up/passwd"), b"ours", 0o644).unwrap();
        assert_eq!(root.read(Path::new("/etc/shadow-of-host"), 10).unwrap(), b"ours");
        assert_eq!(std::fs::read(dir.path().join("etc/passwd")).unwrap(), b"ours");
    }

    #[test]
    fn files_are_bounded_regular_and_replaced_where_a_link_dangles() {
        let dir = tempfile::tempdir().unwrap();
        let root = RootDirectory::open(dir.path()).unwrap();
        root.write(Path::new("/etc/resolv.conf"), b"12345", 0o644).unwrap();
        assert!(root.read(Path::new("/etc/resolv.conf"), 4).is_err());
        assert!(root.read(Path::new("/etc"), 4).is_err());
        symlink("/run/gone/stub", dir.path().join("dangling")).unwrap();
        root.write(Path::new("/dangling"), b"x", 0o644).unwrap();
        assert!(dir.path().join("dangling").symlink_metadata().unwrap().is_file());
        rustix::fs::mknodat(root.directory(), "fifo", rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        assert!(root.read(Path::new("/fifo"), 4).is_err());
    }

    #[test]
    fn directories_are_made_through_links_and_not_over_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("real")).unwrap();
        symlink("/real", dir.path().join("link")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let root = RootDirectory::open(dir.path()).unwrap();
        root.create_directories(Path::new("/link/a/b"), 0o755).unwrap();
        assert!(dir.path().join("real/a/b").is_dir());
        assert!(root.create_directories(Path::new("/file/a"), 0o755).is_err());
    }
}
