//! Figures: the newest of the whole fleet, and those of one sandbox over time. Part of the control API ([`super`]).

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::{BootId, SandboxId, SandboxName};
use crate::state::SandboxState;
use crate::vmm::{Phase, Sample};

/// The newest sample of every sandbox that runs, and the last one of each that ended since the request before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MetricsSnapshot {
    /// Stable identity of the host (machine-id(5), hashed for this application), so that two hosts never collide.
    pub host_id: String,
    /// The host's name.
    pub host_name: String,
    /// Identity of this service on this host; stays the same across its restarts.
    pub instance_id: String,
    /// When the snapshot was taken.
    #[schema(value_type = String, format = DateTime)]
    pub taken_at: Timestamp,
    /// Sandboxes by state.
    pub states: BTreeMap<String, u64>,
    /// Ready forks by template.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ready_forks: BTreeMap<String, u64>,
    /// The samples, by name.
    pub sandboxes: Vec<SandboxMetrics>,
}

/// The newest sample of one sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxMetrics {
    /// Its name.
    pub name: SandboxName,
    /// Its identity.
    pub id: SandboxId,
    /// The run the sample is of.
    pub boot_id: BootId,
    /// The VM process on the host; 0 once it is gone.
    pub vmm_pid: u32,
    /// Its state.
    pub status: SandboxState,
    /// Labels as they are now.
    pub labels: BTreeMap<String, String>,
    /// Restarts since somebody last started it.
    pub restarts: u32,
    /// When the sandbox was created.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When this run's counters began at zero.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    /// Whether this is the last sample of a run that ended.
    pub last: bool,
    /// Counters of the VM.
    #[schema(value_type = Object)]
    pub sample: Sample,
    /// vCPU seconds per second between the last two samples.
    pub cpu_utilization: f64,
    /// What the guest says of itself; absent before its first beat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestMetrics>,
    /// Durations of the boot's phases.
    pub boot_phases: Vec<Phase>,
}

/// How to read metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetricsQuery {
    /// Only these sandboxes, if any is named.
    pub names: Vec<String>,
    /// Only those whose labels fit every term.
    pub labels: Vec<String>,
    /// Only those that fit every expression.
    pub selectors: Vec<String>,
}

/// How to read the history of one sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct HistoryQuery {
    /// Only this long ago, in milliseconds; an hour is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_ms: Option<u64>,
    /// At most so many points, evenly spread (600 if not given, 36,000 at most).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub points_max: Option<u32>,
}

/// The last hour of one sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct MetricsHistory {
    /// Its name.
    pub name: SandboxName,
    /// Its identity.
    pub id: SandboxId,
    /// Oldest first.
    pub points: Vec<HistoryPoint>,
}

/// One moment of a sandbox. Counters are cumulative since the boot of their run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HistoryPoint {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// The run.
    pub boot_id: BootId,
    /// vCPU seconds per second since the point before.
    pub cpu_utilization: f64,
    /// Time the vCPUs ran, in microseconds.
    pub cpu_time_us: u64,
    /// Memory of the guest that the host holds, in bytes.
    pub memory_resident_bytes: u64,
    /// Memory the guest was given, in bytes.
    pub memory_limit_bytes: u64,
    /// Bytes read from all disks.
    pub disk_read_bytes: u64,
    /// Bytes written to all disks.
    pub disk_written_bytes: u64,
    /// Requests to all disks.
    pub disk_operations: u64,
    /// Bytes the guest received.
    pub network_received_bytes: u64,
    /// Bytes the guest sent.
    pub network_sent_bytes: u64,
    /// Packets in both directions.
    pub network_packets: u64,
    /// Bytes the host allocates for the writable disk.
    pub root_allocated_bytes: u64,
    /// What the guest said of itself, absent before its first beat; `memory_total_bytes` is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestMetrics>,
}

/// What a guest says of itself in its beat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct GuestMetrics {
    /// Memory in use in bytes.
    pub memory_used_bytes: u64,
    /// Memory its kernel has in bytes.
    pub memory_total_bytes: u64,
    /// Bytes used on the writable root.
    pub root_used_bytes: u64,
    /// Bytes free on the writable root.
    pub root_free_bytes: u64,
    /// Processes of the workload.
    pub processes: u32,
}
