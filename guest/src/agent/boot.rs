//! From the agent's first instruction to its accept loop: link, hello, clock, entropy, root, Ready. Called by `agent::run`.
//!
//! ```text
//!  connect ─► AgentHello ─► Welcome ─► clock, entropy ─► root (root::set_up) ─► listener ─► Ready ─► threads ─► accept
//!     └──────────┴────────────┴── no link: a line on the console       └── BootFailed{stage} on the link, then the reset
//! ```
//!
//! No thread exists before the root is finished.

use std::convert::Infallible;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use msb_protocol::error::ErrorCode;
use msb_protocol::guest::{
    AGENT_PORT, AgentHello, Failure, GuestBody, HOST_CID, HostBody, LINK_PORT, Ready, Step, Welcome,
};
use msb_protocol::security::SecurityProfile;
use msb_protocol::version::{GUEST_GENERATION, GUEST_GENERATION_MIN, negotiate};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr};
use rustix::mount::{MountFlags, mount_remount};

use super::clock::{self, uptime_us};
use super::connection::{self, flush_until, next_message};
use super::ending::{self, Reason};
use super::link::Link;
use super::{Agent, STACK_LEN, VERSION, renewal};
use crate::root::directory::path_of;
use crate::root::{self, RootError};
use crate::security::Security;
use crate::session::stream::FrameStream;
use crate::session::workload::Host;
use crate::session::{Guest, Sessions};
use crate::sys;

/// Tries to connect the link before giving up.
const CONNECT_TRIES: u32 = 20;
/// Time between two tries.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// How long the host may take to answer the hello.
const WELCOME_LIMIT: Duration = Duration::from_secs(30);
/// How long a last word on the link may take to be written.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(1);
/// Stages of a failed boot as the host names them: the agent itself, and what it sets up.
const AGENT: &str = "agent";
const SETUP: &str = "setup";
/// Streams that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why the agent cannot go on, for the console.
#[derive(Debug, thiserror::Error)]
#[error("boot failed at {stage}: {message}")]
pub struct BootError {
    stage: String,
    pub(super) message: String,
}

fn failed(stage: &str, error: impl std::fmt::Display) -> BootError {
    BootError { stage: stage.into(), message: error.to_string() }
}

/// Boots and serves until the machine is reset.
///
/// # Errors
/// [`BootError`] where there is no link to say it on.
pub fn run() -> Result<Infallible, BootError> {
    let mut stream = FrameStream::new(connect_link()?).map_err(|errno| failed("link", errno))?;
    let init_uptime_us =
        std::env::var(crate::init::UPTIME_VARIABLE).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    stream.send(GuestBody::AgentHello(AgentHello {
        generation: GUEST_GENERATION,
        agent_version: VERSION.into(),
        init_uptime_us,
        hello_uptime_us: uptime_us(),
    }));
    let until = Instant::now() + WELCOME_LIMIT;
    flush_until(&mut stream, until);
    let welcome = match next_message(&mut stream, until) {
        Ok(HostBody::Welcome(welcome)) => welcome,
        Ok(_) => return Err(failed("hello", "the host answered with something else than a welcome")),
        Err(error) => return Err(failed("hello", error)),
    };
    let mut steps = Steps::new();
    steps.done("hello");
    match prepare(welcome, &mut steps) {
        Ok(prepared) => serve(stream, prepared, steps),
        Err(failure) => {
            let error = failed(&failure.stage, &failure.message);
            stream.send(GuestBody::BootFailed(failure));
            flush_until(&mut stream, Instant::now() + LAST_WORD_LIMIT);
            // The host closes the link when it has the word; then the reset cannot overtake it.
            let _ = next_message(&mut stream, Instant::now() + LAST_WORD_LIMIT);
            Err(error)
        }
    }
}

/// The steps and their durations.
pub(super) struct Steps {
    pub(super) steps: Vec<Step>,
    last_us: u64,
}

impl Steps {
    pub(super) fn new() -> Self {
        Self { steps: Vec::new(), last_us: uptime_us() }
    }

    pub(super) fn done(&mut self, name: &str) {
        let now_us = uptime_us();
        self.steps.push(Step { name: name.into(), duration_us: now_us.saturating_sub(self.last_us) });
        self.last_us = now_us;
    }
}

fn connect_link() -> Result<OwnedFd, BootError> {
    let mut tries = 0;
    loop {
        match connect_once() {
            Ok(socket) => return Ok(socket),
            Err(errno) => {
                tries += 1;
                if tries >= CONNECT_TRIES {
                    return Err(failed("link", format!("cannot reach the host over vsock: {errno}")));
                }
                std::thread::sleep(CONNECT_PAUSE);
            }
        }
    }
}

fn connect_once() -> nix::Result<OwnedFd> {
    let socket = nix::sys::socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, LINK_PORT))?;
    Ok(socket)
}

/// The guest, ready for its first process.
struct Prepared {
    guest: Guest,
    listener: OwnedFd,
    disks: Vec<OwnedFd>,
}

fn prepare(welcome: Welcome, steps: &mut Steps) -> Result<Prepared, Failure> {
    let fail = |code: ErrorCode, stage: &str, message: String, errno: i32| Failure {
        code: code.as_str().into(),
        message,
        errno,
        stage: stage.into(),
    };
    let boot_failed = |stage: &str, message: String| fail(ErrorCode::BootFailed, stage, message, 0);
    negotiate(GUEST_GENERATION, GUEST_GENERATION_MIN, welcome.generation)
        .map_err(|error| fail(ErrorCode::UnsupportedOperation, AGENT, error.to_string(), 0))?;
    let config = welcome.config.ok_or_else(|| boot_failed(AGENT, "the host sent no configuration".into()))?;
    clock::set(welcome.realtime_ns).map_err(|errno| boot_failed(SETUP, format!("cannot set the clock: {errno}")))?;
    if !welcome.entropy.is_empty() {
        let random = std::fs::File::open("/dev/urandom")
            .map_err(|error| boot_failed(SETUP, format!("cannot open /dev/urandom: {error}")))?;
        sys::add_entropy(&random, &welcome.entropy)
            .map_err(|errno| boot_failed(SETUP, format!("cannot seed the entropy pool: {errno}")))?;
    }
    steps.done("clock and entropy");
    raise_descriptor_limit();
    let root = root::set_up(&config, |name| steps.done(name)).map_err(|error: RootError| {
        let errno = error.source.raw_os_error().unwrap_or(0);
        // The border knows coarse stages; the step itself goes into the words.
        let stage = if error.is_mount() { "mount" } else { SETUP };
        fail(ErrorCode::BootFailed, stage, format!("{}: {error}", error.stage), errno)
    })?;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|error| boot_failed(SETUP, format!("cannot open /dev/null: {error}")))?;
    let listener = listen().map_err(|errno| boot_failed(SETUP, format!("cannot listen on vsock: {errno}")))?;
    steps.done("listener");
    let profile = SecurityProfile::from_wire(&config.security);
    let security = Security::new(profile).map_err(|error| boot_failed(SETUP, error.to_string()))?;
    let guest = Guest {
        config,
        late_main: Default::default(),
        boot_id: welcome.boot_id,
        root: root.directory,
        enter_root: true,
        null: null.into(),
        terminals: Some(root.terminals),
        workload: Some(root.workload),
        security,
        sessions: Sessions::default(),
    };
    Ok(Prepared { guest, listener, disks: root.disks })
}

/// The agent itself needs several descriptors per session.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, setrlimit};
    // With the default limit it serves fewer sessions at once and nothing else.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 1 << 16, 1 << 20);
}

fn listen() -> nix::Result<OwnedFd> {
    let socket = nix::sys::socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT))?;
    nix::sys::socket::listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

fn serve(stream: FrameStream, prepared: Prepared, mut steps: Steps) -> Result<Infallible, BootError> {
    let link = Arc::new(Link::new(stream).map_err(|errno| failed("link", errno))?);
    let autostart = prepared.guest.config.main.as_ref().is_some_and(|main| main.autostart);
    let agent =
        Agent::new(prepared.guest, Arc::clone(&link) as Arc<dyn Host>).map_err(|errno| failed("agent", errno))?;
    let agent = Arc::new(agent);
    link.set_door(agent.main.door());
    agent.renewal.set_link(&link);
    {
        let agent = Arc::clone(&agent);
        link.set_freezer(Box::new(move |frozen| match &agent.guest.workload {
            Some(workload) => workload.freeze(frozen).map_err(|error| error.to_string()),
            None => Ok(()),
        }));
    }
    {
        let agent = Arc::clone(&agent);
        link.set_renewer(Box::new(move |renew| renewal::renew_again(&agent, renew)));
    }
    steps.done("agent");
    link.send(GuestBody::Ready(Ready { ready_uptime_us: uptime_us(), steps: steps.steps }));
    {
        let (agent, link) = (Arc::clone(&agent), Arc::clone(&link));
        thread(move || {
            link.serve();
            agent.end.request(Reason::LinkLost);
        })?;
    }
    {
        let (agent, link, disks) = (Arc::clone(&agent), Arc::clone(&link), prepared.disks);
        thread(move || {
            ending::run(&agent, &link, || flush(&disks));
            let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
        })?;
    }
    if autostart {
        let agent = Arc::clone(&agent);
        // A failed start is told on the link by the workload itself.
        thread(move || drop(agent.run_main(None)))?;
    }
    accept_forever(&agent, &prepared.listener)
}

/// A thread of the agent's own.
///
/// # Errors
/// As pthread_create(3).
pub(super) fn thread(body: impl FnOnce() + Send + 'static) -> Result<(), BootError> {
    std::thread::Builder::new().stack_size(STACK_LEN).spawn(body).map(drop).map_err(|error| failed("threads", error))
}

fn accept_forever(agent: &Arc<Agent>, listener: &OwnedFd) -> Result<Infallible, BootError> {
    loop {
        match rustix::net::accept_with(listener, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => {
                let peer = nix::sys::socket::getpeername::<VsockAddr>(socket.as_raw_fd());
                if peer.is_ok_and(|peer| peer.cid() == HOST_CID) {
                    connection::spawn(agent, socket);
                } else {
                    agent.host.log("a stream from another peer than the host was closed");
                }
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED | rustix::io::Errno::AGAIN) => {}
            Err(errno) => {
                // No descriptors or no memory for a moment: others must end before more can come.
                agent.host.log(&format!("cannot accept a stream: {errno}"));
                std::thread::sleep(CONNECT_PAUSE);
            }
        }
    }
}

/// Brings everything to the disks, gives back what is free on them, and leaves the file systems clean.
fn flush(disks: &[OwnedFd]) -> Result<(), String> {
    rustix::fs::sync();
    for disk in disks {
        // What was freed since it was last discarded; a device that cannot is none the worse for it.
        let _ = sys::trim(disk);
        let outcome = rustix::fs::syncfs(disk).and_then(|()| mount_remount(path_of(disk), MountFlags::RDONLY, c""));
        outcome.map_err(|errno| errno.to_string())?;
    }
    Ok(())
}
