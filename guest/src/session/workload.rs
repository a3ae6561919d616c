//! The main workload: started once, by itself or by the first `OpenMain`; its end is the sandbox's end. Owned by `agent`.
//!
//! ```text
//!  absent                        no main workload in the configuration
//!     │ a machine made of a saved one gets one
//!     ▼
//!  waiting ── start ──► running ── process ended, output delivered to the log ──► ended ── clients told ──► finished
//!     └────── start failed (127, 126, 125) ──────────────────────────────────────────────────────────────────▲
//! ```

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{ExecConfig, Exited, GuestBody, OpenAttach, Opened, Started, TerminalSize};
use rustix::io::Errno;

use super::Guest;
use super::process::Process;
use super::pump::{Client, Door, OutputLog, Pump};
use super::stream::FrameStream;
use crate::failure::GuestError;
use crate::sys;

/// Who learns of the main workload: the agent link, a collector in tests.
pub trait Host: OutputLog {
    /// It runs.
    fn main_started(&self, pid: u32);
    /// It has ended and all its output has been pushed. Without a start before: it could not be started.
    fn main_exited(&self, end: Exited);
    /// A line of the agent's own log.
    fn log(&self, line: &str);
}

#[derive(Debug)]
enum State {
    Absent,
    Waiting,
    Starting,
    Running { pid: u32, pidfd: OwnedFd },
    Ended(Exited),
    Finished(Exited),
}

/// The main workload.
#[derive(Debug)]
pub struct MainWorkload {
    state: Mutex<State>,
    changed: Condvar,
    door: Arc<Door>,
}

/// A caller that starts the main workload with its stream.
#[derive(Debug)]
pub struct Caller {
    /// The stream.
    pub stream: FrameStream,
    /// Its terminal's size.
    pub terminal: Option<TerminalSize>,
    /// Time in milliseconds after which the workload is killed; 0: as configured.
    pub timeout_ms: u64,
    /// What to answer when it runs.
    pub opened: Opened,
}

impl MainWorkload {
    /// One that waits, or none.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new(exists: bool) -> Result<Self, Errno> {
        let state = if exists { State::Waiting } else { State::Absent };
        Ok(Self { state: Mutex::new(state), changed: Condvar::new(), door: Arc::new(Door::new()?) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is one now, if there was none. Whether it waits to be started.
    pub fn appear(&self) -> bool {
        let mut state = self.lock();
        if matches!(*state, State::Absent) {
            *state = State::Waiting;
        }
        matches!(*state, State::Waiting)
    }

    fn set(&self, state: State) {
        *self.lock() = state;
        self.changed.notify_all();
    }

    /// How to reach its pump.
    pub fn door(&self) -> Arc<Door> {
        Arc::clone(&self.door)
    }

    /// Its process id, 0 while it has not started.
    pub fn pid(&self) -> u32 {
        if let State::Running { pid, .. } = &*self.lock() { *pid } else { 0 }
    }

    /// How it ended, if it has.
    pub fn end(&self) -> Option<Exited> {
        match &*self.lock() {
            State::Ended(end) | State::Finished(end) => Some(*end),
            _ => None,
        }
    }

    /// Sends its process a signal, as docker does for a stop: the process decides what its children get.
    pub fn signal(&self, number: i32) {
        if let State::Running { pidfd, .. } = &*self.lock() {
            // It may have ended a moment ago.
            let _ = sys::signal_pidfd(pidfd, number);
        }
    }

    /// Whether it runs or is about to.
    pub fn is_alive(&self) -> bool {
        matches!(&*self.lock(), State::Starting | State::Running { .. })
    }

    /// Waits until it has ended, at most for a time. Whether it has (also if it never ran).
    pub fn wait_ended(&self, limit: Duration) -> bool {
        self.wait(limit, |state| !matches!(state, State::Starting | State::Running { .. }))
    }

    /// Waits until its clients were told, at most for a time. Whether they were.
    pub fn wait_finished(&self, limit: Duration) -> bool {
        self.wait(limit, |state| !matches!(state, State::Starting | State::Running { .. } | State::Ended(_)))
    }

    fn wait(&self, limit: Duration, done: impl Fn(&State) -> bool) -> bool {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        while !done(&state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Takes the one chance to start it.
    fn claim(&self) -> Result<(), GuestError> {
        let refuse = |message: &str| Err(GuestError::new(ErrorCode::InvalidRequest, message));
        let mut state = self.lock();
        match &*state {
            State::Waiting => {
                *state = State::Starting;
                Ok(())
            }
            State::Absent => refuse("this sandbox has no main workload"),
            State::Starting | State::Running { .. } => refuse("the main workload is running already; attach to it"),
            State::Ended(_) | State::Finished(_) => refuse("the main workload has ended"),
        }
    }

    /// Starts it and runs it to its end in the calling thread. Whether it was this call that ran (or failed to start) it; then the
    /// sandbox's end is due.
    ///
    /// # Errors
    /// A typed reason with the caller's stream to say it on; `main_exited` was called if it could not be started.
    pub fn run(&self, guest: &Guest, host: &dyn Host, caller: Option<Caller>) -> Result<(), Refusal> {
        let (stream, opened, size, timeout_ms) = match caller {
            Some(caller) => (Some(caller.stream), Some(caller.opened), caller.terminal, caller.timeout_ms),
            None => (None, None, None, 0),
        };
        if let Err(error) = self.claim() {
            return Err(Refusal { error, stream, is_end: false });
        }
        let mut exec: ExecConfig = guest.main().and_then(|main| main.exec.clone()).unwrap_or_default();
        if exec.terminal.is_some() && size.is_some() {
            exec.terminal = size;
        }
        if timeout_ms > 0 {
            exec.timeout_ms = timeout_ms;
        }
        let number = guest.sessions.number();
        let started = Process::start(guest, &exec, "main", true).and_then(|process| {
            let pidfd = rustix::io::fcntl_dupfd_cloexec(&process.pidfd, 3);
            Ok((pidfd.map_err(|errno| GuestError::exec("cannot duplicate a descriptor", errno))?, process))
        });
        let (pidfd, process) = match started {
            Ok(started) => started,
            Err(error) => {
                host.log(&format!("the main workload could not be started: {}: {error}", error.code));
                let end = Exited { code: error.exit_code(), ..Exited::default() };
                self.set(State::Finished(end));
                host.main_exited(end);
                return Err(Refusal { error, stream, is_end: true });
            }
        };
        let pid = process.pid;
        self.set(State::Running { pid, pidfd });
        host.main_started(pid);
        let timeout = (exec.timeout_ms > 0).then(|| Duration::from_millis(exec.timeout_ms));
        let output_log: &dyn OutputLog = host;
        let mut pump = Pump::new(guest, number, process, timeout, exec.wait_output).with_log(&self.door, output_log);
        if let (Some(stream), Some(opened)) = (stream, opened) {
            let mut client = Client::primary(stream);
            client.send(GuestBody::Opened(opened));
            client.send(GuestBody::Started(Started { pid }));
            pump.admit(client);
        }
        let end = pump.run();
        self.set(State::Ended(end));
        host.main_exited(end);
        pump.farewell();
        self.set(State::Finished(end));
        Ok(())
    }

    /// Adds a client that watches.
    ///
    /// # Errors
    /// `sandbox_not_running` with the stream to say it on.
    pub fn attach(
        &self,
        stream: FrameStream,
        attach: &OpenAttach,
        opened: Opened,
    ) -> Result<(), (FrameStream, GuestError)> {
        let refuse = |message: &str| GuestError::new(ErrorCode::SandboxNotRunning, message);
        let pid = self.pid();
        if pid == 0 {
            return Err((stream, refuse("the main workload is not running")));
        }
        let mut client = Client::watcher(stream, attach.stdin, attach.terminal);
        client.send(GuestBody::Opened(opened));
        client.send(GuestBody::Started(Started { pid }));
        self.door.hand_in(client).map_err(|client| {
            let mut stream = client.into_stream();
            stream.discard();
            (stream, refuse("the main workload has just ended, or has too many watchers"))
        })
    }
}

/// Why [`MainWorkload::run`] ran nothing.
#[derive(Debug)]
pub struct Refusal {
    /// The reason.
    pub error: GuestError,
    /// The caller's stream.
    pub stream: Option<FrameStream>,
    /// Whether this is the end of the main workload, and so of the sandbox.
    pub is_end: bool,
}
