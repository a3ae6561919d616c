//! The one error of this crate, and how each case reads to a user: code, message, hint.
//!
//! Called by everything here; the daemon turns it into an [`ApiError`]. It never holds content of an image, only names.

use std::io;
use std::path::{Path, PathBuf};

use msb_protocol::error::{ApiError, ErrorCode};

/// Why work on images failed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A reference breaks the grammar.
    #[error("image reference {text:?} is not valid: {reason}")]
    InvalidReference {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No image has this reference or digest.
    #[error("no image {reference} in the store{}", known_images(.known))]
    NotFound {
        /// What was asked for.
        reference: String,
        /// Up to ten references that do exist.
        known: Vec<String>,
    },
    /// A shortened digest fits several images.
    #[error("{reference} fits {count} images")]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// How many images it fits.
        count: usize,
    },
    /// Something still needs the image.
    #[error("image {reference} is in use by {}", .users.join(", "))]
    InUse {
        /// The image.
        reference: String,
        /// Names of sandboxes, or `an operation under way`.
        users: Vec<String>,
    },
    /// The stream ended where more was promised.
    #[error("the archive is truncated: {0}")]
    Truncated(String),
    /// The archive breaks its format, or tries something it must not.
    #[error("the archive cannot be used: {0}")]
    Archive(String),
    /// A layer breaks its format, or tries something it must not.
    #[error("layer {layer} cannot be used: {reason}")]
    Layer {
        /// The layer's digest or file name in the archive.
        layer: String,
        /// What is wrong, with the path concerned.
        reason: String,
    },
    /// Content is not what its name or descriptor promises.
    #[error("{what} should have digest {expected} but has {actual}")]
    Digest {
        /// Which content.
        what: String,
        /// The promised digest.
        expected: String,
        /// The digest of what came.
        actual: String,
    },
    /// A descriptor's size is not the content's.
    #[error("{what} should have {expected} bytes but has {actual}")]
    Size {
        /// Which content.
        what: String,
        /// The promised size.
        expected: u64,
        /// The size of what came.
        actual: u64,
    },
    /// Something is larger than its documented limit.
    #[error("{what} exceeds the limit of {limit}{unit}")]
    Limit {
        /// What was counted.
        what: String,
        /// The limit.
        limit: u64,
        /// ` bytes`, ` entries`, or empty.
        unit: &'static str,
    },
    /// The archive holds nothing for this machine.
    #[error("the archive holds no image for {wanted}; it has {}", list_or(.available, "none"))]
    Platform {
        /// The platform that was looked for.
        wanted: String,
        /// What the archive has.
        available: Vec<String>,
    },
    /// An image of the archive has no name and none was given.
    #[error("image {digest} in the archive has no name")]
    Unnamed {
        /// Digest of its manifest or configuration.
        digest: String,
    },
    /// A registry broke off, answered nonsense, or could not be reached.
    #[error("registry {registry}: {reason}")]
    Registry {
        /// Its host.
        registry: String,
        /// What happened.
        reason: String,
    },
    /// A registry wants credentials, or other ones.
    #[error("registry {registry}: {reason}{}", as_whom(.as_user))]
    RegistryDenied {
        /// Its host.
        registry: String,
        /// What it said.
        reason: String,
        /// Who was logged in.
        as_user: Option<String>,
    },
    /// A registry does not have the image.
    #[error("registry {registry} has no {what}")]
    RegistryNotFound {
        /// Its host.
        registry: String,
        /// What was asked for.
        what: String,
    },
    /// A registry has the image for other platforms only.
    #[error("the image is not there for {wanted}; it is for {}", list_or(.available, "none"))]
    RegistryPlatform {
        /// The platform that was looked for.
        wanted: String,
        /// What there is.
        available: Vec<String>,
    },
    /// A manifest or index of a registry breaks its format.
    #[error("the manifest cannot be used: {0}")]
    Manifest(String),
    /// Credentials could not be stored or fetched.
    #[error("credentials: {0}")]
    Credentials(String),
    /// The caller went away or changed its mind.
    #[error("cancelled; what has come is kept for the next pull")]
    Cancelled,
    /// The store contradicts itself.
    #[error("the image store is damaged: {0}")]
    Corrupt(String),
    /// Another process writes the store.
    #[error("the image store {} is used by another process", .0.display())]
    Busy(PathBuf),
    /// The store was made by a later msb.
    #[error("the image store {} has format {found}, this msb knows {known}", path.display())]
    Format {
        /// The store.
        path: PathBuf,
        /// What its format file says.
        found: String,
        /// What this version writes.
        known: u32,
    },
    /// The file system is full.
    #[error("no space left while writing {}", .0.display())]
    DiskFull(PathBuf),
    /// The operating system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried, as `read` or `create`.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// Reading the caller's archive failed for a reason outside the archive.
    #[error("the archive could not be read")]
    Source(#[source] io::Error),
}

fn known_images(known: &[String]) -> String {
    if known.is_empty() { "; it holds none yet".into() } else { format!("; it holds {}", known.join(", ")) }
}

fn as_whom(user: &Option<String>) -> String {
    match user.as_deref() {
        None => " (nobody is logged in)".into(),
        Some("") => " (with an identity token)".into(),
        Some(user) => format!(" (as {user:?})"),
    }
}

fn list_or(items: &[String], otherwise: &str) -> String {
    if items.is_empty() { otherwise.into() } else { items.join(", ") }
}

/// Wraps an I/O error on a file of the store, telling a full disk apart.
pub(crate) fn io_error(action: &'static str, path: &Path, source: io::Error) -> ImageError {
    if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
        ImageError::DiskFull(path.to_path_buf())
    } else {
        ImageError::Io { action, path: path.to_path_buf(), source }
    }
}

impl ImageError {
    /// The stable code of this error.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidReference { .. } => ErrorCode::InvalidReference,
            Self::NotFound { .. } => ErrorCode::ImageNotFound,
            Self::Ambiguous { .. } => ErrorCode::InvalidReference,
            Self::InUse { .. } => ErrorCode::ImageInUse,
            Self::Truncated(_) | Self::Archive(_) | Self::Layer { .. } => ErrorCode::InvalidArchive,
            Self::Size { .. } | Self::Platform { .. } | Self::Unnamed { .. } => ErrorCode::InvalidArchive,
            Self::Digest { .. } => ErrorCode::DigestMismatch,
            Self::Limit { .. } => ErrorCode::LimitExceeded,
            Self::Registry { .. } => ErrorCode::RegistryFailed,
            Self::RegistryDenied { .. } => ErrorCode::RegistryDenied,
            Self::RegistryNotFound { .. } | Self::RegistryPlatform { .. } => ErrorCode::ImageNotFound,
            Self::Manifest(_) => ErrorCode::InvalidArchive,
            Self::Credentials(_) => ErrorCode::RegistryFailed,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Corrupt(_) => ErrorCode::StoreCorrupt,
            Self::Busy(_) => ErrorCode::DaemonRunning,
            Self::Format { .. } => ErrorCode::HomeUnusable,
            Self::DiskFull(_) => ErrorCode::DiskFull,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::PermissionDenied,
                _ => ErrorCode::Internal,
            },
            Self::Source(_) => ErrorCode::InvalidArchive,
        }
    }

    /// A hint that fits this case better than the table's, if there is one.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Truncated(_) => {
                Some("the transfer or the disk it came from was cut short: make or copy the archive again")
            }
            Self::Unnamed { .. } => Some("name it with --tag NAME"),
            Self::Platform { .. } => Some("make the archive for this platform, or choose another with --platform"),
            Self::RegistryNotFound { .. } => {
                Some("check name and tag; of a private image nobody says that it exists before a login")
            }
            Self::RegistryPlatform { .. } => Some("choose one of those with --platform"),
            Self::Manifest(_) => {
                Some("the registry sent something that is no image: check the name, or tell its owner")
            }
            Self::Ambiguous { .. } => Some("give more digits of the digest"),
            Self::Format { .. } => Some("use the msb that made it, or move the directory away"),
            Self::Layer { .. } => {
                Some("the layer was made by a tool that breaks the OCI layer format: rebuild the image")
            }
            Self::Archive(_) => {
                Some("give a docker archive or an OCI layout, as `docker save` or `skopeo copy` write them")
            }
            _ => None,
        }
    }

    /// The error as every program of msb reports it, with the cause in the message.
    #[must_use]
    pub fn to_api(&self) -> ApiError {
        let mut message = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            message.push_str(": ");
            message.push_str(&inner.to_string());
            cause = inner.source();
        }
        let error = ApiError::new(self.code(), message);
        let error = match self.hint() {
            Some(hint) => error.with_hint(hint),
            None => error,
        };
        match self {
            Self::InUse { users, .. } => error.with_details(users.iter().cloned()),
            _ => error,
        }
    }
}

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        error.to_api()
    }
}
