//! virtio-fs (VIRTIO 1.2, section 5.11): the host's shared directories, one device with one entry per share at its top.
//!
//! ```text
//!  worker.rs      rings: a FUSE request in, a reply out; file contents go straight between guest memory and the host's files
//!  server.rs      what each request does                    server_change.rs  those that change something
//!  nodes.rs       the files the guest knows: bounded, each found again below its share when its descriptor was given up
//!  attributes.rs  whose file it is: the caller's files belong to the guest's user, what the guest changes is kept in an xattr
//!  wire.rs        the bytes (linux/fuse.h, protocol 7.31)
//! ```
//!
//! Every request is written by an untrusted guest kernel. What keeps it inside a share:
//!
//! * A name is one component: no slash, no dots. It is looked up with openat2, which refuses links and whatever lies above the directory.
//!   Links are given to the guest as text; they mean something in its own tree only.
//! * A file is worked on through the descriptor of its look-up, never again by path, so nothing that is renamed meanwhile is mistaken.
//! * Only regular files and directories are ever opened: no device, no pipe, no socket of the host.
//! * A read-only share refuses changes here, whatever the guest mounted, and the thread's Landlock rules refuse them once more.
//! * Set-user-id bits, owners and device numbers of the guest are never given to a file of the host.
//!
//! Made by `launch`. It never learns what the paths of its shares are called in the guest.

mod attributes;
mod device;
mod nodes;
mod quota;
mod server;
mod server_change;
mod wire;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::FileType;

pub use device::Fs;

/// One shared directory or file.
#[derive(Debug)]
pub struct Share {
    /// Its name at the top of the file system.
    pub name: String,
    /// Whether nothing may be changed.
    pub read_only: bool,
    /// Whether the caller's files in it belong to the guest's root, whoever the guest's user is.
    is_root_owned: bool,
    /// What it may hold in bytes; none: whatever the host has room for.
    quota_bytes: Option<u64>,
    /// The directory or file itself, opened as a path.
    root: Arc<OwnedFd>,
    kind: FileType,
    key: (u64, u64),
}

impl Share {
    /// A share of what `root` means. All that must be asked of the host is asked here: a device is activated on threads of other classes.
    ///
    /// # Errors
    /// As statx(2).
    pub fn new(name: String, root: OwnedFd, read_only: bool) -> io::Result<Self> {
        let stat = attributes::host_stat(root.as_fd())?;
        let (kind, key) = (attributes::type_of(&stat), attributes::key_of(&stat));
        Ok(Self { name, read_only, is_root_owned: false, quota_bytes: None, root: Arc::new(root), kind, key })
    }

    /// The same, with the caller's files in it belonging to the guest's root, whoever the guest's user is.
    #[must_use]
    pub fn root_owned(mut self, is_root_owned: bool) -> Self {
        self.is_root_owned = is_root_owned;
        self
    }

    /// The same, holding at most so many bytes.
    #[must_use]
    pub fn quota(mut self, quota_bytes: Option<u64>) -> Self {
        self.quota_bytes = quota_bytes;
        self
    }
}
