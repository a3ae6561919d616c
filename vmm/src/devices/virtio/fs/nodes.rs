//! The files the guest knows, by the number it knows them under. Bounded: so many numbers, so many descriptors. A file whose
//! descriptor was given up is found again from its share downwards, name by name, and must be the same file as before.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::Share;
use super::attributes::{host_stat, key_of, type_of};

/// The number of the file system's own top, which holds the shares.
pub(super) const TOP: u64 = 1;
/// Most files a guest may know at once.
const NODES_MAX: usize = 1 << 20;
/// Levels below a share at most when a file is found again.
const DEPTH_MAX: usize = 512;
/// How often a rename under our feet makes openat2 ask for another try.
const RETRIES_MAX: usize = 16;

/// A file the guest knows.
#[derive(Debug)]
pub(super) struct Node {
    /// The share it is in, by its place.
    pub(super) share: usize,
    /// What it is on the host.
    pub(super) kind: FileType,
    key: (u64, u64),
    parent: u64,
    name: Box<[u8]>,
    file: Option<Arc<OwnedFd>>,
    /// How often the guest was told of it and has not forgotten.
    told: u64,
    /// Used since it was last looked at for giving up its descriptor.
    used: bool,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<(usize, u64, u64), u64>,
    next: u64,
    /// Nodes with a descriptor that can be given up, oldest first.
    open: VecDeque<u64>,
    files_max: usize,
    shares: u64,
}

/// Looks one name up in a directory: no link is followed, nothing above is reached.
pub(super) fn open_entry(directory: BorrowedFd<'_>, name: &[u8], flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..RETRIES_MAX {
        match openat2(directory, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::from_raw_mode(mode), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            outcome => return outcome,
        }
    }
    Err(Errno::AGAIN)
}

impl Nodes {
    /// The shares' roots alone, under the numbers that follow [`TOP`].
    pub(super) fn new(shares: &[Share], files_max: usize) -> Self {
        let mut nodes = Self {
            nodes: HashMap::new(),
            by_key: HashMap::new(),
            next: TOP + 1,
            open: VecDeque::new(),
            files_max,
            shares: shares.len() as u64,
        };
        for (share, Share { root, kind, key, .. }) in shares.iter().enumerate() {
            let node = Node {
                share,
                kind: *kind,
                key: *key,
                parent: TOP,
                name: Box::default(),
                file: Some(Arc::clone(root)),
                told: 1,
                used: true,
            };
            nodes.by_key.insert((share, key.0, key.1), nodes.next);
            nodes.nodes.insert(nodes.next, node);
            nodes.next += 1;
        }
        nodes
    }

    /// The number of a share's root.
    pub(super) fn root(&self, share: usize) -> u64 {
        TOP + 1 + share as u64
    }

    fn is_root(&self, number: u64) -> bool {
        (TOP + 1..TOP + 1 + self.shares).contains(&number)
    }

    /// A file by its number.
    pub(super) fn get(&self, number: u64) -> Result<&Node, Errno> {
        self.nodes.get(&number).ok_or(Errno::STALE)
    }

    /// A descriptor of a file, as a path.
    pub(super) fn file(&mut self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        let node = self.nodes.get_mut(&number).ok_or(Errno::STALE)?;
        node.used = true;
        if let Some(file) = &node.file {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(self.find_again(number)?);
        self.hold(number, &file);
        Ok(file)
    }

    fn hold(&mut self, number: u64, file: &Arc<OwnedFd>) {
        while self.open.len() >= self.files_max {
            let Some(oldest) = self.open.pop_front() else { break };
            let Some(node) = self.nodes.get_mut(&oldest) else { continue };
            if std::mem::take(&mut node.used) {
                self.open.push_back(oldest);
            } else {
                node.file = None;
            }
        }
        if let Some(node) = self.nodes.get_mut(&number) {
            node.file = Some(Arc::clone(file));
            self.open.push_back(number);
        }
    }

    fn find_again(&self, number: u64) -> Result<OwnedFd, Errno> {
        let mut names = Vec::new();
        let mut at = number;
        let start = loop {
            let node = self.get(at)?;
            match &node.file {
                Some(file) => break Arc::clone(file),
                None if names.len() >= DEPTH_MAX => return Err(Errno::STALE),
                None => names.push(&node.name),
            }
            at = node.parent;
        };
        let mut found: Option<OwnedFd> = None;
        for name in names.into_iter().rev() {
            let directory = found.as_ref().map_or(start.as_fd(), AsFd::as_fd);
            found = Some(open_entry(directory, name, OFlags::PATH, 0).map_err(|_| Errno::STALE)?);
        }
        let found = found.ok_or(Errno::STALE)?;
        // Another file may have come to stand in its place.
        if key_of(&host_stat(found.as_fd())?) == self.get(number)?.key { Ok(found) } else { Err(Errno::STALE) }
    }

    /// The guest is told of a file that was looked up.
    pub(super) fn tell(
        &mut self,
        parent: u64,
        name: &[u8],
        file: OwnedFd,
        stat: &rustix::fs::Statx,
    ) -> Result<(u64, Arc<OwnedFd>), Errno> {
        let (share, key, kind) = (self.get(parent)?.share, key_of(stat), type_of(stat));
        if let Some(number) = self.by_key.get(&(share, key.0, key.1)).copied()
            && let Some(node) = self.nodes.get_mut(&number)
        {
            node.told = node.told.saturating_add(1);
            node.used = true;
            // A number that the host has given to another kind of file since.
            node.kind = kind;
            if !(TOP + 1..TOP + 1 + self.shares).contains(&number) {
                node.parent = parent;
                node.name = name.into();
            }
            if let Some(held) = &node.file {
                return Ok((number, Arc::clone(held)));
            }
            let file = Arc::new(file);
            self.hold(number, &file);
            return Ok((number, file));
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(Errno::NOMEM);
        }
        let number = self.next;
        self.next += 1;
        let node = Node { share, kind, key, parent, name: name.into(), file: None, told: 1, used: true };
        self.nodes.insert(number, node);
        self.by_key.insert((share, key.0, key.1), number);
        let file = Arc::new(file);
        self.hold(number, &file);
        Ok((number, file))
    }

    /// A share's root is told once more.
    pub(super) fn tell_root(&mut self, share: usize) -> u64 {
        self.root(share)
    }

    /// The guest forgets a file `count` times.
    pub(super) fn forget(&mut self, number: u64, count: u64) {
        if self.is_root(number) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&number) else { return };
        node.told = node.told.saturating_sub(count);
        if node.told == 0
            && let Some(node) = self.nodes.remove(&number)
        {
            let place = (node.share, node.key.0, node.key.1);
            if self.by_key.get(&place) == Some(&number) {
                self.by_key.remove(&place);
            }
            // Its place among the open ones goes when it comes to the front; a guest that makes many is swept.
            if self.open.len() > 64 && self.open.len() > 2 * self.nodes.len() {
                let nodes = &self.nodes;
                self.open.retain(|number| nodes.get(number).is_some_and(|node| node.file.is_some()));
            }
        }
    }

    /// A file has another name now.
    pub(super) fn renamed(&mut self, key: (usize, u64, u64), parent: u64, name: &[u8]) {
        if let Some(number) = self.by_key.get(&key).copied().filter(|number| !self.is_root(*number))
            && let Some(node) = self.nodes.get_mut(&number)
        {
            node.parent = parent;
            node.name = name.into();
        }
    }

    /// How many files the guest knows, and how many descriptors are held for them.
    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.nodes.len(), self.nodes.values().filter(|node| node.file.is_some()).count())
    }
}
