//! What others see of a sandbox: published by its actor after a change is durable, read without asking the actor.

use jiff::Timestamp;
use msb_protocol::control::{NetworkDetail, SandboxDetail, SandboxSummary};
use msb_protocol::error::ApiError;
use msb_protocol::fleet::Who;
use msb_protocol::id::BootId;
use msb_protocol::network::NetworkSpec;
use msb_protocol::state::SandboxState;

use super::directories::Directories;
use super::machine::{Machine, State};
use crate::journal::SandboxRecord;

/// A sandbox as of its last durable change.
#[derive(Clone, Debug)]
pub struct View {
    /// What the API shows.
    pub detail: SandboxDetail,
    /// How often it became ready since the daemon started: who waits for a start sees it go up even if the run was short.
    pub runs_ready: u64,
    /// How often a start failed.
    pub starts_failed: u64,
    /// Why the last one did.
    pub failure: Option<ApiError>,
    /// It is removed.
    pub gone: bool,
    /// A new daemon does not know yet whether its VM lives.
    pub recovering: bool,
    /// The run whose memory is kept while it sleeps.
    pub memory: Option<BootId>,
    /// It is on its way to sleep with its memory: a start makes it go on.
    pub falling_asleep: bool,
    /// The actor that published this has died; its next incarnation will say more.
    pub orphaned: bool,
    /// What compact metrics say of it beside its figures ([`who`]): made once, told each second.
    pub metrics_who: Vec<u8>,
}

impl View {
    /// Whether it rests and will not go on by itself.
    #[must_use]
    pub fn rests(&self) -> bool {
        self.gone || (!self.recovering && self.state().is_resting())
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> SandboxState {
        self.detail.summary.status
    }
}

/// Whether published ports are bound in a state: from the boot until the sandbox rests, and while it sleeps.
#[must_use]
pub fn holds_ports(state: SandboxState) -> bool {
    !matches!(state, SandboxState::Created | SandboxState::Stopped | SandboxState::Crashed)
}

fn network(spec: &NetworkSpec) -> NetworkDetail {
    if spec.enabled {
        NetworkDetail { addresses: Some(spec.addresses()), policy: spec.policy_lines() }
    } else {
        NetworkDetail::default()
    }
}

/// What metrics say of a sandbox beside its figures.
#[must_use]
pub fn who(detail: &SandboxDetail) -> Who<'_> {
    let summary = &detail.summary;
    Who {
        name: &summary.name,
        id: summary.id,
        status: summary.status,
        labels: &summary.labels,
        restarts: summary.restarts,
        created_at: summary.created_at,
        boot_phases: &detail.boot_phases,
    }
}

/// What the API shows of a record.
#[must_use]
pub fn detail(
    record: &SandboxRecord,
    machine: &Machine,
    directories: &Directories,
    next_try_at: Option<Timestamp>,
) -> SandboxDetail {
    let live = machine.run().is_some();
    SandboxDetail {
        summary: SandboxSummary {
            name: record.name.clone(),
            id: record.id,
            status: machine.shown(),
            image: record.spec.image.clone(),
            command: record.command.clone(),
            created_at: record.created_at,
            started_at: record.started_at,
            last_end: record.last_end.clone(),
            restarts: machine.restarts(),
            ports: if holds_ports(machine.shown()) {
                record.ports.iter().map(ToString::to_string).collect()
            } else {
                Vec::new()
            },
            labels: record.labels.clone(),
            engine: record.engine,
            health: None,
        },
        spec: record.spec.clone(),
        image_digest: record.image_digest.clone(),
        boot_id: machine.run().map(|run| run.boot_id),
        vmm_pid: record.vmm.as_ref().filter(|_| live).map(|identity| identity.pid),
        engine_reason: record.engine_reason.clone(),
        boot_phases: record.boot_phases.clone(),
        jail: record.jail.clone(),
        network: network(&record.spec.network),
        security: record.spec.security.report(),
        root_allocated_bytes: 0,
        memory_allocated_bytes: None,
        directory: directories.root.display().to_string(),
        heartbeat_file: directories.heartbeat.display().to_string(),
        next_try_at: matches!(machine.state(), State::Restarting { .. }).then_some(next_try_at).flatten(),
        idle_for_ms: None,
        stops_in_ms: None,
        last_activity: None,
        boot_error: record.boot_error.clone(),
        health_report: None,
    }
}
