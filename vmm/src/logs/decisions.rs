//! The network's decision log: one JSON line for each denial, bounded as every log here.
//!
//! The network's thread may not open files, so it leaves its lines here and wakes the control thread, which writes them. Lines are
//! rate-limited where they are made; what would wait beyond [`LINES_MAX`] is dropped.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::rotate::RotatingFile;

/// Lines that wait to be written.
const LINES_MAX: usize = 1024;

struct Shared {
    lines: Mutex<VecDeque<String>>,
    file: Mutex<Option<RotatingFile>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The log; clones are the same one.
#[derive(Clone)]
pub struct DecisionLog(Arc<Shared>);

impl DecisionLog {
    /// Opens the log. One that cannot be opened loses its lines and says so once.
    pub fn open(path: &Path, size_max_bytes: u64, files_max: u32) -> Self {
        let file = RotatingFile::open(path, size_max_bytes, files_max)
            .inspect_err(|error| tracing::error!(%error, "decision log cannot be written"))
            .ok();
        Self(Arc::new(Shared { lines: Mutex::default(), file: Mutex::new(file) }))
    }

    /// Its file was moved.
    pub fn moved_to(&self, path: &Path) {
        if let Some(file) = lock(&self.0.file).as_mut() {
            file.moved_to(path);
        }
    }

    /// Leaves a line to be written. Never waits for a disk.
    pub fn push(&self, line: String) {
        let mut lines = lock(&self.0.lines);
        if lines.len() < LINES_MAX {
            lines.push_back(line);
        }
    }

    /// Writes what waits.
    pub fn flush(&self) {
        let lines = std::mem::take(&mut *lock(&self.0.lines));
        let mut file = lock(&self.0.file);
        let Some(file) = file.as_mut() else { return };
        for mut line in lines {
            line.push('\n');
            if let Err(error) = file.write_record(line.as_bytes()) {
                tracing::warn!(%error, "lines of the decision log are lost");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_wait_for_the_flush_and_are_bounded() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("network.jsonl");
        let log = DecisionLog::open(&path, 1 << 20, 1);
        for number in 0..LINES_MAX + 10 {
            log.push(format!("{{\"n\":{number}}}"));
        }
        assert_eq!(std::fs::read_to_string(&path).expect("read"), "");
        log.flush();
        log.push("last".into());
        log.flush();
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text.lines().count(), LINES_MAX + 1);
        assert!(text.ends_with("\nlast\n"));
    }
}
