//! What a service is and what its host can do; its tree of actors and the state of its store. Part of the control API ([`super`]).

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::vmm::ProbeReport;

/// What a service is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VersionInfo {
    /// Version of the daemon.
    pub version: String,
    /// Version of the control API.
    pub api_version: u32,
    /// Newest generation of the guest border.
    pub guest_generation: u32,
    /// Process id of the daemon.
    pub pid: u32,
    /// When it started.
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
}

/// What the host can do, as the daemon sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostInfo {
    /// The daemon.
    pub service: VersionInfo,
    /// MSB_HOME.
    pub home: String,
    /// Directory of sockets.
    pub runtime_dir: String,
    /// Directory of kernel, initramfs and templates.
    pub share_dir: String,
    /// Kernel in use.
    pub kernel: String,
    /// Engines.
    pub probe: ProbeReport,
    /// Sandboxes by state.
    pub sandboxes: BTreeMap<String, u64>,
    /// Free bytes of the home's file system.
    pub home_free_bytes: u64,
}

/// How the service ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// Stop every sandbox first, with a flush, as for a host that goes down: those with the restart policies `always` and
    /// `unless-stopped` come back when the service starts again.
    #[serde(default)]
    pub sandboxes: bool,
}

/// What a check of the store found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct StoreReport {
    /// Images checked.
    pub images: u64,
    /// Blobs checked.
    pub blobs: u64,
    /// Bytes of the images' blobs, each counted once.
    pub bytes: u64,
    /// What is wrong; empty if nothing.
    pub problems: Vec<String>,
}

/// The actors of a daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ActorTree {
    /// One row for each actor, parents before children.
    pub actors: Vec<ActorRow>,
}

/// One actor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ActorRow {
    /// Its name: `supervisor`, `sandbox/web`, `metrics`, `images`.
    pub name: String,
    /// Its parent's name; empty for the root.
    pub parent: String,
    /// Messages handled.
    pub handled: u64,
    /// Messages waiting.
    pub mailbox: u64,
    /// How often it was rebuilt.
    pub restarts: u32,
    /// Why it was last rebuilt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_cause: Option<String>,
    /// Its state, for people.
    pub state: String,
}
