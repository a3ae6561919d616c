//! The one error of snapshots' files, and how each case reads to a user.

use std::io;
use std::path::{Path, PathBuf};

use msb_protocol::error::{ApiError, ErrorCode};

/// Why work on a snapshot's files failed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There are no such files.
    #[error("the files of snapshot {0} are gone")]
    Missing(String),
    /// The files are not what was written.
    #[error("snapshot {name} is damaged: {reason}")]
    Damaged {
        /// The snapshot.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Memory does not leave its host.
    #[error(
        "snapshot {0} has memory, which fits the processor and the kernel of this host and may hold any secret of its sandbox: it is not exported"
    )]
    HasMemory(String),
    /// The archive ended too early.
    #[error("the archive is truncated: {0}")]
    Truncated(String),
    /// The archive breaks its format, or tries something it must not.
    #[error("the archive is no snapshot: {0}")]
    Archive(String),
    /// The content is not what the manifest promises.
    #[error("the disk in the archive should have digest {expected} but has {actual}")]
    Digest {
        /// What the manifest says.
        expected: String,
        /// What came.
        actual: String,
    },
    /// There is no room for what the archive says it holds.
    #[error("the archive holds a disk of {needed} bytes, {free} are free on the file system of {}", .path.display())]
    NoRoom {
        /// Where it would go.
        path: PathBuf,
        /// Bytes it needs.
        needed: u64,
        /// Bytes there are.
        free: u64,
    },
    /// The manifest cannot be used.
    #[error("{0}")]
    Manifest(ApiError),
    /// The file system is full.
    #[error("no space left while writing {}", .0.display())]
    DiskFull(PathBuf),
    /// The operating system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The caller's stream failed.
    #[error("the stream of the archive failed: {0}")]
    Stream(#[source] io::Error),
}

impl SnapshotError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            Self::DiskFull(path.to_path_buf())
        } else {
            Self::Io { action, path: path.to_path_buf(), source }
        }
    }

    /// The stable code of this error.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Missing(_) | Self::Damaged { .. } => ErrorCode::SnapshotDamaged,
            Self::HasMemory(_) => ErrorCode::UnsupportedOperation,
            Self::Truncated(_) | Self::Archive(_) => ErrorCode::InvalidArchive,
            Self::Digest { .. } => ErrorCode::DigestMismatch,
            Self::NoRoom { .. } | Self::DiskFull(_) => ErrorCode::DiskFull,
            Self::Manifest(error) => error.code,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
            Self::Io { .. } => ErrorCode::HomeUnusable,
            Self::Stream(_) => ErrorCode::InvalidArchive,
        }
    }
}

impl From<SnapshotError> for ApiError {
    fn from(error: SnapshotError) -> Self {
        let api = ApiError::new(error.code(), error.to_string());
        match error {
            SnapshotError::Manifest(error) => error,
            SnapshotError::Truncated(_)
            | SnapshotError::Archive(_)
            | SnapshotError::Digest { .. }
            | SnapshotError::Stream(_) => {
                api.with_hint("export it again with `msb snapshot export`, and compare checksums")
            }
            SnapshotError::HasMemory(_) => {
                api.with_hint("stop the sandbox and take one of its disk: that can be exported")
            }
            SnapshotError::NoRoom { .. } | SnapshotError::DiskFull(_) => {
                api.with_hint("free space on that file system; `msb df` shows what takes it")
            }
            _ => api,
        }
    }
}
