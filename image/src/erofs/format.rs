//! The EROFS on-disk format, as far as it is written here (Linux 6.1, `fs/erofs/erofs_fs.h`; Documentation/filesystems/erofs.rst).
//!
//! Constants and pure encoders. All numbers are little endian.

/// Offset of the superblock.
pub(super) const SUPER_OFFSET: usize = 1024;
/// Size of the superblock without extension slots.
pub(super) const SUPER_BYTES: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// log2 of the block size.
const BLOCK_BITS: u8 = 12;
/// Size of the extended inode.
pub(super) const INODE_BYTES: u64 = 64;
/// Unit of node numbers.
pub(super) const SLOT_BYTES: u64 = 32;
/// Size of a directory entry without its name.
pub(super) const DIRENT_BYTES: usize = 12;
/// Marks a chunk that is a hole.
pub(super) const NULL_ADDRESS: u32 = u32::MAX;

/// Where an inode's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    FlatPlain = 0,
    FlatInline = 2,
    ChunkBased = 4,
}

/// `e_name_index` of an attribute namespace, and the part of the name that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XattrPrefix {
    pub(crate) index: u8,
    pub(crate) text: &'static [u8],
}

const XATTR_PREFIXES: [XattrPrefix; 5] = [
    XattrPrefix { index: 1, text: b"user." },
    XattrPrefix { index: 2, text: b"system.posix_acl_access" },
    XattrPrefix { index: 3, text: b"system.posix_acl_default" },
    XattrPrefix { index: 4, text: b"trusted." },
    XattrPrefix { index: 6, text: b"security." },
];

/// The namespace of an attribute, if EROFS has it.
pub(crate) fn xattr_prefix(name: &[u8]) -> Option<XattrPrefix> {
    XATTR_PREFIXES.into_iter().find(|prefix| name.starts_with(prefix.text))
}

/// `linux/kdev_t.h`, `new_encode_dev()`.
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The fields of a superblock that differ between images.
pub(super) struct SuperBlock {
    pub(super) root_nid: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) uuid: [u8; 16],
    pub(super) chunked: bool,
}

impl SuperBlock {
    /// `struct erofs_super_block` with a checksum of zero.
    pub(super) fn encode(&self) -> [u8; SUPER_BYTES] {
        let mut out = [0; SUPER_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(48, &self.uuid);
        put(64, b"msb-root");
        put(80, &(if self.chunked { INCOMPAT_CHUNKED_FILE } else { 0 }).to_le_bytes());
        out
    }
}

/// Sets the checksum in the first block: CRC-32C without final inversion from the superblock to the block's end.
pub(super) fn seal_first_block(block: &mut [u8]) {
    block[SUPER_OFFSET + 4..SUPER_OFFSET + 8].fill(0);
    let sum = crate::crc32c::update(!0, &block[SUPER_OFFSET..]);
    block[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&sum.to_le_bytes());
}

/// `struct erofs_inode_extended`.
pub(super) struct InodeRecord {
    pub(super) layout: Layout,
    pub(super) xattr_bytes: u64,
    pub(super) mode: u16,
    pub(super) size: u64,
    /// Raw block address, device number or chunk format.
    pub(super) detail: u32,
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) mtime_nanoseconds: u32,
    pub(super) links: u32,
}

impl InodeRecord {
    pub(super) fn encode(&self) -> [u8; INODE_BYTES as usize] {
        let mut out = [0; INODE_BYTES as usize];
        let mut put = |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &(1 | (self.layout as u16) << 1).to_le_bytes());
        put(2, &xattr_count(self.xattr_bytes).to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.detail.to_le_bytes());
        put(20, &self.number.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.to_le_bytes());
        put(40, &self.mtime_nanoseconds.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        out
    }
}

/// `i_xattr_icount`: a header of twelve bytes counts one, then every four bytes one.
fn xattr_count(bytes: u64) -> u16 {
    if bytes == 0 { 0 } else { u16::try_from((bytes - XATTR_HEADER_BYTES) / 4 + 1).unwrap_or(u16::MAX) }
}

/// Size of `struct erofs_xattr_ibody_header`.
pub(super) const XATTR_HEADER_BYTES: u64 = 12;

/// Size of an inode's attributes behind it, header included; 0 when it has none.
pub(super) fn xattr_area_bytes<'a>(xattrs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> u64 {
    let entries: u64 = xattrs
        .filter_map(|(name, value)| {
            let prefix = xattr_prefix(name)?;
            Some((4 + name.len() - prefix.text.len() + value.len()).next_multiple_of(4) as u64)
        })
        .sum();
    if entries == 0 { 0 } else { XATTR_HEADER_BYTES + entries }
}

/// Appends the attributes: header, then `struct erofs_xattr_entry` with name and value, each padded to four bytes.
pub(super) fn encode_xattrs<'a>(xattrs: impl Iterator<Item = (&'a [u8], &'a [u8])>, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0; XATTR_HEADER_BYTES as usize]);
    for (name, value) in xattrs {
        let Some(prefix) = xattr_prefix(name) else { continue };
        let suffix = &name[prefix.text.len()..];
        // The importer admits names of 255 and values of 65,535 bytes at most.
        out.push(u8::try_from(suffix.len()).unwrap_or(u8::MAX));
        out.push(prefix.index);
        out.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        out.extend_from_slice(suffix);
        out.extend_from_slice(value);
        let padding = (4 + suffix.len() + value.len()).next_multiple_of(4) - (4 + suffix.len() + value.len());
        out.extend_from_slice(&[0; 3][..padding]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_coded_as_the_kernel_decodes_them() {
        for (major, minor) in [(1, 3), (8, 0), (259, 300), (4095, 0xf_ffff)] {
            let coded = encode_device(major, minor);
            assert_eq!((coded & 0xfff00) >> 8, major);
            assert_eq!((coded & 0xff) | ((coded >> 12) & 0xf_ff00), minor);
        }
    }

    #[test]
    fn attribute_sizes_match_what_is_written() {
        let xattrs = [(&b"user.a"[..], &b"12345"[..]), (b"system.posix_acl_access", b"1234"), (b"security.x", b"")];
        let mut out = Vec::new();
        encode_xattrs(xattrs.into_iter(), &mut out);
        assert_eq!(out.len() as u64, xattr_area_bytes(xattrs.into_iter()));
        assert_eq!(xattr_count(out.len() as u64), 1 + (12 + 8 + 8) / 4);
        assert_eq!(xattr_area_bytes(std::iter::empty()), 0);
    }
}
