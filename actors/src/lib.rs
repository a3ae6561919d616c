//! Who owns which state in the daemon.
//!
//! ```text
//!  api (supervisor crate) ─► SupervisorActor ─► SandboxActor, one per sandbox ─► vm::Vm (control link, agent's control stream)
//!                              │                  └─ machine (pure)                 └─ msb-vmm, one process per VM
//!                              ├─► ImageActor     single flight, blocking work on a pool
//!                              ├─► SnapshotActor  the index of snapshots, and how they come and go
//!                              ├─► PoolActor      ready forks of templates: machines that stand by
//!                              └─► MetricsActor   samples per sandbox
//!                            journal (one writer thread, redb)
//! ```
//!
//! Pure state machines beside thin actix glue: `sandbox::machine` decides, `sandbox::actor` does. Control goes through bounded
//! mailboxes; bytes of sessions never do (`vm::session` opens a stream that runs beside the actor). Time comes from [`clock`].
//! Nothing here opens `/dev/kvm`, reads guest memory, serves a socket, or blocks inside a handler.

#![forbid(unsafe_code)]

pub mod clock;
pub mod daemon;
pub mod faults;
pub mod host_identity;
pub mod identity;
pub mod images;
pub mod inspect;
pub mod journal;
pub mod kept;
pub mod metrics;
pub mod pool;
pub mod pressure;
pub mod sandbox;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod snapshots;
pub mod starts;
pub mod supervisor;
pub mod vm;
pub mod volumes;
