//! Saving images: the original bytes, in the layout of `docker save` or as an OCI layout.
//!
//! Nothing is made anew: manifest, configuration and layers keep their digests, so a saved image loads as the same image anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;

use serde::Serialize;

use crate::digest::Digest;
use crate::error::{ImageError, io_error};
use crate::store::{ImageRecord, Store};

/// Layout of a saved archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SaveFormat {
    /// `manifest.json` beside an OCI layout, as docker writes since version 25; older dockers read it too.
    #[default]
    Docker,
    /// An OCI layout alone.
    Oci,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index<'a> {
    schema_version: u32,
    media_type: &'a str,
    manifests: Vec<IndexEntry<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IndexEntry<'a> {
    media_type: &'a str,
    digest: Digest,
    size: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<&'a str, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Vec<String>,
    layers: Vec<String>,
}

impl Store {
    /// Writes the images that `queries` name as one archive; blobs that they share are written once.
    ///
    /// # Errors
    /// As [`Store::get`] for the names; `Corrupt` when a kept blob is lost; `Source` when `out` fails.
    pub fn save(&self, queries: &[String], format: SaveFormat, out: &mut dyn Write) -> Result<(), ImageError> {
        // A lease on each keeps its blobs from being pruned while they are written.
        let leases = queries.iter().map(|query| self.lease(query)).collect::<Result<Vec<_>, _>>()?;
        let mut images: Vec<(ImageRecord, Vec<String>)> = Vec::new();
        for (lease, query) in leases.iter().zip(queries) {
            let record = self.record(lease.digest())?;
            // A name asks for that name alone, a digest for all of them.
            let named: Vec<String> = record
                .tags
                .iter()
                .filter(|tag| query.parse().is_ok_and(|asked| tag.reference == asked))
                .map(|tag| tag.reference.to_string())
                .collect();
            let names = if named.is_empty() {
                record.tags.iter().map(|tag| tag.reference.to_string()).collect()
            } else {
                named
            };
            match images.iter_mut().find(|(known, _)| known.digest == record.digest) {
                Some((_, known)) => known.extend(names),
                None => images.push((record, names)),
            }
        }
        let mut archive = tar::Builder::new(out);
        let mut written = BTreeSet::new();
        for (record, _) in &images {
            let blobs = [(record.config, record.config_bytes)]
                .into_iter()
                .chain(record.layers.iter().map(|layer| (layer.blob, layer.blob_bytes)))
                .chain([(record.digest, record.manifest_bytes)]);
            for (digest, bytes) in blobs {
                if written.insert(digest) {
                    self.append_blob(&mut archive, digest, bytes)?;
                }
            }
        }
        let manifests = images.iter().flat_map(|(record, names)| index_entries(record, names)).collect();
        let index = Index { schema_version: 2, media_type: "application/vnd.oci.image.index.v1+json", manifests };
        append_json(&mut archive, "index.json", &index)?;
        if format == SaveFormat::Docker {
            let entries: Vec<_> = images.iter().map(|(record, names)| docker_entry(record, names)).collect();
            append_json(&mut archive, "manifest.json", &entries)?;
        }
        append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.into_inner().and_then(|out| out.flush()).map_err(ImageError::Source)
    }

    fn append_blob<W: Write>(
        &self,
        archive: &mut tar::Builder<W>,
        digest: Digest,
        bytes: u64,
    ) -> Result<(), ImageError> {
        let path = self.paths().blob(digest);
        let file = File::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => ImageError::Corrupt(format!("blob {digest} is missing")),
            _ => io_error("read", &path, error),
        })?;
        let length = file.metadata().map_err(|error| io_error("read", &path, error))?.len();
        if length != bytes {
            return Err(ImageError::Corrupt(format!("blob {digest} has another length")));
        }
        let mut header = header(bytes);
        archive.append_data(&mut header, format!("blobs/sha256/{}", digest.hex()), file).map_err(ImageError::Source)
    }
}

fn index_entries<'a>(record: &'a ImageRecord, names: &[String]) -> Vec<IndexEntry<'a>> {
    let entry = |annotations| IndexEntry {
        media_type: &record.media_type,
        digest: record.digest,
        size: record.manifest_bytes,
        annotations,
    };
    if names.is_empty() {
        return vec![entry(BTreeMap::new())];
    }
    names
        .iter()
        .map(|name| {
            entry(BTreeMap::from([
                ("io.containerd.image.name", name.clone()),
                ("org.opencontainers.image.ref.name", name.clone()),
            ]))
        })
        .collect()
}

fn docker_entry(record: &ImageRecord, names: &[String]) -> DockerEntry {
    let path = |digest: Digest| format!("blobs/sha256/{}", digest.hex());
    DockerEntry {
        config: path(record.config),
        repo_tags: names
            .iter()
            .map(|name| name.parse().map_or_else(|_| name.clone(), |name: crate::ImageReference| name.short()))
            .collect(),
        layers: record.layers.iter().map(|layer| path(layer.blob)).collect(),
    }
}

/// A header without anything of this machine or moment: the same images give the same archive.
fn header(bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes);
    header.set_mode(0o644);
    header.set_mtime(0);
    header
}

fn append<W: Write>(archive: &mut tar::Builder<W>, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
    archive.append_data(&mut header(bytes.len() as u64), name, bytes).map_err(ImageError::Source)
}

fn append_json<W: Write>(archive: &mut tar::Builder<W>, name: &str, value: &impl Serialize) -> Result<(), ImageError> {
    let bytes =
        serde_json::to_vec(value).map_err(|error| ImageError::Corrupt(format!("{name} cannot be written: {error}")))?;
    append(archive, name, &bytes)
}
