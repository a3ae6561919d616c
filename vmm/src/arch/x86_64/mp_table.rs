//! The MultiProcessor table (Intel MultiProcessor Specification 1.4), our stand-in for ACPI: processors, one ISA bus, the IO-APIC
//! and its 24 lines.
//!
//! Linux finds the floating pointer by scanning the last KiB of base memory, where [`write`] puts it with the table behind it.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{IO_APIC_ADDRESS, IRQ_LAST, LOCAL_APIC_ADDRESS, MP_TABLE_ADDRESS, MP_TABLE_END};
use crate::memory::GuestMap;

/// Most processors the table has room for, and the product supports.
pub const CPUS_MAX: u8 = 32;

/// Entry types (section 4.3).
const TYPE_PROCESSOR: u8 = 0;
const TYPE_BUS: u8 = 1;
const TYPE_IO_APIC: u8 = 2;
const TYPE_IO_INTERRUPT: u8 = 3;
const TYPE_LOCAL_INTERRUPT: u8 = 4;
/// Interrupt types (table 4-10).
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
/// Version of an APIC that is not an 82489DX.
const APIC_VERSION: u8 = 0x14;
/// Addresses every local APIC.
const ALL_LOCAL_APICS: u8 = 0xff;
/// Our only bus.
const ISA_BUS: u8 = 0;

const HEADER_SIZE: usize = 44;
const FLOATING_POINTER_SIZE: usize = 16;
const TABLE_SIZE_MAX: usize =
    FLOATING_POINTER_SIZE + HEADER_SIZE + CPUS_MAX as usize * 20 + 8 * (1 + 1 + (IRQ_LAST as usize + 1) + 2);
const _: () = assert!(TABLE_SIZE_MAX <= (MP_TABLE_END - MP_TABLE_ADDRESS) as usize, "the table fits the last KiB");

/// The byte that makes `bytes` sum to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// Writes floating pointer and table for `cpus` processors (1 to [`CPUS_MAX`]).
pub fn write(memory: &GuestMap, cpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&build(cpus), GuestAddress(MP_TABLE_ADDRESS))
}

fn build(cpus: u8) -> Vec<u8> {
    let cpus = cpus.clamp(1, CPUS_MAX);
    let io_apic_id = cpus;
    let mut entries = Vec::with_capacity(TABLE_SIZE_MAX);
    let mut count = 0u16;
    let mut push = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..cpus {
        // Flags: enabled, and the first one boots. Signature and feature words are not read by kernels with CPUID.
        let flags = 1 | if id == 0 { 2 } else { 0 };
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[TYPE_PROCESSOR, id, APIC_VERSION, flags]);
        // Family 6 and the APIC feature bit.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        push(&entry);
    }
    push(&[TYPE_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut io_apic = [TYPE_IO_APIC, io_apic_id, APIC_VERSION, 1, 0, 0, 0, 0];
    io_apic[4..].copy_from_slice(&(IO_APIC_ADDRESS as u32).to_le_bytes());
    push(&io_apic);
    for line in 0..=IRQ_LAST as u8 {
        // Flags 0: polarity and trigger as the bus has them, which for ISA is rising edge. That is how irqfd pulses.
        push(&[TYPE_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, ISA_BUS, line, io_apic_id, line]);
    }
    push(&[TYPE_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    push(&[TYPE_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let mut header = [0u8; HEADER_SIZE];
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    header[6] = 4;
    header[8..16].copy_from_slice(b"MSB     ");
    header[16..28].copy_from_slice(b"MICROVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&(LOCAL_APIC_ADDRESS as u32).to_le_bytes());
    let sum = checksum(&header).wrapping_add(checksum(&entries));
    header[7] = sum;

    let mut table = vec![0u8; FLOATING_POINTER_SIZE];
    table[..4].copy_from_slice(b"_MP_");
    let table_address = MP_TABLE_ADDRESS as u32 + FLOATING_POINTER_SIZE as u32;
    table[4..8].copy_from_slice(&table_address.to_le_bytes());
    table[8] = 1;
    table[9] = 4;
    table[10] = checksum(&table);
    table.extend_from_slice(&header);
    table.extend_from_slice(&entries);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_lengths_hold_for_every_size() {
        for cpus in 1..=CPUS_MAX {
            let table = build(cpus);
            assert!(table.len() <= (MP_TABLE_END - MP_TABLE_ADDRESS) as usize);
            assert_eq!(checksum(&table[..16]), 0, "{cpus} cpus: floating pointer");
            let length = usize::from(u16::from_le_bytes([table[20], table[21]]));
            assert_eq!(length, table.len() - 16);
            assert_eq!(checksum(&table[16..]), 0, "{cpus} cpus: table");
            let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
            assert_eq!(count, u16::from(cpus) + 1 + 1 + 24 + 2);
            let processors = table[60..].chunks(20).take(cpus.into()).filter(|entry| entry[0] == TYPE_PROCESSOR);
            assert_eq!(processors.count(), usize::from(cpus));
        }
    }
}
