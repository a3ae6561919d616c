//! A virtual machine as an actor sees it: commands go in, events come out, and whatever really runs it is behind [`Launcher`].
//!
//! [`process::ProcessLauncher`] spawns `msb-vmm`; the simulator's launcher is in `crate::simulation`. Events of a VM arrive on the
//! channel that was given at launch or adoption; when its receiver is gone, the driver lets go of the VM without ending it, so
//! that the next actor (or daemon) can adopt it.

pub mod agent;
pub mod descriptors;
mod driver;
mod end_record;
mod explain;
pub mod files;
pub mod process;
pub mod samples;
pub mod scope;
pub mod session;
pub mod unhurried;

use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use msb_protocol::error::ApiError;
use msb_protocol::guest::Beat;
use msb_protocol::id::BootId;
use msb_protocol::network::VmNetwork;
use msb_protocol::state::{EndCause, ProcessEnd};
use msb_protocol::vmm::{BootError, NetworkExplanation, Phase, Sample, VmSpec, VmStatus};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::mpsc::error::SendError;
#[cfg(any(test, feature = "simulation"))]
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::identity::ProcessIdentity;
use crate::metrics::meter::Meter;

/// Events of one VM that wait for its actor before the driver has to.
const EVENTS_LEN: usize = 32;

/// A boxed future.
pub type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Where what one run says goes: its events to its actor, its samples past it.
#[derive(Clone, Debug)]
pub struct EventSink {
    events: mpsc::Sender<VmEvent>,
    meter: Option<Arc<Meter>>,
}

impl EventSink {
    /// A sink, and what its events come out of.
    #[must_use]
    pub fn new(meter: Arc<Meter>) -> (Self, mpsc::Receiver<VmEvent>) {
        let (events, queue) = mpsc::channel(EVENTS_LEN);
        (Self { events, meter: Some(meter) }, queue)
    }

    /// A sink that nobody listens to: for a VM that is looked for only to be ended.
    #[must_use]
    pub fn unheard() -> Self {
        Self { events: mpsc::channel(1).0, meter: None }
    }

    /// Sends an event; waits while there is no room.
    ///
    /// # Errors
    /// Nobody listens any more.
    pub async fn send(&self, event: VmEvent) -> Result<(), SendError<VmEvent>> {
        self.events.send(event).await
    }

    /// Sends an event for which there must be room.
    ///
    /// # Errors
    /// There is none, or nobody listens any more.
    #[cfg(any(test, feature = "simulation"))]
    pub fn try_send(&self, event: VmEvent) -> Result<(), TrySendError<VmEvent>> {
        self.events.try_send(event)
    }

    /// Waits until nobody listens any more.
    pub async fn closed(&self) {
        self.events.closed().await;
    }

    /// The meter for its samples, if they count.
    #[must_use]
    pub fn meter(&self) -> Option<&Arc<Meter>> {
        self.meter.as_ref()
    }
}

/// A byte stream to the agent.
pub trait AgentIo: AsyncRead + AsyncWrite + Send + Unpin {
    /// The same stream for what comes at this interval and nobody waits for ([`unhurried`]).
    ///
    /// # Errors
    /// What the reactor says; the stream is lost then.
    fn unhurried(self: Box<Self>, interval: Duration) -> std::io::Result<Box<dyn AgentIo>>;
    /// The socket it is, if it is one that can be handed to another process.
    fn socket(&self) -> Option<BorrowedFd<'_>>;
}

impl AgentIo for UnixStream {
    fn unhurried(self: Box<Self>, interval: Duration) -> std::io::Result<Box<dyn AgentIo>> {
        Ok(Box::new(unhurried::Unhurried::new(*self, interval)?))
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl AgentIo for unhurried::Unhurried {
    fn unhurried(self: Box<Self>, _: Duration) -> std::io::Result<Box<dyn AgentIo>> {
        Ok(self)
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(any(test, feature = "simulation"))]
impl AgentIo for tokio::io::DuplexStream {
    fn unhurried(self: Box<Self>, _: Duration) -> std::io::Result<Box<dyn AgentIo>> {
        Ok(self)
    }

    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What the actor tells a VM.
#[derive(Debug)]
pub enum VmCommand {
    /// End the workload, flush, turn off.
    Shutdown {
        /// What to record.
        cause: EndCause,
        /// Time between stop signal and kill in milliseconds.
        grace_ms: u64,
    },
    /// End at once. A second one does not ask any more.
    Kill {
        /// What to record.
        cause: EndCause,
    },
    /// Halt the vCPUs.
    Pause(oneshot::Sender<Result<(), ApiError>>),
    /// Let them go on.
    Resume(oneshot::Sender<Result<(), ApiError>>),
    /// Write the machine down into two empty files, its memory into the first; it stands until `Release`.
    Save {
        /// For its memory.
        memory: OwnedFd,
        /// For everything else.
        state: OwnedFd,
        /// Whether the guest flushes its disks first.
        flush: bool,
        /// Whether it stands.
        reply: oneshot::Sender<Result<(), ApiError>>,
    },
    /// Let the machine that was written down go on.
    Release,
    /// Which network rule would decide about a target.
    ExplainNetwork(String, oneshot::Sender<Result<NetworkExplanation, ApiError>>),
    /// The end of the console's output.
    ConsoleTail(oneshot::Sender<Result<String, ApiError>>),
}

/// What the actor learns of a VM.
#[derive(Debug)]
pub enum VmEvent {
    /// What the VM process says of itself: after launch, and after adoption.
    Status(Box<VmStatus>),
    /// Streams to the agent can be opened.
    AgentReady {
        /// Every phase of the boot.
        phases: Vec<Phase>,
    },
    /// The main workload runs.
    MainStarted,
    /// The main workload ended.
    MainExited(ProcessEnd),
    /// A beat.
    Beat(Beat),
    /// The host's disk is full, or has room again.
    HostDiskFull(bool),
    /// The VM process is gone; nothing follows.
    Gone(Box<Gone>),
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Gone {
    /// Why.
    pub cause: EndCause,
    /// How the main workload ended, if it did.
    pub main_end: Option<ProcessEnd>,
    /// For people.
    pub message: String,
    /// The evidence, if the boot failed.
    pub boot_error: Option<BootError>,
    /// The counters at the end, if the VM process left them.
    pub sample: Option<Box<Sample>>,
}

/// A running VM: dropping this does not end it.
#[derive(Clone, Debug)]
pub struct VmHandle {
    /// Its process.
    pub identity: ProcessIdentity,
    /// What it is told.
    pub commands: mpsc::Sender<VmCommand>,
}

/// A VM to look for.
#[derive(Clone, Debug)]
pub struct AdoptRequest {
    /// The run that is looked for.
    pub boot_id: BootId,
    /// The process that was recorded, if the daemon lived long enough to.
    pub identity: Option<ProcessIdentity>,
    /// Directory of sockets and of the end record.
    pub run_dir: PathBuf,
    /// Directory of logs, with the evidence of a failed boot.
    pub log_dir: PathBuf,
}

/// What was found.
#[derive(Debug)]
pub enum Adoption {
    /// It lives, and its events come. The descriptors are the listeners of its published ports.
    Alive(VmHandle, Box<VmStatus>, Vec<OwnedFd>),
    /// It does not.
    Gone(Gone),
}

/// A VM that stands by, with nothing of its workload running. It ends when this is dropped.
pub trait Spare: Send {
    /// Whether it can still be launched.
    fn is_alive(&self) -> bool;
    /// As [`Launcher::launch`], of a spec that takes it over ([`VmSpec::takes_over`]) and whose folders are what its own were.
    fn launch(
        self: Box<Self>,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Boxed<Result<VmHandle, ApiError>>;
}

/// Whatever runs virtual machines.
pub trait Launcher: Send + Sync + 'static {
    /// Starts one, with the listeners of its published ports. Returns when its process exists and has taken the spec.
    fn launch(
        &self,
        spec: Box<VmSpec>,
        listeners: Vec<Arc<OwnedFd>>,
        events: EventSink,
    ) -> Boxed<Result<VmHandle, ApiError>>;
    /// A launch is on its way: what every machine needs may be begun. Never fails, and costs nothing for long where no launch comes.
    fn expect(&self);
    /// Starts one of a saved machine before it is known whose it will be.
    fn stand_by(&self, spec: Box<VmSpec>) -> Boxed<Result<Box<dyn Spare>, ApiError>>;
    /// Looks for one.
    fn adopt(&self, request: AdoptRequest, events: EventSink) -> Boxed<Adoption>;
    /// Which rule of a network that does not run would decide about a target.
    fn explain(&self, network: VmNetwork, target: String) -> Boxed<Result<NetworkExplanation, ApiError>>;
    /// Opens a stream to the agent of the VM in this run directory.
    fn connect(&self, run_dir: &Path) -> Boxed<std::io::Result<Box<dyn AgentIo>>>;
}
