//! The pull: from a name to a record, layers in parallel.
//!
//! The caller's thread coordinates and reports; [`PullOptions::parallel`] threads fetch layers. The first failure cancels the rest. What is
//! whole by then becomes an unfinished download again, unless somebody else needs it; all of those stay in `partial/` for the next try.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::archive::{Platform, platform_of};
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{ImageError, io_error};
use crate::faults;
use crate::layer::Dropped;
use crate::limits::Limits;
use crate::reference::ImageReference;
use crate::registry::Source;
use crate::registry::download::{self, Watcher};
use crate::registry::manifest::{self, Blob, Document, Manifest};
use crate::registry::retry::RetryPolicy;
use crate::registry::wire::{Attempt, Waiter, Wire};
use crate::store::{Claim, Flight, Holds, LayerRecord, NewImage, NewLayer, Part, Store};

/// Layers fetched at a time: enough to fill a line, few enough not to be taken for an attack.
const PARALLEL: usize = 4;
/// Bytes of a layer between two reports.
const REPORT_BYTES: u64 = 256 << 10;
/// Time between two looks at another pull's download.
const LOOK: Duration = Duration::from_millis(200);
/// Tries to reach a registry at all: somebody who mistyped its name waits for them.
const OPEN_TRIES: u32 = 4;
/// Indexes that lead to an index: none of the builders nests them in a registry, but the specification lets them.
const INDEX_DEPTH: usize = 3;

/// How to pull.
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// Where to ask, in this order.
    pub sources: Vec<Source>,
    /// The platform to choose; this machine's by default.
    pub platform: Option<Platform>,
    /// Bounds.
    pub limits: Limits,
    /// How patient it is.
    pub retry: RetryPolicy,
    /// Layers fetched at a time.
    pub parallel: usize,
}

impl PullOptions {
    /// The usual way, from these sources.
    #[must_use]
    pub fn new(sources: Vec<Source>) -> Self {
        Self { sources, platform: None, limits: Limits::default(), retry: RetryPolicy::default(), parallel: PARALLEL }
    }
}

/// What happens during a pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullEvent {
    /// The name means this image.
    Resolved {
        /// Digest of the manifest.
        digest: Digest,
        /// As `linux/amd64`.
        platform: String,
        /// Its layers' blobs with their sizes, bottom first.
        layers: Vec<(Digest, u64)>,
    },
    /// A layer has come this far.
    Layer {
        /// Its blob.
        digest: Digest,
        /// Bytes that are here.
        bytes: u64,
    },
    /// A layer is ready.
    LayerDone {
        /// Its blob.
        digest: Digest,
        /// The store had it already.
        known: bool,
    },
    /// Something failed and is tried again.
    Retry {
        /// Of what.
        what: String,
        /// Why.
        reason: String,
        /// After how long.
        wait: Duration,
    },
    /// Something to know.
    Warning(String),
}

/// An image that was pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledImage {
    /// Digest of its manifest.
    pub digest: Digest,
    /// The store had it already.
    pub was_present: bool,
}

/// A pull under way.
struct Pull<'a> {
    store: &'a Store,
    options: &'a PullOptions,
    waiter: Waiter,
    scratch: &'a Path,
}

/// What the registry says the name means.
struct Resolved {
    /// The source that answered, in the order of the options.
    source: usize,
    wire: Wire,
    manifest: Manifest,
    manifest_bytes: Vec<u8>,
    digest: Digest,
    repository: String,
    /// Digests of the indexes that led here.
    indexes: Vec<Digest>,
}

impl Store {
    /// Pulls an image from a registry. Blocking; the requests run on `runtime`, which must not be the current thread's own.
    ///
    /// A pull that fails or is cancelled leaves no image, and keeps what has come for the next one.
    ///
    /// # Errors
    /// `RegistryNotFound`, `RegistryDenied`, `Registry`, `RegistryPlatform`, `Manifest`, `Digest`, `Size`, `Limit`, `Layer`, `DiskFull`, `Io`, `Cancelled`.
    pub fn pull(
        &self,
        reference: &ImageReference,
        options: &PullOptions,
        runtime: Handle,
        cancelled: &CancellationToken,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<PulledImage, ImageError> {
        let outcome = self.pull_held(reference, options, runtime, cancelled, progress);
        if outcome.is_err() {
            self.give_back();
        }
        outcome
    }

    /// The pull, with everything that it holds let go of at its end.
    fn pull_held(
        &self,
        reference: &ImageReference,
        options: &PullOptions,
        runtime: Handle,
        cancelled: &CancellationToken,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<PulledImage, ImageError> {
        let scratch = self.temporary()?;
        let waiter = Waiter { runtime, cancelled: cancelled.clone(), retry: options.retry.clone() };
        let pull = Pull { store: self, options, waiter, scratch: scratch.path() };
        let resolved = pull.resolve(reference, progress)?;
        let mut holds = Holds::new(self);
        holds.reserve(Part::Blob(resolved.manifest.config.digest));
        let (config, config_file) = pull.config(&resolved, progress)?;
        let mut image = pull.skeleton(reference, &resolved, &config)?;
        if let Some(file) = config_file {
            image.blobs.push((resolved.manifest.config.digest, file));
        }
        progress(PullEvent::Resolved {
            digest: resolved.digest,
            platform: image.platform.clone(),
            layers: resolved.manifest.layers.iter().map(|layer| (layer.digest, layer.bytes)).collect(),
        });
        let (layers, _layer_holds) = pull.layers(&resolved, &config, progress)?;
        for layer in &layers {
            image.dropped.add(&layer.dropped);
        }
        image.layers = layers;
        image.parts().for_each(|part| holds.reserve(part));
        if cancelled.is_cancelled() {
            return Err(ImageError::Cancelled);
        }
        let was_present = self.publish(&image, pull.scratch, &options.limits)?;
        if !image.dropped.is_empty() {
            progress(PullEvent::Warning(format!("{}: left out {}", reference.short(), image.dropped)));
        }
        Ok(PulledImage { digest: image.digest, was_present })
    }
}

impl Pull<'_> {
    /// Tries until it succeeds, fails for good, or patience ends.
    fn persist<T>(
        &self,
        what: &str,
        registry: &str,
        tries: u32,
        progress: &mut dyn FnMut(PullEvent),
        mut attempt: impl FnMut() -> Result<T, Attempt>,
    ) -> Result<T, ImageError> {
        let mut failures = 0;
        loop {
            let (reason, after) = match attempt() {
                Ok(value) => return Ok(value),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Again { reason, after }) => (reason, after),
            };
            failures += 1;
            let wait = self.waiter.retry.wait(failures, after, download::chance()).filter(|_| failures < tries);
            let Some(wait) = wait else {
                return Err(ImageError::Registry { registry: registry.to_owned(), reason });
            };
            progress(PullEvent::Retry { what: what.to_owned(), reason, wait });
            self.waiter.pause(wait)?;
        }
    }

    /// Asks the sources in their order.
    fn resolve(&self, reference: &ImageReference, progress: &mut dyn FnMut(PullEvent)) -> Result<Resolved, ImageError> {
        let mut last = None;
        for (index, source) in self.options.sources.iter().enumerate() {
            match self.resolve_at(reference, index, source, progress) {
                Ok(resolved) => return Ok(resolved),
                Err(ImageError::Cancelled) => return Err(ImageError::Cancelled),
                Err(error) if index + 1 < self.options.sources.len() => {
                    progress(PullEvent::Warning(format!("mirror {}: {error}", source.origin)));
                    last = Some(error);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| ImageError::Registry {
            registry: reference.registry().to_owned(),
            reason: "there is nowhere to ask".into(),
        }))
    }

    fn resolve_at(
        &self,
        reference: &ImageReference,
        index: usize,
        source: &Source,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<Resolved, ImageError> {
        let name = reference.short();
        // With another place to ask there is no point in much patience.
        let tries = if index + 1 < self.options.sources.len() { 2 } else { u32::MAX };
        let wire = self.persist(&name, &source.origin, tries.min(OPEN_TRIES), progress, || {
            Wire::open(
                self.waiter.clone(),
                &source.origin,
                reference.repository(),
                &source.trust,
                source.credential.clone(),
            )
        })?;
        let wanted = self.options.platform.clone().unwrap_or_else(Platform::host);
        let limits = &self.options.limits;
        let mut promised: Option<Blob> = None;
        let mut indexes = Vec::new();
        let mut which = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.to_owned(),
            (None, None) => "latest".to_owned(),
        };
        for _ in 0..=INDEX_DEPTH {
            let (bytes, content_type) = self.persist(&name, &wire.host, tries, progress, || {
                wire.manifest(&which, manifest::ACCEPT, limits.metadata_bytes)
            })?;
            let digest = Digest::of(&bytes);
            let expected = promised.as_ref().map(|blob| blob.digest).or(reference.digest());
            if let Some(expected) = expected
                && expected != digest
            {
                return Err(ImageError::Digest {
                    what: format!("the manifest of {name}"),
                    expected: expected.to_string(),
                    actual: digest.to_string(),
                });
            }
            if let Some(promised) = &promised
                && promised.bytes != bytes.len() as u64
            {
                return Err(ImageError::Size {
                    what: format!("the manifest of {name}"),
                    expected: promised.bytes,
                    actual: bytes.len() as u64,
                });
            }
            match manifest::parse(&bytes, &content_type, &wanted, limits)? {
                Document::Manifest(manifest) => {
                    let source = index;
                    let repository = reference.repository().to_owned();
                    return Ok(Resolved { source, wire, manifest, manifest_bytes: bytes, digest, repository, indexes });
                }
                Document::Index(blob) => {
                    indexes.push(digest);
                    which = blob.digest.to_string();
                    promised = Some(blob);
                }
            }
        }
        Err(ImageError::Limit { what: "indexes inside indexes".into(), limit: INDEX_DEPTH as u64, unit: "" })
    }

    /// The configuration, and the file it came in if the store lacks it.
    fn config(
        &self,
        resolved: &Resolved,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<(ImageConfig, Option<std::path::PathBuf>), ImageError> {
        let blob = &resolved.manifest.config;
        if self.store.known_document(blob.digest)
            && let Ok(bytes) = self.store.read_small_blob(blob.digest)
        {
            return Ok((ImageConfig::parse(&bytes)?, None));
        }
        let bytes = self.persist("the image configuration", &resolved.wire.host, u32::MAX, progress, || {
            resolved.wire.small_blob(blob.digest, self.options.limits.metadata_bytes)
        })?;
        let actual = Digest::of(&bytes);
        if actual != blob.digest {
            return Err(ImageError::Digest {
                what: "the image configuration".into(),
                expected: blob.digest.to_string(),
                actual: actual.to_string(),
            });
        }
        let config = ImageConfig::parse(&bytes)?;
        let file = self.write(&format!("config-{}", blob.digest.hex()), &bytes)?;
        Ok((config, Some(file)))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<std::path::PathBuf, ImageError> {
        faults::step("document: write");
        let path = self.scratch.join(name);
        std::fs::write(&path, bytes).map_err(|error| io_error("write", &path, error))?;
        Ok(path)
    }

    /// The image without its layers.
    fn skeleton(
        &self,
        reference: &ImageReference,
        resolved: &Resolved,
        config: &ImageConfig,
    ) -> Result<NewImage, ImageError> {
        let wanted = self.options.platform.clone().unwrap_or_else(Platform::host);
        let platform = platform_of(config);
        if !wanted.accepts(&platform) {
            return Err(ImageError::RegistryPlatform {
                wanted: wanted.to_string(),
                available: vec![platform.to_string()],
            });
        }
        let (layers, diff_ids) = (resolved.manifest.layers.len(), config.diff_ids.len());
        if layers != diff_ids {
            return Err(ImageError::Manifest(format!("it has {layers} layers but its configuration lists {diff_ids}")));
        }
        let manifest_file = self.write(&format!("manifest-{}", resolved.digest.hex()), &resolved.manifest_bytes)?;
        Ok(NewImage {
            digest: resolved.digest,
            manifest_bytes: resolved.manifest_bytes.len() as u64,
            media_type: resolved.manifest.media_type.clone(),
            config: resolved.manifest.config.digest,
            config_bytes: resolved.manifest.config.bytes,
            layers: Vec::new(),
            platform: platform.to_string(),
            references: reference.tagged().into_iter().collect(),
            indexes: resolved.indexes.clone(),
            dropped: Dropped::default(),
            blobs: vec![(resolved.digest, manifest_file)],
        })
    }

    /// All layers, in order, and what holds them.
    fn layers(
        &self,
        resolved: &Resolved,
        config: &ImageConfig,
        progress: &mut dyn FnMut(PullEvent),
    ) -> Result<(Vec<NewLayer>, Vec<Holds>), ImageError> {
        let others = OnceLock::new();
        let blobs = &resolved.manifest.layers;
        // A layer may occur twice in an image; it is fetched once.
        let mut distinct: Vec<(usize, &Blob)> = Vec::new();
        for (position, blob) in blobs.iter().enumerate() {
            if distinct.iter().all(|(_, known)| known.digest != blob.digest) {
                distinct.push((position, blob));
            }
        }
        let next = AtomicUsize::new(0);
        let failed = self.waiter.cancelled.child_token();
        let (events, waiting) = channel();
        let fetched = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..self.options.parallel.clamp(1, 16).min(distinct.len()))
                .map(|_| {
                    let events = events.clone();
                    let (next, distinct, failed, others) = (&next, &distinct, &failed, &others);
                    let waiter = Waiter { cancelled: failed.clone(), ..self.waiter.clone() };
                    scope.spawn(move || {
                        let mut done = Vec::new();
                        let mut holds = Holds::new(self.store);
                        while let Some((position, blob)) = distinct.get(next.fetch_add(1, Ordering::Relaxed)) {
                            let task = LayerTask { pull: self, resolved, others, waiter: &waiter, events: &events };
                            match task.run(blob, config.diff_ids[*position], &mut holds) {
                                Ok(layer) => done.push((blob.digest, layer)),
                                Err(error) => {
                                    failed.cancel();
                                    return (done, holds, Some(error));
                                }
                            }
                        }
                        (done, holds, None)
                    })
                })
                .collect();
            drop(events);
            // Ends when the last worker has let go of its sender.
            waiting.iter().for_each(&mut *progress);
            workers
                .into_iter()
                .map(|worker| {
                    worker.join().unwrap_or_else(|_| {
                        let error = ImageError::Corrupt("fetching a layer panicked".into());
                        (Vec::new(), Holds::new(self.store), Some(error))
                    })
                })
                .collect::<Vec<_>>()
        });
        let mut layers = Vec::new();
        let mut kept = Vec::new();
        let mut errors = Vec::new();
        for (done, holds, error) in fetched {
            layers.extend(done);
            kept.push(holds);
            errors.extend(error);
        }
        // Those that were only told to stop say nothing of why.
        let real = errors.iter().position(|error| !matches!(error, ImageError::Cancelled)).unwrap_or(0);
        if real < errors.len() {
            return Err(errors.swap_remove(real));
        }
        let ordered = blobs.iter().zip(&config.diff_ids).map(|(blob, diff_id)| {
            let layer = layers.iter().find(|(digest, _)| *digest == blob.digest).map(|(_, layer)| layer.clone());
            let layer = layer.ok_or_else(|| ImageError::Corrupt(format!("layer {} was not fetched", blob.digest)))?;
            check_diff_id(blob, *diff_id, layer.record.diff_id)?;
            Ok(NewLayer { record: LayerRecord { media_type: blob.media_type.clone(), ..layer.record }, ..layer })
        });
        Ok((ordered.collect::<Result<Vec<_>, ImageError>>()?, kept))
    }

    /// Opens the sources behind the one that answered, for layers it turns out not to have. One that cannot be reached is not one.
    fn other_wires(&self, resolved: &Resolved) -> Vec<Wire> {
        let repository = &resolved.repository;
        let later = self.options.sources.iter().skip(resolved.source + 1);
        later
            .filter_map(|source| {
                Wire::open(self.waiter.clone(), &source.origin, repository, &source.trust, source.credential.clone())
                    .ok()
            })
            .collect()
    }
}

/// One layer, on one of the pull's threads.
struct LayerTask<'t, 'a> {
    pull: &'t Pull<'a>,
    resolved: &'t Resolved,
    /// The sources behind the one that answered, once a layer is missing there.
    others: &'t OnceLock<Vec<Wire>>,
    waiter: &'t Waiter,
    events: &'t Sender<PullEvent>,
}

impl LayerTask<'_, '_> {
    fn tell(&self, event: PullEvent) {
        // The coordinator listens for as long as this thread lives.
        let _ = self.events.send(event);
    }

    fn run(&self, blob: &Blob, diff_id: Digest, holds: &mut Holds) -> Result<NewLayer, ImageError> {
        let store = self.pull.store;
        let known = |record: LayerRecord, dropped: Dropped, holds: &mut Holds| {
            if record.blob_bytes != blob.bytes {
                return Err(ImageError::Size {
                    what: format!("layer {}", blob.digest.short()),
                    expected: blob.bytes,
                    actual: record.blob_bytes,
                });
            }
            if !Store::hold_layer(holds, &record) {
                return Ok(None);
            }
            self.tell(PullEvent::LayerDone { digest: blob.digest, known: true });
            Ok(Some(NewLayer { record, files: None, dropped }))
        };
        loop {
            if self.waiter.cancelled.is_cancelled() {
                return Err(ImageError::Cancelled);
            }
            if let Some((record, dropped)) = store.known_layer(blob.digest)
                && let Some(layer) = known(record, dropped, holds)?
            {
                return Ok(layer);
            }
            match store.flights().claim(blob.digest) {
                Claim::Own(guard) => {
                    let layer = self.fetch(blob, diff_id, holds, &guard.flight)?;
                    guard.landed(layer.record.clone(), layer.dropped.clone());
                    self.tell(PullEvent::LayerDone { digest: blob.digest, known: false });
                    return Ok(layer);
                }
                Claim::Others(flight) => {
                    let landed = loop {
                        if self.waiter.cancelled.is_cancelled() {
                            return Err(ImageError::Cancelled);
                        }
                        if let Some(outcome) = flight.wait(LOOK) {
                            break outcome;
                        }
                        let bytes = flight.bytes.load(Ordering::Relaxed);
                        self.tell(PullEvent::Layer { digest: blob.digest, bytes });
                    };
                    if let Some((record, dropped)) = landed
                        && let Some(layer) = known(record, dropped, holds)?
                    {
                        return Ok(layer);
                    }
                }
            }
        }
    }

    fn fetch(&self, blob: &Blob, diff_id: Digest, holds: &mut Holds, flight: &Flight) -> Result<NewLayer, ImageError> {
        let store = self.pull.store;
        let partial = store.paths().partial(blob.digest);
        if store.blob_length(blob.digest) == Some(blob.bytes) {
            // The bytes are here, the layer is not: a pull that has just landed, or files that were lost. Whole as it is, it is only read.
            let _ = std::fs::remove_file(&partial);
            let _ = std::fs::hard_link(store.paths().blob(blob.digest), &partial);
        }
        let watcher = Reporter { task: self, digest: blob.digest, flight, told: AtomicU64::new(0) };
        let limits = &self.pull.options.limits;
        let fetch =
            |wires: &[&Wire]| download::fetch(wires, self.waiter, blob, &partial, self.pull.scratch, limits, &watcher);
        let layer = match fetch(&[&self.resolved.wire]) {
            // A mirror need not have everything that it names.
            Err(
                error @ (ImageError::Registry { .. }
                | ImageError::RegistryDenied { .. }
                | ImageError::RegistryNotFound { .. }),
            ) => {
                let others = self.others.get_or_init(|| self.pull.other_wires(self.resolved));
                if others.is_empty() {
                    return Err(error);
                }
                fetch(&others.iter().collect::<Vec<_>>())?
            }
            fetched => fetched?,
        };
        check_diff_id(blob, diff_id, layer.diff_id)?;
        let record = LayerRecord {
            blob: blob.digest,
            blob_bytes: blob.bytes,
            media_type: blob.media_type.clone(),
            compression: layer.compression,
            diff_id,
            tar_bytes: layer.tar_bytes,
            data_bytes: layer.data_bytes,
        };
        let files = layer.files.ok_or_else(|| ImageError::Corrupt("a fetched layer without files".into()))?;
        store.publish_layer(&record, &partial, &files, self.pull.scratch, holds)?;
        Ok(NewLayer { record, files: None, dropped: layer.dropped })
    }
}

/// Turns a download's steps into events, not too many of them.
struct Reporter<'t> {
    task: &'t LayerTask<'t, 't>,
    digest: Digest,
    flight: &'t Flight,
    told: AtomicU64,
}

impl Watcher for Reporter<'_> {
    fn at(&self, bytes: u64) {
        self.flight.bytes.store(bytes, Ordering::Relaxed);
        let told = self.told.load(Ordering::Relaxed);
        if bytes < told || bytes >= told + REPORT_BYTES {
            self.told.store(bytes, Ordering::Relaxed);
            self.task.tell(PullEvent::Layer { digest: self.digest, bytes });
        }
    }

    fn retry(&self, reason: &str, wait: Duration) {
        self.task.tell(PullEvent::Retry { what: self.digest.short(), reason: reason.to_owned(), wait });
    }
}

fn check_diff_id(blob: &Blob, expected: Digest, actual: Digest) -> Result<(), ImageError> {
    if expected == actual {
        return Ok(());
    }
    Err(ImageError::Digest {
        what: format!("layer {}, unpacked,", blob.digest.short()),
        expected: expected.to_string(),
        actual: actual.to_string(),
    })
}
