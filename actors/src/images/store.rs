//! [`ImageStore`] over the content store of `msb-image`: types of one crate into words of the API, nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use jiff::Timestamp;
use msb_image::registry::{self, Credential, CredentialStore, Explicit, PullOptions};
use msb_image::{
    CheckDepth, Digest, ImageConfig, ImageReference, LoadSource, Platform, PruneOptions, SaveFormat, Store,
};
use msb_protocol::control::{ImageConfigDetail, ImageDetail, ImageLayerDetail, ImageSummary, LoadEvent, StoreReport};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::images::{
    ArchiveFormat, Credentials, DiskUsageRow, ImageHistoryStep, ImageRemoval, LoginReport, LoginRequest, PruneReport,
    PruneRequest, PrunedImage, PullEvent, PullLayer, PullRequest, RegistryRow, RegistryTable, SaveRequest,
};
use msb_protocol::labels::LabelTerm;
use msb_protocol::vmm::DiskPart;
use tokio_util::sync::CancellationToken;

use super::{ArchiveSource, ImageStore, ImageUsers, LoadOptions, PreparedImage};

/// The store of a home.
pub struct ContentStore {
    store: Store,
    registries: RegistryTable,
    credentials: CredentialStore,
    home: PathBuf,
    keep_bytes: Option<u64>,
    free_reserve_bytes: u64,
    /// The packed template of writable disks.
    template: PathBuf,
}

impl ContentStore {
    /// Opens the store of a home, making it if there is none.
    ///
    /// # Errors
    /// Another process has it, a later msb made it, or the directory cannot be used.
    pub fn open(home: &Path, template: PathBuf) -> Result<Self, ApiError> {
        Ok(Self {
            store: Store::open(home)?,
            registries: RegistryTable::new(),
            credentials: CredentialStore::of_home(home),
            home: home.to_owned(),
            keep_bytes: None,
            free_reserve_bytes: 0,
            template,
        })
    }

    /// The same store with these settings of registries.
    #[must_use]
    pub fn with_registries(self, registries: RegistryTable) -> Self {
        Self { registries, ..self }
    }

    /// The same store, which removes the longest unused images by itself when their blobs take more than `keep_bytes`, or less than
    /// `free_reserve_bytes` of the disk are free.
    #[must_use]
    pub fn with_limits(self, keep_bytes: Option<u64>, free_reserve_bytes: u64) -> Self {
        Self { keep_bytes, free_reserve_bytes, ..self }
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

/// The images that sandboxes use. A digest that is none was never one of the store.
fn digests_in_use(users: &ImageUsers) -> BTreeSet<Digest> {
    users.keys().filter_map(|digest| digest.parse().ok()).collect()
}

/// How an image was built, each step with the layer it made. Where the configuration tells of more or fewer layers than there are, the
/// rest simply has none.
fn history(details: &msb_image::ImageDetails) -> Vec<ImageHistoryStep> {
    let mut layers = details.layers.iter();
    let steps = details.config.history.iter().map(|step| {
        let layer = if step.empty_layer { None } else { layers.next() };
        ImageHistoryStep {
            created_at: step.created.as_ref().and_then(|text| text.parse().ok()),
            created_by: step.created_by.clone().unwrap_or_default(),
            comment: step.comment.clone().unwrap_or_default(),
            diff_id: layer.map(|layer| layer.diff_id.to_string()),
            bytes: layer.map_or(0, |layer| layer.unpacked_bytes),
        }
    });
    let mut steps: Vec<_> = steps.collect();
    // Layers that no step claims: images of tools that write no history.
    steps.extend(layers.map(|layer| ImageHistoryStep {
        diff_id: Some(layer.diff_id.to_string()),
        bytes: layer.unpacked_bytes,
        ..ImageHistoryStep::default()
    }));
    steps
}

/// How many bytes of blobs may stay, or `None` if all may. A layer's blob frees its data file too, so this is never too little.
fn bytes_to_keep(used: u64, keep: Option<u64>, missing: u64) -> Option<u64> {
    let by_size = keep.filter(|keep| used > *keep);
    let by_reserve = (missing > 0).then(|| used.saturating_sub(missing));
    match (by_size, by_reserve) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

fn password(credentials: &Credentials) -> Credential {
    Credential::Password { username: credentials.username.clone(), password: credentials.password.clone() }
}

/// A registry as references name it.
fn registry_name(text: &str) -> Result<String, ApiError> {
    let text = text.trim().trim_start_matches("https://").trim_end_matches('/');
    let text = if text.is_empty() { "docker.io" } else { text };
    // The grammar of references is the one place that knows what a registry's name is.
    match format!("{text}/name").parse::<ImageReference>() {
        Ok(reference) if reference.registry() == text || text == "index.docker.io" => {
            Ok(reference.registry().to_owned())
        }
        _ => Err(ApiError::new(ErrorCode::InvalidReference, format!("{text:?} is no registry"))
            .with_hint("write its host, with a port if it has one: ghcr.io, localhost:5000")),
    }
}

fn pull_event(event: registry::PullEvent) -> PullEvent {
    match event {
        registry::PullEvent::Resolved { digest, platform, layers } => PullEvent::Resolved {
            digest: digest.to_string(),
            platform,
            layers: layers.into_iter().map(|(digest, bytes)| PullLayer { digest: digest.to_string(), bytes }).collect(),
        },
        registry::PullEvent::Layer { digest, bytes } => PullEvent::Layer { digest: digest.to_string(), bytes },
        registry::PullEvent::LayerDone { digest, known } => PullEvent::LayerDone { digest: digest.to_string(), known },
        registry::PullEvent::Retry { what, reason, wait } => {
            PullEvent::Retry { what, reason, wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX) }
        }
        registry::PullEvent::Warning(message) => PullEvent::Warning { message },
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
        let began = std::time::Instant::now();
        self.store.make_upper(&self.template, path, u64::from(size_mib) << 20)?;
        // `cargo xtask bench --only disks` reads this line.
        tracing::debug!(took_us = began.elapsed().as_micros(), size_mib, "writable disk made");
        Ok(())
    }

    fn list(&self) -> Result<Vec<ImageSummary>, ApiError> {
        self.store.list()?.iter().map(|summary| self.summary(summary)).collect()
    }

    fn inspect(&self, reference: &str) -> Result<ImageDetail, ApiError> {
        let details = self.store.get(reference)?;
        Ok(ImageDetail {
            summary: self.summary(&details.summary)?,
            complete: details.complete,
            config: config_detail(&details.config, details.summary.config_digest.to_string()),
            layer_details: details
                .layers
                .iter()
                .map(|layer| ImageLayerDetail {
                    diff_id: layer.diff_id.to_string(),
                    blob_digest: layer.digest.to_string(),
                    media_type: layer.media_type.clone(),
                    compressed_bytes: layer.compressed_bytes,
                    unpacked_bytes: layer.unpacked_bytes,
                    data_bytes: layer.data_bytes,
                    shared_by: u32::try_from(layer.shared_with + 1).unwrap_or(u32::MAX),
                })
                .collect(),
            used_by: Vec::new(),
            used_by_snapshots: Vec::new(),
            history: history(&details),
        })
    }

    fn remove(&self, reference: &str, force: bool, users: &ImageUsers) -> Result<ImageRemoval, ApiError> {
        let in_use: BTreeMap<_, _> = users
            .iter()
            .filter_map(|(digest, names)| Some((digest.parse().ok()?, names.iter().map(ToString::to_string).collect())))
            .collect();
        let outcome = self.store.remove(reference, &in_use, force)?;
        Ok(ImageRemoval {
            untagged: outcome.untagged,
            deleted: outcome.deleted.map(|digest| digest.to_string()),
            bytes_reclaimed: outcome.bytes_reclaimed,
        })
    }

    fn load(
        &self,
        archive: ArchiveSource,
        how: &LoadOptions,
        progress: &mut dyn FnMut(LoadEvent) -> ControlFlow<()>,
    ) -> Result<Vec<ImageSummary>, ApiError> {
        let options = msb_image::LoadOptions {
            tags: how.tags.iter().map(|tag| tag.parse()).collect::<Result<_, _>>()?,
            platform: how.platform.as_deref().map(str::parse::<Platform>).transpose()?,
            ..msb_image::LoadOptions::default()
        };
        let source = match archive {
            ArchiveSource::Stream(stream) => LoadSource::Stream(stream),
            ArchiveSource::File(file) => LoadSource::File(file),
        };
        let given_up = Arc::clone(&options.given_up);
        let loaded = self.store.load(source, &options, &mut |event| {
            let goes_on = progress(match event {
                msb_image::LoadEvent::Progress { bytes } => LoadEvent::Progress { bytes },
                msb_image::LoadEvent::Layer { diff_id, known } => {
                    LoadEvent::Layer { diff_id: diff_id.to_string(), known }
                }
                msb_image::LoadEvent::Warning { message } => LoadEvent::Warning { message },
            });
            if goes_on.is_break() {
                given_up.store(true, Ordering::Relaxed);
            }
        })?;
        loaded.iter().map(|image| self.summary(&self.store.get(&image.digest.to_string())?.summary)).collect()
    }

    fn save(&self, what: &SaveRequest, out: &mut dyn Write) -> Result<(), ApiError> {
        let format = match what.format {
            ArchiveFormat::Docker => SaveFormat::Docker,
            ArchiveFormat::Oci => SaveFormat::Oci,
        };
        Ok(self.store.save(&what.references, format, out)?)
    }

    fn tag(&self, reference: &str, name: &str) -> Result<ImageSummary, ApiError> {
        self.store.tag(reference, &name.parse()?)?;
        self.summary(&self.store.get(name)?.summary)
    }

    fn pin(&self, reference: &str, pinned: bool) -> Result<ImageSummary, ApiError> {
        let digest = self.store.pin(reference, pinned)?;
        self.summary(&self.store.get(&digest.to_string())?.summary)
    }

    fn prune(&self, request: &PruneRequest, users: &ImageUsers) -> Result<PruneReport, ApiError> {
        let labels = request.labels.iter().map(|text| {
            LabelTerm::parse(text).map(|_| match text.split_once('=') {
                Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                None => (text.clone(), None),
            })
        });
        let now_ms = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default();
        let options = PruneOptions {
            dry_run: request.dry_run,
            all: request.all,
            unused_since_ms: request.older_than_ms.map(|age| now_ms.saturating_sub(age)),
            keep_bytes: request.keep_bytes,
            labels: labels.collect::<Result<_, _>>()?,
        };
        let report = self.store.prune(&options, &digests_in_use(users))?;
        Ok(PruneReport {
            dry_run: report.dry_run,
            image_refs_removed: report.image_refs_removed,
            manifests_removed: report.manifests_removed,
            layers_removed: report.layers_removed,
            fsmeta_removed: report.fsmeta_removed,
            partials_removed: report.partials_removed,
            bytes_reclaimed: report.bytes_reclaimed,
            images: report
                .images
                .into_iter()
                .map(|image| PrunedImage { digest: image.digest.to_string(), references: image.references })
                .collect(),
        })
    }

    fn relieve(&self, users: &ImageUsers) -> Result<u64, ApiError> {
        let free = rustix::fs::statvfs(&self.home).map_or(u64::MAX, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
        let missing = self.free_reserve_bytes.saturating_sub(free);
        let Some(keep) = bytes_to_keep(self.store.blob_bytes(), self.keep_bytes, missing) else { return Ok(0) };
        let options = PruneOptions { keep_bytes: Some(keep), ..PruneOptions::default() };
        let report = self.store.prune(&options, &digests_in_use(users))?;
        tracing::info!(images = report.images.len(), bytes = report.bytes_reclaimed, "unused images removed");
        Ok(report.bytes_reclaimed)
    }

    fn usage(&self, users: &ImageUsers) -> Result<Vec<DiskUsageRow>, ApiError> {
        let in_use = digests_in_use(users);
        let usage = self.store.usage(&in_use)?;
        let row = |kind: &str, part: msb_image::PartUsage| DiskUsageRow {
            kind: kind.into(),
            count: part.count,
            active: part.active,
            bytes: part.bytes,
            reclaimable_bytes: part.reclaimable_bytes,
        };
        Ok(vec![
            DiskUsageRow { count: usage.images, active: usage.active_images, ..row("images", usage.blobs) },
            row("layer data", usage.layers),
            row("root metadata", usage.roots),
            row("downloads", usage.partials),
        ])
    }

    fn has(&self, reference: &str) -> Result<bool, ApiError> {
        Ok(self.store.contains(reference)?)
    }

    fn pull(
        &self,
        request: &PullRequest,
        cancelled: &CancellationToken,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<(ImageSummary, bool), ApiError> {
        let reference: ImageReference = request.reference.parse()?;
        let explicit = Explicit {
            credential: request.credentials.as_ref().map(password),
            insecure: request.insecure,
            ca_certs: request.ca_certs.clone(),
        };
        let sources = registry::sources(&reference, &self.registries, &explicit, &self.credentials)?;
        let mut options = PullOptions::new(sources);
        options.platform = request.platform.as_deref().map(str::parse::<Platform>).transpose()?;
        let runtime = tokio::runtime::Handle::current();
        let pulled = self.store.pull(&reference, &options, runtime, cancelled, &mut |event| {
            progress(pull_event(event));
        })?;
        Ok((self.summary(&self.store.get(&pulled.digest.to_string())?.summary)?, pulled.was_present))
    }

    fn login(&self, request: &LoginRequest) -> Result<LoginReport, ApiError> {
        let registry = registry_name(&request.registry)?;
        let explicit = Explicit {
            credential: Some(password(&request.credentials)),
            insecure: request.insecure,
            ca_certs: request.ca_certs.clone(),
        };
        registry::check_login(&registry, &self.registries, &explicit, tokio::runtime::Handle::current())?;
        let Credentials { username, password } = &request.credentials;
        let stored_in = self.credentials.login(&registry, username, password)?;
        Ok(LoginReport { registry, stored_in })
    }

    fn logout(&self, registry: &str) -> Result<(), ApiError> {
        let registry = registry_name(registry)?;
        if self.credentials.logout(&registry)? {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::InvalidConfig, format!("nobody is logged in to {registry}"))
            .with_hint("`msb registry list` shows where one is"))
    }

    fn registries(&self) -> Result<Vec<RegistryRow>, ApiError> {
        Ok(self.credentials.list(&self.registries)?)
    }

    fn check(&self) -> Result<StoreReport, ApiError> {
        let report = self.store.check(CheckDepth::Content)?;
        Ok(StoreReport { images: report.images, blobs: report.layers, bytes: report.bytes, problems: report.problems })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_go_by_themselves_only_past_a_limit() {
        for (used, keep, missing, expected) in [
            (100, None, 0, None),
            (100, Some(100), 0, None),
            (100, Some(60), 0, Some(60)),
            (100, None, 30, Some(70)),
            (100, Some(60), 30, Some(60)),
            (100, Some(60), 80, Some(20)),
            (100, None, 500, Some(0)),
        ] {
            assert_eq!(bytes_to_keep(used, keep, missing), expected, "{used} {keep:?} {missing}");
        }
    }

    #[test]
    fn registries_are_named_as_references_name_them() {
        for (text, expected) in [
            ("ghcr.io", "ghcr.io"),
            ("https://r.test:5000/", "r.test:5000"),
            ("", "docker.io"),
            ("index.docker.io", "docker.io"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(registry_name(text).as_deref(), Ok(expected), "{text}");
        }
        for bad in ["plain", "r.test/path", "a b.test", "user@r.test", "http://r.test"] {
            assert!(registry_name(bad).is_err(), "{bad}");
        }
    }
}
