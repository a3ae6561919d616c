//! Files of a sandbox in the control API: the JSON bodies of its file routes, between `msbd` and its clients. The border to the guest is
//! [`crate::files`].
//!
//! Paths here are text. A name of the guest that is not UTF-8 is shown with replacement characters and can be reached only through its
//! parent (a copy, a removal of the tree) or over SFTP.

use serde::{Deserialize, Serialize};

use crate::files::{FileAttributes, FileChange, FileChangeKind};

/// Most entries that one listing gives.
pub const LIST_LEN_MAX: usize = 65_536;

/// One call on files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FileCallRequest {
    /// `USER|UID[:GROUP|GID]` in whose name it is done; none: the sandbox's own user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What to do.
    pub call: FileCall,
}

/// What can be done to files. Relative paths begin at `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "operation", rename_all = "snake_case", deny_unknown_fields)]
pub enum FileCall {
    /// Attributes of a path.
    Stat {
        /// The path.
        path: String,
        /// Whether a symbolic link in the last component is meant itself.
        #[serde(default)]
        no_follow: bool,
    },
    /// The entries of a directory.
    List {
        /// The directory.
        path: String,
    },
    /// Makes a directory.
    MakeDirectory {
        /// The path.
        path: String,
        /// Permission bits, less the umask 022; none: 0777.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<u32>,
        /// Makes missing parents too, and takes a directory that exists for done.
        #[serde(default)]
        parents: bool,
    },
    /// Removes a file or an empty directory.
    Remove {
        /// The path; a symbolic link is removed itself.
        path: String,
        /// With everything below it.
        #[serde(default)]
        recursive: bool,
    },
    /// Renames.
    Rename {
        /// The path that is.
        from: String,
        /// The path that shall be.
        to: String,
        /// Fails if `to` exists.
        #[serde(default)]
        no_replace: bool,
    },
    /// Makes a symbolic link.
    Symlink {
        /// What it leads to, any text.
        target: String,
        /// The link.
        path: String,
    },
    /// Makes a hard link.
    HardLink {
        /// The file.
        target: String,
        /// Its new name.
        path: String,
    },
    /// What a symbolic link leads to.
    ReadLink {
        /// The link.
        path: String,
    },
    /// The path without links, dots and doubled slashes.
    RealPath {
        /// The path.
        path: String,
    },
    /// Changes mode, owner, times or size.
    Change {
        /// The path.
        path: String,
        /// Whether a symbolic link in the last component is meant itself.
        #[serde(default)]
        no_follow: bool,
        /// What to change.
        change: FileChange,
    },
}

/// The answer to a [`FileCall`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum FileAnswer {
    /// It is done.
    Done,
    /// Of `stat`.
    Attributes {
        /// The attributes.
        attributes: FileAttributes,
    },
    /// Of `list`.
    Entries {
        /// The entries, sorted by name.
        entries: Vec<DirectoryEntry>,
    },
    /// Of `read_link` and `real_path`.
    Path {
        /// The path.
        path: String,
    },
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DirectoryEntry {
    /// Its name.
    pub name: String,
    /// Its own attributes, a link's not followed; none if it vanished meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attributes: Option<FileAttributes>,
}

/// Which content to read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct ContentQuery {
    /// The file.
    pub path: String,
    /// In whose name.
    pub user: Option<String>,
    /// First byte.
    #[serde(default)]
    pub offset: u64,
    /// Most bytes; none: to the end.
    pub len: Option<u64>,
}

/// How to write content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct WriteQuery {
    /// The file. It appears under this name only when all of it is there; a file that was there keeps its mode and owner.
    pub path: String,
    /// In whose name.
    pub user: Option<String>,
    /// Permission bits, in decimal; none: those it has, else 0644.
    pub mode: Option<u32>,
    /// Adds to the end of the file in place of replacing it.
    #[serde(default)]
    pub append: bool,
}

/// First message of a client on `…/archive`: a tree as a tar stream. What is packed comes as standard output, what is unpacked is sent
/// as standard input; warnings are lines of standard error. The stream is whole only if `exited` follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ArchiveRequest {
    /// In whose name; none: the sandbox's own user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Which way.
    pub action: ArchiveAction,
}

/// Which way a tree goes. Relative paths begin at `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ArchiveAction {
    /// A tree of the sandbox is sent.
    Pack {
        /// Its root.
        path: String,
        /// The root's name in the stream; `.` for a directory whose entries are meant.
        name: String,
        /// Whether a symbolic link in the last component of the path is followed.
        #[serde(default)]
        follow: bool,
    },
    /// A tree is made in a directory of the sandbox.
    Unpack {
        /// The directory, which must exist.
        directory: String,
        /// The one name that the stream may make in it; none: the directory itself is filled.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        name: Option<String>,
        /// Whether owners, set-id bits and all attributes are those of the stream.
        #[serde(default)]
        keep_owner: bool,
    },
}

/// What to watch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub struct WatchQuery {
    /// The directory or file.
    pub path: String,
    /// In whose name.
    pub user: Option<String>,
    /// Whether directories below are watched too, those made later included.
    #[serde(default)]
    pub recursive: bool,
}

/// A line of a watch. The first, of kind `watching`, says that nothing is missed from here on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WatchRecord {
    /// The watch is in place.
    Watching,
    /// Something changed.
    Change {
        /// What happened.
        kind: FileChangeKind,
        /// To what.
        path: String,
        /// Whether that is a directory.
        directory: bool,
    },
}
