//! The guest's receive buffers: taken from its ring ahead of need, filled with frames, and given back together when one frame took
//! several. Owned by the worker; the stack sees it as [`FrameSink`].
//!
//! At most one ring's worth of buffers is held. A buffer that makes no sense is returned empty.

use std::collections::VecDeque;

use msb_network::stack::FrameSink;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::devices::virtio::device::DeviceMemory;
use crate::devices::virtio::ring::{Chain, Ring};
use crate::transport::mmio::saved::SavedQueue;

/// virtio_net_hdr_v1 (VIRTIO 1.2, 5.1.6): flags, type of segmentation, four lengths and offsets, number of buffers.
pub(super) const HEADER_BYTES: usize = 12;
/// Checksums of the frame are right, or as good as: it came through memory.
const FLAG_DATA_VALID: u8 = 2;
/// Offset of the number of buffers.
const BUFFERS_OFFSET: usize = 10;
/// Pieces of one buffer.
const PIECES_MAX: usize = 64;

/// A buffer of the guest, taken and not yet filled. Linux makes them of one piece.
struct Buffer {
    head: u16,
    first: (GuestAddress, u32),
    more: Vec<(GuestAddress, u32)>,
    bytes: usize,
}

/// The receive ring and what was taken from it.
pub(super) struct Receive {
    ring: Ring,
    memory: DeviceMemory,
    spare: VecDeque<Buffer>,
    spare_bytes: usize,
    /// Whether a frame may be spread over several buffers.
    mergeable: bool,
    /// The longest frame with its header.
    need_bytes: usize,
    header: [u8; HEADER_BYTES],
    used: Vec<(u16, u32)>,
    /// Frames that fitted no buffer.
    pub(super) unfit: u64,
}

impl Receive {
    pub(super) fn new(
        ring: Ring,
        memory: DeviceMemory,
        mergeable: bool,
        checksums_trusted: bool,
        frame_bytes_max: usize,
    ) -> Self {
        let mut header = [0; HEADER_BYTES];
        if checksums_trusted {
            header[0] = FLAG_DATA_VALID;
        }
        Self {
            ring,
            memory,
            spare: VecDeque::new(),
            spare_bytes: 0,
            mergeable,
            need_bytes: frame_bytes_max + HEADER_BYTES,
            header,
            used: Vec::new(),
            unfit: 0,
        }
    }

    pub(super) fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// Whether there is room for a frame of full length, or for one frame in one buffer.
    fn is_enough(&self) -> bool {
        if self.mergeable { self.spare_bytes >= self.need_bytes } else { !self.spare.is_empty() }
    }

    /// Whether more buffers may be taken.
    pub(super) fn may_take(&self) -> bool {
        self.spare.len() < usize::from(self.ring.size())
    }

    /// Takes one more buffer; false when there is none.
    fn take(&mut self) -> bool {
        let Some(chain) = self.ring.pop() else { return false };
        let head = chain.head_index();
        match self.parse(chain) {
            Some(buffer) => {
                self.spare_bytes += buffer.bytes;
                self.spare.push_back(buffer);
            }
            None => self.ring.push_used(head, 0),
        }
        true
    }

    fn parse(&self, chain: Chain) -> Option<Buffer> {
        let head = chain.head_index();
        let mut first = None;
        let mut more = Vec::new();
        let mut bytes = 0;
        for descriptor in chain.writable() {
            let length = usize::try_from(descriptor.len()).ok()?;
            if more.len() >= PIECES_MAX || !self.memory.check_range(descriptor.addr(), length) {
                return None;
            }
            bytes += length;
            let piece = (descriptor.addr(), descriptor.len());
            if first.is_none() {
                first = Some(piece);
            } else {
                more.push(piece);
            }
        }
        let first = first?;
        (bytes > HEADER_BYTES || self.mergeable && bytes > 0).then_some(Buffer { head, first, more, bytes })
    }

    /// Writes as much of `parts` as a buffer takes; gives the number of bytes.
    fn fill(&self, buffer: &Buffer, parts: &mut [&[u8]; 2]) -> u32 {
        let mut written = 0;
        for (address, length) in std::iter::once(&buffer.first).chain(&buffer.more) {
            let mut offset = 0u32;
            while offset < *length {
                let Some(part) = parts.iter_mut().find(|part| !part.is_empty()) else { return written };
                let count = part.len().min((length - offset) as usize);
                // Checked when the buffer was taken; guest memory does not shrink.
                if self.memory.write_slice(&part[..count], GuestAddress(address.0 + u64::from(offset))).is_err() {
                    return written;
                }
                *part = &part[count..];
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                offset += count;
                written += count;
            }
        }
        written
    }

    /// How many of the buffers a frame takes; none if it does not fit.
    fn buffers_for(&self, bytes: usize) -> Option<usize> {
        let most = if self.mergeable { self.spare.len() } else { 1 };
        let mut room = 0;
        for (index, buffer) in self.spare.iter().take(most).enumerate() {
            room += buffer.bytes;
            if room >= bytes {
                return Some(index + 1);
            }
        }
        None
    }

    /// Where the ring is, as if the buffers that were taken and not used never had been.
    pub(super) fn position(&self) -> SavedQueue {
        self.ring.position(u16::try_from(self.spare.len()).unwrap_or(u16::MAX))
    }

    /// Gives the buffers that were taken and not used back to the ring, and the ring's position.
    pub(super) fn into_queue(mut self) -> Queue {
        // Returned empty buffers came in between, so only the last ones can be put back; Linux resets its rings anyway.
        let spare = u16::try_from(self.spare.len()).unwrap_or(u16::MAX);
        self.ring.undo_pop(spare);
        self.ring.into_queue()
    }
}

impl FrameSink for Receive {
    fn has_room(&mut self) -> bool {
        let mut budget = self.ring.size();
        while !self.is_enough() {
            if budget == 0 || !self.may_take() || !self.take() {
                return false;
            }
            budget -= 1;
        }
        true
    }

    fn send(&mut self, frame: &[u8]) {
        let Some(count) = self.buffers_for(HEADER_BYTES + frame.len()) else {
            // A guest without mergeable buffers whose buffer is too small for this frame.
            self.unfit += 1;
            return;
        };
        let mut header = self.header;
        let buffers = u16::try_from(count).unwrap_or(u16::MAX);
        header[BUFFERS_OFFSET..].copy_from_slice(&buffers.to_le_bytes());
        let mut parts: [&[u8]; 2] = [&header, frame];
        let mut used = std::mem::take(&mut self.used);
        used.clear();
        for _ in 0..count {
            let Some(buffer) = self.spare.pop_front() else { break };
            self.spare_bytes -= buffer.bytes;
            used.push((buffer.head, self.fill(&buffer, &mut parts)));
        }
        self.ring.push_used_together(&used);
        self.used = used;
    }
}

/// Copies a frame of the guest, without its header, into `frame`, at most `frame_bytes_max` bytes and one more, so that a frame that is
/// too long is seen as one. False for a chain that makes no sense.
pub(super) fn read_frame(chain: Chain, memory: &DeviceMemory, frame_bytes_max: usize, frame: &mut Vec<u8>) -> bool {
    frame.clear();
    let mut skip = HEADER_BYTES;
    for descriptor in chain.readable().take(PIECES_MAX) {
        let length = descriptor.len() as usize;
        let skipped = skip.min(length);
        skip -= skipped;
        let room = frame_bytes_max + 1 - frame.len();
        let count = (length - skipped).min(room);
        let start = frame.len();
        frame.resize(start + count, 0);
        let Some(address) = descriptor.addr().0.checked_add(skipped as u64) else { return false };
        if memory.read_slice(&mut frame[start..], GuestAddress(address)).is_err() {
            return false;
        }
    }
    skip == 0 && !frame.is_empty()
}
