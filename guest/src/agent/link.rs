//! The agent link: one connection to `msb-vmm` for the virtual machine's life. Carries the main workload's output (lossless), the
//! agent's log lines, the goodbye up; clock and acknowledgement down. One thread serves it; everybody else queues.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use msb_protocol::guest::{Exited, Goodbye, GuestBody, HostBody, Log, OutputStream, Quiesced, Renew, Started};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use std::os::fd::AsFd;

use super::clock::{self, Correction};
use crate::session::pump::{Door, OutputLog};
use crate::session::stream::{FrameStream, StreamError};
use crate::session::workload::Host;

/// Bytes of waiting log lines above which further ones are dropped: a guest can make the agent talk.
const LOG_BACKLOG_MAX: usize = 64 << 10;
/// Log lines that may come at once, and how many more each second.
const LOG_BURST: u32 = 200;
const LOG_PER_SECOND: u32 = 20;
/// How long a lost stream may take to be noticed.
const REPLACE_LIMIT: Duration = Duration::from_secs(10);
/// How long a copy of a saved machine waits to be renewed.
const RENEWAL_LIMIT: Duration = Duration::from_secs(120);
/// Longest log line in bytes.
const LOG_LINE_MAX: usize = 1024;

/// Freezes (true) or thaws the workload.
pub type Freezer = Box<dyn Fn(bool) -> Result<(), String> + Send + Sync>;

/// Makes a machine that stands by the run of whoever takes it.
pub type Renewer = Box<dyn Fn(Renew) + Send + Sync>;

/// The link.
pub struct Link {
    state: Mutex<State>,
    changed: Condvar,
    wake: OwnedFd,
    /// The stream's socket, for the thread that waits on it without the lock.
    socket: Mutex<Arc<OwnedFd>>,
    /// Freezes the workload, or lets it go on.
    freezer: OnceLock<Freezer>,
    renewer: OnceLock<Renewer>,
    door: OnceLock<Arc<Door>>,
}

#[derive(Debug)]
struct State {
    stream: FrameStream,
    /// The pump found no room and waits to be woken.
    starved: bool,
    acknowledged: bool,
    lost: bool,
    /// The workload is frozen because the machine is being saved. What is lost now was lost in a copy of the machine, and is renewed.
    quiesced: bool,
    log_tokens: u32,
    log_refill: Instant,
}

impl Link {
    /// Takes over the stream after the hello.
    ///
    /// # Errors
    /// As eventfd(2) and dup(2).
    pub fn new(stream: FrameStream) -> Result<Self, Errno> {
        let socket = rustix::io::fcntl_dupfd_cloexec(stream.socket(), 3)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let log_refill = Instant::now();
        let state = State {
            stream,
            starved: false,
            acknowledged: false,
            lost: false,
            quiesced: false,
            log_tokens: LOG_BURST,
            log_refill,
        };
        Ok(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake,
            socket: Mutex::new(Arc::new(socket)),
            freezer: OnceLock::new(),
            renewer: OnceLock::new(),
            door: OnceLock::new(),
        })
    }

    /// Whom to wake when there is room again.
    pub fn set_door(&self, door: Arc<Door>) {
        let _ = self.door.set(door);
    }

    /// What freezes the workload.
    pub fn set_freezer(&self, freezer: Freezer) {
        let _ = self.freezer.set(freezer);
    }

    /// What renews the machine again.
    pub fn set_renewer(&self, renewer: Renewer) {
        let _ = self.renewer.set(renewer);
    }

    fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.socket.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the machine is being saved, or was made of a saved one and is not renewed yet.
    pub fn is_quiesced(&self) -> bool {
        self.lock().quiesced
    }

    /// Puts a new stream in the place of the lost one. False if the link was not waiting for that.
    pub fn replace(&self, stream: FrameStream) -> bool {
        let Ok(socket) = rustix::io::fcntl_dupfd_cloexec(stream.socket(), 3) else { return false };
        let _ = rustix::net::shutdown(&*self.socket(), rustix::net::Shutdown::Both);
        if !self.wait(REPLACE_LIMIT, |state| state.lost) {
            return false;
        }
        let mut state = self.lock();
        if !state.quiesced {
            return false;
        }
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(socket);
        state.stream = stream;
        (state.lost, state.acknowledged) = (false, false);
        self.changed.notify_all();
        true
    }

    /// Lets the workload go on.
    pub fn thaw(&self) {
        self.lock().quiesced = false;
        if let Some(Err(error)) = self.freezer.get().map(|freezer| freezer(false)) {
            self.log(&format!("the workload cannot be thawed: {error}"));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message.
    pub fn send(&self, body: GuestBody) {
        let mut state = self.lock();
        state.stream.send(body);
        self.flush(&mut state);
    }

    /// Writes what goes at once; the thread does the rest.
    fn flush(&self, state: &mut State) {
        if state.lost {
            state.stream.discard();
            return;
        }
        if state.stream.flush().is_err() || state.stream.backlog() > 0 {
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Says goodbye and waits for the answer, at most for a time. Whether it came.
    pub fn say_goodbye(&self, limit: Duration) -> bool {
        self.send(GuestBody::Goodbye(Goodbye {}));
        self.wait(limit, |state| state.acknowledged || state.lost)
    }

    /// Waits until everything queued is written, at most for a time.
    pub fn drain(&self, limit: Duration) -> bool {
        self.wait(limit, |state| state.stream.backlog() == 0 || state.lost)
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

    /// Serves the link until it is lost.
    pub fn serve(&self) -> StreamError {
        loop {
            let write = if self.lock().stream.backlog() > 0 { PollFlags::OUT } else { PollFlags::empty() };
            let socket = self.socket();
            let mut fds = [
                PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN | write),
                PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN),
            ];
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let events = fds[0].revents();
            let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
            let outcome = self.turn(events);
            if let Err(error) = outcome {
                let mut state = self.lock();
                state.lost = true;
                state.stream.discard();
                self.changed.notify_all();
                self.wake_starved(&mut state);
                if !state.quiesced {
                    return error;
                }
                // A copy of the saved machine: its host says what is new, or it is of no use to anybody.
                drop(state);
                if !self.wait(RENEWAL_LIMIT, |state| !state.lost) {
                    return error;
                }
            }
        }
    }

    fn turn(&self, events: PollFlags) -> Result<(), StreamError> {
        let mut state = self.lock();
        state.stream.flush()?;
        if state.stream.backlog() == 0 {
            self.changed.notify_all();
        }
        self.wake_starved(&mut state);
        if !events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            return Ok(());
        }
        state.stream.receive()?;
        while let Some(message) = state.stream.next_message()? {
            match message {
                HostBody::ClockSync(sync) => {
                    let line = match clock::synchronise(sync.realtime_ns) {
                        Ok(Correction::Step) => "the clock was set to the host's".to_owned(),
                        Ok(_) => continue,
                        Err(error) => error,
                    };
                    self.push_log(&mut state, &line);
                }
                HostBody::Quiesce(quiesce) => {
                    if quiesce.flush {
                        // The workload still runs, and its output goes on.
                        drop(state);
                        rustix::fs::sync();
                        state = self.lock();
                    }
                    // Set before the answer: between the two the machine may become two.
                    state.quiesced = true;
                    let outcome = self.freezer.get().map_or(Ok(()), |freezer| freezer(true));
                    state.quiesced = outcome.is_ok();
                    state.stream.send(GuestBody::Quiesced(Quiesced { error: outcome.err().unwrap_or_default() }));
                    self.flush(&mut state);
                }
                HostBody::Thaw(_) => {
                    state.quiesced = false;
                    if let Some(Err(error)) = self.freezer.get().map(|freezer| freezer(false)) {
                        self.push_log(&mut state, &format!("the workload cannot be thawed: {error}"));
                    }
                }
                // Of a machine that stands by; a workload that runs is not renewed.
                HostBody::Renew(renew) if state.quiesced => {
                    // It sends on this link.
                    drop(state);
                    if let Some(renewer) = self.renewer.get() {
                        renewer(renew);
                    }
                    state = self.lock();
                }
                HostBody::GoodbyeAck(_) => {
                    state.acknowledged = true;
                    self.changed.notify_all();
                }
                // A newer host may say more; what this agent does not understand here asks nothing of it.
                _ => {}
            }
        }
        Ok(())
    }

    fn wake_starved(&self, state: &mut State) {
        if state.starved && (state.lost || state.stream.has_room()) {
            state.starved = false;
            if let Some(door) = self.door.get() {
                door.wake();
            }
        }
    }

    fn push_log(&self, state: &mut State, line: &str) {
        let now = Instant::now();
        let seconds = u32::try_from(now.duration_since(state.log_refill).as_secs()).unwrap_or(u32::MAX);
        if seconds > 0 {
            state.log_tokens = state.log_tokens.saturating_add(seconds.saturating_mul(LOG_PER_SECOND)).min(LOG_BURST);
            state.log_refill = now;
        }
        if state.log_tokens == 0 || state.stream.backlog() > LOG_BACKLOG_MAX + crate::session::stream::OUTBOX_HIGH {
            return;
        }
        state.log_tokens -= 1;
        let mut line: String = line.chars().filter(|c| !c.is_control()).collect();
        line.truncate(line.floor_char_boundary(LOG_LINE_MAX));
        state.stream.send(GuestBody::Log(Log { line }));
        self.flush(state);
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").finish_non_exhaustive()
    }
}

impl OutputLog for Link {
    fn has_room(&self) -> bool {
        let mut state = self.lock();
        let room = state.lost || state.stream.has_room();
        state.starved |= !room;
        room
    }

    fn push(&self, stream: OutputStream, data: &[u8]) {
        let mut state = self.lock();
        state.stream.send_main_output(stream, data);
        self.flush(&mut state);
    }
}

impl Host for Link {
    fn main_started(&self, pid: u32) {
        self.send(GuestBody::MainStarted(Started { pid }));
    }

    fn main_exited(&self, end: Exited) {
        self.send(GuestBody::MainExited(end));
    }

    fn log(&self, line: &str) {
        let mut state = self.lock();
        self.push_log(&mut state, line);
    }
}
