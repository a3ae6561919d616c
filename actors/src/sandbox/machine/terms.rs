//! The words of the machine: what it is told ([`Event`]), what it is in ([`State`]), what it answers ([`Effect`], [`Denial`]), what it goes by
//! ([`Policy`], [`Moment`]) and what of it is kept ([`Stored`]). No transition is decided here; that is `machine`, whose picture says how they
//! go together.

use msb_protocol::id::BootId;
use msb_protocol::spec::{OnIdle, RestartPolicy, SandboxSpec};
use msb_protocol::state::{EndCause, SandboxState};
use serde::{Deserialize, Serialize};

/// What of a spec decides about the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What follows an end.
    pub restart: RestartPolicy,
    /// What follows an idle stop.
    pub on_idle: OnIdle,
    /// Time without activity in milliseconds.
    pub idle_timeout_ms: Option<u64>,
    /// Longest run in milliseconds.
    pub max_duration_ms: Option<u64>,
    /// Time between stop signal and kill in milliseconds.
    pub stop_grace_ms: u64,
    /// Whether it vanishes when it ends.
    pub ephemeral: bool,
    /// Time of the pre-stop hook in milliseconds, if there is one.
    pub pre_stop_ms: Option<u64>,
}

impl Policy {
    /// The policy of a spec.
    #[must_use]
    pub fn of(spec: &SandboxSpec) -> Self {
        Self {
            restart: spec.restart,
            on_idle: spec.on_idle,
            idle_timeout_ms: spec.idle_timeout_ms,
            max_duration_ms: spec.max_duration_ms,
            stop_grace_ms: spec.stop_grace_ms,
            ephemeral: spec.ephemeral,
            pre_stop_ms: spec.pre_stop.as_ref().map(|hook| hook.timeout_ms),
        }
    }

    /// Whether an unhealthy sandbox is stopped and started again. Without a restart policy its health is shown, as in docker.
    pub(super) fn restarts_unhealthy(&self) -> bool {
        matches!(self.restart, RestartPolicy::OnFailure { .. } | RestartPolicy::Always | RestartPolicy::UnlessStopped)
    }
}

/// How far a start has come. Each phase names what exists already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartPhase {
    /// Nothing but the record.
    Planned,
    /// The image is leased.
    ImageLeased,
    /// Directories and the writable disk exist.
    DisksMade,
    /// The VM process exists; the agent is not ready yet.
    VmSpawned,
}

/// One run of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its identity.
    pub boot_id: BootId,
    /// Whether the main workload waits for its caller.
    pub hold_main: bool,
    /// Whether a policy and not a person began it.
    pub by_policy: bool,
    /// The run whose memory it goes on with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wakes: Option<BootId>,
}

/// What follows the end that is under way, before policies are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    /// What the policies say.
    Settle,
    /// The next run: somebody asked for a restart.
    Start,
    /// Rest until the next daemon, which asks the policies: the host goes down.
    Park,
    /// Sleep with the memory that was written down.
    Sleep,
    /// Go on from it at once: somebody came while the VM was ending.
    Wake,
}

/// Where the sandbox is. Variants own what exists in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Recorded, never started.
    Created,
    /// On the way up.
    Starting {
        /// The run.
        run: Run,
        /// How far.
        phase: StartPhase,
        /// Somebody wants it gone again, for this cause: the phase under way is the last one.
        abandon: Option<EndCause>,
    },
    /// The agent answers.
    Running {
        /// The run.
        run: Run,
        /// When it became ready, on the machine's clock.
        ready_at_ms: u64,
    },
    /// Its vCPUs are halted.
    Paused {
        /// The run.
        run: Run,
        /// When it became ready, on the machine's clock.
        ready_at_ms: u64,
    },
    /// Idle: its machine stands and is written down.
    Suspending {
        /// The run.
        run: Run,
        /// When it became ready, on the machine's clock.
        ready_at_ms: u64,
        /// When it goes on in any case.
        until_ms: u64,
    },
    /// The pre-stop hook runs; the workload does not know yet.
    PreStop {
        /// The run.
        run: Run,
        /// Why.
        cause: EndCause,
        /// What follows.
        then: Then,
        /// Grace time of the workload, once the hook is over.
        grace_ms: u64,
        /// When the hook is over in any case.
        until_ms: u64,
        /// How long the run had been up.
        ran_ms: u64,
    },
    /// The workload was asked to end.
    Draining {
        /// The run.
        run: Run,
        /// Why.
        cause: EndCause,
        /// What follows.
        then: Then,
        /// When its grace is over.
        until_ms: u64,
        /// How long the run had been up.
        ran_ms: u64,
    },
    /// The guest flushes, or the VM is being killed.
    Stopping {
        /// The run.
        run: Run,
        /// Why.
        cause: EndCause,
        /// What follows.
        then: Then,
        /// When the kill comes, or comes again.
        until_ms: u64,
        /// How long the run had been up.
        ran_ms: u64,
    },
    /// At rest.
    Stopped,
    /// At rest for idleness; the next need starts it.
    Asleep {
        /// The run whose memory is kept.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory: Option<BootId>,
    },
    /// At rest after a crash; no further try is due.
    Crashed,
    /// Backing off.
    Restarting {
        /// When it starts, on the machine's clock.
        at_ms: u64,
    },
    /// A new daemon (or a rebuilt actor) looks for the VM of this run.
    Recovering {
        /// The run.
        run: Run,
        /// How it shows meanwhile.
        shown: SandboxState,
        /// The stop that was under way.
        ending: Option<(EndCause, Then)>,
    },
    /// Gone; the actor ends.
    Removed,
}

/// Who caused an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// A person or program through the API.
    User,
    /// The creator's death.
    Creator,
    /// Idleness.
    Idle,
    /// A policy or the daemon itself.
    Supervisor,
    /// The guest or its VM process.
    Guest,
}

impl By {
    /// The word of [`msb_protocol::control::EventRecord::actor`].
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Creator => "creator",
            Self::Idle => "idle",
            Self::Supervisor => "supervisor",
            Self::Guest => "guest",
        }
    }
}

/// What happens to a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody or something needs it up.
    Start {
        /// Who.
        by: By,
        /// Whether the main workload waits for its caller.
        hold_main: bool,
    },
    /// The phase under way succeeded.
    PhaseDone(StartPhase),
    /// The phase under way failed; nothing of it is left.
    PhaseFailed,
    /// The agent is ready.
    AgentReady,
    /// The VM was halted on request. Refused where that can no longer be: whoever halted it lets it go on.
    Paused,
    /// The VM goes on, on request.
    Resumed,
    /// The machine is written down, durably, and stands.
    Suspended,
    /// It could not be.
    SuspendFailed,
    /// The main workload ended by itself.
    MainExited,
    /// The VM process is gone.
    VmEnded {
        /// What it or its absence says.
        cause: EndCause,
        /// Whether the main workload ended well.
        success: bool,
    },
    /// End it with a flush.
    Stop {
        /// In place of the policy's grace time.
        grace_ms: Option<u64>,
        /// What follows.
        then: Then,
    },
    /// The host goes down: end it with a flush, and come back with the next daemon if the policy says so.
    HostStop,
    /// End it now.
    Kill,
    /// The creator of an attached sandbox is gone.
    CreatorGone,
    /// The health check says it is ill.
    Unhealthy,
    /// The pre-stop hook is over, however it ended.
    HookDone,
    /// The agent missed its beats.
    AgentSilent,
    /// Time went on.
    Tick {
        /// The last activity on the machine's clock; `None` while something is active.
        last_activity_ms: Option<u64>,
    },
    /// Remove it.
    Remove {
        /// Even when it runs.
        force: bool,
    },
    /// The VM of a recovered run lives.
    Adopted {
        /// Whether its agent is ready.
        ready: bool,
        /// Whether it is halted.
        paused: bool,
    },
}

impl Event {
    pub(super) fn by(self) -> By {
        match self {
            Self::Start { by, .. } => by,
            Self::Stop { .. } | Self::Kill | Self::Remove { .. } | Self::Paused | Self::Resumed => By::User,
            Self::CreatorGone => By::Creator,
            Self::AgentReady | Self::MainExited | Self::VmEnded { .. } => By::Guest,
            Self::Tick { .. }
            | Self::PhaseDone(_)
            | Self::PhaseFailed
            | Self::Unhealthy
            | Self::HookDone
            | Self::HostStop
            | Self::AgentSilent
            | Self::Suspended
            | Self::SuspendFailed
            | Self::Adopted { .. } => By::Supervisor,
        }
    }
}

/// What the actor must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Make the record durable, with an event, before anything below.
    Record {
        /// Who caused it.
        by: By,
        /// Why the run ended, if one did.
        cause: Option<EndCause>,
    },
    /// Lease the image; answer with `PhaseDone(ImageLeased)` or `PhaseFailed`.
    LeaseImage,
    /// Make directories and disks; answer with `PhaseDone(DisksMade)` or `PhaseFailed`.
    MakeDisks,
    /// Spawn the VM process; answer with `PhaseDone(VmSpawned)` or `PhaseFailed`.
    SpawnVm,
    /// Give the lease back.
    ReleaseImage,
    /// Let the halted VM go on.
    ResumeVm,
    /// Write the machine down; answer with `Suspended` or `SuspendFailed`.
    Suspend,
    /// Let the machine that stands to be written down go on.
    GoOn,
    /// Run the pre-stop hook; answer with `HookDone`.
    RunHook,
    /// Ask the agent to end the workload, flush and turn off.
    Shutdown {
        /// What the VM process is to record.
        cause: EndCause,
        /// Grace time of the workload.
        grace_ms: u64,
    },
    /// Kill the VM process.
    KillVm {
        /// What it is to record.
        cause: EndCause,
    },
    /// The run is over: note how.
    EndRun {
        /// The run.
        boot_id: BootId,
        /// Why.
        cause: EndCause,
    },
    /// Remove every file of the sandbox, then its record.
    RemoveFiles,
    /// Whoever waits for `running` will not get it.
    FailStart,
    /// Look for the VM of the recovered run; answer with `Adopted` or `VmEnded`.
    Adopt,
}

/// Why an event is refused. The machine is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// Another operation is under way.
    #[error("it is {0}")]
    Busy(&'static str),
    /// It must rest for this.
    #[error("it is {0}")]
    StillRunning(&'static str),
    /// It is halted, and only a person lets it go on.
    #[error("it is paused")]
    Paused,
    /// It is being removed.
    #[error("it is being removed")]
    Gone,
}

/// The time and the identity that a step may use up.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Milliseconds on a monotonic clock.
    pub now_ms: u64,
    /// The boot id of a run that begins in this step.
    pub next_boot_id: BootId,
}

/// What the journal keeps of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// The state.
    pub state: State,
    /// Restarts since somebody last started it.
    #[serde(default)]
    pub restarts: u32,
    /// Failures in a row.
    #[serde(default)]
    pub failures: u32,
    /// Whether it outlives its creator.
    #[serde(default)]
    pub detached: bool,
    /// Whether its removal has begun.
    #[serde(default)]
    pub removing: bool,
    /// Whether it was ever up.
    #[serde(default)]
    pub ever_spawned: bool,
}
