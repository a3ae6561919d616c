//! What changes below a path (inotify(7)), told to the host as it happens. Called by `session`. A tree that changes faster than the host
//! reads loses changes, which is told as an overflow; nothing grows.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use msb_protocol::files::{FileChangeKind, FileChangeSeen, FileChanges, FileDone, FileOutcome, FileWatch};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::operations::{c_path, failure};

/// Most directories that one session watches.
const WATCHES_MAX: usize = 8192;
/// Most changes of one answer.
const CHANGES_MAX: usize = 256;
/// Deepest directory that a recursive watch reaches.
const DEPTH_MAX: usize = 64;
/// Bytes of one read of events.
const EVENTS_LEN: usize = 16 << 10;

/// The watches of one session.
#[derive(Default)]
pub(super) struct Watches {
    notifier: Option<OwnedFd>,
    watched: HashMap<i32, Watched>,
}

struct Watched {
    request: u32,
    path: Vec<u8>,
    recursive: bool,
    depth: usize,
}

impl Watches {
    /// The descriptor to poll, once something is watched.
    pub(super) fn notifier(&self) -> Option<&OwnedFd> {
        self.notifier.as_ref()
    }

    /// Watches a path.
    pub(super) fn add(&mut self, request: u32, watch: &FileWatch) -> FileOutcome {
        match self.add_tree(request, &watch.path, watch.recursive, 0) {
            Ok(()) => FileOutcome::Done(FileDone {}),
            Err(errno) => failure("watch", Some(&watch.path), errno),
        }
    }

    fn add_tree(&mut self, request: u32, path: &[u8], recursive: bool, depth: usize) -> Result<(), Errno> {
        if self.watched.len() >= WATCHES_MAX {
            return Err(Errno::NOSPC);
        }
        let notifier = match &self.notifier {
            Some(notifier) => notifier,
            None => self.notifier.insert(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?),
        };
        let c_path = c_path(path)?;
        let mut events = WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVE_SELF
            | WatchFlags::ATTRIB
            | WatchFlags::EXCL_UNLINK;
        if depth > 0 {
            events |= WatchFlags::ONLYDIR | WatchFlags::DONT_FOLLOW;
        }
        let number = inotify::add_watch(notifier, c_path.as_c_str(), events)?;
        self.watched.insert(number, Watched { request, path: path.to_vec(), recursive, depth });
        if !recursive || depth >= DEPTH_MAX {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let directory = match rustix::fs::openat(CWD, c_path.as_c_str(), flags, Mode::empty()) {
            Ok(directory) => directory,
            // A file has nothing below it.
            Err(Errno::NOTDIR) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let is_directory = match entry.file_type() {
                FileType::Unknown => rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)
                    .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
                kind => kind == FileType::Directory,
            };
            if is_directory && name != c"." && name != c".." {
                match self.add_tree(request, &joined(path, name.to_bytes()), true, depth + 1) {
                    // Gone again, or not ours to see.
                    Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => {}
                    Err(errno) => return Err(errno),
                }
            }
        }
        Ok(())
    }

    /// What has happened, by request.
    pub(super) fn read(&mut self) -> Vec<(u32, FileChanges)> {
        let Some(notifier) = &self.notifier else { return Vec::new() };
        let mut buffer = vec![MaybeUninit::uninit(); EVENTS_LEN];
        let mut seen = Vec::new();
        {
            let mut reader = inotify::Reader::new(notifier, &mut buffer);
            while seen.len() < CHANGES_MAX {
                let Ok(event) = reader.next() else { break };
                seen.push((event.wd(), event.events(), event.file_name().map(|name| name.to_bytes().to_vec())));
                if reader.is_buffer_empty() {
                    break;
                }
            }
        }
        let mut by_request: Vec<(u32, FileChanges)> = Vec::new();
        let mut tell =
            |request: u32, change: FileChangeSeen| match by_request.iter_mut().find(|(known, _)| *known == request) {
                Some((_, changes)) => changes.changes.push(change),
                None => by_request.push((request, FileChanges { changes: vec![change] })),
            };
        for (number, events, name) in seen {
            if events.contains(ReadFlags::QUEUE_OVERFLOW) {
                let mut requests: Vec<u32> = self.watched.values().map(|watched| watched.request).collect();
                requests.sort_unstable();
                requests.dedup();
                for request in requests {
                    tell(request, FileChangeSeen { kind: FileChangeKind::Overflow.into(), ..Default::default() });
                }
                continue;
            }
            let Some(watched) = self.watched.get(&number) else { continue };
            let path = name.map_or_else(|| watched.path.clone(), |name| joined(&watched.path, &name));
            let (request, recursive, depth) = (watched.request, watched.recursive, watched.depth);
            if events.contains(ReadFlags::IGNORED) {
                self.watched.remove(&number);
                continue;
            }
            let directory = events.contains(ReadFlags::ISDIR);
            let Some(kind) = kind_of(events, depth) else { continue };
            if recursive && directory && kind == FileChangeKind::Created {
                // What was put into it before it was watched is not told one by one: the directory's own creation says to look.
                let _ = self.add_tree(request, &path, true, depth + 1);
            }
            tell(request, FileChangeSeen { kind: kind.into(), path, directory });
        }
        by_request
    }
}

/// What an event means; none for what the level above tells already.
fn kind_of(events: ReadFlags, depth: usize) -> Option<FileChangeKind> {
    if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
        Some(FileChangeKind::Created)
    } else if events.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
        Some(FileChangeKind::Removed)
    } else if events.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF) {
        (depth == 0).then_some(FileChangeKind::Removed)
    } else if events.contains(ReadFlags::CLOSE_WRITE) {
        Some(FileChangeKind::Written)
    } else if events.contains(ReadFlags::ATTRIB) {
        Some(FileChangeKind::Attributes)
    } else {
        None
    }
}

fn joined(path: &[u8], name: &[u8]) -> Vec<u8> {
    let mut joined = path.to_vec();
    if !joined.ends_with(b"/") {
        joined.push(b'/');
    }
    joined.extend_from_slice(name);
    joined
}
