//! The virtio devices, all of one shape: `mod.rs` (header, picture), `device.rs` (negotiation, config space), `worker.rs` or what
//! the worker is made of (the queues), tests beside them. A device knows nothing of the transport that carries it:
//! `transport/mmio` (engine kvm) and `transport/vhost_user` (engine qemu) drive the same [`device::VirtioDevice`].
//!
//! Every byte in a ring is written by an untrusted guest: workers never panic, never loop or allocate on its word, and treat
//! each malformed chain as a used buffer of length 0 or as the device's typed error answer.

pub mod balloon;
pub mod block;
pub mod counter;
pub mod device;
pub mod event_loop;
pub mod fs;
pub mod net;
pub mod notifier;
pub mod ring;
pub mod rng;
pub mod slices;
pub mod timer;
pub mod vsock;
