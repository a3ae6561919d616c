//! Layout around the hole, alignment, laziness and giving pages back, for both backings.

use vm_memory::{Address, Bytes};

use super::*;

#[test]
fn sizes_outside_the_range_are_refused() {
    for mib in [0, 1, MEMORY_MIN_MIB - 1, MEMORY_MAX_MIB + 1, u64::MAX] {
        assert!(matches!(GuestRam::private(mib), Err(MemoryError::SizeOutOfRange(refused)) if refused == mib));
    }
}

#[test]
fn memory_continues_above_the_hole() {
    assert_eq!(ranges(64 << 20), [(0, 64 << 20)]);
    assert_eq!(ranges(LOW_MEMORY_END), [(0, LOW_MEMORY_END)]);
    assert_eq!(ranges(4 << 30), [(0, LOW_MEMORY_END), (HIGH_MEMORY_START, (4 << 30) - LOW_MEMORY_END)]);
    for ram in [GuestRam::private(4096).unwrap(), GuestRam::shared(4096).unwrap()] {
        ram.map().write_obj(7u8, GuestAddress(LOW_MEMORY_END - 1)).unwrap();
        ram.map().write_obj(8u8, GuestAddress(HIGH_MEMORY_START)).unwrap();
        assert!(ram.map().write_obj(9u8, GuestAddress(LOW_MEMORY_END)).is_err());
        assert!(ram.map().write_obj(9u8, GuestAddress(HIGH_MEMORY_START - 1)).is_err());
        assert_eq!(ram.map().read_obj::<u8>(GuestAddress(LOW_MEMORY_END - 1)).unwrap(), 7);
        assert_eq!(ram.map().read_obj::<u8>(GuestAddress(HIGH_MEMORY_START)).unwrap(), 8);
    }
}

#[test]
fn the_largest_guest_costs_nothing_until_touched() {
    let ram = GuestRam::private(MEMORY_MAX_MIB).unwrap();
    assert_eq!(ram.size_bytes(), 64 << 30);
    let last = ram.map().last_addr();
    assert_eq!(last.0, HIGH_MEMORY_START + (64 << 30) - LOW_MEMORY_END - 1);
    let small = GuestRam::private(64).unwrap();
    assert_eq!(small.resident_bytes(), 0);
}

#[test]
fn host_and_guest_agree_modulo_a_huge_page() {
    for ram in [GuestRam::private(4096).unwrap(), GuestRam::shared(4096).unwrap()] {
        for region in ram.map().iter() {
            assert_eq!(region.as_ptr().addr() % HUGE_PAGE_SIZE, region.start_addr().0 as usize % HUGE_PAGE_SIZE);
        }
    }
}

#[test]
fn reclaim_frees_whole_pages_only_and_they_read_as_zero() {
    for ram in [GuestRam::private(64).unwrap(), GuestRam::shared(64).unwrap()] {
        let map = ram.map();
        map.write_slice(&vec![0xaa; 8 << 20], GuestAddress(0)).unwrap();
        assert!(ram.resident_bytes() >= 8 << 20, "{:?}", ram.backing());
        // From inside the first page to inside the fourth: pages 1 and 2 go.
        assert_eq!(reclaim(ram.map(), GuestAddress(100), 3 * 4096).unwrap(), 2 * 4096);
        assert_eq!(map.read_obj::<u8>(GuestAddress(4095)).unwrap(), 0xaa);
        assert_eq!(map.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
        assert_eq!(map.read_obj::<u8>(GuestAddress(3 * 4096 - 1)).unwrap(), 0);
        assert_eq!(map.read_obj::<u8>(GuestAddress(3 * 4096)).unwrap(), 0xaa);
        assert_eq!(reclaim(ram.map(), GuestAddress(1), 4094).unwrap(), 0);
        assert_eq!(reclaim(ram.map(), GuestAddress(0), 64 << 20).unwrap(), 64 << 20);
        assert!(ram.resident_bytes() < 1 << 20, "{:?}", ram.backing());
    }
}

#[test]
fn reclaim_refuses_what_is_not_memory() {
    let ram = GuestRam::private(4096).unwrap();
    for (address, length) in [
        (LOW_MEMORY_END, 4096),
        (LOW_MEMORY_END - 4096, 8192),
        (ram.map().last_addr().unchecked_add(1).0, 4096),
        (0, u64::MAX),
        (u64::MAX, 4096),
        (4096, u64::MAX - 4095),
    ] {
        assert!(
            matches!(reclaim(ram.map(), GuestAddress(address), length), Err(MemoryError::NotMemory { .. })),
            "{address:#x}+{length:#x}"
        );
    }
}
