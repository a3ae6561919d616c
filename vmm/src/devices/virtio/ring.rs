//! One split ring as a worker uses it: take chains, give them back, signal when the driver asked for it (VIRTIO 1.2, 2.7).
//!
//! Wraps `virtio_queue::Queue` with the two things every worker must get right: a ring whose indices make no sense is *broken* and
//! is left alone until the driver resets the device (a guest must not make us spin on it), and notifications are suppressed while
//! a batch is worked on.

use std::num::Wrapping;
use std::sync::Arc;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::device::{ActiveQueue, DeviceMemory, Interrupt};
use super::notifier::Notifier;
use crate::transport::mmio::saved::SavedQueue;

/// A chain of guest buffers; keeps guest memory alive by itself.
pub type Chain = DescriptorChain<DeviceMemory>;

/// Flags and index before the elements of either ring.
const USED_HEADER_BYTES: u64 = 4;
const AVAILABLE_HEADER_BYTES: u64 = 4;
/// One element of the used ring.
const USED_ELEMENT_BYTES: u64 = 8;

/// A ring in use by a worker.
pub struct Ring {
    queue: Queue,
    index: u16,
    kick: Notifier,
    memory: DeviceMemory,
    interrupt: Arc<dyn Interrupt>,
    used_since_signal: bool,
    /// Where the used index stood before the first batch since the last signal.
    batches_from: Option<u16>,
    broken: bool,
}

impl Ring {
    /// Takes over an activated queue.
    pub fn new(active: ActiveQueue, memory: DeviceMemory, interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            queue: active.queue,
            index: active.index,
            kick: active.kick,
            memory,
            interrupt,
            used_since_signal: false,
            batches_from: None,
            broken: false,
        }
    }

    /// The eventfd the driver kicks; workers poll it and also kick themselves to yield between batches.
    pub fn kick(&self) -> &Notifier {
        &self.kick
    }

    /// The ring's number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The ring's size: the most chains that can be outstanding, and the batch size after which workers yield.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next available chain, if there is one.
    pub fn pop(&mut self) -> Option<Chain> {
        if self.broken {
            return None;
        }
        match self.queue.iter(Arc::clone(&self.memory)) {
            Ok(mut available) => available.next(),
            Err(error) => {
                self.break_down(&error);
                None
            }
        }
    }

    /// Gives the last `count` popped chains back to the available side, as if never taken.
    pub fn undo_pop(&mut self, count: u16) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Returns a chain to the driver with `length` bytes written into it.
    pub fn push_used(&mut self, head: u16, length: u32) {
        if self.broken {
            return;
        }
        match self.queue.add_used(&*self.memory, head, length) {
            Ok(()) => self.used_since_signal = true,
            // A head outside of the ring: the driver's available ring is nonsense.
            Err(error) => self.break_down(&error),
        }
    }

    /// Returns several chains at once, each with the bytes written into it: the driver sees all of them or none. What is spread over
    /// several buffers (VIRTIO_NET_F_MRG_RXBUF) needs that: a driver that saw the first alone would take the rest for lost.
    pub fn push_used_together(&mut self, chains: &[(u16, u32)]) {
        let Some(((last_head, last_length), before)) = chains.split_last() else { return };
        if self.broken {
            return;
        }
        let first = self.queue.next_used();
        self.batches_from.get_or_insert(first);
        let size = self.queue.size();
        let mut next = Wrapping(first);
        for (head, length) in before {
            if *head >= size {
                return self.break_down(&virtio_queue::Error::InvalidDescriptorIndex);
            }
            let slot = self.queue.used_ring() + USED_HEADER_BYTES + USED_ELEMENT_BYTES * u64::from(next.0 % size);
            // Its head, then its length, both little-endian words.
            let element = (u64::from(*length) << 32 | u64::from(*head)).to_le();
            if self.memory.write_obj(element, GuestAddress(slot)).is_err() {
                return self.break_down(&virtio_queue::Error::AddressOverflow);
            }
            next += 1;
        }
        // The last one publishes the index, and with it the others.
        self.queue.set_next_used(next.0);
        self.push_used(*last_head, *last_length);
    }

    /// Tells the driver not to kick while a batch is worked on.
    pub fn suppress_kicks(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(&*self.memory)
        {
            self.break_down(&error);
        }
    }

    /// Asks for kicks again; true when chains arrived meanwhile and the caller must look once more.
    pub fn request_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(error) => {
                self.break_down(&error);
                false
            }
        }
    }

    /// Asks for a kick at the next buffer that the driver adds, whatever lies in the ring already. For a driver that stands.
    pub fn request_next_kick(&mut self) {
        self.request_kicks();
        if self.broken || !self.queue.event_idx_enabled() {
            return;
        }
        // Behind the used ring (VIRTIO 1.2, 2.7.10): the index at which the driver kicks.
        let offset = USED_HEADER_BYTES + USED_ELEMENT_BYTES * u64::from(self.queue.size());
        let next = self.memory.read_obj::<u16>(GuestAddress(self.queue.avail_ring() + 2));
        if let Ok(next) = next {
            // The ring was found valid: its end lies in memory.
            let _ = self.memory.write_obj(next, GuestAddress(self.queue.used_ring() + offset));
        }
    }

    /// Interrupts the driver if chains were returned since the last call and it wants to know.
    pub fn signal(&mut self) {
        if !self.used_since_signal || self.broken {
            return;
        }
        self.used_since_signal = false;
        let batches_from = self.batches_from.take();
        match self.queue.needs_notification(&*self.memory) {
            Ok(needed) if needed || batches_from.is_some_and(|from| self.passed_event_index(from)) => {
                self.interrupt.signal_queue(self.index);
            }
            Ok(_) => {}
            Err(error) => self.break_down(&error),
        }
    }

    /// Whether the index that the driver wants to hear of lies in what was used since `from` (VIRTIO 1.2, 2.7.10): the queue itself does
    /// not know of batches.
    fn passed_event_index(&self, from: u16) -> bool {
        if !self.queue.event_idx_enabled() {
            return false;
        }
        // After the barrier of `needs_notification`.
        let address = self.queue.avail_ring() + AVAILABLE_HEADER_BYTES + 2 * u64::from(self.queue.size());
        let Ok(event) = self.memory.read_obj::<u16>(GuestAddress(address)) else { return false };
        let (new, event) = (Wrapping(self.queue.next_used()), Wrapping(u16::from_le(event)));
        new - event - Wrapping(1) < new - Wrapping(from)
    }

    /// Whether the ring was given up.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Where the ring is, for a machine that is saved; the last `held` popped chains count as not taken.
    pub fn position(&self, held: u16) -> SavedQueue {
        SavedQueue::of(self.index, &self.queue, held)
    }

    /// The queue with its position, for the transport.
    pub fn into_queue(self) -> Queue {
        self.queue
    }

    fn break_down(&mut self, error: &virtio_queue::Error) {
        // Logged once per activation, so a guest cannot fill the log with it.
        if !self.broken {
            tracing::warn!(ring = self.index, %error, "guest broke a virtqueue, it is ignored until the device is reset");
        }
        self.broken = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buffer, CountingInterrupt, DriverRing, guest_memory};

    #[test]
    fn chains_travel_and_interrupts_follow_the_drivers_wish() {
        let memory = guest_memory(1);
        let interrupt = Arc::new(CountingInterrupt::default());
        let mut driver = DriverRing::new(Arc::clone(&memory), 0x1000, 8);
        let mut ring = driver.device_ring(0, Arc::clone(&interrupt) as Arc<dyn Interrupt>, true);
        assert!(ring.pop().is_none());
        let head = driver.add(&[Buffer::readable(0x8000, 4), Buffer::writable(0x9000, 4)]);
        let chain = ring.pop().expect("a chain");
        assert_eq!(chain.head_index(), head);
        assert_eq!(chain.count(), 2);
        ring.undo_pop(1);
        assert_eq!(ring.pop().expect("the same chain").head_index(), head);
        ring.push_used(head, 4);
        ring.signal();
        ring.signal();
        assert_eq!(interrupt.queue_signals(), 1);
        assert_eq!(driver.take_used(), Some((head, 4)));
    }

    #[test]
    fn a_batch_is_seen_as_a_whole_and_signalled_once() {
        let memory = guest_memory(1);
        let interrupt = Arc::new(CountingInterrupt::default());
        let mut driver = DriverRing::new(Arc::clone(&memory), 0x1000, 8);
        let mut ring = driver.device_ring(0, Arc::clone(&interrupt) as Arc<dyn Interrupt>, true);
        for round in 0..5u32 {
            let heads: Vec<u16> = (0..3).map(|_| driver.add(&[Buffer::writable(0x8000, 4)])).collect();
            for head in &heads {
                assert_eq!(ring.pop().expect("a chain").head_index(), *head);
            }
            assert_eq!(driver.take_used(), None);
            ring.push_used_together(&[(heads[0], 4), (heads[1], 3), (heads[2], round)]);
            assert_eq!(driver.take_used(), Some((heads[0], 4)));
            assert_eq!(driver.take_used(), Some((heads[1], 3)));
            assert_eq!(driver.take_used(), Some((heads[2], round)));
            ring.signal();
            // The driver's event index stays 0: it wants to hear of the very first buffer, which was in the middle of no later batch.
            assert_eq!(interrupt.queue_signals(), 1, "round {round}");
        }
        ring.push_used_together(&[(99, 0), (0, 0)]);
        assert!(ring.is_broken());
    }

    #[test]
    fn a_nonsense_available_index_breaks_the_ring_for_good() {
        let memory = guest_memory(1);
        let interrupt = Arc::new(CountingInterrupt::default());
        let mut driver = DriverRing::new(Arc::clone(&memory), 0x1000, 8);
        let mut ring = driver.device_ring(0, interrupt, true);
        driver.set_available_index(1000);
        assert!(ring.pop().is_none());
        assert!(ring.is_broken());
        assert!(!ring.request_kicks(), "a broken ring never asks its worker to look again");
    }
}
