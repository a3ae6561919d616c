//! Image archives, in the two forms users have: what `docker save` writes, and an OCI image layout in a tar.
//!
//! Written here and not by another tool, so that the tests do not depend on which versions of those tools a machine has; that skopeo
//! and umoci read them is checked in the image crate's tests.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::program;

/// How a layer's blob is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Zstd,
}

/// A layer: its tar stream, and how an OCI archive compresses it.
#[derive(Clone)]
pub(crate) struct StoredLayer {
    pub(crate) tar: Vec<u8>,
    pub(crate) compression: Compression,
}

/// An image to be written.
pub(crate) struct Image<'a> {
    /// `name:tag`
    pub(crate) reference: &'a str,
    /// The `config` object of the image configuration: Cmd, Env, User …
    pub(crate) config: Value,
    pub(crate) layers: Vec<StoredLayer>,
}

impl Image<'_> {
    /// The image configuration (OCI image-spec, config.md): what to run, and the digests of the *uncompressed* layers.
    fn configuration(&self) -> Result<Vec<u8>> {
        let diff_ids: Vec<String> = self.layers.iter().map(|layer| digest(&layer.tar)).collect();
        let history: Vec<Value> = self
            .layers
            .iter()
            .enumerate()
            .map(|(index, _)| json!({ "created": CREATED, "created_by": format!("cargo xtask images (layer {})", index + 1) }))
            .collect();
        Ok(serde_json::to_vec(&json!({
            "architecture": "amd64",
            "os": "linux",
            "created": CREATED,
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": history,
        }))?)
    }

    /// Writes the form of `docker save`: `manifest.json`, a configuration, one folder per layer.
    pub(crate) fn write_docker(&self, path: &Path) -> Result<()> {
        let mut tar = Builder::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
        let configuration = self.configuration()?;
        let configuration_name = format!("{}.json", hex_digest(&configuration));
        let mut layer_names = Vec::new();
        for layer in &self.layers {
            let folder = hex_digest(&layer.tar);
            let name = format!("{folder}/layer.tar");
            if !layer_names.contains(&name) {
                append(&mut tar, EntryType::Directory, &format!("{folder}/"), &[])?;
                append(&mut tar, EntryType::Regular, &format!("{folder}/VERSION"), b"1.0")?;
                append(&mut tar, EntryType::Regular, &name, &layer.tar)?;
            }
            layer_names.push(name);
        }
        append(&mut tar, EntryType::Regular, &configuration_name, &configuration)?;
        let manifest = json!([{ "Config": configuration_name, "RepoTags": [self.reference], "Layers": layer_names }]);
        append(&mut tar, EntryType::Regular, "manifest.json", &serde_json::to_vec(&manifest)?)?;
        tar.into_inner()?.flush()?;
        Ok(())
    }

    /// Writes an OCI image layout (image-spec, image-layout.md) with one manifest.
    pub(crate) fn write_oci(&self, path: &Path) -> Result<()> {
        let mut tar = Builder::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
        append(&mut tar, EntryType::Directory, "blobs/", &[])?;
        append(&mut tar, EntryType::Directory, "blobs/sha256/", &[])?;
        let mut written = Vec::new();
        let mut blob = |tar: &mut Builder<File>, kind: &str, content: &[u8]| -> Result<Value> {
            let name = format!("blobs/sha256/{}", hex_digest(content));
            if !written.contains(&name) {
                append(tar, EntryType::Regular, &name, content)?;
                written.push(name);
            }
            Ok(
                json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest(content), "size": content.len() }),
            )
        };
        let mut layers = Vec::new();
        for layer in &self.layers {
            layers.push(match layer.compression {
                Compression::Gzip => blob(&mut tar, "layer.v1.tar+gzip", &gzip(&layer.tar)?)?,
                Compression::Zstd => blob(&mut tar, "layer.v1.tar+zstd", &zstd(&layer.tar)?)?,
            });
        }
        let configuration = blob(&mut tar, "config.v1+json", &self.configuration()?)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": configuration,
            "layers": layers,
        });
        let mut manifest = blob(&mut tar, "manifest.v1+json", &serde_json::to_vec(&manifest)?)?;
        let tag = self.reference.rsplit_once(':').map_or("latest", |(_, tag)| tag);
        manifest["annotations"] = json!({
            "org.opencontainers.image.ref.name": tag,
            "io.containerd.image.name": format!("docker.io/library/{}", self.reference),
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [manifest],
        });
        append(&mut tar, EntryType::Regular, "index.json", &serde_json::to_vec(&index)?)?;
        append(&mut tar, EntryType::Regular, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        tar.into_inner()?.flush()?;
        Ok(())
    }
}

const CREATED: &str = "2024-01-01T00:00:00Z";

fn append(tar: &mut Builder<File>, kind: EntryType, path: &str, content: &[u8]) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    Ok(tar.append_data(&mut header, path, content)?)
}

fn gzip(content: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(content)?;
    Ok(encoder.finish()?)
}

fn zstd(content: &[u8]) -> Result<Vec<u8>> {
    let input = tempfile::NamedTempFile::new()?;
    std::fs::write(input.path(), content)?;
    let output = program::command("zstd").args(["-q", "-c"]).arg(input.path()).stderr(Stdio::inherit()).output()?;
    anyhow::ensure!(output.status.success(), "zstd ended with {}", output.status);
    Ok(output.stdout)
}

fn hex_digest(content: &[u8]) -> String {
    hex::encode(Sha256::digest(content))
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex_digest(content))
}
