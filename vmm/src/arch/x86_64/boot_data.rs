//! What the kernel reads at its start: zero page (or PVH start info), memory map, command line, initramfs, random seed, MP table.
//!
//! Called once by `engine/kvm` after the kernel is in memory. Everything written here is zero before, so only what is set is written.

use std::fs::File;

use linux_loader::loader::bootparam::{KASLR_FLAG, LOADED_HIGH, boot_e820_entry, boot_params};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::kernel::{KernelError, LoadedKernel, copy_from_file};
use super::layout::{
    COMMAND_LINE_ADDRESS, COMMAND_LINE_SIZE_MAX, LOW_MEMORY_END, PVH_MEMORY_MAP_ADDRESS, PVH_MODULES_ADDRESS,
    PVH_START_INFO_ADDRESS, RANDOM_SEED_ADDRESS, ZERO_PAGE_ADDRESS,
};
use super::registers::{Entry, write_tables};
use super::{memory_map, mp_table};
use crate::memory::GuestMap;

/// "Undefined" boot loader: what a loader without an assigned number says (boot.rst, `type_of_loader`).
const LOADER_UNDEFINED: u8 = 0xff;
/// Boot sector signature.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `hvm_start_info` magic: "xEn3" with the high bit of the E set.
const PVH_MAGIC: u32 = 0x336e_c578;
/// `setup_data` node type of a random seed, which Linux 6.1 and newer mixes into its pool before anything asks for randomness.
const SETUP_RANDOM_SEED: u32 = 9;
/// Bytes of seed: what the kernel's pool holds.
pub const RANDOM_SEED_SIZE: usize = 32;

/// Why the boot data could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BootDataError {
    /// The command line does not fit.
    #[error("kernel command line has {0} bytes, {max} are possible", max = COMMAND_LINE_SIZE_MAX - 1)]
    CommandLineTooLong(usize),
    /// The command line has a zero byte in it.
    #[error("kernel command line contains a zero byte")]
    CommandLineZero,
    /// No room between the kernel and the end of low memory.
    #[error("initramfs of {length} bytes does not fit between the kernel's end {kernel_end:#x} and {low_end:#x}")]
    InitramfsTooLarge {
        /// Its length in bytes.
        length: u64,
        /// End of the kernel.
        kernel_end: u64,
        /// End of low memory.
        low_end: u64,
    },
    /// The initramfs could not be copied.
    #[error("initramfs could not be loaded")]
    Initramfs(#[source] KernelError),
    /// Guest memory refused a write: our own layout is wrong.
    #[error("boot data could not be written")]
    Write(#[from] GuestMemoryError),
}

/// Where the initramfs lies: address and length in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Initramfs {
    /// First byte.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
}

/// What goes into the boot data besides the kernel.
#[derive(Debug)]
pub struct BootData<'a> {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Processors.
    pub cpus: u8,
    /// Complete kernel command line.
    pub command_line: &'a str,
    /// The initramfs, already copied.
    pub initramfs: Option<Initramfs>,
    /// Fresh randomness for the kernel's pool.
    pub random_seed: [u8; RANDOM_SEED_SIZE],
}

/// Copies `file` to the top of low memory, page aligned, as far from the kernel as can be.
pub fn load_initramfs(
    file: &File,
    memory: &GuestMap,
    memory_bytes: u64,
    kernel_end: u64,
) -> Result<Initramfs, BootDataError> {
    let length = file.metadata().map_err(|error| BootDataError::Initramfs(error.into()))?.len();
    let low_end = memory_bytes.min(LOW_MEMORY_END);
    let too_large = BootDataError::InitramfsTooLarge { length, kernel_end, low_end };
    let Some(address) = low_end.checked_sub(length).map(|address| address & !0xfff) else { return Err(too_large) };
    if address < kernel_end {
        return Err(too_large);
    }
    copy_from_file(file, 0, memory, address, length).map_err(BootDataError::Initramfs)?;
    Ok(Initramfs { address, length })
}

/// Writes all of it.
pub fn write(memory: &GuestMap, kernel: &LoadedKernel, data: &BootData<'_>) -> Result<(), BootDataError> {
    write_command_line(memory, data.command_line)?;
    mp_table::write(memory, data.cpus)?;
    write_tables(memory, kernel.entry)?;
    match kernel.entry {
        Entry::Long(_) => write_zero_page(memory, kernel, data)?,
        Entry::Pvh(_) => write_start_info(memory, data)?,
    }
    Ok(())
}

fn write_command_line(memory: &GuestMap, line: &str) -> Result<(), BootDataError> {
    if line.len() as u64 >= COMMAND_LINE_SIZE_MAX {
        return Err(BootDataError::CommandLineTooLong(line.len()));
    }
    if line.contains('\0') {
        return Err(BootDataError::CommandLineZero);
    }
    // The byte after it is zero already.
    Ok(memory.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE_ADDRESS))?)
}

fn write_zero_page(memory: &GuestMap, kernel: &LoadedKernel, data: &BootData<'_>) -> Result<(), BootDataError> {
    let mut page = boot_params::default();
    match kernel.setup_header {
        Some(header) => page.hdr = header,
        None => {
            page.hdr.boot_flag = BOOT_FLAG;
            page.hdr.header = HEADER_MAGIC;
            page.hdr.loadflags = LOADED_HIGH;
            // Of a vmlinux nobody else says it: no unpacker runs before it.
            if kernel.is_randomised {
                page.hdr.loadflags |= KASLR_FLAG;
            }
        }
    }
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    // Below 4 GiB by the layout's assertions.
    page.hdr.cmd_line_ptr = COMMAND_LINE_ADDRESS as u32;
    page.hdr.cmdline_size = data.command_line.len() as u32;
    if let Some(initramfs) = data.initramfs {
        page.hdr.ramdisk_image = initramfs.address as u32;
        page.hdr.ramdisk_size = initramfs.length as u32;
    }
    let entries = memory_map::entries(data.memory_bytes);
    for (slot, entry) in page.e820_table.iter_mut().zip(&entries) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.length, r#type: entry.kind };
    }
    page.e820_entries = entries.len() as u8;
    page.hdr.setup_data = RANDOM_SEED_ADDRESS;
    memory.write_obj(page, GuestAddress(ZERO_PAGE_ADDRESS))?;

    // struct setup_data: next (none), type, length, bytes. The kernel wipes the seed once it has used it.
    let mut node = [0u8; 16 + RANDOM_SEED_SIZE];
    node[8..12].copy_from_slice(&SETUP_RANDOM_SEED.to_le_bytes());
    node[12..16].copy_from_slice(&(RANDOM_SEED_SIZE as u32).to_le_bytes());
    node[16..].copy_from_slice(&data.random_seed);
    Ok(memory.write_slice(&node, GuestAddress(RANDOM_SEED_ADDRESS))?)
}

fn write_start_info(memory: &GuestMap, data: &BootData<'_>) -> Result<(), BootDataError> {
    let entries = memory_map::entries(data.memory_bytes);
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE_ADDRESS,
        memmap_paddr: PVH_MEMORY_MAP_ADDRESS,
        memmap_entries: entries.len() as u32,
        ..Default::default()
    };
    if let Some(initramfs) = data.initramfs {
        let module = hvm_modlist_entry { paddr: initramfs.address, size: initramfs.length, ..Default::default() };
        memory.write_obj(module, GuestAddress(PVH_MODULES_ADDRESS))?;
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES_ADDRESS;
    }
    for (index, entry) in entries.iter().enumerate() {
        let line =
            hvm_memmap_table_entry { addr: entry.start, size: entry.length, type_: entry.kind, ..Default::default() };
        let address = PVH_MEMORY_MAP_ADDRESS + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(line, GuestAddress(address))?;
    }
    Ok(memory.write_obj(info, GuestAddress(PVH_START_INFO_ADDRESS))?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::GuestMemoryBackend;

    use super::*;

    fn memory() -> GuestMap {
        GuestMap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    fn data(command_line: &str) -> BootData<'_> {
        BootData {
            memory_bytes: 64 << 20,
            cpus: 2,
            command_line,
            initramfs: Some(Initramfs { address: 0x300_0000, length: 0x1234 }),
            random_seed: [7; RANDOM_SEED_SIZE],
        }
    }

    fn kernel(entry: Entry) -> LoadedKernel {
        LoadedKernel { entry, end: 0x200_0000, setup_header: None, is_randomised: true }
    }

    #[test]
    fn the_zero_page_says_where_everything_is() {
        let memory = memory();
        write(&memory, &kernel(Entry::Long(0x100_0000)), &data("console=ttyS0")).unwrap();
        let page: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE_ADDRESS)).unwrap();
        assert_eq!({ page.hdr.loadflags } & KASLR_FLAG, KASLR_FLAG);
        assert_eq!(({ page.hdr.ramdisk_image }, { page.hdr.ramdisk_size }), (0x300_0000, 0x1234));
        assert_eq!(page.e820_entries, 3);
        assert_eq!({ page.hdr.cmdline_size }, 13);
        let mut line = [0u8; 14];
        memory.read_slice(&mut line, GuestAddress(COMMAND_LINE_ADDRESS)).unwrap();
        assert_eq!(&line, b"console=ttyS0\0");
        let seed: [u8; 32] = memory.read_obj(GuestAddress({ page.hdr.setup_data } + 16)).unwrap();
        assert_eq!(seed, [7; 32]);
    }

    #[test]
    fn pvh_start_info_says_the_same() {
        let memory = memory();
        write(&memory, &kernel(Entry::Pvh(0x100_0000)), &data("x")).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO_ADDRESS)).unwrap();
        assert_eq!((info.magic, info.nr_modules, info.memmap_entries), (PVH_MAGIC, 1, 3));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x300_0000, 0x1234));
    }

    #[test]
    fn command_lines_are_bounded_on_both_sides_of_the_limit() {
        let longest = "x".repeat(COMMAND_LINE_SIZE_MAX as usize - 1);
        assert!(write_command_line(&memory(), &longest).is_ok());
        let longer = format!("{longest}x");
        assert!(matches!(write_command_line(&memory(), &longer), Err(BootDataError::CommandLineTooLong(2048))));
        assert!(matches!(write_command_line(&memory(), "a\0b"), Err(BootDataError::CommandLineZero)));
    }

    #[test]
    fn an_initramfs_lies_at_the_top_and_must_not_meet_the_kernel() {
        let memory = memory();
        let fd = rustix::fs::memfd_create("initramfs", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&[1; 5000]).unwrap();
        let placed = load_initramfs(&file, &memory, 64 << 20, 0x200_0000).unwrap();
        assert_eq!(placed, Initramfs { address: (64 << 20) - 8192, length: 5000 });
        assert!(memory.check_range(GuestAddress(placed.address), 5000));
        assert!(load_initramfs(&file, &memory, 64 << 20, (64 << 20) - 8192).is_ok());
        let crowded = load_initramfs(&file, &memory, 64 << 20, (64 << 20) - 8191);
        assert!(matches!(crowded, Err(BootDataError::InitramfsTooLarge { .. })));
        file.set_len(1 << 40).unwrap();
        assert!(matches!(load_initramfs(&file, &memory, 64 << 20, 0), Err(BootDataError::InitramfsTooLarge { .. })));
    }
}
