//! Finding, showing, naming, pinning and removing images.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::ImageError;
use crate::layer::Dropped;
use crate::reference::ImageReference;
use crate::store::{ImageRecord, State, Store, TagRecord, now_ms};

/// Fewest hex digits that a shortened digest must have.
const SHORT_DIGEST_MIN: usize = 4;

/// One image in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Digest of the configuration, which docker calls the image id.
    pub config_digest: Digest,
    /// Names in short form, as `busybox:latest`; empty for an untagged image.
    pub references: Vec<String>,
    /// As `linux/amd64`.
    pub platform: String,
    /// When the image was built, RFC 3339 as its builder wrote it.
    pub created: Option<String>,
    /// Bytes of all original blobs; layers shared with other images count in each.
    pub size_bytes: u64,
    /// Number of layers.
    pub layers: usize,
    /// When it came into the store, milliseconds since 1970.
    pub loaded_ms: u64,
    /// When a sandbox was last made from it, milliseconds since 1970.
    pub used_ms: u64,
    /// Prune leaves it alone unless told otherwise.
    pub pinned: bool,
}

/// Everything about one image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDetails {
    /// What a list shows.
    pub summary: ImageSummary,
    /// Media type of the manifest.
    pub media_type: String,
    /// Whether all its parts are there, as far as their lengths tell.
    pub complete: bool,
    /// Its configuration.
    pub config: ImageConfig,
    /// Layers, bottom first.
    pub layers: Vec<LayerDetails>,
    /// What the image held that a sandbox's root must not.
    pub dropped: Dropped,
}

/// One layer of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDetails {
    /// Digest of the layer as it came.
    pub digest: Digest,
    /// Digest of the uncompressed layer.
    pub diff_id: Digest,
    /// Media type in the manifest.
    pub media_type: String,
    /// Bytes as it came.
    pub compressed_bytes: u64,
    /// Bytes of the uncompressed tar stream.
    pub unpacked_bytes: u64,
    /// Length of its data file.
    pub data_bytes: u64,
    /// Other images in the store that use it.
    pub shared_with: usize,
}

/// What [`Store::remove`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveOutcome {
    /// Names that were taken away, in short form.
    pub untagged: Vec<String>,
    /// The image, if it is gone.
    pub deleted: Option<Digest>,
    /// Bytes freed on disk.
    pub bytes_reclaimed: u64,
}

impl State {
    /// The image that a reference, digest or shortened digest names.
    pub(super) fn find(&self, query: &str) -> Result<&ImageRecord, ImageError> {
        let reference = query.parse::<ImageReference>();
        if let Ok(reference) = &reference {
            let fits = |record: &&ImageRecord| match reference.digest() {
                Some(digest) => record.is_pinned_by(digest),
                None => record.tags.iter().any(|tag| tag.reference == *reference),
            };
            // An index can have led to images of several platforms: a sandbox wants this machine's.
            let host = crate::archive::Platform::host().to_string();
            let by_tag = self.records.values().filter(fits).reduce(|first, next| {
                if next.platform.starts_with(&host) && first.platform != host { next } else { first }
            });
            if let Some(record) = by_tag {
                return Ok(record);
            }
        }
        let hex = query.strip_prefix("sha256:").unwrap_or(query);
        let is_digest = hex.len() >= SHORT_DIGEST_MIN
            && hex.len() <= 64
            && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if is_digest {
            let fitting: Vec<_> = self
                .records
                .values()
                .filter(|record| record.digest.hex().starts_with(hex) || record.config.hex().starts_with(hex))
                .collect();
            match fitting[..] {
                [] => {}
                [record] => return Ok(record),
                _ => return Err(ImageError::Ambiguous { reference: query.to_string(), count: fitting.len() }),
            }
        }
        // A text that can be nothing is told so, rather than "not found".
        if !is_digest {
            reference?;
        }
        Err(self.not_found(query))
    }

    pub(super) fn by_digest(&self, digest: Digest) -> Result<&ImageRecord, ImageError> {
        self.records.get(&digest).ok_or_else(|| self.not_found(&digest.to_string()))
    }

    fn not_found(&self, query: &str) -> ImageError {
        const SHOWN: usize = 10;
        let known = self
            .records
            .values()
            .flat_map(|record| &record.tags)
            .map(|tag| tag.reference.short())
            .take(SHOWN)
            .collect();
        ImageError::NotFound { reference: query.chars().take(300).collect(), known }
    }
}

impl Store {
    /// All images, most recently loaded first.
    ///
    /// # Errors
    /// Never for a whole store; an image whose configuration cannot be read is listed without its build time.
    pub fn list(&self) -> Result<Vec<ImageSummary>, ImageError> {
        let mut records: Vec<_> = self.state().records.values().cloned().collect();
        records.sort_by(|a, b| b.loaded_ms.cmp(&a.loaded_ms).then(a.digest.cmp(&b.digest)));
        Ok(records.iter().map(|record| self.summary(record, self.config(record.digest).ok().as_ref())).collect())
    }

    /// The image that a reference, digest or shortened digest names.
    ///
    /// # Errors
    /// `InvalidReference`, `NotFound`, `Ambiguous`, `Corrupt`.
    pub fn get(&self, query: &str) -> Result<ImageDetails, ImageError> {
        let (record, users) = {
            let state = self.state();
            let record = state.find(query)?.clone();
            let users: BTreeMap<Digest, usize> = record
                .layers
                .iter()
                .map(|layer| {
                    let others = state.records.values().filter(|other| {
                        other.digest != record.digest && other.layers.iter().any(|one| one.diff_id == layer.diff_id)
                    });
                    (layer.diff_id, others.count())
                })
                .collect();
            (record, users)
        };
        let config = self.config(record.digest)?;
        Ok(ImageDetails {
            summary: self.summary(&record, Some(&config)),
            complete: self.is_complete(&record),
            media_type: record.media_type.clone(),
            layers: record
                .layers
                .iter()
                .map(|layer| LayerDetails {
                    digest: layer.blob,
                    diff_id: layer.diff_id,
                    media_type: layer.media_type.clone(),
                    compressed_bytes: layer.blob_bytes,
                    unpacked_bytes: layer.tar_bytes,
                    data_bytes: layer.data_bytes,
                    shared_with: users.get(&layer.diff_id).copied().unwrap_or(0),
                })
                .collect(),
            config,
            dropped: record.dropped.clone(),
        })
    }

    /// Whether the store has what `query` names.
    ///
    /// # Errors
    /// `InvalidReference`, `Ambiguous`.
    pub fn contains(&self, query: &str) -> Result<bool, ImageError> {
        match self.state().find(query) {
            Ok(_) => Ok(true),
            Err(ImageError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn record(&self, digest: Digest) -> Result<ImageRecord, ImageError> {
        self.state().by_digest(digest).cloned()
    }

    fn summary(&self, record: &ImageRecord, config: Option<&ImageConfig>) -> ImageSummary {
        ImageSummary {
            digest: record.digest,
            config_digest: record.config,
            references: record.tags.iter().map(|tag| tag.reference.short()).collect(),
            platform: record.platform.clone(),
            created: config.and_then(|config| config.created.clone()),
            size_bytes: record.blob_bytes(),
            layers: record.layers.len(),
            loaded_ms: record.loaded_ms,
            used_ms: record.used_ms,
            pinned: record.pinned,
        }
    }

    /// Gives the image that `query` names another name, taking it from the image that had it.
    ///
    /// # Errors
    /// As [`get`](Self::get); `InvalidReference` when `name` pins a digest.
    pub fn tag(&self, query: &str, name: &ImageReference) -> Result<(), ImageError> {
        if name.digest().is_some() {
            return Err(ImageError::InvalidReference { text: name.to_string(), reason: "a tag cannot pin a digest" });
        }
        let mut state = self.state();
        let mut record = state.find(query)?.clone();
        record.tags.retain(|tag| tag.reference != *name);
        record.tags.push(TagRecord { reference: name.clone(), since_ms: now_ms() });
        self.shared().write_record(&record)?;
        let owner = record.digest;
        state.records.insert(owner, record);
        self.take_tags_from_others(&mut state, owner, std::slice::from_ref(name))
    }

    /// Pins or unpins the image that `query` names.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn pin(&self, query: &str, pinned: bool) -> Result<Digest, ImageError> {
        let mut state = self.state();
        let mut record = state.find(query)?.clone();
        record.pinned = pinned;
        self.shared().write_record(&record)?;
        let digest = record.digest;
        state.records.insert(digest, record);
        Ok(digest)
    }

    /// Takes a name away, and the image with it when that was its last one or `query` was its digest.
    ///
    /// `in_use` says which sandboxes need which image. With `force` an image in use loses its names and keeps its parts, so that no
    /// sandbox breaks; a later prune takes it when nothing needs it.
    ///
    /// # Errors
    /// `InUse` without `force`; otherwise as [`get`](Self::get).
    pub fn remove(
        &self,
        query: &str,
        in_use: &BTreeMap<Digest, Vec<String>>,
        force: bool,
    ) -> Result<RemoveOutcome, ImageError> {
        let mut state = self.state();
        let mut record = state.find(query)?.clone();
        let named = query.parse::<ImageReference>().ok();
        let by_name = record.tags.iter().any(|tag| Some(&tag.reference) == named.as_ref());
        let mut outcome = RemoveOutcome::default();
        if by_name && record.tags.len() > 1 {
            record.tags.retain(|tag| Some(&tag.reference) != named.as_ref());
            outcome.untagged.extend(named.map(|name| name.short()));
            self.shared().write_record(&record)?;
            state.records.insert(record.digest, record);
            return Ok(outcome);
        }
        let mut users = in_use.get(&record.digest).cloned().unwrap_or_default();
        if state.leases.contains_key(&record.digest) {
            users.push("a sandbox that is being created".into());
        }
        outcome.untagged = record.tags.iter().map(|tag| tag.reference.short()).collect();
        if !users.is_empty() {
            if !force {
                return Err(ImageError::InUse { reference: record.name(), users });
            }
            record.tags.clear();
            self.shared().write_record(&record)?;
            state.records.insert(record.digest, record);
            return Ok(outcome);
        }
        let dead = BTreeSet::from([record.digest]);
        let swept = self.delete_records(&mut state, &dead)?;
        drop(state);
        outcome.deleted = Some(record.digest);
        outcome.bytes_reclaimed = swept.discard();
        Ok(outcome)
    }
}
