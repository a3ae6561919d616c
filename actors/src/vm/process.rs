//! The launcher of real VMs: one `msb-vmm` process each, which outlives the daemon.
//!
//! ```text
//!  SandboxActor ◄─ events ─ drive (a task) ─ commands ◄─ SandboxActor
//!                             │  control link: socketpair, or <run>/control.sock after adoption
//!                             │  pidfd: the process's end
//!                             ├─ agent::run (a task): control stream of the agent through <run>/vsock.sock
//!                             └─ SampleReader::run (a task): samples over one of their own to <run>/control.sock
//! ```
//!
//! `msb-vmm` begins a session of its own, gets an empty environment, the control link as its standard input and `<logs>/vmm.log`
//! as its output. It never inherits another descriptor: the standard library opens everything close-on-exec.
//!
//! ```text
//!  expect (a start is on its way) ─► a process that makes its VM meanwhile ─► the next launch takes it
//!                                      │ nobody came for it                    (its log is its own affair then)
//!                                      ▼ let go
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::frame::{Decoder, decode_json, encode_json, encode_json_spec};
use msb_protocol::guest::{AGENT_PORT, Shutdown};
use msb_protocol::id::BootId;
use msb_protocol::network::VmNetwork;
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::version::VMM_GENERATION;
use msb_protocol::vmm::{
    BOOT_ERROR_FILE, BootError, CONTROL_SOCKET, END_FILE, EndRecord, Event, Message, NetworkExplanation, Phase, Reply,
    Request, RequestFrame, VMM_LOG_FILE, VSOCK_SOCKET, VmSpec, VmState, VmStatus,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::samples::SampleReader;
use super::scope::{self, Scopes};
use super::{
    AdoptRequest, Adoption, AgentIo, Boxed, EventSink, Gone, Launcher, Spare, VmCommand, VmEvent, VmHandle, agent,
    descriptors, explain,
};
use crate::identity::{self, ProcessIdentity};

/// Time for a VM process to answer on its control link.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time in which an adopted VM process must answer; one that does not is lost for control and is killed.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest record file that is read back, in bytes.
const RECORD_LEN_MAX: u64 = 1 << 20;
/// How long past its own limit a boot may take before the VM process itself is held to be stuck.
const BOOT_SLACK: Duration = Duration::from_secs(20);
/// How long a process that was begun waits for its launch. It gives up by itself later than this.
const EXPECTED_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests that wait for their answers at once.
const PENDING_MAX: usize = 64;

/// Starts `msb-vmm`.
#[derive(Clone, Debug)]
pub struct ProcessLauncher {
    /// The program.
    pub program: PathBuf,
    /// Time between two samples of a VM in milliseconds; 0: none.
    pub sample_interval_ms: u64,
    /// Who reads them.
    pub samples: SampleReader,
    /// Where systemd runs the service: each VM process gets a scope of its own, so that what happens to the service's does not happen to it. One
    /// that stood by before it was known whose it is gets it when somebody takes it.
    pub scopes: Option<Scopes>,
    /// A process that was begun for the next launch.
    pub begun: Begun,
}

/// A process that was begun before it is known whose it is; one at most.
#[derive(Clone, Debug, Default)]
pub struct Begun(Arc<Mutex<Option<Process>>>);

impl Begun {
    fn lock(&self) -> MutexGuard<'_, Option<Process>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process, if there is one and it lives.
    fn take(&self) -> Option<Process> {
        self.lock().take().filter(Process::is_alive)
    }
}

impl Launcher for ProcessLauncher {
    fn launch(
        &self,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Boxed<Result<VmHandle, ApiError>> {
        let this = self.clone();
        Box::pin(async move { this.spawn(spec, listeners, events).await })
    }

    fn expect(&self) {
        if let Err(error) = self.begin() {
            // The launch itself says so if it is worth saying.
            tracing::debug!(%error, "no VM process was begun");
        }
    }

    fn stand_by(&self, spec: Box<VmSpec>) -> Boxed<Result<Box<dyn Spare>, ApiError>> {
        let this = self.clone();
        Box::pin(async move { this.stand_by(spec).await })
    }

    fn adopt(&self, request: AdoptRequest, events: EventSink) -> Boxed<Adoption> {
        let this = self.clone();
        Box::pin(async move { this.find(request, events).await })
    }

    fn explain(&self, network: VmNetwork, target: String) -> Boxed<Result<NetworkExplanation, ApiError>> {
        Box::pin(explain::run(self.program.clone(), network, target))
    }

    fn connect(&self, run_dir: &Path) -> Boxed<io::Result<Box<dyn AgentIo>>> {
        let path = run_dir.join(VSOCK_SOCKET);
        Box::pin(async move {
            let mut stream = UnixStream::connect(path).await?;
            stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).await?;
            // The answer is one short line; byte by byte, so that nothing behind it is taken away.
            let mut line = Vec::with_capacity(32);
            loop {
                let byte = stream.read_u8().await?;
                if byte == b'\n' {
                    break;
                }
                line.push(byte);
                if line.len() > 64 {
                    return Err(io::Error::other("the vsock socket answered with a long line"));
                }
            }
            if !line.starts_with(b"OK ") {
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the guest refused the connection"));
            }
            Ok(Box::new(stream) as Box<dyn AgentIo>)
        })
    }
}

/// A VM process that was started.
#[derive(Debug)]
struct Process {
    child: tokio::process::Child,
    identity: ProcessIdentity,
    pidfd: Option<OwnedFd>,
    control: UnixStream,
    /// It was started in its scope.
    in_scope: bool,
    /// It was started with its log.
    has_log: bool,
}

impl Process {
    fn is_alive(&self) -> bool {
        self.pidfd.as_ref().is_some_and(|pidfd| !identity::has_ended(pidfd))
    }
}

/// A process that stands by; it ends when its control link is closed.
struct ProcessSpare {
    launcher: ProcessLauncher,
    process: Process,
}

impl Spare for ProcessSpare {
    fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    fn launch(
        self: Box<Self>,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Boxed<Result<VmHandle, ApiError>> {
        Box::pin(async move { self.launcher.hand_over(self.process, spec, listeners, events).await })
    }
}

fn failed(what: &str, error: io::Error) -> ApiError {
    let code = if error.kind() == io::ErrorKind::StorageFull { ErrorCode::DiskFull } else { ErrorCode::BootFailed };
    ApiError::new(code, format!("{what}: {error}"))
}

/// The log of a VM process.
fn open_log(log_dir: &Path) -> Result<File, ApiError> {
    let path = log_dir.join(VMM_LOG_FILE);
    let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
    opened.map_err(|error| failed(&path.display().to_string(), error))
}

/// The VM process as the driver holds it.
struct Driver {
    launcher: ProcessLauncher,
    control: UnixStream,
    decoder: Decoder,
    next_id: u64,
    /// Requests whose answers somebody waits for.
    pending: Vec<(u64, Pending)>,
    pidfd: Option<OwnedFd>,
    kills: u32,
    boot_id: BootId,
    run_dir: PathBuf,
    log_dir: PathBuf,
    agent: Option<mpsc::Sender<Shutdown>>,
    main_end: Option<ProcessEnd>,
    ready: bool,
    /// The phases of a readiness that waits for the state to be told first.
    ready_phases: Option<Vec<Phase>>,
}

enum Pending {
    Status,
    Done(oneshot::Sender<Result<(), ApiError>>),
    ConsoleTail(oneshot::Sender<Result<String, ApiError>>),
    Explanation(oneshot::Sender<Result<NetworkExplanation, ApiError>>),
}

impl ProcessLauncher {
    async fn spawn(
        self,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Result<VmHandle, ApiError> {
        // What the host has mounted since it was begun it may not see.
        if spec.shares.is_empty()
            && spec.disks.is_empty()
            && let Some(process) = self.begun.take()
        {
            return self.hand_over(process, spec, listeners, events).await;
        }
        let command = match &self.scopes {
            Some(Scopes::Manager(manager)) => {
                let mut command = tokio::process::Command::from(manager.command(&scope::unit(spec.boot_id)));
                command.args(["/usr/bin/env", "-i"]).arg(&self.program);
                command
            }
            Some(Scopes::Door(_)) | None => self.command(),
        };
        let mut process = self.start(command, Some(&spec.log_dir), &[])?;
        process.in_scope = matches!(self.scopes, Some(Scopes::Manager(_)));
        self.hand_over(process, spec, listeners, events).await
    }

    /// The program, started by nobody but this service.
    fn command(&self) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(&self.program);
        command.env_clear();
        command
    }

    /// Starts the program, with a control link as its standard input, in which `wire` waits, and its log in `log_dir`, or the service's until it has
    /// one, as its output.
    fn start(
        &self,
        mut command: tokio::process::Command,
        log_dir: Option<&Path>,
        wire: &[u8],
    ) -> Result<Process, ApiError> {
        if let Some(log_dir) = log_dir {
            let log = open_log(log_dir)?;
            command.stdout(log.try_clone().map_err(|error| failed("the log of a VM process", error))?).stderr(log);
        }
        let (mut ours, theirs) =
            StdUnixStream::pair().map_err(|error| failed("a control link could not be made", error))?;
        // A few bytes into an empty socket.
        ours.write_all(wire).map_err(|error| failed("the control link", error))?;
        let child = command
            .stdin(OwnedFd::from(theirs))
            .current_dir("/")
            // A daemon that ends leaves its VMs alone.
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| failed(&format!("{} could not be started", self.program.display()), error))?;
        let identity = child.id().ok_or_else(|| io::Error::other("it ended at once")).and_then(ProcessIdentity::of);
        let identity = identity.map_err(|error| failed("the VM process", error))?;
        let pidfd = identity.open();
        ours.set_nonblocking(true).map_err(|error| failed("the control link", error))?;
        let control = UnixStream::from_std(ours).map_err(|error| failed("the control link", error))?;
        Ok(Process { child, identity, pidfd, control, in_scope: false, has_log: log_dir.is_some() })
    }

    /// Starts a process for the next launch, unless one waits for it.
    fn begin(&self) -> Result<(), ApiError> {
        // systemd-run starts a process in its scope, which is named for the run.
        if matches!(self.scopes, Some(Scopes::Manager(_))) {
            return Ok(());
        }
        let mut place = self.begun.lock();
        if place.as_ref().is_some_and(Process::is_alive) {
            return Ok(());
        }
        let mut wire = Vec::new();
        encode_json(&RequestFrame { id: 1, request: Request::MakeVm }, &mut wire).map_err(ApiError::internal)?;
        let process = self.start(self.command(), None, &wire)?;
        let (begun, pid) = (self.begun.clone(), process.identity.pid);
        *place = Some(process);
        drop(place);
        tokio::spawn(async move {
            tokio::time::sleep(EXPECTED_TIMEOUT).await;
            drop(begun.lock().take_if(|process| process.identity.pid == pid));
        });
        Ok(())
    }

    /// Starts a process that stands by with a saved machine.
    async fn stand_by(self, spec: Box<VmSpec>) -> Result<Box<dyn Spare>, ApiError> {
        let mut process = self.start(self.command(), Some(&spec.log_dir), &[])?;
        let mut wire = Vec::new();
        let limit = Duration::from_millis(spec.boot_timeout_ms) + BOOT_SLACK;
        let frame = RequestFrame { id: 1, request: Request::StandBy(spec) };
        encode_json_spec(&frame, &mut wire).map_err(ApiError::internal)?;
        let answered = tokio::time::timeout(limit, async {
            process.control.write_all(&wire).await?;
            let (mut decoder, mut buffer) = (Decoder::new(), vec![0; 4 << 10]);
            loop {
                if let Some(body) = decoder.next_body().map_err(io::Error::other)? {
                    return decode_json::<Message>(body).map_err(io::Error::other);
                }
                match process.control.read(&mut buffer).await? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    read => decoder.push(&buffer[..read]),
                }
            }
        });
        match answered.await {
            Ok(Ok(Message::Reply { result: Ok(_), .. })) => Ok(Box::new(ProcessSpare { launcher: self, process })),
            Ok(Ok(Message::Reply { result: Err(error), .. })) => Err(error),
            Ok(Ok(Message::Event { .. })) => Err(ApiError::internal("a VM process that stands by told an event")),
            Ok(Err(error)) => Err(failed("a VM process that stands by", error)),
            Err(_) => Err(failed("a VM process that stands by", io::ErrorKind::TimedOut.into())),
        }
    }

    /// Tells a process what it runs.
    async fn hand_over(
        self,
        process: Process,
        spec: Box<VmSpec>,
        mut listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Result<VmHandle, ApiError> {
        let Process { mut child, identity, pidfd, control, in_scope, has_log } = process;
        // Before it is told what to do: all that it makes and uses afterwards is in its scope.
        let moved = match self.scopes.clone() {
            Some(Scopes::Door(socket)) => scope::ask(&socket, identity.pid, spec.boot_id).await,
            Some(Scopes::Manager(manager)) if !in_scope => {
                let (unit, pid) = (scope::unit(spec.boot_id), identity.pid);
                let moving = tokio::task::spawn_blocking(move || manager.move_process(&unit, pid));
                moving.await.unwrap_or_else(|error| Err(io::Error::other(error)))
            }
            Some(Scopes::Manager(_)) | None => Ok(()),
        };
        if let Err(error) = moved {
            tracing::warn!(boot_id = %spec.boot_id, %error, "a VM process has no scope of its own and shares the service's");
        }
        if !has_log {
            // Behind the listeners, as it is looked for.
            listeners.push(Arc::new(open_log(&spec.log_dir)?.into()));
        }
        let boot_limit = Duration::from_millis(spec.boot_timeout_ms) + BOOT_SLACK;
        let mut driver = Driver {
            launcher: self,
            control,
            decoder: Decoder::new(),
            // A process that stood by has answered number 1.
            next_id: 2,
            pending: Vec::new(),
            pidfd,
            kills: 0,
            boot_id: spec.boot_id,
            run_dir: spec.run_dir.clone(),
            log_dir: spec.log_dir.clone(),
            agent: None,
            main_end: None,
            ready: false,
            ready_phases: None,
        };
        let (commands, queue) = mpsc::channel(16);
        if let Err(error) = driver.launch(spec, &listeners).await {
            // The process is there but takes nothing: its end says why better than the broken link does.
            tracing::warn!(%error, "the VM process did not take its launch");
        }
        let handle = VmHandle { identity, commands };
        tokio::spawn(async move {
            let end = async move { child.wait().await.ok() };
            driver.drive(queue, events, end, Some(boot_limit)).await;
        });
        Ok(handle)
    }

    async fn find(self, request: AdoptRequest, events: EventSink) -> Adoption {
        let gone = |request: &AdoptRequest| {
            Adoption::Gone(read_end(
                &request.run_dir,
                &request.log_dir,
                request.boot_id,
                None,
                None,
                request.identity.as_ref(),
            ))
        };
        let adopting = self.clone().greet(&request);
        let (control, decoder, status, listeners) = match tokio::time::timeout(ADOPT_TIMEOUT, adopting).await {
            Ok(Ok(found)) => found,
            outcome => {
                let why = outcome.map_or_else(
                    |_| "it does not answer".to_owned(),
                    |found| found.err().map(|error| error.to_string()).unwrap_or_default(),
                );
                // A process that cannot be talked to cannot be stopped with a flush either; it must not stay behind.
                if let Some(pidfd) = request.identity.as_ref().and_then(ProcessIdentity::open) {
                    tracing::warn!(boot_id = %request.boot_id, why, "a VM process cannot be adopted and is killed");
                    identity::kill(&pidfd);
                    let _ = tokio::time::timeout(ADOPT_TIMEOUT, identity::ended(pidfd)).await;
                }
                return gone(&request);
            }
        };
        let identity = request
            .identity
            .clone()
            .filter(|known| known.pid == status.pid)
            .or_else(|| ProcessIdentity::of(status.pid).ok());
        let Some((identity, pidfd)) = identity.and_then(|identity| identity.open().map(|pidfd| (identity, pidfd)))
        else {
            return gone(&request);
        };
        if status.boot_id != request.boot_id {
            // A run that the journal knows nothing of: nothing may come of it.
            identity::kill(&pidfd);
            let _ = tokio::time::timeout(ADOPT_TIMEOUT, identity::ended(pidfd)).await;
            return gone(&request);
        }
        let Ok(watched) = pidfd.try_clone() else { return gone(&request) };
        let driver = Driver {
            launcher: self,
            control,
            decoder,
            next_id: 2,
            pending: Vec::new(),
            pidfd: Some(pidfd),
            kills: 0,
            boot_id: request.boot_id,
            run_dir: request.run_dir.clone(),
            log_dir: request.log_dir.clone(),
            agent: None,
            main_end: status.main_end,
            ready: status.state != VmState::Booting && status.state != VmState::SettingUp,
            ready_phases: None,
        };
        let (commands, queue) = mpsc::channel(16);
        let handle = VmHandle { identity, commands };
        tokio::spawn(async move {
            let end = async move {
                identity::ended(watched).await;
                None
            };
            driver.drive(queue, events, end, None).await;
        });
        Adoption::Alive(handle, status, listeners)
    }

    async fn greet(self, request: &AdoptRequest) -> io::Result<Greeted> {
        let mut control = UnixStream::connect(request.run_dir.join(CONTROL_SOCKET)).await?;
        let mut wire = Vec::new();
        let frame = RequestFrame { id: 1, request: Request::Adopt { generation: VMM_GENERATION } };
        encode_json(&frame, &mut wire).map_err(io::Error::other)?;
        control.write_all(&wire).await?;
        let (mut decoder, mut buffer, mut listeners) = (Decoder::new(), vec![0; 16 << 10], Vec::new());
        loop {
            while let Some(body) = decoder.next_body().map_err(io::Error::other)? {
                match decode_json::<Message>(body).map_err(io::Error::other)? {
                    Message::Reply { id: 1, result: Ok(Reply::Status(status)) } => {
                        return Ok((control, decoder, status, listeners));
                    }
                    Message::Reply { result: Err(error), .. } => return Err(io::Error::other(error.message)),
                    // Its state comes with the status; what happens later comes later.
                    Message::Reply { .. } | Message::Event { .. } => {}
                }
            }
            let read = descriptors::receive(&control, &mut buffer, &mut listeners).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            decoder.push(&buffer[..read]);
        }
    }
}

/// A VM process that answered: its link, what was read of it already, its state, the listeners of its published ports.
type Greeted = (UnixStream, Decoder, Box<VmStatus>, Vec<OwnedFd>);

impl Driver {
    /// Sends the spec, and the listeners of the published ports with its first byte.
    async fn launch(&mut self, spec: Box<VmSpec>, listeners: &[Arc<OwnedFd>]) -> io::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        let mut wire = Vec::new();
        // A launch carries the sandbox's whole environment, which does not fit an ordinary frame.
        encode_json_spec(&RequestFrame { id, request: Request::Launch { spec } }, &mut wire)
            .map_err(io::Error::other)?;
        let sending = descriptors::send(&mut self.control, &wire, listeners);
        match tokio::time::timeout(ANSWER_TIMEOUT, sending).await {
            Ok(sent) => sent?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        self.pending.push((id, Pending::Status));
        Ok(())
    }

    /// Asks for the machine to be written down; the files go with the request's first byte.
    async fn save(
        &mut self,
        (memory, state): (OwnedFd, OwnedFd),
        flush: bool,
        reply: oneshot::Sender<Result<(), ApiError>>,
    ) -> io::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        let mut wire = Vec::new();
        encode_json(&RequestFrame { id, request: Request::Save { flush } }, &mut wire).map_err(io::Error::other)?;
        let files = [Arc::new(memory), Arc::new(state)];
        let sending = descriptors::send(&mut self.control, &wire, &files);
        match tokio::time::timeout(ANSWER_TIMEOUT, sending).await {
            Ok(sent) => sent?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        if self.pending.len() < PENDING_MAX {
            self.pending.push((id, Pending::Done(reply)));
        }
        Ok(())
    }

    async fn request(&mut self, request: Request, pending: Option<Pending>) -> io::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        let mut wire = Vec::new();
        encode_json(&RequestFrame { id, request }, &mut wire).map_err(io::Error::other)?;
        match tokio::time::timeout(ANSWER_TIMEOUT, self.control.write_all(&wire)).await {
            Ok(written) => written?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
        if let Some(pending) = pending
            && self.pending.len() < PENDING_MAX
        {
            self.pending.push((id, pending));
        }
        Ok(())
    }

    /// Carries commands down and events up until the process is gone or nobody listens any more.
    async fn drive(
        mut self,
        mut commands: mpsc::Receiver<VmCommand>,
        events: EventSink,
        end: impl Future<Output = Option<ExitStatus>> + Send,
        boot_limit: Option<Duration>,
    ) {
        tokio::pin!(end);
        let mut buffer = vec![0; 4 << 10];
        let mut remains = Vec::new();
        let mut link_open = true;
        let mut commands_open = true;
        let boot_limit = tokio::time::sleep(boot_limit.unwrap_or(Duration::from_secs(u64::from(u32::MAX))));
        tokio::pin!(boot_limit);
        if self.ready {
            self.reach_agent(&events);
        }
        let mut ended: Option<Box<EndRecord>> = None;
        let status = loop {
            tokio::select! {
                // What the VM process said before it ended is heard before its end.
                biased;
                read = descriptors::receive(&self.control, &mut buffer, &mut remains), if link_open => {
                    // One comes with the end.
                    close_apart(remains.split_off(remains.len().min(1)));
                    match read {
                        Ok(0) | Err(_) => link_open = false,
                        Ok(len) => {
                            self.decoder.push(&buffer[..len]);
                            loop {
                                let message = match self.decoder.next_body() {
                                    Ok(Some(body)) => decode_json::<Message>(body),
                                    Ok(None) => break,
                                    Err(error) => Err(error),
                                };
                                match message {
                                    Ok(message) => if !self.take(message, &events, &mut ended).await { return },
                                    Err(error) => {
                                        tracing::warn!(boot_id = %self.boot_id, %error, "the VM process broke the protocol of its control link");
                                        link_open = false;
                                        break;
                                    }
                                }
                            }
                        }
                    }
                }
                status = &mut end => break status,
                command = commands.recv(), if commands_open => match command {
                    Some(command) => self.obey(command).await,
                    None => commands_open = false,
                },
                () = &mut boot_limit, if !self.ready => {
                    tracing::warn!(boot_id = %self.boot_id, "a VM process is stuck in its boot and is killed");
                    self.ready = true;
                    if let Some(pidfd) = &self.pidfd {
                        identity::kill(pidfd);
                    }
                }
                () = events.closed() => return,
            }
        };
        close_apart(remains);
        let identity = None;
        let mut gone = match ended {
            Some(record) => from_record(*record, &self.log_dir),
            None => read_end(&self.run_dir, &self.log_dir, self.boot_id, status, self.main_end, identity),
        };
        gone.main_end = gone.main_end.or(self.main_end);
        // A receiver that is gone has let go of this VM.
        let _ = events.send(VmEvent::Gone(Box::new(gone))).await;
    }

    /// Takes one message; false when nobody listens any more.
    async fn take(&mut self, message: Message, events: &EventSink, ended: &mut Option<Box<EndRecord>>) -> bool {
        let event = match message {
            Message::Reply { id, result } => {
                let Some(place) = self.pending.iter().position(|(known, _)| *known == id) else { return true };
                match (self.pending.swap_remove(place).1, result) {
                    (Pending::Status, Ok(Reply::Status(status))) => {
                        if events.send(VmEvent::Status(status)).await.is_err() {
                            return false;
                        }
                        match self.ready_phases.take() {
                            Some(phases) => VmEvent::AgentReady { phases },
                            None => return true,
                        }
                    }
                    (Pending::Status, Err(error)) => {
                        tracing::warn!(boot_id = %self.boot_id, error = %error.message, "the VM process refused to tell its state");
                        match self.ready_phases.take() {
                            Some(phases) => VmEvent::AgentReady { phases },
                            None => return true,
                        }
                    }
                    (Pending::Done(reply), result) => {
                        let _ = reply.send(result.map(drop));
                        return true;
                    }
                    (Pending::ConsoleTail(reply), result) => {
                        let _ = reply.send(result.and_then(|reply| match reply {
                            Reply::ConsoleTail { text } => Ok(text),
                            _ => Err(ApiError::internal("the VM process answered with something else")),
                        }));
                        return true;
                    }
                    (Pending::Explanation(reply), result) => {
                        let _ = reply.send(result.and_then(|reply| match reply {
                            Reply::Explanation(explanation) => Ok(*explanation),
                            _ => Err(ApiError::internal("the VM process answered with something else")),
                        }));
                        return true;
                    }
                    (Pending::Status, Ok(_)) => return true,
                }
            }
            Message::Event { event } => match event {
                Event::AgentReady { boot_id, phases } if boot_id == self.boot_id => {
                    self.ready = true;
                    self.reach_agent(events);
                    // Only now does it know what confines it: its state goes up first, then that it is ready.
                    self.ready_phases = Some(phases);
                    if self.request(Request::Status, Some(Pending::Status)).await.is_ok() {
                        return true;
                    }
                    VmEvent::AgentReady { phases: self.ready_phases.take().unwrap_or_default() }
                }
                Event::MainStarted { boot_id, .. } if boot_id == self.boot_id => VmEvent::MainStarted,
                Event::MainExited { boot_id, end } if boot_id == self.boot_id => {
                    self.main_end = Some(end);
                    VmEvent::MainExited(end)
                }
                Event::HostDiskFull { boot_id, full } if boot_id == self.boot_id => VmEvent::HostDiskFull(full),
                Event::Ended { record } if record.boot_id == self.boot_id => {
                    // The process is about to exit; its end is told when it has.
                    *ended = Some(record);
                    return true;
                }
                // Of another run, or nothing to act on.
                _ => return true,
            },
        };
        events.send(event).await.is_ok()
    }

    fn reach_agent(&mut self, events: &EventSink) {
        if let Some(meter) = events.meter() {
            let interval_ms = self.launcher.sample_interval_ms;
            tokio::spawn(self.launcher.samples.clone().run(self.run_dir.clone(), interval_ms, Arc::clone(meter)));
        }
        let (shutdowns, queue) = mpsc::channel(2);
        self.agent = Some(shutdowns);
        let launcher: Arc<dyn Launcher> = Arc::new(self.launcher.clone());
        tokio::spawn(agent::run(launcher, self.run_dir.clone(), self.boot_id, events.clone(), queue));
    }

    async fn obey(&mut self, command: VmCommand) {
        let sent = match command {
            VmCommand::Shutdown { cause, grace_ms } => {
                let sent = self.request(Request::ExpectEnd { cause }, None).await;
                if let Some(agent) = &self.agent {
                    // The queue holds what the link has not taken yet; one shutdown in it is enough.
                    let _ = agent.try_send(Shutdown { grace_ms, ..Shutdown::default() });
                }
                sent
            }
            VmCommand::Kill { cause } => {
                self.kills += 1;
                let asked = if self.kills == 1 { self.request(Request::Kill { cause }, None).await } else { Ok(()) };
                if (self.kills > 1 || asked.is_err())
                    && let Some(pidfd) = &self.pidfd
                {
                    identity::kill(pidfd);
                }
                Ok(())
            }
            VmCommand::Pause(reply) => self.request(Request::Pause, Some(Pending::Done(reply))).await,
            VmCommand::Resume(reply) => self.request(Request::Resume, Some(Pending::Done(reply))).await,
            VmCommand::Save { memory, state, flush, reply } => self.save((memory, state), flush, reply).await,
            VmCommand::Release => self.request(Request::Release, None).await,
            VmCommand::ExplainNetwork(target, reply) => {
                self.request(Request::ExplainNetwork { target }, Some(Pending::Explanation(reply))).await
            }
            VmCommand::ConsoleTail(reply) => {
                self.request(Request::ConsoleTail { bytes_max: 64 << 10 }, Some(Pending::ConsoleTail(reply))).await
            }
        };
        if let Err(error) = sent {
            tracing::debug!(boot_id = %self.boot_id, %error, "the VM process's control link is broken");
        }
    }
}

/// Closes what a VM process leaves to its daemon: KVM's machine, whose closing waits for tens of milliseconds. On a thread that may wait.
fn close_apart(remains: Vec<OwnedFd>) {
    if !remains.is_empty() {
        tokio::task::spawn_blocking(move || drop(remains));
    }
}

/// What the run left behind, or what its absence says.
fn read_end(
    run_dir: &Path,
    log_dir: &Path,
    boot_id: BootId,
    status: Option<ExitStatus>,
    main_end: Option<ProcessEnd>,
    identity: Option<&ProcessIdentity>,
) -> Gone {
    if let Some(record) = read_record::<EndRecord>(&run_dir.join(END_FILE)).filter(|record| record.boot_id == boot_id) {
        return from_record(record, log_dir);
    }
    let rebooted = identity.is_some_and(|identity| identity.host_boot_id != identity::host_boot_id());
    let (cause, message) = match status {
        _ if rebooted => (EndCause::HostShutdown, "the host was restarted meanwhile".to_owned()),
        Some(status) => (EndCause::VmmCrash, format!("the VM process ended without a record: {status}")),
        None => (EndCause::VmmCrash, "the VM process is gone and left no record".to_owned()),
    };
    Gone { cause, main_end, message, boot_error: read_boot_error(log_dir, boot_id), sample: None }
}

fn from_record(record: EndRecord, log_dir: &Path) -> Gone {
    let boot_error = record.boot_error.or_else(|| read_boot_error(log_dir, record.boot_id));
    let EndRecord { cause, main_end, message, sample, .. } = record;
    Gone { cause, main_end, message, boot_error, sample }
}

fn read_boot_error(log_dir: &Path, boot_id: BootId) -> Option<BootError> {
    read_record::<BootError>(&log_dir.join(BOOT_ERROR_FILE)).filter(|error| error.boot_id == boot_id)
}

fn read_record<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    use std::io::Read;
    let file = std::fs::File::open(path).ok()?;
    let mut text = Vec::new();
    file.take(RECORD_LEN_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
