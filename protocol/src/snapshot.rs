//! Snapshots: what the artifact says about itself, and how the control API shows it.
//!
//! A manifest is written once, as the bytes whose digest is the snapshot's identity. It may come out of an archive of somebody
//! else's, so nothing in it can name a thing of the host: [`SandboxSpec::for_snapshot`] is all that travels of a spec.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::{ApiError, ErrorCode};
use crate::id::SandboxName;
use crate::labels;
use crate::spec::SandboxSpec;

/// The format that this build writes; a later one is refused.
pub const SNAPSHOT_FORMAT: u32 = 1;
/// The format of one with memory.
pub const SNAPSHOT_MEMORY_FORMAT: u32 = 2;
/// Largest manifest in bytes: the largest environment twice over.
pub const SNAPSHOT_MANIFEST_LEN_MAX: usize = 4 << 20;
/// Most snapshots of one home.
pub const SNAPSHOTS_MAX: usize = 10_000;
/// The label that makes a snapshot with memory a template.
pub const TEMPLATE_LABEL: &str = "msb.template";
/// The label of a snapshot with memory that says how many ready forks of it are kept.
pub const POOL_LABEL: &str = "msb.template.pool";
/// Most ready forks of one snapshot.
pub const POOL_SIZE_MAX: usize = 16;

/// The name of a snapshot: the rule is that of sandboxes.
///
/// # Errors
/// `invalid_name`.
pub fn snapshot_name(text: &str) -> Result<SandboxName, ApiError> {
    SandboxName::parse(text).map_err(|mut error| {
        error.message = error.message.replacen("sandbox name", "snapshot name", 1);
        error
    })
}

/// What a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// The writable disk of a sandbox at rest.
    Disk,
    /// Disk and memory of a running one, at one moment.
    Memory,
}

/// `manifest.json` of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotManifest {
    /// [`SNAPSHOT_FORMAT`] of the msb that wrote it.
    pub format: u32,
    /// What it holds.
    pub kind: SnapshotKind,
    /// The name it was taken under; an import may give it another.
    pub name: SandboxName,
    /// When it was taken.
    pub created_at: Timestamp,
    /// The version of msb that took it.
    pub created_by: String,
    /// The sandbox it was taken from.
    pub source: SandboxName,
    /// The image below the disk.
    pub image: SnapshotImage,
    /// The snapshot that the sandbox had been started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotParent>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What a sandbox made of it begins with.
    pub spec: SandboxSpec,
    /// The disk.
    pub disk: SnapshotDisk,
    /// The memory, for [`SnapshotKind::Memory`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<SnapshotMemory>,
    /// Only there while copies are made of it (a fork): neither digested nor durable, and gone with the service that took it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transient: bool,
}

/// Ready forks of a snapshot with memory: copies that only have to be told who they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ReadyForks {
    /// Those that stand.
    pub ready: u64,
    /// Those that it asks for.
    pub wanted: u64,
}

impl SnapshotManifest {
    /// Ready forks that it asks for; none without memory.
    #[must_use]
    pub fn pool_size(&self) -> usize {
        let has_forks = self.memory.is_some() && !self.transient;
        let asked = self.labels.get(POOL_LABEL).and_then(|size| size.parse().ok()).unwrap_or(0);
        if has_forks { asked.min(POOL_SIZE_MAX) } else { 0 }
    }

    /// Parses the bytes of a manifest, and checks everything that can be checked without its disk.
    ///
    /// # Errors
    /// `limit_exceeded`, `unsupported_operation` for a later format, `invalid_archive` naming what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        let invalid = |why: String| {
            ApiError::new(ErrorCode::InvalidArchive, format!("the manifest of the snapshot cannot be used: {why}"))
                .with_hint("take or export the snapshot again")
        };
        if bytes.len() > SNAPSHOT_MANIFEST_LEN_MAX {
            let message = format!("the manifest of the snapshot has more than {SNAPSHOT_MANIFEST_LEN_MAX} bytes");
            return Err(ApiError::new(ErrorCode::LimitExceeded, message).with_hint("no manifest of msb is that large"));
        }
        let Versioned { format } = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if format != SNAPSHOT_FORMAT && format != SNAPSHOT_MEMORY_FORMAT {
            let message = format!(
                "the snapshot has format {format}, this msb knows {SNAPSHOT_FORMAT} and {SNAPSHOT_MEMORY_FORMAT}"
            );
            return Err(ApiError::new(ErrorCode::UnsupportedOperation, message)
                .with_hint("use the version of msb that took it, or a later one"));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        labels::check_all(&manifest.labels)?;
        manifest.spec.check()?;
        if manifest.spec != manifest.spec.for_snapshot() {
            return Err(invalid("its spec asks for more than a snapshot may bring".into()));
        }
        for (what, digest) in [("image", &manifest.image.digest), ("disk", &manifest.disk.digest)]
            .into_iter()
            .chain(manifest.parent.as_ref().map(|parent| ("parent", &parent.id)))
            .chain(manifest.memory.iter().flat_map(|memory| [("memory", &memory.digest), ("machine", &memory.machine)]))
        {
            if !is_digest(digest) {
                return Err(invalid(format!("the digest of its {what} is none")));
            }
        }
        if manifest.disk.data_bytes > manifest.disk.size_bytes
            || manifest.disk.size_bytes > u64::from(manifest.spec.root_size_mib) << 20
            || manifest.created_by.len() > 256
            || manifest.image.reference != manifest.spec.image
            || manifest.memory.is_some() != (format == SNAPSHOT_MEMORY_FORMAT)
            || manifest.memory.is_some() != (manifest.kind == SnapshotKind::Memory)
            || manifest.transient && manifest.memory.is_none()
            || manifest.memory.as_ref().is_some_and(|memory| {
                memory.size_bytes != u64::from(manifest.spec.memory_mib) << 20 || memory.data_bytes > memory.size_bytes
            })
        {
            return Err(invalid("it contradicts itself".into()));
        }
        Ok(manifest)
    }
}

/// `sha256:` and 64 lower-case hex digits. Whether it is the right one is for whoever has the content.
fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

/// The image below a snapshot's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotImage {
    /// As the user of the sandbox wrote it.
    pub reference: String,
    /// Digest of its manifest: exactly this image is needed.
    pub digest: String,
}

/// The snapshot before a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotParent {
    /// Its identity.
    pub id: String,
    /// Its name at that time.
    #[schema(value_type = String)]
    pub name: SandboxName,
}

/// The disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDisk {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of it that are not zero, counted in pieces of 64 KiB.
    pub data_bytes: u64,
    /// Digest of its content: size, then offset and bytes of each such piece. It does not depend on where the host has holes.
    pub digest: String,
}

/// The memory of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotMemory {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Bytes of it that are not zero, counted in pieces of 64 KiB.
    pub data_bytes: u64,
    /// Digest of its content, as a disk's.
    pub digest: String,
    /// Digest of the file of processors and devices.
    pub machine: String,
    /// Whether the sandbox had a network card: one made of it has one too, or none.
    pub network: bool,
    /// Whether it had a main workload, which goes on in whatever is made of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub main: bool,
}

/// Asks for copies of a running sandbox, memory included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// How many, 1 to [`FORKS_MAX`].
    pub count: u32,
    /// Their name; several get `-1`, `-2`… behind it. Without it, names are invented.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub name: Option<SandboxName>,
}

/// Most copies that one request makes.
pub const FORKS_MAX: u32 = 100;

/// Asks for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SandboxName,
    /// The sandbox, at rest unless its memory is wanted.
    #[schema(value_type = String)]
    pub from: SandboxName,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Its memory too: the sandbox is running then. Engine kvm.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub memory: bool,
}

/// Which name an imported snapshot gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ImportSnapshot {
    /// The name; without it, the one it was taken under.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A snapshot, for lists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotSummary {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SandboxName,
    /// Its identity: the digest of its manifest.
    pub id: String,
    /// What it holds.
    pub kind: SnapshotKind,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// The sandbox it was taken from.
    #[schema(value_type = String)]
    pub source: SandboxName,
    /// The image below its disk.
    pub image: SnapshotImage,
    /// The snapshot that the sandbox had been started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotParent>,
    /// Size of its disk in bytes.
    pub size_bytes: u64,
    /// Bytes the host allocates for it; what it shares with other files is counted for each of them.
    pub allocated_bytes: u64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Of a template that asks for some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_forks: Option<ReadyForks>,
}

/// Everything about a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotDetail {
    /// As in lists.
    #[serde(flatten)]
    pub summary: SnapshotSummary,
    /// What a sandbox made of it begins with.
    pub spec: SandboxSpec,
    /// Its disk.
    pub disk: SnapshotDisk,
    /// Its memory, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<SnapshotMemory>,
    /// The version of msb that took it.
    pub created_by: String,
    /// Snapshots whose parent it is; it cannot be removed before them.
    #[schema(value_type = Vec<String>)]
    pub children: Vec<SandboxName>,
    /// Where it is on the host.
    pub path: String,
}

/// Every snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotList {
    /// By name.
    pub snapshots: Vec<SnapshotSummary>,
}

/// What a check of a snapshot's bytes found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotCheck {
    /// The snapshot.
    #[schema(value_type = String)]
    pub name: SandboxName,
    /// Bytes that were read and compared.
    pub bytes: u64,
    /// What is wrong, for people; empty if nothing is.
    pub problems: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::Mount;

    fn manifest() -> SnapshotManifest {
        let digest = format!("sha256:{}", "0".repeat(64));
        SnapshotManifest {
            format: SNAPSHOT_FORMAT,
            kind: SnapshotKind::Disk,
            name: "warm".parse().unwrap(),
            created_at: Timestamp::UNIX_EPOCH,
            created_by: "0.1.0".into(),
            source: "box".parse().unwrap(),
            image: SnapshotImage { reference: "busybox".into(), digest: digest.clone() },
            parent: None,
            labels: BTreeMap::new(),
            spec: SandboxSpec::new("busybox"),
            disk: SnapshotDisk { size_bytes: 8 << 30, data_bytes: 1 << 20, digest },
            memory: None,
            transient: false,
        }
    }

    #[test]
    fn a_manifest_reads_back_and_a_hostile_one_is_refused_with_its_reason() {
        let parse = |manifest: &SnapshotManifest| SnapshotManifest::parse(&serde_json::to_vec(manifest).unwrap());
        assert_eq!(parse(&manifest()).unwrap(), manifest());
        type Edit = fn(&mut SnapshotManifest);
        let edits: [(Edit, ErrorCode, &str); 12] = [
            (|m| m.format = 3, ErrorCode::UnsupportedOperation, "format 3"),
            (|m| m.format = 2, ErrorCode::InvalidArchive, "contradicts"),
            (|m| m.kind = SnapshotKind::Memory, ErrorCode::InvalidArchive, "contradicts"),
            (|m| m.spec.kernel = Some("/boot/evil".into()), ErrorCode::InvalidArchive, "more than"),
            (|m| m.spec.mounts.push(Mount::parse_volume("/etc:/x").unwrap()), ErrorCode::InvalidArchive, "more than"),
            (|m| m.spec.network.enabled = false, ErrorCode::InvalidArchive, "more than"),
            (|m| m.spec.cpus = 4_000, ErrorCode::InvalidConfig, "cpus"),
            (|m| m.image.digest = "../../etc".into(), ErrorCode::InvalidArchive, "image"),
            (|m| m.disk.digest = "sha256:0".into(), ErrorCode::InvalidArchive, "disk"),
            (|m| m.disk.data_bytes = u64::MAX, ErrorCode::InvalidArchive, "contradicts"),
            (|m| m.disk.size_bytes = u64::MAX, ErrorCode::InvalidArchive, "contradicts"),
            (|m| m.image.reference = "other".into(), ErrorCode::InvalidArchive, "contradicts"),
        ];
        for (edit, code, text) in edits {
            let mut hostile = manifest();
            edit(&mut hostile);
            let error = parse(&hostile).unwrap_err();
            assert!(error.code == code && error.message.contains(text), "{error:?}");
        }
        assert_eq!(SnapshotManifest::parse(b"{").unwrap_err().code, ErrorCode::InvalidArchive);
        let large = vec![b' '; SNAPSHOT_MANIFEST_LEN_MAX + 1];
        assert_eq!(SnapshotManifest::parse(&large).unwrap_err().code, ErrorCode::LimitExceeded);
    }

    #[test]
    fn nothing_of_the_host_and_nothing_of_the_old_sandbox_travels() {
        let mut spec = SandboxSpec::new("busybox");
        spec.name = Some("old".parse().unwrap());
        spec.hostname = Some("old".into());
        spec.env.insert("A".into(), "1".into());
        spec.workdir = Some("/srv".into());
        spec.memory_mib = 128;
        spec.kernel = Some("/k".into());
        spec.mounts.push(Mount::parse_volume("/etc:/x").unwrap());
        spec.network.enabled = false;
        spec.ephemeral = true;
        spec.idle_timeout_ms = Some(5);
        spec.snapshot = Some("before".parse().unwrap());
        let kept = spec.for_snapshot();
        let mut expected = SandboxSpec::new("busybox");
        expected.env = spec.env.clone();
        expected.workdir = spec.workdir.clone();
        expected.memory_mib = 128;
        assert_eq!(kept, expected);
        assert_eq!(kept.for_snapshot(), kept);
    }
}
