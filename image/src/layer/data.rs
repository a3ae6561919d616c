//! Writes a layer's data file: big sequential writes, zeros left as holes.
//!
//! Used by the importer alone. Contents go from the source straight into the write buffer, so each byte is copied once.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::faults;
use crate::layer::BLOCK_BYTES;

/// Bytes gathered before a write.
const BUFFER_BYTES: usize = 1 << 20;
/// A run of zeros shorter than this is written: a hole costs an extent.
const HOLE_BYTES: usize = 64 << 10;

/// Appends to a data file.
pub(super) struct DataWriter {
    file: File,
    buffer: Vec<u8>,
    filled: usize,
    /// File offset of the buffer's first byte, a multiple of 4 KiB.
    base: u64,
}

impl DataWriter {
    pub(super) fn new(file: File) -> Self {
        Self { file, buffer: vec![0; BUFFER_BYTES], filled: 0, base: 0 }
    }

    /// Offset of the next byte.
    pub(super) fn position(&self) -> u64 {
        self.base + self.filled as u64
    }

    /// Free room in the buffer, never empty; what was put there is taken over by [`advance`](Self::advance).
    pub(super) fn room(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    pub(super) fn advance(&mut self, count: usize) {
        self.filled += count;
    }

    /// Moves forward to `position`; what lies between reads as zeros.
    pub(super) fn seek_to(&mut self, position: u64) -> io::Result<()> {
        let gap = position.checked_sub(self.position()).ok_or(io::ErrorKind::InvalidInput)?;
        if gap <= HOLE_BYTES as u64 {
            let mut left = usize::try_from(gap).unwrap_or(0);
            while left > 0 {
                let room = self.room()?;
                let count = room.len().min(left);
                room[..count].fill(0);
                self.advance(count);
                left -= count;
            }
            return Ok(());
        }
        // The buffer's base must stay on a block: pad to one, then jump to the block of the target.
        self.align()?;
        self.flush()?;
        self.base = self.base.max(position - position % BLOCK_BYTES);
        self.buffer[..BLOCK_BYTES as usize].fill(0);
        self.filled = usize::try_from(position - self.base).unwrap_or(0);
        Ok(())
    }

    /// Pads with zeros to the next block and returns its offset.
    pub(super) fn align(&mut self) -> io::Result<u64> {
        let end = self.filled.next_multiple_of(BLOCK_BYTES as usize);
        // The buffer is a whole number of blocks, so `end` is inside it.
        self.buffer[self.filled..end].fill(0);
        self.filled = end;
        Ok(self.position())
    }

    fn flush(&mut self) -> io::Result<()> {
        let bytes = &self.buffer[..self.filled];
        let mut start = 0;
        while start < bytes.len() {
            let zeros = zero_blocks(&bytes[start..]);
            if zeros >= HOLE_BYTES {
                start += zeros;
                continue;
            }
            // Data up to the next hole worth having.
            let mut end = start + zeros;
            while end < bytes.len() {
                let run = zero_blocks(&bytes[end..]);
                if run >= HOLE_BYTES {
                    break;
                }
                end += run.max(BLOCK_BYTES as usize).min(bytes.len() - end);
            }
            faults::step("layer: contents");
            self.file.write_all_at(&bytes[start..end], self.base + start as u64)?;
            start = end;
        }
        self.base += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Writes the rest and gives the file its length, a multiple of 4 KiB.
    pub(super) fn finish(mut self) -> io::Result<(File, u64)> {
        self.align()?;
        self.flush()?;
        self.file.set_len(self.base)?;
        Ok((self.file, self.base))
    }
}

/// Length of the run of all-zero blocks at the start of `bytes`.
fn zero_blocks(bytes: &[u8]) -> usize {
    bytes
        .chunks(BLOCK_BYTES as usize)
        .take_while(|block| block.first() == Some(&0) && block.iter().all(|byte| *byte == 0))
        .map(<[u8]>::len)
        .sum()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn put(writer: &mut DataWriter, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = writer.room().unwrap();
            let count = room.len().min(bytes.len());
            room[..count].copy_from_slice(&bytes[..count]);
            writer.advance(count);
            bytes = &bytes[count..];
        }
    }

    #[test]
    fn contents_are_aligned_and_zeros_become_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        let mut writer = DataWriter::new(File::create(&path).unwrap());
        put(&mut writer, b"first");
        assert_eq!(writer.align().unwrap(), 4096);
        put(&mut writer, &vec![0; 8 << 20]);
        put(&mut writer, b"after zeros");
        let second = writer.align().unwrap();
        writer.seek_to(second + (32 << 20) + 5).unwrap();
        put(&mut writer, &vec![3; 3 << 20]);
        let (_, length) = writer.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, length);
        assert!(length.is_multiple_of(4096));
        assert_eq!(&bytes[..5], b"first");
        assert_eq!(&bytes[4096 + (8 << 20)..][..11], b"after zeros");
        let third = usize::try_from(second).unwrap() + (32 << 20) + 5;
        assert!(bytes[third..third + (3 << 20)].iter().all(|byte| *byte == 3));
        assert!(bytes[third - 100..third].iter().all(|byte| *byte == 0));
        let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(allocated < 5 << 20, "{allocated} bytes are allocated");
    }
}
