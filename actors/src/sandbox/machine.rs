//! The life of one sandbox as a pure function: (state, event) → (state, effects). No actix, no tokio, no clock, no I/O.
//!
//! ```text
//!                                          paused
//!                                     Paused ▲ │ Resumed; any stop resumes it first
//!                Start              AgentReady │ ▼            Stop, idle, creator gone, max duration
//!   created ───────────► starting ─────────────► running ────────────────────────────► draining
//!                        │ planned                 │ │                                     │ MainExited,
//!                        │ image leased            │ │ MainExited                          │ grace over
//!                        │ disks made              │ └───────────────► stopping ◄──────────┘
//!                        │ vm spawned              │ Kill, AgentSilent     │ (flush; at its limit: kill)
//!                        ▼ VmEnded                 ▼ VmEnded               ▼ VmEnded
//!                     settle ◄──────────────────settle◄─────────────────settle
//!                        │
//!        ┌───────────────┼──────────────┬───────────────┬──────────────┐
//!        ▼               ▼              ▼               ▼              ▼
//!     stopped         asleep        restarting       crashed        removed (ephemeral, Remove)
//!                   (idle; wakes   (backing off,
//!                    on Start)      then starting)
//!
//!   running ── idle, `suspend` ──► suspending ── Suspended ──► stopping ── VmEnded ──► asleep, with memory ── Start ──► starting, from it
//!      ▲                              │ Start, SuspendFailed                                 (a start from memory that fails begins anew,
//!      └──────────────────────────────┘ any stop lets it go on first                          from the disk)
//! ```
//!
//! * **starting** is a chain of phases. A failure before the VM exists takes apart what the earlier phases made, newest first,
//!   and a sandbox that never ran vanishes; a failure after it is an end of a run like any other.
//! * **draining** begins with the pre-stop hook, if there is one; then the workload has its grace time. **stopping**: the workload is over, the guest flushes and turns itself off.
//! * **paused** has a VM in which nothing runs: no beats, no checks, no idleness. Its maximum duration goes on.
//! * **suspending**: the machine stands and is written down. It counts only after the VM that stood is gone: one that went on since has
//!   changed the disk. What is [kept](Machine::memory) is named by the run it was; every change of state away from it forgets it.
//! * **settle** is the only place that decides what follows an end ([`Policy`]).
//! * **recovering** (a daemon that starts finds a record of a live run) shows as the state it was found in.
//!
//! Invariants, held by the property tests below: at most one VM exists; a resting sandbox has none; every run that was begun is
//! ended exactly once; a boot id is never used twice.
//!
//! Called by `sandbox::actor`, which does the effects; the table in `machine/snapshots/` and `docs/lifecycle.md` is drawn from this file.

mod terms;

use msb_protocol::id::BootId;
use msb_protocol::spec::{OnIdle, RestartPolicy};
use msb_protocol::state::{EndCause, SandboxState};

pub use self::terms::{By, Denial, Effect, Event, Moment, Policy, Run, StartPhase, State, Stored, Then};

/// First wait before a restart in milliseconds; it doubles with each failure in a row.
pub const BACK_OFF_FIRST_MS: u64 = 100;
/// Longest wait before a restart in milliseconds.
pub const BACK_OFF_MAX_MS: u64 = 60_000;
/// Running time in milliseconds after which failures are forgotten.
pub const STEADY_AFTER_MS: u64 = 60_000;
/// VM crashes in a row that a detached sandbox is restarted after when no policy says otherwise.
pub const CRASH_BUDGET: u32 = 5;
/// Time in milliseconds for the guest to flush and turn itself off once the workload is over.
pub const FLUSH_LIMIT_MS: u64 = 10_000;
/// Time in milliseconds for a killed VM process to be gone before the kill is repeated.
pub const KILL_REPEAT_MS: u64 = 1_000;
/// Time in milliseconds for a machine to be written down before it goes on instead.
pub const SUSPEND_LIMIT_MS: u64 = 120_000;
/// Shortest wait in milliseconds before a suspension that failed is tried again.
pub const SUSPEND_AGAIN_MS: u64 = 60_000;

/// The machine of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    state: State,
    policy: Policy,
    /// Restarts since somebody last started it.
    restarts: u32,
    /// Ends in a row that count against the back-off and the budget.
    failures: u32,
    /// Whether it outlives its creator.
    detached: bool,
    /// Whether it goes away at the end of what is under way.
    removing: bool,
    /// Whether it was ever up: a sandbox that was not leaves nothing behind when its start fails.
    ever_spawned: bool,
    /// No suspension before this moment: the last one failed.
    no_suspension_before_ms: u64,
}

impl Machine {
    /// A sandbox that has just been asked for.
    #[must_use]
    pub fn new(policy: Policy, detached: bool) -> Self {
        Self {
            state: State::Created,
            policy,
            restarts: 0,
            failures: 0,
            detached,
            removing: false,
            ever_spawned: false,
            no_suspension_before_ms: 0,
        }
    }

    /// A sandbox as the journal has it. The effects are what must be done first.
    #[must_use]
    pub fn recover(policy: Policy, stored: &Stored, now_ms: u64) -> (Self, Vec<Effect>) {
        let recovering = |run, shown, ending| State::Recovering { run, shown, ending };
        let state = match stored.state {
            State::Starting { run, abandon, .. } => {
                recovering(run, SandboxState::Starting, abandon.map(|cause| (cause, Then::Settle)))
            }
            State::Running { run, .. } => recovering(run, SandboxState::Running, None),
            State::Paused { run, .. } => recovering(run, SandboxState::Paused, None),
            // A machine whose writer is gone goes on.
            State::Suspending { run, .. } => recovering(run, SandboxState::Running, None),
            // The hook runs anew: whether it came to its end is not known.
            State::PreStop { run, cause, then, .. } | State::Draining { run, cause, then, .. } => {
                recovering(run, SandboxState::Draining, Some((cause, then)))
            }
            // Whether it stood until its end is not known: what was written down of it does not count.
            State::Stopping { run, cause, then: Then::Sleep, .. } => {
                recovering(run, SandboxState::Stopping, Some((cause, Then::Settle)))
            }
            State::Stopping { run, cause, then: Then::Wake, .. } => {
                recovering(run, SandboxState::Stopping, Some((cause, Then::Start)))
            }
            State::Stopping { run, cause, then, .. } => recovering(run, SandboxState::Stopping, Some((cause, then))),
            // The clock of another boot of the host says nothing here: the wait is over.
            State::Restarting { .. } => State::Restarting { at_ms: now_ms },
            // `always` comes back with the daemon even when somebody stopped it, as in docker.
            State::Stopped if policy.restart == RestartPolicy::Always && !stored.removing => {
                State::Restarting { at_ms: now_ms }
            }
            other => other,
        };
        let effects = match state {
            State::Recovering { .. } => vec![Effect::Adopt],
            State::Removed => vec![Effect::RemoveFiles],
            _ if stored.removing => vec![Effect::RemoveFiles],
            _ => Vec::new(),
        };
        let state = if stored.removing && !matches!(state, State::Recovering { .. }) { State::Removed } else { state };
        let machine = Self {
            state,
            policy,
            restarts: stored.restarts,
            failures: stored.failures,
            detached: stored.detached,
            removing: stored.removing,
            ever_spawned: stored.ever_spawned,
            no_suspension_before_ms: 0,
        };
        (machine, effects)
    }

    /// What the journal keeps.
    #[must_use]
    pub fn stored(&self) -> Stored {
        Stored {
            state: self.state,
            restarts: self.restarts,
            failures: self.failures,
            detached: self.detached,
            removing: self.removing,
            ever_spawned: self.ever_spawned,
        }
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// The state as clients see it.
    #[must_use]
    pub fn shown(&self) -> SandboxState {
        match self.state {
            State::Created => SandboxState::Created,
            State::Starting { .. } => SandboxState::Starting,
            State::Running { .. } => SandboxState::Running,
            State::Paused { .. } => SandboxState::Paused,
            State::PreStop { .. } | State::Draining { .. } => SandboxState::Draining,
            State::Suspending { .. } | State::Stopping { .. } => SandboxState::Stopping,
            State::Stopped | State::Removed => SandboxState::Stopped,
            State::Asleep { .. } => SandboxState::Asleep,
            State::Crashed => SandboxState::Crashed,
            State::Restarting { .. } => SandboxState::Restarting,
            State::Recovering { shown, .. } => shown,
        }
    }

    /// The run that is on.
    #[must_use]
    pub fn run(&self) -> Option<Run> {
        match self.state {
            State::Starting { run, .. }
            | State::Running { run, .. }
            | State::Paused { run, .. }
            | State::Suspending { run, .. }
            | State::PreStop { run, .. }
            | State::Draining { run, .. }
            | State::Stopping { run, .. }
            | State::Recovering { run, .. } => Some(run),
            _ => None,
        }
    }

    /// The run whose memory is kept, is being written down, or is being gone on with. Whatever else is on the disk counts for nothing.
    #[must_use]
    pub fn memory(&self) -> Option<BootId> {
        match self.state {
            State::Asleep { memory } => memory,
            State::Suspending { run, .. } | State::Stopping { run, then: Then::Sleep | Then::Wake, .. } => {
                Some(run.boot_id)
            }
            State::Starting { run, .. } | State::Recovering { run, shown: SandboxState::Starting, .. } => run.wakes,
            _ => None,
        }
    }

    /// Whether it is on its way to sleep and a need of it is met: it goes on where it is.
    #[must_use]
    pub fn is_falling_asleep(&self) -> bool {
        matches!(self.state, State::Suspending { .. } | State::Stopping { then: Then::Sleep | Then::Wake, .. })
    }

    /// Restarts since somebody last started it.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// Whether it outlives its creator.
    #[must_use]
    pub fn detached(&self) -> bool {
        self.detached
    }

    /// Whether it was ever up.
    #[must_use]
    pub fn ever_spawned(&self) -> bool {
        self.ever_spawned
    }

    /// Lets it outlive its creator.
    pub fn detach(&mut self) {
        self.detached = true;
    }

    /// When the next [`Event::Tick`] is due.
    #[must_use]
    pub fn deadline_ms(&self, last_activity_ms: Option<u64>) -> Option<u64> {
        match self.state {
            State::Running { ready_at_ms, .. } => {
                let lifetime = self.policy.max_duration_ms.map(|limit| ready_at_ms.saturating_add(limit));
                let idle =
                    self.policy.idle_timeout_ms.zip(last_activity_ms).map(|(limit, last)| {
                        last.max(ready_at_ms).saturating_add(limit).max(self.no_suspension_before_ms)
                    });
                [lifetime, idle].into_iter().flatten().min()
            }
            State::Paused { ready_at_ms, .. } => {
                self.policy.max_duration_ms.map(|limit| ready_at_ms.saturating_add(limit))
            }
            State::Suspending { ready_at_ms, until_ms, .. } => {
                let lifetime = self.policy.max_duration_ms.map(|limit| ready_at_ms.saturating_add(limit));
                Some(lifetime.map_or(until_ms, |lifetime| lifetime.min(until_ms)))
            }
            State::PreStop { until_ms, .. } | State::Draining { until_ms, .. } | State::Stopping { until_ms, .. } => {
                Some(until_ms)
            }
            State::Restarting { at_ms } => Some(at_ms),
            _ => None,
        }
    }

    /// One step.
    ///
    /// # Errors
    /// [`Denial`]; the machine is then as it was.
    pub fn step(&mut self, event: Event, at: Moment) -> Result<Vec<Effect>, Denial> {
        let before = self.stored();
        let mut effects = self.transition(event, at)?;
        if before != self.stored() {
            let cause = effects.iter().find_map(|effect| match effect {
                Effect::EndRun { cause, .. } => Some(*cause),
                _ => None,
            });
            effects.insert(0, Effect::Record { by: event.by(), cause });
        }
        Ok(effects)
    }

    fn transition(&mut self, event: Event, at: Moment) -> Result<Vec<Effect>, Denial> {
        let word = self.shown().as_str();
        match (self.state, event) {
            (State::Removed, Event::Start { .. } | Event::Stop { .. } | Event::Kill | Event::Remove { .. }) => {
                Err(Denial::Gone)
            }
            (State::Removed, _) => Ok(Vec::new()),

            // Up.
            (
                State::Created | State::Stopped | State::Asleep { .. } | State::Crashed | State::Restarting { .. },
                Event::Start { by, hold_main },
            ) => {
                if by == By::User {
                    (self.restarts, self.failures) = (0, 0);
                }
                let wakes = self.memory();
                Ok(self.begin_from(wakes, at, hold_main, by != By::User))
            }
            (State::Starting { .. } | State::Running { .. }, Event::Start { .. }) => Ok(Vec::new()),
            (State::Suspending { run, ready_at_ms, .. }, Event::Start { .. }) => {
                self.state = State::Running { run, ready_at_ms };
                Ok(vec![Effect::GoOn])
            }
            (State::Stopping { run, cause, then: Then::Sleep | Then::Wake, until_ms, ran_ms }, Event::Start { .. }) => {
                self.state = stopping(run, cause, Then::Wake, until_ms, ran_ms);
                Ok(Vec::new())
            }
            (State::Paused { .. }, Event::Start { .. }) => Err(Denial::Paused),
            (_, Event::Start { .. }) => Err(Denial::Busy(word)),
            (State::Restarting { at_ms }, Event::Tick { .. }) if at.now_ms >= at_ms => {
                self.restarts = self.restarts.saturating_add(1);
                Ok(self.begin(at, false, true))
            }

            // The phases of a start.
            (State::Starting { run, phase, abandon: None }, Event::PhaseDone(done)) if done > phase => {
                self.state = State::Starting { run, phase: done, abandon: None };
                Ok(match done {
                    StartPhase::Planned => Vec::new(),
                    StartPhase::ImageLeased => vec![Effect::MakeDisks],
                    StartPhase::DisksMade => vec![Effect::SpawnVm],
                    StartPhase::VmSpawned => {
                        self.ever_spawned = true;
                        vec![Effect::ReleaseImage]
                    }
                })
            }
            (State::Starting { run, phase, abandon: Some(cause) }, Event::PhaseDone(done)) if done > phase => {
                if done == StartPhase::VmSpawned {
                    self.ever_spawned = true;
                    self.state = stopping(run, cause, Then::Settle, at.now_ms.saturating_add(KILL_REPEAT_MS), 0);
                    Ok(vec![Effect::ReleaseImage, Effect::KillVm { cause }])
                } else {
                    Ok(self.undo(run, done, cause))
                }
            }
            // What was to go on boots from its disk instead.
            (State::Starting { run: run @ Run { wakes: Some(_), .. }, phase, abandon: None }, Event::PhaseFailed) => {
                let mut effects = vec![Effect::EndRun { boot_id: run.boot_id, cause: EndCause::BootFailed }];
                if phase >= StartPhase::ImageLeased {
                    effects.push(Effect::ReleaseImage);
                }
                effects.extend(self.begin(at, run.hold_main, run.by_policy));
                Ok(effects)
            }
            (
                State::Starting { run: run @ Run { wakes: Some(_), .. }, abandon: None, .. }
                | State::Recovering {
                    run: run @ Run { wakes: Some(_), .. },
                    shown: SandboxState::Starting,
                    ending: None,
                },
                Event::VmEnded { cause, .. },
            ) if !self.removing => {
                let mut effects = vec![Effect::EndRun { boot_id: run.boot_id, cause }];
                effects.extend(self.begin(at, run.hold_main, run.by_policy));
                Ok(effects)
            }
            (State::Starting { run, phase, abandon }, Event::PhaseFailed) => {
                Ok(self.undo(run, phase, abandon.unwrap_or(EndCause::BootFailed)))
            }
            (State::Starting { run, phase: StartPhase::VmSpawned, .. }, Event::AgentReady) => {
                self.state = State::Running { run, ready_at_ms: at.now_ms };
                Ok(Vec::new())
            }
            (State::Starting { run, phase: StartPhase::VmSpawned, abandon }, Event::VmEnded { cause, success }) => {
                let mut effects = vec![Effect::FailStart];
                effects.extend(self.settle(run, abandon, cause, success, Then::Settle, 0, at));
                Ok(effects)
            }

            // Halted, and on again.
            (State::Running { run, ready_at_ms }, Event::Paused) => {
                self.state = State::Paused { run, ready_at_ms };
                Ok(Vec::new())
            }
            (State::Paused { run, ready_at_ms }, Event::Resumed) => {
                self.state = State::Running { run, ready_at_ms };
                Ok(Vec::new())
            }
            (State::Paused { .. }, Event::Paused) | (State::Running { .. }, Event::Resumed) => Ok(Vec::new()),
            (_, Event::Paused | Event::Resumed) => Err(Denial::Busy(word)),
            // A halted guest cannot be asked for anything: it goes on and is then stopped as a running one.
            (
                State::Paused { run, ready_at_ms },
                Event::Stop { .. } | Event::HostStop | Event::CreatorGone | Event::Tick { .. } | Event::MainExited,
            ) => self.go_on_first(run, ready_at_ms, Effect::ResumeVm, event, at),

            // To sleep with its memory.
            (State::Suspending { run, ready_at_ms, .. }, Event::Suspended) => {
                let ran_ms = at.now_ms.saturating_sub(ready_at_ms);
                // Its process is given time to end by itself: what it says of its end is what its memory counts by.
                self.state =
                    stopping(run, EndCause::Idle, Then::Sleep, at.now_ms.saturating_add(FLUSH_LIMIT_MS), ran_ms);
                Ok(vec![Effect::KillVm { cause: EndCause::Idle }])
            }
            (State::Suspending { run, ready_at_ms, .. }, Event::SuspendFailed) => {
                self.state = State::Running { run, ready_at_ms };
                self.no_suspension_before_ms = at.now_ms.saturating_add(SUSPEND_AGAIN_MS);
                Ok(vec![Effect::GoOn])
            }
            (State::Suspending { until_ms, .. }, Event::Tick { .. }) if at.now_ms >= until_ms => {
                self.transition(Event::SuspendFailed, at)
            }
            // A machine that stands cannot be asked for anything: it goes on and is then stopped as a running one.
            (
                State::Suspending { run, ready_at_ms, .. },
                Event::Stop { .. }
                | Event::HostStop
                | Event::CreatorGone
                | Event::Tick { .. }
                | Event::MainExited
                | Event::Kill
                | Event::Remove { force: true }
                | Event::VmEnded { .. },
            ) => self.go_on_first(run, ready_at_ms, Effect::GoOn, event, at),

            // Down, with a flush.
            (State::Running { run, ready_at_ms }, Event::Stop { grace_ms, then }) => {
                Ok(self.drain(run, ready_at_ms, EndCause::StopRequested, grace_ms, then, at))
            }
            (State::Running { run, ready_at_ms }, Event::CreatorGone) if !self.detached => {
                Ok(self.drain(run, ready_at_ms, EndCause::CreatorGone, None, Then::Settle, at))
            }
            (State::Running { run, ready_at_ms }, Event::Unhealthy) if self.policy.restarts_unhealthy() => {
                Ok(self.drain(run, ready_at_ms, EndCause::Unhealthy, None, Then::Settle, at))
            }
            (State::Running { run, ready_at_ms }, Event::Tick { last_activity_ms }) => {
                let over = |limit: Option<u64>, since: Option<u64>| {
                    limit.zip(since).is_some_and(|(limit, since)| at.now_ms >= since.saturating_add(limit))
                };
                if over(self.policy.max_duration_ms, Some(ready_at_ms)) {
                    Ok(self.drain(run, ready_at_ms, EndCause::MaxDuration, None, Then::Settle, at))
                } else if over(self.policy.idle_timeout_ms, last_activity_ms.map(|last| last.max(ready_at_ms)))
                    && self.policy.on_idle == OnIdle::Suspend
                {
                    if at.now_ms < self.no_suspension_before_ms {
                        return Ok(Vec::new());
                    }
                    let until_ms = at.now_ms.saturating_add(SUSPEND_LIMIT_MS);
                    self.state = State::Suspending { run, ready_at_ms, until_ms };
                    Ok(vec![Effect::Suspend])
                } else if over(self.policy.idle_timeout_ms, last_activity_ms.map(|last| last.max(ready_at_ms))) {
                    Ok(self.drain(run, ready_at_ms, EndCause::Idle, None, Then::Settle, at))
                } else {
                    Ok(Vec::new())
                }
            }
            (State::Running { run, ready_at_ms }, Event::MainExited) => {
                let ran_ms = at.now_ms.saturating_sub(ready_at_ms);
                self.state =
                    stopping(run, EndCause::Completed, Then::Settle, at.now_ms.saturating_add(FLUSH_LIMIT_MS), ran_ms);
                Ok(Vec::new())
            }
            (State::PreStop { run, cause, then, grace_ms, ran_ms, .. }, Event::HookDone) => {
                Ok(self.shut_down(run, cause, grace_ms, then, ran_ms, at))
            }
            (State::PreStop { run, cause, then, grace_ms, until_ms, ran_ms }, Event::Tick { .. })
                if at.now_ms >= until_ms =>
            {
                Ok(self.shut_down(run, cause, grace_ms, then, ran_ms, at))
            }
            // The hook is not begun again, nor is its time cut short.
            (State::PreStop { run, until_ms, ran_ms, grace_ms, .. }, Event::Stop { grace_ms: own, then }) => {
                let (cause, grace_ms) = (EndCause::StopRequested, own.unwrap_or(grace_ms));
                self.state = State::PreStop { run, cause, then, grace_ms, until_ms, ran_ms };
                Ok(Vec::new())
            }
            (
                State::PreStop { run, cause, then, ran_ms, .. } | State::Draining { run, cause, then, ran_ms, .. },
                Event::MainExited,
            ) => {
                self.state = stopping(run, cause, then, at.now_ms.saturating_add(FLUSH_LIMIT_MS), ran_ms);
                Ok(Vec::new())
            }
            (State::Draining { run, cause, then, until_ms, ran_ms }, Event::Tick { .. }) if at.now_ms >= until_ms => {
                // The agent kills the workload at the same moment by its own clock and then flushes.
                self.state = stopping(run, cause, then, at.now_ms.saturating_add(FLUSH_LIMIT_MS), ran_ms);
                Ok(Vec::new())
            }
            (State::Stopping { run, cause, then, until_ms, ran_ms }, Event::Tick { .. }) if at.now_ms >= until_ms => {
                self.state = stopping(run, cause, then, at.now_ms.saturating_add(KILL_REPEAT_MS), ran_ms);
                let cause = if cause.is_crash() { cause } else { EndCause::Killed };
                Ok(vec![Effect::KillVm { cause }])
            }
            (State::Running { run, ready_at_ms }, Event::HostStop) => {
                Ok(self.drain(run, ready_at_ms, EndCause::HostShutdown, None, Then::Park, at))
            }
            (State::Starting { run, phase, .. }, Event::HostStop) => {
                Ok(self.abandon(run, phase, EndCause::HostShutdown, at))
            }
            (State::Restarting { .. }, Event::HostStop) => {
                self.state = State::Restarting { at_ms: u64::MAX };
                Ok(Vec::new())
            }
            // A person's stop outranks the stop under way: what it leads to is now that person's business.
            (State::Draining { run, until_ms, ran_ms, .. }, Event::Stop { grace_ms, then }) => {
                let until_ms = grace_ms.map_or(until_ms, |grace| until_ms.min(at.now_ms.saturating_add(grace)));
                self.state = State::Draining { run, cause: EndCause::StopRequested, then, until_ms, ran_ms };
                Ok(Vec::new())
            }
            (State::Stopping { run, until_ms, ran_ms, .. }, Event::Stop { then, .. }) => {
                self.state = stopping(run, EndCause::StopRequested, then, until_ms, ran_ms);
                Ok(Vec::new())
            }
            (
                State::Created | State::Stopped | State::Crashed | State::Asleep { .. } | State::Restarting { .. },
                Event::Stop { then: Then::Start, .. },
            ) => {
                (self.restarts, self.failures) = (0, 0);
                Ok(self.begin(at, false, false))
            }
            (State::Restarting { .. } | State::Asleep { .. }, Event::Stop { .. } | Event::Kill) => {
                Ok(self.rest(State::Stopped))
            }
            (State::Restarting { .. }, Event::CreatorGone) if !self.detached => Ok(self.rest(State::Stopped)),
            (State::Asleep { .. }, Event::CreatorGone) if !self.detached => Ok(self.rest(State::Stopped)),
            (State::Created | State::Stopped | State::Crashed, Event::Stop { .. } | Event::Kill) => Ok(Vec::new()),

            // Down, at once. A guest that is not up has nothing to flush.
            (State::Starting { run, phase, .. }, Event::Stop { .. } | Event::Kill) => {
                Ok(self.abandon(run, phase, EndCause::StopRequested, at))
            }
            (State::Starting { run, phase, .. }, Event::CreatorGone) if !self.detached => {
                Ok(self.abandon(run, phase, EndCause::CreatorGone, at))
            }
            (State::Running { run, ready_at_ms } | State::Paused { run, ready_at_ms }, Event::Kill) => {
                Ok(self.kill(run, EndCause::Killed, Then::Settle, at.now_ms.saturating_sub(ready_at_ms), at))
            }
            (
                State::PreStop { run, ran_ms, .. }
                | State::Draining { run, ran_ms, .. }
                | State::Stopping { run, ran_ms, .. },
                Event::Kill,
            ) => Ok(self.kill(run, EndCause::Killed, Then::Settle, ran_ms, at)),
            (State::Running { run, ready_at_ms }, Event::AgentSilent) => {
                Ok(self.kill(run, EndCause::AgentLost, Then::Settle, at.now_ms.saturating_sub(ready_at_ms), at))
            }

            // The end of a run.
            (
                State::Running { run, ready_at_ms } | State::Paused { run, ready_at_ms },
                Event::VmEnded { cause, success },
            ) => Ok(self.settle(run, None, cause, success, Then::Settle, at.now_ms.saturating_sub(ready_at_ms), at)),
            (
                State::PreStop { run, cause: wanted, then, ran_ms, .. }
                | State::Draining { run, cause: wanted, then, ran_ms, .. }
                | State::Stopping { run, cause: wanted, then, ran_ms, .. },
                Event::VmEnded { cause, success },
            ) => Ok(self.settle(run, Some(wanted), cause, success, then, ran_ms, at)),

            // A new daemon.
            (State::Recovering { run, ending: None, .. }, Event::Adopted { ready, paused }) => {
                self.ever_spawned = true;
                if self.removing {
                    return Ok(self.kill(run, EndCause::Killed, Then::Settle, 0, at));
                }
                self.state = if ready && paused {
                    State::Paused { run, ready_at_ms: at.now_ms }
                } else if ready {
                    State::Running { run, ready_at_ms: at.now_ms }
                } else {
                    State::Starting { run, phase: StartPhase::VmSpawned, abandon: None }
                };
                Ok(Vec::new())
            }
            (State::Recovering { run, ending: Some((cause, then)), .. }, Event::Adopted { ready, paused }) => {
                self.ever_spawned = true;
                if ready {
                    let mut effects = self.drain(run, at.now_ms, cause, None, then, at);
                    if paused {
                        effects.insert(0, Effect::ResumeVm);
                    }
                    Ok(effects)
                } else {
                    Ok(self.kill(run, cause, then, 0, at))
                }
            }
            (State::Recovering { run, shown, ending }, Event::VmEnded { cause, success }) => {
                if shown == SandboxState::Starting && !self.ever_spawned {
                    return Ok(self.undo(run, StartPhase::DisksMade, cause));
                }
                let (wanted, then) = ending.map_or((None, Then::Settle), |(cause, then)| (Some(cause), then));
                Ok(self.settle(run, wanted, cause, success, then, 0, at))
            }
            (State::Recovering { .. }, Event::Stop { .. } | Event::Kill | Event::Remove { force: true }) => {
                Err(Denial::Busy(word))
            }

            // Away.
            (
                State::Created | State::Stopped | State::Asleep { .. } | State::Crashed | State::Restarting { .. },
                Event::Remove { .. },
            ) => {
                self.removing = true;
                Ok(self.rest(State::Stopped))
            }
            (_, Event::Remove { force: false }) => Err(Denial::StillRunning(word)),
            (State::Starting { run, phase, .. }, Event::Remove { force: true }) => {
                self.removing = true;
                Ok(self.abandon(run, phase, EndCause::Killed, at))
            }
            (
                State::Running { run, .. }
                | State::Paused { run, .. }
                | State::PreStop { run, .. }
                | State::Draining { run, .. }
                | State::Stopping { run, .. },
                Event::Remove { force: true },
            ) => {
                self.removing = true;
                Ok(self.kill(run, EndCause::Killed, Then::Settle, 0, at))
            }

            // Late or early news of something that is no longer so.
            (
                _,
                Event::PhaseDone(_)
                | Event::PhaseFailed
                | Event::AgentReady
                | Event::MainExited
                | Event::VmEnded { .. }
                | Event::CreatorGone
                | Event::Unhealthy
                | Event::HookDone
                | Event::HostStop
                | Event::AgentSilent
                | Event::Suspended
                | Event::SuspendFailed
                | Event::Tick { .. }
                | Event::Adopted { .. },
            ) => Ok(Vec::new()),
        }
    }

    /// Takes an event as if the machine that stands ran. Unless it is to run on as before, it goes on first, where there is still one.
    fn go_on_first(
        &mut self,
        run: Run,
        ready_at_ms: u64,
        go_on: Effect,
        event: Event,
        at: Moment,
    ) -> Result<Vec<Effect>, Denial> {
        let standing = std::mem::replace(&mut self.state, State::Running { run, ready_at_ms });
        // While it stands nothing is active and nothing is idle.
        let event = if matches!(event, Event::Tick { .. }) { Event::Tick { last_activity_ms: None } } else { event };
        let mut effects = self.transition(event, at)?;
        if let State::Running { .. } = self.state {
            self.state = standing;
        } else if !matches!(event, Event::VmEnded { .. }) {
            effects.insert(0, go_on);
        }
        Ok(effects)
    }

    fn begin(&mut self, at: Moment, hold_main: bool, by_policy: bool) -> Vec<Effect> {
        self.begin_from(None, at, hold_main, by_policy)
    }

    fn begin_from(&mut self, wakes: Option<BootId>, at: Moment, hold_main: bool, by_policy: bool) -> Vec<Effect> {
        let run = Run { boot_id: at.next_boot_id, hold_main, by_policy, wakes };
        self.state = State::Starting { run, phase: StartPhase::Planned, abandon: None };
        vec![Effect::LeaseImage]
    }

    /// Takes apart what the phases before the VM made, newest first.
    fn undo(&mut self, run: Run, phase: StartPhase, cause: EndCause) -> Vec<Effect> {
        let mut effects = vec![Effect::FailStart, Effect::EndRun { boot_id: run.boot_id, cause }];
        if phase >= StartPhase::ImageLeased {
            effects.push(Effect::ReleaseImage);
        }
        // Disks are a part of the sandbox once it ran; before that they vanish with it.
        if !self.ever_spawned {
            self.removing = true;
        }
        let rest = if cause.is_crash() { State::Crashed } else { State::Stopped };
        effects.extend(self.rest(rest));
        effects
    }

    fn abandon(&mut self, run: Run, phase: StartPhase, cause: EndCause, at: Moment) -> Vec<Effect> {
        if phase == StartPhase::VmSpawned {
            let mut effects = vec![Effect::FailStart];
            effects.extend(self.kill(run, cause, Then::Settle, 0, at));
            return effects;
        }
        self.state = State::Starting { run, phase, abandon: Some(cause) };
        Vec::new()
    }

    fn drain(
        &mut self,
        run: Run,
        ready_at_ms: u64,
        cause: EndCause,
        grace_ms: Option<u64>,
        then: Then,
        at: Moment,
    ) -> Vec<Effect> {
        let grace_ms = grace_ms.unwrap_or(self.policy.stop_grace_ms);
        let ran_ms = at.now_ms.saturating_sub(ready_at_ms);
        if let Some(budget_ms) = self.policy.pre_stop_ms {
            let until_ms = at.now_ms.saturating_add(budget_ms);
            self.state = State::PreStop { run, cause, then, grace_ms, until_ms, ran_ms };
            return vec![Effect::RunHook];
        }
        self.shut_down(run, cause, grace_ms, then, ran_ms, at)
    }

    fn shut_down(
        &mut self,
        run: Run,
        cause: EndCause,
        grace_ms: u64,
        then: Then,
        ran_ms: u64,
        at: Moment,
    ) -> Vec<Effect> {
        let until_ms = at.now_ms.saturating_add(grace_ms);
        self.state = State::Draining { run, cause, then, until_ms, ran_ms };
        vec![Effect::Shutdown { cause, grace_ms }]
    }

    fn kill(&mut self, run: Run, cause: EndCause, then: Then, ran_ms: u64, at: Moment) -> Vec<Effect> {
        self.state = stopping(run, cause, then, at.now_ms.saturating_add(KILL_REPEAT_MS), ran_ms);
        vec![Effect::KillVm { cause }]
    }

    /// What follows an end. The only place that asks the policies.
    #[expect(clippy::too_many_arguments, reason = "each is one fact of the end, and all of them decide")]
    fn settle(
        &mut self,
        run: Run,
        wanted: Option<EndCause>,
        seen: EndCause,
        success: bool,
        then: Then,
        ran_ms: u64,
        at: Moment,
    ) -> Vec<Effect> {
        // What was seen is told; what was wanted decides what follows.
        let told = match wanted {
            Some(wanted) if !seen.is_crash() && seen != EndCause::Killed => wanted,
            _ => seen,
        };
        let decisive = wanted.unwrap_or(seen);
        let mut effects = vec![Effect::EndRun { boot_id: run.boot_id, cause: told }];
        if ran_ms >= STEADY_AFTER_MS {
            self.failures = 0;
        }
        if self.removing {
            effects.extend(self.rest(State::Stopped));
            return effects;
        }
        // Only a machine that stood until its VM process itself ended it is as it was written down.
        let memory = (seen == EndCause::Idle && matches!(then, Then::Sleep | Then::Wake)).then_some(run.boot_id);
        if matches!(then, Then::Start | Then::Wake) {
            (self.restarts, self.failures) = (0, 0);
            effects.extend(self.begin_from(memory, at, false, false));
            return effects;
        }
        let verdict = match decisive {
            EndCause::Idle => match self.policy.on_idle {
                OnIdle::Stop | OnIdle::Suspend => State::Asleep { memory },
                OnIdle::Restart => State::Restarting { at_ms: at.now_ms },
            },
            EndCause::StopRequested | EndCause::Killed | EndCause::MaxDuration | EndCause::CreatorGone => {
                State::Stopped
            }
            EndCause::Completed => self.after_exit(success, at),
            EndCause::HostShutdown => match (self.policy.restart, then) {
                // Never by this daemon: the next one finds it waiting.
                (RestartPolicy::Always | RestartPolicy::UnlessStopped, Then::Park) => {
                    State::Restarting { at_ms: u64::MAX }
                }
                (RestartPolicy::Always | RestartPolicy::UnlessStopped, _) => State::Restarting { at_ms: at.now_ms },
                _ => State::Stopped,
            },
            // A first start that fails is its caller's business; a later one is the policy's.
            EndCause::BootFailed if !run.by_policy => State::Crashed,
            _ => self.after_crash(at),
        };
        match verdict {
            State::Restarting { .. } => self.state = verdict,
            rest => effects.extend(self.rest(rest)),
        }
        effects
    }

    fn after_exit(&mut self, success: bool, at: Moment) -> State {
        match self.policy.restart {
            RestartPolicy::Default | RestartPolicy::No => State::Stopped,
            RestartPolicy::OnFailure { .. } if success => State::Stopped,
            RestartPolicy::OnFailure { max_retries } => self.back_off(max_retries, State::Stopped, at),
            RestartPolicy::Always | RestartPolicy::UnlessStopped => self.back_off(None, State::Stopped, at),
        }
    }

    fn after_crash(&mut self, at: Moment) -> State {
        match self.policy.restart {
            RestartPolicy::Default if self.detached => self.back_off(Some(CRASH_BUDGET), State::Crashed, at),
            RestartPolicy::Default | RestartPolicy::No => State::Crashed,
            RestartPolicy::OnFailure { max_retries } => self.back_off(max_retries, State::Crashed, at),
            RestartPolicy::Always | RestartPolicy::UnlessStopped => self.back_off(None, State::Crashed, at),
        }
    }

    fn back_off(&mut self, budget: Option<u32>, spent: State, at: Moment) -> State {
        if budget.is_some_and(|budget| self.failures >= budget) {
            return spent;
        }
        let wait_ms = back_off_ms(self.failures);
        self.failures = self.failures.saturating_add(1);
        State::Restarting { at_ms: at.now_ms.saturating_add(wait_ms) }
    }

    fn rest(&mut self, state: State) -> Vec<Effect> {
        // Sleep is not an end: an ephemeral sandbox that sleeps is still wanted.
        if self.removing || (self.policy.ephemeral && !matches!(state, State::Asleep { .. })) {
            self.removing = true;
            self.state = State::Removed;
            return vec![Effect::RemoveFiles];
        }
        self.state = state;
        Vec::new()
    }
}

/// The wait before a restart after this many failures in a row, in milliseconds.
#[must_use]
pub fn back_off_ms(failures: u32) -> u64 {
    BACK_OFF_FIRST_MS.checked_shl(failures.min(20)).unwrap_or(BACK_OFF_MAX_MS).min(BACK_OFF_MAX_MS)
}

fn stopping(run: Run, cause: EndCause, then: Then, until_ms: u64, ran_ms: u64) -> State {
    State::Stopping { run, cause, then, until_ms, ran_ms }
}

#[cfg(test)]
mod tests;
