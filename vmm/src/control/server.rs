//! The control thread: requests, events, deadlines.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::spec::EngineChoice;
use msb_protocol::version::VMM_GENERATION;
use msb_protocol::vmm::{
    CONSOLE_LOG_FILE, DECISION_LOG_FILE, Event, JailReport, Message, Reply, Request, Sample, VmSpec, VmState, VmStatus,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::Connection;
use super::explanation::{explanation, question};
use super::sample::Sampler;
use crate::devices::virtio::net::NetHandle;
use crate::end::silent_agent;
use crate::jail::{self, ThreadClass};
use crate::launch::machine::Meters;
use crate::logs::decisions::DecisionLog;
use crate::logs::workload::WorkloadLog;
use crate::run::{AGENT_LOST_GRACE, GOODBYE_GRACE, Run, Saved};

/// Daemons connected at once; the oldest gives way.
const CONNECTIONS_MAX: usize = 8;
/// Requests taken from one connection in one turn.
const REQUESTS_MAX: usize = 32;
/// Time for the last messages to leave before the process exits.
const FAREWELL: Duration = Duration::from_secs(1);
/// Least time between two samples.
const SAMPLE_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// How long a machine that stands by runs on before it is halted: what its kernel puts off (a journal's commit, write-back, timers of the
/// network) is done by then, and not when somebody takes it.
const SETTLING: Duration = Duration::from_secs(10);
/// How long a guest that was made of a saved one has run when it is noted which pages it has written.
const FIRST_WRITES: Duration = Duration::from_secs(2);
const STACK_BYTES: usize = 512 * 1024;

/// What the control thread needs.
pub struct ControlOptions {
    /// `control.sock`.
    pub listener: UnixListener,
    /// The connection that launched this process, if it was launched by a daemon.
    pub first: Option<Connection>,
    /// The run.
    pub run: Run,
    /// The engine, never `auto`.
    pub engine: EngineChoice,
    /// Why that one, if it was picked.
    pub engine_reason: Option<String>,
    /// The devices' counters.
    pub meters: Meters,
    /// Listeners of published ports, for a daemon that adopts this process.
    pub ports: Vec<OwnedFd>,
    /// Time for the agent to be ready, in milliseconds from the run's start.
    pub boot_timeout_ms: u64,
    /// The request to stand by with the machine, if that came in place of a launch.
    pub stand_by: Option<StandBy>,
}

/// A machine that stands by, or is on its way there.
#[derive(Debug)]
pub struct StandBy {
    /// The request that is answered when it stands.
    pub request_id: u64,
    /// What stands.
    pub spec: Box<VmSpec>,
    /// Whether it does.
    pub stands: bool,
    /// When it is halted.
    pub halted_at: Option<Instant>,
}

/// What becomes known while the thread runs.
struct Late {
    jail: JailReport,
    /// For the daemon that hears of the end.
    remains: Option<OwnedFd>,
    sampler: Sampler,
}

fn lock(late: &Mutex<Late>) -> MutexGuard<'_, Late> {
    late.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread's handle.
pub struct Control {
    run: Run,
    ending: Arc<AtomicBool>,
    late: Arc<Mutex<Late>>,
    thread: JoinHandle<()>,
}

impl Control {
    /// Starts the thread.
    ///
    /// # Errors
    /// No thread, or the listener cannot be made non-blocking.
    pub fn start(options: ControlOptions) -> io::Result<Self> {
        options.listener.set_nonblocking(true)?;
        let ending = Arc::new(AtomicBool::new(false));
        let network = options.meters.network.clone();
        let sampler = Sampler::new(options.run.clone(), options.meters);
        let late = Arc::new(Mutex::new(Late { jail: JailReport::default(), remains: None, sampler }));
        let run = options.run.clone();
        let mut server = Server {
            listener: options.listener,
            connections: options.first.into_iter().collect(),
            run: options.run,
            engine: options.engine,
            engine_reason: options.engine_reason,
            network,
            ports: options.ports,
            boot_timeout_ms: options.boot_timeout_ms,
            stand_by: options.stand_by,
            late: Arc::clone(&late),
            ending: Arc::clone(&ending),
            goodbye_sampled: false,
            saved: None,
            noted_at: None,
        };
        let thread =
            std::thread::Builder::new().name("control".into()).stack_size(STACK_BYTES).spawn(move || server.serve())?;
        Ok(Self { run, ending, late, thread })
    }

    /// Tells what confines the process, once it does.
    pub fn set_jail(&self, jail: JailReport) {
        lock(&self.late).jail = jail;
        // The thread confines itself when it wakes.
        let _ = self.run.wake().notify();
    }

    /// Tells which other processes belong to the machine.
    pub fn set_machine_pids(&self, pids: &[u32]) {
        lock(&self.late).sampler.set_machine_pids(pids);
    }

    /// The counters now, also after the machine has ended.
    pub fn sample(&self) -> Sample {
        lock(&self.late).sampler.take_last()
    }

    /// Sends the `Ended` event, and with it what of the machine takes long to close, and ends the thread.
    pub fn finish(self, ended: Event, remains: Option<OwnedFd>) {
        lock(&self.late).remains = remains;
        self.run.announce(ended);
        self.ending.store(true, Ordering::SeqCst);
        let _ = self.run.wake().notify();
        if self.thread.join().is_err() {
            tracing::error!("control thread panicked");
        }
    }
}

/// What a wait ended with, beside connections.
struct Ready {
    wake: bool,
    listener: bool,
}

struct Server {
    listener: UnixListener,
    connections: Vec<Connection>,
    run: Run,
    engine: EngineChoice,
    engine_reason: Option<String>,
    network: Option<(NetHandle, DecisionLog)>,
    ports: Vec<OwnedFd>,
    boot_timeout_ms: u64,
    stand_by: Option<StandBy>,
    late: Arc<Mutex<Late>>,
    ending: Arc<AtomicBool>,
    goodbye_sampled: bool,
    /// The machine, while it stands because it was written down.
    saved: Option<Saved>,
    /// When it is noted what the guest has written, once it is ready.
    noted_at: Option<Instant>,
}

impl Server {
    fn serve(&mut self) {
        loop {
            let now = Instant::now();
            let due = self.connections.iter().filter_map(Connection::next_sample).min();
            let due = due.map(|at| at.saturating_duration_since(now));
            let timeout = self.check_deadlines(now).into_iter().chain(due).min();
            let ready = self.wait(timeout);
            jail::enter_or_abort(ThreadClass::Service);
            if ready.wake {
                self.run.wake().drain();
            }
            if ready.listener {
                self.accept();
            }
            self.serve_connections();
            self.mind_stand_by(Instant::now());
            self.send_samples(Instant::now());
            self.pass_events_on();
            self.mind_note(Instant::now());
            if let Some((_, decisions)) = &self.network {
                decisions.flush();
            }
            if self.ending.load(Ordering::SeqCst) {
                // Events announced before the flag was set are in the queue by now.
                self.pass_events_on();
                self.run.note_written();
                self.say_farewell();
                return;
            }
        }
    }

    /// Sends a sample to every connection whose time has come. One that has not taken what was sent before gets none: samples never
    /// pile up.
    fn send_samples(&mut self, now: Instant) {
        // The threads' time is asked for while they live: at the goodbye for a clean end, at each sample for any other.
        if !self.goodbye_sampled && self.run.facts().goodbye {
            self.goodbye_sampled = true;
            lock(&self.late).sampler.take_last();
        }
        let mut sample = None;
        let (late, boot_id) = (&self.late, self.run.boot_id());
        self.connections.retain_mut(|connection| {
            if !connection.take_due_sample(now) || connection.has_outgoing() {
                return true;
            }
            let sample = sample.get_or_insert_with(|| lock(late).sampler.take());
            connection.send_sample(boot_id, sample)
        });
    }

    /// Acts on deadlines that have passed; the time to the next one.
    fn check_deadlines(&self, now: Instant) -> Option<Duration> {
        let facts = self.run.facts();
        let mut next: Option<Instant> = None;
        let is_booting = matches!(facts.state, VmState::Booting | VmState::SettingUp) && !facts.stands;
        if is_booting && facts.boot_failure.is_none() {
            let deadline = self.run.started() + Duration::from_millis(self.boot_timeout_ms);
            if now >= deadline {
                let console = self.run.console();
                let panic_line = console.panic_line();
                let failure = silent_agent(&facts, console.has_output(), self.boot_timeout_ms, panic_line.as_deref());
                tracing::warn!(stage = failure.stage, message = failure.error.message, "boot timed out");
                self.run.fail_boot(&failure.stage, failure.error);
                self.run.stop();
            } else {
                next = Some(deadline);
            }
        }
        let lost = facts.agent_lost_at.map(|lost| lost + AGENT_LOST_GRACE);
        let goodbye = facts.goodbye_at.map(|goodbye| goodbye + GOODBYE_GRACE);
        // Halted where its connection is looked at.
        let halted_at = self.stand_by.as_ref().and_then(|stand_by| stand_by.halted_at);
        let noted_at = self.noted_at.filter(|noted_at| now < *noted_at);
        next = next.into_iter().chain(halted_at).chain(noted_at).min();
        for deadline in lost.into_iter().chain(goodbye) {
            if now >= deadline {
                self.run.stop();
            } else {
                next = Some(next.map_or(deadline, |other| other.min(deadline)));
            }
        }
        next.map(|deadline| deadline.saturating_duration_since(now))
    }

    /// Once, some time after the guest was ready. At its end else.
    fn mind_note(&mut self, now: Instant) {
        match self.noted_at {
            None if self.run.facts().state == VmState::Ready => self.noted_at = Some(now + FIRST_WRITES),
            Some(noted_at) if now >= noted_at => self.run.note_written(),
            _ => {}
        }
    }

    /// Waits for something to do, and finds out what: an idle machine asks the kernel for nothing else each second.
    fn wait(&mut self, timeout: Option<Duration>) -> Ready {
        let wake = self.run.wake();
        let mut watched = vec![PollFd::new(&wake, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        for connection in &self.connections {
            let out = if connection.has_outgoing() { PollFlags::OUT } else { PollFlags::empty() };
            watched.push(PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN | out));
        }
        // Rounded up, so that a deadline has passed when the wait is over.
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos().saturating_add(1).min(999_999_999)),
        });
        let polled = poll(&mut watched, timeout.as_ref());
        // What is not known is looked at.
        let is_ready: Vec<bool> =
            watched.iter().map(|watched| polled.is_err() || !watched.revents().is_empty()).collect();
        drop(watched);
        if let Err(error) = polled
            && error != rustix::io::Errno::INTR
        {
            tracing::error!(%error, "control thread cannot wait");
            std::thread::sleep(Duration::from_millis(100));
        }
        for (connection, is_ready) in self.connections.iter_mut().zip(&is_ready[2..]) {
            connection.is_ready = *is_ready;
        }
        Ready { wake: is_ready[0], listener: is_ready[1] }
    }

    fn accept(&mut self) {
        // Whoever reaches the socket is this user: the directory is 0700, and so decides the file system.
        while let Ok((stream, _)) = self.listener.accept() {
            if let Ok(connection) = Connection::new(stream) {
                if self.connections.len() >= CONNECTIONS_MAX {
                    // The oldest that only asks: never the one that hears the events.
                    let oldest = self.connections.iter().position(|connection| !connection.wants_events);
                    self.connections.remove(oldest.unwrap_or_default());
                }
                self.connections.push(connection);
            }
        }
    }

    fn serve_connections(&mut self) {
        let mut connections = std::mem::take(&mut self.connections);
        let mut new_listener = None;
        let mut kept = Vec::with_capacity(connections.len());
        for mut connection in connections.drain(..) {
            let open = !connection.is_ready || connection.receive();
            let mut alive = true;
            for _ in 0..REQUESTS_MAX {
                match connection.next_request() {
                    Ok(Some(frame)) => {
                        let adopts = matches!(frame.request, Request::Adopt { .. });
                        if let Request::Subscribe { sample_interval_ms, compact } = frame.request {
                            let interval = Duration::from_millis(sample_interval_ms).max(SAMPLE_INTERVAL_MIN);
                            let interval = (sample_interval_ms > 0).then_some(interval);
                            connection.subscribe(interval, compact, Instant::now());
                        }
                        let result = match frame.request {
                            Request::Save { flush } => self.save(&mut connection, flush),
                            Request::Launch { spec } => self.take_over(&mut connection, spec),
                            request => self.answer(request),
                        };
                        if adopts && result.is_ok() {
                            connection.attach(&self.ports);
                            connection.wants_events = true;
                            new_listener = Some(kept.len());
                        }
                        alive &= connection.send(&Message::Reply { id: frame.id, result });
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(%error, "a daemon does not speak the protocol, its connection is closed");
                        alive = false;
                        break;
                    }
                }
            }
            alive &= connection.flush();
            if open && alive {
                kept.push(connection);
            } else if new_listener == Some(kept.len()) {
                new_listener = None;
            }
        }
        if let Some(newest) = new_listener {
            for (index, connection) in kept.iter_mut().enumerate() {
                connection.wants_events = index == newest;
            }
        }
        self.connections = kept;
        // Whoever asked for it is gone: nobody else lets it go on.
        if self.saved.is_some() && !self.connections.iter().any(|connection| connection.has_saved) {
            self.saved = None;
        }
    }

    /// Writes the machine down into the two files that came along; it stands until `Release`, or until the connection ends.
    fn save(&mut self, connection: &mut Connection, flush: bool) -> Result<Reply, ApiError> {
        let mut files = connection.take_descriptors().into_iter().map(File::from);
        let (Some(memory), Some(state), None) = (files.next(), files.next(), files.next()) else {
            return Err(ApiError::new(ErrorCode::InvalidRequest, "a machine is written into two files"));
        };
        if self.saved.is_some() {
            return Err(ApiError::new(ErrorCode::SandboxBusy, "the machine is being written down already"));
        }
        self.saved = Some(self.run.save(self.engine, &memory, &state, flush)?);
        connection.has_saved = true;
        Ok(Reply::Done)
    }

    /// Says that a machine stands by, and halts it a while later; ends one that nobody will take any more, or that did not come so far.
    fn mind_stand_by(&mut self, now: Instant) {
        let Some(StandBy { request_id, stands, halted_at, .. }) = &mut self.stand_by else { return };
        let Some(daemon) = self.connections.first_mut() else { return self.run.stop() };
        let facts = self.run.facts();
        let is_over = self.ending.load(Ordering::SeqCst);
        let result = match facts.boot_failure {
            Some(failure) => Err(failure.error),
            None if is_over => Err(ApiError::new(ErrorCode::BootFailed, "the machine ended before it stood")),
            None if halted_at.is_some_and(|at| at <= now) => {
                *halted_at = None;
                self.run.note_written();
                if let Err(error) = self.run.halt() {
                    tracing::warn!(message = error.message, "a machine that stands by cannot be halted");
                    self.run.stop();
                }
                return;
            }
            None if facts.stands && !*stands => {
                *halted_at = Some(now + SETTLING);
                Ok(Reply::Done)
            }
            None => return,
        };
        if *stands {
            return;
        }
        *stands = true;
        let failed = result.is_err();
        daemon.send(&Message::Reply { id: *request_id, result });
        if failed {
            self.stand_by = None;
            self.run.stop();
        }
    }

    /// Makes the machine that stands by the run of `spec`.
    fn take_over(&mut self, connection: &mut Connection, mut spec: Box<VmSpec>) -> Result<Reply, ApiError> {
        let refuse = |message: &str| Err(ApiError::new(ErrorCode::InvalidRequest, message));
        let standing = match self.stand_by.take() {
            Some(StandBy { stands: true, spec: standing, .. }) if spec.takes_over(&standing) => standing,
            Some(_) => {
                // It will not be asked again.
                self.run.stop();
                return refuse("this process stands by for another machine");
            }
            None => return refuse("this VM process has its launch"),
        };
        // The daemon gave the folders other names. A jail with mounts of its own has them where they were.
        for (now, before) in [(&mut spec.run_dir, standing.run_dir), (&mut spec.log_dir, standing.log_dir)] {
            if before.exists() {
                *now = before;
            }
        }
        tracing::info!(boot_id = %spec.boot_id, sandbox = %spec.name, "launch of the machine that stood by");
        self.run.console().moved_to(&spec.log_dir.join(CONSOLE_LOG_FILE));
        if let Some((_, decisions)) = &self.network {
            decisions.moved_to(&spec.log_dir.join(DECISION_LOG_FILE));
        }
        let log = WorkloadLog::open_of(&spec);
        self.boot_timeout_ms = spec.boot_timeout_ms;
        connection.wants_events = true;
        self.run.take_over(spec, log).inspect_err(|_| self.run.stop())?;
        Ok(Reply::Status(Box::new(self.status())))
    }

    fn answer(&mut self, request: Request) -> Result<Reply, ApiError> {
        match request {
            Request::Launch { .. } => Err(ApiError::internal("answered where its connection is")),
            Request::MakeVm | Request::StandBy(_) => {
                Err(ApiError::new(ErrorCode::InvalidRequest, "this VM process has its launch"))
            }
            Request::Adopt { generation: 0 } => {
                Err(ApiError::new(ErrorCode::UnsupportedOperation, "generation 0 of the VMM border does not exist"))
            }
            Request::Adopt { .. } | Request::Status => Ok(Reply::Status(Box::new(self.status()))),
            Request::Kill { cause } => {
                lock(&self.late).sampler.take();
                self.run.kill(cause);
                // A machine that stands ends as it is: its vCPUs never enter the guest again. Its devices must be free for that.
                self.saved = None;
                Ok(Reply::Done)
            }
            Request::Save { .. } => Err(ApiError::internal("answered where its files are")),
            Request::Release => {
                self.saved = None;
                Ok(Reply::Done)
            }
            Request::Pause | Request::Resume if self.saved.is_some() => {
                Err(ApiError::new(ErrorCode::SandboxBusy, "the machine is being written down"))
            }
            Request::Pause => self.run.set_paused(true, self.engine).map(|()| Reply::Done),
            Request::Resume => self.run.set_paused(false, self.engine).map(|()| Reply::Done),
            Request::ExpectEnd { cause } => {
                self.run.expect_end(cause);
                Ok(Reply::Done)
            }
            Request::ConsoleTail { bytes_max } => {
                let text = self.run.console().tail(usize::try_from(bytes_max).unwrap_or(usize::MAX));
                Ok(Reply::ConsoleTail { text })
            }
            Request::ExplainNetwork { target } => self.explain(&target),
            Request::Sample => Ok(Reply::Sample(Box::new(lock(&self.late).sampler.take()))),
            // The connection remembers it.
            Request::Subscribe { .. } => Ok(Reply::Done),
        }
    }

    fn explain(&self, target: &str) -> Result<Reply, ApiError> {
        let question = question(target)?;
        let Some((network, _)) = &self.network else {
            return Err(ApiError::new(ErrorCode::InvalidRequest, "this sandbox has no network (--no-net)"));
        };
        Ok(Reply::Explanation(Box::new(explanation(network.explain(&question)))))
    }

    fn status(&self) -> VmStatus {
        let facts = self.run.facts();
        VmStatus {
            generation: VMM_GENERATION,
            version: env!("CARGO_PKG_VERSION").into(),
            sandbox_id: self.run.sandbox_id(),
            boot_id: self.run.boot_id(),
            pid: std::process::id(),
            engine: self.engine,
            engine_reason: self.engine_reason.clone(),
            state: facts.state,
            agent_generation: facts.agent_generation,
            main_end: facts.main_end,
            main_started: facts.main_started,
            paused: facts.paused,
            phases: self.run.phase_report(),
            jail: lock(&self.late).jail.clone(),
        }
    }

    fn pass_events_on(&mut self) {
        // Without a listener events stay where they are, bounded, for the daemon that will come.
        if !self.connections.iter().any(|connection| connection.wants_events) {
            return;
        }
        for event in self.run.take_events() {
            let remains = if matches!(event, Event::Ended { .. }) { lock(&self.late).remains.take() } else { None };
            if let (Some(remains), Some(daemon)) =
                (remains, self.connections.iter_mut().find(|connection| connection.wants_events))
            {
                daemon.attach(&[remains]);
            }
            let message = Message::Event { event };
            self.connections.retain_mut(|connection| !connection.wants_events || connection.send(&message));
        }
    }

    fn say_farewell(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        while self.connections.iter().any(Connection::has_outgoing) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            self.wait(Some(left));
            self.connections.retain_mut(Connection::flush);
        }
    }
}
