//! The map of physical memory that the kernel is told (e820 and PVH share its types).
//!
//! Built from the guest's size alone; written into guest memory by `boot_data`.

use super::layout::{HIGH_MEMORY_START, KERNEL_START, LOW_MEMORY_END, MP_TABLE_ADDRESS, MP_TABLE_END};

/// Usable memory, in e820 and in PVH's memory map alike.
pub const TYPE_RAM: u32 = 1;
/// Memory the kernel must leave alone.
pub const TYPE_RESERVED: u32 = 2;

/// One line of the map.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MapEntry {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// [`TYPE_RAM`] or [`TYPE_RESERVED`].
    pub kind: u32,
}

/// The map of a guest of `size_bytes` (at least 64 MiB, checked by `memory`): ordered, without overlaps.
pub fn entries(size_bytes: u64) -> Vec<MapEntry> {
    let low_end = size_bytes.min(LOW_MEMORY_END);
    let mut entries = vec![
        MapEntry { start: 0, length: MP_TABLE_ADDRESS, kind: TYPE_RAM },
        MapEntry { start: MP_TABLE_ADDRESS, length: MP_TABLE_END - MP_TABLE_ADDRESS, kind: TYPE_RESERVED },
        MapEntry { start: KERNEL_START, length: low_end - KERNEL_START, kind: TYPE_RAM },
    ];
    if size_bytes > low_end {
        entries.push(MapEntry { start: HIGH_MEMORY_START, length: size_bytes - low_end, kind: TYPE_RAM });
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::ranges;

    #[test]
    fn the_map_is_ordered_and_covers_only_real_memory() {
        for size_mib in [64u64, 128, 3072, 3073, 4096, 65_536] {
            let size = size_mib << 20;
            let entries = entries(size);
            for pair in entries.windows(2) {
                assert!(pair[0].start + pair[0].length <= pair[1].start, "{size_mib} MiB: {pair:?}");
            }
            for entry in entries.iter().filter(|entry| entry.kind == TYPE_RAM) {
                let inside = |&(start, length): &(u64, u64)| {
                    entry.start >= start && entry.start + entry.length <= start + length
                };
                assert!(ranges(size).iter().any(inside), "{size_mib} MiB: {entry:?}");
            }
            let last = entries.last().unwrap();
            let (start, length) = *ranges(size).last().unwrap();
            assert_eq!(last.start + last.length, start + length, "all memory is announced");
        }
    }
}
