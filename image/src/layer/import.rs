//! Turns a layer's tar stream into its data file and tree index, in one forward pass.
//!
//! Called with the bytes as they arrive from an archive, a registry or a kept blob. The stream is hostile: every size is checked
//! before it is used, names never reach the host's file system, and what overlayfs would misread is dropped and counted.
//!
//! Within one layer a later entry of the same name replaces an earlier one. Whiteouts say something about lower layers only, so a
//! name can be both whited out and present. Paths through a symbolic link *of the same layer* are refused: no tool that packs a
//! directory can write them, and an unpacker that followed them would be tricked.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, Read, Write as _};
use std::path::Path;

use crate::compression::{Bomb, BombGuard, Compression, Decoder};
use crate::digest::{Digest, Hasher};
use crate::error::{ImageError, io_error};
use crate::faults;
use crate::layer::data::DataWriter;
use crate::layer::path::{entry_components, for_people, target_components};
use crate::layer::tree::{Bytes, Content, Dropped, Entry, Inode, InodeKind, LayerTree, What};
use crate::layer::{BLOCK_BYTES, DATA_FILE, TREE_FILE};
use crate::limits::{
    FILE_BYTES, Limits, SPARSE_CHUNKS, SYMLINK_BYTES, TAR_HEADER_BYTES, XATTR_TOTAL_BYTES, XATTR_VALUE_BYTES,
};
use crate::tar_stream::{EntryKind, SkipRead, SparseMap, TarEntry, TarError, TarReader};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// A layer whose two files lie in a directory, not yet under their final name.
#[derive(Debug)]
pub(crate) struct ImportedLayer {
    /// Digest of the uncompressed tar stream, unless the caller computes it.
    pub(crate) diff_id: Option<Digest>,
    pub(crate) tree: LayerTree,
}

/// Who computes the digest of the uncompressed stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hashing {
    /// The importer.
    Here,
    /// The caller, who hashes the same bytes anyway because the layer is not compressed.
    Caller,
}

/// Imports the layer that `source` yields into `directory`, which must exist and be empty.
///
/// The whole of `source` is read, also what follows the tar's end: the digest covers it. `name` is what errors call the layer.
pub(crate) fn import_layer(
    source: impl BufRead,
    compression: Compression,
    directory: &Path,
    limits: &Limits,
    name: &str,
    hashing: Hashing,
) -> Result<ImportedLayer, ImageError> {
    let data_path = directory.join(DATA_FILE);
    let file = File::create_new(&data_path).map_err(|error| io_error("create", &data_path, error))?;
    let guard = BombGuard::new(limits, limits.layer_bytes);
    let counted = CountingReader { source, count: 0 };
    let decoder = Decoder::new(counted, compression).map_err(|error| layer_error(name, &error.to_string()))?;
    let stream = LayerStream {
        decoder,
        hasher: (hashing == Hashing::Here).then(Hasher::default),
        unpacked: 0,
        guard,
        bomb: None,
    };
    let mut importer = Importer {
        reader: TarReader::new(stream),
        data: DataWriter::new(file),
        builder: TreeBuilder::new(),
        limits,
        name,
        metadata_bytes: 0,
        data_path: &data_path,
    };
    importer.run()?;
    let Importer { mut reader, data, builder, .. } = importer;
    let stream = reader.source();
    // What stands behind the end marker is padding; it belongs to the digest all the same.
    if let Err(error) = io::copy(stream, &mut io::sink()) {
        return Err(stream_error(stream, error, name));
    }
    let diff_id = stream.hasher.take().map(Hasher::finish);
    let tar_bytes = stream.unpacked;
    let (_, data_bytes) = data.finish().map_err(|error| io_error("write", &data_path, error))?;
    let tree = builder.finish(data_bytes, tar_bytes);
    let tree_path = directory.join(TREE_FILE);
    faults::step("layer: tree");
    let mut tree_file = File::create_new(&tree_path).map_err(|error| io_error("create", &tree_path, error))?;
    tree_file.write_all(&tree.encode()?).map_err(|error| io_error("write", &tree_path, error))?;
    Ok(ImportedLayer { diff_id, tree })
}

fn layer_error(name: &str, reason: &str) -> ImageError {
    ImageError::Layer { layer: name.to_string(), reason: reason.to_string() }
}

fn stream_error<R: BufRead>(stream: &LayerStream<R>, error: io::Error, name: &str) -> ImageError {
    match stream.bomb {
        Some(Bomb::Size(limit)) => {
            ImageError::Limit { what: format!("layer {name}, unpacked,"), limit, unit: " bytes" }
        }
        Some(Bomb::Ratio(limit)) => {
            ImageError::Limit { what: format!("the compression ratio of layer {name}"), limit, unit: "" }
        }
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated(format!("layer {name} ends in the middle of its compressed data"))
        }
        None => layer_error(name, &format!("it cannot be unpacked: {error}")),
    }
}

/// Counts compressed bytes.
struct CountingReader<R> {
    source: R,
    count: u64,
}

impl<R: Read> Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.count += count as u64;
        Ok(count)
    }
}

impl<R: BufRead> BufRead for CountingReader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.source.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.count += amount as u64;
        self.source.consume(amount);
    }
}

/// The uncompressed layer: hashed, counted and held to the limits.
struct LayerStream<R: BufRead> {
    decoder: Decoder<CountingReader<R>>,
    hasher: Option<Hasher>,
    unpacked: u64,
    guard: BombGuard,
    bomb: Option<Bomb>,
}

impl<R: BufRead> Read for LayerStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..count]);
        }
        self.unpacked += count as u64;
        let packed = self.decoder.source().count;
        if let Err(bomb) = self.guard.check(packed, self.unpacked) {
            self.bomb = Some(bomb);
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(count)
    }
}

impl<R: BufRead> SkipRead for LayerStream<R> {}

struct Importer<'a, R: BufRead> {
    reader: TarReader<LayerStream<R>>,
    data: DataWriter,
    builder: TreeBuilder,
    limits: &'a Limits,
    name: &'a str,
    metadata_bytes: u64,
    data_path: &'a Path,
}

impl<R: BufRead> Importer<'_, R> {
    fn run(&mut self) -> Result<(), ImageError> {
        let mut entries = 0u64;
        loop {
            let entry = match self.reader.next() {
                Ok(Some(entry)) => entry,
                Ok(None) => return Ok(()),
                Err(error) => return Err(self.tar_error(error)),
            };
            entries += 1;
            if entries > self.limits.layer_entries {
                return Err(ImageError::Limit {
                    what: format!("layer {}", self.name),
                    limit: self.limits.layer_entries,
                    unit: " entries",
                });
            }
            self.metadata_bytes += (entry.path.len() + entry.link.len()) as u64
                + entry.xattrs.iter().map(|(name, value)| (name.len() + value.len()) as u64).sum::<u64>();
            if self.metadata_bytes > self.limits.layer_metadata_bytes {
                return Err(ImageError::Limit {
                    what: format!("names and attributes of layer {}", self.name),
                    limit: self.limits.layer_metadata_bytes,
                    unit: " bytes",
                });
            }
            self.add(entry)?;
        }
    }

    fn tar_error(&mut self, error: TarError) -> ImageError {
        match error {
            TarError::Source(error) => stream_error(self.reader.source(), error, self.name),
            TarError::Truncated(what) => ImageError::Truncated(format!("layer {} ends inside {what}", self.name)),
            TarError::HeaderSize(_) => ImageError::Limit {
                what: format!("a tar header of layer {}", self.name),
                limit: TAR_HEADER_BYTES,
                unit: " bytes",
            },
            TarError::Format(reason) => layer_error(self.name, &format!("it holds {reason}")),
        }
    }

    fn refuse(&self, path: &[u8], reason: impl std::fmt::Display) -> ImageError {
        layer_error(self.name, &format!("entry \"{}\": {reason}", for_people(path)))
    }

    fn add(&mut self, entry: TarEntry) -> Result<(), ImageError> {
        let names = entry_components(&entry.path).map_err(|error| self.refuse(&entry.path, error))?;
        let Some((last, parents)) = names.split_last() else {
            if entry.kind != EntryKind::Directory {
                return Err(self.refuse(&entry.path, "the root of an image must be a directory"));
            }
            let inode = self.inode(&entry, InodeKind::Directory)?;
            self.builder.set_directory(0, inode);
            return Ok(());
        };
        let parent = match self.builder.directory(parents) {
            Ok(parent) => parent,
            // umoci whites out what was inside a directory that the same layer replaces by a file: nothing is left to hide there.
            Err(_) if last.starts_with(WHITEOUT_PREFIX) => return Ok(()),
            Err(reason) => return Err(self.refuse(&entry.path, reason)),
        };
        if last.starts_with(WHITEOUT_PREFIX) {
            return self.add_whiteout(&entry, parent, last);
        }
        let kind = match entry.kind {
            EntryKind::Directory => {
                let inode = self.inode(&entry, InodeKind::Directory)?;
                let index = self.builder.child_directory(parent, last);
                self.builder.set_directory(index, inode);
                return Ok(());
            }
            EntryKind::HardLink => return self.add_hard_link(&entry, parent, last),
            EntryKind::Character if entry.device_major == 0 && entry.device_minor == 0 => {
                self.builder.dropped.whiteout_devices += 1;
                self.builder.example(&entry.path);
                return Ok(());
            }
            EntryKind::Regular => self.contents(&entry)?,
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > SYMLINK_BYTES || entry.link.contains(&0) {
                    return Err(self.refuse(&entry.path, "a symbolic link needs a target of 1 to 4095 bytes"));
                }
                InodeKind::Symlink(entry.link.as_slice().into())
            }
            EntryKind::Character | EntryKind::Block => {
                // Linux device numbers: 12 bits major, 20 bits minor.
                if entry.device_major >= 1 << 12 || entry.device_minor >= 1 << 20 {
                    return Err(self.refuse(&entry.path, "a device number that Linux does not have"));
                }
                let (major, minor) = (entry.device_major, entry.device_minor);
                if entry.kind == EntryKind::Character {
                    InodeKind::Character { major, minor }
                } else {
                    InodeKind::Block { major, minor }
                }
            }
            EntryKind::Fifo => InodeKind::Fifo,
        };
        let inode = self.inode(&entry, kind)?;
        let inode = self.builder.add_inode(inode);
        self.builder.replace(parent, last, What::Inode(inode));
        Ok(())
    }

    fn add_whiteout(&mut self, entry: &TarEntry, parent: u32, name: &[u8]) -> Result<(), ImageError> {
        if name == OPAQUE_MARKER {
            self.builder.entries[parent as usize].opaque = true;
        } else if name.starts_with(AUFS_PREFIX) {
            self.builder.dropped.aufs_entries += 1;
            self.builder.example(&entry.path);
        } else {
            match &name[WHITEOUT_PREFIX.len()..] {
                b"" | b"." | b".." => return Err(self.refuse(&entry.path, "a whiteout that names nothing")),
                hidden => {
                    let index = self.builder.child_or_new(parent, hidden);
                    self.builder.entries[index as usize].whiteout = true;
                }
            }
        }
        Ok(())
    }

    fn add_hard_link(&mut self, entry: &TarEntry, parent: u32, name: &[u8]) -> Result<(), ImageError> {
        let target = target_components(&entry.link)
            .map_err(|error| self.refuse(&entry.path, format_args!("its link target: {error}")))?;
        if target.is_empty() {
            return Err(self.refuse(&entry.path, "a hard link to a directory"));
        }
        let what = match self.builder.find(&target).map_err(|reason| self.refuse(&entry.path, reason))? {
            Some(found) => match &self.builder.entries[found as usize].what {
                What::Inode(inode) if self.builder.inodes[*inode as usize].kind == InodeKind::Directory => {
                    return Err(self.refuse(&entry.path, "a hard link to a directory"));
                }
                What::ImpliedDirectory => return Err(self.refuse(&entry.path, "a hard link to a directory")),
                // Whited out but not replaced: lower layers still have it while this layer is applied.
                What::Nothing => What::LinkBelow(target.join(&b'/').into()),
                other => other.clone(),
            },
            None => What::LinkBelow(target.join(&b'/').into()),
        };
        self.builder.replace(parent, name, what);
        Ok(())
    }

    fn inode(&mut self, entry: &TarEntry, kind: InodeKind) -> Result<Inode, ImageError> {
        let xattrs = self.xattrs(entry)?;
        Ok(Inode {
            kind,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            mtime_nanoseconds: entry.mtime_nanoseconds,
            xattrs,
        })
    }

    fn xattrs(&mut self, entry: &TarEntry) -> Result<Vec<(Bytes, Bytes)>, ImageError> {
        let mut kept = Vec::with_capacity(entry.xattrs.len());
        let mut total = 0;
        for (name, value) in &entry.xattrs {
            match judge_xattr(name) {
                XattrVerdict::Keep => {
                    total += name.len() + value.len() + 8;
                    if value.len() > XATTR_VALUE_BYTES || total > XATTR_TOTAL_BYTES {
                        return Err(self.refuse(&entry.path, "extended attributes larger than Linux takes"));
                    }
                    kept.push((name.as_slice().into(), value.as_slice().into()));
                }
                XattrVerdict::Overlay => {
                    self.builder.dropped.overlay_xattrs += 1;
                    self.builder.example(&entry.path);
                }
                XattrVerdict::Foreign => {
                    self.builder.dropped.foreign_xattrs += 1;
                    self.builder.example(&entry.path);
                }
            }
        }
        Ok(kept)
    }

    /// Copies a regular file's bytes into the data file.
    fn contents(&mut self, entry: &TarEntry) -> Result<InodeKind, ImageError> {
        if let Some(map) = &entry.sparse
            && map.data_bytes() < map.real_size
        {
            return self.sparse_contents(entry, map);
        }
        if entry.size == 0 {
            return Ok(InodeKind::Regular { size: 0, content: Content::Empty });
        }
        if entry.size > FILE_BYTES {
            return Err(self.refuse(&entry.path, "a file of more than 8 TiB"));
        }
        let block = self.next_block(entry)?;
        self.copy(entry.size)?;
        Ok(InodeKind::Regular { size: entry.size, content: Content::Flat { block } })
    }

    fn sparse_contents(&mut self, entry: &TarEntry, map: &SparseMap) -> Result<InodeKind, ImageError> {
        let chunk_bits = chunk_bits(map.real_size);
        let chunk_bytes = BLOCK_BYTES << chunk_bits;
        let chunks = map.real_size.div_ceil(chunk_bytes);
        let mut blocks = vec![None; usize::try_from(chunks).unwrap_or(0)];
        let first = u64::from(self.next_block(entry)?);
        let mut next = first;
        for (offset, length) in &map.runs {
            for chunk in offset / chunk_bytes..=(offset + length - 1) / chunk_bytes {
                let slot = &mut blocks[usize::try_from(chunk).unwrap_or(0)];
                if slot.is_none() {
                    *slot = Some(u32::try_from(next).map_err(|_| self.too_much_data())?);
                    let bytes = (map.real_size - chunk * chunk_bytes).min(chunk_bytes);
                    next += bytes.div_ceil(BLOCK_BYTES);
                }
            }
        }
        for (offset, length) in &map.runs {
            let (mut offset, mut left) = (*offset, *length);
            while left > 0 {
                let chunk = offset / chunk_bytes;
                let inside = offset % chunk_bytes;
                let piece = left.min(chunk_bytes - inside);
                let base = blocks[usize::try_from(chunk).unwrap_or(0)].unwrap_or(0);
                self.seek(u64::from(base) * BLOCK_BYTES + inside)?;
                self.copy(piece)?;
                offset += piece;
                left -= piece;
            }
        }
        self.seek(next * BLOCK_BYTES)?;
        Ok(InodeKind::Regular { size: map.real_size, content: Content::Chunked { chunk_bits, blocks } })
    }

    fn seek(&mut self, position: u64) -> Result<(), ImageError> {
        self.data.seek_to(position).map_err(|error| io_error("write", self.data_path, error))
    }

    fn too_much_data(&self) -> ImageError {
        let limit = u64::from(u32::MAX) * BLOCK_BYTES;
        ImageError::Limit { what: format!("the data of layer {}", self.name), limit, unit: " bytes" }
    }

    fn next_block(&mut self, entry: &TarEntry) -> Result<u32, ImageError> {
        let position = self.data.align().map_err(|error| io_error("write", self.data_path, error))?;
        let size = entry.sparse.as_ref().map_or(entry.size, |map| map.real_size);
        // The end must be addressable too.
        if (position + size).div_ceil(BLOCK_BYTES) >= u64::from(u32::MAX) {
            return Err(self.too_much_data());
        }
        u32::try_from(position / BLOCK_BYTES).map_err(|_| self.too_much_data())
    }

    fn copy(&mut self, mut left: u64) -> Result<(), ImageError> {
        while left > 0 {
            let room = self.data.room().map_err(|error| io_error("write", self.data_path, error))?;
            let want = room.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match self.reader.read_data(&mut room[..want]) {
                Ok(0) => return Err(layer_error(self.name, "it holds a file shorter than its map")),
                Ok(count) => {
                    self.data.advance(count);
                    left -= count as u64;
                }
                Err(error) => return Err(self.tar_error(error)),
            }
        }
        Ok(())
    }
}

/// The smallest chunk that describes a file of `size` bytes in at most [`SPARSE_CHUNKS`] chunks.
fn chunk_bits(size: u64) -> u8 {
    let mut bits = 0u8;
    while size.div_ceil(BLOCK_BYTES << bits) > SPARSE_CHUNKS {
        bits += 1;
    }
    bits
}

#[derive(Debug, PartialEq, Eq)]
enum XattrVerdict {
    Keep,
    Overlay,
    Foreign,
}

/// EROFS can hold these namespaces and names of up to 255 bytes behind the namespace.
fn judge_xattr(name: &[u8]) -> XattrVerdict {
    if name.starts_with(b"trusted.overlay.") {
        return XattrVerdict::Overlay;
    }
    let Some(prefix) = crate::erofs::xattr_prefix(name) else { return XattrVerdict::Foreign };
    let suffix = name.len() - prefix.text.len();
    let acl = prefix.text.starts_with(b"system.");
    if name.contains(&0) || suffix > 255 || (suffix == 0) != acl { XattrVerdict::Foreign } else { XattrVerdict::Keep }
}

/// The growing tree. Entries that were replaced stay until [`finish`](Self::finish) leaves them out.
struct TreeBuilder {
    entries: Vec<Entry>,
    children: Vec<HashMap<Bytes, u32>>,
    inodes: Vec<Inode>,
    dropped: Dropped,
}

impl TreeBuilder {
    fn new() -> Self {
        let root =
            Entry { parent: 0, name: Bytes::default(), whiteout: false, opaque: false, what: What::ImpliedDirectory };
        Self { entries: vec![root], children: vec![HashMap::new()], inodes: Vec::new(), dropped: Dropped::default() }
    }

    fn example(&mut self, path: &[u8]) {
        self.dropped.example.get_or_insert_with(|| for_people(path));
    }

    fn add_inode(&mut self, inode: Inode) -> u32 {
        self.inodes.push(inode);
        self.inodes.len() as u32 - 1
    }

    fn child(&self, parent: u32, name: &[u8]) -> Option<u32> {
        // A Box<[u8]> key is looked up by its bytes without copying them.
        self.children[parent as usize].get(name).copied()
    }

    fn child_or_new(&mut self, parent: u32, name: &[u8]) -> u32 {
        if let Some(index) = self.child(parent, name) {
            return index;
        }
        let index = self.entries.len() as u32;
        let name = Bytes::from(name);
        self.entries.push(Entry { parent, name: name.clone(), whiteout: false, opaque: false, what: What::Nothing });
        self.children.push(HashMap::new());
        self.children[parent as usize].insert(name, index);
        index
    }

    fn is_directory(&self, index: u32) -> bool {
        match &self.entries[index as usize].what {
            What::ImpliedDirectory => true,
            What::Inode(inode) => self.inodes[*inode as usize].kind == InodeKind::Directory,
            What::Nothing | What::LinkBelow(_) => false,
        }
    }

    /// The directory at `names`, implied where no entry made it.
    fn directory(&mut self, names: &[&[u8]]) -> Result<u32, &'static str> {
        let mut at = 0;
        for name in names {
            // A whiteout marker cannot be a directory on the way to something.
            if name.starts_with(WHITEOUT_PREFIX) {
                return Err("a path through a whiteout");
            }
            at = self.child_or_new(at, name);
            if self.is_directory(at) {
                continue;
            }
            match &self.entries[at as usize].what {
                What::Nothing => self.entries[at as usize].what = What::ImpliedDirectory,
                What::Inode(inode) if matches!(self.inodes[*inode as usize].kind, InodeKind::Symlink(_)) => {
                    return Err("a path through a symbolic link of the same layer");
                }
                _ => return Err("a path through something that is not a directory"),
            }
        }
        Ok(at)
    }

    /// What the layer has at `names`, without making anything.
    fn find(&self, names: &[&[u8]]) -> Result<Option<u32>, &'static str> {
        let mut at = 0;
        for name in names {
            if let What::Inode(inode) = &self.entries[at as usize].what
                && matches!(self.inodes[*inode as usize].kind, InodeKind::Symlink(_))
            {
                return Err("a hard link through a symbolic link of the same layer");
            }
            match self.child(at, name) {
                Some(index) => at = index,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    /// The entry for a directory `name`, keeping what is known about it.
    fn child_directory(&mut self, parent: u32, name: &[u8]) -> u32 {
        let index = self.child_or_new(parent, name);
        if self.is_directory(index) || self.entries[index as usize].what == What::Nothing {
            return index;
        }
        self.replace(parent, name, What::ImpliedDirectory)
    }

    fn set_directory(&mut self, index: u32, inode: Inode) {
        let inode = self.add_inode(inode);
        self.entries[index as usize].what = What::Inode(inode);
    }

    /// Gives `name` a new meaning; what it had before, with everything inside it, is forgotten.
    fn replace(&mut self, parent: u32, name: &[u8], what: What) -> u32 {
        let index = self.child_or_new(parent, name);
        let entry = &mut self.entries[index as usize];
        entry.what = what;
        entry.opaque = false;
        self.children[index as usize] = HashMap::new();
        index
    }

    /// Leaves out what was replaced and puts the rest in its fixed order.
    fn finish(self, data_bytes: u64, tar_bytes: u64) -> LayerTree {
        let Self { mut entries, children, inodes, dropped } = self;
        let mut kept_inodes: Vec<Option<u32>> = vec![None; inodes.len()];
        let mut inode_order = Vec::new();
        let mut out: Vec<Entry> = Vec::with_capacity(entries.len());
        // Depth first without recursion: a path can be two thousand directories deep.
        let mut pending = vec![(0u32, 0u32)];
        while let Some((index, parent)) = pending.pop() {
            let old = &mut entries[index as usize];
            let new_index = out.len() as u32;
            let what = match std::mem::replace(&mut old.what, What::Nothing) {
                What::Inode(inode) => What::Inode(*kept_inodes[inode as usize].get_or_insert_with(|| {
                    inode_order.push(inode);
                    inode_order.len() as u32 - 1
                })),
                other => other,
            };
            let name = std::mem::take(&mut old.name);
            out.push(Entry { parent, name, whiteout: old.whiteout, opaque: old.opaque, what });
            let mut inside: Vec<_> = children[index as usize].iter().collect();
            inside.sort_by(|a, b| b.0.cmp(a.0));
            pending.extend(inside.into_iter().map(|(_, child)| (*child, new_index)));
        }
        let mut inodes: Vec<Option<Inode>> = inodes.into_iter().map(Some).collect();
        let inodes = inode_order.iter().filter_map(|index| inodes[*index as usize].take()).collect();
        LayerTree { entries: out, inodes, data_bytes, tar_bytes, dropped }
    }
}

impl std::borrow::Borrow<[u8]> for Bytes {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}
