//! The local APIC's two legacy inputs, set as firmware leaves them.
//!
//! Linux without ACPI runs its timer check through the virtual wire (LINT0 as ExtINT) before it takes the IO-APIC into use.

use kvm_bindings::kvm_lapic_state;

/// Offset of the LINT0 entry of the local vector table (Intel SDM volume 3, section 10.5.1).
const LINT0_OFFSET: usize = 0x350;
/// Offset of LINT1.
const LINT1_OFFSET: usize = 0x360;
/// Delivery mode field.
const MODE_MASK: u32 = 0b111 << 8;
/// Delivery mode: non-maskable interrupt.
const MODE_NMI: u32 = 0b100 << 8;
/// Delivery mode: external (8259) interrupt.
const MODE_EXTERNAL: u32 = 0b111 << 8;

/// Sets the delivery modes of LINT0 and LINT1 in `state`.
pub fn set_local_inputs(state: &mut kvm_lapic_state) {
    for (offset, mode) in [(LINT0_OFFSET, MODE_EXTERNAL), (LINT1_OFFSET, MODE_NMI)] {
        let register = &mut state.regs[offset..offset + 4];
        let mut bytes = [0u8; 4];
        for (byte, value) in bytes.iter_mut().zip(register.iter()) {
            *byte = value.to_ne_bytes()[0];
        }
        let value = (u32::from_le_bytes(bytes) & !MODE_MASK) | mode;
        for (slot, byte) in register.iter_mut().zip(value.to_le_bytes()) {
            *slot = std::ffi::c_char::from_ne_bytes([byte]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_delivery_modes_change() {
        let mut state = kvm_lapic_state::default();
        // LINT0 masked with vector 0xff, as after reset with garbage in the mode.
        for (index, byte) in 0x0001_02ffu32.to_le_bytes().into_iter().enumerate() {
            state.regs[LINT0_OFFSET + index] = std::ffi::c_char::from_ne_bytes([byte]);
        }
        set_local_inputs(&mut state);
        let read = |offset: usize| {
            u32::from_le_bytes([0, 1, 2, 3].map(|index: usize| state.regs[offset + index].to_ne_bytes()[0]))
        };
        assert_eq!(read(LINT0_OFFSET), 0x0001_07ff);
        assert_eq!(read(LINT1_OFFSET), 0x0000_0400);
    }
}
