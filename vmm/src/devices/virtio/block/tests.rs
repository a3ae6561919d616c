//! Disks driven through their ring in plain memory: content, bounds, holes, a full host, a shrinking file, garbage.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::storage::{Concatenation, DataList, SparseFile, Storage};
use super::{Block, BlockOptions};
use crate::devices::virtio::device::{Activation, DeviceMemory, VirtioDevice};
use crate::devices::virtio::event_loop::LoopHandle;
use crate::testing::{Buffer, CountingInterrupt, DriverRing, guest_memory};

const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10000;
const STATUS: u64 = 0x9000;

/// A disk, its driver and the loop between them.
struct Bench {
    memory: DeviceMemory,
    ring: DriverRing,
    device: Block,
    event_loop: LoopHandle,
}

impl Bench {
    fn new(storage: Box<dyn Storage>) -> Self {
        Self::with_options(storage, Duration::from_secs(60), None)
    }

    fn with_options(
        storage: Box<dyn Storage>,
        full_timeout: Duration,
        on_disk_full: Option<super::device::DiskFullObserver>,
    ) -> Self {
        let memory = guest_memory(1);
        let event_loop = LoopHandle::start("test-blk").expect("loop");
        let options = BlockOptions { serial: "upper".into(), full_timeout, on_disk_full };
        let mut device = Block::new(storage, options, event_loop.clone());
        let ring = DriverRing::new(Arc::clone(&memory), 0x1000, 64);
        device
            .activate(Activation {
                memory: Arc::clone(&memory),
                features: device.device_features(),
                queues: vec![ring.active_queue(0, true)],
                interrupt: Arc::new(CountingInterrupt::default()),
            })
            .expect("activate");
        Self { memory, ring, device, event_loop }
    }

    fn submit(&mut self, kind: u32, sector: u64, data: Option<Buffer>) {
        let mut header = [0u8; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(HEADER)).expect("header");
        self.memory.write_slice(&[0xff], GuestAddress(STATUS)).expect("status");
        let mut chain = vec![Buffer::readable(HEADER, 16)];
        chain.extend(data);
        chain.push(Buffer::writable(STATUS, 1));
        self.ring.add(&chain);
        self.ring.kick();
    }

    fn status(&self) -> u8 {
        self.memory.read_obj(GuestAddress(STATUS)).expect("status")
    }

    /// One request; the status byte and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: Option<Buffer>) -> (u8, u32) {
        self.submit(kind, sector, data);
        let (_, length) = self.ring.wait_used();
        (self.status(), length)
    }

    fn put(&self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).expect("data");
    }

    fn get(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(DATA)).expect("data");
        bytes
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.device.deactivate();
        self.event_loop.stop();
    }
}

/// An unlinked file with this content.
fn file_of(content: &[u8]) -> File {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("msb-blk-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).expect("file");
    std::fs::remove_file(&path).expect("unlink");
    file.write_all_at(content, 0).expect("content");
    file
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|index| (index as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn a_concatenation_reads_across_its_joints() {
    let parts = [pattern(4096, 1), pattern(8192, 2), pattern(4096, 3)];
    let whole: Vec<u8> = parts.concat();
    // The last file is longer than its share: the rest does not belong to the device.
    let last = [parts[2].clone(), vec![9; 4096]].concat();
    let files = vec![(file_of(&parts[0]), 4096), (file_of(&parts[1]), 8192), (file_of(&last), 4096)];
    let mut bench = Bench::new(Box::new(Concatenation::new(files)));
    let mut capacity = [0u8; 8];
    bench.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 32);
    assert_eq!(bench.request(0, 0, Some(Buffer::writable(DATA, 16384))), (0, 16385));
    assert_eq!(bench.get(16384), whole);
    assert_eq!(bench.request(0, 7, Some(Buffer::writable(DATA, 1024))), (0, 1025));
    assert_eq!(bench.get(1024), whole[3584..4608]);
    assert_eq!(bench.request(0, 31, Some(Buffer::writable(DATA, 1024))).0, 1, "past the end");
    assert_eq!(bench.request(0, u64::MAX, Some(Buffer::writable(DATA, 512))).0, 1);
    assert_eq!(bench.request(0, 0, Some(Buffer::writable(DATA, 100))).0, 1, "not whole sectors");
    assert_eq!(bench.request(1, 0, Some(Buffer::readable(DATA, 512))).0, 1, "read-only");
    assert_eq!(bench.request(11, 0, Some(Buffer::readable(DATA, 16))).0, 2, "discard is not offered");
    assert_eq!(bench.request(99, 0, None).0, 2, "unknown request");
}

#[test]
fn the_serial_is_what_the_disk_is_called() {
    let mut bench = Bench::new(Box::new(Concatenation::new(vec![(file_of(&[0; 4096]), 4096)])));
    assert_eq!(bench.request(8, 0, Some(Buffer::writable(DATA, 20))), (0, 21));
    assert_eq!(&bench.get(20), b"upper\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn writes_land_flush_and_holes_are_given_back() {
    let file = file_of(&vec![7; 1 << 20]);
    let watch = file.try_clone().expect("clone");
    let mut bench = Bench::new(Box::new(SparseFile::new(file).expect("storage")));
    let data = pattern(4096, 5);
    bench.put(&data);
    assert_eq!(bench.request(1, 8, Some(Buffer::readable(DATA, 4096))), (0, 1));
    assert_eq!(bench.request(4, 0, None), (0, 1));
    let mut seen = vec![0; 4096];
    watch.read_exact_at(&mut seen, 4096).expect("read");
    assert_eq!(seen, data);

    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes()[..], &flags.to_le_bytes()[..]].concat()
    };
    watch.sync_all().expect("sync");
    let before = watch.metadata().expect("metadata").blocks();
    bench.put(&range(1024, 1024, 0));
    assert_eq!(bench.request(11, 0, Some(Buffer::readable(DATA, 16))).0, 0);
    let after = watch.metadata().expect("metadata").blocks();
    assert!(after + 1000 <= before, "512 KiB were given back: {before} to {after}");
    assert_eq!(watch.metadata().expect("metadata").len(), 1 << 20, "the disk keeps its size");

    bench.put(&[range(0, 8, 1), range(16, 8, 0)].concat());
    assert_eq!(bench.request(13, 0, Some(Buffer::readable(DATA, 32))).0, 0);
    watch.read_exact_at(&mut seen, 0).expect("read");
    assert!(seen.iter().all(|byte| *byte == 0));
    watch.read_exact_at(&mut seen, 4096).expect("read");
    assert_eq!(seen, data, "what lies between is untouched");

    bench.put(&range(2048, 8, 0));
    assert_eq!(bench.request(11, 0, Some(Buffer::readable(DATA, 16))).0, 1, "outside of the disk");
    bench.put(&range(0, 8, 2));
    assert_eq!(bench.request(13, 0, Some(Buffer::readable(DATA, 16))).0, 2, "unknown flag");
    assert_eq!(bench.device.counters().discarded_bytes.get(), (1024 + 16) * 512);
}

#[test]
fn a_shrunk_file_is_an_io_error_and_the_disk_lives_on() {
    let file = file_of(&pattern(65536, 1));
    let watch = file.try_clone().expect("clone");
    let mut bench = Bench::new(Box::new(SparseFile::new(file).expect("storage")));
    watch.set_len(4096).expect("shrink");
    assert_eq!(bench.request(0, 64, Some(Buffer::writable(DATA, 4096))).0, 1);
    assert_eq!(bench.request(0, 0, Some(Buffer::writable(DATA, 4096))).0, 0);
}

/// A disk whose host has no room until told otherwise.
#[derive(Default)]
struct FullDisk {
    has_room: Arc<AtomicBool>,
}

impl Storage for FullDisk {
    fn len_bytes(&self) -> u64 {
        1 << 20
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(&self, _offset: u64, buffers: &mut DataList<'_>) -> io::Result<()> {
        buffers.advance(usize::MAX);
        Ok(())
    }
    fn write(&self, _offset: u64, buffers: &mut DataList<'_>) -> io::Result<()> {
        if !self.has_room.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        buffers.advance(usize::MAX);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_host_holds_writes_and_reads_go_on() {
    let has_room = Arc::new(AtomicBool::new(false));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let observer: super::device::DiskFullObserver = Arc::new(move |full| sink.lock().expect("lock").push(full));
    let disk = FullDisk { has_room: Arc::clone(&has_room) };
    let mut bench = Bench::with_options(Box::new(disk), Duration::from_secs(60), Some(observer));
    bench.submit(1, 0, Some(Buffer::readable(DATA, 512)));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.ring.take_used(), None, "the write waits");
    assert_eq!(bench.status(), 0xff);
    // A read through its own header passes the waiting write.
    bench.memory.write_slice(&[0; 16], GuestAddress(HEADER + 64)).expect("header");
    let read = bench.ring.add(&[
        Buffer::readable(HEADER + 64, 16),
        Buffer::writable(DATA, 512),
        Buffer::writable(STATUS + 64, 1),
    ]);
    bench.ring.kick();
    assert_eq!(bench.ring.wait_used(), (read, 513));
    has_room.store(true, Ordering::SeqCst);
    bench.ring.wait_used();
    assert_eq!(bench.status(), 0);
    assert_eq!(*seen.lock().expect("lock"), [true, false]);
}

#[test]
fn writes_fail_when_the_host_stays_full() {
    let disk = FullDisk::default();
    let mut bench = Bench::with_options(Box::new(disk), Duration::from_millis(10), None);
    assert_eq!(bench.request(1, 0, Some(Buffer::readable(DATA, 512))).0, 1);
    assert_eq!(bench.device.counters().errors.get(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]
    #[test]
    fn any_descriptors_are_answered(
        chains in prop::collection::vec(prop::collection::vec((0u64..0x110_000, 0u32..0x3000, 0u16..8), 1..6), 1..8),
        header in prop::collection::vec(any::<u8>(), 16),
        kind in prop::sample::select(vec![0u32, 1, 4, 8, 11, 13, 77]),
    ) {
        let mut bench = Bench::new(Box::new(SparseFile::new(file_of(&[1; 65536])).expect("storage")));
        // Most of memory looks like a header of the chosen kind, so that chains get past the parser.
        let mut page: Vec<u8> = header.iter().copied().cycle().take(4096).collect();
        for place in page.chunks_mut(16) {
            place[..4].copy_from_slice(&kind.to_le_bytes());
        }
        for address in (0x8000u64..0x100_000).step_by(4096) {
            bench.memory.write_slice(&page, GuestAddress(address)).expect("fill");
        }
        for chain in &chains {
            // Writes of the device into the ring itself would make the test's driver blind, not the device wrong.
            let chain: Vec<_> = chain.iter().map(|(address, length, flags)| (*address | 0x8000, *length, *flags)).collect();
            let head = bench.ring.add_raw(&chain);
            bench.ring.kick();
            prop_assert_eq!(bench.ring.wait_used().0, head);
        }
        prop_assert_eq!(bench.request(0, 0, Some(Buffer::writable(DATA, 512))), (0, 513));
    }
}
