//! The launcher of real VMs: one `msb-vmm` process each, which outlives the daemon.
//!
//! ```text
//!  SandboxActor ◄─ events ─ Driver (a task) ─ commands ◄─ SandboxActor
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
//!  expect (a start is on its way) ─► a process that makes its VM meanwhile ─► the next launch takes it,
//!                                      │ nobody came for it                    and brings its log
//!                                      ▼ let go
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::frame::{Decoder, decode_json, encode_json, encode_json_spec};
use msb_protocol::guest::AGENT_PORT;
use msb_protocol::network::VmNetwork;
use msb_protocol::version::VMM_GENERATION;
use msb_protocol::vmm::{
    CONTROL_SOCKET, Message, NetworkExplanation, Reply, Request, RequestFrame, VMM_LOG_FILE, VSOCK_SOCKET, VmSpec,
    VmStatus,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::driver::Driver;
use super::end_record::read_end;
use super::samples::SampleReader;
use super::scope::{self, Scopes};
use super::{AdoptRequest, Adoption, AgentIo, Boxed, EventSink, Launcher, Spare, VmHandle, descriptors, explain};
use crate::identity::{self, ProcessIdentity};

/// Time in which an adopted VM process must answer; one that does not is lost for control and is killed.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long past its own limit a boot may take before the VM process itself is held to be stuck.
const BOOT_SLACK: Duration = Duration::from_secs(20);
/// How long a process that was begun waits for its launch. It gives up by itself later than this.
const EXPECTED_TIMEOUT: Duration = Duration::from_secs(5);

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
        // A process that stood by has answered its first request.
        let run = (spec.boot_id, &*spec.run_dir, &*spec.log_dir);
        let mut driver = Driver::new(self, (control, Decoder::new()), run, pidfd);
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
        let run = (request.boot_id, &*request.run_dir, &*request.log_dir);
        let mut driver = Driver::new(self, (control, decoder), run, Some(pidfd));
        driver.adopt(&status);
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
