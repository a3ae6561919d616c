//! Images: what is stored, and how one comes in. Part of the control API ([`super`]).

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::id::SandboxName;

/// Images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageList {
    /// Newest first.
    pub images: Vec<ImageSummary>,
}

/// One image in a list: one record for each manifest digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageSummary {
    /// Digest of the manifest.
    pub digest: String,
    /// Its names, short form.
    pub references: Vec<String>,
    /// `linux/amd64`.
    pub platform: String,
    /// Bytes of its layers as they came.
    pub compressed_bytes: u64,
    /// Bytes of its layers unpacked.
    pub unpacked_bytes: u64,
    /// Number of layers.
    pub layers: u32,
    /// When it was made, if its maker said so.
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When it came into the store.
    #[schema(value_type = String, format = DateTime)]
    pub loaded_at: Timestamp,
    /// Whether prune leaves it alone.
    #[serde(default)]
    pub pinned: bool,
}

/// Everything about one image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageDetail {
    /// What a list shows.
    #[serde(flatten)]
    pub summary: ImageSummary,
    /// Whether all its parts are there, as far as their lengths tell.
    #[serde(default)]
    pub complete: bool,
    /// What it says about running it.
    pub config: ImageConfigDetail,
    /// Its layers, lowest first.
    pub layer_details: Vec<ImageLayerDetail>,
    /// Sandboxes that use it.
    pub used_by: Vec<SandboxName>,
    /// Snapshots that need it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub used_by_snapshots: Vec<SandboxName>,
    /// How it was built, oldest step first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<crate::images::ImageHistoryStep>,
}

/// What an image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageConfigDetail {
    /// Digest of the configuration.
    pub digest: String,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Words.
    pub entrypoint: Vec<String>,
    /// Words.
    pub cmd: Vec<String>,
    /// Working directory.
    pub working_dir: String,
    /// User.
    pub user: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Stop signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_signal: Option<String>,
    /// Exposed ports.
    pub exposed_ports: Vec<String>,
    /// Volumes.
    pub volumes: Vec<String>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageLayerDetail {
    /// Digest of the unpacked tar.
    pub diff_id: String,
    /// Digest of the blob.
    pub blob_digest: String,
    /// Media type of the blob.
    pub media_type: String,
    /// Bytes of the blob.
    pub compressed_bytes: u64,
    /// Bytes of the tar once unpacked.
    #[serde(default)]
    pub unpacked_bytes: u64,
    /// Bytes of the data file, as allocated.
    pub data_bytes: u64,
    /// Images of the store that have it, this one counted.
    pub shared_by: u32,
}

/// Progress of a load: one JSON line each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum LoadEvent {
    /// Bytes of the archive read so far.
    Progress {
        /// Bytes.
        bytes: u64,
    },
    /// A layer is ready.
    Layer {
        /// Its unpacked digest.
        diff_id: String,
        /// Whether the store had it already.
        known: bool,
    },
    /// Something in the image was left out, and why.
    Warning {
        /// For people.
        message: String,
    },
    /// The end: the images.
    Done {
        /// In the order of the archive.
        images: Vec<ImageSummary>,
    },
    /// The end: it failed; the store is as it was.
    Error {
        /// Why.
        error: ApiError,
    },
}
