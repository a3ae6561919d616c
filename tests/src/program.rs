//! Programs that need nothing but a kernel, made byte by byte, for guests that have no compiler. Called by the cases.

/// Where a program is loaded.
const BASE: u64 = 0x40_0000;
/// Lengths of the file header and of the one program header (ELF-64 object file format, version 1.5).
const HEADERS_LEN: u64 = 64 + 56;

/// The smallest ELF file that runs this code: one segment, readable and executable, entered at its first instruction.
#[must_use]
pub fn static_program(code: &[u8]) -> Vec<u8> {
    // 64-bit, little-endian, version 1; an executable for x86-64.
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0, 1, 0, 0, 0];
    elf.extend((BASE + HEADERS_LEN).to_le_bytes());
    elf.extend(64u64.to_le_bytes()); // program headers
    elf.extend(0u64.to_le_bytes()); // no sections
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    let size = HEADERS_LEN + code.len() as u64;
    for field in [0, BASE, BASE, size, size, 0x1000] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// A program that does nothing but exit with this code (system call 60).
#[must_use]
pub fn exiting_program(code: u8) -> Vec<u8> {
    static_program(&[0xbf, code, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x0f, 0x05])
}
