//! The driver's side of a virtqueue in plain memory: what unit tests, property tests and fuzz targets drive devices with, no
//! hypervisor needed.
//!
//! Nothing in the product calls it. It may panic: its callers are tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::devices::virtio::device::{ActiveQueue, DeviceMemory, Interrupt};
use crate::devices::virtio::notifier::Notifier;
use crate::devices::virtio::ring::Ring;

/// VRING_DESC_F_NEXT.
const NEXT: u16 = 1;
/// VRING_DESC_F_WRITE.
const WRITE: u16 = 2;

/// Guest memory of `mib` MiB at address 0.
pub fn guest_memory(mib: usize) -> DeviceMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).expect("test memory"))
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    address: u64,
    length: u32,
    flags: u16,
}

impl Buffer {
    /// Memory the device reads.
    pub fn readable(address: u64, length: u32) -> Self {
        Self { address, length, flags: 0 }
    }

    /// Memory the device writes.
    pub fn writable(address: u64, length: u32) -> Self {
        Self { address, length, flags: WRITE }
    }
}

/// A split ring as its driver sees it.
pub struct DriverRing {
    memory: DeviceMemory,
    base: u64,
    size: u16,
    kick: Notifier,
    next_descriptor: u16,
    available_index: u16,
    used_seen: u16,
}

impl DriverRing {
    /// Lays a ring of `size` entries out at `base` (page aligned; needs 26 bytes per entry).
    pub fn new(memory: DeviceMemory, base: u64, size: u16) -> Self {
        let kick = Notifier::new().expect("eventfd");
        let mut ring = Self { memory, base, size, kick, next_descriptor: 0, available_index: 0, used_seen: 0 };
        ring.set_available_index(0);
        ring.memory.write_obj(0u32, GuestAddress(ring.used_address())).expect("ring memory");
        ring
    }

    fn available_address(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_address(&self) -> u64 {
        (self.available_address() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The queue as a transport would hand it to a device.
    pub fn queue(&self, event_index: bool) -> Queue {
        let mut queue = Queue::new(self.size).expect("size is a power of two");
        queue.try_set_desc_table_address(GuestAddress(self.base)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(self.available_address())).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(self.used_address())).expect("aligned");
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        queue
    }

    /// The queue with its kick, ready for `Activation`.
    pub fn active_queue(&self, index: u16, event_index: bool) -> ActiveQueue {
        ActiveQueue { index, queue: self.queue(event_index), kick: self.kick.try_clone().expect("eventfd") }
    }

    /// The device's ring on this memory.
    pub fn device_ring(&self, index: u16, interrupt: Arc<dyn Interrupt>, event_index: bool) -> Ring {
        Ring::new(self.active_queue(index, event_index), Arc::clone(&self.memory), interrupt)
    }

    /// Wakes the device.
    pub fn kick(&self) {
        self.kick.notify().expect("eventfd");
    }

    /// Makes a chain of `buffers` available; returns its head. Descriptors are reused round robin: the caller keeps fewer than
    /// `size` outstanding.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let raw: Vec<(u64, u32, u16)> =
            buffers.iter().map(|buffer| (buffer.address, buffer.length, buffer.flags)).collect();
        self.add_raw(&raw)
    }

    /// As [`DriverRing::add`] with flags of the caller's choice (NEXT is added where a successor exists).
    pub fn add_raw(&mut self, descriptors: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (position, (address, length, flags)) in descriptors.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let last = position + 1 == descriptors.len();
            let flags = if last { *flags } else { *flags | NEXT };
            self.write_descriptor(index, *address, *length, flags, self.next_descriptor);
        }
        self.publish(head);
        head
    }

    /// Writes one entry of the descriptor table, whatever it says.
    pub fn write_descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, length, flags, next));
        self.memory.write_obj(descriptor, GuestAddress(self.base + 16 * u64::from(index))).expect("descriptor table");
    }

    /// Puts `head` into the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available_index % self.size);
        self.memory.write_obj(head, GuestAddress(self.available_address() + 4 + 2 * slot)).expect("available ring");
        self.set_available_index(self.available_index.wrapping_add(1));
    }

    /// Sets the available index to anything.
    pub fn set_available_index(&mut self, index: u16) {
        self.available_index = index;
        std::sync::atomic::fence(Ordering::SeqCst);
        self.memory.write_obj(index, GuestAddress(self.available_address() + 2)).expect("available ring");
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// The next chain the device returned: head and written length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        std::sync::atomic::fence(Ordering::SeqCst);
        let index: u16 = self.memory.read_obj(GuestAddress(self.used_address() + 2)).expect("used ring");
        if index == self.used_seen {
            return None;
        }
        let slot = GuestAddress(self.used_address() + 4 + 8 * u64::from(self.used_seen % self.size));
        let entry: [u32; 2] = [
            self.memory.read_obj(slot).expect("used ring"),
            self.memory.read_obj(GuestAddress(slot.0 + 4)).expect("used ring"),
        ];
        self.used_seen = self.used_seen.wrapping_add(1);
        Some((u16::try_from(entry[0]).expect("a head fits u16"), entry[1]))
    }

    /// Waits until the device returns a chain.
    ///
    /// # Panics
    /// After five seconds: the device is stuck.
    pub fn wait_used(&mut self) -> (u16, u32) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(Instant::now() < deadline, "the device does not answer");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// An interrupt line that counts.
#[derive(Default)]
pub struct CountingInterrupt {
    queue: AtomicUsize,
    config: AtomicUsize,
}

impl CountingInterrupt {
    /// Queue interrupts so far.
    pub fn queue_signals(&self) -> usize {
        self.queue.load(Ordering::SeqCst)
    }

    /// Configuration interrupts so far.
    pub fn config_signals(&self) -> usize {
        self.config.load(Ordering::SeqCst)
    }
}

impl Interrupt for CountingInterrupt {
    fn signal_queue(&self, _queue_index: u16) {
        self.queue.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}
