//! The guest's side of msb: PID 1 and the agent, one static program. It is a library so that tests can drive real sessions over
//! socket pairs on any Linux, without a virtual machine. It never trusts the image, the workload or the host's bytes: everything
//! that is read is bounded and parsed, and nothing here panics.
//!
//! ```text
//!  main.rs ── PID 1 ──► init/    mounts, forks the agent, reaps; reports the agent's death
//!     └────── agent ──► agent/   hello, set-up, listener, control, the end
//!                         ├─► root/      disks, overlay, volumes, what a container finds in /
//!                         ├─► session/   one process with its streams: exec and the main workload
//!                         ├─► files/     what the host reads and changes, as a user of the guest
//!                         ├─► security/  what a profile takes away from processes
//!                         ├─► account, command, limits    pure: who runs what with which environment
//!                         ├─► resolver/  names to addresses, as the guest's own files say
//!                         ├─► sftp/      the SFTP server, a process of its own (`main.rs ── sftp ──►`)
//!                         └─► sys/       the only unsafe code
//! ```

#![expect(
    clippy::result_large_err,
    reason = "a refused stream is handed back whole, once per session and never in a loop"
)]

pub mod account;
pub mod agent;
pub mod cgroup;
pub mod command;
pub mod failure;
pub mod files;
pub mod init;
pub mod limits;
pub mod resolver;
pub mod root;
pub mod security;
pub mod session;
pub mod sftp;
pub mod sys;
