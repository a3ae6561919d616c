//! What the journal keeps of a sandbox, and the envelope around it that tells damage from data.

use std::collections::BTreeMap;

use jiff::Timestamp;
use msb_protocol::control::RunEnd;
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::network::PublishedPort;
use msb_protocol::snapshot::{SnapshotManifest, SnapshotParent};
use msb_protocol::spec::{EngineChoice, SandboxSpec};
use msb_protocol::state::{EndCause, SandboxState};
use msb_protocol::vmm::{BootError, JailReport, Phase};
use serde::{Deserialize, Serialize};

use crate::identity::ProcessIdentity;
use crate::sandbox::machine::Stored;

/// Everything a daemon needs to know of a sandbox after it was restarted. Fields are only ever added, with defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Its identity.
    pub id: SandboxId,
    /// Its name.
    pub name: SandboxName,
    /// What it is made of.
    pub spec: SandboxSpec,
    /// The image's labels and the spec's over them.
    pub labels: BTreeMap<String, String>,
    /// Digest of the image's manifest; empty before it was found.
    pub image_digest: String,
    /// The main workload's words, for lists.
    #[serde(default)]
    pub command: Vec<String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When its present or last run became ready.
    #[serde(default)]
    pub started_at: Option<Timestamp>,
    /// Where it is.
    pub machine: Stored,
    /// The VM process.
    #[serde(default)]
    pub vmm: Option<ProcessIdentity>,
    /// The creator, if it is attached.
    #[serde(default)]
    pub creator: Option<ProcessIdentity>,
    /// How the last run ended.
    #[serde(default)]
    pub last_end: Option<RunEnd>,
    /// The evidence, if the last boot failed.
    #[serde(default)]
    pub boot_error: Option<BootError>,
    /// The engine of the present or last run.
    #[serde(default)]
    pub engine: Option<EngineChoice>,
    /// Why that engine.
    #[serde(default)]
    pub engine_reason: Option<String>,
    /// Durations of the last boot.
    #[serde(default)]
    pub boot_phases: Vec<Phase>,
    /// What confines the VM process.
    #[serde(default)]
    pub jail: JailReport,
    /// Published ports as they were last bound.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
    /// The snapshot whose disk it began with.
    #[serde(default)]
    pub snapshot: Option<SnapshotParent>,
}

/// What the journal keeps of a snapshot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its name, the key of the table.
    pub name: SandboxName,
    /// Where it is.
    pub phase: SnapshotPhase,
}

/// Where a snapshot is. Only a ready one is ever seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotPhase {
    /// Its files are being made; a daemon that finds this removes them.
    Making,
    /// It is whole.
    Ready {
        /// Its identity.
        id: String,
        /// What it says about itself.
        manifest: Box<SnapshotManifest>,
    },
    /// Its files are being removed; a daemon that finds this goes on.
    Removing,
}

/// An event before the journal gave it its number and time.
#[derive(Clone, Debug, PartialEq)]
pub struct EventDraft {
    /// The sandbox.
    pub sandbox: SandboxName,
    /// Its identity.
    pub sandbox_id: SandboxId,
    /// The run.
    pub boot_id: Option<BootId>,
    /// What.
    pub event: String,
    /// The state after it.
    pub state: SandboxState,
    /// Why a run ended.
    pub cause: Option<EndCause>,
    /// Who.
    pub actor: String,
    /// For people.
    pub message: String,
}

/// The form in the table: a damaged body is noticed before anything is made of it.
#[derive(Serialize, Deserialize)]
struct Envelope {
    checksum: u64,
    body: Vec<u8>,
}

/// Wraps a value.
pub(super) fn seal(value: &impl Serialize) -> Result<Vec<u8>, String> {
    let body = serde_json::to_vec(value).map_err(|error| error.to_string())?;
    postcard::to_stdvec(&Envelope { checksum: checksum(&body), body }).map_err(|error| error.to_string())
}

/// Unwraps a value.
///
/// # Errors
/// What is wrong with it, for people.
pub(super) fn unseal<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let envelope: Envelope =
        postcard::from_bytes(bytes).map_err(|error| format!("its envelope is damaged: {error}"))?;
    if checksum(&envelope.body) != envelope.checksum {
        return Err("its checksum is wrong".into());
    }
    serde_json::from_slice(&envelope.body).map_err(|error| format!("it cannot be read: {error}"))
}

/// FNV-1a: against accidents, not attackers (the file is the user's own).
fn checksum(body: &[u8]) -> u64 {
    body.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
