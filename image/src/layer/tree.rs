//! The tree index of one layer and its file: `MSBTREE1`, a postcard body, a CRC-32C.
//!
//! Written by the importer, read by the merge. The order of entries is fixed (directories before their children, children by name), so
//! one layer always gives the same bytes. A file that does not decode is treated as absent: the kept blob can make it again.

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::ImageError;
use crate::layer::BLOCK_BYTES;

const MAGIC: &[u8; 8] = b"MSBTREE1";

/// A layer without its file contents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerTree {
    /// Entry 0 is the root; every other entry's parent comes before it.
    pub(crate) entries: Vec<Entry>,
    pub(crate) inodes: Vec<Inode>,
    /// Length of the data file, a multiple of 4 KiB.
    pub(crate) data_bytes: u64,
    /// Length of the uncompressed tar stream.
    pub(crate) tar_bytes: u64,
    pub(crate) dropped: Dropped,
}

/// One name in the layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) parent: u32,
    pub(crate) name: Bytes,
    /// Whatever lower layers have under this name is gone.
    pub(crate) whiteout: bool,
    /// Whatever lower layers have inside this directory is gone.
    pub(crate) opaque: bool,
    pub(crate) what: What,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum What {
    /// Nothing: the entry exists only to hide lower layers.
    Nothing,
    /// An inode of this layer.
    Inode(u32),
    /// A directory that only appears in the paths of other entries; lower layers say what it is like.
    ImpliedDirectory,
    /// A hard link to a path that only lower layers have.
    LinkBelow(Bytes),
}

/// Everything about a file but its names and contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Inode {
    pub(crate) kind: InodeKind,
    /// Permission, set-id and sticky bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nanoseconds: u32,
    pub(crate) xattrs: Vec<(Bytes, Bytes)>,
}

/// File types, with what belongs to each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum InodeKind {
    Directory,
    Regular { size: u64, content: Content },
    Symlink(Bytes),
    Character { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// Where a regular file's bytes are in the layer's data file, in blocks of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Content {
    /// No bytes at all.
    Empty,
    /// One run.
    Flat { block: u32 },
    /// Chunks of `4 KiB << chunk_bits`; `None` is a hole.
    Chunked { chunk_bits: u8, blocks: Vec<Option<u32>> },
}

/// What a layer holds that a sandbox's root must not, counted, with an example each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Character devices 0:0: overlayfs would read them as deleted files.
    pub whiteout_devices: u64,
    /// `trusted.overlay.*` attributes: overlayfs would obey them.
    pub overlay_xattrs: u64,
    /// Attributes outside `user.`, `trusted.`, `security.` and the POSIX access lists: EROFS cannot hold them.
    pub foreign_xattrs: u64,
    /// AUFS bookkeeping entries (`.wh..wh.*`).
    pub aufs_entries: u64,
    /// The first path that something was dropped from or at.
    pub example: Option<String>,
}

impl Dropped {
    /// Whether nothing was dropped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.whiteout_devices + self.overlay_xattrs + self.foreign_xattrs + self.aufs_entries == 0
    }

    /// Adds what another layer dropped.
    pub(crate) fn add(&mut self, other: &Self) {
        self.whiteout_devices += other.whiteout_devices;
        self.overlay_xattrs += other.overlay_xattrs;
        self.foreign_xattrs += other.foreign_xattrs;
        self.aufs_entries += other.aufs_entries;
        if self.example.is_none() {
            self.example.clone_from(&other.example);
        }
    }
}

impl std::fmt::Display for Dropped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = [
            (self.whiteout_devices, "character devices 0:0, which overlayfs would take for deleted files"),
            (self.overlay_xattrs, "trusted.overlay attributes, which overlayfs would obey"),
            (self.foreign_xattrs, "attributes of namespaces that the root file system cannot hold"),
            (self.aufs_entries, "entries of AUFS bookkeeping"),
        ];
        let said: Vec<_> =
            counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
        f.write_str(&said.join("; "))?;
        match &self.example {
            Some(example) => write!(f, " (first at \"{example}\")"),
            None => Ok(()),
        }
    }
}

/// A byte string that serde moves as one piece.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Bytes(pub(crate) Box<[u8]>);

impl From<&[u8]> for Bytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes.into())
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl Visitor<'_> for BytesVisitor {
            type Value = Bytes;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(bytes.into())
            }
        }
        deserializer.deserialize_bytes(BytesVisitor)
    }
}

impl LayerTree {
    /// The bytes of the tree file.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, ImageError> {
        let mut bytes = postcard::to_extend(self, MAGIC.to_vec())
            .map_err(|error| ImageError::Corrupt(format!("a tree index cannot be written: {error}")))?;
        let sum = crate::crc32c::crc32c(&bytes[MAGIC.len()..]);
        bytes.extend_from_slice(&sum.to_le_bytes());
        Ok(bytes)
    }

    /// Reads a tree file and checks that it holds together, so that the merge can index without looking.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        let corrupt = |reason: &str| ImageError::Corrupt(format!("a tree index {reason}"));
        let body = bytes.strip_prefix(MAGIC).ok_or_else(|| corrupt("has another format"))?;
        let (body, sum) = body.split_last_chunk::<4>().ok_or_else(|| corrupt("is cut short"))?;
        if crate::crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
            return Err(corrupt("has a wrong checksum"));
        }
        let tree: Self = postcard::from_bytes(body).map_err(|_| corrupt("cannot be decoded"))?;
        tree.check().map_err(corrupt)?;
        Ok(tree)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.entries.is_empty() || !self.data_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err("has no root or a bad data length");
        }
        for (index, entry) in self.entries.iter().enumerate() {
            if index > 0 && entry.parent as usize >= index {
                return Err("has an entry before its parent");
            }
            if let What::Inode(inode) = entry.what
                && inode as usize >= self.inodes.len()
            {
                return Err("names an inode that it lacks");
            }
        }
        let blocks = self.data_bytes / BLOCK_BYTES;
        for inode in &self.inodes {
            let InodeKind::Regular { size, content } = &inode.kind else { continue };
            let fits = match content {
                Content::Empty => *size == 0,
                Content::Flat { block } => u64::from(*block) + size.div_ceil(BLOCK_BYTES) <= blocks,
                Content::Chunked { chunk_bits, blocks: addresses } => {
                    *chunk_bits < 31
                        && size.div_ceil(BLOCK_BYTES << chunk_bits) == addresses.len() as u64
                        && addresses.iter().enumerate().all(|(index, address)| {
                            let Some(address) = address else { return true };
                            let start = (index as u64) * (BLOCK_BYTES << chunk_bits);
                            let length = (size - start).min(BLOCK_BYTES << chunk_bits);
                            u64::from(*address) + length.div_ceil(BLOCK_BYTES) <= blocks
                        })
                }
            };
            if !fits {
                return Err("places a file outside its data");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> LayerTree {
        LayerTree {
            entries: vec![
                Entry { parent: 0, name: Bytes::default(), whiteout: false, opaque: true, what: What::Inode(0) },
                Entry { parent: 0, name: b"a"[..].into(), whiteout: true, opaque: false, what: What::Inode(1) },
            ],
            inodes: vec![
                Inode {
                    kind: InodeKind::Directory,
                    mode: 0o755,
                    uid: 0,
                    gid: 0,
                    mtime: -1,
                    mtime_nanoseconds: 5,
                    xattrs: vec![],
                },
                Inode {
                    kind: InodeKind::Regular { size: 5000, content: Content::Flat { block: 0 } },
                    mode: 0o644,
                    uid: 1,
                    gid: 2,
                    mtime: 3,
                    mtime_nanoseconds: 4,
                    xattrs: vec![(b"user.a"[..].into(), b"\0\n"[..].into())],
                },
            ],
            data_bytes: 8192,
            tar_bytes: 10240,
            dropped: Dropped::default(),
        }
    }

    #[test]
    fn a_tree_survives_its_file_and_any_damage_is_noticed() {
        let bytes = sample().encode().unwrap();
        assert_eq!(LayerTree::decode(&bytes).unwrap(), sample());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(LayerTree::decode(&damaged).is_err(), "byte {at}");
            assert!(LayerTree::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_tree_that_points_outside_itself_is_refused() {
        let broken: [fn(&mut LayerTree); 5] = [
            |tree| tree.entries.clear(),
            |tree| tree.entries[1].parent = 1,
            |tree| tree.entries[1].what = What::Inode(2),
            |tree| tree.data_bytes = 4096,
            |tree| {
                let content = Content::Chunked { chunk_bits: 0, blocks: vec![None, Some(2)] };
                tree.inodes[1].kind = InodeKind::Regular { size: 5000, content };
            },
        ];
        for change in broken {
            let mut tree = sample();
            change(&mut tree);
            assert!(LayerTree::decode(&tree.encode().unwrap()).is_err());
        }
    }
}
