//! Reading the store at open, and `msb doctor --store`: is everything that a record names there, and is it what it should be?

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Hasher};
use crate::error::{ImageError, io_error};
use crate::limits::Limits;
use crate::store::publish::{MergeFailure, merge_into};
use crate::store::record::RECORD_FORMAT;
use crate::store::{ImageRecord, Store, read_bounded, remove_any};

/// How closely [`Store::check`] looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckDepth {
    /// Everything is there with its length, indexes decode, merged metadata is what the layers give.
    Structure,
    /// Also hashes every blob and unpacks every layer again to compare. Takes about as long as loading the images.
    Content,
}

/// What [`Store::check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Images looked at.
    pub images: u64,
    /// Distinct layers looked at.
    pub layers: u64,
    /// Bytes of the images' blobs, each counted once.
    pub bytes: u64,
    /// What is wrong, one sentence each; empty for a sound store.
    pub problems: Vec<String>,
}

impl Store {
    /// Checks the whole store without changing it.
    ///
    /// # Errors
    /// `Io` when a directory of the store cannot be read at all, `DiskFull` when there is no room to unpack what is compared; everything
    /// else is a problem in the report.
    pub fn check(&self, depth: CheckDepth) -> Result<CheckReport, ImageError> {
        let (records, dead) = {
            let state = self.state();
            (
                state.records.values().cloned().collect::<Vec<_>>(),
                self.dead_parts(&state, &std::collections::BTreeSet::new())?,
            )
        };
        let mut report = CheckReport { images: records.len() as u64, ..CheckReport::default() };
        for part in dead {
            report.problems.push(format!("{part:?} belongs to no image"));
        }
        for directory in [self.paths().blobs(), self.paths().layers(), self.paths().roots()] {
            for entry in fs::read_dir(&directory).map_err(|error| io_error("read", &directory, error))?.flatten() {
                if entry.file_name().to_str().and_then(Digest::from_hex).is_none() {
                    report.problems.push(format!("{} is not a part of the store", entry.path().display()));
                }
            }
        }
        report.bytes = super::prune::unique_blob_bytes(records.iter());
        let mut seen = std::collections::BTreeSet::new();
        for record in &records {
            report.layers += record.layers.iter().filter(|layer| seen.insert(layer.diff_id)).count() as u64;
            report.problems.extend(
                self.problems_of(record, depth)?
                    .into_iter()
                    .map(|problem| format!("image {}: {problem}", record.name())),
            );
        }
        Ok(report)
    }

    /// What is wrong with an image; `DiskFull` when that cannot be told, which is no damage.
    fn problems_of(&self, record: &ImageRecord, depth: CheckDepth) -> Result<Vec<String>, ImageError> {
        let mut problems = Vec::new();
        let mut note = |result: Result<(), ImageError>| match result {
            Ok(()) => Ok(()),
            Err(full @ ImageError::DiskFull(_)) => Err(full),
            Err(error) => {
                problems.push(error.to_string());
                Ok(())
            }
        };
        note(self.check_blob(record.digest, record.manifest_bytes, CheckDepth::Content))?;
        note(self.check_blob(record.config, record.config_bytes, CheckDepth::Content))?;
        for layer in &record.layers {
            note(self.check_blob(layer.blob, layer.blob_bytes, depth))?;
            note(self.check_layer(layer, depth))?;
        }
        note(self.check_root(record))?;
        Ok(problems)
    }

    /// Whether every part of an image is there with its length. Takes as long as asking the file system does.
    pub(super) fn is_complete(&self, record: &ImageRecord) -> bool {
        let blob = |digest, bytes| self.check_blob(digest, bytes, CheckDepth::Structure).is_ok();
        blob(record.digest, record.manifest_bytes)
            && blob(record.config, record.config_bytes)
            && record.layers.iter().all(|layer| blob(layer.blob, layer.blob_bytes) && self.layer_is_whole(layer))
            && self.paths().root(record.chain()).exists()
    }

    fn check_blob(&self, digest: Digest, bytes: u64, depth: CheckDepth) -> Result<(), ImageError> {
        let path = self.paths().blob(digest);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() == bytes => {}
            Ok(_) => return Err(ImageError::Corrupt(format!("blob {digest} has another length"))),
            Err(_) => return Err(ImageError::Corrupt(format!("blob {digest} is missing"))),
        }
        if depth == CheckDepth::Content && hash_file(&path)? != digest {
            return Err(ImageError::Corrupt(format!("blob {digest} has other content")));
        }
        Ok(())
    }

    fn check_layer(&self, layer: &super::LayerRecord, depth: CheckDepth) -> Result<(), ImageError> {
        if !self.layer_is_whole(layer) {
            return Err(ImageError::Corrupt(format!("layer {} is missing or cut short", layer.diff_id)));
        }
        let tree = self.read_tree(layer.diff_id)?;
        if tree.data_bytes != layer.data_bytes {
            return Err(ImageError::Corrupt(format!("layer {} has an index of another layer", layer.diff_id)));
        }
        if depth == CheckDepth::Content {
            let scratch = self.temporary()?;
            let files = self.unpack_blob(layer, scratch.path())?;
            for name in [crate::layer::DATA_FILE, crate::layer::TREE_FILE] {
                if hash_file(&files.join(name))? != hash_file(&self.paths().layer(layer.diff_id).join(name))? {
                    return Err(ImageError::Corrupt(format!(
                        "the {name} of layer {} has other content",
                        layer.diff_id
                    )));
                }
            }
        }
        Ok(())
    }

    fn check_root(&self, record: &ImageRecord) -> Result<(), ImageError> {
        let path = self.paths().root(record.chain());
        let actual = hash_file(&path)?;
        let trees = record.layers.iter().map(|layer| self.read_tree(layer.diff_id)).collect::<Result<Vec<_>, _>>()?;
        let limits = Limits { image_entries: u64::MAX, ..Limits::default() };
        let mut expected = HashWriter(Hasher::default());
        merge_into(&trees, record.chain(), &mut expected, &limits).map_err(|failure| match failure {
            MergeFailure::Merge(error) => error,
            MergeFailure::Write(error) => ImageError::Corrupt(error.to_string()),
        })?;
        if expected.0.finish() == actual {
            Ok(())
        } else {
            Err(ImageError::Corrupt(format!("the merged metadata {} has other content", record.chain())))
        }
    }

    /// Reads all records; drops those that cannot be believed.
    pub(super) fn read_records(&self) -> Result<(), ImageError> {
        let directory = self.paths().records();
        let mut unflushed = Vec::new();
        for entry in fs::read_dir(&directory).map_err(|error| io_error("read", &directory, error))? {
            let path = entry.map_err(|error| io_error("read", &directory, error))?.path();
            let record = match read_record(&path) {
                Ok(record) if self.paths().record(record.digest) == path => record,
                Ok(_) => {
                    drop_record(&path, "its name is not its digest")?;
                    continue;
                }
                Err(ImageError::Corrupt(reason)) => {
                    drop_record(&path, &reason)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !record.flushed {
                // Another boot means that the page cache is gone, and maybe what was in it.
                if record.boot_id != self.shared().boot_id {
                    match self.problems_of(&record, CheckDepth::Content) {
                        Ok(problems) if problems.is_empty() => {}
                        Ok(problems) => {
                            drop_record(&path, &problems.join("; "))?;
                            continue;
                        }
                        // It stays as it is, and is looked at again when the store is opened next.
                        Err(error) => {
                            tracing::warn!(image = record.name(), %error, "an image of another boot could not be checked");
                            self.state().records.insert(record.digest, record);
                            continue;
                        }
                    }
                }
                unflushed.push(record.digest);
            }
            self.state().records.insert(record.digest, record);
        }
        self.settle_tags()?;
        for digest in unflushed {
            self.inner.flusher.submit(digest);
        }
        Ok(())
    }

    /// A crash between two records can leave a name with both: the later claim has it.
    fn settle_tags(&self) -> Result<(), ImageError> {
        let mut state = self.state();
        let mut owners = std::collections::BTreeMap::new();
        for record in state.records.values() {
            for tag in &record.tags {
                let owner = owners.entry(tag.reference.clone()).or_insert((tag.since_ms, record.digest));
                *owner = (*owner).max((tag.since_ms, record.digest));
            }
        }
        for record in state.records.values_mut() {
            let before = record.tags.len();
            let digest = record.digest;
            record.tags.retain(|tag| owners.get(&tag.reference).is_some_and(|(_, owner)| *owner == digest));
            if record.tags.len() != before {
                self.shared().write_record(record)?;
            }
        }
        Ok(())
    }

    /// Removes parts that a crash, or something that failed, left without a record.
    pub(crate) fn sweep_orphans(&self) -> Result<(), ImageError> {
        let state = self.state();
        let swept = self.sweep(&state)?;
        drop(state);
        let bytes = swept.discard();
        if bytes > 0 {
            tracing::info!(bytes, "unreferenced parts of the image store removed");
        }
        Ok(())
    }
}

fn read_record(path: &Path) -> Result<ImageRecord, ImageError> {
    let bytes = read_bounded(path, Limits::default().metadata_bytes)?;
    let record: ImageRecord = serde_json::from_slice(&bytes).map_err(|error| ImageError::Corrupt(error.to_string()))?;
    if record.format == RECORD_FORMAT {
        Ok(record)
    } else {
        Err(ImageError::Corrupt(format!("it has format {}", record.format)))
    }
}

fn drop_record(path: &Path, reason: &str) -> Result<(), ImageError> {
    tracing::error!(record = %path.display(), reason, "image record cannot be believed and is removed; load the image again");
    remove_any(path)
}

fn hash_file(path: &Path) -> Result<Digest, ImageError> {
    let mut file = File::open(path).map_err(|error| io_error("read", path, error))?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error("read", path, error)),
        }
    }
}

struct HashWriter(Hasher);

impl Write for HashWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
