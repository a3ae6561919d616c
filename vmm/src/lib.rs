//! `msb-vmm`: one process per sandbox that is the virtual machine, whichever engine runs it.
//!
//! ```text
//!  msbd ──control socket──► control ──► launch ──► engine::{kvm, qemu} ──► guest
//!                              ▲            │              │
//!                              │            └► devices::virtio::* ◄─ transport::{mmio, vhost_user}
//!                              └── end ◄─── link (agent hello, output, goodbye) ◄─ vsock port 1025
//!                                            └► logs (workload log, console)
//! ```
//!
//! It outlives the daemon: the main workload's log and the record of the end (`end.json`) are written here. It trusts nobody:
//! the guest through the devices and the agent link, the daemon's requests through `control`. No async runtime: a few threads
//! around epoll, because the process's private memory is promised to stay under 5 MiB.
//!
//! `unsafe` lives only in `engine/kvm`, `memory`, `arch` and `jail`.

pub mod arch;
pub mod control;
pub mod devices;
pub mod end;
pub mod engine;
pub mod jail;
pub mod launch;
pub mod link;
pub mod logs;
pub mod memory;
pub mod process;
pub mod run;
#[doc(hidden)]
pub mod testing;
pub mod transport;
