//! What the guest's processors say of themselves: KVM's supported CPUID, normalised.
//!
//! | leaf | change | why |
//! |---|---|---|
//! | 1 EBX | own APIC id, logical processors, CLFLUSH line 64 bytes | must agree with the MP table |
//! | 1 ECX | hypervisor bit set; TSC deadline set when KVM's APIC has it; VMX, monitor, performance capabilities off | no nested virtualisation (attack surface), MWAIT would exit, no PMU |
//! | 1 EDX | HTT set with more than one processor | else kernels ignore the topology leaves |
//! | 4, 0x8000001d | each cache shared by one processor, the last level by all | the host's sharing would describe processors that are not there |
//! | 6 | zero but ARAT | no turbo, no energy hints, thermal events are the host's affair; the APIC timer does not stop |
//! | 7.0 EBX | HLE, RTM, SGX off; 7.0 ECX: SGX launch control off | transactional memory leaks (TAA); no enclaves |
//! | 0xa | zero | no performance counters: they see neighbours |
//! | 0xb, 0x1f | one thread per core, `cpus` cores, own x2APIC id | as above |
//! | 0x12, 0x14 | zero | SGX, processor trace |
//! | 0x80000001 ECX | SVM off | no nested virtualisation |
//! | 0x80000008 ECX | core count and APIC id width | AMD's topology |
//! | 0x8000000a | zero | SVM details |
//! | 0x8000001e | own APIC id, one thread per core, node 0 | AMD's topology |
//! | 0x40000000… | as KVM gives them | kvmclock, PV EOI, PV IPIs, async page faults: all speed up a guest |
//!
//! Everything else is passed on: mitigations work on what the hardware really is. Pure; `engine/kvm` gives it KVM's answer.

use kvm_bindings::kvm_cpuid_entry2;

/// Bits named for what they say (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E).
mod bit {
    pub(super) const LEAF1_ECX_MONITOR: u32 = 1 << 3;
    pub(super) const LEAF1_ECX_VMX: u32 = 1 << 5;
    pub(super) const LEAF1_ECX_PERFORMANCE_CAPABILITIES: u32 = 1 << 15;
    pub(super) const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
    pub(super) const LEAF1_EDX_HTT: u32 = 1 << 28;
    pub(super) const LEAF6_EAX_ARAT: u32 = 1 << 2;
    pub(super) const LEAF7_EBX_SGX: u32 = 1 << 2;
    pub(super) const LEAF7_EBX_HLE: u32 = 1 << 4;
    pub(super) const LEAF7_EBX_RTM: u32 = 1 << 11;
    pub(super) const LEAF7_ECX_SGX_LAUNCH: u32 = 1 << 30;
    pub(super) const EXTENDED1_ECX_SVM: u32 = 1 << 2;
}

/// CLFLUSH line in units of 8 bytes.
const CLFLUSH_UNITS: u32 = 8;
/// Levels of leaf 0xb (bits 8 to 15 of ECX).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// One processor among those of its guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Processor {
    /// Its number, which is its APIC id.
    pub id: u8,
    /// How many there are, at least 1.
    pub cpus: u8,
    /// Whether KVM's local APIC has the TSC deadline timer.
    pub tsc_deadline_timer: bool,
}

impl Processor {
    /// Bits an APIC id needs.
    fn id_width(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}

/// KVM's `supported` leaves as `processor` shows them.
pub fn normalise(supported: &[kvm_cpuid_entry2], processor: Processor) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<kvm_cpuid_entry2> =
        supported.iter().filter(|leaf| !matches!(leaf.function, 0xb | 0x1f)).copied().collect();
    for leaf in &mut leaves {
        normalise_leaf(leaf, processor);
    }
    let highest = supported.iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    for function in [0xb, 0x1f] {
        if highest >= function {
            leaves.extend(topology(function, processor));
        }
    }
    leaves
}

fn normalise_leaf(leaf: &mut kvm_cpuid_entry2, processor: Processor) {
    let (id, cpus) = (u32::from(processor.id), u32::from(processor.cpus));
    match (leaf.function, leaf.index) {
        (1, _) => {
            leaf.ebx = (leaf.ebx & 0xff) | (CLFLUSH_UNITS << 8) | (cpus << 16) | (id << 24);
            leaf.ecx &= !(bit::LEAF1_ECX_MONITOR | bit::LEAF1_ECX_VMX | bit::LEAF1_ECX_PERFORMANCE_CAPABILITIES);
            leaf.ecx |= bit::LEAF1_ECX_HYPERVISOR;
            set(&mut leaf.ecx, bit::LEAF1_ECX_TSC_DEADLINE, processor.tsc_deadline_timer);
            set(&mut leaf.edx, bit::LEAF1_EDX_HTT, cpus > 1);
        }
        (4 | 0x8000_001d, _) => {
            let level = (leaf.eax >> 5) & 0b111;
            let sharing = if level >= 3 { cpus - 1 } else { 0 };
            leaf.eax = (leaf.eax & 0x3fff) | (sharing << 14);
            if leaf.function == 4 && leaf.eax & 0x1f != 0 {
                leaf.eax |= (cpus - 1) << 26;
            }
        }
        (6, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (leaf.eax & bit::LEAF6_EAX_ARAT, 0, 0, 0),
        (7, 0) => {
            leaf.ebx &= !(bit::LEAF7_EBX_SGX | bit::LEAF7_EBX_HLE | bit::LEAF7_EBX_RTM);
            leaf.ecx &= !bit::LEAF7_ECX_SGX_LAUNCH;
        }
        (0xa | 0x12 | 0x14 | 0x8000_000a, _) => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        (0x8000_0001, _) => leaf.ecx &= !bit::EXTENDED1_ECX_SVM,
        (0x8000_0008, _) => leaf.ecx = (processor.id_width() << 12) | (cpus - 1),
        (0x8000_001e, _) => (leaf.eax, leaf.ebx, leaf.ecx) = (id, id, 0),
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

/// The extended topology leaf: threads of a core, cores of the package, end.
fn topology(function: u32, processor: Processor) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        flags: 1,
        eax: shift,
        ebx: count,
        ecx: index | (kind << 8),
        edx: processor.id.into(),
        ..Default::default()
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, processor.id_width(), processor.cpus.into(), LEVEL_CORE), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index)).unwrap()
    }

    #[test]
    fn dangerous_features_are_off_whatever_kvm_offers() {
        let supported: Vec<_> =
            [0, 1, 4, 6, 7, 0xa, 0xb, 0x12, 0x14, 0x8000_0001, 0x8000_000a].map(|f| leaf(f, 0)).to_vec();
        let leaves = normalise(&supported, Processor { id: 0, cpus: 1, tsc_deadline_timer: false });
        let one = find(&leaves, 1, 0);
        assert_eq!(one.ecx & (1 << 3 | 1 << 5 | 1 << 15 | 1 << 24), 0, "monitor, VMX, PMU, TSC deadline");
        assert_eq!(one.ecx >> 31, 1, "hypervisor");
        assert_eq!(one.edx & (1 << 28), 0, "HTT with one processor");
        let seven = find(&leaves, 7, 0);
        assert_eq!(seven.ebx & (1 << 2 | 1 << 4 | 1 << 11), 0);
        assert_eq!(find(&leaves, 0x8000_0001, 0).ecx & 4, 0, "SVM");
        for function in [0xa, 0x12, 0x14, 0x8000_000a] {
            let leaf = find(&leaves, function, 0);
            assert_eq!(leaf.eax | leaf.ebx | leaf.ecx | leaf.edx, 0, "leaf {function:#x}");
        }
    }

    #[test]
    fn every_topology_leaf_tells_the_same_story() {
        let supported: Vec<_> =
            [leaf(0, 0), leaf(1, 0), leaf(4, 0), leaf(0xb, 0), leaf(0x8000_0008, 0), leaf(0x8000_001e, 0)].to_vec();
        for cpus in 1..=32u8 {
            for id in 0..cpus {
                let leaves = normalise(&supported, Processor { id, cpus, tsc_deadline_timer: true });
                let one = find(&leaves, 1, 0);
                assert_eq!(((one.ebx >> 24) as u8, (one.ebx >> 16) as u8), (id, cpus));
                assert_eq!(one.ecx & (1 << 24), 1 << 24);
                let cores = find(&leaves, 0xb, 1);
                assert_eq!((cores.ebx, cores.edx), (u32::from(cpus), u32::from(id)));
                assert!(1u32 << cores.eax >= u32::from(cpus), "ids fit the width");
                assert_eq!(find(&leaves, 0xb, 0).ebx, 1, "one thread per core");
                assert_eq!(find(&leaves, 0x8000_0008, 0).ecx & 0xff, u32::from(cpus) - 1);
                assert_eq!(find(&leaves, 0x8000_001e, 0).eax, u32::from(id));
                assert_eq!(leaves.iter().filter(|leaf| leaf.function == 0xb).count(), 3);
            }
        }
    }
}
