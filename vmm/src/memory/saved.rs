//! Guest memory as a sparse file: written down page by page of a machine that stands, and mapped privately by the machines made of it.
//!
//! ```text
//!  file    |== low ==|== high ====...       region after region, without the hole of the address space; pages of zeros are holes
//!  saved:   pages that the host holds for the guest (pagemap), and those of the file below it (SEEK_DATA), less those of zeros
//!  restored: mmap(MAP_PRIVATE): what a machine writes is its own, everything else is the file's pages, shared by all of them
//! ```
//!
//! Called by `engine/kvm` on machines whose vCPUs and devices stand. It only reads guest memory, and never trusts the file: a page is a page,
//! and one that is missing at the file's end is refused before anything is mapped.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use vm_memory::{
    GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, VolatileMemoryError, WriteVolatile,
};

use super::written::Written;
use super::{Backing, GuestRam, MemoryError, PAGE_SIZE};

/// Where the kernel says which pages of a process there are (proc(5)): eight bytes each.
pub(super) const PAGEMAP: &str = "/proc/self/pagemap";
/// Present, or in swap.
const HELD: u64 = 1 << 63 | 1 << 62;
/// Pages looked at in one step.
const STEP_PAGES: u64 = 16 << 10;
/// Bytes of a page that are looked at in one step: most pages show at once that they are not of zeros.
const LOOK_BYTES: usize = 512;

impl GuestRam {
    /// Memory of `size_mib` MiB whose content is that of `file`, privately: what is written stays here. The pages that `written` names are its own
    /// at once.
    ///
    /// # Errors
    /// A file of another size, or what the host says.
    pub fn restored(size_mib: u64, file: File, written: Option<Written>) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Map { mib: size_mib, source };
        let found = file.metadata().map_err(failed)?.len();
        if found != size_mib << 20 {
            return Err(failed(io::Error::other(format!("the saved memory has {found} bytes"))));
        }
        let mut memory = Self::build(size_mib, Backing::Restored, Some(Arc::new(file)))?;
        if let Some(written) = written {
            memory.own_now(&written);
            memory.written = Some(Arc::new(written));
        }
        Ok(memory)
    }

    /// Writes all of it into the empty file `out`. Nobody may write to it meanwhile.
    ///
    /// # Errors
    /// What either file says, or a memory that cannot be saved.
    pub fn save(&self, out: &File) -> io::Result<()> {
        out.set_len(self.size_bytes)?;
        self.look_at_pages(|region, first, file_page, entries| {
            let mut held: Vec<bool> = entries.iter().map(|entry| entry & HELD != 0).collect();
            if let (Backing::Restored, Some(file)) = (self.backing, &self.file) {
                add_data(file, file_page * PAGE_SIZE, &mut held)?;
            }
            for (start, length) in runs(&held) {
                copy(region, (first + start) * PAGE_SIZE, length, out, (file_page + start) * PAGE_SIZE)?;
            }
            Ok(())
        })
    }

    /// Shows `see` all pages in steps: their region, the first page's number in it and in a file of this memory, and what the kernel says of
    /// each (pagemap, proc(5)).
    pub(super) fn look_at_pages(
        &self,
        mut see: impl FnMut(&GuestRegionMmap, u64, u64, &[u64]) -> io::Result<()>,
    ) -> io::Result<()> {
        let pagemap = self.pagemap.as_ref().ok_or_else(|| io::Error::other("this memory's pages cannot be seen"))?;
        let mut file_page = 0;
        let mut bytes = vec![0u8; (STEP_PAGES * 8) as usize];
        for region in self.map.iter() {
            let host_page = region.as_ptr().addr() as u64 / PAGE_SIZE;
            let pages = region.len() / PAGE_SIZE;
            for first in (0..pages).step_by(STEP_PAGES as usize) {
                let bytes = &mut bytes[..(STEP_PAGES.min(pages - first) * 8) as usize];
                pagemap.read_exact_at(bytes, (host_page + first) * 8)?;
                let entries: Vec<u64> = bytes.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry)).collect();
                see(region, first, file_page + first, &entries)?;
            }
            file_page += pages;
        }
        Ok(())
    }
}

/// Marks the pages from `offset` on that have data in the file.
fn add_data(file: &File, offset: u64, held: &mut [bool]) -> io::Result<()> {
    let end = offset + held.len() as u64 * PAGE_SIZE;
    let mut position = offset;
    while position < end {
        let start = match seek(file, SeekFrom::Data(position)) {
            Ok(start) if start < end => start,
            Ok(_) | Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let stop = seek(file, SeekFrom::Hole(start))?.min(end);
        let pages = ((start - offset) / PAGE_SIZE) as usize..((stop - offset).div_ceil(PAGE_SIZE)) as usize;
        if let Some(pages) = held.get_mut(pages) {
            pages.fill(true);
        }
        if stop <= position {
            return Err(io::Error::other("a file whose holes move"));
        }
        position = stop;
    }
    Ok(())
}

/// Runs of set flags: where each begins and how long it is.
pub(super) fn runs(flags: &[bool]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (index, _) in flags.iter().enumerate().filter(|(_, flag)| **flag) {
        match runs.last_mut() {
            Some((start, length)) if *start + *length == index as u64 => *length += 1,
            _ => runs.push((index as u64, 1)),
        }
    }
    runs
}

/// Writes pages to the file, but for those of zeros: straight from where they lie, whose owner stands.
fn copy(region: &impl GuestMemoryRegion, at: u64, pages: u64, out: &File, offset: u64) -> io::Result<()> {
    let filled: Vec<bool> =
        (0..pages).map(|page| is_filled(region, at + page * PAGE_SIZE)).collect::<io::Result<_>>()?;
    for (start, length) in runs(&filled) {
        let (place, bytes) = (start * PAGE_SIZE, (length * PAGE_SIZE) as usize);
        let piece = region.get_slice(MemoryRegionAddress(at + place), bytes).map_err(io::Error::other)?;
        seek(out, SeekFrom::Start(offset + place))?;
        out.as_fd().write_all_volatile(&piece).map_err(|error| match error {
            VolatileMemoryError::IOError(error) => error,
            error => io::Error::other(error),
        })?;
    }
    Ok(())
}

/// Whether a page has anything but zeros.
fn is_filled(region: &impl GuestMemoryRegion, page: u64) -> io::Result<bool> {
    let mut bytes = [0u8; LOOK_BYTES];
    for place in (page..page + PAGE_SIZE).step_by(LOOK_BYTES) {
        region.read_slice(&mut bytes, MemoryRegionAddress(place)).map_err(io::Error::other)?;
        if bytes != [0; LOOK_BYTES] {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn file() -> File {
        tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a file")
    }

    #[test]
    fn memory_goes_through_a_sparse_file_and_copies_share_nothing_they_write() {
        let memory = GuestRam::private(64).expect("memory");
        let places = [0u64, 4096, 1 << 20, (40 << 20) + 17, (64 << 20) - 3];
        for place in places {
            memory.map().write_slice(b"abc", GuestAddress(place)).expect("write");
        }
        // Held, and nothing in it.
        memory.map().write_slice(&[0; 4096], GuestAddress(30 << 20)).expect("write");
        let first = file();
        memory.save(&first).expect("saved");
        assert_eq!(first.metadata().expect("its size").len(), 64 << 20);
        assert!(first.metadata().expect("its size").blocks() * 512 < 1 << 20, "it is not sparse");

        let one = GuestRam::restored(64, first.try_clone().expect("clone"), None).expect("restored");
        let two = GuestRam::restored(64, first.try_clone().expect("clone"), None).expect("restored");
        one.map().write_slice(b"one", GuestAddress(8192)).expect("write");
        one.map().write_slice(b"two", GuestAddress(1 << 20)).expect("write");
        let read = |memory: &GuestRam, place| {
            let mut bytes = [0u8; 3];
            memory.map().read_slice(&mut bytes, GuestAddress(place)).expect("read");
            bytes
        };
        for place in places {
            assert_eq!(&read(&two, place), b"abc");
        }
        assert_eq!((read(&two, 8192), read(&two, 30 << 20)), ([0; 3], [0; 3]));
        // A copy of a copy has what the copy wrote and what it left as it was.
        let second = file();
        one.save(&second).expect("saved");
        let three = GuestRam::restored(64, second, None).expect("restored");
        assert_eq!((&read(&three, 8192), &read(&three, 1 << 20), &read(&three, 0)), (b"one", b"two", b"abc"));
        assert_eq!(&read(&three, (64 << 20) - 3), b"abc");
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let short = file();
        short.set_len(63 << 20).expect("length");
        assert!(GuestRam::restored(64, short, None).is_err());
    }
}
