//! Sandboxes: how they are made and changed, and what is told of them. Part of the control API ([`super`]).

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::NetworkDetail;
use crate::health::{HealthReport, HealthStatus};
use crate::id::{BootId, SandboxId, SandboxName};
use crate::spec::{EngineChoice, SandboxSpec};
use crate::state::{EndCause, ProcessEnd, SandboxState};
use crate::vmm::{BootError, JailReport, Phase};

/// A sandbox to create.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    /// What it is made of.
    pub spec: SandboxSpec,
    /// Whether the main workload waits for `GET …/main` (so that no output is lost) instead of starting by itself.
    #[serde(default)]
    pub hold_main: bool,
    /// Remove an existing sandbox of this name first, giving it this many milliseconds to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace_grace_ms: Option<u64>,
    /// When to fetch the image from its registry.
    #[serde(default)]
    pub pull: crate::images::PullPolicy,
}

/// How to start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// As in [`CreateRequest::hold_main`].
    #[serde(default)]
    pub hold_main: bool,
}

/// How to stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Time between the stop signal and the kill in milliseconds; the sandbox's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_ms: Option<u64>,
    /// Kill at once, without a flush.
    #[serde(default)]
    pub force: bool,
}

/// Labels to change; those named in neither stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    /// Set these.
    #[serde(default)]
    pub set: BTreeMap<String, String>,
    /// Remove these; one that is not there is no error.
    #[serde(default)]
    pub remove: Vec<String>,
}

/// Sandboxes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxList {
    /// Newest first.
    pub sandboxes: Vec<SandboxSummary>,
    /// Where a limit cut the list: the `after` of the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<SandboxId>,
}

/// Most sandboxes of one page.
pub const PAGE_LEN_MAX: usize = 1000;

/// Which sandboxes a list holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    /// Terms that all must fit: `KEY=VALUE` or `KEY`.
    pub labels: Vec<String>,
    /// Expressions that all must fit: `team in (ml,web),!debug`.
    pub selectors: Vec<String>,
    /// At most so many, 1 to [`PAGE_LEN_MAX`]; all of them if absent.
    pub limit: Option<usize>,
    /// Only those after the page that ended with this [`SandboxList::next`]. It stays good when sandboxes are made and removed meanwhile.
    pub after: Option<SandboxId>,
}

/// An agent's sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PingReport {
    /// The run that answered.
    pub boot_id: BootId,
    /// From the service to the agent and back, in microseconds.
    pub round_trip_us: u64,
}

/// One sandbox in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxSummary {
    /// Its name.
    pub name: SandboxName,
    /// Its identity.
    pub id: SandboxId,
    /// Its state.
    pub status: SandboxState,
    /// The image as the user wrote it.
    pub image: String,
    /// The main workload's words; empty if it has none.
    pub command: Vec<String>,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When its present or last run became ready.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// How its last run ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<RunEnd>,
    /// Restarts since somebody last started it.
    pub restarts: u32,
    /// Published ports as text, with the host ports that were bound; none while it rests and is not asleep.
    pub ports: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The engine of its present or last run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineChoice>,
    /// What its health checks say of the present run, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthStatus>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RunEnd {
    /// The run.
    pub boot_id: BootId,
    /// Why the VM ended.
    pub cause: EndCause,
    /// How the main workload ended, if it had one and it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<ProcessEnd>,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
}

/// Everything about one sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SandboxDetail {
    /// What a list shows.
    #[serde(flatten)]
    pub summary: SandboxSummary,
    /// What it is made of.
    pub spec: SandboxSpec,
    /// Digest of the image's manifest; the path of a root that is no image.
    pub image_digest: String,
    /// The present run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<BootId>,
    /// The VM process on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_pid: Option<u32>,
    /// Why this engine, when `auto` picked it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_reason: Option<String>,
    /// Durations of the last boot's phases.
    pub boot_phases: Vec<Phase>,
    /// What confines the VM process.
    pub jail: JailReport,
    /// What the security profile comes to.
    #[serde(default)]
    pub security: crate::security::SecurityReport,
    /// Its network.
    #[serde(default)]
    pub network: NetworkDetail,
    /// Bytes the host allocates for its writable disk.
    pub root_allocated_bytes: u64,
    /// Bytes the host allocates for the memory that it sleeps with (`on_idle: suspend`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_allocated_bytes: Option<u64>,
    /// Its directory.
    pub directory: String,
    /// Its heartbeat file.
    pub heartbeat_file: String,
    /// When state `restarting` tries again.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try_at: Option<Timestamp>,
    /// Time without activity in milliseconds, if it has an idle timeout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_for_ms: Option<u64>,
    /// Time until it stops for idleness in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stops_in_ms: Option<u64>,
    /// What counted as activity last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_activity: Option<String>,
    /// The evidence, if its last boot failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_error: Option<BootError>,
    /// What its health checks say, with the last one's output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_report: Option<HealthReport>,
}
