//! The SSH front door of a sandbox: an SSH server that turns channels into processes and connections inside the sandbox.
//!
//! ```text
//!   ssh ──TCP or pipe──► server ─► connection (authentication, channels)
//!                                     ├─ session channel ──► Target::start    exec, shell, pty, env, signals
//!                                     │                  └─► Target::sftp     the sftp subsystem
//!                                     └─ direct-tcpip ─────► Target::connect  -L, -D
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`target`] | the trait behind which the sandbox is; all this crate knows of the product |
//! | [`keys`] | host key, authorized keys |
//! | [`server`] | configuration, one call for each connection |
//! | `connection` | who may come in, which channels are opened |
//! | `session` | one session channel from its requests to its exit status |
//! | `forward` | one forwarded connection |
//! | `pipe` | bytes between a channel and a stream inside the target |
//! | [`intake`] | how many channels and unread bytes one connection may have |
//! | `rejections` | what refused logins cost |
//! | `leash` | how a connection is ended from outside |
//! | [`client`] | the client of `msb ssh` |
//! | `signal` | names of signals (RFC 4254, section 6.9) |
//!
//! Used by `actors` (each sandbox's actor owns its forwarder) and by `msb ssh`. It never opens a file but the keys it is told to,
//! never listens, and never reaches anything but its target. Compression, keyboard-interactive and password authentication, agent and
//! X11 forwarding, `-R` and stream-local forwarding are refused. Keys are ed25519 and ecdsa; RSA user keys are not accepted, because
//! the only implementation at hand is a pre-release.

#![forbid(unsafe_code)]

pub mod client;
mod connection;
mod forward;
pub mod intake;
pub mod keys;
mod leash;
mod pipe;
mod rejections;
pub mod server;
mod session;
mod signal;
pub mod target;

pub use connection::ConnectionError;
pub use keys::{AuthorizedKeys, HostKey, KeyError};
pub use server::{Server, ServerOptions};
pub use target::{Command, Control, Input, Output, Process, Refusal, Stream, Target, Terminal};
