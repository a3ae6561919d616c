//! The guest border, part two: files. One stream of this kind is a file session: requests with a number each, any number of them
//! under way, answered in order. Spoken by `actors::vm::files` and `guest/src/files`; the control API's file routes carry the same
//! types as JSON.
//!
//! ```text
//!  host  → Open{files}                    guest → Opened | Refused
//!  host  → FileRequest{1, open}           guest → FileReply{1, handle}
//!  host  → FileRequest{2, read at 0}      guest → FileReply{2, data}
//!  host  → FileRequest{3, read at 256 Ki} guest → FileReply{3, failed: errno}
//! ```
//!
//! Paths are bytes: a guest's file name need not be UTF-8. The guest resolves them itself, inside its root, as the session's user,
//! so that no path of the host is ever looked up in the guest's stead. A relative path begins at the session's directory.

use prost::{Message, Oneof};

/// Most bytes that one read gives and one write takes.
pub const FILE_DATA_MAX: usize = 256 << 10;
/// Most open handles of one session.
pub const FILE_HANDLES_MAX: usize = 512;
/// Longest path in bytes (PATH_MAX).
pub const FILE_PATH_MAX: usize = 4096;
/// Most entries of one answer to [`FileOperation::ReadDirectory`].
pub const DIRECTORY_BATCH: usize = 256;

/// Opens a file session.
#[derive(Clone, PartialEq, Message)]
pub struct OpenFiles {
    /// `USER|UID[:GROUP|GID]`; empty: the sandbox's own.
    #[prost(string, tag = "1")]
    pub user: String,
    /// Whether relative paths begin in the user's home and not in `/`.
    #[prost(bool, tag = "2")]
    pub at_home: bool,
}

/// host → guest: one operation.
#[derive(Clone, PartialEq, Message)]
pub struct FileRequest {
    /// Comes back in the answer.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// What to do.
    #[prost(oneof = "FileOperation", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21")]
    pub operation: Option<FileOperation>,
}

/// What can be done.
#[derive(Clone, PartialEq, Oneof)]
#[allow(missing_docs, reason = "each variant is documented at the message it holds")]
pub enum FileOperation {
    #[prost(message, tag = "2")]
    Open(FileOpen),
    #[prost(message, tag = "3")]
    Close(FileHandle),
    #[prost(message, tag = "4")]
    Read(FileRead),
    #[prost(message, tag = "5")]
    Write(FileWrite),
    #[prost(message, tag = "6")]
    Stat(FilePath),
    #[prost(message, tag = "7")]
    StatHandle(FileHandle),
    #[prost(message, tag = "8")]
    SetStat(FileSetStat),
    #[prost(message, tag = "9")]
    SetStatHandle(FileSetStatHandle),
    #[prost(message, tag = "10")]
    OpenDirectory(FilePath),
    #[prost(message, tag = "11")]
    ReadDirectory(FileHandle),
    #[prost(message, tag = "12")]
    MakeDirectory(FileMakeDirectory),
    #[prost(message, tag = "13")]
    Remove(FileRemove),
    #[prost(message, tag = "14")]
    Rename(FileRename),
    #[prost(message, tag = "15")]
    Symlink(FileLink),
    #[prost(message, tag = "16")]
    HardLink(FileLink),
    #[prost(message, tag = "17")]
    ReadLink(FilePath),
    #[prost(message, tag = "18")]
    RealPath(FilePath),
    #[prost(message, tag = "19")]
    Sync(FileHandle),
    #[prost(message, tag = "20")]
    StatFileSystem(FilePath),
    /// Files are watched: changes come as answers with this request's number until the session ends.
    #[prost(message, tag = "21")]
    Watch(FileWatch),
}

/// Opens a file. The flags mean what open(2) says.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs, reason = "the flags are those of open(2)")]
pub struct FileOpen {
    /// Which.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    #[prost(bool, tag = "2")]
    pub read: bool,
    #[prost(bool, tag = "3")]
    pub write: bool,
    #[prost(bool, tag = "4")]
    pub append: bool,
    #[prost(bool, tag = "5")]
    pub create: bool,
    #[prost(bool, tag = "6")]
    pub truncate: bool,
    #[prost(bool, tag = "7")]
    pub exclusive: bool,
    /// Do not follow a symbolic link in the last component.
    #[prost(bool, tag = "8")]
    pub no_follow: bool,
    /// Permission bits of a new file, less the umask 022; none: 0666.
    #[prost(uint32, optional, tag = "9")]
    pub mode: Option<u32>,
}

/// An open file or directory of this session.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct FileHandle {
    /// Its number.
    #[prost(uint32, tag = "1")]
    pub handle: u32,
}

/// Reads at an offset. A short answer is no end; an empty one is.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct FileRead {
    /// Of which file.
    #[prost(uint32, tag = "1")]
    pub handle: u32,
    /// Where, in bytes.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// How much, in bytes, at most [`FILE_DATA_MAX`].
    #[prost(uint32, tag = "3")]
    pub len: u32,
}

/// Writes all of `data` at an offset, or at the end of a file opened to append.
#[derive(Clone, PartialEq, Message)]
pub struct FileWrite {
    /// To which file.
    #[prost(uint32, tag = "1")]
    pub handle: u32,
    /// Where, in bytes.
    #[prost(uint64, tag = "2")]
    pub offset: u64,
    /// What, at most [`FILE_DATA_MAX`] bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub data: Vec<u8>,
}

/// A path.
#[derive(Clone, PartialEq, Message)]
pub struct FilePath {
    /// The path.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// Whether a symbolic link in the last component is meant itself.
    #[prost(bool, tag = "2")]
    pub no_follow: bool,
}

/// Changes attributes of a path.
#[derive(Clone, PartialEq, Message)]
pub struct FileSetStat {
    /// The path.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// Whether a symbolic link in the last component is meant itself.
    #[prost(bool, tag = "2")]
    pub no_follow: bool,
    /// What to change.
    #[prost(message, optional, tag = "3")]
    pub change: Option<FileChange>,
}

/// Changes attributes of an open file.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct FileSetStatHandle {
    /// Which file.
    #[prost(uint32, tag = "1")]
    pub handle: u32,
    /// What to change.
    #[prost(message, optional, tag = "2")]
    pub change: Option<FileChange>,
}

/// Attributes to change; what is not there stays.
#[derive(Clone, Copy, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FileChange {
    /// Permission bits with set-id and sticky bits.
    #[prost(uint32, optional, tag = "1")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// Owner.
    #[prost(uint32, optional, tag = "2")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group.
    #[prost(uint32, optional, tag = "3")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Size in bytes: cut, or grown with a hole.
    #[prost(uint64, optional, tag = "4")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Time of the last access.
    #[prost(message, optional, tag = "5")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accessed: Option<FileTime>,
    /// Time of the last change of content.
    #[prost(message, optional, tag = "6")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<FileTime>,
}

/// A time of a file.
#[derive(Clone, Copy, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FileTime {
    /// Seconds since 1970.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// Nanoseconds, below a second.
    #[prost(uint32, tag = "2")]
    #[serde(default)]
    pub nanoseconds: u32,
}

/// Makes a directory.
#[derive(Clone, PartialEq, Message)]
pub struct FileMakeDirectory {
    /// The path.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// Permission bits, less the umask 022; none: 0777.
    #[prost(uint32, optional, tag = "2")]
    pub mode: Option<u32>,
    /// Makes missing parents too, and takes a directory that exists for done.
    #[prost(bool, tag = "3")]
    pub parents: bool,
}

/// Removes a name. A symbolic link is removed itself.
#[derive(Clone, PartialEq, Message)]
pub struct FileRemove {
    /// The path.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// What it must be.
    #[prost(enumeration = "FileRemoveKind", tag = "2")]
    pub kind: i32,
}

/// What is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum FileRemoveKind {
    /// Anything but a directory.
    File = 0,
    /// An empty directory.
    Directory = 1,
    /// Whatever it is, with everything below it; links are not followed.
    Tree = 2,
}

/// Renames.
#[derive(Clone, PartialEq, Message)]
pub struct FileRename {
    /// The path that is.
    #[prost(bytes = "vec", tag = "1")]
    pub from: Vec<u8>,
    /// The path that shall be.
    #[prost(bytes = "vec", tag = "2")]
    pub to: Vec<u8>,
    /// Fails if `to` exists.
    #[prost(bool, tag = "3")]
    pub no_replace: bool,
}

/// Makes a link.
#[derive(Clone, PartialEq, Message)]
pub struct FileLink {
    /// What it leads to; for a symbolic link any text.
    #[prost(bytes = "vec", tag = "1")]
    pub target: Vec<u8>,
    /// The new name.
    #[prost(bytes = "vec", tag = "2")]
    pub path: Vec<u8>,
}

/// Watches a directory (its entries) or a file.
#[derive(Clone, PartialEq, Message)]
pub struct FileWatch {
    /// The path.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// Whether directories below are watched too, those made later included.
    #[prost(bool, tag = "2")]
    pub recursive: bool,
}

/// A tree as a tar stream, in the name of one user of the guest.
#[derive(Clone, PartialEq, Message)]
pub struct OpenArchive {
    /// As [`OpenFiles::user`].
    #[prost(string, tag = "1")]
    pub user: String,
    /// Which way.
    #[prost(oneof = "ArchiveAction", tags = "2, 3")]
    pub action: Option<ArchiveAction>,
}

/// Which way a tree goes.
#[derive(Clone, PartialEq, Oneof)]
#[allow(missing_docs, reason = "each variant is documented at the message it holds")]
pub enum ArchiveAction {
    #[prost(message, tag = "2")]
    Pack(ArchivePack),
    #[prost(message, tag = "3")]
    Unpack(ArchiveUnpack),
}

/// A tree of the guest is sent.
#[derive(Clone, PartialEq, Message)]
pub struct ArchivePack {
    /// Its path; relative ones begin at `/`.
    #[prost(bytes = "vec", tag = "1")]
    pub path: Vec<u8>,
    /// The root's name in the stream; `.` for a directory whose entries are meant.
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// Whether a symbolic link in the last component of the path is followed.
    #[prost(bool, tag = "3")]
    pub follow: bool,
}

/// A tree is made in a directory of the guest.
#[derive(Clone, PartialEq, Message)]
pub struct ArchiveUnpack {
    /// The directory, which must exist.
    #[prost(bytes = "vec", tag = "1")]
    pub directory: Vec<u8>,
    /// The one name that the stream may make in it; none: the directory itself is filled.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub name: Option<Vec<u8>>,
    /// Whether owners are those of the stream; else the user's.
    #[prost(bool, tag = "3")]
    pub keep_owner: bool,
}

/// guest → host: the answer to one request.
#[derive(Clone, PartialEq, Message)]
pub struct FileReply {
    /// The request's number.
    #[prost(uint32, tag = "1")]
    pub id: u32,
    /// What came of it.
    #[prost(oneof = "FileOutcome", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10")]
    pub outcome: Option<FileOutcome>,
}

/// What came of a request.
#[derive(Clone, PartialEq, Oneof)]
#[allow(missing_docs, reason = "each variant is documented at the message it holds")]
pub enum FileOutcome {
    #[prost(message, tag = "2")]
    Failed(FileFailure),
    #[prost(message, tag = "3")]
    Done(FileDone),
    #[prost(message, tag = "4")]
    Handle(FileHandle),
    /// Bytes read; empty: the end.
    #[prost(bytes, tag = "5")]
    Data(Vec<u8>),
    #[prost(message, tag = "6")]
    Attributes(FileAttributes),
    #[prost(message, tag = "7")]
    Entries(FileEntries),
    /// A path.
    #[prost(bytes, tag = "8")]
    Path(Vec<u8>),
    #[prost(message, tag = "9")]
    FileSystem(FileSystemStat),
    #[prost(message, tag = "10")]
    Changes(FileChanges),
}

/// It failed.
#[derive(Clone, PartialEq, Message)]
pub struct FileFailure {
    /// errno(3).
    #[prost(int32, tag = "1")]
    pub errno: i32,
    /// The system's words.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// It is done.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct FileDone {}

/// What stat(2) says.
#[derive(Clone, Copy, PartialEq, Eq, Message, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct FileAttributes {
    /// Type and permission bits, as in `st_mode`.
    #[prost(uint32, tag = "1")]
    pub mode: u32,
    /// Owner.
    #[prost(uint32, tag = "2")]
    pub uid: u32,
    /// Group.
    #[prost(uint32, tag = "3")]
    pub gid: u32,
    /// Size in bytes.
    #[prost(uint64, tag = "4")]
    pub size: u64,
    /// Time of the last access.
    #[prost(message, required, tag = "5")]
    pub accessed: FileTime,
    /// Time of the last change of content.
    #[prost(message, required, tag = "6")]
    pub modified: FileTime,
    /// Time of the last change of attributes.
    #[prost(message, required, tag = "7")]
    pub changed: FileTime,
    /// Hard links.
    #[prost(uint64, tag = "8")]
    pub links: u64,
    /// Device number of a device node.
    #[prost(uint64, tag = "9")]
    pub device: u64,
    /// Inode number.
    #[prost(uint64, tag = "10")]
    pub inode: u64,
    /// Bytes allocated on the disk.
    #[prost(uint64, tag = "11")]
    pub allocated: u64,
}

/// Entries of a directory, without `.` and `..`; an empty answer is the end.
#[derive(Clone, PartialEq, Message)]
pub struct FileEntries {
    /// The entries.
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<FileEntry>,
}

/// One entry.
#[derive(Clone, PartialEq, Message)]
pub struct FileEntry {
    /// Its name.
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    /// Its own attributes, a link's not followed; none if it vanished meanwhile.
    #[prost(message, optional, tag = "2")]
    pub attributes: Option<FileAttributes>,
}

/// What statvfs(3) says.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct FileSystemStat {
    /// Block size in bytes.
    #[prost(uint64, tag = "1")]
    pub block_size: u64,
    /// Unit of the block counts in bytes.
    #[prost(uint64, tag = "2")]
    pub fragment_size: u64,
    /// Blocks.
    #[prost(uint64, tag = "3")]
    pub blocks: u64,
    /// Free blocks.
    #[prost(uint64, tag = "4")]
    pub blocks_free: u64,
    /// Free blocks for users.
    #[prost(uint64, tag = "5")]
    pub blocks_available: u64,
    /// Inodes.
    #[prost(uint64, tag = "6")]
    pub files: u64,
    /// Free inodes.
    #[prost(uint64, tag = "7")]
    pub files_free: u64,
    /// Longest name in bytes.
    #[prost(uint64, tag = "8")]
    pub name_max: u64,
    /// Mount flags, as in `f_flag`.
    #[prost(uint64, tag = "9")]
    pub flags: u64,
    /// File system id.
    #[prost(uint64, tag = "10")]
    pub id: u64,
}

/// Changes of a watched tree.
#[derive(Clone, PartialEq, Message)]
pub struct FileChanges {
    /// In the order they happened.
    #[prost(message, repeated, tag = "1")]
    pub changes: Vec<FileChangeSeen>,
}

/// One change.
#[derive(Clone, PartialEq, Message)]
pub struct FileChangeSeen {
    /// What happened.
    #[prost(enumeration = "FileChangeKind", tag = "1")]
    pub kind: i32,
    /// To what, as the watched path with the rest behind it.
    #[prost(bytes = "vec", tag = "2")]
    pub path: Vec<u8>,
    /// Whether that is a directory.
    #[prost(bool, tag = "3")]
    pub directory: bool,
}

/// What can happen to a file.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration, serde::Serialize, serde::Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[repr(i32)]
pub enum FileChangeKind {
    /// More happened than could be kept: look at everything again.
    Overflow = 0,
    /// It was made, or moved here.
    Created = 1,
    /// Its content changed and its writer closed it.
    Written = 2,
    /// It was removed, or moved away.
    Removed = 3,
    /// Mode, owner, times or attributes changed.
    Attributes = 4,
}

/// Bytes of a file's type in `st_mode` (S_IFMT).
pub const MODE_TYPE: u32 = 0o170_000;

impl FileAttributes {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.mode & MODE_TYPE == 0o040_000
    }

    /// Whether it is a regular file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.mode & MODE_TYPE == 0o100_000
    }

    /// Whether it is a symbolic link.
    #[must_use]
    pub fn is_symlink(&self) -> bool {
        self.mode & MODE_TYPE == 0o120_000
    }
}

/// The code of a file operation that failed with this errno: a number of x86-64 Linux, which is what a guest is.
#[must_use]
pub fn code_of_errno(errno: i32) -> crate::error::ErrorCode {
    use crate::error::ErrorCode;
    match errno {
        1 | 13 | 30 => ErrorCode::PermissionDenied,
        2 => ErrorCode::PathNotFound,
        17 | 39 => ErrorCode::PathExists,
        28 | 122 => ErrorCode::DiskFull,
        _ => ErrorCode::FileFailed,
    }
}

impl From<FileFailure> for crate::error::ApiError {
    fn from(failure: FileFailure) -> Self {
        // The guest is hostile: its text is cut and stripped of what could drive a terminal.
        let message: String = failure.message.chars().filter(|c| !c.is_control()).take(2048).collect();
        Self::new(code_of_errno(failure.errno), message).with_errno(failure.errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{ApiError, ErrorCode};

    #[test]
    fn a_failure_keeps_its_errno_and_gets_the_code_people_know() {
        for (errno, code) in [
            (2, ErrorCode::PathNotFound),
            (13, ErrorCode::PermissionDenied),
            (17, ErrorCode::PathExists),
            (28, ErrorCode::DiskFull),
            (20, ErrorCode::FileFailed),
            (-7, ErrorCode::FileFailed),
        ] {
            let error = ApiError::from(FileFailure { errno, message: "\u{1b}[2Jx".into() });
            assert_eq!((error.code, error.errno, error.message.as_str()), (code, Some(errno), "[2Jx"));
        }
    }
}
