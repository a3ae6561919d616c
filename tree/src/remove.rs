//! Removes a tree without following a link: every step is relative to a directory that is open, so a link that is put in the way is
//! removed itself. The depth is bounded by descriptors, not by the stack. Called by the agent's file sessions, and by `unpack` for what it
//! leaves unfinished.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

/// Deepest tree that is removed.
const DEPTH_MAX: usize = 4096;
/// How often a directory is looked at again because somebody fills it while it is emptied.
const ROUNDS_MAX: usize = 16;

struct Level {
    /// The directory.
    directory: OwnedFd,
    /// Names still to remove in it.
    names: Vec<CString>,
    /// Its own name in the level above.
    name: CString,
    rounds: usize,
    /// How many names the last look gave.
    looked: usize,
}

/// Removes whatever is at the path, seen from a directory.
///
/// # Errors
/// What the system said of the first name that could not be removed.
pub fn remove(at: impl AsFd, path: &CStr) -> Result<(), Errno> {
    run(at.as_fd(), path, false)
}

/// As [`remove`], of a tree that nobody else knows: directories whose mode keeps their owner out are opened first.
pub(crate) fn remove_unfinished(at: impl AsFd, path: &CStr) -> Result<(), Errno> {
    run(at.as_fd(), path, true)
}

fn run(at: BorrowedFd<'_>, path: &CStr, force: bool) -> Result<(), Errno> {
    match rustix::fs::unlinkat(at, path, AtFlags::empty()) {
        // Linux says EISDIR for a directory, POSIX EPERM.
        Err(Errno::ISDIR | Errno::PERM) => {}
        outcome => return outcome,
    }
    let top = open(at, path, force)?;
    let mut levels = vec![level(top, path.to_owned())?];
    while let Some(last) = levels.last_mut() {
        if let Some(name) = last.names.pop() {
            match rustix::fs::unlinkat(&last.directory, name.as_c_str(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR | Errno::PERM) => {
                    let below = level(open(&last.directory, &name, force)?, name)?;
                    if levels.len() >= DEPTH_MAX {
                        return Err(Errno::NAMETOOLONG);
                    }
                    levels.push(below);
                }
                Err(errno) => return Err(errno),
            }
            continue;
        }
        let removed = match levels.len().checked_sub(2).and_then(|above| levels.get(above)) {
            Some(above) => {
                let name = levels.last().map_or(c"", |last| last.name.as_c_str());
                rustix::fs::unlinkat(&above.directory, name, AtFlags::REMOVEDIR)
            }
            None => rustix::fs::unlinkat(at, path, AtFlags::REMOVEDIR),
        };
        let Some(last) = levels.last_mut() else { break };
        match removed {
            Ok(()) | Err(Errno::NOENT) => drop(levels.pop()),
            Err(Errno::NOTEMPTY | Errno::EXIST) if last.rounds < ROUNDS_MAX => {
                let full = last.looked >= NAMES_MAX;
                last.names = names(&last.directory)?;
                last.looked = last.names.len();
                // A directory of more names than one look gives is no sign of somebody who fills it.
                last.rounds = if full { 0 } else { last.rounds + 1 };
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn open(at: impl AsFd, name: &CStr, force: bool) -> Result<OwnedFd, Errno> {
    if force {
        // It is a directory, as unlinkat has just said; if it cannot be changed, it cannot be opened either.
        let _ = rustix::fs::chmodat(&at, name, Mode::from_raw_mode(0o700), AtFlags::empty());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

fn level(directory: OwnedFd, name: CString) -> Result<Level, Errno> {
    let names = names(&directory)?;
    let looked = names.len();
    Ok(Level { directory, names, name, rounds: 0, looked })
}

/// Most names of one look: a directory with more is looked at again.
const NAMES_MAX: usize = 4096;

fn names(directory: &OwnedFd) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
        if names.len() >= NAMES_MAX {
            break;
        }
    }
    Ok(names)
}
