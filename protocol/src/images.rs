//! Bodies of the control API's image routes beyond listing and loading: naming, saving, pruning, pulling, registries, disk usage.
//!
//! Used by `msbd` and its clients. Nothing in here is ever written to a log: [`Credentials`] shows no secret even in `{:?}`.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::control::ImageSummary;
use crate::error::ApiError;

/// What a removal did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageRemoval {
    /// Names that were taken away, short form.
    pub untagged: Vec<String>,
    /// Digest of the image, if it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<String>,
    /// Bytes freed on disk.
    pub bytes_reclaimed: u64,
}

/// Another name for an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TagRequest {
    /// The image: name, digest, or a digest's first digits.
    pub reference: String,
    /// Its new name. Another image that has it loses it.
    pub name: String,
}

/// Whether prune leaves an image alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// The image.
    pub reference: String,
    /// Whether.
    pub pinned: bool,
}

/// Layout of a saved archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ArchiveFormat {
    /// As `docker save` writes since version 25: `manifest.json` beside an OCI layout.
    #[default]
    Docker,
    /// An OCI layout alone.
    Oci,
}

/// Images to write as one archive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SaveRequest {
    /// Which: at least one.
    pub references: Vec<String>,
    /// The layout.
    #[serde(default)]
    pub format: ArchiveFormat,
}

/// What a prune may take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneRequest {
    /// Change nothing, only report.
    #[serde(default)]
    pub dry_run: bool,
    /// Pinned images too.
    #[serde(default)]
    pub all: bool,
    /// Only images neither loaded nor used for this many milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_than_ms: Option<u64>,
    /// Stop when what stays is no more than this many bytes; the least recently used images go first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_bytes: Option<u64>,
    /// Only images with all these labels: `KEY=VALUE`, or `KEY` for any value.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
}

/// What a prune took, or would take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PruneReport {
    /// Nothing was changed.
    pub dry_run: bool,
    /// Names taken away.
    pub image_refs_removed: u64,
    /// Images.
    pub manifests_removed: u64,
    /// Layers, with their blobs and data files.
    pub layers_removed: u64,
    /// Merged metadata images.
    pub fsmeta_removed: u64,
    /// Unfinished downloads.
    #[serde(default)]
    pub partials_removed: u64,
    /// Bytes freed on disk, as measured there.
    pub bytes_reclaimed: u64,
    /// The images.
    pub images: Vec<PrunedImage>,
}

/// An image that a prune took, or would take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PrunedImage {
    /// Digest of its manifest.
    pub digest: String,
    /// Its names, short form.
    pub references: Vec<String>,
}

/// What uses how much of the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DiskUsage {
    /// One row for each kind of thing.
    pub rows: Vec<DiskUsageRow>,
    /// Free bytes of the home's file system.
    pub free_bytes: u64,
}

/// One kind of thing that takes disk space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DiskUsageRow {
    /// `images`, `layer data`, `root metadata`, `downloads`, `sandboxes`, `logs`, `snapshots`, `ready forks`.
    pub kind: String,
    /// How many there are.
    pub count: u64,
    /// How many of them something needs.
    pub active: u64,
    /// Bytes allocated on disk.
    pub bytes: u64,
    /// Bytes that could go.
    pub reclaimable_bytes: u64,
}

/// A step of how an image was built.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageHistoryStep {
    /// When, if its builder said so.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// The instruction.
    #[serde(default)]
    pub created_by: String,
    /// The builder's remark.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// Digest of the unpacked layer that it made, if it made one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff_id: Option<String>,
    /// Bytes of that layer, unpacked.
    pub bytes: u64,
}

/// When to fetch an image from its registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PullPolicy {
    /// Even if the store has it: a tag may have moved.
    Always,
    /// If the store does not have it.
    #[default]
    IfMissing,
    /// Never.
    Never,
}

/// What is said of an image that is not in the store and cannot be fetched either: both errors in one, the second one's code.
#[must_use]
pub fn neither_here_nor_fetched(absent: &ApiError, mut failed: ApiError) -> ApiError {
    failed.message = format!("{}, and fetching it failed: {}", absent.message, failed.message);
    // A registry that answered that it has no such image: the hint is the same.
    if failed.code != absent.code {
        failed.hint = format!("load it with `msb image load -i FILE`, or {}", failed.hint);
    }
    failed
}

/// Name and secret for a registry.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// The user's name.
    pub username: String,
    /// The password or token.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// An image to fetch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// `[registry/]name[:tag][@digest]`.
    pub reference: String,
    /// As `linux/amd64`; the host's if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Used in place of every stored credential.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
    /// Plain HTTP, and certificates that nobody vouches for.
    #[serde(default)]
    pub insecure: bool,
    /// Certificates in PEM form that are trusted beside the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_certs: Option<String>,
}

/// Progress of a pull: one JSON line each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum PullEvent {
    /// The name means this image; these layers make it.
    Resolved {
        /// Digest of the manifest.
        digest: String,
        /// As `linux/amd64`.
        platform: String,
        /// Its layers, lowest first.
        layers: Vec<PullLayer>,
    },
    /// A layer has come this far.
    Layer {
        /// Digest of the blob.
        digest: String,
        /// Bytes of it that are here.
        bytes: u64,
    },
    /// A layer is ready to boot from.
    LayerDone {
        /// Digest of the blob.
        digest: String,
        /// Whether the store had it already.
        known: bool,
    },
    /// A transfer failed and is tried again.
    Retry {
        /// Of what: a digest or name.
        what: String,
        /// Why.
        reason: String,
        /// Time until then in milliseconds.
        wait_ms: u64,
    },
    /// Something to know, for people.
    Warning {
        /// What.
        message: String,
    },
    /// The end: the image.
    Done {
        /// It.
        image: Box<ImageSummary>,
        /// Whether the store had it already.
        was_present: bool,
    },
    /// The end: it failed. What has come so far is kept for the next try.
    Error {
        /// Why.
        error: ApiError,
    },
}

/// A layer of an image that is being pulled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PullLayer {
    /// Digest of the blob.
    pub digest: String,
    /// Bytes of the blob.
    pub bytes: u64,
}

/// Log in to a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginRequest {
    /// Host with port; `docker.io` for Docker Hub.
    pub registry: String,
    /// Who.
    pub credentials: Credentials,
    /// As in [`PullRequest::insecure`].
    #[serde(default)]
    pub insecure: bool,
    /// As in [`PullRequest::ca_certs`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_certs: Option<String>,
}

/// Where a login is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LoginReport {
    /// The registry.
    pub registry: String,
    /// `keyring`, or `file` with the path.
    pub stored_in: String,
}

/// Registries that msb has credentials or settings for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RegistryList {
    /// By host.
    pub registries: Vec<RegistryRow>,
}

/// One registry; never a secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RegistryRow {
    /// Host with port.
    pub registry: String,
    /// The user's name, where that is known without asking for a secret.
    #[serde(default)]
    pub username: String,
    /// Where its credential comes from: `keyring`, `file`, `config`, `docker`; empty if there is none.
    #[serde(default)]
    pub source: String,
    /// Its mirrors, in the order they are asked.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// Plain HTTP and unknown certificates are allowed.
    #[serde(default)]
    pub insecure: bool,
}

/// Settings of one registry: the table `[registries."host:port"]` of a configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistrySettings {
    /// Hosts, or URLs, that are asked first.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// Plain HTTP, and certificates that nobody vouches for.
    #[serde(default)]
    pub insecure: bool,
    /// File of certificates in PEM form that are trusted beside the system's.
    #[serde(default)]
    pub ca_certs: Option<String>,
    /// The user's name.
    #[serde(default)]
    pub username: Option<String>,
    /// Environment variable of `msbd` that holds the password.
    #[serde(default)]
    pub password_env: Option<String>,
}

/// Settings by registry host.
pub type RegistryTable = BTreeMap<String, RegistrySettings>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_secret_is_ever_shown() {
        let credentials = Credentials { username: "me".into(), password: "hunter2".into() };
        let request = PullRequest { credentials: Some(credentials), ..PullRequest::default() };
        let text = format!("{request:?}");
        assert!(text.contains("me") && !text.contains("hunter2"), "{text}");
    }

    #[test]
    fn the_prune_report_has_the_keys_that_scripts_read() {
        let value = serde_json::to_value(PruneReport::default()).unwrap();
        for key in ["image_refs_removed", "manifests_removed", "layers_removed", "fsmeta_removed", "bytes_reclaimed"] {
            assert_eq!(value[key], 0, "{key}");
        }
    }
}
