//! The entropy source driven through its ring in plain memory.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::Rng;
use crate::devices::virtio::device::{Activation, VirtioDevice};
use crate::devices::virtio::event_loop::LoopHandle;
use crate::testing::{Buffer, CountingInterrupt, DriverRing, guest_memory};

#[test]
fn buffers_are_filled_and_the_device_can_be_restarted() {
    let memory = guest_memory(1);
    let event_loop = LoopHandle::start("test-rng").expect("loop");
    let mut device = Rng::new(event_loop.clone());
    for _ in 0..2 {
        let mut ring = DriverRing::new(Arc::clone(&memory), 0x1000, 64);
        let interrupt = Arc::new(CountingInterrupt::default());
        device
            .activate(Activation {
                memory: Arc::clone(&memory),
                features: device.device_features(),
                queues: vec![ring.active_queue(0, true)],
                interrupt: interrupt.clone(),
            })
            .expect("activate");
        memory.write_slice(&[0; 64], GuestAddress(0x8000)).expect("clear");
        let head = ring.add(&[Buffer::writable(0x8000, 32), Buffer::writable(0x8020, 32)]);
        ring.kick();
        assert_eq!(ring.wait_used(), (head, 64));
        let mut bytes = [0u8; 64];
        memory.read_slice(&mut bytes, GuestAddress(0x8000)).expect("read");
        assert!(bytes.iter().filter(|byte| **byte == 0).count() < 16, "64 random bytes are not mostly zero");
        let queues = device.deactivate();
        assert_eq!(queues.len(), 1);
        assert_eq!(virtio_queue::QueueT::next_avail(&queues[0]), 1);
    }
    event_loop.stop();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_descriptors_are_answered(descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..8), 1..6)) {
        let memory = guest_memory(1);
        let event_loop = LoopHandle::start("test-rng").expect("loop");
        let mut device = Rng::new(event_loop.clone());
        let mut ring = DriverRing::new(Arc::clone(&memory), 0x1000, 64);
        device.activate(Activation {
            memory: Arc::clone(&memory),
            features: device.device_features(),
            queues: vec![ring.active_queue(0, true)],
            interrupt: Arc::new(CountingInterrupt::default()),
        }).expect("activate");
        let head = ring.add_raw(&descriptors);
        ring.kick();
        prop_assert_eq!(ring.wait_used().0, head);
        let head = ring.add(&[Buffer::writable(0x8000, 8)]);
        ring.kick();
        prop_assert_eq!(ring.wait_used(), (head, 8));
        device.deactivate();
        event_loop.stop();
    }
}
