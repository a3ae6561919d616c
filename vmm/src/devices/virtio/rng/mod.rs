//! virtio-rng (VIRTIO 1.2, section 5.4): fills the guest's buffers with the host kernel's random bytes.
//!
//! One ring, no configuration, no features of its own.

mod device;
mod worker;

#[cfg(test)]
mod tests;

pub use device::Rng;
