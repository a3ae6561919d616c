//! virtio-balloon (VIRTIO 1.2, section 5.5) for its one useful trick, free page reporting: what the guest has freed goes back to the host.
//!
//! ```text
//!  guest frees memory ─► (2 s later, in blocks of 2 MiB and more) reporting ring ─► madvise(MADV_DONTNEED) ─► host
//! ```
//!
//! The target of the balloon itself stays 0: the host never takes memory that a guest uses, so the inflate and deflate rings are
//! answered and nothing else. Engine kvm only: QEMU's small machine has too few slots to spend one on this.

mod device;
mod worker;

#[cfg(test)]
mod tests;

pub use device::Balloon;
