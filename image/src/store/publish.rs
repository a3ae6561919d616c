//! Gives parts their final names, and the image its record: the only way anything becomes live.
//!
//! ```text
//!  tmp/X/blob… ──rename──► blobs/sha256/H ─┐
//!  tmp/X/layer…──rename──► layers/v1/D/  ──┼─► records/M.json ──► flusher: fsync all, `flushed: true`
//!  tmp/X/root  ──rename──► roots/v1/C    ──┘        (all under the one mutex, so that a sweep sees all or nothing)
//! ```

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::erofs::{MergedTree, write_metadata};
use crate::error::{ImageError, io_error};
use crate::faults;
use crate::layer::{Dropped, Hashing, LayerTree, import_layer};
use crate::limits::Limits;
use crate::reference::ImageReference;
use crate::store::paths::chain_digest;
use crate::store::record::RECORD_FORMAT;
use crate::store::{ImageRecord, LayerRecord, Part, Store, TagRecord, now_ms};

/// A layer of an image about to be published.
#[derive(Clone, Debug)]
pub(crate) struct NewLayer {
    pub(crate) record: LayerRecord,
    /// Directory with its two files, if the store does not have them.
    pub(crate) files: Option<PathBuf>,
    pub(crate) dropped: Dropped,
}

/// An image about to be published. Everything in it is verified.
#[derive(Clone, Debug)]
pub(crate) struct NewImage {
    pub(crate) digest: Digest,
    pub(crate) manifest_bytes: u64,
    pub(crate) media_type: String,
    pub(crate) config: Digest,
    pub(crate) config_bytes: u64,
    pub(crate) layers: Vec<NewLayer>,
    pub(crate) platform: String,
    pub(crate) references: Vec<ImageReference>,
    /// Indexes that led to it.
    pub(crate) indexes: Vec<Digest>,
    pub(crate) dropped: Dropped,
    /// Blobs that the store may lack, as temporary files.
    pub(crate) blobs: Vec<(Digest, PathBuf)>,
}

impl NewImage {
    /// Every part that the image will need.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        let chain = chain_digest(self.layers.iter().map(|layer| layer.record.diff_id));
        let layers =
            self.layers.iter().flat_map(|layer| [Part::Blob(layer.record.blob), Part::Layer(layer.record.diff_id)]);
        [Part::Blob(self.digest), Part::Blob(self.config), Part::Root(chain)].into_iter().chain(layers)
    }
}

impl Store {
    /// Merges the layers and makes the image live; `scratch` is a temporary directory of the caller on the same file system.
    /// The caller holds all of [`NewImage::parts`].
    ///
    /// Returns whether the store already had an image of this digest.
    pub(crate) fn publish(&self, image: &NewImage, scratch: &Path, limits: &Limits) -> Result<bool, ImageError> {
        let now = now_ms();
        let record = ImageRecord {
            format: RECORD_FORMAT,
            digest: image.digest,
            manifest_bytes: image.manifest_bytes,
            media_type: image.media_type.clone(),
            config: image.config,
            config_bytes: image.config_bytes,
            layers: image.layers.iter().map(|layer| layer.record.clone()).collect(),
            platform: image.platform.clone(),
            tags: image
                .references
                .iter()
                .map(|reference| TagRecord { reference: reference.clone(), since_ms: now })
                .collect(),
            indexes: image.indexes.clone(),
            loaded_ms: now,
            used_ms: now,
            pinned: false,
            dropped: image.dropped.clone(),
            flushed: false,
            boot_id: self.shared().boot_id.clone(),
        };
        let chain = record.chain();
        let root = self.paths().root(chain);
        // A root that exists was merged before, for an image of the same layers.
        let new_root = if root.exists() { None } else { Some(self.merge_new(image, chain, scratch, limits)?) };

        let mut state = self.state();
        for (digest, file) in &image.blobs {
            faults::step("image: name a blob");
            rename_if_there(file, &self.paths().blob(*digest))?;
            if !self.flights().is_under_way(*digest) {
                // What an earlier load that was killed left is a download that nobody needs to finish any more.
                let _ = fs::remove_file(self.paths().partial(*digest));
            }
        }
        for layer in &image.layers {
            let Some(files) = &layer.files else { continue };
            if self.layer_is_whole(&layer.record) {
                continue;
            }
            faults::step("layer: name the files");
            let target = self.paths().layer(layer.record.diff_id);
            rename_if_there(&target, &scratch.join(format!("replaced-{}", layer.record.diff_id.hex())))?;
            rename_if_there(files, &target)?;
        }
        if let Some(new_root) = new_root {
            faults::step("image: name the root");
            rename_if_there(&new_root, &root)?;
        }
        // What was skipped because the store had it must still be there.
        if let Some(missing) = record.parts().find(|part| !self.paths().part(*part).exists()) {
            return Err(ImageError::Corrupt(format!("{missing:?} disappeared during the load; load the image again")));
        }
        let existing = state.records.get(&image.digest).cloned();
        let record = match &existing {
            Some(old) => {
                let mut merged = old.clone();
                for tag in record.tags {
                    merged.tags.retain(|known| known.reference != tag.reference);
                    merged.tags.push(tag);
                }
                for index in record.indexes {
                    if !merged.indexes.contains(&index) {
                        merged.indexes.push(index);
                    }
                }
                merged.layers = record.layers;
                merged.flushed = false;
                merged.boot_id = record.boot_id;
                merged.used_ms = now;
                merged
            }
            None => record,
        };
        self.shared().write_record(&record)?;
        state.records.insert(image.digest, record);
        self.take_tags_from_others(&mut state, image.digest, &image.references)?;
        drop(state);
        self.inner.flusher.submit(image.digest);
        Ok(existing.is_some())
    }

    /// Gives a fetched layer its final names before its image is whole, so that other pulls can use it. `holds` keeps it until there
    /// is a record; `scratch` takes what it replaces.
    pub(crate) fn publish_layer(
        &self,
        record: &LayerRecord,
        blob: &Path,
        files: &Path,
        scratch: &Path,
        holds: &mut super::Holds,
    ) -> Result<(), ImageError> {
        holds.reserve(Part::Blob(record.blob));
        holds.reserve(Part::Layer(record.diff_id));
        let _state = self.state();
        faults::step("layer: name the blob");
        rename_if_there(blob, &self.paths().blob(record.blob))?;
        // rename(2) leaves both names where they are one file already.
        let _ = fs::remove_file(blob);
        if !self.layer_is_whole(record) {
            faults::step("layer: name the files");
            let target = self.paths().layer(record.diff_id);
            rename_if_there(&target, &scratch.join(format!("replaced-{}", record.diff_id.hex())))?;
            rename_if_there(files, &target)?;
        }
        Ok(())
    }

    fn merge_new(
        &self,
        image: &NewImage,
        chain: Digest,
        scratch: &Path,
        limits: &Limits,
    ) -> Result<PathBuf, ImageError> {
        let trees = image
            .layers
            .iter()
            .map(|layer| match &layer.files {
                Some(files) if files.exists() => {
                    let path = files.join(crate::layer::TREE_FILE);
                    LayerTree::decode(&fs::read(&path).map_err(|error| io_error("read", &path, error))?)
                }
                _ => self.read_tree(layer.record.diff_id),
            })
            .collect::<Result<Vec<_>, _>>()?;
        write_root(&trees, chain, scratch, limits)
    }

    /// Makes a layer's files again from its kept blob.
    pub(super) fn rebuild_layer(&self, layer: &LayerRecord) -> Result<(), ImageError> {
        let scratch = self.temporary()?;
        let files = self.unpack_blob(layer, scratch.path())?;
        let target = self.paths().layer(layer.diff_id);
        let _state = self.state();
        rename_if_there(&target, &scratch.path().join("replaced"))?;
        rename_if_there(&files, &target)
    }

    /// Unpacks a kept layer blob into a directory inside `scratch`, and checks that it is the layer it should be.
    pub(super) fn unpack_blob(&self, layer: &LayerRecord, scratch: &Path) -> Result<PathBuf, ImageError> {
        let files = scratch.join("layer");
        fs::create_dir(&files).map_err(|error| io_error("create", &files, error))?;
        let blob = self.paths().blob(layer.blob);
        let source = File::open(&blob).map_err(|error| match error.kind() {
            ErrorKind::NotFound => ImageError::Corrupt(format!("blob {} is missing", layer.blob)),
            _ => io_error("read", &blob, error),
        })?;
        let name = layer.diff_id.to_string();
        // What was admitted once is admitted again, whatever limits the load had.
        let limits = Limits { layer_bytes: layer.tar_bytes.max(1), compression_ratio: u64::MAX, ..Limits::default() };
        let source = BufReader::with_capacity(256 << 10, source);
        let imported = import_layer(source, layer.compression, &files, &limits, &name, Hashing::Here).map_err(
            |error| match error {
                // A disk without room says nothing about the blob.
                full @ ImageError::DiskFull(_) => full,
                error => ImageError::Corrupt(format!("blob {} no longer unpacks: {error}", layer.blob)),
            },
        )?;
        if imported.diff_id != Some(layer.diff_id) || imported.tree.data_bytes != layer.data_bytes {
            return Err(ImageError::Corrupt(format!("blob {} has other content", layer.blob)));
        }
        Ok(files)
    }

    pub(super) fn rebuild_root(&self, record: &ImageRecord) -> Result<(), ImageError> {
        let scratch = self.temporary()?;
        let trees = record.layers.iter().map(|layer| self.read_tree(layer.diff_id)).collect::<Result<Vec<_>, _>>()?;
        let limits = Limits { image_entries: u64::MAX, ..Limits::default() };
        let root = write_root(&trees, record.chain(), scratch.path(), &limits)?;
        let _state = self.state();
        rename_if_there(&root, &self.paths().root(record.chain()))
    }

    /// A name belongs to one image: the others lose it.
    pub(super) fn take_tags_from_others(
        &self,
        state: &mut super::State,
        owner: Digest,
        references: &[ImageReference],
    ) -> Result<(), ImageError> {
        for (digest, record) in &mut state.records {
            let before = record.tags.len();
            if *digest != owner {
                record.tags.retain(|tag| !references.contains(&tag.reference));
            }
            if record.tags.len() != before {
                self.shared().write_record(record)?;
            }
        }
        Ok(())
    }

    /// Whether the store has a layer's files and knows of which blob they were made.
    pub(crate) fn known_layer(&self, blob: Digest) -> Option<(LayerRecord, Dropped)> {
        let state = self.state();
        let layer = state.records.values().flat_map(|record| &record.layers).find(|layer| layer.blob == blob)?.clone();
        drop(state);
        if !self.layer_is_whole(&layer) {
            return None;
        }
        let dropped = self.read_tree(layer.diff_id).ok()?.dropped;
        Some((layer, dropped))
    }

    /// Whether a blob is a manifest or configuration of an image in the store.
    pub(crate) fn known_document(&self, blob: Digest) -> bool {
        self.state().records.values().any(|record| record.digest == blob || record.config == blob)
    }

    /// Length of a blob that the store has.
    pub(crate) fn blob_length(&self, blob: Digest) -> Option<u64> {
        fs::metadata(self.paths().blob(blob)).ok().map(|metadata| metadata.len())
    }

    pub(crate) fn hold_layer(holds: &mut super::Holds, layer: &LayerRecord) -> bool {
        holds.take(Part::Blob(layer.blob)) && holds.take(Part::Layer(layer.diff_id))
    }
}

/// Merges trees and writes the metadata image into `scratch`.
pub(super) fn write_root(
    trees: &[LayerTree],
    chain: Digest,
    scratch: &Path,
    limits: &Limits,
) -> Result<PathBuf, ImageError> {
    let path = scratch.join(format!("root-{}", chain.hex()));
    faults::step("root: write");
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path)
        .map_err(|error| io_error("create", &path, error))?;
    merge_into(trees, chain, BufWriter::with_capacity(256 << 10, file), limits).map_err(|error| match error {
        MergeFailure::Merge(error) => error,
        MergeFailure::Write(error) => io_error("write", &path, error),
    })?;
    Ok(path)
}

/// Why [`merge_into`] failed.
pub(super) enum MergeFailure {
    Merge(ImageError),
    Write(std::io::Error),
}

/// Merges trees and writes the metadata image to `out`; returns its length.
pub(super) fn merge_into(
    trees: &[LayerTree],
    chain: Digest,
    out: impl std::io::Write,
    limits: &Limits,
) -> Result<u64, MergeFailure> {
    use crate::erofs::MergeError;
    let merged = MergedTree::new(trees, limits.image_entries).map_err(|error| {
        MergeFailure::Merge(match error {
            MergeError::LinkTarget { layer, .. } => {
                ImageError::Layer { layer: format!("number {layer}"), reason: error.to_string() }
            }
            MergeError::TooMany(limit) => ImageError::Limit { what: "the merged image".into(), limit, unit: " files" },
            MergeError::TooLarge => {
                ImageError::Limit { what: "the image's data".into(), limit: 16 << 40, unit: " bytes" }
            }
        })
    })?;
    let mut identity = [0; 16];
    // The first half of the chain's digest.
    let _ = hex::decode_to_slice(&chain.hex()[..32], &mut identity);
    write_metadata(&merged, identity, out).map_err(MergeFailure::Write)
}

/// Renames; a source that is gone was renamed by an earlier image of the same archive, or was never there.
fn rename_if_there(from: &Path, to: &Path) -> Result<(), ImageError> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("create", to, error)),
        _ => Ok(()),
    }
}
