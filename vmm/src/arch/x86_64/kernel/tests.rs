//! Good kernels load where they say; every way of being bad has its own error.

use std::io::Write;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;

const LOW_END: u64 = 64 << 20;

fn file_of(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

fn memory() -> GuestMap {
    GuestMap::from_ranges(&[(GuestAddress(0), LOW_END as usize)]).unwrap()
}

fn load_bytes(bytes: &[u8], format: KernelFormat) -> Result<LoadedKernel, KernelError> {
    load(&file_of(bytes), format, placement(EntryPreference::Pvh), &memory())
}

fn placement(preference: EntryPreference) -> Placement {
    Placement { preference, low_end: LOW_END, kept_bytes: 0, random: None }
}

/// An ELF file with the given (address, file size, memory size) segments filled with 0x90, and optionally a PVH note.
fn elf(segments: &[(u64, u64, u64)], entry: u64, pvh: Option<u32>) -> Vec<u8> {
    let mut header = vec![0u8; ELF_HEADER_SIZE];
    header[..6].copy_from_slice(b"\x7fELF\x02\x01");
    header[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
    header[24..32].copy_from_slice(&entry.to_le_bytes());
    header[32..40].copy_from_slice(&(ELF_HEADER_SIZE as u64).to_le_bytes());
    header[54..56].copy_from_slice(&(PROGRAM_HEADER_SIZE as u16).to_le_bytes());
    let count = segments.len() + usize::from(pvh.is_some());
    header[56..58].copy_from_slice(&(count as u16).to_le_bytes());
    let mut body = Vec::new();
    let body_offset = ELF_HEADER_SIZE + count * PROGRAM_HEADER_SIZE;
    let mut add = |header: &mut Vec<u8>, kind: u32, address: u64, bytes: &[u8], memory_size: u64| {
        let mut program_header = [0u8; PROGRAM_HEADER_SIZE];
        program_header[..4].copy_from_slice(&kind.to_le_bytes());
        program_header[8..16].copy_from_slice(&((body_offset + body.len()) as u64).to_le_bytes());
        program_header[24..32].copy_from_slice(&address.to_le_bytes());
        program_header[32..40].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        program_header[40..48].copy_from_slice(&memory_size.to_le_bytes());
        header.extend_from_slice(&program_header);
        body.extend_from_slice(bytes);
    };
    for &(address, file_size, memory_size) in segments {
        add(&mut header, PT_LOAD, address, &vec![0x90; file_size as usize], memory_size);
    }
    if let Some(pvh) = pvh {
        // A note to be skipped (odd sizes), then the one that counts.
        let mut notes = Vec::new();
        for (name, kind, description) in
            [(&b"GNU\0"[..], 3u32, &b"12345"[..]), (b"Xen\0", NOTE_PHYS32_ENTRY, &pvh.to_le_bytes())]
        {
            notes.extend_from_slice(&(name.len() as u32).to_le_bytes());
            notes.extend_from_slice(&(description.len() as u32).to_le_bytes());
            notes.extend_from_slice(&kind.to_le_bytes());
            notes.extend_from_slice(name);
            notes.extend_from_slice(description);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        add(&mut header, PT_NOTE, 0, &notes, 0);
    }
    header.extend_from_slice(&body);
    header
}

/// The same kernel with a section of relocations behind it, and the names of sections.
fn with_relocations(mut kernel: Vec<u8>, table: &[u32]) -> Vec<u8> {
    let names = [b"\0.text\0", relocation::SECTION, b"\0"].concat();
    let table: Vec<u8> = table.iter().flat_map(|word| word.to_le_bytes()).collect();
    let names_offset = kernel.len();
    let table_offset = names_offset + names.len();
    let headers_offset = table_offset + table.len();
    kernel.extend_from_slice(&names);
    kernel.extend_from_slice(&table);
    for (name, offset, size) in [(0, 0, 0), (7, table_offset, table.len()), (1, names_offset, names.len())] {
        let mut section = [0u8; SECTION_HEADER_SIZE];
        section[..4].copy_from_slice(&u32::to_le_bytes(name));
        section[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
        section[32..40].copy_from_slice(&(size as u64).to_le_bytes());
        kernel.extend_from_slice(&section);
    }
    kernel[40..48].copy_from_slice(&(headers_offset as u64).to_le_bytes());
    for (offset, value) in [(58, SECTION_HEADER_SIZE as u16), (60, 3), (62, 2)] {
        kernel[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }
    kernel
}

fn bzimage(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: SETUP_HEADER_MAGIC,
        version: 0x20f,
        xloadflags: XLF_KERNEL_64,
        loadflags: 1 | KASLR_FLAG,
        pref_address: 0x100_0000,
        init_size: 0x100_0000,
        ..Default::default()
    };
    change(&mut header);
    let mut image = vec![0u8; 0x1f1];
    image.extend_from_slice(header.as_slice());
    image.resize(1024, 0);
    image.extend_from_slice(&[0xcc; 4096]);
    image
}

#[test]
fn an_elf_kernel_lands_where_it_says_and_the_rest_stays_zero() {
    let memory = memory();
    let bytes = elf(&[(0x100_0000, 100, 5000), (0x200_0000, 10, 10)], 0x100_0010, Some(0x100_0020));
    let load = |preference| load(&file_of(&bytes), KernelFormat::Elf, placement(preference), &memory).unwrap();
    let kernel = load(EntryPreference::Long);
    assert_eq!((kernel.entry, kernel.end), (Entry::Long(0x100_0010), 0x200_000a));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0063)).unwrap(), 0x90);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0064)).unwrap(), 0);
    assert_eq!(load(EntryPreference::Pvh).entry, Entry::Pvh(0x100_0020));
}

#[test]
fn a_kernel_that_can_be_moved_lies_where_chance_has_it() {
    // 64-bit address at its start, none that grows smaller, 32-bit one at 16.
    let bytes = with_relocations(
        elf(&[(0x100_0000, 100, 0x10_0000)], 0x100_0010, Some(0x100_0020)),
        &[0, 0x8100_0000, 0, 0, 0x8100_0010],
    );
    let file = file_of(&bytes);
    let load = |preference, random, kept_bytes| {
        let memory = memory();
        let placement = Placement { random, kept_bytes, ..placement(preference) };
        let kernel = load(&file, KernelFormat::Elf, placement, &memory).unwrap();
        let at = |place: u64| memory.read_obj::<u32>(GuestAddress(place)).unwrap();
        let start = kernel.end - 0x10_0000;
        (kernel.entry, start, at(start), at(start + 4), at(start + 8), at(start + 16), kernel.is_randomised)
    };
    let still = 0x9090_9090;
    let linked = |entry, is_randomised| (entry, 0x100_0000, still, still, still, still, is_randomised);
    assert_eq!(load(EntryPreference::Long, None, 0), linked(Entry::Long(0x100_0010), false));
    assert_eq!(load(EntryPreference::Pvh, Some(u64::MAX), 0), linked(Entry::Pvh(0x100_0020), false), "PVH has no flag");
    // Three steps up in memory, five in its own addresses: two numbers that have nothing to do with each other.
    let moved = load(EntryPreference::Long, Some(5 << 32 | 3), 0);
    let address = still + 5 * (2 << 20);
    assert_eq!(moved, (Entry::Long(0x160_0010), 0x160_0000, address, still, still, address, true));
    // With room for one step only, every number is none or one.
    let kept_bytes = LOW_END - 0x140_0000;
    for random in 0..8 {
        let (_, start, ..) = load(EntryPreference::Long, Some(random), kept_bytes);
        assert_eq!(start, 0x100_0000 + random % 2 * (2 << 20));
    }
    let unmovable = elf(&[(0x100_0000, 100, 5000)], 0x100_0010, None);
    let placement = Placement { random: Some(u64::MAX), ..placement(EntryPreference::Long) };
    let kernel = super::load(&file_of(&unmovable), KernelFormat::Elf, placement, &memory()).unwrap();
    assert_eq!((kernel.entry, kernel.is_randomised), (Entry::Long(0x100_0010), true), "its regions are moved");
}

#[test]
fn bad_relocations_each_have_their_error() {
    let elf = || elf(&[(0x100_0000, 100, 5000)], 0x100_0000, None);
    let random = Placement { random: Some(0), ..placement(EntryPreference::Long) };
    let load = |bytes: &[u8]| super::load(&file_of(bytes), KernelFormat::Elf, random, &memory());
    let good = with_relocations(elf(), &[0, 0, 0]);
    assert!(load(&good).is_ok());
    let outside = with_relocations(elf(), &[0, 0, 0, 0x8200_0000]);
    assert!(matches!(load(&outside), Err(KernelError::Relocation(RelocationError::Outside(0x8200_0000)))));
    let none = with_relocations(elf(), &[7]);
    assert!(matches!(load(&none), Err(KernelError::Relocation(RelocationError::NotATable(_)))));
    assert!(matches!(load(&good[..good.len() - 1]), Err(KernelError::Truncated { .. })));
    let changed = |offset: usize, bytes: &[u8]| {
        let mut kernel = good.clone();
        kernel[offset..offset + bytes.len()].copy_from_slice(bytes);
        load(&kernel)
    };
    assert!(matches!(changed(58, &[1]), Err(KernelError::NotAKernel(_))));
    assert!(matches!(changed(60, &[0xff, 0xff]), Err(KernelError::NotAKernel(_))));
    let section = good.len() - 2 * SECTION_HEADER_SIZE;
    assert!(matches!(changed(section + 32, &[0xff; 8]), Err(KernelError::NotAKernel(_))));
    assert!(matches!(changed(section + 24, &[0xff; 8]), Err(KernelError::Truncated { .. })));
    // The names of sections are not where the header says: none is the one that is looked for.
    assert!(changed(62, &[9]).is_ok());
}

#[test]
fn bad_elf_kernels_each_have_their_error() {
    let good = elf(&[(0x100_0000, 100, 5000)], 0x100_0000, None);
    let changed = |offset: usize, bytes: &[u8]| {
        let mut kernel = good.clone();
        kernel[offset..offset + bytes.len()].copy_from_slice(bytes);
        load_bytes(&kernel, KernelFormat::Elf)
    };
    assert!(load_bytes(&good, KernelFormat::Elf).is_ok());
    assert!(matches!(changed(18, &183u16.to_le_bytes()), Err(KernelError::WrongArchitecture(183))));
    assert!(matches!(changed(4, &[1]), Err(KernelError::NotAKernel(_))));
    assert!(matches!(changed(5, &[2]), Err(KernelError::NotAKernel(_))));
    assert!(matches!(changed(0, b"MZ"), Err(KernelError::NotAKernel(_))));
    assert!(matches!(changed(56, &[0xff, 0xff]), Err(KernelError::NotAKernel(_))));
    assert!(matches!(changed(32, &[0xff; 8]), Err(KernelError::Truncated { .. })));
    assert!(matches!(changed(24, &7u64.to_le_bytes()), Err(KernelError::EntryOutside(7))));
    assert!(matches!(load_bytes(&good[..good.len() - 1], KernelFormat::Elf), Err(KernelError::Truncated { .. })));
    assert!(matches!(load_bytes(b"", KernelFormat::Elf), Err(KernelError::Truncated { .. })));
    let overlapping = elf(&[(0x100_0000, 100, 5000), (0x100_1000, 10, 10)], 0x100_0000, None);
    assert!(matches!(load_bytes(&overlapping, KernelFormat::Elf), Err(KernelError::SegmentsOverlap(0x100_1000))));
    for segment in [(0x1000, 100, 100), (LOW_END - 10, 10, 11), (u64::MAX - 5, 10, 10), (LOW_END, 0, 1)] {
        let outside = elf(&[segment], segment.0, None);
        let result = load_bytes(&outside, KernelFormat::Elf);
        assert!(matches!(result, Err(KernelError::OutsideMemory { .. })), "{segment:x?}: {result:?}");
    }
}

#[test]
fn a_bzimage_loads_at_one_mebibyte_and_is_entered_in_long_mode() {
    let kernel = load_bytes(&bzimage(|_| {}), KernelFormat::BzImage).unwrap();
    assert_eq!((kernel.entry, kernel.end), (Entry::Long(0x10_0200), 0x200_0000));
    assert_eq!({ kernel.setup_header.unwrap() }.loadflags, 1, "the stale KASLR flag is gone");
}

#[test]
fn bad_bzimages_each_have_their_error() {
    let load = |change: fn(&mut setup_header)| load_bytes(&bzimage(change), KernelFormat::BzImage);
    assert!(matches!(load(|header| header.header = 0), Err(KernelError::NotAKernel(_))));
    assert!(matches!(load(|header| header.version = 0x204), Err(KernelError::TooOld(0x204))));
    assert!(matches!(load(|header| header.xloadflags = 0), Err(KernelError::TooOld(0x20f))));
    assert!(matches!(load(|header| header.setup_sects = 255), Err(KernelError::Truncated { .. })));
    assert!(matches!(load(|header| header.pref_address = u64::MAX), Err(KernelError::OutsideMemory { .. })));
    assert!(matches!(load(|header| header.init_size = u32::MAX), Err(KernelError::OutsideMemory { .. })));
    assert!(matches!(load_bytes(&[0; 600], KernelFormat::BzImage), Err(KernelError::Truncated { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn no_file_makes_the_loader_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        elf_magic in any::<bool>(),
    ) {
        if elf_magic && bytes.len() > 64 {
            bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
            bytes[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
            bytes[54..56].copy_from_slice(&(PROGRAM_HEADER_SIZE as u16).to_le_bytes());
        }
        let _ = load_bytes(&bytes, KernelFormat::Elf);
        let _ = load_bytes(&bytes, KernelFormat::BzImage);
        let random = Placement { random: Some(1), ..placement(EntryPreference::Long) };
        let _ = load(&file_of(&bytes), KernelFormat::Elf, random, &memory());
    }

    #[test]
    fn no_change_to_a_good_kernel_makes_the_loader_panic(position in 0usize..800, value in any::<u8>()) {
        let kernel = elf(&[(0x100_0000, 100, 5000), (0x200_0000, 10, 10)], 0x100_0010, Some(0x100_0020));
        let mut kernel = with_relocations(kernel, &[0, 0x8100_0000, 0, 0, 0x8100_0010]);
        let position = position % kernel.len();
        kernel[position] = value;
        let _ = load_bytes(&kernel, KernelFormat::Elf);
        let random = Placement { random: Some(7), ..placement(EntryPreference::Long) };
        let _ = load(&file_of(&kernel), KernelFormat::Elf, random, &memory());
    }
}
