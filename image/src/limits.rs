//! Every bound on what an image may ask of the host, in one place. `docs/images.md` lists them for people.
//!
//! Read by the archive, layer and merge code. An input at the limit works; one step past it is [`ImageError::Limit`](crate::ImageError).

/// Bounds that a caller may lower or raise; [`Limits::default`] is what the documentation promises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Largest JSON document of an archive: manifest, index, configuration.
    pub metadata_bytes: u64,
    /// Entries of the outer archive.
    pub archive_entries: u64,
    /// Images in one archive.
    pub archive_images: u64,
    /// Largest blob as stored in the archive, compressed or not.
    pub blob_bytes: u64,
    /// Largest uncompressed layer.
    pub layer_bytes: u64,
    /// Entries of one layer.
    pub layer_entries: u64,
    /// Names, link targets and extended attributes of one layer, together.
    pub layer_metadata_bytes: u64,
    /// Layers of one image.
    pub layers: u64,
    /// Files of one merged image.
    pub image_entries: u64,
    /// Uncompressed bytes per compressed byte, looked at from [`RATIO_GRACE_BYTES`] on.
    pub compression_ratio: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            metadata_bytes: 16 << 20,
            archive_entries: 100_000,
            archive_images: 1_000,
            blob_bytes: 16 << 30,
            layer_bytes: 16 << 30,
            layer_entries: 1_000_000,
            layer_metadata_bytes: 256 << 20,
            layers: 512,
            image_entries: 2_000_000,
            compression_ratio: 1_200,
        }
    }
}

/// Below this many uncompressed bytes no ratio is a bomb. Deflate itself cannot pass 1,032 to 1.
pub const RATIO_GRACE_BYTES: u64 = 64 << 20;
/// Longest path in a layer, as Linux's PATH_MAX.
pub const PATH_BYTES: usize = 4096;
/// Longest path component (EROFS_NAME_LEN, NAME_MAX).
pub const NAME_BYTES: usize = 255;
/// Longest symbolic link target; the kernel takes one byte less than a page.
pub const SYMLINK_BYTES: usize = 4095;
/// Largest value of one extended attribute (XATTR_SIZE_MAX); EROFS stores the length in 16 bits.
pub const XATTR_VALUE_BYTES: usize = 65_535;
/// All extended attributes of one file as stored; EROFS counts them in 16-bit units of four bytes.
pub const XATTR_TOTAL_BYTES: usize = 128 << 10;
/// Largest PAX header or GNU long name.
pub const TAR_HEADER_BYTES: u64 = 1 << 20;
/// Runs of data in one sparse file.
pub const SPARSE_RUNS: usize = 65_536;
/// Largest apparent size of one file. Half of what the root device's 32-bit block addresses can reach.
pub const FILE_BYTES: u64 = 8 << 40;
/// Chunks that describe one sparse file; chunk size grows with the file to stay below it.
pub const SPARSE_CHUNKS: u64 = 16_384;
/// zstd windows up to 2^27 (128 MiB), the decoder's own default.
pub const ZSTD_WINDOW_LOG: u32 = 27;
/// Indexes inside indexes: buildx nests one, nobody nests more than two.
pub const INDEX_DEPTH: usize = 4;
/// Symbolic links followed while resolving one path inside an image (MAXSYMLINKS).
pub const SYMLINK_HOPS: usize = 40;
/// Labels, environment entries and arguments of a configuration, each.
pub const CONFIG_ENTRIES: usize = 4096;
