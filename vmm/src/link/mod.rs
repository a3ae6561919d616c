//! The agent link: the one stream a guest opens to its VM process, before any workload exists, for the VM's whole life.
//!
//! ```text
//!  Waiting ──AgentHello──► Greeted ──Ready──► Up ──Goodbye──► Gone
//!     │ anything else         │ BootFailed ──► the boot has failed
//!     └──► the link is closed: a guest that does not keep to the order is not believed
//!
//!  Up: MainStarted, MainOutput, MainExited, Log  ──► run, logs          clock each minute and after the host slept ──► agent
//! ```
//!
//! `session` is the order of messages, pure; `thread` moves the bytes. Everything that arrives is hostile: frames are bounded by the
//! codec, texts are cut, times are only believed within what the host saw. It never waits for the daemon.

pub mod handle;
pub mod session;
pub mod thread;
