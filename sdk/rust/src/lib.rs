//! The Rust client of msb: sandboxes and images over the daemon's Unix socket.
//!
//! ```no_run
//! # async fn example() -> Result<(), msb_sdk::Error> {
//! use msb_sdk::Sandbox;
//!
//! let sandbox = Sandbox::builder("box").image("busybox").cpus(1).memory_mib(256).detached(true).create().await?;
//! let output = sandbox.exec(["echo", "hello"]).await?;
//! assert_eq!(output.stdout, b"hello\n");
//! sandbox.stop().await?;
//! Sandbox::remove("box").await?;
//! # Ok(()) }
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`sandbox`], [`builder`], [`exec`], [`fs`], [`image`], [`volume`], [`snapshot`] | what users of the library touch |
//! | [`client`] | one typed call for each route of the control API |
//! | [`session`] | a running command: output, stdin within its credit, signals |
//! | [`locate`] | which service is used, and starting one when none answers |
//! | `connection`, `window` | HTTP/1.1 on a Unix socket; the credit of a stream |
//!
//! Used by `msb`, `msb-metrics`, the tests and by programs of our users. It needs a tokio runtime, a current-thread one is
//! enough. It never reads the state of the daemon from disk and never talks to a VM process.

#![forbid(unsafe_code)]

mod archive;
pub mod builder;
pub mod client;
mod connection;
pub mod copy;
mod direct;
mod error;
pub mod exec;
pub mod fs;
pub mod image;
pub mod locate;
pub mod sandbox;
pub mod session;
pub mod snapshot;
pub mod ssh;
pub mod volume;
mod window;

pub use builder::SandboxBuilder;
pub use client::{AttachOptions, Client, JsonLines};
pub use copy::{ArchiveStream, CopyControl, CopyOptions, CopyReport};
pub use error::Error;
pub use exec::{Exec, ExecOutput};
pub use fs::Fs;
pub use image::Image;
pub use image::Image as ImageHandle;
pub use locate::Locator;
pub use msb_protocol as protocol;
pub use msb_protocol::control::{ImageConfigDetail, ImageDetail, ImageLayerDetail};
pub use msb_protocol::images::PruneReport as ImagePruneReport;
pub use sandbox::{MetricsStream, Sandbox, SandboxEvents};
pub use session::{Session, SessionControl, SessionEvent, SessionStdin};
pub use snapshot::Snapshot;
pub use ssh::{SshConfig, SshStream};
pub use volume::Volume;
