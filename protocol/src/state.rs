//! What state a sandbox is in, how a process ended and why a virtual machine ended: the words clients see.

use serde::{Deserialize, Serialize};

/// The state of a sandbox as clients see it. The machine behind it is `actors/src/sandbox/machine.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Recorded, never started.
    Created,
    /// Its disks are being made or its VM is booting.
    Starting,
    /// The agent answers.
    Running,
    /// Halted where it is: its memory is kept, nothing in it runs.
    Paused,
    /// Told to end; its workload has been given its grace time.
    Draining,
    /// The guest flushes its disks and turns itself off.
    Stopping,
    /// At rest; only a person or a policy starts it again.
    Stopped,
    /// Stopped by idleness; wakes on demand.
    Asleep,
    /// Waiting for the next try after a crash.
    Restarting,
    /// Its last run ended without having been asked to, and no further try is due.
    Crashed,
}

impl SandboxState {
    /// The state as text, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Asleep => "asleep",
            Self::Restarting => "restarting",
            Self::Crashed => "crashed",
        }
    }

    /// Whether a VM process exists or is about to.
    #[must_use]
    pub fn is_live(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Paused | Self::Draining | Self::Stopping)
    }

    /// Whether the sandbox may be removed as it is.
    #[must_use]
    pub fn is_resting(self) -> bool {
        matches!(self, Self::Created | Self::Stopped | Self::Asleep | Self::Crashed)
    }
}

/// How a process in the guest ended. Exactly one of `code` and `signal` is set (wait(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ProcessEnd {
    /// Exit code, 0 to 255.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub code: Option<i32>,
    /// The signal that killed it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub signal: Option<i32>,
    /// Whether it left a core dump.
    #[serde(default)]
    pub core_dumped: bool,
    /// Whether the kernel killed it for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Whether msb killed it at its `--timeout`.
    #[serde(default)]
    pub timed_out: bool,
}

impl ProcessEnd {
    /// An ordinary exit.
    #[must_use]
    pub fn exited(code: i32) -> Self {
        Self { code: Some(code), ..Self::default() }
    }

    /// A death by signal.
    #[must_use]
    pub fn signalled(signal: i32) -> Self {
        Self { signal: Some(signal), ..Self::default() }
    }

    /// The exit status a shell would show: 124 for a time-out, the code, or 128 + signal.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        if self.timed_out {
            return 124;
        }
        let status = match (self.code, self.signal) {
            (Some(code), _) => code & 0xff,
            (None, Some(signal)) => (128 + signal) & 0xff,
            (None, None) => 125,
        };
        u8::try_from(status).unwrap_or(125)
    }

    /// Whether it ended well.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == Some(0) && !self.timed_out
    }
}

/// Why a virtual machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndCause {
    /// The main workload ended by itself.
    Completed,
    /// Somebody asked for a stop.
    StopRequested,
    /// Somebody asked for a kill, or the grace time ran out.
    Killed,
    /// Nothing happened in it for its idle timeout.
    Idle,
    /// It reached its maximum duration.
    MaxDuration,
    /// The process that created it (attached) is gone.
    CreatorGone,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The guest reset itself without a goodbye.
    GuestReboot,
    /// The guest halted: its vCPUs stopped for good.
    GuestHalted,
    /// The agent stopped answering.
    AgentLost,
    /// It never came up.
    BootFailed,
    /// The VM process crashed or was killed from outside.
    VmmCrash,
    /// The engine's own process (QEMU) crashed or was killed from outside.
    EngineCrash,
    /// The host went down.
    HostShutdown,
    /// A health check said so.
    Unhealthy,
}

impl EndCause {
    /// Whether this end is a crash in the sense of restarts: nobody asked for it and the workload did not end by itself.
    #[must_use]
    pub fn is_crash(self) -> bool {
        matches!(
            self,
            Self::GuestPanic
                | Self::GuestReboot
                | Self::GuestHalted
                | Self::AgentLost
                | Self::BootFailed
                | Self::VmmCrash
                | Self::EngineCrash
        )
    }

    /// The cause as text, as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::StopRequested => "stop_requested",
            Self::Killed => "killed",
            Self::Idle => "idle",
            Self::MaxDuration => "max_duration",
            Self::CreatorGone => "creator_gone",
            Self::GuestPanic => "guest_panic",
            Self::GuestReboot => "guest_reboot",
            Self::GuestHalted => "guest_halted",
            Self::AgentLost => "agent_lost",
            Self::BootFailed => "boot_failed",
            Self::VmmCrash => "vmm_crash",
            Self::EngineCrash => "engine_crash",
            Self::HostShutdown => "host_shutdown",
            Self::Unhealthy => "unhealthy",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_are_what_a_shell_shows() {
        for (end, status) in [
            (ProcessEnd::exited(0), 0),
            (ProcessEnd::exited(7), 7),
            (ProcessEnd::exited(255), 255),
            (ProcessEnd::signalled(9), 137),
            (ProcessEnd { timed_out: true, ..ProcessEnd::signalled(9) }, 124),
            (ProcessEnd::default(), 125),
        ] {
            assert_eq!(end.exit_status(), status, "{end:?}");
        }
    }

    #[test]
    fn texts_are_those_of_json() {
        use SandboxState::*;
        for state in [Created, Starting, Running, Paused, Draining, Stopping, Stopped, Asleep, Restarting, Crashed] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        use EndCause::*;
        for cause in [
            Completed,
            StopRequested,
            Killed,
            Idle,
            MaxDuration,
            CreatorGone,
            GuestPanic,
            GuestReboot,
            GuestHalted,
            AgentLost,
            BootFailed,
            VmmCrash,
            EngineCrash,
            HostShutdown,
            Unhealthy,
        ] {
            assert_eq!(serde_json::to_value(cause).unwrap(), cause.as_str());
        }
    }
}
