//! What a daemon can do with sandboxes and images, as plain async functions over the actors. Called by the API and by the
//! simulator; each one is one request. They hold no state of their own and no lock across an `.await`. Those of images are in
//! `daemon::images`.

mod images;
mod snapshots;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, MailboxError};
use msb_protocol::control::{
    ActorRow, ActorTree, Authorized, AuthorizedKey, CreateRequest, LabelRequest, MetricsHistory, MetricsSnapshot,
    PingReport, SandboxDetail, SandboxSummary, SshHost,
};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::files::OpenFiles;
use msb_protocol::guest::OpenKind;
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::labels::LabelTerm;
use msb_protocol::mount::{VOLUME_SIZE_MIB_DEFAULT, VolumeKind};
use msb_protocol::spec::{
    EngineChoice, OnIdle, ROOT_SIZE_MIB_MAX, ROOT_SIZE_MIB_MIN, RestartPolicy, SandboxSpec, Workload,
};
use msb_protocol::state::SandboxState;
use msb_protocol::vmm::NetworkExplanation;
use msb_protocol::volume::{CreateVolume, VolumeDetail, VolumeUser};

use crate::identity::ProcessIdentity;
use crate::images::{MakeUpper, PreparedImage};
use crate::inspect::Inspect;
use crate::journal::SandboxRecord;
use crate::kept::Kept;
use crate::metrics::{self, Latest, snapshot::Fleet};
use crate::pool::Count;
use crate::sandbox::activity::{ActivityGuard, ActivityKind};
use crate::sandbox::actor::{Ask, Explain, Halt, LetGo, OpenSsh, Relabel};
use crate::sandbox::machine::{By, Event, Then};
use crate::sandbox::network;
use crate::sandbox::plan;
use crate::sandbox::ssh::{self, SshForwarder};
use crate::sandbox::view::View;
use crate::supervisor::{All, Create, Find, Rows, SandboxRef, SupervisorActor, Surroundings, Views};
use crate::vm::files::Files;
use crate::vm::session::{self, Session};
use crate::volumes;

/// Time for an agent to give a sign of life.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// A handle on everything; clones are the same daemon.
#[derive(Clone)]
pub struct Daemon {
    supervisor: Kept<SupervisorActor>,
    surroundings: Arc<Surroundings>,
}

/// The process that asks, as its connection shows it.
#[derive(Debug)]
pub struct Creator {
    /// Who.
    pub identity: ProcessIdentity,
    /// Held since the connection was made.
    pub pidfd: OwnedFd,
}

impl Daemon {
    /// Starts the supervisor over what the journal knows. Must be called on the actors' own thread.
    #[must_use]
    pub fn over(surroundings: Arc<Surroundings>, found: Vec<SandboxRecord>) -> Self {
        let supervisor = SupervisorActor::keep(surroundings.clone(), found);
        Self { supervisor, surroundings }
    }

    /// What everything lives among.
    #[must_use]
    pub fn surroundings(&self) -> &Surroundings {
        &self.surroundings
    }

    /// Waits until it is known of each sandbox whether its VM is still there, so that the first answer already is the truth. One that
    /// cannot be known within the limit is shown as it was last seen.
    pub async fn recovered(&self, limit: Duration) {
        let Ok(all) = self.supervisor.send(All).await else { return };
        let known = async {
            for sandbox in all {
                let mut view = sandbox.view.clone();
                // An error is a sandbox that is gone.
                let _ = view.wait_for(|view| view.gone || !view.recovering).await;
            }
        };
        if tokio::time::timeout(limit, known).await.is_err() {
            tracing::warn!("some sandboxes are still being looked for");
        }
    }

    /// Checks what can be checked of a request before anything is made.
    ///
    /// # Errors
    /// `invalid_config`, `invalid_label`, or `not_implemented` for what is not built.
    pub fn check(request: &CreateRequest) -> Result<(), ApiError> {
        let spec = &request.spec;
        spec.check()?;
        let refuse = |message: &str| Err(ApiError::new(ErrorCode::InvalidConfig, message));
        if spec.ephemeral && spec.restart != RestartPolicy::Default {
            return refuse("a sandbox that is removed when it ends cannot have a restart policy");
        }
        if request.hold_main && spec.workload == Workload::None {
            return refuse("there is no main workload to hold");
        }
        if spec.idle_timeout_ms == Some(0) || spec.max_duration_ms == Some(0) {
            return refuse("a timeout of zero would end the sandbox before it starts");
        }
        if let Some(kernel) = &spec.kernel
            && !kernel.starts_with('/')
        {
            return refuse("the kernel must be an absolute path");
        }
        if let Some(signal) = &spec.stop_signal
            && plan::signal_number(signal).is_none()
        {
            return refuse(&format!("{signal:?} is not a signal"));
        }
        plan::resource_limits(&spec.rlimits).map(drop)
    }

    /// Creates a sandbox and waits until it is up.
    ///
    /// # Errors
    /// What the check, the image, the disk or the boot say.
    pub async fn create(&self, request: CreateRequest, creator: Option<Creator>) -> Result<SandboxDetail, ApiError> {
        let (sandbox, _lease) = self.begin(request, creator).await?;
        Self::until_ready(sandbox, 0, 0).await
    }

    /// Makes a sandbox and begins its first start. The image it comes with is kept until the sandbox holds it itself.
    async fn begin(
        &self,
        mut request: CreateRequest,
        creator: Option<Creator>,
    ) -> Result<(SandboxRef, Option<PreparedImage>), ApiError> {
        Self::check(&request)?;
        // Where only the VM process finds out which engine there is, it says the same.
        if request.spec.on_idle == OnIdle::Suspend
            && request.spec.engine == EngineChoice::Auto
            && self.surroundings.host.engine == EngineChoice::Qemu
        {
            return Err(SandboxSpec::no_suspension());
        }
        let creator = if request.spec.detached {
            None
        } else {
            let missing =
                || ApiError::new(ErrorCode::CreatorUnwatchable, "the creating process cannot be watched from here");
            Some(creator.map(|creator| (creator.identity, creator.pidfd)).ok_or_else(missing)?)
        };
        // Before anything is replaced: a request that cannot be met changes nothing.
        let snapshot = self.snapshot_for(&mut request).await?;
        if let (Some(grace_ms), Some(name)) = (request.replace_grace_ms, request.spec.name.clone()) {
            self.replace(&name, grace_ms).await?;
        }
        // What was fetched for this sandbox is not pruned before the sandbox itself holds it.
        let (snapshot, lease) = match snapshot {
            Some((snapshot, image)) => (Some(snapshot), Some(image)),
            None => (None, self.fetch_for(&request).await?),
        };
        // A ready fork, if one stands, brings its own.
        if snapshot.as_ref().is_none_or(|snapshot| snapshot.manifest.pool_size() == 0) {
            self.surroundings.expect_start(&request.spec);
        }
        let sandbox = self.supervisor.send(Create { request, creator, snapshot }).await.map_err(mailbox)??;
        Ok((sandbox, lease))
    }

    async fn replace(&self, name: &SandboxName, grace_ms: u64) -> Result<(), ApiError> {
        let Ok(sandbox) = self.find(name).await else { return Ok(()) };
        if sandbox.view.borrow().state().is_live() {
            match self.stop(name, Some(grace_ms), grace_ms == 0).await {
                Err(error) if error.code != ErrorCode::SandboxNotFound => return Err(error),
                _ => {}
            }
        }
        match self.remove(name, true).await {
            Err(error) if error.code != ErrorCode::SandboxNotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// One sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn find(&self, name: &SandboxName) -> Result<SandboxRef, ApiError> {
        self.supervisor.send(Find(name.clone())).await.map_err(mailbox)?
    }

    /// Everything about one sandbox as of now.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn inspect(&self, name: &SandboxName) -> Result<SandboxDetail, ApiError> {
        let sandbox = self.find(name).await?;
        let mut detail = sandbox.view.borrow().detail.clone();
        let now_ms = self.surroundings.clock.now_ms();
        if let Some(timeout_ms) = detail.spec.idle_timeout_ms
            && detail.summary.status == SandboxState::Running
        {
            let idle_ms = sandbox.activity.last_ms().map_or(0, |last| now_ms.saturating_sub(last));
            detail.idle_for_ms = Some(idle_ms);
            detail.stops_in_ms = Some(timeout_ms.saturating_sub(idle_ms));
        }
        detail.last_activity = sandbox.activity.last_kind().map(|kind| kind.as_str().to_owned());
        let directories = self.surroundings.directories(&sandbox.name, sandbox.id);
        let memory = sandbox.view.borrow().memory.map(|run| directories.memory(run).memory);
        let allocated = tokio::task::spawn_blocking(move || {
            use std::os::unix::fs::MetadataExt;
            let bytes = |path: std::path::PathBuf| std::fs::metadata(path).map_or(0, |file| file.blocks() * 512);
            (bytes(directories.upper), memory.map(bytes))
        });
        (detail.root_allocated_bytes, detail.memory_allocated_bytes) = allocated.await.unwrap_or_default();
        Ok(detail)
    }

    /// Every sandbox that fits all terms, newest first.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn list(&self, terms: &[LabelTerm]) -> Result<Vec<SandboxSummary>, ApiError> {
        let views = self.supervisor.send(Views).await.map_err(mailbox)?;
        let summaries = views.iter().map(|view| &view.detail.summary);
        Ok(summaries.filter(|summary| terms.iter().all(|term| term.matches(&summary.labels))).cloned().collect())
    }

    /// How many sandboxes are in which state.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn count(&self) -> Result<BTreeMap<String, u64>, ApiError> {
        let mut counts = BTreeMap::new();
        for view in self.supervisor.send(Views).await.map_err(mailbox)? {
            *counts.entry(view.state().as_str().to_owned()).or_default() += 1;
        }
        Ok(counts)
    }

    /// The newest sample of each sandbox that fits: one of the names, if any is given, and every term.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn metrics(&self, choice: &metrics::snapshot::Choice) -> Result<MetricsSnapshot, ApiError> {
        Ok(self.fleet(choice).await?.into_snapshot())
    }

    /// As [`Self::metrics`], before it is told in one form or the other.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn fleet(&self, choice: &metrics::snapshot::Choice) -> Result<Fleet, ApiError> {
        let Surroundings { metrics, clock, .. } = &*self.surroundings;
        let latest = metrics.actor().send(Latest { now_ms: clock.now_ms() }).await.map_err(mailbox)?;
        // In this order: what is seen of a sandbox is as new as its sample, and a run that has just begun is not taken for one that has ended.
        let views = self.supervisor.send(Views).await.map_err(mailbox)?;
        let pool = self.surroundings.pool.send(Count).await.map_err(mailbox)?;
        let ready_forks = pool.into_iter().map(|(name, forks)| (name.to_string(), forks.ready)).collect();
        Ok(Fleet::new(metrics.identity(), clock.wall(), views, latest, ready_forks, choice))
    }

    /// The samples of one sandbox in the last `last_ms`, thinned to `points_max`.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn metrics_history(
        &self,
        name: &SandboxName,
        last_ms: u64,
        points_max: usize,
    ) -> Result<MetricsHistory, ApiError> {
        let sandbox = self.find(name).await?;
        let since_ms = self.surroundings.clock.now_ms().saturating_sub(last_ms);
        let history = metrics::History { id: sandbox.id, since_ms };
        let entries = self.surroundings.metrics.actor().send(history).await.map_err(mailbox)?;
        Ok(MetricsHistory {
            name: name.clone(),
            id: sandbox.id,
            points: metrics::snapshot::history(&entries, points_max),
        })
    }

    /// Which rule of a sandbox's network would decide about a target; nothing is sent. A running one knows what its names led to.
    ///
    /// # Errors
    /// `sandbox_not_found`, `invalid_request`.
    pub async fn explain_network(&self, name: &SandboxName, target: String) -> Result<NetworkExplanation, ApiError> {
        let sandbox = self.find(name).await?;
        if let Ok(Some(answer)) = sandbox.send(Explain(target.clone())).await
            && let Ok(answer) = answer.await
        {
            return answer;
        }
        let spec = sandbox.view.borrow().detail.spec.network.clone();
        let network = network::vm_network(&spec, &spec.ports).ok_or_else(|| {
            ApiError::new(ErrorCode::InvalidRequest, format!("sandbox {name} has no network"))
                .with_hint("it was created with --no-net")
        })?;
        self.surroundings.launcher.explain(network, target).await
    }

    /// Starts a sandbox and waits until it is up.
    ///
    /// # Errors
    /// As [`Daemon::create`], and `sandbox_busy`.
    pub async fn start(&self, name: &SandboxName, hold_main: bool) -> Result<SandboxDetail, ApiError> {
        self.ask_up(name, Event::Start { by: By::User, hold_main }).await
    }

    /// Stops a sandbox, starts it again and waits until it is up.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub async fn restart(&self, name: &SandboxName, grace_ms: Option<u64>) -> Result<SandboxDetail, ApiError> {
        self.ask_up(name, Event::Stop { grace_ms, then: Then::Start }).await
    }

    async fn ask_up(&self, name: &SandboxName, event: Event) -> Result<SandboxDetail, ApiError> {
        let sandbox = self.find(name).await?;
        let (ready, failed) = {
            let view = sandbox.view.borrow();
            // A sandbox that is up already needs no further run to be up.
            let up = view.state() == SandboxState::Running && matches!(event, Event::Start { .. });
            (view.runs_ready.saturating_sub(u64::from(up && view.runs_ready > 0)), view.starts_failed)
        };
        self.ask(&sandbox, Ask::Event(event)).await?;
        Self::until_ready(sandbox, ready, failed).await
    }

    /// Stops a sandbox and waits until it rests.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_busy`.
    pub async fn stop(
        &self,
        name: &SandboxName,
        grace_ms: Option<u64>,
        force: bool,
    ) -> Result<SandboxDetail, ApiError> {
        let sandbox = self.find(name).await?;
        let event = if force { Event::Kill } else { Event::Stop { grace_ms, then: Then::Settle } };
        self.ask(&sandbox, Ask::Event(event)).await?;
        // One that was asleep rested already; stopped it is when its ports are let go.
        let stopped = |view: &View| view.rests() && view.state() != SandboxState::Asleep;
        Self::until(sandbox, |view| stopped(view).then(|| Ok(view.detail.clone()))).await
    }

    /// Halts a running sandbox where it is; answered once nothing in it runs.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`, `unsupported_operation` on an engine that cannot.
    pub async fn pause(&self, name: &SandboxName) -> Result<SandboxDetail, ApiError> {
        self.halt(name, Halt::Pause).await
    }

    /// Lets a halted sandbox go on.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`.
    pub async fn resume(&self, name: &SandboxName) -> Result<SandboxDetail, ApiError> {
        self.halt(name, Halt::Resume).await
    }

    async fn halt(&self, name: &SandboxName, halt: Halt) -> Result<SandboxDetail, ApiError> {
        self.find(name).await?.send(halt).await??;
        self.inspect(name).await
    }

    /// Stops every sandbox with a flush because the host goes down, and waits until none runs. Gives how many ran.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn host_stop(&self) -> Result<usize, ApiError> {
        let all = self.supervisor.send(All).await.map_err(mailbox)?;
        let stops = all.into_iter().map(|sandbox| async move {
            let state = sandbox.view.borrow().state();
            if !state.is_live() && state != SandboxState::Restarting {
                return 0;
            }
            match self.ask(&sandbox, Ask::Event(Event::HostStop)).await {
                Ok(()) => {
                    // One that is removed meanwhile has ended too.
                    let _ = Self::until(sandbox, |view| (view.gone || !view.state().is_live()).then_some(Ok(()))).await;
                }
                Err(error) => tracing::warn!(error = %error.message, "a sandbox is left to the end of its process"),
            }
            usize::from(state.is_live())
        });
        Ok(futures_util::future::join_all(stops).await.into_iter().sum())
    }

    /// Removes a sandbox and waits until nothing of it is left.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_still_running` without `force`.
    pub async fn remove(&self, name: &SandboxName, force: bool) -> Result<(), ApiError> {
        let sandbox = self.find(name).await?;
        self.ask(&sandbox, Ask::Event(Event::Remove { force })).await?;
        Self::until(sandbox, |view| view.gone.then_some(Ok(()))).await
    }

    /// Lets a sandbox outlive its creator.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn detach(&self, name: &SandboxName) -> Result<SandboxDetail, ApiError> {
        let sandbox = self.find(name).await?;
        self.ask(&sandbox, Ask::Detach).await?;
        // Seen means durable.
        Self::until(sandbox, |view| (view.detail.spec.detached || view.gone).then_some(Ok(()))).await?;
        self.inspect(name).await
    }

    /// Changes labels.
    ///
    /// # Errors
    /// `sandbox_not_found`, `invalid_label`.
    pub async fn label(&self, name: &SandboxName, request: LabelRequest) -> Result<SandboxDetail, ApiError> {
        msb_protocol::labels::check_all(&request.set)?;
        let sandbox = self.find(name).await?;
        let busy = || ApiError::new(ErrorCode::SandboxBusy, format!("the actor of sandbox {name} is being made again"));
        let durable = sandbox.send(Relabel(request)).await??;
        durable.await.map_err(|_| busy())??;
        self.inspect(name).await
    }

    /// Counts as activity.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_not_running`.
    pub async fn touch(&self, name: &SandboxName) -> Result<SandboxDetail, ApiError> {
        let sandbox = self.find(name).await?;
        let state = sandbox.view.borrow().state();
        if state != SandboxState::Running {
            return Err(not_running(name, state));
        }
        sandbox.activity.touch(ActivityKind::Touch);
        self.inspect(name).await
    }

    /// Waits until a sandbox rests.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn wait(&self, name: &SandboxName) -> Result<SandboxDetail, ApiError> {
        let sandbox = self.find(name).await?;
        Self::until(sandbox, |view| view.rests().then(|| Ok(view.detail.clone()))).await
    }

    /// Starts a sandbox that is asleep; any other is left alone.
    ///
    /// # Errors
    /// `sandbox_not_found`, or why it does not start.
    pub async fn wake(&self, name: &SandboxName) -> Result<(), ApiError> {
        let sandbox = self.find(name).await?;
        let state = sandbox.view.borrow().state();
        let needs = state == SandboxState::Asleep || sandbox.view.borrow().falling_asleep;
        if needs { self.start(name, false).await.map(drop) } else { Ok(()) }
    }

    /// The identity of the sandbox that has this name now.
    ///
    /// # Errors
    /// `sandbox_not_found`.
    pub async fn identity(&self, name: &SandboxName) -> Result<SandboxId, ApiError> {
        Ok(self.find(name).await?.id)
    }

    /// The SSH forwarder of a sandbox.
    ///
    /// # Errors
    /// `sandbox_not_found`, `sandbox_busy`, or why its host key cannot be used.
    pub async fn ssh(&self, name: &SandboxName) -> Result<Arc<SshForwarder>, ApiError> {
        self.find(name).await?.send(OpenSsh(self.clone())).await?
    }

    /// How an SSH client finds a sandbox: its host key, and the user that its processes run as.
    ///
    /// # Errors
    /// As [`Daemon::ssh`].
    pub async fn ssh_host(&self, name: &SandboxName) -> Result<SshHost, ApiError> {
        let (host_key, fingerprint) = self.ssh(name).await?.host_key();
        let detail = self.inspect(name).await?;
        let user = match detail.spec.user.filter(|user| !user.is_empty()) {
            Some(user) => user,
            None if detail.image_digest.is_empty() => String::new(),
            // An image that is gone leaves the usual user.
            None => self.inspect_image(detail.image_digest).await.map(|image| image.config.user).unwrap_or_default(),
        };
        // A login name is a user; their groups are the sandbox's business.
        let user = match user.split(':').next() {
            Some(user) if !user.is_empty() => user.to_owned(),
            _ => "root".to_owned(),
        };
        Ok(SshHost { sandbox: name.clone(), user, host_key, fingerprint })
    }

    /// The keys that may log in to every sandbox of this home.
    ///
    /// # Errors
    /// `invalid_config` naming the line, `permission_denied`.
    pub async fn authorized_keys(&self) -> Result<Vec<AuthorizedKey>, ApiError> {
        Ok(ssh::summaries(&ssh::load_keys(self.surroundings.home.authorized_keys()).await?))
    }

    /// Adds keys to them.
    ///
    /// # Errors
    /// `invalid_config` naming the line; nothing is added then.
    pub async fn authorize(&self, text: String) -> Result<Authorized, ApiError> {
        let (added, known) = ssh::authorize(self.surroundings.home.authorized_keys(), text).await?;
        Ok(Authorized { added, known: known as u64 })
    }

    /// Opens a stream to a sandbox's agent, waking it if it sleeps. The guard counts as activity while it is held.
    ///
    /// # Errors
    /// `sandbox_not_running`, or what the agent refuses with.
    pub async fn open(
        &self,
        name: &SandboxName,
        kind: OpenKind,
        activity: ActivityKind,
    ) -> Result<(Session, ActivityGuard), ApiError> {
        let mut sandbox = self.find(name).await?;
        let mut early = None;
        let (mut state, mut falling_asleep) = {
            let view = sandbox.view.borrow();
            (view.state(), view.falling_asleep)
        };
        if state == SandboxState::Running {
            // Before the last look: from here on it does not fall asleep.
            early = Some(sandbox.activity.begin(activity));
            let view = sandbox.view.borrow();
            (state, falling_asleep) = (view.state(), view.falling_asleep);
        }
        match state {
            SandboxState::Running => {}
            _ if falling_asleep => {
                self.start(name, false).await?;
            }
            SandboxState::Asleep => {
                self.start(name, false).await?;
                sandbox = self.find(name).await?;
            }
            SandboxState::Starting => {
                let (ready, failed) = {
                    let view = sandbox.view.borrow();
                    (view.runs_ready, view.starts_failed)
                };
                Self::until_ready(sandbox.clone(), ready, failed).await?;
            }
            // A main stream may come when a short workload's sandbox is already on its way down: the agent knows better.
            SandboxState::Draining | SandboxState::Stopping
                if matches!(kind, OpenKind::Main(_) | OpenKind::Attach(_)) => {}
            resting => return Err(not_running(name, resting)),
        }
        let boot_id = sandbox.view.borrow().detail.boot_id;
        let boot_id = boot_id.ok_or_else(|| not_running(name, sandbox.view.borrow().state()))?;
        let guard = early.unwrap_or_else(|| sandbox.activity.begin(activity));
        let directories = self.surroundings.directories(&sandbox.name, sandbox.id);
        let session = session::open(&*self.surroundings.launcher, &directories.run, boot_id, kind).await?;
        Ok((session, guard))
    }

    /// Asks the agent of a running sandbox for a sign of life: a look at `/`, through the VM process and back. It is no activity, and
    /// wakes nothing.
    ///
    /// # Errors
    /// `sandbox_not_running`; `agent_timeout` if nothing comes back.
    pub async fn ping(&self, name: &SandboxName) -> Result<PingReport, ApiError> {
        let sandbox = self.find(name).await?;
        let (state, boot_id) = {
            let view = sandbox.view.borrow();
            (view.state(), view.detail.boot_id)
        };
        let (SandboxState::Running, Some(boot_id)) = (state, boot_id) else { return Err(not_running(name, state)) };
        let directories = self.surroundings.directories(&sandbox.name, sandbox.id);
        let began = Instant::now();
        let look = async {
            let kind = OpenKind::Files(OpenFiles::default());
            let session = session::open(&*self.surroundings.launcher, &directories.run, boot_id, kind).await?;
            Files::over(session, None).stat(b"/", false).await
        };
        match tokio::time::timeout(PING_TIMEOUT, look).await {
            Ok(attributes) => drop(attributes?),
            Err(_) => {
                let message = format!("the agent of {name} did not answer within {} s", PING_TIMEOUT.as_secs());
                return Err(ApiError::new(ErrorCode::AgentTimeout, message));
            }
        }
        Ok(PingReport { boot_id, round_trip_us: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX) })
    }

    async fn ask(&self, sandbox: &SandboxRef, ask: Ask) -> Result<(), ApiError> {
        sandbox.send(ask).await?
    }

    async fn until_ready(sandbox: SandboxRef, ready: u64, failed: u64) -> Result<SandboxDetail, ApiError> {
        Self::until(sandbox, |view| {
            if view.runs_ready > ready {
                return Some(Ok(view.detail.clone()));
            }
            if view.starts_failed > failed && (view.gone || view.rests()) {
                return Some(Err(view
                    .failure
                    .clone()
                    .unwrap_or_else(|| ApiError::new(ErrorCode::BootFailed, "the sandbox did not start"))));
            }
            view.gone.then(|| Err(ApiError::new(ErrorCode::Cancelled, "the sandbox was removed meanwhile")))
        })
        .await
    }

    async fn until<T>(
        mut sandbox: SandboxRef,
        mut done: impl FnMut(&View) -> Option<Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        loop {
            if let Some(outcome) = done(&sandbox.view.borrow_and_update().clone()) {
                return outcome;
            }
            if sandbox.view.changed().await.is_err() {
                // The supervisor let go of it: it is removed, or the daemon ends.
                let last = sandbox.view.borrow().clone();
                return done(&last)
                    .unwrap_or_else(|| Err(ApiError::new(ErrorCode::Cancelled, "the service is ending")));
            }
        }
    }

    /// Ends every actor; VMs go on for the next daemon.
    pub async fn let_go(&self) {
        if let Err(error) = self.supervisor.send(LetGo).await {
            tracing::debug!(%error, "the supervisor had ended already");
        }
        if let Err(error) = self.surroundings.pool.send(LetGo).await {
            tracing::debug!(%error, "the pool had ended already");
        }
    }

    /// How sandboxes use a volume.
    async fn users_of(&self, volume: &SandboxName) -> Result<Vec<VolumeUser>, ApiError> {
        let views = self.supervisor.send(Views).await.map_err(mailbox)?;
        let mut users: Vec<VolumeUser> = views
            .iter()
            .flat_map(|view| volumes::use_of(&view.detail.summary.name, &view.detail.spec, volume))
            .collect();
        users.sort_by(|a, b| a.sandbox.cmp(&b.sandbox));
        Ok(users)
    }

    /// One volume.
    ///
    /// # Errors
    /// `volume_not_found`.
    pub async fn inspect_volume(&self, name: SandboxName) -> Result<VolumeDetail, ApiError> {
        let (volumes, users) = (self.surroundings.volumes(), self.users_of(&name).await?);
        tokio::task::spawn_blocking(move || volumes.inspect(&name, users)).await.map_err(ApiError::internal)?
    }

    /// Every volume.
    ///
    /// # Errors
    /// `internal` if the supervisor is gone.
    pub async fn list_volumes(&self) -> Result<Vec<VolumeDetail>, ApiError> {
        let volumes = self.surroundings.volumes();
        let names = tokio::task::spawn_blocking(move || volumes.names()).await.map_err(ApiError::internal)?;
        let mut list = Vec::with_capacity(names.len());
        for name in names {
            match self.inspect_volume(name).await {
                Ok(detail) => list.push(detail),
                // Removed a moment ago.
                Err(error) if error.code == ErrorCode::VolumeNotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(list)
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// `volume_already_exists`, `invalid_config`, `disk_full`.
    pub async fn create_volume(&self, request: CreateVolume) -> Result<VolumeDetail, ApiError> {
        let CreateVolume { name, kind, size_mib } = request;
        if kind == VolumeKind::Dir && size_mib.is_some() {
            return Err(ApiError::new(ErrorCode::InvalidConfig, "a directory volume has no size")
                .with_hint("leave the size out, or make a disk"));
        }
        let size_mib = size_mib.unwrap_or(VOLUME_SIZE_MIB_DEFAULT);
        if !(ROOT_SIZE_MIB_MIN..=ROOT_SIZE_MIB_MAX).contains(&size_mib) {
            let message = format!("the size of a disk must be {ROOT_SIZE_MIB_MIN} to {ROOT_SIZE_MIB_MAX} MiB");
            return Err(ApiError::new(ErrorCode::InvalidConfig, message));
        }
        let (volumes, wanted) = (self.surroundings.volumes(), name.clone());
        let path = tokio::task::spawn_blocking(move || volumes.create(&wanted, kind)).await;
        let path = path.map_err(ApiError::internal)??;
        if kind == VolumeKind::Disk {
            self.surroundings.images.send(MakeUpper { path, size_mib }).await.map_err(mailbox)??;
        }
        self.inspect_volume(name).await
    }

    /// Removes a volume that nobody uses.
    ///
    /// # Errors
    /// `volume_not_found`, `volume_in_use`.
    pub async fn remove_volume(&self, name: SandboxName) -> Result<(), ApiError> {
        let (volumes, users) = (self.surroundings.volumes(), self.users_of(&name).await?);
        tokio::task::spawn_blocking(move || volumes.remove(&name, &users)).await.map_err(ApiError::internal)?
    }

    /// Every actor.
    ///
    /// # Errors
    /// The daemon ends.
    pub async fn actors(&self) -> Result<ActorTree, ApiError> {
        let mut actors = Vec::new();
        for (mut row, sandbox) in self.supervisor.send(Rows).await.map_err(mailbox)? {
            if row.parent.is_empty() {
                (row.mailbox, row.restarts) = (self.supervisor.waiting(), self.supervisor.restarts());
                row.last_cause = self.supervisor.last_cause();
            }
            if let Some(sandbox) = sandbox
                && let Ok(report) = sandbox.send(Inspect).await
            {
                (row.handled, row.state) = (report.handled, report.state);
            }
            actors.push(row);
        }
        actors.push(row_of("images", &self.surroundings.images).await?);
        actors.push(row_of("snapshots", &self.snapshots().actor).await?);
        actors.push(row_of("pool", &self.surroundings.pool).await?);
        actors.push(row_of("metrics", self.surroundings.metrics.actor()).await?);
        Ok(ActorTree { actors })
    }
}

/// What is shown of an actor that there is one of.
async fn row_of<A>(name: &str, actor: &Kept<A>) -> Result<ActorRow, ApiError>
where
    A: Actor<Context = Context<A>> + Handler<Inspect>,
{
    // Before the question itself waits there.
    let mailbox_len = actor.waiting();
    let report = actor.send(Inspect).await.map_err(mailbox)?;
    Ok(ActorRow {
        name: name.into(),
        parent: "supervisor".into(),
        handled: report.handled,
        mailbox: mailbox_len,
        restarts: actor.restarts(),
        last_cause: actor.last_cause(),
        state: report.state,
    })
}

fn not_running(name: &SandboxName, state: SandboxState) -> ApiError {
    if state == SandboxState::Paused {
        let hint = format!("let it go on with `msb resume {name}`");
        return ApiError::new(ErrorCode::SandboxPaused, format!("sandbox {name} is paused")).with_hint(hint);
    }
    ApiError::new(ErrorCode::SandboxNotRunning, format!("sandbox {name} is {}", state.as_str()))
}

/// An actor that died with the request is made again: the same request may succeed then.
fn mailbox(error: MailboxError) -> ApiError {
    ApiError { retryable: true, ..ApiError::internal(format!("the service could not finish this request: {error}")) }
}
