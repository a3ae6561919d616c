//! Any packets and any descriptors on the transmit ring of the vsock device: each chain is used, nothing panics or spins.
#![no_main]

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use msb_vmm::devices::virtio::device::{Activation, VirtioDevice};
use msb_vmm::devices::virtio::event_loop::LoopHandle;
use msb_vmm::devices::virtio::vsock::{GuestPort, Vsock, VsockOptions};
use msb_vmm::testing::{Buffer, CountingInterrupt, DriverRing, guest_memory};
use vm_memory::{Bytes as _, GuestAddress};

/// Where packets are put.
const OUT: u64 = 0x40_0000;
/// Where receive buffers are.
const IN: u64 = 0x10_0000;

fuzz_target!(|packets: Vec<(Vec<u8>, u16, bool)>| {
    let dir = tempfile::tempdir().expect("directory");
    let listener = UnixListener::bind(dir.path().join("v")).expect("bind");
    let (link, device_end) = UnixStream::pair().expect("pair");
    let event_loop = LoopHandle::start("fuzz-vsock").expect("loop");
    let options = VsockOptions { guest_cid: 3, listener, guest_ports: vec![GuestPort { port: 1025, stream: device_end }], has_strangers: false, on_stop: None };
    let mut device = Vsock::new(options, event_loop.clone()).expect("device");
    let memory = guest_memory(8);
    let mut receive = DriverRing::new(Arc::clone(&memory), 0x1000, 64);
    let mut transmit = DriverRing::new(Arc::clone(&memory), 0x4000, 64);
    let activation = Activation {
        memory: Arc::clone(&memory),
        features: device.device_features(),
        queues: vec![receive.active_queue(0, true), transmit.active_queue(1, true)],
        interrupt: Arc::new(CountingInterrupt::default()),
    };
    device.activate(activation).expect("activate");
    for index in 0..32 {
        receive.add(&[Buffer::writable(IN + index * 0x2000, 4096)]);
    }
    receive.kick();
    for (bytes, split, honest) in packets.iter().take(16) {
        let mut packet = bytes.clone();
        packet.truncate(8192);
        if *honest && packet.len() >= 44 {
            // From the guest to the host, a stream, and as long as it says: past the first checks.
            packet[..8].copy_from_slice(&3u64.to_le_bytes());
            packet[8..16].copy_from_slice(&2u64.to_le_bytes());
            let length = u32::try_from(packet.len() - 44).expect("small");
            packet[24..28].copy_from_slice(&length.to_le_bytes());
            packet[28..30].copy_from_slice(&1u16.to_le_bytes());
            let operation = u16::from(packet[30]) % 9;
            packet[30..32].copy_from_slice(&operation.to_le_bytes());
        }
        memory.write_slice(&packet, GuestAddress(OUT)).expect("packet");
        let length = u32::try_from(packet.len()).expect("small");
        let first = u32::from(*split).min(length);
        let chain = [Buffer::readable(OUT, first), Buffer::readable(OUT + u64::from(first), length - first)];
        let head = transmit.add(&chain);
        transmit.kick();
        assert_eq!(transmit.wait_used().0, head);
        while receive.take_used().is_some() {}
    }
    device.deactivate();
    event_loop.stop();
    drop(link);
});
