//! What is particular to the processor: one module per architecture, used by `engine/kvm` and `memory` only.
//!
//! Nothing in here opens a device or starts a thread: every function writes tables into guest memory or fills a KVM structure.

pub mod x86_64;
