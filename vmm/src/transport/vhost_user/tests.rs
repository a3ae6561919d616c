//! The back end driven by the library's own front end over a socket pair, with guest memory in a memfd.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{REFUSALS_MAX, serve};
use crate::devices::virtio::device::VirtioDevice;
use crate::devices::virtio::event_loop::LoopHandle;
use crate::devices::virtio::rng::Rng;
use crate::testing::{Buffer, DriverRing};

#[test]
fn a_front_end_starts_uses_stops_and_restarts_a_device() {
    let file = std::fs::File::from(memfd_create("test", MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(1 << 20).expect("size");
    let base = GuestAddress(0x10_0000);
    let memory = Arc::new(
        GuestMemoryMmap::<()>::from_ranges_with_files([(base, 1 << 20, Some(FileOffset::new(file, 0)))])
            .expect("memory"),
    );
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let event_loop = LoopHandle::start("test-vu").expect("loop");
    let served = serve(Box::new(Rng::new(event_loop.clone())), ours).expect("serve");
    let mut front_end = Frontend::from_stream(theirs, 1);

    front_end.set_owner().expect("owner");
    let features = front_end.get_features().expect("features");
    let offered = Rng::new(event_loop.clone()).device_features();
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    assert_eq!(features, offered | protocol);
    front_end.set_features(features).expect("features");
    front_end.get_protocol_features().expect("protocol features");
    front_end.set_protocol_features(VhostUserProtocolFeatures::REPLY_ACK).expect("protocol features");

    let region = memory.find_region(base).expect("region");
    let region_file = region.file_offset().expect("file");
    let table = [VhostUserMemoryRegionInfo {
        guest_phys_addr: base.0,
        memory_size: 1 << 20,
        userspace_addr: region.as_ptr() as u64,
        mmap_offset: 0,
        mmap_handle: region_file.file().as_raw_fd(),
    }];
    let to_user = |guest: u64| guest - base.0 + region.as_ptr() as u64;
    let mut ring = DriverRing::new(Arc::clone(&memory), base.0 + 0x1000, 64);
    let kick = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let call = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let mut position = 0u16;
    for round in 0..2 {
        front_end.set_mem_table(&table).expect("memory table");
        let queue = ring.queue(true);
        front_end.set_vring_num(0, 64).expect("size");
        front_end.set_vring_base(0, position).expect("base");
        let addresses = VringConfigData {
            queue_max_size: 64,
            queue_size: 64,
            flags: 0,
            desc_table_addr: to_user(virtio_queue::QueueT::desc_table(&queue)),
            used_ring_addr: to_user(virtio_queue::QueueT::used_ring(&queue)),
            avail_ring_addr: to_user(virtio_queue::QueueT::avail_ring(&queue)),
            log_addr: None,
        };
        front_end.set_vring_addr(0, &addresses).expect("addresses");
        front_end.set_vring_call(0, &call).expect("call");
        front_end.set_vring_kick(0, &kick).expect("kick");
        front_end.set_vring_enable(0, true).expect("enable");
        let head = ring.add(&[Buffer::writable(base.0 + 0x8000, 16)]);
        kick.write(1).expect("kick");
        assert_eq!(ring.wait_used(), (head, 16), "round {round}");
        // The used ring is written before the interrupt is sent. The driver's event index stays 0: it wants to hear of the first
        // buffer and of no other.
        let deadline = Instant::now() + Duration::from_secs(5);
        while round == 0 && call.read().is_err() {
            assert!(Instant::now() < deadline, "the driver was not interrupted");
        }
        position = u16::try_from(front_end.get_vring_base(0).expect("base")).expect("16 bits");
        assert_eq!(position, round + 1);
    }
    let mut bytes = [0u8; 16];
    memory.read_slice(&mut bytes, GuestAddress(base.0 + 0x8000)).expect("read");
    assert_ne!(bytes, [0; 16]);

    // Nonsense is refused or ignored; the back end goes on answering.
    let nonsense = VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: 0x10,
        used_ring_addr: 0x10,
        avail_ring_addr: 0x10,
        log_addr: None,
    };
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert!(front_end.set_vring_addr(0, &nonsense).is_err(), "an address outside of the memory table");
    assert!(front_end.set_vring_num(0, 3).is_err(), "no power of two");
    assert_eq!(front_end.get_features().expect("features"), features);
    drop(front_end);
    served.finish();
    event_loop.stop();
}

/// QEMU 7.2 says so several times for a network card before it says which features the two agree on.
#[test]
fn rings_that_are_enabled_before_anything_is_agreed_cost_the_device_nothing() {
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    let event_loop = LoopHandle::start("test-vu-early").expect("loop");
    let served = serve(Box::new(Rng::new(event_loop.clone())), ours).expect("serve");
    // SET_VRING_ENABLE, version 1, eight bytes: ring 0 is to be enabled. The library's own front end would not send it.
    let early: Vec<u8> = [18u32, 1, 8, 0, 1].into_iter().flat_map(u32::to_ne_bytes).collect();
    for _ in 0..2 * REFUSALS_MAX {
        theirs.write_all(&early).expect("sent");
    }
    let front_end = Frontend::from_stream(theirs, 1);
    front_end.set_owner().expect("owner");
    let offered = Rng::new(event_loop.clone()).device_features();
    assert_ne!(front_end.get_features().expect("the device answers") & offered, 0);
    drop(front_end);
    served.finish();
    event_loop.stop();
}
