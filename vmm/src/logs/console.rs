//! The guest's serial console: a rotated file on disk and the last bytes in memory, for evidence and for finding a panic.
//!
//! Both engines write here (`engine::ConsoleSink`); `control` and `end` read the tail. Writing never fails towards the engine.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::rotate::RotatingFile;
use crate::launch::phases::Phases;

/// Bytes of the end of the console kept in memory: a panic with its registers and stack fits.
pub const TAIL_BYTES: usize = 16 * 1024;
/// What a panicking Linux prints first (kernel/panic.c).
const PANIC_BANNER: &str = "Kernel panic - not syncing";
/// Longest panic line passed on to people, in characters.
const PANIC_LINE_CHARS_MAX: usize = 200;

struct State {
    file: Option<RotatingFile>,
    /// At most twice [`TAIL_BYTES`], cut when it gets there.
    tail: Vec<u8>,
    phases: Option<Phases>,
}

/// The console's log; clones are the same log.
#[derive(Clone)]
pub struct ConsoleLog(Arc<Mutex<State>>);

impl ConsoleLog {
    /// A log at `path`, rotated as given. A file that cannot be opened costs the file, not the boot.
    pub fn open(path: &Path, size_max_bytes: u64, files_max: u32) -> Self {
        let file = RotatingFile::open(path, size_max_bytes, files_max)
            .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "console log cannot be written"))
            .ok();
        Self(Arc::new(Mutex::new(State { file, tail: Vec::new(), phases: None })))
    }

    /// A log that is kept in memory only.
    pub fn in_memory() -> Self {
        Self(Arc::new(Mutex::new(State { file: None, tail: Vec::new(), phases: None })))
    }

    /// Its file was moved.
    pub fn moved_to(&self, path: &Path) {
        if let Some(file) = &mut self.lock().file {
            file.moved_to(path);
        }
    }

    /// Marks the first byte of the guest on `phases`.
    pub fn mark_first_byte(&self, phases: Phases) {
        self.lock().phases = Some(phases);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end of the output as people may see it: lossy UTF-8, at most `bytes_max` of it, without control characters.
    pub fn tail(&self, bytes_max: usize) -> String {
        let state = self.lock();
        let start = state.tail.len().saturating_sub(bytes_max.min(TAIL_BYTES));
        clean(&state.tail[start..])
    }

    /// Whether the guest has printed anything.
    pub fn has_output(&self) -> bool {
        !self.lock().tail.is_empty()
    }

    /// The kernel's panic line, if the tail holds one.
    pub fn panic_line(&self) -> Option<String> {
        find_panic(&self.tail(TAIL_BYTES))
    }
}

/// Lossy text without control characters but newline and tab, so that a guest cannot drive somebody's terminal.
pub fn clean(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// The panic line without its timestamp. A workload may print such a line too, but only the kernel and root can write to the
/// console, and a guest that lies about its own end deceives nobody else.
pub fn find_panic(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.contains(PANIC_BANNER))?;
    let start = line.find(PANIC_BANNER).unwrap_or(0);
    Some(line[start..].chars().take(PANIC_LINE_CHARS_MAX).collect())
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        if let Some(phases) = state.phases.take() {
            phases.mark("console");
        }
        if let Some(file) = &mut state.file {
            // A full disk loses console output; there is nobody to tell but the log that is full too.
            let _ = file.write_record(bytes);
        }
        let keep = bytes.len().min(TAIL_BYTES);
        state.tail.extend_from_slice(&bytes[bytes.len() - keep..]);
        if state.tail.len() > 2 * TAIL_BYTES {
            let cut = state.tail.len() - TAIL_BYTES;
            state.tail.drain(..cut);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_bounded_clean_and_shows_a_panic() {
        let mut console = ConsoleLog::in_memory();
        console.write_all(&vec![b'x'; 100_000]).expect("write");
        console
            .write_all(b"\n\x1b[2J[    1.5] Kernel panic - not syncing: Attempted to kill init!\r\n")
            .expect("write");
        assert!(console.tail(usize::MAX).len() <= TAIL_BYTES);
        assert!(!console.tail(100).contains('\u{1b}'));
        assert_eq!(console.panic_line().as_deref(), Some("Kernel panic - not syncing: Attempted to kill init!"));
        assert_eq!(find_panic("all is well"), None);
    }
}
