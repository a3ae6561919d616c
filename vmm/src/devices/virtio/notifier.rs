//! An eventfd that either side of a queue signals: the driver's kick, or the device's own wake-ups.
//!
//! Exists because the vhost-user library hands over plain files, kvm-ioctls wants `vmm_sys_util::eventfd::EventFd`, and turning
//! a raw descriptor into the latter is `unsafe`. Owns its descriptor; never blocks.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// A non-blocking eventfd.
#[derive(Debug)]
pub struct Notifier(OwnedFd);

impl Notifier {
    /// A fresh eventfd with count 0 (close-on-exec, non-blocking).
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Another handle on the same eventfd.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Wakes whoever watches. A full counter is a wake-up already pending, so it counts as success.
    pub fn notify(&self) -> io::Result<()> {
        loop {
            match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes all pending wake-ups; false when there was none.
    pub fn drain(&self) -> bool {
        let mut count = [0u8; 8];
        loop {
            match rustix::io::read(&self.0, &mut count) {
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl From<OwnedFd> for Notifier {
    /// Adopts a descriptor received from a peer; it is made non-blocking so that `drain` can never hang a worker.
    fn from(fd: OwnedFd) -> Self {
        if let Ok(flags) = rustix::fs::fcntl_getfl(&fd) {
            let _ = rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK);
        }
        Self(fd)
    }
}

impl From<File> for Notifier {
    fn from(file: File) -> Self {
        Self::from(OwnedFd::from(file))
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wake_ups_are_counted_once_and_drained() {
        let notifier = Notifier::new().expect("eventfd");
        assert!(!notifier.drain());
        notifier.notify().expect("notify");
        notifier.try_clone().expect("clone").notify().expect("notify");
        assert!(notifier.drain());
        assert!(!notifier.drain());
    }
}
