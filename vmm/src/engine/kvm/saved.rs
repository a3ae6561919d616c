//! What a machine on KVM is besides its memory: processors, interrupt controllers, timer, clock, device registers. Written down of a machine
//! that stands, and put into a fresh one.
//!
//! ```text
//!  saved:    each vCPU's own thread reads its vCPU (and the first one the VM) while all are parked; devices stand between two events
//!  restored: fits? (format, size, processor) ─► VM and vCPUs set ─► jail closed ─► devices started ─► vCPUs go on
//! ```
//!
//! The file may be somebody else's. Everything in it is the guest's to choose anyway: KVM checks what it is given as it does any VMM's,
//! rings are checked as a driver's, numbers have bounds here. What does not fit is refused in words, before anything runs.
#![expect(unsafe_code, reason = "KVM_SET_XSAVE takes a structure whose size depends on the host")]

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::transport::mmio::saved::SavedTransport;

/// The format that this build writes: since 2 with the guest's kernel.
const FORMAT: u32 = 2;
/// The oldest that it reads.
const FORMAT_MIN: u32 = 1;
/// Largest file, in bytes: 32 processors with all their registers, several times over.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Most CPUID leaves and most MSRs of a processor.
const CPUID_LEAVES_MAX: usize = 256;
const MSRS_MAX: usize = 1024;
/// The deadline of the local APIC's timer: means something once the counter it refers to is set.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Names of features, as /proc/cpuinfo has them, that differ between processors people have.
const FLAGS: &[(u32, &str, u32, &str)] = &[
    (1, "ecx", 0, "sse3"),
    (1, "ecx", 1, "pclmulqdq"),
    (1, "ecx", 9, "ssse3"),
    (1, "ecx", 12, "fma"),
    (1, "ecx", 13, "cx16"),
    (1, "ecx", 17, "pcid"),
    (1, "ecx", 19, "sse4_1"),
    (1, "ecx", 20, "sse4_2"),
    (1, "ecx", 21, "x2apic"),
    (1, "ecx", 22, "movbe"),
    (1, "ecx", 23, "popcnt"),
    (1, "ecx", 24, "tsc_deadline_timer"),
    (1, "ecx", 25, "aes"),
    (1, "ecx", 26, "xsave"),
    (1, "ecx", 28, "avx"),
    (1, "ecx", 29, "f16c"),
    (1, "ecx", 30, "rdrand"),
    (7, "ebx", 0, "fsgsbase"),
    (7, "ebx", 3, "bmi1"),
    (7, "ebx", 5, "avx2"),
    (7, "ebx", 7, "smep"),
    (7, "ebx", 8, "bmi2"),
    (7, "ebx", 9, "erms"),
    (7, "ebx", 10, "invpcid"),
    (7, "ebx", 16, "avx512f"),
    (7, "ebx", 18, "rdseed"),
    (7, "ebx", 19, "adx"),
    (7, "ebx", 20, "smap"),
    (7, "ebx", 23, "clflushopt"),
    (7, "ebx", 24, "clwb"),
    (7, "ebx", 29, "sha_ni"),
    (7, "ebx", 30, "avx512bw"),
    (7, "ebx", 31, "avx512vl"),
    (7, "ecx", 2, "umip"),
    (7, "ecx", 3, "pku"),
    (7, "ecx", 8, "gfni"),
    (7, "ecx", 9, "vaes"),
    (7, "ecx", 10, "vpclmulqdq"),
    (7, "ecx", 16, "la57"),
    (7, "ecx", 22, "rdpid"),
    (0x8000_0001, "ecx", 0, "lahf_lm"),
    (0x8000_0001, "ecx", 5, "abm"),
    (0x8000_0001, "ecx", 6, "sse4a"),
    (0x8000_0001, "ecx", 8, "3dnowprefetch"),
    (0x8000_0001, "edx", 26, "pdpe1gb"),
    (0x8000_0001, "edx", 27, "rdtscp"),
];

/// Why a file is no machine that this build can go on with.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// Another generation wrote it.
    #[error("it has format {0}, this msb knows {FORMAT_MIN} to {FORMAT}")]
    Format(u32),
    /// It is not what was written.
    #[error("{0}")]
    Damaged(String),
}

/// A machine without its memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMachine {
    format: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The host's kernel, for people.
    host_kernel: String,
    /// The fingerprint of the guest's kernel.
    #[serde(default)]
    pub kernel: Option<String>,
    /// In the order of their slots.
    pub devices: Vec<SavedTransport>,
    /// Interrupt controllers, timer, clock.
    pub vm: SavedVm,
    /// In the order of their numbers.
    pub vcpus: Vec<SavedVcpu>,
}

/// What all processors share.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVm {
    chips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
}

/// One processor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVcpu {
    /// Its number.
    pub id: u8,
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// What one vCPU's thread writes down.
pub type Part = Result<(SavedVcpu, Option<SavedVm>), String>;

/// What a vCPU's thread needs for that.
pub struct Writer {
    /// The vCPU's number.
    pub id: u8,
    /// What it says of itself.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Numbers of the MSRs that KVM can save.
    pub msrs: Arc<Vec<u32>>,
    /// The VM, for one of them.
    pub vm: Option<Arc<VmFd>>,
}

/// A KVM call that failed, in words.
fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> String {
    move |error| format!("kvm: {what}: {}", std::io::Error::from_raw_os_error(error.errno()))
}

impl Writer {
    /// Writes `vcpu` down, which its own thread does while it is out of the guest with no access under way.
    pub fn write(&self, vcpu: &VcpuFd) -> Part {
        let vm = self.vm.as_ref().map(|vm| write_vm(vm)).transpose()?;
        let saved = SavedVcpu {
            id: self.id,
            cpuid: self.cpuid.clone(),
            tsc_khz: vcpu.get_tsc_khz().map_err(failed("read the counter's frequency"))?,
            // Before the others: reading it may take in what waits for the processor.
            mp_state: vcpu.get_mp_state().map_err(failed("read the processor's state"))?,
            regs: vcpu.get_regs().map_err(failed("read registers"))?,
            sregs: vcpu.get_sregs().map_err(failed("read system registers"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(failed("read extended registers"))?),
            xcrs: vcpu.get_xcrs().map_err(failed("read extended control registers"))?,
            debug: vcpu.get_debug_regs().map_err(failed("read debug registers"))?,
            lapic: vcpu.get_lapic().map_err(failed("read the local APIC"))?,
            msrs: read_msrs(vcpu, &self.msrs)?,
            events: vcpu.get_vcpu_events().map_err(failed("read pending events"))?,
        };
        Ok((saved, vm))
    }
}

fn write_vm(vm: &VmFd) -> Result<SavedVm, String> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(failed("read an interrupt controller"))?;
        Ok::<_, String>(chip)
    };
    Ok(SavedVm {
        chips: [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .into_iter()
            .map(chip)
            .collect::<Result<_, _>>()?,
        pit: vm.get_pit2().map_err(failed("read the timer"))?,
        clock: vm.get_clock().map_err(failed("read the clock"))?,
    })
}

/// Reads what can be read: KVM names some that this processor does not have, and stops at each of them.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, String> {
    let mut read = Vec::with_capacity(indices.len());
    let mut left: Vec<u32> = indices.to_vec();
    while !left.is_empty() {
        let entries: Vec<kvm_msr_entry> =
            left.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|error| format!("too many MSRs: {error:?}"))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(failed("read MSRs"))?.min(left.len());
        read.extend(msrs.as_slice().iter().take(count).map(|entry| (entry.index, entry.data)));
        left.drain(..(count + 1).min(left.len()));
    }
    Ok(read)
}

impl SavedMachine {
    /// Puts the parts together.
    ///
    /// # Errors
    /// In words: a processor that could not be written down.
    pub fn of(memory_mib: u32, kernel: String, devices: Vec<SavedTransport>, parts: Vec<Part>) -> Result<Self, String> {
        let (mut vcpus, mut vm) = (Vec::with_capacity(parts.len()), None);
        for part in parts {
            let (vcpu, own) = part?;
            vcpus.push(vcpu);
            vm = own.or(vm);
        }
        vcpus.sort_by_key(|vcpu| vcpu.id);
        let vm = vm.ok_or("no vCPU wrote the machine down")?;
        let host_kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Ok(Self { format: FORMAT, memory_mib, host_kernel, kernel: Some(kernel), devices, vm, vcpus })
    }

    /// Reads a file of [`SavedMachine`], and checks everything that needs no machine.
    ///
    /// # Errors
    /// In words.
    pub fn read(file: File) -> Result<Self, SavedError> {
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        let damaged = |error: &dyn std::fmt::Display| SavedError::Damaged(error.to_string());
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| damaged(&error))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(damaged(&format!("it has more than {FILE_BYTES_MAX} bytes")));
        }
        let saved = serde_json::from_slice::<Self>(&bytes);
        let format = match &saved {
            Ok(saved) => saved.format,
            // Of a later format it is the number that is told, not what else is not known of it.
            Err(_) => serde_json::from_slice::<Versioned>(&bytes).map_err(|error| damaged(&error))?.format,
        };
        if !(FORMAT_MIN..=FORMAT).contains(&format) {
            return Err(SavedError::Format(format));
        }
        let saved = saved.map_err(|error| damaged(&error))?;
        let ordered = saved.vcpus.iter().enumerate().all(|(number, vcpu)| usize::from(vcpu.id) == number);
        if saved.vcpus.is_empty() || !ordered || saved.vm.chips.len() != 3 {
            return Err(damaged(&"it contradicts itself"));
        }
        if saved.vcpus.iter().any(|vcpu| vcpu.cpuid.len() > CPUID_LEAVES_MAX || vcpu.msrs.len() > MSRS_MAX) {
            return Err(damaged(&"it has more leaves or registers than a processor"));
        }
        Ok(saved)
    }

    /// Whether this host's processor can be what the saved one was; `here` is what a fresh machine's first one would say of itself.
    ///
    /// # Errors
    /// In words: the maker or the feature that is missing, and on which kernel it was saved.
    pub fn fits(&self, here: &[kvm_cpuid_entry2]) -> Result<(), String> {
        let saved = &self.vcpus[0].cpuid;
        let find = |leaves: &[kvm_cpuid_entry2], function: u32, index: u32| {
            leaves.iter().find(|leaf| leaf.function == function && leaf.index == index).copied().unwrap_or_default()
        };
        let maker = |leaves: &[kvm_cpuid_entry2]| {
            let leaf = find(leaves, 0, 0);
            let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (then, now) = (maker(saved), maker(here));
        if then != now {
            return Err(format!("it was saved on a processor of {then:?}, this one is of {now:?}"));
        }
        type Register = fn(&kvm_cpuid_entry2) -> u32;
        const FEATURES: [(u32, u32, &str, Register); 8] = [
            (1, 0, "ecx", |leaf| leaf.ecx),
            (1, 0, "edx", |leaf| leaf.edx),
            (7, 0, "ebx", |leaf| leaf.ebx),
            (7, 0, "ecx", |leaf| leaf.ecx),
            (0xd, 0, "eax", |leaf| leaf.eax),
            (0x8000_0001, 0, "ecx", |leaf| leaf.ecx),
            (0x8000_0001, 0, "edx", |leaf| leaf.edx),
            (0x4000_0001, 0, "eax", |leaf| leaf.eax),
        ];
        for (function, index, name, register) in FEATURES {
            let missing = register(&find(saved, function, index)) & !register(&find(here, function, index));
            if missing != 0 {
                let bit = missing.trailing_zeros();
                let kernel = &self.host_kernel;
                let flag = FLAGS
                    .iter()
                    .find(|flag| (flag.0, flag.1, flag.2) == (function, name, bit))
                    .map_or("", |flag| flag.3);
                return Err(format!(
                    "this host's processor or kernel lacks a feature that it uses: {flag}{}CPUID leaf {function:#x}, {name} bit {bit} (saved under Linux {kernel})",
                    if flag.is_empty() { "" } else { ", " }
                ));
            }
        }
        Ok(())
    }
}

impl SavedVm {
    /// Puts it into a VM whose vCPUs are set.
    ///
    /// # Errors
    /// In words: what KVM refuses.
    pub fn restore(&self, vm: &VmFd) -> Result<(), String> {
        vm.set_pit2(&self.pit).map_err(failed("set the timer"))?;
        // The guest's clock goes on from where it was: for it no time has passed.
        vm.set_clock(&kvm_clock_data { clock: self.clock.clock, ..Default::default() })
            .map_err(failed("set the clock"))?;
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(failed("set an interrupt controller"))?;
        }
        Ok(())
    }
}

impl SavedVcpu {
    /// What it says of itself.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Puts it into a fresh vCPU whose CPUID is set.
    ///
    /// # Errors
    /// In words: what KVM refuses.
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), String> {
        if vcpu.get_tsc_khz().map_err(failed("read the counter's frequency"))? != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(|_| {
                format!("this host's counter cannot run at the {} kHz that the guest counts with", self.tsc_khz)
            })?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(failed("set the processor's state"))?;
        vcpu.set_regs(&self.regs).map_err(failed("set registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("set system registers"))?;
        // SAFETY: the structure is as large as KVM reads here: machines with more extended state are not saved, and no feature of this
        // process enlarges it (arch_prctl(2), ARCH_REQ_XCOMP_GUEST_PERM is never called).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("set extended registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("set extended control registers"))?;
        vcpu.set_debug_regs(&self.debug).map_err(failed("set debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("set the local APIC"))?;
        self.restore_msrs(vcpu)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("set pending events"))
    }

    fn restore_msrs(&self, vcpu: &VcpuFd) -> Result<(), String> {
        let (deadline, others): (Vec<_>, Vec<_>) = self.msrs.iter().partition(|(index, _)| *index == MSR_TSC_DEADLINE);
        let mut left: Vec<kvm_msr_entry> = others
            .into_iter()
            .chain(deadline)
            .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
            .collect();
        while !left.is_empty() {
            let msrs = Msrs::from_entries(&left).map_err(|error| format!("too many MSRs: {error:?}"))?;
            let count = vcpu.set_msrs(&msrs).map_err(failed("set MSRs"))?;
            if let Some(refused) = left.get(count) {
                // One that is only read, or that this kernel does not let anybody write: it is what it is here.
                tracing::debug!(msr = refused.index, "an MSR keeps its value");
            }
            left.drain(..(count + 1).min(left.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ebx: 0x756e_6547, edx: 0x4965_6e69, ..Default::default() }
    }

    fn machine() -> SavedMachine {
        let vcpu = SavedVcpu {
            id: 0,
            cpuid: vec![leaf(0, 0x6c65_746e), leaf(1, 1 << 12)],
            tsc_khz: 1,
            mp_state: Default::default(),
            regs: kvm_regs { rip: 0xffff_ffff_8100_0000, ..Default::default() },
            sregs: Default::default(),
            xsave: Default::default(),
            xcrs: Default::default(),
            debug: Default::default(),
            lapic: Default::default(),
            msrs: vec![(0x10, u64::MAX), (MSR_TSC_DEADLINE, 7)],
            events: Default::default(),
        };
        let chip = kvm_irqchip::default;
        let vm = SavedVm { chips: vec![chip(), chip(), chip()], pit: Default::default(), clock: Default::default() };
        SavedMachine::of(128, "build-id 00".into(), Vec::new(), vec![Ok((vcpu, Some(vm)))]).expect("a machine")
    }

    fn read(text: &str) -> Result<SavedMachine, SavedError> {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(text.as_bytes()).expect("write");
        file.rewind().expect("rewind");
        SavedMachine::read(file)
    }

    #[test]
    fn what_is_written_is_read_again() {
        let text = serde_json::to_string(&machine()).expect("json");
        let again = read(&text).expect("a machine");
        assert_eq!(again.vcpus[0].regs, machine().vcpus[0].regs);
        assert_eq!(again.vcpus[0].msrs, machine().vcpus[0].msrs);
        assert_eq!(serde_json::to_string(&again).expect("json"), text);
    }

    #[test]
    fn damage_and_strangers_are_refused_in_words() {
        let text = serde_json::to_string(&machine()).expect("json");
        assert!(read(&text[..text.len() - 9]).is_err());
        assert!(
            read(&text.replacen("\"format\":2", "\"format\":3", 1))
                .err()
                .expect("refused")
                .to_string()
                .contains("format 3, this msb knows 1 to 2")
        );
        // What was written before it had the guest's kernel.
        let older = text.replacen("\"format\":2", "\"format\":1", 1).replacen("\"kernel\":\"build-id 00\",", "", 1);
        assert_eq!(read(&older).expect("a machine").kernel, None);
        assert!(read(&text.replacen("\"id\":0", "\"id\":1", 1)).is_err());
        assert!(read(&" ".repeat(1 + FILE_BYTES_MAX as usize)).is_err());
        let saved = machine();
        saved.fits(&[leaf(0, 0x6c65_746e), leaf(1, u32::MAX)]).expect("a better processor");
        let missing = saved.fits(&[leaf(0, 0x6c65_746e), leaf(1, 0)]).expect_err("a lesser one");
        assert!(missing.contains("uses: fma, CPUID leaf 0x1, ecx bit 12"), "{missing}");
        let other = saved.fits(&[leaf(0, 0x444d_4163), leaf(1, u32::MAX)]).expect_err("another maker");
        assert!(other.contains("GenuineIntel"), "{other}");
    }
}
