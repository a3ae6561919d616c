//! Directory trees as tar streams: [`pack`] writes one, [`unpack`] makes the tree again beneath a directory and nowhere else. Used on
//! both sides of a copy: by the guest's agent and by the SDK. Nothing here knows sandboxes; nothing here trusts the stream it reads.
//!
//! ```text
//!  pack.rs    a tree → entries            header.rs   one entry's header blocks, written
//!  read.rs    bytes → entries, bounded    unpack.rs   entries → a tree, in a staging directory or file by file
//!  remove.rs  a tree, without following a link
//! ```
//!
//! What is kept: permission bits, modification times to the nanosecond, symbolic links as they are, hard links within the tree, holes,
//! extended attributes, names of any bytes. Devices, sockets and pipes are left out, each with a warning that names it.

mod header;
mod pack;
mod read;
mod remove;
mod unpack;

use std::io;

use msb_protocol::error::ErrorCode;
use rustix::io::Errno;

pub use pack::{PackOptions, pack};
pub use read::{Entries, Entry, EntryKind};
pub use remove::remove;
pub use unpack::{Owner, UnpackOptions, unpack};

/// Deepest tree that is packed or unpacked: each level is a descriptor.
pub const DEPTH_MAX: usize = 256;
/// Longest path in a stream, in bytes.
pub const PATH_LEN_MAX: usize = 4096;
/// Most warnings that are told one by one.
pub const WARNINGS_MAX: u64 = 100;

/// What became of a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of content, holes not counted.
    pub bytes: u64,
    /// Things left out, and attributes that could not be kept.
    pub warnings: u64,
}

/// Why a copy ended early.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A file operation failed.
    #[error("cannot {what} '{path}': {errno}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which path, fit to be shown.
        path: String,
        /// The system's answer.
        errno: Errno,
    },
    /// The stream asks for what no copy may do.
    #[error("refused '{path}': {why}")]
    Refused {
        /// The entry, fit to be shown.
        path: String,
        /// Which rule it breaks.
        why: &'static str,
    },
    /// A directory is in the way of a file, or the other way round.
    #[error("cannot put '{path}' in place: {why}")]
    InTheWay {
        /// The entry, fit to be shown.
        path: String,
        /// What is in the way.
        why: &'static str,
    },
    /// What is to be copied is no file, directory or link.
    #[error("'{path}' is a {kind}; only files, directories and links are copied")]
    Special {
        /// The path, fit to be shown.
        path: String,
        /// What it is.
        kind: &'static str,
    },
    /// More than the documented limit.
    #[error("'{path}' is beyond a limit: {limit}")]
    Limit {
        /// The path, fit to be shown.
        path: String,
        /// Which.
        limit: &'static str,
    },
    /// The bytes are no tar stream.
    #[error("the tar stream is damaged: {0}")]
    Malformed(&'static str),
    /// The stream broke off, or nobody reads it.
    #[error("the tar stream broke off: {0}")]
    Stream(#[from] io::Error),
}

impl TreeError {
    /// The code a user sees.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::File { errno, .. } => msb_protocol::files::code_of_errno(errno.raw_os_error()),
            Self::InTheWay { .. } => ErrorCode::PathExists,
            Self::Refused { .. } | Self::Malformed(_) => ErrorCode::InvalidArchive,
            Self::Special { .. } => ErrorCode::FileFailed,
            Self::Limit { .. } => ErrorCode::LimitExceeded,
            Self::Stream(_) => ErrorCode::ExecLost,
        }
    }

    /// What to do, where the code's own hint does not fit.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::InTheWay { .. } => Some("choose another destination, or remove what is there"),
            Self::Refused { .. } | Self::Malformed(_) => {
                Some("look at it with `tar -tv`; nothing outside of the destination was touched")
            }
            Self::Special { .. } => Some("read a device or a pipe with a command: msb exec NAME cat PATH"),
            Self::Limit { .. } => Some("copy a part of it, or make an archive with a command in the sandbox"),
            Self::File { .. } | Self::Stream(_) => None,
        }
    }

    /// errno(3), if a system call failed.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::File { errno, .. } => Some(errno.raw_os_error()),
            _ => None,
        }
    }

    fn file(what: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> Self {
        let path = shown(path);
        move |errno| Self::File { what, path, errno }
    }
}

/// A path as it can be shown: control characters and bytes that are no text are escaped.
#[must_use]
pub fn shown(path: &[u8]) -> String {
    let mut text = String::new();
    for piece in path.utf8_chunks() {
        for letter in piece.valid().chars() {
            if letter.is_control() {
                text.extend(letter.escape_default());
            } else {
                text.push(letter);
            }
        }
        for byte in piece.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// Counts warnings and hands out the first ones.
struct Warnings<'a> {
    count: u64,
    tell: &'a mut dyn FnMut(String),
}

impl Warnings<'_> {
    fn add(&mut self, text: impl FnOnce() -> String) {
        self.count += 1;
        match self.count.cmp(&(WARNINGS_MAX + 1)) {
            std::cmp::Ordering::Less => (self.tell)(text()),
            std::cmp::Ordering::Equal => (self.tell)("more warnings are not shown".into()),
            std::cmp::Ordering::Greater => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_path_can_always_be_shown() {
        assert_eq!(super::shown("a/ü\n\u{1b}[2J".as_bytes()), "a/ü\\n\\u{1b}[2J");
        assert_eq!(super::shown(b"a\xff\xfe/b"), "a\\xff\\xfe/b");
    }
}
