//! Loading and saving archives: docker archives and OCI layouts, streamed.
//!
//! ```text
//!   source ─► outer gzip/zstd? ─► tar entries, in any order
//!                                   │ every file: hash ─► tmp blob ──┐  (a worker unpacks what looks like a layer, meanwhile)
//!                                   │ digest in its name and already ├─► resolve: manifest.json / index.json ─► verify ─► publish
//!                                   │ in the store: passed over ─────┘      what nothing names is dropped with the temporary directory
//! ```
//!
//! `docker save` puts `manifest.json` last, so nothing is interpreted while it streams: blobs are kept under temporary names and
//! given a meaning at the end. Nothing gets its final name before every digest, size and count agrees.

mod input;
mod resolve;
mod save;
mod session;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::ImageError;
use crate::layer::Dropped;
use crate::limits::Limits;
use crate::reference::ImageReference;
use crate::store::{Holds, NewImage, Store};

pub use input::LoadSource;
pub(crate) use resolve::{OCI_MANIFEST, is_layer_type, platform_of};
pub use save::SaveFormat;

/// How an archive is to be loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Names to give instead of the archive's own.
    pub tags: Vec<TagRule>,
    /// The platform to choose where an archive has several; this machine's by default.
    pub platform: Option<Platform>,
    /// Bounds.
    pub limits: Limits,
    /// Set by whoever waited and does not any more: the load ends at its next piece, as if the source had broken off.
    pub given_up: Arc<AtomicBool>,
}

/// One `--tag`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TagRule {
    /// `--tag NAME`: the first image of the archive gets this name.
    First(ImageReference),
    /// `--tag OLD=NEW`: the image that the archive calls OLD becomes NEW.
    Rename {
        /// The archive's name.
        old: ImageReference,
        /// The name in the store.
        new: ImageReference,
    },
}

impl std::str::FromStr for TagRule {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let name = |text: &str| {
            let reference: ImageReference = text.parse()?;
            if reference.digest().is_some() {
                return Err(ImageError::InvalidReference { text: text.into(), reason: "a tag cannot pin a digest" });
            }
            Ok(reference)
        };
        match text.split_once('=') {
            Some((old, new)) => Ok(Self::Rename { old: name(old)?, new: name(new)? }),
            None => Ok(Self::First(name(text)?)),
        }
    }
}

/// An operating system and architecture in Go's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// As `linux`.
    pub os: String,
    /// As `amd64`.
    pub architecture: String,
    /// As `v8`.
    pub variant: Option<String>,
}

impl Platform {
    /// What a guest on this machine runs.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self { os: "linux".into(), architecture: architecture.into(), variant: None }
    }

    /// Whether an image for `other` runs here. An empty field of an old image says nothing and fits; so does a variant where this
    /// platform names none.
    pub(crate) fn accepts(&self, other: &Self) -> bool {
        let same = |ours: &str, theirs: &str| theirs.is_empty() || ours == theirs;
        same(&self.os, &other.os)
            && same(&self.architecture, &other.architecture)
            && (self.variant.is_none() || other.variant.is_none() || self.variant == other.variant)
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl std::str::FromStr for Platform {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let parts: Vec<_> = text.split('/').collect();
        match parts[..] {
            [os, architecture] if !os.is_empty() && !architecture.is_empty() => {
                Ok(Self { os: os.into(), architecture: architecture.into(), variant: None })
            }
            [os, architecture, variant] if !os.is_empty() && !architecture.is_empty() && !variant.is_empty() => {
                Ok(Self { os: os.into(), architecture: architecture.into(), variant: Some(variant.into()) })
            }
            _ => Err(ImageError::InvalidReference {
                text: text.chars().take(100).collect(),
                reason: "a platform is written os/architecture[/variant]",
            }),
        }
    }
}

/// What happens during a load, for a progress display.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum LoadEvent {
    /// Bytes of the archive taken in or passed over so far, without tar headers.
    Progress {
        /// Bytes.
        bytes: u64,
    },
    /// A layer is ready.
    Layer {
        /// Digest of the uncompressed layer.
        diff_id: Digest,
        /// The store had it, and it was passed over.
        known: bool,
    },
    /// Something in an image was left out.
    Warning {
        /// What and why, for people.
        message: String,
    },
}

/// An image that a load brought in, or found there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedImage {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Digest of the configuration.
    pub config_digest: Digest,
    /// The names it got, in short form.
    pub references: Vec<String>,
    /// As `linux/amd64`.
    pub platform: String,
    /// Number of layers.
    pub layers: usize,
    /// The store had this image before.
    pub was_present: bool,
    /// What a sandbox's root must not have and was left out.
    pub dropped: Dropped,
}

impl Store {
    /// Loads every image of an archive that fits the platform.
    ///
    /// Blocking; call it where blocking is allowed. A failed load leaves nothing behind.
    ///
    /// # Errors
    /// `Truncated`, `Archive`, `Layer`, `Digest`, `Size`, `Limit`, `Platform`, `Unnamed` for what is wrong with the archive, `Source` when it
    /// cannot be read, `DiskFull` and `Io` for the store's side.
    pub fn load(
        &self,
        source: LoadSource<'_>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Vec<LoadedImage>, ImageError> {
        let outcome = self.load_held(source, options, progress);
        if outcome.is_err()
            && let Err(error) = self.sweep_orphans()
        {
            tracing::warn!(%error, "parts of a load that failed stay until the store opens next");
        }
        outcome
    }

    /// The load, with everything that it holds let go of at its end.
    fn load_held(
        &self,
        source: LoadSource<'_>,
        options: &LoadOptions,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Vec<LoadedImage>, ImageError> {
        let mut session = session::Session::new(self, options)?;
        session.read(input::Input::open(source)?, progress)?;
        let images = session.resolve()?;
        // Images of one archive share parts: a prune between two of them must not take what the second relies on.
        let mut holds = Holds::new(self);
        images.iter().flat_map(NewImage::parts).for_each(|part| holds.reserve(part));
        let mut loaded = Vec::with_capacity(images.len());
        for image in images {
            let was_present = self.publish(&image, session.scratch(), &options.limits)?;
            let references: Vec<_> = image.references.iter().map(ImageReference::short).collect();
            if !image.dropped.is_empty() {
                let name = references.first().cloned().unwrap_or_else(|| image.digest.to_string());
                progress(LoadEvent::Warning { message: format!("{name}: left out {}", image.dropped) });
            }
            loaded.push(LoadedImage {
                digest: image.digest,
                config_digest: image.config,
                references,
                platform: image.platform.clone(),
                layers: image.layers.len(),
                was_present,
                dropped: image.dropped.clone(),
            });
        }
        Ok(loaded)
    }
}
