//! The network card driven through its rings in plain memory: a question of the guest is answered, over several buffers if they are small.

use std::sync::Arc;

use msb_protocol::network::{NetworkSpec, VmNetwork};
use vm_memory::{Bytes, GuestAddress};

use super::receive::HEADER_BYTES;
use super::{Net, NetOptions};
use crate::devices::virtio::device::{Activation, VirtioDevice};
use crate::devices::virtio::event_loop::LoopHandle;
use crate::testing::{Buffer, CountingInterrupt, DriverRing, guest_memory};

#[test]
fn an_arp_request_is_answered_into_as_many_buffers_as_it_takes() {
    let spec = NetworkSpec::default();
    let link = spec.addresses();
    let network = VmNetwork { addresses: link, nameservers: Vec::new(), host_addresses: Vec::new(), spec };
    let event_loop = LoopHandle::start("test-net").expect("loop");
    let options = NetOptions { network, listeners: Vec::new(), on_decision: Arc::new(|_| {}) };
    let mut device = Net::new(options, event_loop.clone()).expect("device");
    let memory = guest_memory(4);
    let mut receive = DriverRing::new(Arc::clone(&memory), 0x1000, 256);
    let mut transmit = DriverRing::new(Arc::clone(&memory), 0x4000, 256);
    // 250 buffers of 1 KiB hold a frame of full length; the first two are too small for the answer.
    let small = [receive.add(&[Buffer::writable(0x8000, 30)]), receive.add(&[Buffer::writable(0x8100, 100)])];
    for index in 0..250u64 {
        receive.add(&[Buffer::writable(0x10_0000 + index * 1024, 1024)]);
    }
    let mut frame = vec![0u8; HEADER_BYTES];
    frame.extend([0xff; 6]);
    frame.extend(link.guest_mac.0);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(link.guest_mac.0);
    frame.extend(link.guest_ipv4.octets());
    frame.extend([0; 6]);
    frame.extend(link.gateway_ipv4.octets());
    memory.write_slice(&frame, GuestAddress(0x9000)).expect("frame");
    let head = transmit.add(&[Buffer::readable(0x9000, u32::try_from(frame.len()).expect("short"))]);
    device
        .activate(Activation {
            memory: Arc::clone(&memory),
            features: device.device_features(),
            queues: vec![receive.active_queue(0, true), transmit.active_queue(1, true)],
            interrupt: Arc::new(CountingInterrupt::default()),
        })
        .expect("activate");
    assert_eq!(transmit.wait_used(), (head, 0));
    assert_eq!(receive.wait_used(), (small[0], 30));
    assert_eq!(receive.take_used().map(|(head, _)| head), Some(small[1]));
    let mut header = [0u8; HEADER_BYTES];
    memory.read_slice(&mut header, GuestAddress(0x8000)).expect("header");
    assert_eq!((header[0], header[10]), (2, 2), "checksums are good, and there are two buffers");
    assert_eq!(device.deactivate().len(), 2);
    event_loop.stop();
}
