//! The network of a sandbox, in user mode: frames and the time go in, frames and a deadline come out.
//!
//! `msb-vmm`'s network device thread calls it; nothing else does. It starts no thread, reads no clock, opens no device, needs no
//! privilege, and sends nothing that [`policy`] did not allow.

#![forbid(unsafe_code)]

pub mod dns;
pub mod policy;
pub mod random;
pub mod stack;
