//! The guest buffers of one request as a short list: gathered once from a descriptor chain, then consumed from the front by transfers
//! (`memory::transfer`) and small copies. It takes the memory of what it holds, so that a small request does not pay for the largest.
//!
//! Used by every worker. A chain with more pieces than the list holds is refused: no driver we know makes one, and a guest must
//! not choose how much we keep.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// A chain has more pieces than allowed, or points outside of guest memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum GatherError {
    /// more pieces than the list holds
    #[error("descriptor chain has more than the allowed number of pieces")]
    TooMany,
    /// an address range that is not guest memory
    #[error("descriptor points outside of guest memory")]
    OutsideMemory,
}

/// At most `N` pieces of guest memory, in order.
#[derive(Clone)]
pub struct SliceList<'memory, const N: usize> {
    slices: Vec<VolatileSlice<'memory>>,
    start: usize,
    bytes: usize,
}

impl<'memory, const N: usize> SliceList<'memory, N> {
    /// An empty list.
    pub fn new() -> Self {
        Self { slices: Vec::new(), start: 0, bytes: 0 }
    }

    /// Appends the memory of one descriptor. A descriptor over two regions takes two places.
    pub fn push_descriptor(
        &mut self,
        memory: &'memory GuestMemoryMmap<()>,
        descriptor: &Descriptor,
    ) -> Result<(), GatherError> {
        let length = usize::try_from(descriptor.len()).map_err(|_| GatherError::OutsideMemory)?;
        for slice in memory.get_slices(descriptor.addr(), length) {
            self.push(slice.map_err(|_| GatherError::OutsideMemory)?)?;
        }
        Ok(())
    }

    /// Appends one piece; empty pieces vanish.
    pub fn push(&mut self, slice: VolatileSlice<'memory>) -> Result<(), GatherError> {
        if slice.is_empty() {
            return Ok(());
        }
        if self.slices.len() == N {
            return Err(GatherError::TooMany);
        }
        self.slices.push(slice);
        self.bytes += slice.len();
        Ok(())
    }

    /// Bytes left in the list.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The pieces left, in order.
    pub fn as_slices(&self) -> &[VolatileSlice<'memory>] {
        &self.slices[self.start..]
    }

    /// Drops `count` bytes from the front (all of them if there are fewer).
    pub fn advance(&mut self, mut count: usize) {
        while count > 0 && self.start < self.slices.len() {
            let slice = self.slices[self.start];
            if count < slice.len() {
                self.slices[self.start] = slice.offset(count).expect("count is inside the slice");
                self.bytes -= count;
                return;
            }
            count -= slice.len();
            self.bytes -= slice.len();
            self.start += 1;
        }
    }

    /// Keeps at most `length` bytes.
    pub fn truncate(&mut self, length: usize) {
        let mut kept = 0;
        for index in self.start..self.slices.len() {
            let slice = self.slices[index];
            if kept + slice.len() >= length {
                let room = length - kept;
                self.slices[index] = slice.subslice(0, room).expect("room is inside the slice");
                self.slices.truncate(if room == 0 { index } else { index + 1 });
                self.bytes = length;
                return;
            }
            kept += slice.len();
        }
    }

    /// Splits off the last byte (virtio-blk's status), wherever it lies.
    pub fn split_last_byte(&mut self) -> Option<VolatileSlice<'memory>> {
        let last = *self.as_slices().last()?;
        let byte = last.offset(last.len() - 1).expect("slices in the list are not empty");
        self.truncate(self.bytes - 1);
        Some(byte)
    }

    /// Copies from the front into `buffer` and consumes; false if there are too few bytes (then nothing is consumed).
    pub fn read_front(&mut self, buffer: &mut [u8]) -> bool {
        if self.bytes < buffer.len() {
            return false;
        }
        let mut done = 0;
        for slice in self.as_slices() {
            if done == buffer.len() {
                break;
            }
            done += slice.copy_to(&mut buffer[done..]);
        }
        self.advance(buffer.len());
        true
    }

    /// Copies `buffer` to the front and consumes; false if there is too little room (then nothing is written).
    pub fn write_front(&mut self, buffer: &[u8]) -> bool {
        if self.bytes < buffer.len() {
            return false;
        }
        let mut done = 0;
        for slice in self.as_slices() {
            if done == buffer.len() {
                break;
            }
            let count = slice.len().min(buffer.len() - done);
            slice.copy_from(&buffer[done..done + count]);
            done += count;
        }
        self.advance(buffer.len());
        true
    }
}

impl<const N: usize> Default for SliceList<'_, N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    proptest! {
        #[test]
        fn a_list_behaves_like_one_buffer(
            lengths in prop::collection::vec(0usize..40, 0..8),
            skip in 0usize..200,
            keep in 0usize..200,
        ) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
            let mut list = SliceList::<8>::new();
            let mut model = Vec::new();
            for (index, length) in lengths.iter().enumerate() {
                let slice = memory.get_slice(GuestAddress(index as u64 * 64), *length).expect("slice");
                let content: Vec<u8> = (0..*length).map(|byte| (index * 64 + byte) as u8).collect();
                slice.copy_from(&content[..]);
                model.extend(content);
                list.push(slice).expect("room");
            }
            prop_assert_eq!(list.len(), model.len());
            list.advance(skip);
            model.drain(..skip.min(model.len()));
            list.truncate(keep);
            model.truncate(keep);
            prop_assert_eq!(list.len(), model.len());
            if let Some(last) = list.split_last_byte() {
                let mut byte = [0u8];
                last.copy_to(&mut byte[..]);
                prop_assert_eq!(Some(byte[0]), model.pop());
            } else {
                prop_assert!(model.is_empty());
            }
            let mut read = vec![0u8; model.len()];
            prop_assert!(list.read_front(&mut read));
            prop_assert_eq!(read, model);
            prop_assert!(list.is_empty());
            prop_assert!(!list.write_front(&[1]));
        }
    }

    #[test]
    fn the_list_is_bounded_and_stays_inside_memory() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        let mut list = SliceList::<1>::new();
        list.push_descriptor(&memory, &Descriptor::new(0, 16, 0, 0)).expect("inside");
        assert_eq!(list.push_descriptor(&memory, &Descriptor::new(0, 16, 0, 0)), Err(GatherError::TooMany));
        let mut list = SliceList::<4>::new();
        assert_eq!(list.push_descriptor(&memory, &Descriptor::new(0xff0, 32, 0, 0)), Err(GatherError::OutsideMemory));
        assert_eq!(list.push_descriptor(&memory, &Descriptor::new(u64::MAX, 2, 0, 0)), Err(GatherError::OutsideMemory));
    }
}
