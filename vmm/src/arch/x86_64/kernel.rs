//! Checks a kernel file and copies it into guest memory: vmlinux (ELF) or bzImage.
//!
//! Everything the file says is checked before the first byte is copied: machine, lengths against the file, segments against each
//! other and against guest memory. The file comes from the user, so a bad one is a typed [`KernelError`], never a panic, and
//! nothing is allocated by its word. A kernel that says what moving it takes ([`relocation`]) lands at a random place, in memory and in its own
//! address space, as the unpacker of a bzImage would choose. Called by `engine/kvm` (through `boot_data`), and by tests with hostile files.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::{KASLR_FLAG, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::layout::{KERNEL_START, LOW_MEMORY_END};
use super::registers::Entry;
use super::relocation::{self, RelocationError};
use crate::engine::KernelFormat;
use crate::memory::{GuestMap, transfer};

/// Most program headers looked at; a Linux vmlinux has five.
const SEGMENTS_MAX: u16 = 64;
/// Bytes of a note segment that are searched for the PVH entry.
const NOTES_SIZE_MAX: u64 = 64 * 1024;
/// ELF header sizes (64-bit).
const ELF_HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
/// ELF constants (System V ABI).
const ELF_MAGIC: &[u8] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const SECTION_HEADER_SIZE: usize = 64;
/// Most sections looked at, and most bytes of their names; a Linux vmlinux has some fifty.
const SECTIONS_MAX: u16 = 1024;
const SECTION_NAMES_SIZE_MAX: u64 = 64 * 1024;
/// Note of owner "Xen" that holds the 32-bit physical entry of the PVH protocol.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Where the setup header lies in a bzImage (boot.rst, "The Real-Mode Kernel Header").
const SETUP_HEADER_OFFSET: u64 = 0x1f1;
/// "HdrS".
const SETUP_HEADER_MAGIC: u32 = 0x5372_6448;
/// First boot protocol with `xloadflags`, which announces the 64-bit entry.
const PROTOCOL_MIN: u16 = 0x20c;
/// The 64-bit entry of a bzImage lies this far into its protected-mode part.
const BZIMAGE_ENTRY_64_OFFSET: u64 = 0x200;

/// Which entry of an ELF kernel to use.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum EntryPreference {
    /// The 64-bit boot protocol: as fast as PVH here, and the only one of the two that carries the KASLR flag and a random seed.
    #[default]
    Long,
    /// PVH if the kernel has it.
    Pvh,
}

/// Why a kernel was refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be read.
    #[error("cannot read the kernel")]
    Read(#[from] std::io::Error),
    /// Neither format's magic, or not a 64-bit little-endian ELF.
    #[error("not a 64-bit x86 kernel: {0}")]
    NotAKernel(&'static str),
    /// An ELF file for another processor.
    #[error("kernel is built for another architecture (ELF machine {0}, x86-64 is {MACHINE_X86_64})")]
    WrongArchitecture(u16),
    /// The file ends before something it announces.
    #[error("kernel is truncated: it announces {needed} bytes, the file has {length}")]
    Truncated {
        /// Bytes the file should have.
        needed: u64,
        /// Bytes it has.
        length: u64,
    },
    /// Two segments claim the same memory.
    #[error("kernel segments overlap at {0:#x}")]
    SegmentsOverlap(u64),
    /// A segment lies where the guest has no usable memory.
    #[error("kernel needs memory {start:#x} to {end:#x}, the guest has {usable_start:#x} to {usable_end:#x}")]
    OutsideMemory {
        /// First byte it needs.
        start: u64,
        /// End of what it needs.
        end: u64,
        /// First byte there is.
        usable_start: u64,
        /// End of what there is.
        usable_end: u64,
    },
    /// The entry is not inside anything that was loaded.
    #[error("kernel entry {0:#x} lies outside its segments")]
    EntryOutside(u64),
    /// A bzImage older than the 64-bit protocol.
    #[error("bzImage speaks boot protocol {0:#06x}, {PROTOCOL_MIN:#06x} with a 64-bit entry is needed")]
    TooOld(u16),
    /// What it says about moving it is not so.
    #[error("kernel cannot be moved")]
    Relocation(#[from] RelocationError),
    /// Guest memory refused the copy: our own layout is wrong.
    #[error("kernel could not be copied into guest memory")]
    Copy(#[from] vm_memory::GuestMemoryError),
}

/// Where to put a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// Which of its entries is used.
    pub preference: EntryPreference,
    /// End of the usable memory below the hole.
    pub low_end: u64,
    /// Bytes at that end which something else needs, the initramfs.
    pub kept_bytes: u64,
    /// Chooses where a kernel goes that can be moved; without it, that is where it was linked to.
    pub random: Option<u64>,
}

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct LoadedKernel {
    /// Where and how it is entered.
    pub entry: Entry,
    /// First byte after all memory the kernel uses before it reads the memory map.
    pub end: u64,
    /// A bzImage's own header, to be handed back to it in the zero page.
    pub setup_header: Option<setup_header>,
    /// A vmlinux is to choose random places for its memory regions (direct map, vmalloc, vmemmap).
    pub is_randomised: bool,
}

/// Checks `file` and copies it into `memory`.
pub fn load(
    file: &File,
    format: KernelFormat,
    placement: Placement,
    memory: &GuestMap,
) -> Result<LoadedKernel, KernelError> {
    let source = Source { file, length: file.metadata()?.len(), low_end: placement.low_end.min(LOW_MEMORY_END) };
    match format {
        KernelFormat::Elf => load_elf(&source, placement, memory),
        KernelFormat::BzImage => load_bzimage(&source, memory),
    }
}

/// The file, its length, and the end of usable memory.
struct Source<'a> {
    file: &'a File,
    length: u64,
    low_end: u64,
}

impl Source<'_> {
    /// Errors unless the file has `[offset, offset + count)`.
    fn require(&self, offset: u64, count: u64) -> Result<(), KernelError> {
        let needed = offset.saturating_add(count);
        if needed > self.length { Err(KernelError::Truncated { needed, length: self.length }) } else { Ok(()) }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.require(offset, bytes.len() as u64)?;
        Ok(self.file.read_exact_at(bytes, offset)?)
    }

    /// Errors unless the guest has `[start, start + count)` as usable low memory.
    fn require_memory(&self, start: u64, count: u64) -> Result<u64, KernelError> {
        let end = start.saturating_add(count);
        if start < KERNEL_START || end > self.low_end {
            return Err(KernelError::OutsideMemory {
                start,
                end,
                usable_start: KERNEL_START,
                usable_end: self.low_end,
            });
        }
        Ok(end)
    }

    /// Copies `[offset, offset + count)` of the file to `address`, straight from the page cache.
    fn copy(&self, memory: &GuestMap, address: u64, offset: u64, count: u64) -> Result<(), KernelError> {
        self.require(offset, count)?;
        copy_from_file(self.file, offset, memory, address, count)
    }
}

/// Copies `count` bytes of `file` from `offset` to guest address `address`. A file that shrinks meanwhile is `Truncated`.
pub fn copy_from_file(
    file: &File,
    offset: u64,
    memory: &GuestMap,
    address: u64,
    count: u64,
) -> Result<(), KernelError> {
    let mut done = 0;
    while done < count {
        // Kernels and initramfs lie below the hole, so one slice covers the rest.
        let rest = usize::try_from(count - done).map_err(std::io::Error::other)?;
        let slice = memory.get_slice(GuestAddress(address + done), rest)?;
        match transfer::read_at(file.as_fd(), &[slice], offset + done)? {
            0 => return Err(KernelError::Truncated { needed: offset + count, length: offset + done }),
            copied => done += copied as u64,
        }
    }
    Ok(())
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    bytes.get(offset..offset + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes.get(offset..offset + 4).map_or(0, |bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from(u32_at(bytes, offset)) | (u64::from(u32_at(bytes, offset + 4)) << 32)
}

/// A program header, as far as it matters.
#[derive(Clone, Copy, Debug)]
struct Segment {
    kind: u32,
    file_offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            kind: u32_at(bytes, 0),
            file_offset: u64_at(bytes, 8),
            address: u64_at(bytes, 24),
            file_size: u64_at(bytes, 32),
            memory_size: u64_at(bytes, 40),
        }
    }
}

fn load_elf(source: &Source<'_>, placement: Placement, memory: &GuestMap) -> Result<LoadedKernel, KernelError> {
    let mut header = [0u8; ELF_HEADER_SIZE];
    source.read(0, &mut header)?;
    if !header.starts_with(ELF_MAGIC) {
        return Err(KernelError::NotAKernel("no ELF magic"));
    }
    let machine = u16_at(&header, 18);
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN {
        return Err(KernelError::NotAKernel("ELF file is not 64-bit little-endian"));
    }
    if machine != MACHINE_X86_64 {
        return Err(KernelError::WrongArchitecture(machine));
    }
    let entry = u64_at(&header, 24);
    let table_offset = u64_at(&header, 32);
    let count = u16_at(&header, 56);
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_SIZE {
        return Err(KernelError::NotAKernel("odd program header size"));
    }
    if count == 0 || count > SEGMENTS_MAX {
        return Err(KernelError::NotAKernel("no program headers, or too many"));
    }
    let mut table = vec![0u8; usize::from(count) * PROGRAM_HEADER_SIZE];
    source.read(table_offset, &mut table)?;
    let segments: Vec<Segment> = table.chunks_exact(PROGRAM_HEADER_SIZE).map(Segment::parse).collect();

    let mut loads: Vec<Segment> =
        segments.iter().copied().filter(|segment| segment.kind == PT_LOAD && segment.memory_size > 0).collect();
    loads.sort_by_key(|segment| segment.address);
    let mut end = KERNEL_START;
    for segment in &loads {
        if segment.file_size > segment.memory_size {
            return Err(KernelError::NotAKernel("segment larger in the file than in memory"));
        }
        source.require(segment.file_offset, segment.file_size)?;
        let segment_end = source.require_memory(segment.address, segment.memory_size)?;
        if segment.address < end && end != KERNEL_START {
            return Err(KernelError::SegmentsOverlap(segment.address));
        }
        end = segment_end;
    }
    let inside = |address: u64| {
        loads.iter().any(|segment| (segment.address..segment.address + segment.file_size).contains(&address))
    };
    let pvh = match placement.preference {
        EntryPreference::Long => None,
        EntryPreference::Pvh => find_pvh_entry(source, &segments)?,
    };
    let entry = pvh.map_or(Entry::Long(entry), Entry::Pvh);
    let entry_address = match entry {
        Entry::Long(address) => address,
        Entry::Pvh(address) => address.into(),
    };
    if !inside(entry_address) {
        return Err(KernelError::EntryOutside(entry_address));
    }
    // The code behind the PVH entry runs where it was linked to.
    let random = placement.random.filter(|_| pvh.is_none());
    let start = loads.first().map_or(end, |segment| segment.address);
    let moving = match random {
        Some(random) => relocations(source, &header)?.map(|table| (table, random as u32, (random >> 32) as u32)),
        None => None,
    };
    let limit = source.low_end.saturating_sub(placement.kept_bytes);
    let up = moving.as_ref().map_or(0, |(_, random, _)| relocation::choose(end, limit, *random));
    for segment in &loads {
        source.copy(memory, segment.address + up, segment.file_offset, segment.file_size)?;
    }
    if let Some((table, _, random)) = moving {
        let shift = relocation::choose(end, relocation::IMAGE_ROOM, random);
        // Below the hole: one slice.
        let length = usize::try_from(end - start).map_err(std::io::Error::other)?;
        relocation::apply(&table, &memory.get_slice(GuestAddress(start + up), length)?, start, shift)?;
    }
    let entry = match entry {
        Entry::Long(address) => Entry::Long(address + up),
        Entry::Pvh(_) => entry,
    };
    Ok(LoadedKernel { entry, end: end + up, setup_header: None, is_randomised: random.is_some() })
}

/// The table of what moving the kernel takes, if the file has one.
fn relocations(source: &Source<'_>, header: &[u8; ELF_HEADER_SIZE]) -> Result<Option<Vec<u8>>, KernelError> {
    let (table_offset, count) = (u64_at(header, 40), u16_at(header, 60));
    if count == 0 {
        return Ok(None);
    }
    if usize::from(u16_at(header, 58)) != SECTION_HEADER_SIZE || count > SECTIONS_MAX {
        return Err(KernelError::NotAKernel("odd section headers, or too many"));
    }
    let mut table = vec![0u8; usize::from(count) * SECTION_HEADER_SIZE];
    source.read(table_offset, &mut table)?;
    // Name (an offset into the section of names), then at 24 and 32 where in the file it is, and its size.
    let place = |section: &[u8]| (u64_at(section, 24), u64_at(section, 32));
    let Some((names_offset, names_size)) =
        table.chunks_exact(SECTION_HEADER_SIZE).nth(u16_at(header, 62).into()).map(place)
    else {
        return Ok(None);
    };
    let mut names = vec![0u8; names_size.min(SECTION_NAMES_SIZE_MAX) as usize];
    source.read(names_offset, &mut names)?;
    let is_it = |section: &&[u8]| {
        let name = names.get(u32_at(section, 0) as usize..).unwrap_or_default();
        name.strip_prefix(relocation::SECTION).is_some_and(|rest| rest.first() == Some(&0))
    };
    let Some((offset, size)) = table.chunks_exact(SECTION_HEADER_SIZE).find(is_it).map(place) else {
        return Ok(None);
    };
    if size > relocation::SECTION_BYTES_MAX {
        return Err(KernelError::NotAKernel("too much to relocate"));
    }
    source.require(offset, size)?;
    let mut relocations = vec![0u8; size as usize];
    source.read(offset, &mut relocations)?;
    Ok(Some(relocations))
}

/// Searches the note segments for the PVH entry.
fn find_pvh_entry(source: &Source<'_>, segments: &[Segment]) -> Result<Option<u32>, KernelError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        let mut notes = vec![0u8; segment.file_size.min(NOTES_SIZE_MAX) as usize];
        source.read(segment.file_offset, &mut notes)?;
        let mut rest = notes.as_slice();
        // Each note: sizes of name and description, type; both parts padded to 4 bytes. Every step takes at least 12 bytes.
        while rest.len() >= 12 {
            let (name_size, description_size, kind) =
                (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize, u32_at(rest, 8));
            let name_end = 12usize.saturating_add(name_size);
            let description_start = name_end.checked_next_multiple_of(4).unwrap_or(usize::MAX);
            let description_end = description_start.saturating_add(description_size);
            if description_end > rest.len() {
                break;
            }
            if kind == NOTE_PHYS32_ENTRY && &rest[12..name_end] == b"Xen\0" && description_size >= 4 {
                return Ok(Some(u32_at(rest, description_start)));
            }
            rest = rest.get(description_end.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(None)
}

fn load_bzimage(source: &Source<'_>, memory: &GuestMap) -> Result<LoadedKernel, KernelError> {
    let mut header = setup_header::default();
    source.read(SETUP_HEADER_OFFSET, header.as_mut_slice())?;
    let (magic, version) = (header.header, header.version);
    if magic != SETUP_HEADER_MAGIC {
        return Err(KernelError::NotAKernel("no bzImage header"));
    }
    if version < PROTOCOL_MIN || { header.xloadflags } & XLF_KERNEL_64 == 0 {
        return Err(KernelError::TooOld(version));
    }
    // 0 means 4, for reasons older than this protocol (boot.rst).
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = (sectors + 1) * 512;
    source.require(offset, BZIMAGE_ENTRY_64_OFFSET)?;
    let length = source.length - offset;
    let load_end = source.require_memory(KERNEL_START, length)?;
    // The kernel unpacks itself to its preferred address and needs `init_size` bytes there before it knows the memory map.
    let unpacked_end = source.require_memory(header.pref_address, u64::from(header.init_size))?;
    source.copy(memory, KERNEL_START, offset, length)?;
    // The kernel sets this flag itself once it has randomised its address; a stale one would claim what is not so.
    header.loadflags &= !KASLR_FLAG;
    Ok(LoadedKernel {
        entry: Entry::Long(KERNEL_START + BZIMAGE_ENTRY_64_OFFSET),
        end: load_end.max(unpacked_end),
        setup_header: Some(header),
        is_randomised: false,
    })
}

#[cfg(test)]
mod tests;
