//! Named volumes as the control API shows them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::id::SandboxName;
use crate::mount::{MountOptions, VolumeKind};

/// Asks for a new volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SandboxName,
    /// Its kind.
    #[serde(default)]
    pub kind: VolumeKind,
    /// Size of a disk in MiB; none: [`crate::mount::VOLUME_SIZE_MIB_DEFAULT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_mib: Option<u32>,
}

/// A named volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VolumeDetail {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SandboxName,
    /// Its kind.
    pub kind: VolumeKind,
    /// Size of a disk in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Bytes the host allocates for it; of a directory with very many files those of the first ones.
    pub allocated_bytes: u64,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Where it is on the host.
    pub path: String,
    /// Sandboxes that mount it, running or not.
    pub users: Vec<VolumeUser>,
}

/// A sandbox that mounts a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VolumeUser {
    /// The sandbox.
    #[schema(value_type = String)]
    pub sandbox: SandboxName,
    /// Where it has it.
    pub target: String,
    /// How, with what its security profile forces.
    pub options: MountOptions,
}

/// Every volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VolumeList {
    /// By name.
    pub volumes: Vec<VolumeDetail>,
}
