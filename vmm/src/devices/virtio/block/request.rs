//! One request of a virtio-blk driver, parsed and carried out (VIRTIO 1.2, section 5.2.6).
//!
//! `parse` guarantees: the data buffers lie in guest memory, there is a status byte, and nothing was read beyond the chain.
//! `execute` guarantees: the storage sees only ranges inside the disk.

use std::io;

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::device::BlockCounters;
use super::storage::{DataList, Storage};
use crate::devices::virtio::ring::Chain;
use crate::devices::virtio::slices::GatherError;

/// Bytes in a sector, whatever the block size.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes of the serial a driver asks for.
pub const SERIAL_BYTES: usize = 20;
/// Most ranges in one DISCARD or WRITE_ZEROES request.
pub const RANGES_MAX: usize = 16;
/// Most sectors in one range: 256 MiB, so that zeroing without holes stays a bounded wait.
pub const RANGE_SECTORS_MAX: u32 = (256 << 20) / 512;
/// Bytes of the request header.
const HEADER_BYTES: usize = 16;
/// Bytes of one range.
const RANGE_BYTES: usize = 16;

/// The status byte (5.2.6): done.
pub const STATUS_OK: u8 = 0;
/// Device or driver error.
pub const STATUS_IO_ERROR: u8 = 1;
/// Request unknown or not offered.
pub const STATUS_UNSUPPORTED: u8 = 2;

/// Request types (5.2.6); unknown ones survive as numbers.
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Why a chain is no request.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ParseError {
    /// the buffers are too many or outside of memory
    #[error(transparent)]
    Gather(#[from] GatherError),
    /// fewer than 16 readable bytes
    #[error("request header is cut short")]
    Header,
    /// no writable byte for the status
    #[error("request has no status byte")]
    Status,
}

/// A parsed request.
pub struct Request<'memory> {
    kind: u32,
    sector: u64,
    /// Readable data (writes, ranges).
    output: DataList<'memory>,
    /// Writable data (reads, serial).
    input: DataList<'memory>,
    status: VolatileSlice<'memory>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Finished; the status byte is written and this many bytes of the chain were.
    Used(u32),
    /// The host's disk is full: try the same chain again later.
    HostFull,
}

impl<'memory> Request<'memory> {
    /// Gathers a chain. `memory` is the memory the chain is in.
    pub fn parse(chain: Chain, memory: &'memory GuestMemoryMmap<()>) -> Result<Self, ParseError> {
        let mut output = DataList::new();
        let mut input = DataList::new();
        for descriptor in chain {
            if descriptor.is_write_only() {
                input.push_descriptor(memory, &descriptor)?;
            } else {
                output.push_descriptor(memory, &descriptor)?;
            }
        }
        let status = input.split_last_byte().ok_or(ParseError::Status)?;
        let mut header = [0u8; HEADER_BYTES];
        if !output.read_front(&mut header) {
            return Err(ParseError::Header);
        }
        let kind = u32::from_le_bytes(header[..4].try_into().expect("four bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
        Ok(Self { kind, sector, output, input, status })
    }

    /// Carries the request out and writes its status, unless the host's disk is full.
    pub fn execute(mut self, storage: &dyn Storage, serial: &[u8; SERIAL_BYTES], counters: &BlockCounters) -> Outcome {
        let (status, written) = match self.carry_out(storage, serial, counters) {
            Ok(written) => (STATUS_OK, written),
            Err(Refusal::Unsupported) => (STATUS_UNSUPPORTED, 0),
            Err(Refusal::OutOfRange) => (STATUS_IO_ERROR, 0),
            Err(Refusal::Io(error)) if is_disk_full(&error) => return Outcome::HostFull,
            Err(Refusal::Io(_)) => (STATUS_IO_ERROR, 0),
        };
        self.finish(status, written, counters)
    }

    /// Fails the request without trying.
    pub fn fail(self, counters: &BlockCounters) -> Outcome {
        self.finish(STATUS_IO_ERROR, 0, counters)
    }

    fn finish(self, status: u8, written: usize, counters: &BlockCounters) -> Outcome {
        if status != STATUS_OK {
            counters.errors.add(1);
        }
        self.status.copy_from(&[status]);
        // The status byte counts too; a chain is shorter than 4 GiB (virtio-queue ends it there).
        Outcome::Used(u32::try_from(written + 1).unwrap_or(u32::MAX))
    }

    fn carry_out(
        &mut self,
        storage: &dyn Storage,
        serial: &[u8; SERIAL_BYTES],
        counters: &BlockCounters,
    ) -> Result<usize, Refusal> {
        match self.kind {
            kind::IN => {
                let length = self.input.len();
                let offset = range_in_disk(storage, self.sector, length as u64)?;
                storage.read(offset, &mut self.input)?;
                counters.read_operations.add(1);
                counters.read_bytes.add(length as u64);
                Ok(length)
            }
            kind::OUT => {
                if storage.is_read_only() {
                    return Err(Refusal::OutOfRange);
                }
                let length = self.output.len();
                let offset = range_in_disk(storage, self.sector, length as u64)?;
                storage.write(offset, &mut self.output)?;
                counters.write_operations.add(1);
                counters.written_bytes.add(length as u64);
                Ok(0)
            }
            kind::FLUSH => {
                storage.flush()?;
                counters.flushes.add(1);
                Ok(0)
            }
            kind::GET_ID => {
                let length = self.input.len().min(SERIAL_BYTES);
                self.input.write_front(&serial[..length]);
                Ok(length)
            }
            kind::DISCARD | kind::WRITE_ZEROES if !storage.is_read_only() => self.clear_ranges(storage, counters),
            _ => Err(Refusal::Unsupported),
        }
    }

    fn clear_ranges(&mut self, storage: &dyn Storage, counters: &BlockCounters) -> Result<usize, Refusal> {
        let count = self.output.len() / RANGE_BYTES;
        if count == 0 || count > RANGES_MAX || !self.output.len().is_multiple_of(RANGE_BYTES) {
            return Err(Refusal::OutOfRange);
        }
        // All ranges are checked before the first is cleared, on copies the guest cannot change any more.
        let mut ranges = [(0u64, 0u64); RANGES_MAX];
        for range in &mut ranges[..count] {
            let mut entry = [0u8; RANGE_BYTES];
            if !self.output.read_front(&mut entry) {
                return Err(Refusal::OutOfRange);
            }
            let sector = u64::from_le_bytes(entry[..8].try_into().expect("eight bytes"));
            let sectors = u32::from_le_bytes(entry[8..12].try_into().expect("four bytes"));
            let flags = u32::from_le_bytes(entry[12..].try_into().expect("four bytes"));
            // 5.2.6.2: unknown flags, and `unmap` on a discard, are unsupported.
            if flags & !1 != 0 || (self.kind == kind::DISCARD && flags != 0) {
                return Err(Refusal::Unsupported);
            }
            if sectors > RANGE_SECTORS_MAX {
                return Err(Refusal::OutOfRange);
            }
            let length = u64::from(sectors) * SECTOR_BYTES;
            *range = (range_in_disk(storage, sector, length)?, length);
        }
        for (offset, length) in &ranges[..count] {
            // fallocate refuses an empty range.
            if *length == 0 {
                continue;
            }
            if self.kind == kind::DISCARD {
                storage.discard(*offset, *length)?;
            } else {
                storage.write_zeroes(*offset, *length)?;
            }
            counters.discarded_bytes.add(*length);
        }
        Ok(0)
    }
}

/// Why a request was not carried out.
enum Refusal {
    Unsupported,
    OutOfRange,
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The byte offset of a range of whole sectors inside the disk.
fn range_in_disk(storage: &dyn Storage, sector: u64, length: u64) -> Result<u64, Refusal> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::OutOfRange)?;
    let end = offset.checked_add(length).ok_or(Refusal::OutOfRange)?;
    if !length.is_multiple_of(SECTOR_BYTES) || end > storage.len_bytes() {
        return Err(Refusal::OutOfRange);
    }
    Ok(offset)
}

/// Whether waiting can help: no space, or no quota.
fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
