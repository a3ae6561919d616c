//! One layer, taken apart once: a *data file* (file contents, 4 KiB aligned, uncompressed) and a *tree index* (everything else).
//!
//! Called by the archive loader while the layer's bytes stream by, and by the store when it has to make a layer's files anew from the
//! kept blob. It never touches the host's file system by a name from the image: names only ever become bytes in the index.
//!
//! ```text
//!  tar stream ─► import ─┬─► data   [file A····][file B·][…]   addressed in 4 KiB blocks from 0
//!                        └─► tree   names, modes, owners, times, xattrs, links, whiteouts, block addresses
//! ```

mod data;
mod import;
mod path;
mod tree;

pub(crate) use import::{Hashing, import_layer};
pub(crate) use path::{entry_components, for_people};
pub use tree::Dropped;
pub(crate) use tree::{Content, Entry, Inode, InodeKind, LayerTree, What};

/// Unit of data addresses; the block size of every EROFS image made here.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// Name of the data file in a layer's directory.
pub(crate) const DATA_FILE: &str = "data";
/// Name of the tree index in a layer's directory.
pub(crate) const TREE_FILE: &str = "tree";
