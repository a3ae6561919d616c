//! Which pages a machine writes soon after it was made of saved memory: noted once, and made the next one's own before its guest runs.
//!
//! ```text
//!  open ─► pages of the last note ─► own_now: MADV_POPULATE_WRITE ─► the guest runs
//!     └ no note yet, or the memory is younger ─► the guest has run for a moment ─► note: pages that are no longer the file's
//! ```
//!
//! A page that the guest reads first and writes then costs it two ways out of the guest, and a third where the host's page table
//! had the file's page: KVM has to begin again when that changes under it. A note is a wish, and may say anything: another machine wrote it.
//! It is read within bounds; what it names costs memory that a machine would need anyway, or at most [`PAGES_MAX`] pages.
//!
//! The file: [`MAGIC`], the number of runs, then for each its first page and its length; words of 32 bits, little-endian. Pages are counted
//! in the order of the file of saved memory. Called by `launch` (open), [`GuestRam::restored`] and the control thread (note).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FlockOperation, flock};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::saved::runs;
use super::{GuestRam, PAGE_SIZE};

/// Begins a note of this format.
const MAGIC: &[u8; 8] = b"MSBPAGE1";
/// Bytes before the runs.
const HEADER_BYTES: usize = 12;
/// Bytes of a run.
const RUN_BYTES: usize = 8;
/// Pages of a note at most: 16 MiB.
const PAGES_MAX: usize = 4096;
/// The page is of a file, or shared (proc(5), pagemap), so not yet this machine's own.
const OF_FILE: u64 = 1 << 61;
/// Present.
const PRESENT: u64 = 1 << 63;

/// A note of the pages that are written first.
#[derive(Debug)]
pub struct Written {
    /// Pages to be made one's own: first and number.
    runs: Vec<(u64, u64)>,
    /// Where they are noted, unless they have been, or somebody else does.
    file: Mutex<Option<File>>,
}

impl Written {
    /// Opens the note at `path` about the saved memory `memory`, and makes an empty one if there is none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(path: &Path, memory: &File) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(path)?;
        let (own, memory) = (file.metadata()?, memory.metadata()?);
        let mut bytes = vec![0; (own.len() as usize).min(HEADER_BYTES + PAGES_MAX * RUN_BYTES)];
        file.read_exact_at(&mut bytes, 0)?;
        let noted = parse(&bytes, memory.len() / PAGE_SIZE);
        let is_current = noted.is_some() && own.modified()? > memory.modified()?;
        let notes = !is_current && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        Ok(Self { runs: noted.unwrap_or_default(), file: Mutex::new(notes.then_some(file)) })
    }
}

impl GuestRam {
    /// Makes the pages of the note this machine's own. What the host refuses the guest does by itself, page by page.
    pub(super) fn own_now(&self, written: &Written) {
        let mut file_page = 0;
        for region in self.map.iter() {
            let pages = region.len() / PAGE_SIZE;
            for (first, count) in &written.runs {
                let (start, end) = ((*first).max(file_page), (first + count).min(file_page + pages));
                if start >= end {
                    continue;
                }
                let (place, length) = ((start - file_page) * PAGE_SIZE, (end - start) * PAGE_SIZE);
                // SAFETY: [place, place + length) lies inside this region's mapping, which lives as long as the process does. Its content
                // stays what it is; only whose page it is changes, which no access can tell.
                let populated = unsafe {
                    libc::madvise(
                        region.as_ptr().add(place as usize).cast(),
                        length as usize,
                        libc::MADV_POPULATE_WRITE,
                    )
                };
                if populated != 0 {
                    // A kernel before 5.14, or no memory.
                    return;
                }
            }
            file_page += pages;
        }
    }

    /// Notes which pages are this machine's own by now, if that is asked for; once.
    pub fn note_written(&self) {
        let Some(written) = &self.written else { return };
        let Some(file) = written.file.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let noted = self.own_pages().and_then(|own| file.write_all_at(&encode(&own), 0));
        if let Err(error) = noted {
            tracing::debug!(%error, "the pages that are written first are not noted");
        }
    }

    /// Pages that are not the file's any more, the first of them up to [`PAGES_MAX`]: first and number.
    fn own_pages(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut own: Vec<(u64, u64)> = Vec::new();
        let mut left = PAGES_MAX as u64;
        self.look_at_pages(|_, _, file_page, entries| {
            let flags: Vec<bool> = entries.iter().map(|entry| entry & (PRESENT | OF_FILE) == PRESENT).collect();
            for (start, length) in runs(&flags) {
                let length = length.min(left);
                left -= length;
                own.extend((length > 0).then_some((file_page + start, length)));
            }
            Ok(())
        })?;
        Ok(own)
    }
}

/// The runs of a note about a memory of `pages`; none if it is not one.
fn parse(bytes: &[u8], pages: u64) -> Option<Vec<(u64, u64)>> {
    let (words, []) = bytes.strip_prefix(MAGIC)?.as_chunks::<4>() else { return None };
    let mut words = words.iter().map(|word| u64::from(u32::from_le_bytes(*word)));
    let count = words.next()?;
    let (mut found, mut named) = (Vec::new(), 0);
    for _ in 0..count {
        let (first, length) = (words.next()?, words.next()?);
        named += length;
        if first + length > pages || named > PAGES_MAX as u64 {
            return None;
        }
        found.push((first, length));
    }
    Some(found)
}

fn encode(runs: &[(u64, u64)]) -> Vec<u8> {
    // A memory has fewer pages than 2³², and a note fewer runs.
    let word = |number: u64| (number as u32).to_le_bytes();
    let mut bytes = MAGIC.to_vec();
    bytes.extend(word(runs.len() as u64));
    bytes.extend(runs.iter().flat_map(|(first, length)| [word(*first), word(*length)]).flatten());
    bytes
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A saved memory of 64 MiB with something in each of its first pages.
    fn saved() -> File {
        let memory = GuestRam::private(64).expect("memory");
        for page in 0..100 {
            memory.map().write_slice(b"saved", GuestAddress(page * PAGE_SIZE)).expect("write");
        }
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).expect("a file");
        memory.save(&file).expect("saved");
        file.set_modified(SystemTime::now() - HOUR).expect("its time");
        file
    }

    fn restored(file: &File, note: &Path) -> GuestRam {
        let written = Written::open(note, file).expect("a note");
        GuestRam::restored(64, file.try_clone().expect("clone"), Some(written)).expect("restored")
    }

    #[test]
    fn what_one_machine_wrote_is_the_next_ones_own_before_it_writes() {
        let directory = tempfile::tempdir().expect("a directory");
        let (file, note) = (saved(), directory.path().join("written"));
        let one = restored(&file, &note);
        assert_eq!(one.own_pages().expect("pagemap"), [], "a page is its own before it was written");
        let mut byte = [0; 1];
        one.map().read_slice(&mut byte, GuestAddress(9 * PAGE_SIZE)).expect("read");
        for page in [3, 4, 5, 40, 9000] {
            one.map().write_slice(b"own", GuestAddress(page * PAGE_SIZE)).expect("write");
        }
        let expected = [(3, 3), (40, 1), (9000, 1)];
        assert_eq!(one.own_pages().expect("pagemap"), expected);
        // While it may still note them, no other does; and then nobody has to.
        let other = restored(&file, &note);
        other.map().write_slice(b"other", GuestAddress(50 * PAGE_SIZE)).expect("write");
        other.note_written();
        one.note_written();
        one.map().write_slice(b"late", GuestAddress(60 * PAGE_SIZE)).expect("write");
        one.note_written();
        let two = restored(&file, &note);
        assert_eq!(two.own_pages().expect("pagemap"), expected);
        let mut bytes = [0; 5];
        two.map().read_slice(&mut bytes, GuestAddress(3 * PAGE_SIZE)).expect("read");
        assert_eq!(&bytes, b"saved", "its content changed");
        // Of a memory that was written since, anew.
        file.set_modified(SystemTime::now() + HOUR).expect("its time");
        let three = restored(&file, &note);
        three.map().write_slice(b"own", GuestAddress(70 * PAGE_SIZE)).expect("write");
        three.note_written();
        assert_eq!(restored(&file, &note).own_pages().expect("pagemap").last(), Some(&(9000, 1)));
        assert!(restored(&file, &note).own_pages().expect("pagemap").contains(&(70, 1)));
    }

    #[test]
    fn a_note_that_names_too_much_or_is_none_says_nothing() {
        let whole = encode(&[(3, 3), (40, 1)]);
        assert_eq!(parse(&whole, 41), Some(vec![(3, 3), (40, 1)]));
        assert_eq!(parse(&whole, 40), None, "beyond the memory");
        assert_eq!(parse(&whole[..whole.len() - 4], 41), None, "cut off");
        assert_eq!(parse(b"MSBPAGE2\0\0\0\0", 41), None, "another format");
        assert_eq!(parse(&encode(&[(0, PAGES_MAX as u64)]), 1 << 20).map(|runs| runs.len()), Some(1));
        assert_eq!(parse(&encode(&[(0, PAGES_MAX as u64), (0, 1)]), 1 << 20), None, "too many pages");
        let mut longer = whole;
        longer.extend([7; 8]);
        assert_eq!(parse(&longer, 41), Some(vec![(3, 3), (40, 1)]), "what an older note left behind");
    }

    proptest! {
        #[test]
        fn no_note_makes_it_panic_or_names_what_is_not_there(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            is_note in any::<bool>(),
            pages in 0u64..10_000,
        ) {
            let bytes = if is_note { [MAGIC, &bytes[..]].concat() } else { bytes };
            for (first, count) in parse(&bytes, pages).unwrap_or_default() {
                prop_assert!(first + count <= pages);
            }
        }
    }
}
