//! The root image of a sandbox: layers merged, written as EROFS metadata whose block addresses reach into the layers' data files.
//!
//! ```text
//!   one read-only block device =  [ metadata ][ layer 1 data ][ layer 2 data ] …
//!                                 0           M              M + len(1)         in blocks of 4 KiB
//!   metadata = superblock @1024 | inodes, root first, with xattrs, chunk maps, directory tails, links | directory blocks
//! ```
//!
//! Called by the store when an image is published. Regular files are flat or chunked and never inline, so their bytes exist once, in
//! the data files, whatever images share them. Only metadata is written here; the concatenation itself is made by the VM process.

mod format;
mod merge;
mod write;

pub(crate) use format::xattr_prefix;
pub(crate) use merge::{MergeError, MergedTree};
pub(crate) use write::write_metadata;
