//! What lies behind a disk: files, read and written straight from guest memory.
//!
//! Called by the block worker only. Offsets and lengths have been checked against the capacity; a file that shrank meanwhile shows
//! up as an end of file, which is an I/O error of that request and nothing more.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::fcntl::{FallocateFlags, fallocate};

use crate::devices::virtio::slices::SliceList;
use crate::memory::transfer::{self, SLICES_MAX};

/// The data buffers of one request.
pub type DataList<'memory> = SliceList<'memory, SLICES_MAX>;

/// Zeroes are written in pieces of this many bytes where the file system has no holes.
const ZERO_BLOCK_BYTES: usize = 64 * 1024;

/// A disk's content.
pub trait Storage: Send + Sync {
    /// Size in bytes, fixed for the life of the device.
    fn len_bytes(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// Fills all of `buffers` from `offset`.
    fn read(&self, offset: u64, buffers: &mut DataList<'_>) -> io::Result<()>;

    /// Writes all of `buffers` at `offset`.
    fn write(&self, offset: u64, buffers: &mut DataList<'_>) -> io::Result<()>;

    /// Makes completed writes durable.
    fn flush(&self) -> io::Result<()>;

    /// Gives a range back to the host; its content afterwards is zeroes or what it was.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes a range read as zeroes, without allocating where possible.
    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()>;
}

/// One file's share of a concatenation.
#[derive(Debug)]
struct Part {
    file: File,
    /// Where the part begins on the device, in bytes.
    start: u64,
    /// Where it ends.
    end: u64,
}

/// Several files as one read-only device.
#[derive(Debug)]
pub struct Concatenation {
    parts: Vec<Part>,
}

impl Concatenation {
    /// Joins `files`, each with the number of its bytes that belong to the device.
    pub fn new(files: Vec<(File, u64)>) -> Self {
        let mut start = 0u64;
        let parts = files
            .into_iter()
            .filter(|(_, length)| *length > 0)
            .map(|(file, length)| {
                let part = Part { file, start, end: start + length };
                start = part.end;
                part
            })
            .collect();
        Self { parts }
    }
}

/// What a read-only device answers to everything that would change it.
fn read_only() -> io::Error {
    io::Error::from(io::ErrorKind::ReadOnlyFilesystem)
}

impl Storage for Concatenation {
    fn len_bytes(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read(&self, mut offset: u64, buffers: &mut DataList<'_>) -> io::Result<()> {
        let mut index = self.parts.partition_point(|part| part.end <= offset);
        while !buffers.is_empty() {
            let part = self.parts.get(index).ok_or(io::ErrorKind::UnexpectedEof)?;
            let room = usize::try_from(part.end - offset).unwrap_or(usize::MAX);
            let mut within = buffers.clone();
            within.truncate(room);
            let count = within.len();
            read_exactly(&part.file, offset - part.start, &mut within)?;
            buffers.advance(count);
            offset += count as u64;
            index += 1;
        }
        Ok(())
    }

    fn write(&self, _offset: u64, _buffers: &mut DataList<'_>) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(read_only())
    }
}

/// One sparse file as a writable device.
#[derive(Debug)]
pub struct SparseFile {
    file: File,
    len_bytes: u64,
}

impl SparseFile {
    /// Takes an open file; its length now is the device's for good.
    pub fn new(file: File) -> io::Result<Self> {
        let len_bytes = file.metadata()?.len();
        Ok(Self { file, len_bytes })
    }

    fn punch_hole(&self, offset: u64, length: u64) -> nix::Result<()> {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let offset = i64::try_from(offset).map_err(|_| nix::errno::Errno::EINVAL)?;
        let length = i64::try_from(length).map_err(|_| nix::errno::Errno::EINVAL)?;
        loop {
            match fallocate(&self.file, flags, offset, length) {
                Err(nix::errno::Errno::EINTR) => {}
                result => return result,
            }
        }
    }
}

impl Storage for SparseFile {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, buffers: &mut DataList<'_>) -> io::Result<()> {
        read_exactly(&self.file, offset, buffers)
    }

    fn write(&self, mut offset: u64, buffers: &mut DataList<'_>) -> io::Result<()> {
        while !buffers.is_empty() {
            match transfer::write_at(self.file.as_fd(), buffers.as_slices(), offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                count => {
                    buffers.advance(count);
                    offset += count as u64;
                }
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.punch_hole(offset, length) {
            // Discard is a hint: where the file system has no holes, nothing happens.
            Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn write_zeroes(&self, mut offset: u64, mut length: u64) -> io::Result<()> {
        match self.punch_hole(offset, length) {
            Ok(()) => return Ok(()),
            Err(nix::errno::Errno::EOPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        let zeroes = vec![0u8; ZERO_BLOCK_BYTES];
        while length > 0 {
            let piece = usize::try_from(length).unwrap_or(usize::MAX).min(ZERO_BLOCK_BYTES);
            let count = std::os::unix::fs::FileExt::write_at(&self.file, &zeroes[..piece], offset)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            offset += count as u64;
            length -= count as u64;
        }
        Ok(())
    }
}

/// Fills `buffers` from `file`; an end of file before that is an error (the file shrank).
fn read_exactly(file: &File, mut offset: u64, buffers: &mut DataList<'_>) -> io::Result<()> {
    while !buffers.is_empty() {
        match transfer::read_at(file.as_fd(), buffers.as_slices(), offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                buffers.advance(count);
                offset += count as u64;
            }
        }
    }
    Ok(())
}
