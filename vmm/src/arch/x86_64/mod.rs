//! x86-64: memory map, kernel loading, boot tables, CPUID, registers.
//!
//! ```text
//!  kernel ──► LoadedKernel (entry, protocol)        cpuid, registers, interrupts ──► each vCPU
//!                 │
//!  boot_data ◄────┘  zero page or PVH start info, command line, MP table, page tables ──► guest memory
//! ```
//!
//! Called by `engine/kvm` between the making of the VM and the first instruction, and by its probe. No function here keeps state.

pub mod boot_data;
pub mod cpuid;
pub mod interrupts;
pub mod kernel;
pub mod layout;
pub mod memory_map;
pub mod mp_table;
pub mod registers;
pub mod relocation;
