//! Patches of the root, as the user asked for them: files, links, directories, removals, in their order. Called by `root::set_up` at
//! every boot; each says how the root is to be, so a second time changes nothing. No path leaves the root, whatever links lie on it.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use msb_protocol::guest::{GuestPatch, GuestPatchKind};
use rustix::fs::{AtFlags, Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::directory::RootDirectory;
use super::{RootError, Trying};

const STAGE: &str = "patches";
/// Most levels of directories that a removal goes down.
const DEPTH_MAX: usize = 128;

/// Carries all patches out.
///
/// # Errors
/// As the file calls, naming the path.
pub fn apply(root: &RootDirectory, patches: &[GuestPatch]) -> Result<(), RootError> {
    for patch in patches {
        one(root, patch).trying(STAGE, &format!("cannot patch {}", patch.path))?;
    }
    Ok(())
}

fn one(root: &RootDirectory, patch: &GuestPatch) -> io::Result<()> {
    let path = Path::new(&patch.path);
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let mode = Mode::from_raw_mode(patch.mode & 0o7777);
    match &patch.kind {
        Some(GuestPatchKind::File(content)) => {
            root.write(path, content, 0o600)?;
            rustix::fs::fchmod(root.open_path(path, OFlags::RDONLY | OFlags::NONBLOCK, 0)?, mode)?;
        }
        Some(GuestPatchKind::Link(to)) => {
            let parent = parent(root, path)?;
            remove_entry(&parent, name, 0)?;
            rustix::fs::symlinkat(to.as_str(), &parent, name)?;
        }
        Some(GuestPatchKind::Directory(_)) => {
            let directory = root.create_directories(path, 0o755)?;
            rustix::fs::fchmod(&directory, mode)?;
        }
        Some(GuestPatchKind::Removed(_)) => {
            if let Some(parent) = parent_if_there(root, path)? {
                remove_entry(&parent, name, 0)?;
            }
        }
        None => return Err(Errno::INVAL.into()),
    }
    Ok(())
}

fn parent(root: &RootDirectory, path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    root.create_directories(path.parent().unwrap_or(Path::new("/")), 0o755)
}

fn parent_if_there(root: &RootDirectory, path: &Path) -> io::Result<Option<std::os::fd::OwnedFd>> {
    match root.open_path(path.parent().unwrap_or(Path::new("/")), OFlags::DIRECTORY, 0) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// Removes an entry and all below it, following no link.
fn remove_entry(parent: impl std::os::fd::AsFd, name: &OsStr, depth: usize) -> io::Result<()> {
    let parent = parent.as_fd();
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) if depth < DEPTH_MAX => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let mut names = Vec::new();
    let mut buffer = Vec::with_capacity(8192);
    let mut entries = RawDir::new(&directory, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    for name in names {
        use std::os::unix::ffi::OsStrExt;
        remove_entry(&directory, OsStr::from_bytes(name.to_bytes()), depth + 1)?;
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn patch(path: &str, mode: u32, kind: GuestPatchKind) -> GuestPatch {
        GuestPatch { path: path.into(), mode, kind: Some(kind) }
    }

    #[test]
    fn patches_make_the_root_what_they_say_and_a_second_time_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("old/deep/er")).unwrap();
        std::fs::write(dir.path().join("old/deep/file"), "x").unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "x").unwrap();
        symlink(outside.path(), dir.path().join("old/out")).unwrap();
        let root = RootDirectory::open(dir.path()).unwrap();
        let patches = [
            patch("/old", 0, GuestPatchKind::Removed(true)),
            patch("/never/there", 0, GuestPatchKind::Removed(true)),
            patch("/opt/tool", 0o755, GuestPatchKind::File(b"#!/bin/sh\n".to_vec())),
            patch("/opt/link", 0, GuestPatchKind::Link("tool".into())),
            patch("/srv/a/b", 0o700, GuestPatchKind::Directory(true)),
        ];
        for _ in 0..2 {
            apply(&root, &patches).unwrap();
            assert!(!dir.path().join("old").exists());
            assert!(outside.path().join("kept").exists(), "a link was followed out of the root");
            assert_eq!(std::fs::read(dir.path().join("opt/link")).unwrap(), b"#!/bin/sh\n");
            let mode = |path: &str| std::fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o7777;
            assert_eq!((mode("opt/tool"), mode("srv/a/b")), (0o755, 0o700));
        }
    }
}
