//! Sparse disk images as content: copied without their holes, sharing what the file system can share, and digested without them.
//!
//! Called by `snapshot` and by the template of writable disks. It never trusts a file's length further than the file's own data goes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::digest::{Digest, Hasher};

/// Unit of content in bytes: a piece that is all zeros is no content, wherever the host has holes.
pub const PIECE_LEN: usize = 64 << 10;
/// Bytes that one call copies: enough to cost nothing, few enough to end soon after the disk is full.
const COPY_LEN: usize = 16 << 20;

/// What a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskContent {
    /// Its length in bytes.
    pub size_bytes: u64,
    /// Bytes of pieces that are not all zeros.
    pub data_bytes: u64,
    /// Digest of length, offsets and bytes of those pieces.
    pub digest: Digest,
}

/// Copies `source` to the empty file `target`: as shared extents where the file system has them, else without holes.
///
/// # Errors
/// What either file says.
pub fn copy(source: &File, target: &File) -> io::Result<()> {
    if rustix::fs::ioctl_ficlone(target, source).is_err() {
        copy_extents(source, target)?;
    }
    target.set_len(source.metadata()?.len())
}

fn copy_extents(source: &File, target: &File) -> io::Result<()> {
    let mut position = 0;
    while let Some((start, end)) = next_extent(source, position)? {
        copy_range(source, target, start, end)?;
        position = end;
    }
    Ok(())
}

/// The next run of what the file system does not know to be a hole.
fn next_extent(file: &File, position: u64) -> io::Result<Option<(u64, u64)>> {
    match rustix::fs::seek(file, SeekFrom::Data(position)) {
        Ok(start) => Ok(Some((start, rustix::fs::seek(file, SeekFrom::Hole(start))?))),
        // No data behind `position`.
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let want = COPY_LEN.min(usize::try_from(end - from).unwrap_or(usize::MAX));
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), want) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Two file systems, or one that cannot: the bytes go through here.
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL | Errno::PERM) => {
                return copy_bytes(source, target, from, end);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_bytes(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    let mut position = start;
    while position < end {
        let want = buffer.len().min(usize::try_from(end - position).unwrap_or(usize::MAX));
        match source.read_at(&mut buffer[..want], position)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                target.write_all_at(&buffer[..count], position)?;
                position += count as u64;
            }
        }
    }
    Ok(())
}

/// Shows each piece that is not all zeros, in order.
pub(super) fn pieces(file: &File, mut show: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let length = file.metadata()?.len();
    let unit = PIECE_LEN as u64;
    let mut buffer = vec![0; PIECE_LEN];
    let mut position = 0;
    while let Some((start, end)) = next_extent(file, position)? {
        // A piece that a run begins or ends in is looked at as a whole; the one before may have been looked at already.
        let mut offset = (start / unit * unit).max(position);
        while offset < end {
            let len = usize::try_from((length - offset).min(unit)).unwrap_or(PIECE_LEN);
            file.read_exact_at(&mut buffer[..len], offset)?;
            if buffer[..len].iter().any(|byte| *byte != 0) {
                show(offset, &buffer[..len])?;
            }
            offset += len as u64;
        }
        position = offset;
    }
    Ok(())
}

/// Digests a disk.
///
/// # Errors
/// What the file says.
pub fn measure(file: &File) -> io::Result<DiskContent> {
    let size_bytes = file.metadata()?.len();
    let mut hasher = Hasher::default();
    let mut data_bytes = 0;
    hasher.update(&size_bytes.to_le_bytes());
    pieces(file, |offset, bytes| {
        hasher.update(&offset.to_le_bytes());
        hasher.update(bytes);
        data_bytes += bytes.len() as u64;
        Ok(())
    })?;
    Ok(DiskContent { size_bytes, data_bytes, digest: hasher.finish() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn disk(length: u64, data: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        for (offset, bytes) in data {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    #[test]
    fn a_copy_has_the_content_and_the_holes() {
        let source = disk(1 << 30, &[(5, b"first"), (300 << 20, &[7; 100_000]), ((1 << 30) - 3, b"end")]);
        let target = disk(0, &[]);
        copy(&source, &target).unwrap();
        assert_eq!(measure(&source).unwrap(), measure(&target).unwrap());
        assert_eq!(target.metadata().unwrap().len(), 1 << 30);
        assert!(target.metadata().unwrap().blocks() * 512 < 4 << 20);
        let bytes = disk(0, &[]);
        copy_bytes(&source, &bytes, 300 << 20, (300 << 20) + 100_000).unwrap();
        let mut read = vec![0; 100_000];
        bytes.read_exact_at(&mut read, 300 << 20).unwrap();
        assert_eq!(read, [7; 100_000]);
    }

    #[test]
    fn the_digest_is_of_the_content_and_not_of_the_holes() {
        let sparse = disk(1 << 20, &[(70_000, b"x")]);
        let written = disk(1 << 20, &[(0, &[0; 1 << 20]), (70_000, b"x")]);
        let one = measure(&sparse).unwrap();
        assert_eq!(one, measure(&written).unwrap());
        assert_eq!((one.size_bytes, one.data_bytes), (1 << 20, PIECE_LEN as u64));
        for other in [
            disk(1 << 20, &[(70_001, b"x")]),
            disk(1 << 20, &[(70_000, b"y")]),
            disk((1 << 20) + 1, &[(70_000, b"x")]),
            disk(1 << 20, &[(70_000 + PIECE_LEN as u64, b"x")]),
            disk(1 << 20, &[(70_000, b"x"), ((1 << 20) - 1, b"z")]),
            disk(1 << 20, &[]),
        ] {
            assert_ne!(one.digest, measure(&other).unwrap().digest);
        }
    }
}
