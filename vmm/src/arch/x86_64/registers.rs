//! Register state at the first instruction, for both boot protocols, and the tables in guest memory it refers to.
//!
//! * 64-bit boot protocol (Linux `Documentation/x86/boot.rst`, section "64-bit Boot Protocol"): long mode, identity page tables,
//!   `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18, `rsi` = zero page, interrupts off.
//! * PVH (Xen `docs/misc/pvh.pandoc`): 32-bit protected mode without paging, `ebx` = start info.
//!
//! Called by `engine/kvm` for the boot processor and by its probe; application processors start in KVM's own INIT state.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    BOOT_STACK_ADDRESS, GDT_ADDRESS, IDT_ADDRESS, PD_ADDRESS, PD_COUNT, PDPT_ADDRESS, PML4_ADDRESS,
    PVH_START_INFO_ADDRESS, ZERO_PAGE_ADDRESS,
};
use crate::memory::GuestMap;

/// Control register bits (Intel SDM volume 3, section 2.5).
const CR0_PROTECTION: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
/// EFER bits (section 2.2.1).
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// Bit 1 of RFLAGS always reads as one.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Page table bits (section 4.5).
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_HUGE: u64 = 1 << 7;

/// Index of the code segment: selector 0x10, as the boot protocol wants.
const CODE_INDEX: u16 = 2;
/// Index of the data segment: selector 0x18.
const DATA_INDEX: u16 = 3;
/// Index of the task segment, which VMX insists on.
const TASK_INDEX: u16 = 4;

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Entry {
    /// Long mode at this address.
    Long(u64),
    /// PVH: 32-bit protected mode at this address.
    Pvh(u32),
}

/// An 8-byte segment descriptor: 16 bits of flags as in bytes 5 and 6, a 32-bit base, a 20-bit limit.
fn descriptor(flags: u16, base: u32, limit: u32) -> u64 {
    let (flags, base, limit) = (u64::from(flags), u64::from(base), u64::from(limit));
    ((base & 0xff00_0000) << 32)
        | ((flags & 0xf0ff) << 40)
        | ((limit & 0x000f_0000) << 32)
        | ((base & 0x00ff_ffff) << 16)
        | (limit & 0xffff)
}

/// What KVM wants to know of the descriptor at `index`.
fn segment(descriptor: u64, index: u16) -> kvm_segment {
    let bit = |position: u32| ((descriptor >> position) & 1) as u8;
    let limit = ((descriptor & 0xffff) | ((descriptor >> 32) & 0x000f_0000)) as u32;
    let granular = bit(55) == 1;
    kvm_segment {
        base: ((descriptor >> 16) & 0x00ff_ffff) | ((descriptor >> 32) & 0xff00_0000),
        limit: if granular { (limit << 12) | 0xfff } else { limit },
        selector: index * 8,
        type_: ((descriptor >> 40) & 0xf) as u8,
        present: bit(47),
        dpl: ((descriptor >> 45) & 3) as u8,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        avl: bit(52),
        unusable: u8::from(bit(47) == 0),
        padding: 0,
    }
}

/// The five descriptors: two empty ones, code, data, task.
fn descriptors(entry: Entry) -> [u64; 5] {
    let code = match entry {
        Entry::Long(_) => descriptor(0xa09b, 0, 0xf_ffff),
        Entry::Pvh(_) => descriptor(0xc09b, 0, 0xf_ffff),
    };
    [0, 0, code, descriptor(0xc093, 0, 0xf_ffff), descriptor(0x008b, 0, 0x67)]
}

/// Writes GDT, IDT and, for a long mode entry, identity page tables of the first 4 GiB into guest memory.
pub fn write_tables(memory: &GuestMap, entry: Entry) -> Result<(), GuestMemoryError> {
    memory.write_obj(descriptors(entry), GuestAddress(GDT_ADDRESS))?;
    memory.write_obj(0u64, GuestAddress(IDT_ADDRESS))?;
    if matches!(entry, Entry::Pvh(_)) {
        return Ok(());
    }
    memory.write_obj(PDPT_ADDRESS | PAGE_PRESENT_WRITABLE, GuestAddress(PML4_ADDRESS))?;
    for gib in 0..PD_COUNT {
        let directory = PD_ADDRESS + gib * 0x1000;
        memory.write_obj(directory | PAGE_PRESENT_WRITABLE, GuestAddress(PDPT_ADDRESS + gib * 8))?;
        let mut pages = [0u8; 4096];
        for (index, page) in pages.chunks_exact_mut(8).enumerate() {
            let entry = (gib << 30) | ((index as u64) << 21) | PAGE_HUGE | PAGE_PRESENT_WRITABLE;
            page.copy_from_slice(&entry.to_le_bytes());
        }
        memory.write_slice(&pages, GuestAddress(directory))?;
    }
    Ok(())
}

/// Segment, control and table registers for `entry`, over what KVM gave at reset.
pub fn system_registers(mut registers: kvm_sregs, entry: Entry) -> kvm_sregs {
    let descriptors = descriptors(entry);
    let at = |index: u16| segment(descriptors[usize::from(index)], index);
    registers.cs = at(CODE_INDEX);
    let data = at(DATA_INDEX);
    (registers.ds, registers.es, registers.fs, registers.gs, registers.ss) = (data, data, data, data, data);
    registers.tr = at(TASK_INDEX);
    registers.gdt.base = GDT_ADDRESS;
    registers.gdt.limit = (size_of_val(&descriptors) - 1) as u16;
    registers.idt.base = IDT_ADDRESS;
    registers.idt.limit = 7;
    match entry {
        Entry::Long(_) => {
            registers.cr3 = PML4_ADDRESS;
            registers.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
            registers.cr0 = CR0_PROTECTION | CR0_EXTENSION_TYPE | CR0_PAGING;
            registers.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
        }
        Entry::Pvh(_) => {
            registers.cr0 = CR0_PROTECTION | CR0_EXTENSION_TYPE;
            registers.cr4 = 0;
        }
    }
    registers
}

/// General registers at the first instruction.
pub fn general_registers(entry: Entry) -> kvm_regs {
    let registers = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Long(address) => kvm_regs {
            rip: address,
            rsp: BOOT_STACK_ADDRESS,
            rbp: BOOT_STACK_ADDRESS,
            rsi: ZERO_PAGE_ADDRESS,
            ..registers
        },
        Entry::Pvh(address) => kvm_regs { rip: address.into(), rbx: PVH_START_INFO_ADDRESS, ..registers },
    }
}

/// FPU state as after FNINIT: all exceptions masked.
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Model specific registers that firmware would have set. All others keep KVM's reset value, which for them is what firmware
/// leaves (zero), so they are not written.
///
/// | register | value | why |
/// |---|---|---|
/// | IA32_MISC_ENABLE (0x1a0) | fast strings | kernels take their absence for an erratum and copy slowly |
/// | IA32_MTRR_DEF_TYPE (0x2ff) | enabled, write-back | without it Linux believes all memory uncached and says so for each region |
pub fn boot_msrs() -> Result<Msrs, vmm_sys_util::fam::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry(0x1a0, 1), entry(0x2ff, (1 << 11) | 6)])
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn descriptors_survive_the_way_through_kvm_segments() {
        let code = segment(descriptors(Entry::Long(0))[2], 2);
        assert_eq!((code.selector, code.base, code.limit), (0x10, 0, 0xffff_ffff));
        assert_eq!((code.l, code.db, code.s, code.present, code.type_), (1, 0, 1, 1, 0xb));
        let code32 = segment(descriptors(Entry::Pvh(0))[2], 2);
        assert_eq!((code32.l, code32.db), (0, 1));
        let task = segment(descriptors(Entry::Long(0))[4], 4);
        assert_eq!((task.s, task.type_, task.limit, task.g), (0, 0xb, 0x67, 0));
        let far = segment(descriptor(0xc093, 0x1234_5678, 0xf_ffff), 3);
        assert_eq!(far.base, 0x1234_5678);
    }

    #[test]
    fn page_tables_map_the_first_4_gib_onto_itself() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_tables(&memory, Entry::Long(0x10_0000)).unwrap();
        let read = |address: u64| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        for address in [0u64, 0x20_0000, 0x4000_0000, 0xffff_f000] {
            let directory_pointer = read(PML4_ADDRESS + (address >> 39) * 8) & !0xfff;
            let directory = read(directory_pointer + ((address >> 30) & 511) * 8) & !0xfff;
            let page = read(directory + ((address >> 21) & 511) * 8);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(page & 0xff, PAGE_HUGE | PAGE_PRESENT_WRITABLE);
        }
    }
}
