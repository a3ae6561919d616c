//! Writes the metadata of a merged tree in one forward pass, after one pass that places everything.
//!
//! The same tree always gives the same bytes: no clock, no random uuid, directories in breadth-first order with sorted names.

use std::io::{self, Write};

use crate::erofs::format::{
    DIRENT_BYTES, INODE_BYTES, InodeRecord, Layout, NULL_ADDRESS, SLOT_BYTES, SUPER_BYTES, SUPER_OFFSET, SuperBlock,
    encode_device, encode_xattrs, seal_first_block, xattr_area_bytes,
};
use crate::erofs::merge::{MergedTree, Node, NodeId, ROOT};
use crate::layer::{BLOCK_BYTES, Content, InodeKind};

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// Where one node goes.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Byte offset of the inode; 0 when the node has not been met (the superblock is before any inode).
    offset: u64,
    /// Directory blocks or link target outside the inode, counted in blocks from the start of the block area.
    first_block: u64,
    /// Size of a directory or link in bytes.
    size: u64,
    /// Bytes kept right behind the inode and its attributes.
    tail: u64,
    links: u32,
}

/// Nodes in writing order, with their places.
struct Plan {
    order: Vec<NodeId>,
    places: Vec<Place>,
    /// End of the inode area in bytes, a multiple of the block size.
    inode_end: u64,
    /// Blocks of directories and long links behind it.
    extra_blocks: u64,
    chunked: bool,
}

/// Writes the metadata image and returns its length, a multiple of 4 KiB.
///
/// `identity` goes into the uuid, so that an image can be told from its bytes.
pub(crate) fn write_metadata<W: Write>(tree: &MergedTree<'_>, identity: [u8; 16], out: W) -> io::Result<u64> {
    let plan = Plan::new(tree);
    let metadata_blocks = plan.inode_end / BLOCK_BYTES + plan.extra_blocks;
    let blocks = u32::try_from(metadata_blocks + tree.total_blocks)
        .ok()
        .filter(|blocks| *blocks < NULL_ADDRESS)
        .ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, "more than 16 TiB"))?;
    let superblock = SuperBlock {
        root_nid: u16::try_from(plan.places[ROOT as usize].offset / SLOT_BYTES).unwrap_or(0),
        inodes: plan.order.len() as u64,
        blocks,
        uuid: identity,
        chunked: plan.chunked,
    };
    let mut sink = Sink { out, position: 0, first_block: Some(Vec::with_capacity(BLOCK_BYTES as usize)) };
    sink.pad_to(SUPER_OFFSET as u64)?;
    sink.put(&superblock.encode())?;
    let mut record = Vec::new();
    for (number, node) in plan.order.iter().enumerate() {
        record.clear();
        encode_node(tree, &plan, metadata_blocks, *node, number as u32 + 1, &mut record);
        sink.pad_to(plan.places[*node as usize].offset)?;
        sink.put(&record)?;
    }
    sink.pad_to(plan.inode_end)?;
    for node in &plan.order {
        let place = &plan.places[*node as usize];
        if place.size == place.tail {
            continue;
        }
        let blocks = match link_target(&tree.nodes[*node as usize]) {
            Some(target) => target.to_vec(),
            None => directory_blocks(tree, &plan, *node),
        };
        sink.put(&blocks[..usize::try_from(place.size - place.tail).unwrap_or(blocks.len())])?;
        sink.pad_to(sink.position.next_multiple_of(BLOCK_BYTES))?;
    }
    let length = sink.position;
    sink.out.flush()?;
    debug_assert_eq!(length, metadata_blocks * BLOCK_BYTES, "the plan and the image agree");
    Ok(length)
}

/// Counts what is written and holds the first block back until its checksum is known.
struct Sink<W: Write> {
    out: W,
    position: u64,
    first_block: Option<Vec<u8>>,
}

impl<W: Write> Sink<W> {
    fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len() as u64;
        if let Some(block) = &mut self.first_block {
            let count = bytes.len().min(BLOCK_BYTES as usize - block.len());
            block.extend_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            if block.len() < BLOCK_BYTES as usize {
                return Ok(());
            }
            seal_first_block(block);
            self.out.write_all(block)?;
            self.first_block = None;
        }
        self.out.write_all(bytes)
    }

    fn pad_to(&mut self, position: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        while self.position < position {
            let count = usize::try_from((position - self.position).min(BLOCK_BYTES)).unwrap_or(ZEROS.len());
            self.put(&ZEROS[..count])?;
        }
        Ok(())
    }
}

impl Plan {
    fn new(tree: &MergedTree<'_>) -> Self {
        let mut plan = Self {
            order: Vec::new(),
            places: vec![Place::default(); tree.nodes.len()],
            inode_end: (SUPER_OFFSET + SUPER_BYTES) as u64,
            extra_blocks: 0,
            chunked: false,
        };
        plan.place(tree, ROOT);
        plan.places[ROOT as usize].links = 2;
        // `order` is also the queue: directories are met in breadth-first order.
        let mut next = 0;
        while let Some(node) = plan.order.get(next).copied() {
            next += 1;
            let Some(children) = &tree.nodes[node as usize].children else { continue };
            for child in children.values() {
                if plan.places[*child as usize].offset == 0 {
                    plan.place(tree, *child);
                }
                if tree.nodes[*child as usize].children.is_some() {
                    plan.places[*child as usize].links += 2;
                    plan.places[node as usize].links += 1;
                } else {
                    plan.places[*child as usize].links += 1;
                }
            }
        }
        plan.inode_end = plan.inode_end.next_multiple_of(BLOCK_BYTES);
        plan
    }

    fn place(&mut self, tree: &MergedTree<'_>, id: NodeId) {
        let node = &tree.nodes[id as usize];
        let fixed = INODE_BYTES + node_xattr_bytes(node);
        let chunk_map = match node.content() {
            Some((_, Content::Chunked { blocks, .. })) => {
                self.chunked = true;
                blocks.len() as u64 * 4
            }
            _ => 0,
        };
        let size = match (&node.children, link_target(node)) {
            (Some(children), _) => directory_size(children.keys().copied()),
            (None, Some(target)) => target.len() as u64,
            (None, None) => 0,
        };
        let mut tail = size % BLOCK_BYTES;
        // A tail must lie in one block together with nothing that could push it over the end.
        let tail_start = |offset: u64| (offset + fixed) % BLOCK_BYTES;
        let mut offset = self.inode_end.next_multiple_of(SLOT_BYTES);
        if offset % BLOCK_BYTES + INODE_BYTES > BLOCK_BYTES {
            offset = offset.next_multiple_of(BLOCK_BYTES);
        }
        // The kernel's fast path for links wants the inode's own block.
        let own_block_only = link_target(node).is_some();
        if tail > 0 && !tail_fits(offset, fixed, tail, own_block_only) {
            let fresh = offset.next_multiple_of(BLOCK_BYTES);
            if tail_fits(fresh, fixed, tail, own_block_only) && tail_start(fresh) + tail <= BLOCK_BYTES {
                offset = fresh;
            } else {
                tail = 0;
            }
        }
        let outside = (size - tail).div_ceil(BLOCK_BYTES);
        self.places[id as usize] = Place { offset, first_block: self.extra_blocks, size, tail, links: 0 };
        self.extra_blocks += outside;
        self.inode_end = offset + fixed + chunk_map + tail;
        self.order.push(id);
    }

    fn nid(&self, node: NodeId) -> u64 {
        self.places[node as usize].offset / SLOT_BYTES
    }
}

fn tail_fits(offset: u64, fixed: u64, tail: u64, own_block_only: bool) -> bool {
    let start = (offset + fixed) % BLOCK_BYTES;
    let same_block = offset % BLOCK_BYTES + fixed < BLOCK_BYTES;
    start + tail <= BLOCK_BYTES && (same_block || !own_block_only)
}

fn node_xattr_bytes(node: &Node<'_>) -> u64 {
    xattr_area_bytes(node_xattrs(node))
}

fn node_xattrs<'a>(node: &Node<'a>) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
    node.inode.into_iter().flat_map(|inode| inode.xattrs.iter().map(|(name, value)| (&*name.0, &*value.0)))
}

fn link_target<'a>(node: &Node<'a>) -> Option<&'a [u8]> {
    match &node.inode?.kind {
        InodeKind::Symlink(target) => Some(&target.0),
        _ => None,
    }
}

/// Inode, attributes, chunk map and inline tail.
fn encode_node(tree: &MergedTree<'_>, plan: &Plan, metadata_blocks: u64, id: NodeId, number: u32, out: &mut Vec<u8>) {
    let node = &tree.nodes[id as usize];
    let place = plan.places[id as usize];
    // Addresses fit 32 bits: the total was checked before anything was written.
    let data_base = metadata_blocks + tree.data_blocks.get(node.layer).copied().unwrap_or(0);
    let address = |block: u32| (data_base + u64::from(block)) as u32;
    let extra = |first: u64| (plan.inode_end / BLOCK_BYTES + first) as u32;
    let outside = |place: Place| if place.size > place.tail { extra(place.first_block) } else { NULL_ADDRESS };
    let tail_layout = if place.tail > 0 { Layout::FlatInline } else { Layout::FlatPlain };
    let (file_type, layout, size, detail) = match node.inode.map(|inode| &inode.kind) {
        None | Some(InodeKind::Directory) => (S_IFDIR, tail_layout, place.size, outside(place)),
        Some(InodeKind::Symlink(_)) => (S_IFLNK, tail_layout, place.size, outside(place)),
        Some(InodeKind::Regular { size, content }) => match content {
            Content::Empty => (S_IFREG, Layout::FlatPlain, *size, 0),
            Content::Flat { block } => (S_IFREG, Layout::FlatPlain, *size, address(*block)),
            Content::Chunked { chunk_bits, .. } => (S_IFREG, Layout::ChunkBased, *size, u32::from(*chunk_bits)),
        },
        Some(InodeKind::Character { major, minor }) => (S_IFCHR, Layout::FlatPlain, 0, encode_device(*major, *minor)),
        Some(InodeKind::Block { major, minor }) => (S_IFBLK, Layout::FlatPlain, 0, encode_device(*major, *minor)),
        Some(InodeKind::Fifo) => (S_IFIFO, Layout::FlatPlain, 0, 0),
    };
    let xattr_bytes = node_xattr_bytes(node);
    let record = InodeRecord {
        layout,
        xattr_bytes,
        mode: file_type | node.inode.map_or(0o755, |inode| inode.mode),
        size,
        detail,
        number,
        uid: node.inode.map_or(0, |inode| inode.uid),
        gid: node.inode.map_or(0, |inode| inode.gid),
        mtime: node.inode.map_or(0, |inode| inode.mtime),
        mtime_nanoseconds: node.inode.map_or(0, |inode| inode.mtime_nanoseconds),
        links: place.links,
    };
    out.extend_from_slice(&record.encode());
    if xattr_bytes > 0 {
        encode_xattrs(node_xattrs(node), out);
    }
    if let Some((_, Content::Chunked { blocks, .. })) = node.content() {
        for block in blocks {
            out.extend_from_slice(&block.map_or(NULL_ADDRESS, address).to_le_bytes());
        }
    }
    if place.tail > 0 {
        match link_target(node) {
            Some(target) => out.extend_from_slice(&target[target.len() - place.tail as usize..]),
            None => {
                let blocks = directory_blocks(tree, plan, id);
                out.extend_from_slice(&blocks[blocks.len() - place.tail as usize..]);
            }
        }
    }
}

/// Cuts sorted names, `.` and `..` among them, into directory blocks; calls `full` with the names of each.
fn each_directory_block<'n, T>(
    names: impl Iterator<Item = (&'n [u8], T)>,
    mut full: impl FnMut(&[(&'n [u8], T)], bool),
) {
    let mut block = Vec::new();
    let mut used = 0;
    for (name, item) in names {
        let need = DIRENT_BYTES + name.len();
        if used + need > BLOCK_BYTES as usize {
            full(&block, false);
            block.clear();
            used = 0;
        }
        used += need;
        block.push((name, item));
    }
    full(&block, true);
}

/// The children's names with `.` and `..` in their sorted places.
fn with_dots<'n, T>(
    children: impl Iterator<Item = (&'n [u8], T)>,
    own: T,
    parent: T,
) -> impl Iterator<Item = (&'n [u8], T)> {
    let mut dots = [(&b"."[..], own), (&b".."[..], parent)].into_iter().peekable();
    let mut children = children.peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some((dot, _)), Some((name, _))) if dot < name => dots.next(),
        (Some(_), None) => dots.next(),
        _ => children.next(),
    })
}

fn directory_size<'n>(names: impl Iterator<Item = &'n [u8]>) -> u64 {
    let mut size = 0;
    each_directory_block(with_dots(names.map(|name| (name, ())), (), ()), |block, last| {
        size +=
            if last { block.iter().map(|(name, ())| (DIRENT_BYTES + name.len()) as u64).sum() } else { BLOCK_BYTES };
    });
    size
}

/// The blocks of a directory; all but the last are full.
fn directory_blocks(tree: &MergedTree<'_>, plan: &Plan, id: NodeId) -> Vec<u8> {
    let node = &tree.nodes[id as usize];
    let mut out = Vec::new();
    let Some(children) = &node.children else { return out };
    let names = with_dots(children.iter().map(|(name, child)| (*name, *child)), id, node.parent);
    each_directory_block(names, |block, last| {
        let start = out.len();
        let mut name_offset = block.len() * DIRENT_BYTES;
        for (name, child) in block {
            out.extend_from_slice(&plan.nid(*child).to_le_bytes());
            out.extend_from_slice(&(name_offset as u16).to_le_bytes());
            out.extend_from_slice(&[entry_type(&tree.nodes[*child as usize]), 0]);
            name_offset += name.len();
        }
        for (name, _) in block {
            out.extend_from_slice(name);
        }
        if !last {
            out.resize(start + BLOCK_BYTES as usize, 0);
        }
    });
    out
}

/// `include/linux/fs_types.h`, FT_*.
fn entry_type(node: &Node<'_>) -> u8 {
    match node.inode.map(|inode| &inode.kind) {
        None | Some(InodeKind::Directory) => 2,
        Some(InodeKind::Regular { .. }) => 1,
        Some(InodeKind::Character { .. }) => 3,
        Some(InodeKind::Block { .. }) => 4,
        Some(InodeKind::Fifo) => 5,
        Some(InodeKind::Symlink(_)) => 7,
    }
}
