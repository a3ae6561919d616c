//! [`ImageStore`] over the content store of `msb-image`: types of one crate into words of the API, nothing else.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use msb_image::{CheckDepth, ImageConfig, LoadOptions, LoadSource, Store, TagRule};
use msb_protocol::control::{ImageConfigDetail, ImageDetail, ImageLayerDetail, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::ApiError;
use msb_protocol::vmm::DiskPart;

use super::{ImageStore, ImageUsers, PreparedImage};

/// The store of a home.
pub struct ContentStore {
    store: Store,
    /// The packed template of writable disks.
    template: PathBuf,
}

impl ContentStore {
    /// Opens the store of a home, making it if there is none.
    ///
    /// # Errors
    /// Another process has it, a later msb made it, or the directory cannot be used.
    pub fn open(home: &Path, template: PathBuf) -> Result<Self, ApiError> {
        Ok(Self { store: Store::open(home)?, template })
    }

    fn summary(&self, summary: &msb_image::ImageSummary) -> Result<ImageSummary, ApiError> {
        let details = self.store.get(&summary.digest.to_string())?;
        Ok(ImageSummary {
            digest: summary.digest.to_string(),
            references: summary.references.clone(),
            platform: summary.platform.clone(),
            compressed_bytes: details.layers.iter().map(|layer| layer.compressed_bytes).sum(),
            unpacked_bytes: details.layers.iter().map(|layer| layer.unpacked_bytes).sum(),
            layers: u32::try_from(summary.layers).unwrap_or(u32::MAX),
            created_at: summary.created.as_ref().and_then(|text| text.parse().ok()),
            loaded_at: i64::try_from(summary.loaded_ms)
                .ok()
                .and_then(|ms| Timestamp::from_millisecond(ms).ok())
                .unwrap_or_default(),
            pinned: summary.pinned,
        })
    }
}

fn config_detail(config: &ImageConfig, digest: String) -> ImageConfigDetail {
    ImageConfigDetail {
        digest,
        env: config.environment.clone(),
        entrypoint: config.entrypoint.clone(),
        cmd: config.command.clone(),
        working_dir: config.working_directory.clone(),
        user: config.user.clone(),
        labels: config.labels.clone(),
        stop_signal: config.stop_signal.clone(),
        exposed_ports: config.exposed_ports.clone(),
        volumes: config.volumes.clone(),
    }
}

impl ImageStore for ContentStore {
    fn prepare(&self, reference: &str) -> Result<PreparedImage, ApiError> {
        let lease = self.store.lease(reference)?;
        let root = lease.root();
        let first = DiskPart { path: root.metadata.clone(), len_bytes: root.metadata_len };
        let data = root.data.iter().map(|(path, len_bytes)| DiskPart { path: path.clone(), len_bytes: *len_bytes });
        Ok(PreparedImage {
            digest: lease.digest().to_string(),
            // The configuration's own digest is only shown by inspect.
            config: config_detail(lease.config(), String::new()),
            lower: std::iter::once(first).chain(data).collect(),
            lease: Arc::new(lease),
        })
    }

    fn make_upper(&self, path: &Path, size_mib: u32) -> Result<(), ApiError> {
        Ok(self.store.make_upper(&self.template, path, u64::from(size_mib) << 20)?)
    }

    fn list(&self) -> Result<Vec<ImageSummary>, ApiError> {
        self.store.list()?.iter().map(|summary| self.summary(summary)).collect()
    }

    fn inspect(&self, reference: &str) -> Result<ImageDetail, ApiError> {
        let details = self.store.get(reference)?;
        Ok(ImageDetail {
            summary: self.summary(&details.summary)?,
            config: config_detail(&details.config, details.summary.config_digest.to_string()),
            layer_details: details
                .layers
                .iter()
                .map(|layer| ImageLayerDetail {
                    diff_id: layer.diff_id.to_string(),
                    blob_digest: layer.digest.to_string(),
                    media_type: layer.media_type.clone(),
                    compressed_bytes: layer.compressed_bytes,
                    data_bytes: layer.data_bytes,
                    shared_by: u32::try_from(layer.shared_with + 1).unwrap_or(u32::MAX),
                })
                .collect(),
            used_by: Vec::new(),
        })
    }

    fn remove(&self, reference: &str, force: bool, users: &ImageUsers) -> Result<(), ApiError> {
        let in_use: BTreeMap<_, _> = users
            .iter()
            .filter_map(|(digest, names)| Some((digest.parse().ok()?, names.iter().map(ToString::to_string).collect())))
            .collect();
        self.store.remove(reference, &in_use, force)?;
        Ok(())
    }

    fn load(
        &self,
        archive: &mut dyn Read,
        tag: Option<&str>,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Vec<ImageSummary>, ApiError> {
        let tags = tag.map(str::parse::<TagRule>).transpose()?.into_iter().collect();
        let options = LoadOptions { tags, ..LoadOptions::default() };
        let loaded = self.store.load(LoadSource::Stream(Box::new(archive)), &options, &mut |event| {
            progress(match event {
                msb_image::LoadEvent::Progress { bytes } => LoadEvent::Progress { bytes },
                msb_image::LoadEvent::Layer { diff_id, known } => {
                    LoadEvent::Layer { diff_id: diff_id.to_string(), known }
                }
                msb_image::LoadEvent::Warning { message } => LoadEvent::Warning { message },
            });
        })?;
        loaded.iter().map(|image| self.summary(&self.store.get(&image.digest.to_string())?.summary)).collect()
    }

    fn check(&self) -> Result<StoreReport, ApiError> {
        let report = self.store.check(CheckDepth::Content)?;
        Ok(StoreReport { images: report.images, blobs: report.layers, bytes: 0, problems: report.problems })
    }
}
