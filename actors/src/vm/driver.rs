//! What holds a VM process once it has its run: commands go down its control link, events come up, until it is gone or nobody listens.
//!
//! ```text
//!  VmCommand ─► obey ─► request ─► control link ─► msb-vmm
//!  VmEvent   ◄─ take ◄─ reply or event ◄──┘          │ gone: its end record, or what its absence says
//! ```
//!
//! Made by [`super::process`], for a process that was launched or adopted. It never ends a VM because its listener has gone.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use msb_protocol::error::ApiError;
use msb_protocol::frame::{Decoder, decode_json, encode_json, encode_json_spec};
use msb_protocol::guest::Shutdown;
use msb_protocol::id::BootId;
use msb_protocol::state::ProcessEnd;
use msb_protocol::vmm::{
    EndRecord, Event, Message, NetworkExplanation, Phase, Reply, Request, RequestFrame, VmSpec, VmState, VmStatus,
};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::end_record::{from_record, read_end};
use super::process::ProcessLauncher;
use super::{EventSink, Launcher, VmCommand, VmEvent, agent, descriptors};
use crate::identity;

/// Time for a VM process to answer on its control link.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests that wait for their answers at once.
const PENDING_MAX: usize = 64;

/// The VM process as the driver holds it.
pub(super) struct Driver {
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

impl Driver {
    /// Of the run behind `control`, from which `decoder` has what was read already; its first request has been answered.
    pub(super) fn new(
        launcher: ProcessLauncher,
        (control, decoder): (UnixStream, Decoder),
        (boot_id, run_dir, log_dir): (BootId, &Path, &Path),
        pidfd: Option<OwnedFd>,
    ) -> Self {
        Self {
            launcher,
            control,
            decoder,
            next_id: 2,
            pending: Vec::new(),
            pidfd,
            kills: 0,
            boot_id,
            run_dir: run_dir.to_owned(),
            log_dir: log_dir.to_owned(),
            agent: None,
            main_end: None,
            ready: false,
            ready_phases: None,
        }
    }

    /// Goes on where a daemon before this one was.
    pub(super) fn adopt(&mut self, status: &VmStatus) {
        self.main_end = status.main_end;
        self.ready = status.state != VmState::Booting && status.state != VmState::SettingUp;
    }

    /// Sends the spec, and the listeners of the published ports with its first byte.
    pub(super) async fn launch(&mut self, spec: Box<VmSpec>, listeners: &[Arc<OwnedFd>]) -> io::Result<()> {
        let id = self.next_id;
        let mut wire = Vec::new();
        // A launch carries the sandbox's whole environment, which does not fit an ordinary frame.
        encode_json_spec(&RequestFrame { id, request: Request::Launch { spec } }, &mut wire)
            .map_err(io::Error::other)?;
        self.send(&wire, listeners, Some(Pending::Status)).await
    }

    /// Sends a request, and descriptors with its first byte.
    async fn request(&mut self, request: Request, with: &[Arc<OwnedFd>], pending: Option<Pending>) -> io::Result<()> {
        let id = self.next_id;
        let mut wire = Vec::new();
        encode_json(&RequestFrame { id, request }, &mut wire).map_err(io::Error::other)?;
        self.send(&wire, with, pending).await
    }

    /// Sends the frame of request number `next_id`, whose answer is `pending`.
    async fn send(&mut self, wire: &[u8], with: &[Arc<OwnedFd>], pending: Option<Pending>) -> io::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        let sending = descriptors::send(&mut self.control, wire, with);
        tokio::time::timeout(ANSWER_TIMEOUT, sending).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        if let Some(pending) = pending
            && self.pending.len() < PENDING_MAX
        {
            self.pending.push((id, pending));
        }
        Ok(())
    }

    /// Carries commands down and events up until the process is gone or nobody listens any more.
    pub(super) async fn drive(
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
                    if self.request(Request::Status, &[], Some(Pending::Status)).await.is_ok() {
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
                let sent = self.request(Request::ExpectEnd { cause }, &[], None).await;
                if let Some(agent) = &self.agent {
                    // The queue holds what the link has not taken yet; one shutdown in it is enough.
                    let _ = agent.try_send(Shutdown { grace_ms, ..Shutdown::default() });
                }
                sent
            }
            VmCommand::Kill { cause } => {
                self.kills += 1;
                let asked =
                    if self.kills == 1 { self.request(Request::Kill { cause }, &[], None).await } else { Ok(()) };
                if (self.kills > 1 || asked.is_err())
                    && let Some(pidfd) = &self.pidfd
                {
                    identity::kill(pidfd);
                }
                Ok(())
            }
            VmCommand::Pause(reply) => self.request(Request::Pause, &[], Some(Pending::Done(reply))).await,
            VmCommand::Resume(reply) => self.request(Request::Resume, &[], Some(Pending::Done(reply))).await,
            VmCommand::Save { memory, state, flush, reply } => {
                let files = [memory, state].map(Arc::new);
                self.request(Request::Save { flush }, &files, Some(Pending::Done(reply))).await
            }
            VmCommand::Release => self.request(Request::Release, &[], None).await,
            VmCommand::ExplainNetwork(target, reply) => {
                self.request(Request::ExplainNetwork { target }, &[], Some(Pending::Explanation(reply))).await
            }
            VmCommand::ConsoleTail(reply) => {
                self.request(Request::ConsoleTail { bytes_max: 64 << 10 }, &[], Some(Pending::ConsoleTail(reply))).await
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
