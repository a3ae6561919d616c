//! Gives the files of an archive their meaning: which are images, which of them fit, what they are called.
//!
//! An OCI layout's `index.json` is believed first, because it names manifests by digest; `docker save` writes one beside its own
//! `manifest.json`, which then only adds names. A pure docker archive has no manifest blob: one is made from what it says, the same one
//! for the same content. Every digest and size is checked here; the session has hashed the content.

use std::collections::HashSet;

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde::{Deserialize, Serialize};

use crate::archive::session::{Session, shown};
use crate::archive::{Platform, TagRule};
use crate::compression::Compression;
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{ImageError, io_error};
use crate::intake::ReadyLayer;
use crate::layer::Dropped;
use crate::limits::INDEX_DEPTH;
use crate::reference::ImageReference;
use crate::store::{LayerRecord, NewImage, NewLayer};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Full name of an image, as containerd and buildx write it.
const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// Name or tag, as the OCI specification has it.
const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";
/// Marks what belongs to a build's provenance and not to the image.
const ATTESTATION_ANNOTATION: &str = "vnd.docker.reference.type";

/// One image of a docker archive.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciLayout {
    image_layout_version: String,
}

/// The manifest made for an image of a docker archive.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MadeManifest<'a> {
    schema_version: u32,
    media_type: &'a str,
    config: MadeDescriptor<'a>,
    layers: Vec<MadeDescriptor<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MadeDescriptor<'a> {
    media_type: &'a str,
    digest: Digest,
    size: u64,
}

/// A manifest found in an index, with the names that lead to it.
struct Candidate {
    descriptor: Descriptor,
    names: Vec<String>,
}

impl Session<'_> {
    /// The images of the archive that fit, verified and named, ready to be published.
    pub(super) fn resolve(&mut self) -> Result<Vec<NewImage>, ImageError> {
        let docker = self.blob_named(b"manifest.json");
        let index = self.blob_named(b"index.json");
        let mut images = match (index, docker) {
            (Some(index), docker) => self.oci_images(index, docker)?,
            (None, Some(docker)) => self.docker_images(docker)?,
            (None, None) => {
                return Err(ImageError::Archive("it has neither a manifest.json nor an index.json".into()));
            }
        };
        self.apply_tags(&mut images)?;
        match images.iter().find(|image| image.references.is_empty()) {
            Some(image) => Err(ImageError::Unnamed { digest: image.digest.to_string() }),
            None => Ok(images),
        }
    }

    fn apply_tags(&self, images: &mut [NewImage]) -> Result<(), ImageError> {
        let mut first_names = Vec::new();
        for rule in &self.options.tags {
            match rule {
                TagRule::First(name) => first_names.push(name.clone()),
                TagRule::Rename { old, new } => {
                    let mut found = false;
                    for reference in images.iter_mut().flat_map(|image| &mut image.references) {
                        if reference == old {
                            *reference = new.clone();
                            found = true;
                        }
                    }
                    if !found {
                        return Err(ImageError::Archive(format!("it has no image called {}", old.short())));
                    }
                }
            }
        }
        if !first_names.is_empty()
            && let Some(first) = images.first_mut()
        {
            first.references = first_names;
        }
        Ok(())
    }

    fn check_count(&self, count: usize) -> Result<(), ImageError> {
        let limit = self.options.limits.archive_images;
        if count as u64 > limit {
            return Err(ImageError::Limit { what: "the archive".into(), limit, unit: " images" });
        }
        Ok(())
    }

    fn wanted(&self) -> Platform {
        self.options.platform.clone().unwrap_or_else(Platform::host)
    }

    // ---- docker archives -------------------------------------------------------------------------------------------

    fn docker_list(&self, manifest: Digest) -> Result<Vec<DockerImage>, ImageError> {
        let images: Vec<DockerImage> = parse_json(&self.document(manifest)?, "manifest.json")?;
        self.check_count(images.len())?;
        Ok(images)
    }

    fn docker_images(&mut self, manifest: Digest) -> Result<Vec<NewImage>, ImageError> {
        let entries = self.docker_list(manifest)?;
        if entries.is_empty() {
            return Err(ImageError::Archive("its manifest.json names no image".into()));
        }
        let wanted = self.wanted();
        let mut images: Vec<NewImage> = Vec::new();
        let mut available = Vec::new();
        for entry in &entries {
            let config_digest = self.blob_named(entry.config.as_bytes()).ok_or_else(|| {
                ImageError::Archive(format!("it lacks the configuration {}", shown(entry.config.as_bytes())))
            })?;
            let config_bytes = self.document(config_digest)?;
            // docker names the configuration after its digest.
            if let Some(promised) = entry.config.strip_suffix(".json").and_then(Digest::from_hex)
                && promised != config_digest
            {
                return Err(ImageError::Digest {
                    what: "the image configuration".into(),
                    expected: promised.to_string(),
                    actual: config_digest.to_string(),
                });
            }
            let config = ImageConfig::parse(&config_bytes)?;
            let platform = platform_of(&config);
            if !wanted.accepts(&platform) {
                available.push(platform.to_string());
                continue;
            }
            let layer_names = entry.layers.as_deref().unwrap_or_default();
            self.check_layer_count(layer_names.len(), &config)?;
            let mut layers = Vec::with_capacity(layer_names.len());
            for (name, diff_id) in layer_names.iter().zip(&config.diff_ids) {
                let label = shown(name.as_bytes());
                let blob = self
                    .blob_named(name.as_bytes())
                    .ok_or_else(|| ImageError::Archive(format!("it lacks layer {label}")))?;
                let ready = self.layer(blob, &label)?;
                layers.push(self.new_layer(blob, ready, *diff_id, None, &label)?);
            }
            let mut image = self.assemble(config_digest, config_bytes.len() as u64, &config, layers);
            image.references = docker_names(entry)?;
            self.make_manifest(&mut image)?;
            match images.iter_mut().find(|known| known.digest == image.digest) {
                Some(known) => merge_references(&mut known.references, image.references),
                None => images.push(image),
            }
        }
        if images.is_empty() {
            return Err(ImageError::Platform { wanted: wanted.to_string(), available });
        }
        Ok(images)
    }

    /// Writes the manifest that a docker archive lacks.
    fn make_manifest(&self, image: &mut NewImage) -> Result<(), ImageError> {
        let manifest = MadeManifest {
            schema_version: 2,
            media_type: OCI_MANIFEST,
            config: MadeDescriptor { media_type: OCI_CONFIG, digest: image.config, size: image.config_bytes },
            layers: image
                .layers
                .iter()
                .map(|layer| MadeDescriptor {
                    media_type: &layer.record.media_type,
                    digest: layer.record.blob,
                    size: layer.record.blob_bytes,
                })
                .collect(),
        };
        let bytes = serde_json::to_vec(&manifest)
            .map_err(|error| ImageError::Archive(format!("no manifest can be made for it: {error}")))?;
        image.digest = Digest::of(&bytes);
        image.manifest_bytes = bytes.len() as u64;
        let path = self.scratch().join(format!("manifest-{}", image.digest.hex()));
        std::fs::write(&path, &bytes).map_err(|error| io_error("write", &path, error))?;
        image.blobs.push((image.digest, path));
        Ok(())
    }

    // ---- OCI layouts -----------------------------------------------------------------------------------------------

    fn oci_images(&mut self, index: Digest, docker: Option<Digest>) -> Result<Vec<NewImage>, ImageError> {
        let layout = self
            .blob_named(b"oci-layout")
            .ok_or_else(|| ImageError::Archive("it has an index.json but no oci-layout".into()))?;
        let layout: OciLayout = parse_json(&self.document(layout)?, "oci-layout")?;
        if !layout.image_layout_version.starts_with("1.") {
            return Err(ImageError::Archive(format!(
                "its layout version {:?} is not known",
                layout.image_layout_version.chars().take(20).collect::<String>()
            )));
        }
        let wanted = self.wanted();
        let mut available = Vec::new();
        let mut candidates = Vec::new();
        let mut seen = HashSet::new();
        self.collect(index, &[], 0, &wanted, &mut seen, &mut candidates, &mut available)?;
        self.check_count(candidates.len())?;
        let mut images: Vec<NewImage> = Vec::new();
        for candidate in candidates {
            let Some((image, names)) = self.oci_image(&candidate, &wanted, &mut available)? else { continue };
            let mut references = Vec::new();
            for name in names {
                references.push(name.parse().map_err(|error: ImageError| ImageError::Archive(error.to_string()))?);
            }
            match images.iter_mut().find(|known| known.digest == image.digest) {
                Some(known) => merge_references(&mut known.references, references),
                None => {
                    let mut image = image;
                    merge_references(&mut image.references, references);
                    images.push(image);
                }
            }
        }
        if images.is_empty() {
            available.sort();
            available.dedup();
            return Err(ImageError::Platform { wanted: wanted.to_string(), available });
        }
        // docker's list has the names in full where the index has only a tag.
        if let Some(docker) = docker {
            for entry in self.docker_list(docker)? {
                let config = self.blob_named(entry.config.as_bytes());
                if let Some(image) = images.iter_mut().find(|image| Some(image.config) == config) {
                    let names = docker_names(&entry)?;
                    if !names.is_empty() {
                        image.references = names;
                    }
                }
            }
        }
        Ok(images)
    }

    /// Walks an index and the indexes in it.
    #[expect(clippy::too_many_arguments, reason = "the walk's own state, shared by no one else")]
    fn collect(
        &self,
        index: Digest,
        names: &[String],
        depth: usize,
        wanted: &Platform,
        seen: &mut HashSet<Digest>,
        out: &mut Vec<Candidate>,
        available: &mut Vec<String>,
    ) -> Result<(), ImageError> {
        if depth > INDEX_DEPTH {
            return Err(ImageError::Limit {
                what: "indexes inside indexes".into(),
                limit: INDEX_DEPTH as u64,
                unit: "",
            });
        }
        if depth > 0 && !seen.insert(index) {
            return Ok(());
        }
        let index: ImageIndex = parse_json(&self.document(index)?, "an index")?;
        self.check_count(index.manifests().len())?;
        let mut fitting = Vec::new();
        for descriptor in index.manifests() {
            let annotations = descriptor.annotations().as_ref();
            if annotations.is_some_and(|annotations| annotations.contains_key(ATTESTATION_ANNOTATION)) {
                continue;
            }
            let own_name = annotations.and_then(|annotations| {
                annotations.get(NAME_ANNOTATION).or_else(|| annotations.get(REF_ANNOTATION)).cloned()
            });
            let names = match own_name {
                Some(name) => vec![name],
                None => names.to_vec(),
            };
            match descriptor.media_type().to_string().as_str() {
                "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json" => {
                    let digest = self.check_descriptor(descriptor, "a nested index")?;
                    self.collect(digest, &names, depth + 1, wanted, seen, out, available)?;
                }
                OCI_MANIFEST | "application/vnd.docker.distribution.manifest.v2+json" => {
                    if let Some(platform) = descriptor.platform() {
                        let platform = Platform {
                            os: platform.os().to_string(),
                            architecture: platform.architecture().to_string(),
                            variant: platform.variant().clone(),
                        };
                        if platform.os == "unknown" {
                            // How attestations are marked when they carry no annotation.
                            continue;
                        }
                        if !wanted.accepts(&platform) {
                            available.push(platform.to_string());
                            continue;
                        }
                    }
                    fitting.push(Candidate { descriptor: descriptor.clone(), names });
                }
                other => {
                    return Err(ImageError::Archive(format!(
                        "its index names something of type {:?}, which is not an image",
                        other.chars().take(100).collect::<String>()
                    )));
                }
            }
        }
        // In a nested index the entries are variants of one image: the first that fits is it.
        if depth > 0 {
            fitting.truncate(1);
        }
        out.extend(fitting);
        Ok(())
    }

    /// The blob of a descriptor, present and of the promised size. The session has already hashed it.
    fn check_descriptor(&self, descriptor: &Descriptor, what: &str) -> Result<Digest, ImageError> {
        let digest: Digest = descriptor
            .digest()
            .as_ref()
            .parse()
            .map_err(|error| ImageError::Archive(format!("the digest of {what}: {error}")))?;
        let blob =
            self.blobs.get(&digest).ok_or_else(|| ImageError::Archive(format!("it lacks {what}, blob {digest}")))?;
        if blob.bytes != descriptor.size() {
            return Err(ImageError::Size {
                what: format!("{what}, blob {}", digest.short()),
                expected: descriptor.size(),
                actual: blob.bytes,
            });
        }
        Ok(digest)
    }

    fn oci_image(
        &mut self,
        candidate: &Candidate,
        wanted: &Platform,
        available: &mut Vec<String>,
    ) -> Result<Option<(NewImage, Vec<String>)>, ImageError> {
        let manifest_digest = self.check_descriptor(&candidate.descriptor, "a manifest")?;
        let manifest_bytes = self.document(manifest_digest)?;
        let manifest: ImageManifest = parse_json(&manifest_bytes, "a manifest")?;
        let config_digest = self.check_descriptor(manifest.config(), "an image configuration")?;
        let config_bytes = self.document(config_digest)?;
        let config = ImageConfig::parse(&config_bytes)?;
        let platform = platform_of(&config);
        if !wanted.accepts(&platform) {
            available.push(platform.to_string());
            return Ok(None);
        }
        self.check_layer_count(manifest.layers().len(), &config)?;
        let mut layers = Vec::with_capacity(manifest.layers().len());
        for (descriptor, diff_id) in manifest.layers().iter().zip(&config.diff_ids) {
            let media_type = descriptor.media_type().to_string();
            if !is_layer_type(&media_type) {
                return Err(ImageError::Archive(format!(
                    "a layer has type {:?}, which is not a file system layer",
                    media_type.chars().take(100).collect::<String>()
                )));
            }
            let blob = self.check_descriptor(descriptor, "a layer")?;
            let label = blob.short();
            let ready = self.layer(blob, &label)?;
            layers.push(self.new_layer(blob, ready, *diff_id, Some(media_type), &label)?);
        }
        let mut image = self.assemble(config_digest, config_bytes.len() as u64, &config, layers);
        image.digest = manifest_digest;
        image.manifest_bytes = manifest_bytes.len() as u64;
        image.media_type = candidate.descriptor.media_type().to_string();
        self.add_blob(&mut image, manifest_digest);
        Ok(Some((image, candidate.names.clone())))
    }

    // ---- both ------------------------------------------------------------------------------------------------------

    fn check_layer_count(&self, layers: usize, config: &ImageConfig) -> Result<(), ImageError> {
        let limit = self.options.limits.layers;
        if layers as u64 > limit {
            return Err(ImageError::Limit { what: "an image".into(), limit, unit: " layers" });
        }
        if layers != config.diff_ids.len() {
            return Err(ImageError::Archive(format!(
                "an image has {layers} layers but its configuration lists {}",
                config.diff_ids.len()
            )));
        }
        Ok(())
    }

    fn new_layer(
        &self,
        blob: Digest,
        ready: ReadyLayer,
        diff_id: Digest,
        media_type: Option<String>,
        label: &str,
    ) -> Result<NewLayer, ImageError> {
        if ready.diff_id != diff_id {
            return Err(ImageError::Digest {
                what: format!("layer {label}, unpacked,"),
                expected: diff_id.to_string(),
                actual: ready.diff_id.to_string(),
            });
        }
        let blob_bytes = self.blobs.get(&blob).map_or(0, |found| found.bytes);
        Ok(NewLayer {
            record: LayerRecord {
                blob,
                blob_bytes,
                media_type: media_type.unwrap_or_else(|| media_type_of(ready.compression)),
                compression: ready.compression,
                diff_id,
                tar_bytes: ready.tar_bytes,
                data_bytes: ready.data_bytes,
            },
            files: ready.files,
            dropped: ready.dropped,
        })
    }

    fn assemble(
        &self,
        config_digest: Digest,
        config_bytes: u64,
        config: &ImageConfig,
        layers: Vec<NewLayer>,
    ) -> NewImage {
        let mut dropped = Dropped::default();
        for layer in &layers {
            dropped.add(&layer.dropped);
        }
        let mut image = NewImage {
            // The caller sets what the manifest says.
            digest: config_digest,
            manifest_bytes: 0,
            media_type: OCI_MANIFEST.into(),
            config: config_digest,
            config_bytes,
            platform: platform_of(config).to_string(),
            references: Vec::new(),
            indexes: Vec::new(),
            dropped,
            blobs: Vec::new(),
            layers,
        };
        self.add_blob(&mut image, config_digest);
        for blob in image.layers.iter().map(|layer| layer.record.blob).collect::<Vec<_>>() {
            self.add_blob(&mut image, blob);
        }
        image
    }

    fn add_blob(&self, image: &mut NewImage, digest: Digest) {
        if let Some(file) = self.blobs.get(&digest).and_then(|blob| blob.file.clone()) {
            image.blobs.push((digest, file));
        }
    }
}

fn parse_json<'de, T: Deserialize<'de>>(bytes: &'de [u8], what: &str) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::Archive(format!("{what} cannot be read: {error}")))
}

fn docker_names(entry: &DockerImage) -> Result<Vec<ImageReference>, ImageError> {
    entry
        .repo_tags
        .iter()
        .flatten()
        // What docker writes for an image without a name.
        .filter(|name| !name.contains("<none>"))
        .map(|name| name.parse().map_err(|error: ImageError| ImageError::Archive(error.to_string())))
        .collect()
}

fn merge_references(known: &mut Vec<ImageReference>, more: Vec<ImageReference>) {
    for reference in more {
        if !known.contains(&reference) {
            known.push(reference);
        }
    }
}

pub(crate) fn platform_of(config: &ImageConfig) -> Platform {
    Platform { os: config.os.clone(), architecture: config.architecture.clone(), variant: config.variant.clone() }
}

fn media_type_of(compression: Compression) -> String {
    compression.layer_media_type().to_string()
}

/// OCI and docker file system layers, whatever their compression: that is told by their bytes.
pub(crate) fn is_layer_type(media_type: &str) -> bool {
    media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.")
}
