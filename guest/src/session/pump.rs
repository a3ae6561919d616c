//! Moves bytes between one process and its clients until the session is over: a poll loop in the session's own thread.
//!
//! ```text
//!             ┌── stdin pipe ◄── InputQueue ◄── Stdin (credit) ──┐
//!  process ───┤                                                  ├── client: exec's caller, main's primary: lossless
//!             └── stdout, stderr ──► read ─┬─► outbox ───────────┤
//!                     ▲                    ├─► outbox or Lag ────┴── watchers: lose what they are too slow for
//!                     │                    └─► OutputLog            agent link: lossless
//!                     └─ read only while every lossless receiver has room: that is the back-pressure
//! ```
//!
//! The agent holds at most the outboxes (128 KiB and one frame each), one read buffer and a window of stdin per client.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use msb_protocol::frame::FrameError;
use msb_protocol::guest::{Exited, GuestBody, HostBody, OutputLost, OutputStream, StdinCredit, TerminalSize};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::Guest;
use super::ending::{Ending, Verdict};
use super::input::{Credit, InputQueue};
use super::process::Process;
use super::stream::{FrameStream, PIECE_LEN, StreamError};
use super::watcher::{Delivery, Lag};

/// Time between the hang-up of an exec whose caller is gone and its kill.
const HANGUP_GRACE: Duration = Duration::from_secs(2);
/// How long the last output of a watcher is offered to it.
const WATCHER_FAREWELL: Duration = Duration::from_secs(1);
/// Reads of one output before the others get their turn.
const READS_PER_TURN: usize = 4;
/// Most clients of one session.
pub const CLIENTS_MAX: usize = 32;
/// Ctrl-D, what a terminal takes for the end of input.
const END_OF_TRANSMISSION: u8 = 4;

/// A receiver of all output of the main workload that must not lose any: the agent link.
pub trait OutputLog: Send + Sync {
    /// Whether it takes more; after a `false` it wakes the pump's [`Door`] when it does again.
    fn has_room(&self) -> bool;
    /// Takes output.
    fn push(&self, stream: OutputStream, data: &[u8]);
}

/// One stream to the host that belongs to a session.
#[derive(Debug)]
pub struct Client {
    stream: FrameStream,
    credit: Credit,
    sends_stdin: bool,
    /// Its account if it may lose output; none for a lossless client.
    lag: Option<Lag>,
    number: u64,
    lost: bool,
    /// The size of its terminal, told when it is admitted: the newest client's counts.
    size: Option<TerminalSize>,
}

impl Client {
    /// A client that loses nothing and for which the process waits.
    #[must_use]
    pub fn primary(stream: FrameStream) -> Self {
        Self { stream, credit: Credit::default(), sends_stdin: true, lag: None, number: 0, lost: false, size: None }
    }

    /// A client that only watches, and may send input if `stdin` says so.
    #[must_use]
    pub fn watcher(stream: FrameStream, stdin: bool, size: Option<TerminalSize>) -> Self {
        Self { lag: Some(Lag::default()), sends_stdin: stdin, size, ..Self::primary(stream) }
    }

    /// Queues a message.
    pub fn send(&mut self, body: GuestBody) {
        self.stream.send(body);
    }

    /// Gives the stream back.
    #[must_use]
    pub fn into_stream(self) -> FrameStream {
        self.stream
    }

    fn is_primary(&self) -> bool {
        self.lag.is_none()
    }
}

/// How others reach a running pump: new clients, a wake-up, the order to stop waiting for slow clients.
#[derive(Debug)]
pub struct Door {
    wake: OwnedFd,
    newcomers: Mutex<Option<Vec<Client>>>,
    hurry: AtomicBool,
}

impl Door {
    /// A door of a session that has not ended.
    ///
    /// # Errors
    /// As eventfd(2).
    pub fn new() -> Result<Self, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { wake, newcomers: Mutex::new(Some(Vec::new())), hurry: AtomicBool::new(false) })
    }

    /// Makes the pump look around.
    pub fn wake(&self) {
        // A full counter is as good a wake-up as one more.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Hands a client in.
    ///
    /// # Errors
    /// Gives it back if the session has ended.
    pub fn hand_in(&self, client: Client) -> Result<(), Client> {
        let mut newcomers = self.newcomers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match newcomers.as_mut() {
            Some(waiting) if waiting.len() < CLIENTS_MAX => waiting.push(client),
            _ => return Err(client),
        }
        drop(newcomers);
        self.wake();
        Ok(())
    }

    /// From now on no client is waited for.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::Release);
        self.wake();
    }

    fn take(&self, last: bool) -> Vec<Client> {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        let mut newcomers = self.newcomers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last {
            newcomers.take().unwrap_or_default()
        } else {
            newcomers.as_mut().map(std::mem::take).unwrap_or_default()
        }
    }

    fn is_hurried(&self) -> bool {
        self.hurry.load(Ordering::Acquire)
    }
}

/// What a descriptor in the poll set is.
#[derive(Clone, Copy, Debug)]
enum Source {
    Process,
    Output(usize),
    Stdin,
    Client(usize),
    Door,
}

/// A session under way.
pub struct Pump<'a> {
    guest: &'a Guest,
    number: u64,
    process: Process,
    input: InputQueue,
    ending: Ending,
    clients: Vec<Client>,
    clients_seen: u64,
    door: Option<&'a Door>,
    log: Option<&'a dyn OutputLog>,
    kill_at: Option<Instant>,
    end: Exited,
    scratch: Vec<u8>,
}

impl<'a> Pump<'a> {
    /// A session of a process that was just started, already entered in [`super::Sessions`] under `number`.
    #[must_use]
    pub fn new(guest: &'a Guest, number: u64, process: Process, timeout: Option<Duration>, wait_output: bool) -> Self {
        let outputs = [process.outputs[0].is_some(), process.outputs[1].is_some()];
        Self {
            guest,
            number,
            ending: Ending::new(Instant::now(), timeout, wait_output, outputs),
            process,
            input: InputQueue::default(),
            clients: Vec::new(),
            clients_seen: 0,
            door: None,
            log: None,
            kill_at: None,
            end: Exited::default(),
            scratch: vec![0; PIECE_LEN],
        }
    }

    /// Makes it the main workload's: it lives without clients, takes new ones, and copies its output to a log.
    #[must_use]
    pub fn with_log(mut self, door: &'a Door, log: &'a dyn OutputLog) -> Self {
        self.door = Some(door);
        self.log = Some(log);
        self
    }

    /// Adds a client. What it sent together with its opening is heard at once: no event will announce it again.
    pub fn admit(&mut self, mut client: Client) {
        if self.clients.len() >= CLIENTS_MAX {
            return;
        }
        self.clients_seen += 1;
        client.number = self.clients_seen;
        if let Some(size) = client.size {
            self.process.resize(size);
        }
        self.clients.push(client);
        self.obey_all(self.clients.len() - 1, Ok(()));
    }

    /// Runs until the process has ended and its output is delivered. The clients are told by [`Self::farewell`].
    pub fn run(&mut self) -> Exited {
        loop {
            let now = Instant::now();
            if let Some(door) = self.door {
                for client in door.take(false) {
                    self.admit(client);
                }
                if door.is_hurried() {
                    self.drop_slow_clients();
                }
            }
            self.flush_clients();
            self.close_finished_input();
            let until = match self.ending.verdict(now) {
                Verdict::Over => break,
                Verdict::TimedOut => {
                    self.process.kill_all();
                    continue;
                }
                Verdict::GoOn(until) => until,
            };
            if self.kill_at.is_some_and(|at| now >= at) {
                self.kill_at = None;
                if !self.ending.has_exited() {
                    self.process.signal(libc::SIGKILL);
                }
            }
            let until = [until, self.kill_at].into_iter().flatten().min();
            self.wait(until);
        }
        self.end.timed_out = self.ending.timed_out();
        self.end
    }

    /// Tells every client the end and delivers what waits for them: to a lossless client however long it takes, to a watcher for a
    /// moment. Leftover processes stay; their cgroup is swept when they are gone.
    pub fn farewell(mut self) {
        for client in self.door.map(|door| door.take(true)).unwrap_or_default() {
            self.admit(client);
        }
        self.process.stdin = None;
        self.process.outputs = [None, None];
        if let (Some(workload), Some(group)) = (&self.guest.workload, self.process.group.take()) {
            workload.discard(group);
        }
        for client in &mut self.clients {
            let lost = client.lag.as_mut().map_or(0, Lag::take_lost);
            if lost > 0 {
                client.send(GuestBody::OutputLost(OutputLost { bytes: lost }));
            }
            client.send(GuestBody::Exited(self.end));
        }
        let until = Instant::now() + WATCHER_FAREWELL;
        loop {
            if self.door.is_some_and(Door::is_hurried) {
                self.drop_slow_clients();
            }
            self.flush_clients();
            let now = Instant::now();
            self.clients.retain(|client| client.stream.backlog() > 0 && (client.is_primary() || now < until));
            if self.clients.is_empty() {
                return;
            }
            let watched = self.clients.iter().any(|client| !client.is_primary());
            self.wait(watched.then_some(until));
        }
    }

    /// Waits for the next event, at most until the given time, and handles all that have come.
    fn wait(&mut self, until: Option<Instant>) {
        let timeout = until.map(|until| {
            // Rounded up by a millisecond so that the time has come when the wait ends.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        for (source, events) in self.poll(timeout.as_ref()) {
            match source {
                Source::Process => self.collect_end(),
                Source::Output(index) => self.read_output(index),
                Source::Stdin => self.write_stdin(),
                Source::Client(number) => self.hear_client(number, events),
                Source::Door => {}
            }
        }
    }

    fn poll(&self, timeout: Option<&Timespec>) -> Vec<(Source, PollFlags)> {
        let mut sources = Vec::with_capacity(5 + self.clients.len());
        let mut fds = Vec::with_capacity(sources.capacity());
        let mut add = |source, fd, events| {
            sources.push(source);
            fds.push(PollFd::from_borrowed_fd(fd, events));
        };
        if !self.ending.has_exited() {
            add(Source::Process, self.process.pidfd.as_fd(), PollFlags::IN);
        }
        if self.has_room() {
            for index in 0..2 {
                if let Some(output) = self.process.output(index) {
                    add(Source::Output(index), output, PollFlags::IN);
                }
            }
        }
        if let (Some(stdin), Some(_)) = (&self.process.stdin, self.input.front()) {
            add(Source::Stdin, stdin.as_fd(), PollFlags::OUT);
        }
        for (index, client) in self.clients.iter().enumerate() {
            let write = if client.stream.backlog() > 0 { PollFlags::OUT } else { PollFlags::empty() };
            add(Source::Client(index), client.stream.socket(), PollFlags::IN | write);
        }
        if let Some(door) = self.door {
            add(Source::Door, door.wake.as_fd(), PollFlags::IN);
        }
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            // A signal, or no memory for a moment: the owner's loop comes back here.
            Err(_) => return Vec::new(),
        }
        let events = fds.iter().map(PollFd::revents).collect::<Vec<_>>();
        sources.into_iter().zip(events).filter(|(_, events)| !events.is_empty()).collect()
    }

    /// Whether every lossless receiver takes more.
    fn has_room(&self) -> bool {
        self.clients.iter().all(|client| !client.is_primary() || client.lost || client.stream.has_room())
            && self.log.is_none_or(OutputLog::has_room)
    }

    fn collect_end(&mut self) {
        let process = &self.process;
        if let Some(end) = self.guest.sessions.reap(self.number, || process.try_wait()) {
            self.end = end;
            self.ending.process_ended(Instant::now(), self.process.waiting());
        }
    }

    fn read_output(&mut self, index: usize) {
        for _ in 0..READS_PER_TURN {
            if !self.has_room() {
                return;
            }
            let Some(output) = self.process.output(index) else { return };
            match rustix::io::read(output, &mut self.scratch) {
                Ok(len) if len > 0 => self.deliver(index, len),
                Err(Errno::AGAIN | Errno::INTR) => return,
                // The end; a terminal says EIO for it.
                Ok(_) | Err(_) => {
                    if let Some(output) = self.process.outputs.get_mut(index) {
                        *output = None;
                    }
                    self.ending.output_ended(index);
                    return;
                }
            }
        }
    }

    fn deliver(&mut self, index: usize, len: usize) {
        let data = &self.scratch[..len];
        let stream = if index == 0 { OutputStream::Stdout } else { OutputStream::Stderr };
        self.ending.read(index, len);
        if let Some(log) = self.log {
            log.push(stream, data);
        }
        for client in self.clients.iter_mut().filter(|client| !client.lost) {
            if let Some(lag) = &mut client.lag {
                match lag.offer(len, client.stream.backlog()) {
                    Delivery::Drop => continue,
                    Delivery::Send { lost: 0 } => {}
                    Delivery::Send { lost } => client.stream.send(GuestBody::OutputLost(OutputLost { bytes: lost })),
                }
            }
            client.stream.send_output(stream, data);
        }
        self.flush_clients();
    }

    fn write_stdin(&mut self) {
        while let (Some(stdin), Some(data)) = (&self.process.stdin, self.input.front()) {
            match rustix::io::write(stdin, data) {
                Ok(len) => {
                    if let Some((number, more)) = self.input.advance(len) {
                        self.give_credit(number, len, !more);
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => return,
                // Nobody reads any more.
                Err(_) => {
                    self.process.stdin = None;
                    for (number, len) in self.input.abandon() {
                        self.give_credit(number, len, true);
                    }
                }
            }
        }
    }

    fn give_credit(&mut self, number: u64, len: usize, idle: bool) {
        if let Some(client) = self.clients.iter_mut().find(|client| client.number == number) {
            client.credit.consume(len);
            let bytes = client.credit.grant(idle);
            if bytes > 0 {
                client.send(GuestBody::StdinCredit(StdinCredit { bytes }));
            }
        }
    }

    fn close_finished_input(&mut self) {
        if self.input.is_finished() && !self.process.has_terminal() {
            self.process.stdin = None;
        }
    }

    fn hear_client(&mut self, index: usize, events: PollFlags) {
        if !events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            return;
        }
        if let Some(client) = self.clients.get_mut(index) {
            let outcome = client.stream.receive();
            self.obey_all(index, outcome);
        }
    }

    /// Obeys every message of a client that has arrived whole; the client is lost if one cannot be understood.
    fn obey_all(&mut self, index: usize, mut outcome: Result<(), StreamError>) {
        while outcome.is_ok() {
            match self.take_stdin(index) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            let message = match self.clients.get_mut(index).map(|client| client.stream.next_message()) {
                Some(Ok(Some(message))) => message,
                Some(Err(error)) => {
                    outcome = Err(error);
                    break;
                }
                Some(Ok(None)) | None => return,
            };
            outcome = self.obey(index, message);
        }
        if outcome.is_err()
            && let Some(client) = self.clients.get_mut(index)
        {
            client.lost = true;
        }
    }

    /// Takes the next message of a client if it is stdin: written from where it lies, and only what the process does not take is kept.
    fn take_stdin(&mut self, index: usize) -> Result<bool, StreamError> {
        let Some(client) = self.clients.get_mut(index) else { return Ok(false) };
        let Some(data) = client.stream.next_stdin()? else { return Ok(false) };
        client.credit.take(data.len()).map_err(|_| StreamError::Protocol(FrameError::Malformed))?;
        let (number, wanted) = (client.number, client.sends_stdin && !self.input.is_ended());
        let mut taken = data.len();
        if let (true, Some(stdin)) = (wanted, &self.process.stdin) {
            if self.input.front().is_some() {
                taken = 0;
            } else {
                match rustix::io::write(stdin, data) {
                    Ok(len) => taken = len,
                    Err(Errno::AGAIN | Errno::INTR) => taken = 0,
                    // Nobody reads any more, and nothing waits.
                    Err(_) => {
                        self.process.stdin = None;
                        self.input.abandon();
                    }
                }
            }
            self.input.push(number, data[taken..].to_vec());
        }
        if taken > 0 {
            let idle = self.input.front().is_none();
            self.give_credit(number, taken, idle);
        }
        Ok(true)
    }

    fn obey(&mut self, index: usize, message: HostBody) -> Result<(), StreamError> {
        let malformed = || StreamError::Protocol(msb_protocol::frame::FrameError::Malformed);
        let Some(client) = self.clients.get_mut(index) else { return Ok(()) };
        match message {
            // In an encoding that `take_stdin` does not know.
            HostBody::Stdin(data) => {
                let len = data.data.len();
                client.credit.take(len).map_err(|_| malformed())?;
                let number = client.number;
                if client.sends_stdin && self.process.stdin.is_some() && !self.input.is_ended() {
                    self.input.push(number, data.data);
                } else {
                    self.give_credit(number, len, true);
                }
                self.write_stdin();
            }
            HostBody::StdinEof(_) if client.sends_stdin => self.end_input(),
            HostBody::Signal(signal) => {
                if (1..=64).contains(&signal.number) && !self.ending.has_exited() {
                    self.process.signal(signal.number);
                }
            }
            HostBody::Resize(size) => self.process.resize(size),
            HostBody::Ping(ping) => client.send(GuestBody::Pong(msb_protocol::guest::Pong { token: ping.token })),
            HostBody::StdinEof(_) => {}
            _ => return Err(malformed()),
        }
        Ok(())
    }

    fn end_input(&mut self) {
        if self.process.has_terminal() {
            self.input.push(0, vec![END_OF_TRANSMISSION]);
        } else {
            self.input.end();
        }
    }

    /// Writes what the clients take, and parts with those that are gone.
    fn flush_clients(&mut self) {
        for client in self.clients.iter_mut().filter(|client| !client.lost) {
            client.lost = client.stream.flush().is_err();
        }
        if self.clients.iter().any(|client| client.lost) {
            let (gone, left) =
                std::mem::take(&mut self.clients).into_iter().partition::<Vec<_>, _>(|client| client.lost);
            self.clients = left;
            if gone.iter().any(Client::is_primary) {
                self.primary_is_gone();
            }
        }
    }

    /// The main workload goes on without its caller; an exec is hung up and, if it does not take the hint, killed.
    fn primary_is_gone(&mut self) {
        if !self.process.has_terminal() {
            self.input.end();
        }
        if self.log.is_some() || self.ending.has_exited() {
            self.ending.stop_waiting_for_output();
            return;
        }
        self.ending.stop_waiting_for_output();
        self.process.signal(libc::SIGHUP);
        self.process.signal(libc::SIGCONT);
        self.kill_at = Some(Instant::now() + HANGUP_GRACE);
    }

    fn drop_slow_clients(&mut self) {
        for client in &mut self.clients {
            if client.stream.backlog() > 0 {
                client.stream.discard();
                client.lost = true;
            }
        }
    }
}
