//! How much a share may hold. Called by the server before whatever takes room and after whatever gives some back.
//!
//! ```text
//!  unknown ──first change: the share is counted──► known ──change: more or less by what the file says of itself──► known
//!                                                    └──no room left, and something may have been freed: counted again──┘
//! ```
//!
//! Room is what files take on the host's disk. What others change in the directory meanwhile is seen when it is counted again. A file
//! that was deleted and is still open takes its room until it is closed: the server passes those in.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags, RawDir};
use rustix::io::Errno;

use super::attributes::{host_stat, key_of, type_of};
use super::nodes::open_entry;

/// What statx(2) counts in.
const BLOCK_BYTES: u64 = 512;
/// What a new file or directory takes, until it is counted.
pub(super) const ENTRY_BYTES: u64 = 4096;
/// Directories open at once while counting: the depth of a tree.
const DEPTH_MAX: usize = 512;
/// Bytes of a directory read from the host at once.
const DIRECTORY_BYTES: usize = 16 << 10;

/// The quota of one share.
#[derive(Debug)]
pub(super) struct Quota {
    limit_bytes: u64,
    /// What the share holds; none before it was first counted.
    used_bytes: Option<u64>,
    /// Whether something may have been freed since it was counted.
    is_stale: bool,
}

impl Quota {
    /// Of a share that has not been counted.
    pub(super) fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, used_bytes: None, is_stale: true }
    }

    /// Whether there is room for so many bytes more; `count` says what the share holds.
    pub(super) fn admit(&mut self, bytes: u64, count: impl FnOnce() -> Result<u64, Errno>) -> Result<(), Errno> {
        let fits = |used: Option<u64>| used.is_some_and(|used| used.saturating_add(bytes) <= self.limit_bytes);
        if fits(self.used_bytes) {
            return Ok(());
        }
        if self.is_stale || self.used_bytes.is_none() {
            self.used_bytes = Some(count()?);
            self.is_stale = false;
        }
        if fits(self.used_bytes) { Ok(()) } else { Err(Errno::NOSPC) }
    }

    /// A file took so much before a change, and takes so much now.
    pub(super) fn changed(&mut self, before_bytes: u64, after_bytes: u64) {
        if let Some(used) = &mut self.used_bytes {
            *used = used.saturating_add(after_bytes).saturating_sub(before_bytes);
        }
        self.is_stale |= after_bytes < before_bytes;
    }

    /// Something went away, and nobody said how much.
    pub(super) fn freed(&mut self) {
        self.is_stale = true;
    }

    /// The size that the guest sees, and what of it is free.
    pub(super) fn size(&self) -> (u64, u64) {
        (self.limit_bytes, self.limit_bytes.saturating_sub(self.used_bytes.unwrap_or(0)))
    }
}

/// What a file takes on the disk, in bytes.
pub(super) fn taken(file: BorrowedFd<'_>) -> Result<u64, Errno> {
    Ok(host_stat(file)?.stx_blocks.saturating_mul(BLOCK_BYTES))
}

/// What a deleted file still takes; nothing if it has a name.
pub(super) fn taken_without_name(file: BorrowedFd<'_>) -> u64 {
    host_stat(file).map_or(0, |stat| if stat.stx_nlink == 0 { stat.stx_blocks.saturating_mul(BLOCK_BYTES) } else { 0 })
}

/// What everything below a directory takes, each file once whatever names it has. No link is followed.
///
/// # Errors
/// `ENAMETOOLONG` for a tree that is deeper than [`DEPTH_MAX`]. What goes away meanwhile, or may not be read, counts as nothing.
pub(super) fn count(root: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut total = taken(root)?;
    if type_of(&host_stat(root)?) != FileType::Directory {
        return Ok(total);
    }
    let mut linked = HashSet::new();
    // Each level's directory, with what of it is still to be gone into.
    let mut levels: Vec<(OwnedFd, Vec<Vec<u8>>)> = Vec::new();
    let mut next = Some(open_directory(root, b".").or_else(|_| rustix::io::fcntl_dupfd_cloexec(root, 3))?);
    loop {
        if let Some(directory) = next.take() {
            if levels.len() >= DEPTH_MAX {
                return Err(Errno::NAMETOOLONG);
            }
            let mut below = Vec::new();
            let mut buffer = Vec::with_capacity(DIRECTORY_BYTES);
            let mut entries = RawDir::new(&directory, buffer.spare_capacity_mut());
            while let Some(Ok(entry)) = entries.next() {
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let Ok(file) = open_entry(directory.as_fd(), name, OFlags::PATH, 0) else { continue };
                let Ok(stat) = host_stat(file.as_fd()) else { continue };
                let is_directory = type_of(&stat) == FileType::Directory;
                if is_directory || stat.stx_nlink < 2 || linked.insert(key_of(&stat)) {
                    total = total.saturating_add(stat.stx_blocks.saturating_mul(BLOCK_BYTES));
                }
                if is_directory {
                    below.push(name.to_vec());
                }
            }
            levels.push((directory, below));
        }
        let Some((directory, below)) = levels.last_mut() else { return Ok(total) };
        match below.pop() {
            Some(name) => next = open_directory(directory.as_fd(), &name).ok(),
            None => drop(levels.pop()),
        }
    }
}

fn open_directory(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    open_entry(parent, name, OFlags::RDONLY | OFlags::DIRECTORY, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_counted_whole_and_each_file_once() {
        let tree = tempfile::tempdir().unwrap();
        let at = |name: &str| tree.path().join(name);
        let root = std::fs::File::open(tree.path()).unwrap();
        std::fs::create_dir_all(at("a/b/c")).unwrap();
        let empty = count(root.as_fd()).unwrap();
        std::fs::write(at("a/b/c/file"), vec![1; 1 << 20]).unwrap();
        std::fs::hard_link(at("a/b/c/file"), at("again")).unwrap();
        std::os::unix::fs::symlink("/", at("a/link")).unwrap();
        let sparse = std::fs::File::create(at("holes")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let found = count(root.as_fd()).unwrap() - empty;
        assert!((1 << 20..(1 << 20) + (64 << 10)).contains(&found), "{found}");
    }

    #[test]
    fn room_is_counted_again_only_where_some_may_have_been_freed() {
        let mut quota = Quota::new(100);
        let never = || panic!("counted");
        quota.admit(60, || Ok(40)).unwrap();
        quota.changed(0, 60);
        assert_eq!(quota.admit(1, never), Err(Errno::NOSPC));
        quota.admit(0, never).unwrap();
        quota.freed();
        assert_eq!(quota.admit(1, || Ok(100)), Err(Errno::NOSPC));
        assert_eq!(quota.admit(1, never), Err(Errno::NOSPC));
        quota.changed(60, 10);
        quota.admit(50, never).unwrap();
        assert_eq!(quota.size(), (100, 50));
    }
}
