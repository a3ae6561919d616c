//! Where everything lies in the guest's physical address space, and the relations between those places, checked when compiling.
//!
//! ```text
//! 0x0000_0000  real-mode data, never used by us
//! 0x0000_0500  GDT, then IDT (empty)
//! 0x0000_6000  hvm_start_info (PVH)      0x0000_6100  module list and memory map (PVH)
//! 0x0000_7000  zero page (boot_params)
//! 0x0000_9000  page tables: PML4, PDPT, 4 x PD
//! 0x0001_0000  random seed for the kernel
//! 0x0002_0000  kernel command line
//! 0x0009_fc00  MP table, up to 640 KiB (reserved in the memory map)
//! 0x000a_0000  legacy hole up to 1 MiB
//! 0x0010_0000  "high memory": kernel, initramfs at the top of low memory
//! 0xc000_0000  end of low memory; nothing is here
//! 0xd000_0000  virtio-mmio windows, 4 KiB each
//! 0xfec0_0000  IO-APIC, 0xfee0_0000 local APICs, 0xfffb_c000 identity map page, 0xfffb_d000 TSS (KVM's own)
//! 0x1_0000_0000  the rest of the memory
//! ```

/// First byte of the hole below 4 GiB: memory beyond this continues at [`HIGH_MEMORY_START`].
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Where memory that did not fit below the hole goes on.
pub const HIGH_MEMORY_START: u64 = 1 << 32;

/// The smallest guest: below this our kernel and initramfs leave no room for a workload.
pub const MEMORY_MIN_MIB: u64 = 64;
/// The largest guest.
pub const MEMORY_MAX_MIB: u64 = 64 * 1024;

/// Global descriptor table (boot protocol, 64-bit entry).
pub const GDT_ADDRESS: u64 = 0x500;
/// Interrupt descriptor table: one empty entry, the kernel brings its own.
pub const IDT_ADDRESS: u64 = 0x540;
/// PVH `hvm_start_info`.
pub const PVH_START_INFO_ADDRESS: u64 = 0x6000;
/// PVH module list (one entry, the initramfs).
pub const PVH_MODULES_ADDRESS: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMORY_MAP_ADDRESS: u64 = 0x6100;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE_ADDRESS: u64 = 0x7000;
/// Bytes of the zero page.
pub const ZERO_PAGE_SIZE: u64 = 0x1000;
/// Stack handed to the kernel's entry, which switches to its own at once; grows down from here.
pub const BOOT_STACK_ADDRESS: u64 = 0x8ff0;
/// Top page table.
pub const PML4_ADDRESS: u64 = 0x9000;
/// Second level.
pub const PDPT_ADDRESS: u64 = 0xa000;
/// Four page directories of 2 MiB pages: identity for the first 4 GiB.
pub const PD_ADDRESS: u64 = 0xb000;
/// Number of page directories, one per GiB.
pub const PD_COUNT: u64 = 4;
/// Random seed for the kernel (`struct setup_data` and 32 bytes).
pub const RANDOM_SEED_ADDRESS: u64 = 0x1_0000;
/// Kernel command line.
pub const COMMAND_LINE_ADDRESS: u64 = 0x2_0000;
/// Longest command line, terminator included. Linux on x86 takes 2048 (`COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_SIZE_MAX: u64 = 2048;
/// MP table: Linux looks for it in the last KiB of base memory.
pub const MP_TABLE_ADDRESS: u64 = 0x9_fc00;
/// First byte after the MP table's room: the legacy video hole.
pub const MP_TABLE_END: u64 = 0xa_0000;
/// Where kernels are loaded from, and where usable memory starts again after the legacy hole.
pub const KERNEL_START: u64 = 0x10_0000;

/// First virtio-mmio window.
pub const MMIO_START: u64 = 0xd000_0000;
/// Bytes from one window to the next.
pub const MMIO_WINDOW_SIZE: u64 = 0x1000;
/// First interrupt line given to a device: 0 to 4 belong to timer, keyboard, cascade and serial ports.
pub const IRQ_FIRST: u32 = 5;
/// Last line of the IO-APIC.
pub const IRQ_LAST: u32 = 23;
/// Devices that have a line of their own.
pub const MMIO_SLOT_COUNT: usize = (IRQ_LAST - IRQ_FIRST + 1) as usize;

/// IO-APIC registers.
pub const IO_APIC_ADDRESS: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC_ADDRESS: u64 = 0xfee0_0000;
/// Page KVM needs on Intel hosts for real mode emulation.
pub const KVM_IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Three pages KVM needs on Intel hosts for the same.
pub const KVM_TSS_ADDRESS: u64 = 0xfffb_d000;

/// Serial console: COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;
/// Keyboard controller data port; command port is four above. Only its reset command does anything.
pub const I8042_PORT: u16 = 0x60;

const _: () = {
    assert!(IDT_ADDRESS >= GDT_ADDRESS + 5 * 8, "the GDT has five entries");
    assert!(PVH_MODULES_ADDRESS >= PVH_START_INFO_ADDRESS + 56, "hvm_start_info version 1 is 56 bytes");
    assert!(PVH_MEMORY_MAP_ADDRESS >= PVH_MODULES_ADDRESS + 32, "a module entry is 32 bytes");
    assert!(ZERO_PAGE_ADDRESS > PVH_MEMORY_MAP_ADDRESS + 128 * 24, "128 map entries of 24 bytes");
    assert!(BOOT_STACK_ADDRESS > ZERO_PAGE_ADDRESS + ZERO_PAGE_SIZE && BOOT_STACK_ADDRESS < PML4_ADDRESS);
    assert!(PDPT_ADDRESS == PML4_ADDRESS + 0x1000 && PD_ADDRESS == PDPT_ADDRESS + 0x1000);
    assert!(RANDOM_SEED_ADDRESS >= PD_ADDRESS + PD_COUNT * 0x1000);
    assert!(COMMAND_LINE_ADDRESS >= RANDOM_SEED_ADDRESS + 0x1000);
    assert!(COMMAND_LINE_ADDRESS + COMMAND_LINE_SIZE_MAX <= MP_TABLE_ADDRESS);
    assert!(MP_TABLE_END <= KERNEL_START);
    assert!(KERNEL_START < MEMORY_MIN_MIB << 20);
    assert!(MMIO_START >= LOW_MEMORY_END, "devices lie in the hole");
    assert!(MMIO_START + MMIO_SLOT_COUNT as u64 * MMIO_WINDOW_SIZE <= IO_APIC_ADDRESS);
    assert!(MMIO_SLOT_COUNT == 19, "the product promises 19 slots");
    assert!(KVM_IDENTITY_MAP_ADDRESS + 0x1000 <= KVM_TSS_ADDRESS && KVM_TSS_ADDRESS + 0x3000 <= HIGH_MEMORY_START);
    assert!(LOW_MEMORY_END.is_multiple_of(1 << 21), "huge pages do not straddle the hole");
    assert!(IRQ_FIRST > SERIAL_IRQ);
};
