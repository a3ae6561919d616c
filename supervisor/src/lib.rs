//! `msbd`: the service. Wiring only: settings, home, socket, the API's routes, recovery and shutdown; what a sandbox does is in
//! `msb-actors`.
//!
//! ```text
//!  main ─► settings ─► home (checks, lock) ─► journal, image store, actors ─► recovery ─► server (Unix socket, peers) ─► api
//! ```
//!
//! It ends on SIGTERM or `POST /v1/shutdown` and leaves its VMs running; the next one adopts them.

#![forbid(unsafe_code)]

pub mod api;
pub mod door;
pub mod home;
pub mod host;
pub mod peer;
pub mod recovery;
pub mod server;
pub mod settings;
pub mod systemd;
pub mod traces;
