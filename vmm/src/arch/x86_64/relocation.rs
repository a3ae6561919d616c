//! Moves a kernel in guest memory to another virtual address, as the unpacker in front of a bzImage does for KASLR.
//!
//! A vmlinux has no unpacker; what that reads is put into it as a section, [`SECTION`], when the kernel is built (docs/kernel.md). The
//! section is the file `arch/x86/boot/compressed/vmlinux.relocs` of the kernel's build, made by `arch/x86/tools/relocs.c`: 32-bit words,
//! each the place of one address in the kernel's code or data, as a sign-extended virtual address, in blocks that a zero opens: places
//! of 64-bit addresses; places of 32-bit ones that grow smaller when the kernel moves up (those of data for each processor; kernels
//! from 6.15 on have not this block); places of 32-bit ones. Called by `kernel`; what it is given is the user's file, so every place
//! is checked. It never chooses where to.

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemory, VolatileSlice};

/// Name of the section.
pub const SECTION: &[u8] = b".vmlinux.relocs";
/// Longest section, in bytes: a distribution's whole kernel has 3 MiB.
pub const SECTION_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a word.
const WORD_BYTES: usize = 4;
/// Where Linux maps its image: physical address 0 of a kernel that has not been moved (`__START_KERNEL_map`,
/// arch/x86/include/asm/page_64_types.h), as the low half that the table has of it.
const MAP_START: u32 = 0x8000_0000;
/// Room for the image from there on (`KERNEL_IMAGE_SIZE` of a kernel with KASLR); modules come after it.
pub const IMAGE_ROOM: u64 = 1 << 30;
/// What a kernel moves by (`MIN_KERNEL_ALIGN`: its first page table is of pages this large).
pub const STEP: u64 = 2 << 20;

/// Why a table was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RelocationError {
    /// Not words, or not blocks.
    #[error(".vmlinux.relocs is not a table of relocations: {0}")]
    NotATable(&'static str),
    /// A place that is not in the image.
    #[error(".vmlinux.relocs names {0:#x}, which lies outside the kernel")]
    Outside(u32),
}

/// Adds `shift` to every address that `table` names in `image`, whose first byte was linked to lie at physical address `linked_start`.
///
/// # Errors
/// The table is none, or names a place outside `image`; addresses before it are changed then.
pub fn apply<B: BitmapSlice>(
    table: &[u8],
    image: &VolatileSlice<'_, B>,
    linked_start: u64,
    shift: u64,
) -> Result<(), RelocationError> {
    let (words, rest) = table.as_chunks::<WORD_BYTES>();
    if !rest.is_empty() {
        return Err(RelocationError::NotATable("not a multiple of four bytes"));
    }
    let words = || words.iter().map(|word| u32::from_le_bytes(*word));
    let blocks = words().filter(|word| *word == 0).count();
    if !matches!(blocks, 2 | 3) || words().next() != Some(0) {
        return Err(RelocationError::NotATable("not two or three blocks, each after a zero"));
    }
    let mut block = 0;
    // The table's words are 32 bits wide, and so are all but the first block's addresses.
    let shift_32 = shift as u32;
    for word in words() {
        if word == 0 {
            block += 1;
            continue;
        }
        let place = u64::from(word.wrapping_sub(MAP_START)).wrapping_sub(linked_start);
        let outside = |_| RelocationError::Outside(word);
        let place = usize::try_from(place).map_err(|_| RelocationError::Outside(word))?;
        if block == 1 {
            let address = image.get_ref::<u64>(place).map_err(outside)?;
            address.store(address.load().wrapping_add(shift));
        } else {
            let address = image.get_ref::<u32>(place).map_err(outside)?;
            let moved = if block == blocks {
                address.load().wrapping_add(shift_32)
            } else {
                address.load().wrapping_sub(shift_32)
            };
            address.store(moved);
        }
    }
    Ok(())
}

/// How far something that ends at `end` moves up without passing `limit`, in bytes: any number of steps, as `random` has it.
pub fn choose(end: u64, limit: u64, random: u32) -> u64 {
    let places = limit.saturating_sub(end) / STEP + 1;
    // As even as the lots are many more than the places.
    u64::from(random) % places * STEP
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Where the image of these tests was linked to.
    const LINKED: u64 = 0x100_0000;

    fn table(blocks: &[&[u32]]) -> Vec<u8> {
        blocks.iter().flat_map(|block| std::iter::once(&0).chain(*block)).flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Applies `table` to 64 bytes of ones, in words of 32 bits.
    fn applied(table: &[u8], shift: u64) -> Result<Vec<u32>, RelocationError> {
        let mut bytes = [1u8; 64];
        apply(table, &VolatileSlice::from(&mut bytes[..]), LINKED, shift)?;
        Ok(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect())
    }

    #[test]
    fn each_block_moves_its_addresses_its_way() {
        let at = |place: u32| 0x8100_0000 + place;
        let moved = applied(&table(&[&[at(0), at(56)], &[at(16)], &[at(24), at(60 - 8)]]), 0x20_0000).unwrap();
        let mut expected = vec![0x0101_0101; 16];
        (expected[0], expected[14]) = (0x0121_0101, 0x0121_0101);
        expected[4] = 0x00e1_0101;
        (expected[6], expected[13]) = (0x0121_0101, 0x0121_0101);
        assert_eq!(moved, expected);
        let newer = applied(&table(&[&[], &[at(8)]]), 0x20_0000).unwrap();
        assert_eq!(newer[2], 0x0121_0101, "without the block of what grows smaller");
        let far = applied(&table(&[&[at(0)], &[], &[]]), 1 << 32).unwrap();
        assert_eq!(far[..2], [0x0101_0101, 0x0101_0102], "64-bit addresses carry");
    }

    #[test]
    fn places_outside_and_what_is_no_table_are_refused() {
        let refused = |place: u32| applied(&table(&[&[], &[], &[place]]), 1);
        assert!(applied(&table(&[&[], &[], &[0x8100_003c]]), 1).is_ok());
        for place in [0x8100_003d, 0x80ff_ffff, 1, 0x7fff_ffff, u32::MAX] {
            assert_eq!(refused(place), Err(RelocationError::Outside(place)));
        }
        assert_eq!(applied(&table(&[&[0x8100_0039], &[]]), 1), Err(RelocationError::Outside(0x8100_0039)));
        for bad in [&[][..], &[0; 3], &[0; 4], &[0; 16], &[1, 0, 0, 0, 0, 0, 0, 0]] {
            assert!(matches!(applied(bad, 1), Err(RelocationError::NotATable(_))), "{bad:?}");
        }
    }

    #[test]
    fn every_place_that_has_room_is_chosen_and_no_other() {
        let chosen = |end, random| choose(end, 0x200_0000, random);
        assert_eq!((chosen(0x200_0000, 7), chosen(0x300_0000, 7)), (0, 0), "no room");
        let places: std::collections::BTreeSet<u64> = (0..100).map(|random| chosen(0x1a0_0000 - 1, random)).collect();
        assert_eq!(places, [0, STEP, 2 * STEP, 3 * STEP].into());
    }

    proptest! {
        #[test]
        fn no_table_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), shift in any::<u64>()) {
            let _ = applied(&bytes, shift);
        }

        #[test]
        fn back_again_is_as_before(places in proptest::collection::vec(0u32..7, 0..20), shift in any::<u64>()) {
            let places: Vec<u32> = places.iter().map(|place| 0x8100_0000 + place * 8).collect();
            let table = table(&[&places, &places, &places]);
            let mut bytes = [3u8; 64];
            let image = VolatileSlice::from(&mut bytes[..]);
            apply(&table, &image, LINKED, shift).unwrap();
            apply(&table, &image, LINKED, shift.wrapping_neg()).unwrap();
            prop_assert_eq!(bytes, [3; 64]);
        }
    }
}
