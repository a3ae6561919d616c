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
    load(&file_of(bytes), format, EntryPreference::Pvh, &memory(), LOW_END)
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
    let load = |preference| load(&file_of(&bytes), KernelFormat::Elf, preference, &memory, LOW_END).unwrap();
    let kernel = load(EntryPreference::Long);
    assert_eq!((kernel.entry, kernel.end), (Entry::Long(0x100_0010), 0x200_000a));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0063)).unwrap(), 0x90);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0064)).unwrap(), 0);
    assert_eq!(load(EntryPreference::Pvh).entry, Entry::Pvh(0x100_0020));
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
    }

    #[test]
    fn no_change_to_a_good_kernel_makes_the_loader_panic(position in 0usize..400, value in any::<u8>()) {
        let mut kernel = elf(&[(0x100_0000, 100, 5000), (0x200_0000, 10, 10)], 0x100_0010, Some(0x100_0020));
        let position = position % kernel.len();
        kernel[position] = value;
        let _ = load_bytes(&kernel, KernelFormat::Elf);
    }
}
