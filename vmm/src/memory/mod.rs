//! Guest memory: the one type the engines make it with and the devices reach it through.
//!
//! ```text
//!            0          LOW_MEMORY_END        4 GiB
//!  guest     |== low ========|    (hole)        |== high ====...
//!  host      |== mapping 0 ==|                  |== mapping 1 ==...     each aligned to 2 MiB
//! ```
//!
//! Two backings. *Private* anonymous memory for engine kvm: with transparent huge pages it is touched about ten times as fast as a
//! shared memfd, and `MADV_DONTNEED` really frees it. A *shared* memfd where another process must see it (engine qemu, vhost-user);
//! there freeing means punching a hole. Either way nothing is touched here: a page exists once the guest or a loader writes it.
//!
//! Called by `engine/*` (creation), by the balloon ([`reclaim`]) and by every device (through [`GuestRam::map`]). The guest
//! picks addresses and lengths in all but the first, so every access goes through vm-memory's bounds checks. What this module never
//! does: hand out host pointers, lock memory, or write to it.
#![expect(unsafe_code, reason = "maps guest memory and gives pages back with madvise")]

pub mod saved;
pub mod transfer;
pub mod written;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use self::written::Written;
use crate::arch::x86_64::layout::{HIGH_MEMORY_START, LOW_MEMORY_END, MEMORY_MAX_MIB, MEMORY_MIN_MIB};

/// The map devices and loaders read and write through. Cloning shares the memory.
pub type GuestMap = GuestMemoryMmap<()>;

/// Bytes in the smallest unit that can be given back to the host.
const PAGE_SIZE: u64 = 4096;
/// Bytes in a huge page. Host and guest addresses agree modulo this, or neither THP nor the second-level page table can use one.
const HUGE_PAGE_SIZE: usize = 2 << 20;

/// Why guest memory could not be made or given back.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Outside what the product supports.
    #[error("memory of {0} MiB is out of range: {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB} MiB")]
    SizeOutOfRange(u64),
    /// The host refused to map it.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// Size of the mapping that failed, in MiB.
        mib: u64,
        /// The host's reason.
        source: std::io::Error,
    },
    /// The regions do not form a valid map: our own mistake, never the guest's.
    #[error("guest memory layout is inconsistent")]
    Layout,
    /// A range to give back that is not guest memory.
    #[error("{length} bytes at {address:#x} are not guest memory")]
    NotMemory {
        /// First guest-physical address.
        address: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The host refused to take pages back.
    #[error("cannot give guest pages back to the host")]
    Reclaim(#[source] std::io::Error),
}

/// How the host backs guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Anonymous and private to this process (engine kvm).
    Private,
    /// A memfd that another process may map (engine qemu).
    Shared,
    /// A file of saved memory, mapped privately (engine kvm).
    Restored,
}

/// All of one guest's memory.
#[derive(Debug, Clone)]
pub struct GuestRam {
    map: GuestMap,
    backing: Backing,
    /// Present when shared or restored; offset in it equals the running total of the regions before.
    file: Option<Arc<File>>,
    size_bytes: u64,
    /// Says which pages the host holds; none where it cannot be asked, or where nobody will.
    pagemap: Option<Arc<File>>,
    /// The pages that are written first, where that is kept.
    written: Option<Arc<Written>>,
}

/// The guest-physical ranges `(start, length)` in bytes that a guest of `size_bytes` has, in order: one, or two around the hole.
pub fn ranges(size_bytes: u64) -> Vec<(u64, u64)> {
    let low = size_bytes.min(LOW_MEMORY_END);
    let mut ranges = vec![(0, low)];
    if size_bytes > low {
        ranges.push((HIGH_MEMORY_START, size_bytes - low));
    }
    ranges
}

impl GuestRam {
    /// Private memory of `size_mib` MiB, zero and untouched.
    pub fn private(size_mib: u64) -> Result<Self, MemoryError> {
        Self::build(size_mib, Backing::Private, None)
    }

    /// Memory of `size_mib` MiB in a sealed memfd.
    pub fn shared(size_mib: u64) -> Result<Self, MemoryError> {
        Self::build(size_mib, Backing::Shared, None)
    }

    fn build(size_mib: u64, backing: Backing, saved: Option<Arc<File>>) -> Result<Self, MemoryError> {
        if !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&size_mib) {
            return Err(MemoryError::SizeOutOfRange(size_mib));
        }
        let size_bytes = size_mib << 20;
        let file = match backing {
            Backing::Private => None,
            Backing::Restored => saved,
            Backing::Shared => {
                Some(Arc::new(memfd(size_bytes).map_err(|source| MemoryError::Map { mib: size_mib, source })?))
            }
        };
        let mut regions = Vec::with_capacity(2);
        let mut file_offset = 0;
        for (start, length) in ranges(size_bytes) {
            let region = map_region(length, file.as_ref().map(|file| (Arc::clone(file), file_offset)), backing)
                .map_err(|source| MemoryError::Map { mib: length >> 20, source })?;
            regions.push(GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::Layout)?);
            file_offset += length;
        }
        let map = GuestMap::from_regions(regions).map_err(|_| MemoryError::Layout)?;
        // Opened here: a jailed process may not, where it is not root's.
        let pagemap = if backing == Backing::Shared { None } else { File::open(saved::PAGEMAP).ok().map(Arc::new) };
        Ok(GuestRam { map, backing, file, size_bytes, pagemap, written: None })
    }

    /// The map to read and write through.
    pub fn map(&self) -> &GuestMap {
        &self.map
    }

    /// How the host backs it.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The memfd, when shared.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    /// Size in bytes, without the hole.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of guest memory that the host really holds at this moment, by `mincore`. Costs a byte of scratch per guest page of
    /// 64 MiB at a time; for `Sample` requests and tests, not for hot paths.
    pub fn resident_bytes(&self) -> u64 {
        const CHUNK: usize = 64 << 20;
        let mut pages = 0u64;
        let mut present = vec![0u8; CHUNK / PAGE_SIZE as usize];
        for region in self.map.iter() {
            let size = region.len() as usize;
            for start in (0..size).step_by(CHUNK) {
                let length = CHUNK.min(size - start);
                // SAFETY: the range lies inside the region's mapping, and `present` has a byte for each of its pages.
                let result = unsafe { libc::mincore(region.as_ptr().add(start).cast(), length, present.as_mut_ptr()) };
                if result == 0 {
                    let seen = &present[..length.div_ceil(PAGE_SIZE as usize)];
                    pages += seen.iter().filter(|&&byte| byte & 1 == 1).count() as u64;
                }
            }
        }
        pages * PAGE_SIZE
    }
}

/// Gives the whole pages inside `[address, address + length)` back to the host; they read as zero afterwards, or as what the guest was made
/// of if it was restored. Returns the bytes given back, rounded inwards to whole pages.
///
/// The guest picks both numbers (free page reporting, balloon): a range that is not entirely inside one region is refused.
pub fn reclaim(map: &GuestMap, address: GuestAddress, length: u64) -> Result<u64, MemoryError> {
    let refused = || MemoryError::NotMemory { address: address.0, length };
    let end = address.0.checked_add(length).ok_or_else(refused)?;
    let region = map.find_region(address).ok_or_else(refused)?;
    let region_start = region.start_addr().0;
    if end - region_start > region.len() {
        return Err(refused());
    }
    // Cannot overflow: `address` lies in a region, and regions end far below u64::MAX.
    let first = (address.0 - region_start).next_multiple_of(PAGE_SIZE);
    let last = (end - region_start) / PAGE_SIZE * PAGE_SIZE;
    if first >= last {
        return Ok(0);
    }
    let count = last - first;
    match region.file_offset() {
        Some(file) => {
            let flags =
                nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // At most 64 GiB: both fit.
            let (start, count) = ((file.start() + first) as i64, count as i64);
            nix::fcntl::fallocate(file.file(), flags, start, count)
                .map_err(|error| MemoryError::Reclaim(error.into()))?;
        }
        None => {
            // SAFETY: [first, last) was checked to lie inside this region, whose mapping lives as long as the process does. The
            // pages are only ever reached by volatile accesses through vm-memory, so their turning to zero breaks no reference.
            let result = unsafe {
                libc::madvise(region.as_ptr().add(first as usize).cast(), count as usize, libc::MADV_DONTNEED)
            };
            if result != 0 {
                return Err(MemoryError::Reclaim(std::io::Error::last_os_error()));
            }
        }
    }
    Ok(count)
}

/// A memfd of `size_bytes` that can neither grow nor shrink, so that no mapping of it can ever fault with SIGBUS.
fn memfd(size_bytes: u64) -> std::io::Result<File> {
    use nix::fcntl::{FcntlArg, SealFlag};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let fd = memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(size_bytes)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    nix::fcntl::fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Maps `length` bytes at an address that is a multiple of the huge page size.
///
/// Anonymous mappings are only aligned by themselves since Linux 6.7, so the alignment is made here: reserve too much, keep the
/// aligned part. The mapping is never undone: guest memory lives exactly as long as the process, which is one VM's, and device
/// threads hold clones of the map until the last moment.
fn map_region(
    length: u64,
    file: Option<(Arc<File>, u64)>,
    backing: Backing,
) -> std::io::Result<vm_memory::MmapRegion<()>> {
    let length = usize::try_from(length).map_err(std::io::Error::other)?;
    let reserve_length = length + HUGE_PAGE_SIZE;
    let reserve_flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
    let reserved = unsafe { libc::mmap(std::ptr::null_mut(), reserve_length, libc::PROT_NONE, reserve_flags, -1, 0) };
    if reserved == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    let aligned = reserved.map_addr(|address| address.next_multiple_of(HUGE_PAGE_SIZE));
    let head = aligned.addr() - reserved.addr();
    let (flags, fd, offset) = match &file {
        // MAP_NORESERVE: the guest's size is a promise to the guest, not to the host's overcommit accounting.
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0),
        Some((file, offset)) => {
            let kind = if backing == Backing::Shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
            (kind | libc::MAP_NORESERVE, file.as_raw_fd(), *offset)
        }
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: [aligned, aligned + length) lies inside the reservation made above, which nothing else knows of, so replacing it with
    // MAP_FIXED and giving back the two ends destroys nobody's mapping.
    let mapped = unsafe {
        if head > 0 {
            libc::munmap(reserved, head);
        }
        libc::munmap(aligned.add(length), HUGE_PAGE_SIZE - head);
        libc::mmap(aligned, length, protection, flags | libc::MAP_FIXED, fd, offset as libc::off_t)
    };
    if mapped == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: advice on the mapping just made. Both are wishes: a host without THP answers EINVAL, which changes nothing.
    unsafe {
        libc::madvise(mapped, length, libc::MADV_DONTDUMP);
        if file.is_none() {
            libc::madvise(mapped, length, libc::MADV_HUGEPAGE);
        }
    }
    let mut builder = MmapRegionBuilder::new(length).with_mmap_prot(protection).with_mmap_flags(flags);
    // The pages of a private mapping are this process's own, and are given back as anonymous ones are: never by a hole in a file that
    // other machines are made of.
    if let Some((file, offset)) = file.filter(|_| backing == Backing::Shared) {
        builder = builder.with_file_offset(FileOffset::from_arc(file, offset));
    }
    // SAFETY: `mapped` is a mapping of exactly `length` bytes, and it is never unmapped.
    let builder = unsafe { builder.with_raw_mmap_pointer(mapped.cast()) };
    builder.build().map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests;
