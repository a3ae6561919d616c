//! The system calls for which rustix and nix have no safe form: starting a process between threads, a few ioctls, adjtime.
//! The only unsafe code of this crate; each function here is safe to call with any arguments.
#![expect(
    unsafe_code,
    reason = "clone3 and what a child does before execve, ioctls and calls that no crate wraps safely"
)]

mod device;
mod spawn;

pub use device::{
    add_entropy, bring_loopback_up, grow_ext4, kill_group, reseed_entropy, signal_pidfd, slew_clock, trim,
};
pub use spawn::{Child, Confinement, Spawn, SpawnError, Step, spawn};
