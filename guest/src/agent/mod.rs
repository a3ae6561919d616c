//! The agent: the only program in the guest that talks to the host. Started by `init`, ends with the machine.
//!
//! ```text
//!  boot.rs ── hello, welcome, root ──► Ready ─┬─ link.rs        thread: agent link (log, clock, goodbye)
//!                                             ├─ ending.rs      thread: sleeps until the sandbox's end is due, then flushes and resets
//!                                             ├─ main workload  thread: if it starts by itself
//!                                             └─ accept loop ──► connection.rs, one thread each ─┬─ control.rs  beats, shutdown
//!                                                                                                └─ session/, files/    exec, main, attach, files
//! ```

pub mod boot;
pub mod clock;
pub mod connection;
pub mod control;
pub mod ending;
pub mod link;
pub mod renewal;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use msb_protocol::guest::{Exited, Shutdown};
use rustix::io::Errno;

use crate::session::Guest;
use crate::session::pump::OutputLog;
use crate::session::workload::{Caller, Host, MainWorkload, Refusal};

/// The version people see.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Stack of a thread in bytes; what is not touched costs nothing.
pub(crate) const STACK_LEN: usize = 256 << 10;

/// Everything the agent's threads share.
pub struct Agent {
    /// The guest.
    pub guest: Guest,
    /// The main workload.
    pub main: MainWorkload,
    /// Where output of the main workload and log lines go.
    pub host: Arc<dyn Host>,
    /// Streams that are open.
    pub(crate) connections: AtomicUsize,
    /// File sessions that live.
    pub(crate) files: crate::files::FileSessions,
    /// The newest control stream.
    pub(crate) controls: control::Controls,
    /// Whether and why the end is due.
    pub(crate) end: ending::EndSwitch,
    /// What a machine that was made of a saved one became.
    pub(crate) renewal: renewal::Renewals,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("guest", &self.guest).finish_non_exhaustive()
    }
}

/// Tells the control stream what the link is told.
struct Announcer<'a>(&'a Agent);

impl Agent {
    /// An agent of a guest that is set up.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new(guest: Guest, host: Arc<dyn Host>) -> Result<Self, Errno> {
        let main = MainWorkload::new(guest.config.main.is_some())?;
        let (controls, end) = (control::Controls::new()?, ending::EndSwitch::default());
        Ok(Self {
            guest,
            main,
            host,
            connections: AtomicUsize::new(0),
            files: Default::default(),
            controls,
            end,
            renewal: Default::default(),
        })
    }

    /// Runs the main workload in the calling thread; its end is the sandbox's.
    ///
    /// # Errors
    /// As [`MainWorkload::run`].
    pub fn run_main(&self, caller: Option<Caller>) -> Result<(), Refusal> {
        let outcome = self.main.run(&self.guest, &Announcer(self), caller);
        let is_end = outcome.as_ref().err().is_none_or(|refusal| refusal.is_end);
        if is_end {
            self.end.request(ending::Reason::MainEnded);
        }
        outcome
    }

    /// Stops everything as an order says: hook, signals, grace, kill. The disks and the machine are `ending`'s business.
    pub fn stop(&self, order: &Shutdown) {
        ending::stop_gently(self, order);
        ending::kill_all(self);
    }
}

impl OutputLog for Announcer<'_> {
    fn has_room(&self) -> bool {
        self.0.host.has_room()
    }

    fn push(&self, stream: msb_protocol::guest::OutputStream, data: &[u8]) {
        self.0.host.push(stream, data);
    }
}

impl Host for Announcer<'_> {
    fn main_started(&self, pid: u32) {
        self.0.host.main_started(pid);
    }

    fn main_exited(&self, end: Exited) {
        self.0.host.main_exited(end);
        self.0.controls.wake();
    }

    fn log(&self, line: &str) {
        self.0.host.log(line);
    }
}

/// Is the agent until the machine is reset.
pub fn run() -> ExitCode {
    match boot::run() {
        Ok(never) => match never {},
        Err(error) => {
            crate::init::say(&format!("msb-agent: {error}"));
            ExitCode::FAILURE
        }
    }
}
