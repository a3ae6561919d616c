//! The writable disk of a sandbox: a journalled ext4 template, packed once at build time, cloned by its extents.
//!
//! ```text
//!  mke2fs (build) ─► raw file ─pack_template─► share/msb/upper.ext4.zst   (plain zstd; an empty file system is nearly all zeros)
//!                                                   │ once per store and template
//!                                                   ▼
//!                        images/templates/<sha256 of the .zst>   (raw, sparse: under 1 MiB allocated)
//!                                                   │ reflink, else copy of data extents, then set_len
//!                                                   ▼
//!                                       sandboxes/<name>/upper.img   (the guest grows the file system online)
//! ```
//!
//! Called by xtask (packing) and by the daemon (instantiating). No mkfs is in the path of starting a sandbox.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::digest::{Digest, Hasher};
use crate::error::{ImageError, io_error};
use crate::snapshot::disk;
use crate::store::Store;

/// Size of the template's file system, the smallest writable disk.
pub const TEMPLATE_BYTES: u64 = 256 << 20;

/// Arguments for mke2fs (e2fsprogs 1.47) that make the template; the path of a file of [`TEMPLATE_BYTES`] follows.
///
/// No resize inode: `meta_bg` grows online to any size and a fresh file system stays tiny. Fixed uuid and hash seed: the template
/// is the same bytes whenever it is made, and no two disks of it ever meet in one kernel.
pub const MKE2FS_ARGUMENTS: &[&str] = &[
    "-q",
    "-F",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-I",
    "256",
    "-m",
    "0",
    "-O",
    "has_journal,extent,64bit,flex_bg,metadata_csum,dir_index,large_file,huge_file,extra_isize,meta_bg,^resize_inode",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=0,nodiscard,root_owner=0:0,hash_seed=6d736200-0000-4000-8000-000000000001",
    "-J",
    "size=16",
    "-L",
    "msb-upper",
    "-U",
    "6d736200-0000-4000-8000-000000000000",
];

/// Blocks of zeros shorter than this are written out.
const BLOCK_BYTES: usize = 4096;
/// Largest template that is unpacked; a damaged file must not fill the disk.
const TEMPLATE_BYTES_MAX: u64 = 16 << 30;

/// Packs a raw file system image for the share directory.
///
/// # Errors
/// `Io` or `DiskFull` for either file.
pub fn pack_template(raw: &Path, packed: &Path) -> Result<(), ImageError> {
    let source = File::open(raw).map_err(|error| io_error("read", raw, error))?;
    let target = File::create(packed).map_err(|error| io_error("create", packed, error))?;
    // Level 19 costs build time only; the input is nearly all zeros anyway.
    zstd::stream::copy_encode(BufReader::with_capacity(1 << 20, source), &target, 19)
        .map_err(|error| io_error("write", packed, error))?;
    target.sync_all().map_err(|error| io_error("write", packed, error))
}

impl Store {
    /// Makes a fresh writable disk of `bytes` at `target`, which must not exist.
    ///
    /// `packed` is the template in the share directory. The first use unpacks it; later ones clone what that left in the store.
    ///
    /// # Errors
    /// `Corrupt` for a damaged template, `Limit` for a size below [`TEMPLATE_BYTES`], `DiskFull`, `Io`.
    pub fn make_upper(&self, packed: &Path, target: &Path, bytes: u64) -> Result<(), ImageError> {
        let template = self.unpacked_template(packed)?;
        let template_bytes = fs::metadata(&template).map_err(|error| io_error("read", &template, error))?.len();
        if bytes < template_bytes {
            let what = format!("a writable disk of {bytes} bytes is smaller than its template; the size");
            return Err(ImageError::Limit { what, limit: template_bytes, unit: " bytes at least" });
        }
        let file = create_new(target)?;
        let result = clone_sparse(&template, &file, target, bytes);
        if result.is_err() {
            // Half a disk is worth nothing; the error that matters is the first one.
            let _ = fs::remove_file(target);
        }
        result
    }

    fn unpacked_template(&self, packed: &Path) -> Result<PathBuf, ImageError> {
        let mut source = File::open(packed).map_err(|error| io_error("read", packed, error))?;
        let mut hasher = Hasher::default();
        let mut buffer = vec![0; 256 << 10];
        loop {
            match source.read(&mut buffer).map_err(|error| io_error("read", packed, error))? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
        let digest: Digest = hasher.finish();
        let cached = self.paths().templates().join(digest.hex());
        if cached.exists() {
            return Ok(cached);
        }
        source.rewind().map_err(|error| io_error("read", packed, error))?;
        let scratch = self.temporary()?;
        let path = scratch.path().join("template");
        let file = create_new(&path)?;
        let decoder = zstd::Decoder::new(source)
            .map_err(|error| ImageError::Corrupt(format!("the disk template cannot be unpacked: {error}")))?;
        unpack_sparse(decoder, &file, &path)?;
        file.sync_all().map_err(|error| io_error("write", &path, error))?;
        // Two first uses at once make the same file; the later rename changes nothing.
        fs::rename(&path, &cached).map_err(|error| io_error("create", &cached, error))?;
        Ok(cached)
    }
}

fn create_new(path: &Path) -> Result<File, ImageError> {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| io_error("create", path, error))
}

/// Writes a stream, leaving blocks of zeros as holes.
fn unpack_sparse(mut source: impl Read, file: &File, path: &Path) -> Result<(), ImageError> {
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0u64;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match source.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(ImageError::Corrupt(format!("the disk template cannot be unpacked: {error}")));
                }
            }
        }
        if filled == 0 {
            break;
        }
        for (index, block) in buffer[..filled].chunks(BLOCK_BYTES).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                file.write_all_at(block, position + (index * BLOCK_BYTES) as u64)
                    .map_err(|error| io_error("write", path, error))?;
            }
        }
        position += filled as u64;
        if position > TEMPLATE_BYTES_MAX {
            return Err(ImageError::Corrupt("the disk template is larger than 16 GiB".into()));
        }
    }
    if position == 0 {
        return Err(ImageError::Corrupt("the disk template is empty".into()));
    }
    file.set_len(position).map_err(|error| io_error("write", path, error))
}

/// Makes the empty file `target` the disk `from`, grown to `bytes`.
fn clone_sparse(from: &Path, target: &File, to: &Path, bytes: u64) -> Result<(), ImageError> {
    let source = File::open(from).map_err(|error| io_error("read", from, error))?;
    disk::copy(&source, target).map_err(|error| io_error("write", to, error))?;
    target.set_len(bytes).map_err(|error| io_error("write", to, error))
}
