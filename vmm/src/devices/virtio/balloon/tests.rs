//! The balloon driven through its rings in plain memory.

use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::Balloon;
use crate::devices::virtio::device::{Activation, DeviceMemory, VirtioDevice};
use crate::devices::virtio::event_loop::LoopHandle;
use crate::memory::GuestRam;
use crate::testing::{Buffer, CountingInterrupt, DriverRing};

/// A started balloon and the driver's ends of its rings; the feature is taken or not.
fn started(memory: &DeviceMemory, event_loop: &LoopHandle, reporting: bool) -> (Balloon, Vec<DriverRing>) {
    let mut device = Balloon::new(event_loop.clone());
    let features = if reporting { device.device_features() } else { device.device_features() & !(1 << 5) };
    device.acknowledge_features(features);
    let rings: Vec<DriverRing> =
        (0..3).map(|index| DriverRing::new(Arc::clone(memory), 0x1000 + index * 0x2000, 64)).collect();
    let queues = rings.iter().zip(0..).map(|(ring, index)| ring.active_queue(index, true)).collect();
    let interrupt = Arc::new(CountingInterrupt::default());
    device.activate(Activation { memory: Arc::clone(memory), features, queues, interrupt }).expect("activate");
    (device, rings)
}

#[test]
fn reported_ranges_go_back_to_the_host_and_nothing_else_does() {
    const MIB: u64 = 1 << 20;
    for reporting in [true, false] {
        let ram = GuestRam::private(64).expect("memory");
        let memory = Arc::new(ram.map().clone());
        let event_loop = LoopHandle::start("test-balloon").expect("loop");
        let (mut device, mut rings) = started(&memory, &event_loop, reporting);
        memory.write_slice(&vec![0xaa; 24 << 20], GuestAddress(8 * MIB)).expect("write");
        let before = ram.resident_bytes();
        let ranges = [Buffer::writable(8 * MIB, 4 << 20), Buffer::writable(16 * MIB, 8 << 20)];
        // What the driver would give to the balloon is not wanted, and a range outside of memory harms nobody.
        for (ring, buffers) in
            [(0, &ranges[..]), (1, &ranges[..]), (2, &[Buffer::writable(1 << 40, 4096)]), (2, &ranges[..])]
        {
            let head = rings[ring].add(buffers);
            rings[ring].kick();
            assert_eq!(rings[ring].wait_used(), (head, 0));
        }
        let given = before.saturating_sub(ram.resident_bytes());
        assert_eq!(given, if reporting { 12 * MIB } else { 0 });
        let at = |mib: u64| memory.read_obj::<u8>(GuestAddress(mib * MIB)).expect("read");
        assert_eq!((at(12), at(31)), (0xaa, 0xaa), "what was not reported stays");
        assert_eq!(at(9) == 0, reporting);
        assert_eq!(device.deactivate().len(), 3);
        event_loop.stop();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn any_descriptors_are_answered(
        queue in 0usize..3,
        descriptors in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..8), 1..6),
    ) {
        let memory = Arc::new(GuestRam::private(64).expect("memory").map().clone());
        let event_loop = LoopHandle::start("test-balloon").expect("loop");
        let (mut device, mut rings) = started(&memory, &event_loop, true);
        let head = rings[queue].add_raw(&descriptors);
        rings[queue].kick();
        prop_assert_eq!(rings[queue].wait_used().0, head);
        device.deactivate();
        event_loop.stop();
    }
}
