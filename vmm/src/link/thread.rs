//! The thread behind the agent link: reads frames, carries out what `session` says, keeps the guest's clock right.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use msb_protocol::control::LogSource;
use msb_protocol::frame::Decoder;
use msb_protocol::guest::{
    Assembler, ClockSync, GoodbyeAck, GuestConfig, HostBody, Open, OpenKind, OutputStream, Renew, Welcome,
};
use msb_protocol::version::GUEST_GENERATION;
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::time::{ClockId, clock_gettime};

use super::handle::LinkHandle;
use super::session::{Action, LinkSession, LinkState};
use crate::jail::{self, ThreadClass};
use crate::logs::limit::RateLimit;
use crate::logs::workload::WorkloadLog;
use crate::run::{Run, realtime_ns};

/// Seed for the guest's entropy pool, in bytes: twice the pool's 256 bits.
const ENTROPY_BYTES: usize = 64;
/// How often the thread looks at the clocks while nothing arrives.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// How often the guest is told the time anyway: drift stays below what people notice.
const CLOCK_SYNC_INTERVAL: Duration = Duration::from_secs(60);
/// A jump of the wall clock against the monotonic one that is passed on at once: the host slept or was set.
const CLOCK_JUMP: Duration = Duration::from_millis(500);
/// Longest wait for a guest that does not read.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest line with which the vsock device says that a stream is there.
const CONNECTED_LEN_MAX: usize = 32;
/// Bytes per read.
const READ_BYTES: usize = 64 * 1024;
/// No recursion and no large arrays but the read buffer, which is on the heap.
const STACK_BYTES: usize = 256 * 1024;

/// What becomes of a guest that was made of a saved one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Renewal {
    /// It goes on.
    GoOn,
    /// It stands by, until [`LinkHandle::renew`].
    StandBy,
}

/// What the link needs.
pub struct LinkOptions {
    /// Our end of the stream that the vsock device connects port 1025 to.
    pub stream: UnixStream,
    /// Whether the guest was made of a saved one, and what follows: the stream then leads to its agent, which is told what it is now.
    pub renewal: Option<Renewal>,
    /// What the agent gets.
    pub config: GuestConfig,
    /// The run to report to.
    pub run: Run,
    /// The main workload's log; none if it could not be opened.
    pub log: Option<WorkloadLog>,
}

/// Starts the thread; it ends with the stream.
pub fn start(options: LinkOptions) -> io::Result<JoinHandle<()>> {
    options.stream.set_read_timeout(Some(CLOCK_CHECK_INTERVAL))?;
    options.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
    let handle = Arc::new(LinkHandle::new(options.stream.try_clone()?));
    options.run.set_link(Arc::clone(&handle));
    std::thread::Builder::new().name("agent-link".into()).stack_size(STACK_BYTES).spawn(move || {
        let run = options.run.clone();
        let mut link = Link {
            stream: options.stream,
            handle,
            config: Some(options.config),
            run: options.run,
            log: options.log,
            session: match options.renewal {
                Some(renewal) => LinkSession::renewing(renewal == Renewal::StandBy),
                None => LinkSession::new(),
            },
            stood_by: None,
            clock: ClockWatch::new(),
            agent_lines: RateLimit::new(50, Duration::from_secs(1)),
        };
        let served = match options.renewal {
            Some(renewal) => link.renew(renewal == Renewal::StandBy).and_then(|()| link.serve()),
            None => link.serve(),
        };
        if let Err(error) = served {
            tracing::warn!(%error, "agent link failed");
        }
        if let Some(log) = &mut link.log {
            log.finish(Timestamp::now());
        }
        if link.session.state() != LinkState::Waiting {
            run.agent_lost();
        }
    })
}

struct Link {
    stream: UnixStream,
    handle: Arc<LinkHandle>,
    /// Taken by the welcome: with a large environment it is a megabyte.
    config: Option<GuestConfig>,
    run: Run,
    log: Option<WorkloadLog>,
    session: LinkSession,
    /// The agent's generation and the process of its main workload, to be told when somebody takes the guest that stands by.
    stood_by: Option<(u32, u32)>,
    clock: ClockWatch,
    agent_lines: RateLimit,
}

impl Link {
    /// Waits for the device's `OK PORT`, then tells the agent what this guest is now.
    fn renew(&mut self, holds: bool) -> io::Result<()> {
        let mut line = Vec::with_capacity(CONNECTED_LEN_MAX);
        loop {
            let mut byte = [0u8];
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) if line.len() >= CONNECTED_LEN_MAX => return Err(io::ErrorKind::InvalidData.into()),
                Ok(_) => line.push(byte[0]),
                // The boot's own limit ends a guest that never answers, and with it this stream.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        jail::enter_or_abort(ThreadClass::Service);
        if !line.starts_with(b"OK ") {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.run.phases().mark("connected");
        let welcome = new_welcome(&self.run, self.config.take())?;
        let open = Open {
            generation: GUEST_GENERATION,
            boot_id: welcome.boot_id.clone(),
            kind: Some(OpenKind::Renew(Renew { welcome: Some(Box::new(welcome)), holds })),
        };
        self.send(HostBody::Open(open))
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut decoder = Decoder::new();
        let mut assembler = Assembler::new();
        let mut buffer = vec![0u8; READ_BYTES];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => {
                    jail::enter_or_abort(ThreadClass::Service);
                    decoder.push(&buffer[..count]);
                    while let Some(body) = decoder.next_body().map_err(io::Error::other)? {
                        if let Some(message) = assembler.guest(body).map_err(io::Error::other)?
                            && !self.carry_out(message)?
                        {
                            return Ok(());
                        }
                    }
                }
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            // A halted guest reads nothing; it is told when it goes on and the next look comes.
            let listens = self.session.state() == LinkState::Up && !self.run.facts().paused;
            if listens && self.clock.is_due(Instant::now()) {
                self.send(HostBody::ClockSync(ClockSync { realtime_ns: realtime_ns() }))?;
            }
        }
    }

    /// One message; false when the link is to be closed.
    fn carry_out(&mut self, message: msb_protocol::guest::GuestBody) -> io::Result<bool> {
        match self.session.take(message) {
            Action::Welcome { generation, init_uptime_us, hello_uptime_us } => {
                self.mark_guest_phases(init_uptime_us, hello_uptime_us);
                self.run.agent_hello(generation);
                self.welcome()?;
            }
            Action::Ready(steps) => {
                tracing::info!(
                    steps = ?steps.iter().map(|step| (step.name.as_str(), step.duration_us)).collect::<Vec<_>>(),
                    "guest is ready"
                );
                if let Some((generation, main_pid)) = self.stood_by.take() {
                    self.log = self.handle.take_log();
                    self.tell_renewed(generation, main_pid);
                }
                self.run.phases().mark("setup");
                self.run.agent_ready();
            }
            Action::Stands => self.run.stands(),
            Action::BootFailed { stage, error } => {
                tracing::warn!(stage, message = error.message, "guest could not be set up");
                self.run.fail_boot(&stage, error);
                self.run.stop();
            }
            Action::Renewed { generation, main_pid } => {
                if self.session.holds() {
                    self.stood_by = Some((generation, main_pid));
                } else {
                    self.tell_renewed(generation, main_pid);
                }
            }
            Action::Quiesced(outcome) => self.handle.note_quiesced(outcome),
            Action::MainStarted(pid) => self.run.main_started(pid),
            Action::Output(stream, data) => {
                if let Some(log) = &mut self.log {
                    let source = match stream {
                        OutputStream::Stdout => LogSource::Stdout,
                        OutputStream::Stderr => LogSource::Stderr,
                    };
                    log.write(source, &data, Timestamp::now());
                }
            }
            Action::MainExited(end) => self.run.main_exited(end.into()),
            Action::Log(line) => {
                if let Some(suppressed) = self.agent_lines.allow(Instant::now()) {
                    tracing::info!(suppressed, "agent: {line}");
                    if let Some(log) = &mut self.log {
                        log.write(LogSource::System, format!("agent: {line}\n").as_bytes(), Timestamp::now());
                    }
                }
            }
            Action::Goodbye => {
                if let Some(log) = &mut self.log {
                    log.finish(Timestamp::now());
                }
                self.run.goodbye();
                self.send(HostBody::GoodbyeAck(GoodbyeAck {}))?;
            }
            Action::Close(reason) => {
                tracing::warn!(reason, "agent link is closed");
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The guest is what the host says it is: the run begins.
    fn tell_renewed(&self, generation: u32, main_pid: u32) {
        self.run.phases().mark("renewed");
        self.run.agent_hello(generation);
        if main_pid != 0 {
            self.run.main_started(main_pid);
        }
    }

    /// The guest's own times, counted back from now and never beyond what the host saw.
    fn mark_guest_phases(&self, init_uptime_us: u64, hello_uptime_us: u64) {
        let now_us = u64::try_from(self.run.started().elapsed().as_micros()).unwrap_or(u64::MAX);
        let since_init = hello_uptime_us - init_uptime_us;
        let earliest = self.run.phases().all().iter().map(|mark| mark.at_us).max().unwrap_or(0);
        self.run.phases().mark_at("kernel", now_us.saturating_sub(since_init).max(earliest.min(now_us)));
        self.run.phases().mark_at("init", now_us);
    }

    fn welcome(&mut self) -> io::Result<()> {
        let welcome = new_welcome(&self.run, self.config.take())?;
        self.send(HostBody::Welcome(welcome))
    }

    fn send(&self, message: HostBody) -> io::Result<()> {
        self.handle.send(message)
    }
}

/// What a guest is told of the run that it is.
pub(super) fn new_welcome(run: &Run, config: Option<GuestConfig>) -> io::Result<Welcome> {
    let mut entropy = vec![0u8; ENTROPY_BYTES];
    getrandom(&mut entropy[..], GetRandomFlags::empty())?;
    Ok(Welcome {
        generation: GUEST_GENERATION,
        boot_id: run.boot_id().0.as_bytes().to_vec(),
        realtime_ns: realtime_ns(),
        entropy,
        config,
    })
}

/// Notices when the guest's clock should be set.
struct ClockWatch {
    synced: Instant,
    /// Wall clock less monotonic clock in nanoseconds: changes when the host slept (the monotonic clock stands still then) or was set.
    offset_ns: i128,
}

impl ClockWatch {
    fn new() -> Self {
        Self { synced: Instant::now(), offset_ns: clock_offset_ns() }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let offset_ns = clock_offset_ns();
        let jumped = (offset_ns - self.offset_ns).unsigned_abs() >= CLOCK_JUMP.as_nanos();
        if !jumped && now.duration_since(self.synced) < CLOCK_SYNC_INTERVAL {
            return false;
        }
        self.synced = now;
        self.offset_ns = offset_ns;
        true
    }
}

fn clock_offset_ns() -> i128 {
    let monotonic = clock_gettime(ClockId::Monotonic);
    let monotonic_ns = i128::from(monotonic.tv_sec) * 1_000_000_000 + i128::from(monotonic.tv_nsec);
    i128::from(realtime_ns()) - monotonic_ns
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use msb_protocol::guest::{AgentHello, Exited, Goodbye, GuestBody, Output, Ready, Started, encode_guest};
    use msb_protocol::id::{BootId, SandboxId};
    use msb_protocol::state::ProcessEnd;
    use msb_protocol::vmm::Event;

    use super::*;
    use crate::logs::console::ConsoleLog;

    fn receive(stream: &mut UnixStream) -> HostBody {
        let (mut decoder, mut assembler, mut buffer) = (Decoder::new(), Assembler::new(), [0u8; 4096]);
        loop {
            let count = stream.read(&mut buffer).expect("read");
            assert!(count > 0, "the link was closed");
            decoder.push(&buffer[..count]);
            while let Some(body) = decoder.next_body().expect("frame") {
                if let Some(message) = assembler.host(body).expect("message") {
                    return message;
                }
            }
        }
    }

    fn say(stream: &mut UnixStream, message: GuestBody) {
        let mut wire = Vec::new();
        encode_guest(message, &mut wire).expect("encode");
        stream.write_all(&wire).expect("write");
    }

    #[test]
    fn an_agent_is_welcomed_logged_and_let_go() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("log");
        let run =
            Run::new(SandboxId::generate(), BootId::generate(), Instant::now(), ConsoleLog::in_memory()).expect("run");
        let (ours, mut agent) = UnixStream::pair().expect("pair");
        let log = WorkloadLog::open(&path, 1 << 20, 1, run.boot_id()).expect("log");
        let config = GuestConfig { hostname: "box".into(), ..Default::default() };
        let thread = start(LinkOptions { stream: ours, renewal: None, config, run: run.clone(), log: Some(log) })
            .expect("start");

        say(&mut agent, GuestBody::AgentHello(AgentHello { generation: 1, ..Default::default() }));
        let HostBody::Welcome(welcome) = receive(&mut agent) else { panic!("a welcome") };
        assert_eq!(welcome.boot_id, run.boot_id().0.as_bytes());
        assert_eq!(welcome.config.expect("config").hostname, "box");
        assert_eq!(welcome.entropy.len(), ENTROPY_BYTES);
        assert!(realtime_ns() - welcome.realtime_ns < 5_000_000_000);
        say(&mut agent, GuestBody::Ready(Ready::default()));
        say(&mut agent, GuestBody::MainStarted(Started { pid: 9 }));
        say(&mut agent, GuestBody::MainOutput(Output { stream: 0, data: b"hello\n".to_vec() }));
        say(&mut agent, GuestBody::MainExited(Exited { code: 3, ..Default::default() }));
        say(&mut agent, GuestBody::Goodbye(Goodbye {}));
        assert!(matches!(receive(&mut agent), HostBody::GoodbyeAck(_)));
        drop(agent);
        thread.join().expect("thread");

        let facts = run.facts();
        assert!(facts.goodbye && facts.agent_lost_at.is_none());
        assert_eq!(facts.main_end, Some(ProcessEnd::exited(3)));
        let kinds: Vec<_> = run.take_events().iter().map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), 4);
        assert!(std::fs::read_to_string(&path).expect("log").contains("hello"));
        let _ = Event::HostDiskFull { boot_id: run.boot_id(), full: false };
    }

    #[test]
    fn a_guest_made_of_a_saved_one_is_told_what_it_is_now() {
        use msb_protocol::guest::Opened;
        let run =
            Run::new(SandboxId::generate(), BootId::generate(), Instant::now(), ConsoleLog::in_memory()).expect("run");
        let (ours, mut agent) = UnixStream::pair().expect("pair");
        let config = GuestConfig { hostname: "twin".into(), ..Default::default() };
        let options = LinkOptions { stream: ours, renewal: Some(Renewal::GoOn), config, run: run.clone(), log: None };
        let thread = start(options).expect("start");
        agent.write_all(b"OK 1073741824\n").expect("write");
        let HostBody::Open(open) = receive(&mut agent) else { panic!("an opening") };
        let Some(OpenKind::Renew(renew)) = open.kind else { panic!("a renewal") };
        let welcome = renew.welcome.expect("a welcome");
        assert_eq!((&open.boot_id, welcome.entropy.len()), (&welcome.boot_id, ENTROPY_BYTES));
        assert_eq!(welcome.config.expect("config").hostname, "twin");
        say(&mut agent, GuestBody::Opened(Opened { generation: 3, ..Default::default() }));
        say(&mut agent, GuestBody::Ready(Ready::default()));
        say(&mut agent, GuestBody::Goodbye(Goodbye {}));
        assert!(matches!(receive(&mut agent), HostBody::GoodbyeAck(_)));
        drop(agent);
        thread.join().expect("thread");
        assert_eq!(run.facts().agent_generation, Some(3));
        assert!(run.facts().goodbye);
    }

    #[test]
    fn an_agent_that_vanishes_is_lost_and_garbage_closes_the_link() {
        for garbage in [false, true] {
            let run = Run::new(SandboxId::generate(), BootId::generate(), Instant::now(), ConsoleLog::in_memory())
                .expect("run");
            let (ours, mut agent) = UnixStream::pair().expect("pair");
            let options = LinkOptions {
                stream: ours,
                renewal: None,
                config: GuestConfig::default(),
                run: run.clone(),
                log: None,
            };
            let thread = start(options).expect("start");
            say(&mut agent, GuestBody::AgentHello(AgentHello { generation: 1, ..Default::default() }));
            receive(&mut agent);
            if garbage {
                agent.write_all(&[0xff; 64]).expect("write");
            }
            let _ = agent.shutdown(std::net::Shutdown::Write);
            thread.join().expect("thread");
            assert!(run.facts().agent_lost_at.is_some());
        }
    }
}
