//! virtio-net (VIRTIO 1.2, section 5.1): the guest's only way out, which ends in the user-mode network of `msb-network`.
//!
//! ```text
//!  guest driver ── transmit ring ──► frame ──► Stack::ingress ─┐
//!                                                              ├─ policy, DNS, relays ── sockets of the host (one epoll descriptor)
//!  guest driver ◄── receive ring ◄── frame ◄── Stack::poll  ◄──┘
//! ```
//!
//! One thread of its own: the only one whose jail permits Internet sockets. The stack outlives resets of the device, because published
//! ports and their listeners do; whoever wants its counters or an explanation of its policy asks through [`NetHandle`] between two of
//! its turns. The link's MTU is 64 KiB, so there is no segmentation offload to speak of; checksums are left out both ways.
//!
//! `device` is negotiation and configuration, `receive` the guest's buffers, `worker` the turns.

mod device;
mod receive;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Net, NetHandle, NetOptions};
