//! What may go: choosing images by policy, sweeping parts that no record needs, counting what that frees.
//!
//! The choice is a pure function of records, options and time. Deletion is renaming into `tmp/` under the mutex, so that nobody sees
//! half a part, and unlinking outside it. Leases (creations), holds (loads), pins and the caller's set of images in use are all respected.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{ImageError, io_error};
use crate::store::{ImageRecord, Part, State, Store};

/// Which images a prune may take.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Change nothing, only report.
    pub dry_run: bool,
    /// Pinned images too.
    pub all: bool,
    /// Only images neither loaded nor used since this moment, milliseconds since 1970.
    pub unused_since_ms: Option<u64>,
    /// Stop when the blobs that stay are no more than this; the least recently used go first.
    pub keep_bytes: Option<u64>,
    /// Only images with all these labels; `None` as a value means any.
    pub labels: Vec<(String, Option<String>)>,
}

/// What a prune took, or would take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Bytes freed on disk.
    pub bytes_reclaimed: u64,
    /// The images.
    pub images: Vec<PrunedImage>,
}

/// An image that a prune took, or would take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrunedImage {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Its names in short form.
    pub references: Vec<String>,
}

/// What the store uses on disk. *Active* is what sandboxes, pins and leases need; the rest a prune without options would take.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreUsage {
    /// Images.
    pub images: u64,
    /// Images that something needs.
    pub active_images: u64,
    /// Original blobs: manifests, configurations, layers as they came.
    pub blobs: PartUsage,
    /// Data files and tree indexes of layers.
    pub layers: PartUsage,
    /// Merged metadata.
    pub roots: PartUsage,
    /// Unfinished downloads.
    pub partials: PartUsage,
}

impl StoreUsage {
    /// Bytes that a prune without options would free.
    #[must_use]
    pub fn reclaimable_bytes(&self) -> u64 {
        [self.blobs, self.layers, self.roots, self.partials].iter().map(|part| part.reclaimable_bytes).sum()
    }
}

/// One kind of part on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartUsage {
    /// How many.
    pub count: u64,
    /// How many of them something needs.
    pub active: u64,
    /// Bytes as allocated.
    pub bytes: u64,
    /// Bytes that could go.
    pub reclaimable_bytes: u64,
}

/// Parts moved out of the way, not yet unlinked.
pub(super) struct Swept {
    directory: Option<tempfile::TempDir>,
    layers: u64,
    roots: u64,
    bytes: u64,
}

impl Swept {
    /// Unlinks what was swept and returns how many bytes that frees.
    pub(super) fn discard(self) -> u64 {
        if let Some(directory) = self.directory
            && let Err(error) = directory.close()
        {
            // The next open clears tmp/.
            tracing::warn!(%error, "swept parts not unlinked");
        }
        self.bytes
    }
}

/// Images that `options` allow to take, the least recently used first.
fn choose(
    records: &BTreeMap<Digest, ImageRecord>,
    leases: &HashMap<Digest, u32>,
    in_use: &BTreeSet<Digest>,
    labels_fit: &dyn Fn(&ImageRecord) -> bool,
    options: &PruneOptions,
) -> BTreeSet<Digest> {
    let mut candidates: Vec<_> = records
        .values()
        .filter(|record| !in_use.contains(&record.digest) && !leases.contains_key(&record.digest))
        .filter(|record| options.all || !record.pinned)
        .filter(|record| options.unused_since_ms.is_none_or(|moment| record.used_ms.max(record.loaded_ms) < moment))
        .filter(|record| labels_fit(record))
        .collect();
    candidates.sort_by_key(|record| (record.used_ms.max(record.loaded_ms), record.digest));
    let mut chosen = BTreeSet::new();
    for candidate in candidates {
        if let Some(keep) = options.keep_bytes
            && unique_blob_bytes(records.values().filter(|record| !chosen.contains(&record.digest))) <= keep
        {
            break;
        }
        chosen.insert(candidate.digest);
    }
    chosen
}

/// Bytes of blobs, each counted once however many images share it.
pub(super) fn unique_blob_bytes<'a>(records: impl Iterator<Item = &'a ImageRecord>) -> u64 {
    let mut sizes: HashMap<Digest, u64> = HashMap::new();
    for record in records {
        sizes.insert(record.digest, record.manifest_bytes);
        sizes.insert(record.config, record.config_bytes);
        sizes.extend(record.layers.iter().map(|layer| (layer.blob, layer.blob_bytes)));
    }
    sizes.values().sum()
}

impl Store {
    /// Removes the images that `options` allow and nothing needs, then every part that no image needs.
    ///
    /// `in_use` are images that sandboxes or snapshots need.
    ///
    /// # Errors
    /// `Io` when a part cannot be moved; what was removed until then stays removed and the store stays consistent.
    pub fn prune(&self, options: &PruneOptions, in_use: &BTreeSet<Digest>) -> Result<PruneReport, ImageError> {
        let mut state = self.state();
        let labels_fit = |record: &ImageRecord| self.labels_fit(record, &options.labels);
        let chosen = choose(&state.records, &state.leases, in_use, &labels_fit, options);
        let images: Vec<_> = chosen
            .iter()
            .filter_map(|digest| state.records.get(digest))
            .map(|record| PrunedImage {
                digest: record.digest,
                references: record.tags.iter().map(|tag| tag.reference.short()).collect(),
            })
            .collect();
        let mut report = PruneReport {
            dry_run: options.dry_run,
            image_refs_removed: images.iter().map(|image| image.references.len() as u64).sum(),
            manifests_removed: images.len() as u64,
            images,
            ..PruneReport::default()
        };
        if options.dry_run {
            for part in self.dead_parts(&state, &chosen)? {
                match part {
                    Part::Blob(_) => {}
                    Part::Layer(_) => report.layers_removed += 1,
                    Part::Root(_) => report.fsmeta_removed += 1,
                }
                report.bytes_reclaimed += allocated_bytes(&self.paths().part(part));
            }
            drop(state);
            self.prune_partials(options, &mut report)?;
            return Ok(report);
        }
        let swept = self.delete_records(&mut state, &chosen)?;
        drop(state);
        report.layers_removed = swept.layers;
        report.fsmeta_removed = swept.roots;
        report.bytes_reclaimed = swept.discard();
        self.prune_partials(options, &mut report)?;
        Ok(report)
    }

    /// Unfinished downloads have no labels and count for no limit; their age is that of their last byte.
    fn prune_partials(&self, options: &PruneOptions, report: &mut PruneReport) -> Result<(), ImageError> {
        if !options.labels.is_empty() {
            return Ok(());
        }
        let moment = options.unused_since_ms.map(|ms| std::time::UNIX_EPOCH + std::time::Duration::from_millis(ms));
        let (usage, gone) = self.remove_partials(options.dry_run, |last| moment.is_none_or(|moment| last < moment))?;
        report.partials_removed = gone;
        report.bytes_reclaimed += usage.reclaimable_bytes;
        Ok(())
    }

    /// Bytes of all original blobs, each counted once: what [`PruneOptions::keep_bytes`] is compared with.
    #[must_use]
    pub fn blob_bytes(&self) -> u64 {
        unique_blob_bytes(self.state().records.values())
    }

    fn labels_fit(&self, record: &ImageRecord, wanted: &[(String, Option<String>)]) -> bool {
        if wanted.is_empty() {
            return true;
        }
        let config = self.read_small_blob(record.config).and_then(|bytes| crate::config::ImageConfig::parse(&bytes));
        let Ok(config) = config else { return false };
        wanted.iter().all(|(key, value)| match config.labels.get(key) {
            Some(actual) => value.as_ref().is_none_or(|value| value == actual),
            None => false,
        })
    }

    /// What the store uses, and what a prune without options would free.
    ///
    /// # Errors
    /// `Io` when a directory cannot be read.
    pub fn usage(&self, in_use: &BTreeSet<Digest>) -> Result<StoreUsage, ImageError> {
        let state = self.state();
        let chosen = choose(&state.records, &state.leases, in_use, &|_| true, &PruneOptions::default());
        let images = state.records.len() as u64;
        let active_images = images - chosen.len() as u64;
        let (partials, _) = self.remove_partials(true, |_| true)?;
        let mut usage = StoreUsage { images, active_images, partials, ..StoreUsage::default() };
        let dead: BTreeSet<Part> = self.dead_parts(&state, &chosen)?.into_iter().collect();
        for part in self.present_parts()? {
            let bytes = allocated_bytes(&self.paths().part(part));
            let row = match part {
                Part::Blob(_) => &mut usage.blobs,
                Part::Layer(_) => &mut usage.layers,
                Part::Root(_) => &mut usage.roots,
            };
            row.count += 1;
            row.bytes += bytes;
            if dead.contains(&part) {
                row.reclaimable_bytes += bytes;
            } else {
                row.active += 1;
            }
        }
        Ok(usage)
    }

    /// Deletes records, then sweeps what only they needed.
    pub(super) fn delete_records(&self, state: &mut State, dead: &BTreeSet<Digest>) -> Result<Swept, ImageError> {
        for digest in dead {
            let path = self.paths().record(*digest);
            super::remove_any(&path)?;
            state.records.remove(digest);
        }
        self.sweep(state)
    }

    /// Moves every part that is neither live nor held into a temporary directory.
    pub(super) fn sweep(&self, state: &State) -> Result<Swept, ImageError> {
        let mut swept = Swept { directory: None, layers: 0, roots: 0, bytes: 0 };
        for part in self.dead_parts(state, &BTreeSet::new())? {
            let directory = match &swept.directory {
                Some(directory) => directory,
                None => swept.directory.insert(self.temporary()?),
            };
            let path = self.paths().part(part);
            let (kind, digest) = match part {
                Part::Blob(digest) => ("blob", digest),
                Part::Layer(digest) => ("layer", digest),
                Part::Root(digest) => ("root", digest),
            };
            swept.bytes += allocated_bytes(&path);
            fs::rename(&path, directory.path().join(format!("{kind}-{}", digest.hex())))
                .map_err(|error| io_error("remove", &path, error))?;
            match part {
                Part::Blob(_) => {}
                Part::Layer(_) => swept.layers += 1,
                Part::Root(_) => swept.roots += 1,
            }
        }
        Ok(swept)
    }

    /// Parts on disk that nothing needs once the images `without` are gone.
    pub(super) fn dead_parts(&self, state: &State, without: &BTreeSet<Digest>) -> Result<Vec<Part>, ImageError> {
        let live: BTreeSet<Part> = state
            .records
            .values()
            .filter(|record| !without.contains(&record.digest))
            .flat_map(ImageRecord::parts)
            .chain(state.holds.keys().copied())
            .collect();
        Ok(self.present_parts()?.into_iter().filter(|part| !live.contains(part)).collect())
    }

    fn present_parts(&self) -> Result<Vec<Part>, ImageError> {
        let mut parts = Vec::new();
        let kind_of: [fn(Digest) -> Part; 3] = [Part::Blob, Part::Layer, Part::Root];
        for (directory, kind) in
            [self.paths().blobs(), self.paths().layers(), self.paths().roots()].into_iter().zip(kind_of)
        {
            for entry in fs::read_dir(&directory).map_err(|error| io_error("read", &directory, error))? {
                let entry = entry.map_err(|error| io_error("read", &directory, error))?;
                // A foreign name is nobody's part; check() reports it.
                if let Some(digest) = entry.file_name().to_str().and_then(Digest::from_hex) {
                    parts.push(kind(digest));
                }
            }
        }
        parts.sort_unstable();
        Ok(parts)
    }
}

/// Bytes that a file, or a directory of files, occupies on disk.
pub(super) fn allocated_bytes(path: &Path) -> u64 {
    let own = fs::symlink_metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
    let inside = fs::read_dir(path).map_or(0, |entries| {
        entries.flatten().map(|entry| entry.metadata().map_or(0, |metadata| metadata.blocks() * 512)).sum()
    });
    own + inside
}
