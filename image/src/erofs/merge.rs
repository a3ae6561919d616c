//! Merges layer trees, bottom first, into the tree a sandbox sees.
//!
//! Pure: trees in, tree out. Rules are those of unpacking the layers one over the other (OCI image-spec, layer.md, "Applying
//! Changesets"): whiteouts hide what is below, opaque directories hide what is inside, directories merge, anything else replaces.
//! A directory that a layer only implies keeps its looks from below; where a lower layer has a symbolic link there, the link is
//! followed inside the image, as unpacking would, and never out of it. Nothing recurses: paths may be two thousand names deep.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};

use crate::layer::{BLOCK_BYTES, Content, Entry, Inode, InodeKind, LayerTree, What};
use crate::limits::SYMLINK_HOPS;

/// Index of a node in [`MergedTree`].
pub(super) type NodeId = u32;

/// Why layers cannot be merged.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MergeError {
    /// A hard link's target is in no layer below.
    #[error("hard link \"{link}\" of layer {layer} points to \"{target}\", which no layer has as a file")]
    LinkTarget {
        /// Number of the layer, 1 at the bottom.
        layer: usize,
        /// Name of the link.
        link: String,
        /// Path of its target.
        target: String,
    },
    /// More names than the limit.
    #[error("more than {0} files")]
    TooMany(u64),
    /// The data of all layers is more than block addresses can reach.
    #[error("more than 16 TiB of data")]
    TooLarge,
}

/// The merged tree, borrowing from the layers it came from.
pub(crate) struct MergedTree<'a> {
    pub(super) nodes: Vec<Node<'a>>,
    /// Block at which each layer's data begins, counted from the end of the metadata.
    pub(super) data_blocks: Vec<u64>,
    /// Blocks of all layers' data.
    pub(super) total_blocks: u64,
    /// Steps that resolving paths may still take, all paths together: links to links multiply work otherwise.
    steps_left: Cell<u64>,
}

/// Steps of path resolution for one image; real images need a few thousand.
const RESOLVE_STEPS: u64 = 20_000_000;

/// A file or directory. Several names may lead to one file.
pub(super) struct Node<'a> {
    pub(super) layer: usize,
    /// What the layer says; `None` for a directory that no layer describes.
    pub(super) inode: Option<&'a Inode>,
    /// Names inside, for a directory.
    pub(super) children: Option<BTreeMap<&'a [u8], NodeId>>,
    pub(super) parent: NodeId,
}

pub(super) const ROOT: NodeId = 0;

impl<'a> MergedTree<'a> {
    /// Merges `layers`, bottom first.
    pub(crate) fn new(layers: &'a [LayerTree], entries_max: u64) -> Result<Self, MergeError> {
        let mut data_blocks = Vec::with_capacity(layers.len());
        let mut total_blocks = 0u64;
        for layer in layers {
            data_blocks.push(total_blocks);
            total_blocks += layer.data_bytes / BLOCK_BYTES;
        }
        if total_blocks >= u64::from(u32::MAX) {
            return Err(MergeError::TooLarge);
        }
        let mut tree = Self {
            nodes: vec![Node::directory(0, None, ROOT)],
            data_blocks,
            total_blocks,
            steps_left: Cell::new(RESOLVE_STEPS),
        };
        for (number, layer) in layers.iter().enumerate() {
            tree.apply(number, layer)?;
            if tree.nodes.len() as u64 > entries_max {
                return Err(MergeError::TooMany(entries_max));
            }
        }
        Ok(tree)
    }

    fn apply(&mut self, number: usize, layer: &'a LayerTree) -> Result<(), MergeError> {
        // Links to lower layers mean the state before this layer changes it.
        let mut links = HashMap::new();
        for (index, entry) in layer.entries.iter().enumerate() {
            if let What::LinkBelow(target) = &entry.what {
                let node = self.find(&target.0).filter(|node| self.nodes[*node as usize].children.is_none());
                let node = node.ok_or_else(|| MergeError::LinkTarget {
                    layer: number + 1,
                    link: String::from_utf8_lossy(&entry.name.0).escape_debug().take(200).collect(),
                    target: String::from_utf8_lossy(&target.0).escape_debug().take(200).collect(),
                })?;
                links.insert(index, node);
            }
        }
        let mut node_of_inode: Vec<Option<NodeId>> = vec![None; layer.inodes.len()];
        // Merged directory for each entry of the layer that is one.
        let mut places: Vec<NodeId> = vec![ROOT; layer.entries.len()];
        for (index, entry) in layer.entries.iter().enumerate() {
            if index == 0 {
                self.apply_directory(ROOT, number, layer, entry);
                continue;
            }
            let parent = places[entry.parent as usize];
            let name: &'a [u8] = &entry.name.0;
            if entry.whiteout {
                self.children_mut(parent).remove(name);
            }
            let existing = self.children_mut(parent).get(name).copied();
            match &entry.what {
                What::Nothing => {}
                What::LinkBelow(_) => {
                    self.children_mut(parent).insert(name, links[&index]);
                }
                What::Inode(inode) if layer.inodes[*inode as usize].kind != InodeKind::Directory => {
                    let node = match node_of_inode[*inode as usize] {
                        Some(node) => node,
                        None => {
                            let inode_data = &layer.inodes[*inode as usize];
                            let node =
                                self.push(Node { layer: number, inode: Some(inode_data), children: None, parent });
                            node_of_inode[*inode as usize] = Some(node);
                            node
                        }
                    };
                    self.children_mut(parent).insert(name, node);
                }
                What::Inode(_) | What::ImpliedDirectory => {
                    let implied = entry.what == What::ImpliedDirectory;
                    let place = match existing {
                        Some(node) if self.nodes[node as usize].children.is_some() => Some(node),
                        Some(node) if implied => self.follow(node, parent),
                        _ => None,
                    };
                    let place = place.unwrap_or_else(|| {
                        let node = self.push(Node::directory(number, None, parent));
                        self.children_mut(parent).insert(name, node);
                        node
                    });
                    self.apply_directory(place, number, layer, entry);
                    places[index] = place;
                }
            }
        }
        Ok(())
    }

    fn apply_directory(&mut self, node: NodeId, number: usize, layer: &'a LayerTree, entry: &'a Entry) {
        if entry.opaque {
            self.children_mut(node).clear();
        }
        if let What::Inode(inode) = entry.what {
            let node = &mut self.nodes[node as usize];
            node.inode = Some(&layer.inodes[inode as usize]);
            node.layer = number;
        }
    }

    fn push(&mut self, node: Node<'a>) -> NodeId {
        self.nodes.push(node);
        // Fewer than 2^32: every layer has at most its entry limit and the total is checked after each.
        (self.nodes.len() - 1) as NodeId
    }

    /// The children of a node known to be a directory.
    fn children_mut(&mut self, node: NodeId) -> &mut BTreeMap<&'a [u8], NodeId> {
        self.nodes[node as usize].children.get_or_insert_default()
    }

    /// The directory that a symbolic link leads to, without leaving the image.
    fn follow(&self, node: NodeId, parent: NodeId) -> Option<NodeId> {
        let InodeKind::Symlink(target) = &self.nodes[node as usize].inode?.kind else { return None };
        self.resolve(parent, &target.0, true).filter(|node| self.nodes[*node as usize].children.is_some())
    }

    /// The node at a path from the root; symbolic links on the way are followed, the last one is not.
    fn find(&self, path: &[u8]) -> Option<NodeId> {
        self.resolve(ROOT, path, false)
    }

    fn resolve(&self, start: NodeId, path: &[u8], follow_last: bool) -> Option<NodeId> {
        let mut hops = 0;
        let mut at = if path.starts_with(b"/") { ROOT } else { start };
        let mut pending: Vec<&[u8]> = path.split(|byte| *byte == b'/').rev().collect();
        while let Some(name) = pending.pop() {
            self.steps_left.set(self.steps_left.get().checked_sub(1)?);
            match name {
                b"" | b"." => continue,
                b".." => {
                    at = self.nodes[at as usize].parent;
                    continue;
                }
                _ => {}
            }
            let next = *self.nodes[at as usize].children.as_ref()?.get(name)?;
            match self.nodes[next as usize].inode.map(|inode| &inode.kind) {
                Some(InodeKind::Symlink(target)) if follow_last || pending.iter().any(|name| !name.is_empty()) => {
                    hops += 1;
                    if hops > SYMLINK_HOPS {
                        return None;
                    }
                    if target.0.starts_with(b"/") {
                        at = ROOT;
                    }
                    pending.extend(target.0.split(|byte| *byte == b'/').rev());
                }
                _ => at = next,
            }
        }
        Some(at)
    }
}

impl<'a> Node<'a> {
    fn directory(layer: usize, inode: Option<&'a Inode>, parent: NodeId) -> Self {
        Self { layer, inode, children: Some(BTreeMap::new()), parent }
    }

    /// Where the file's data is, if it is a regular file with any.
    pub(super) fn content(&self) -> Option<(u64, &'a Content)> {
        match &self.inode?.kind {
            InodeKind::Regular { size, content } => Some((*size, content)),
            _ => None,
        }
    }
}
