//! One image in the store: a JSON file per manifest digest, with its tags.
//!
//! A record is the only thing that makes parts live. Written whole (temporary file, rename), read once when the store opens.

use serde::{Deserialize, Serialize};

use crate::compression::Compression;
use crate::digest::Digest;
use crate::layer::Dropped;
use crate::reference::ImageReference;
use crate::store::paths::{Part, chain_digest};

/// Version of the record's fields.
pub(crate) const RECORD_FORMAT: u32 = 1;

/// What the store knows about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) format: u32,
    /// Digest of the manifest: the image's identity.
    pub(crate) digest: Digest,
    pub(crate) manifest_bytes: u64,
    pub(crate) media_type: String,
    pub(crate) config: Digest,
    pub(crate) config_bytes: u64,
    pub(crate) layers: Vec<LayerRecord>,
    /// As `linux/amd64`.
    pub(crate) platform: String,
    pub(crate) tags: Vec<TagRecord>,
    /// Digests of indexes in a registry that led to this image: a reference may pin one of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) indexes: Vec<Digest>,
    pub(crate) loaded_ms: u64,
    pub(crate) used_ms: u64,
    pub(crate) pinned: bool,
    pub(crate) dropped: Dropped,
    /// Whether every part is known to be on disk and not only in the page cache.
    pub(crate) flushed: bool,
    /// The host's boot that wrote it; an unflushed record of another boot is verified before it is believed.
    pub(crate) boot_id: String,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    /// The layer as it came.
    pub(crate) blob: Digest,
    pub(crate) blob_bytes: u64,
    pub(crate) media_type: String,
    pub(crate) compression: Compression,
    pub(crate) diff_id: Digest,
    pub(crate) tar_bytes: u64,
    /// Length of the data file.
    pub(crate) data_bytes: u64,
}

/// A name of an image, with the moment it was given: the later of two records that claim one name has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TagRecord {
    pub(crate) reference: ImageReference,
    pub(crate) since_ms: u64,
}

impl ImageRecord {
    pub(crate) fn chain(&self) -> Digest {
        chain_digest(self.layers.iter().map(|layer| layer.diff_id))
    }

    /// Everything in the store that this image needs.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        [Part::Blob(self.digest), Part::Blob(self.config), Part::Root(self.chain())]
            .into_iter()
            .chain(self.layers.iter().flat_map(|layer| [Part::Blob(layer.blob), Part::Layer(layer.diff_id)]))
    }

    /// Whether a pinned digest means this image.
    pub(crate) fn is_pinned_by(&self, digest: Digest) -> bool {
        self.digest == digest || self.indexes.contains(&digest)
    }

    /// Bytes of all original blobs.
    pub(crate) fn blob_bytes(&self) -> u64 {
        self.manifest_bytes + self.config_bytes + self.layers.iter().map(|layer| layer.blob_bytes).sum::<u64>()
    }

    /// The first tag in short form, or the short digest.
    pub(crate) fn name(&self) -> String {
        self.tags.first().map_or_else(|| self.digest.to_string(), |tag| tag.reference.short())
    }
}
