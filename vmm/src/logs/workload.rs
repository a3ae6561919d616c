//! The main workload's log: one JSON line per line of output, in the form of `msb_protocol::control::LogRecord`.
//!
//! Fed by the agent link. Output arrives in pieces that end anywhere: a piece without newline becomes a record without newline at
//! once (a follower sees a prompt), and a UTF-8 character cut in two waits for its other half.

use std::io;
use std::path::Path;

use jiff::Timestamp;
use msb_protocol::control::LogSource;
use msb_protocol::id::BootId;
use msb_protocol::vmm::{VmSpec, WORKLOAD_LOG_FILE};

use super::rotate::RotatingFile;

/// Longest piece of a line in one record, in bytes.
const LINE_BYTES_MAX: usize = 16 * 1024;

/// Writes records for one run.
pub struct WorkloadLog {
    file: RotatingFile,
    boot_id: BootId,
    /// The beginning of a character that was cut, for stdout and stderr.
    cut: [Vec<u8>; 2],
    buffer: Vec<u8>,
    lost_bytes: u64,
}

impl WorkloadLog {
    /// Opens the log of the run of `spec`. Without one it runs all the same.
    pub fn open_of(spec: &VmSpec) -> Option<Self> {
        let path = spec.log_dir.join(WORKLOAD_LOG_FILE);
        Self::open(&path, spec.log_size_max_bytes, spec.log_files_max, spec.boot_id)
            .inspect_err(|error| tracing::error!(%error, "workload log cannot be written"))
            .ok()
    }

    /// Opens the log of a run.
    pub fn open(path: &Path, size_max_bytes: u64, files_max: u32, boot_id: BootId) -> io::Result<Self> {
        let file = RotatingFile::open(path, size_max_bytes, files_max)?;
        Ok(Self { file, boot_id, cut: [Vec::new(), Vec::new()], buffer: Vec::new(), lost_bytes: 0 })
    }

    /// Records output of the workload that was seen at `time`.
    pub fn write(&mut self, source: LogSource, data: &[u8], time: Timestamp) {
        let held = match source {
            LogSource::Stdout => Some(0),
            LogSource::Stderr => Some(1),
            LogSource::System => None,
        };
        let mut joined = held.map(|index| std::mem::take(&mut self.cut[index])).unwrap_or_default();
        let data = if joined.is_empty() {
            data
        } else {
            joined.extend_from_slice(data);
            &joined
        };
        let (whole, rest) = match held {
            Some(_) => data.split_at(data.len() - incomplete_end(data)),
            None => (data, &[][..]),
        };
        let rest = rest.to_vec();
        self.write_lines(source, whole, time);
        if let Some(index) = held {
            self.cut[index] = rest;
        }
    }

    /// Records what is left of characters that were never completed; nothing follows.
    pub fn finish(&mut self, time: Timestamp) {
        for (index, source) in [LogSource::Stdout, LogSource::Stderr].into_iter().enumerate() {
            let rest = std::mem::take(&mut self.cut[index]);
            self.write_lines(source, &rest, time);
        }
    }

    fn write_lines(&mut self, source: LogSource, data: &[u8], time: Timestamp) {
        if data.is_empty() {
            return;
        }
        if self.lost_bytes > 0 {
            let note = format!("{} bytes of output were lost because the log could not be written\n", self.lost_bytes);
            if self.write_batch(LogSource::System, note.as_bytes(), time).is_ok() {
                self.lost_bytes = 0;
            }
        }
        if self.write_batch(source, data, time).is_err() {
            self.lost_bytes += data.len() as u64;
        }
    }

    /// All lines of one piece go to disk in one write.
    fn write_batch(&mut self, source: LogSource, data: &[u8], time: Timestamp) -> io::Result<()> {
        let source = match source {
            LogSource::Stdout => "stdout",
            LogSource::Stderr => "stderr",
            LogSource::System => "system",
        };
        let prefix = format!(r#"{{"time":"{time}","boot_id":"{}","source":"{source}","data":"#, self.boot_id);
        self.buffer.clear();
        for line in data.split_inclusive(|byte| *byte == b'\n').flat_map(pieces) {
            self.buffer.extend_from_slice(prefix.as_bytes());
            serde_json::to_writer(&mut self.buffer, &String::from_utf8_lossy(line))?;
            self.buffer.extend_from_slice(b"}\n");
            // Rotation works on whole records, so a batch is cut before it outgrows a small log.
            if self.buffer.len() > 256 * 1024 {
                self.file.write_record(&self.buffer)?;
                self.buffer.clear();
            }
        }
        let result = if self.buffer.is_empty() { Ok(()) } else { self.file.write_record(&self.buffer) };
        self.buffer.shrink_to(64 * 1024);
        result
    }
}

/// Cuts a long line at character borders.
fn pieces(mut line: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        if line.is_empty() {
            return None;
        }
        let mut end = line.len().min(LINE_BYTES_MAX);
        if end < line.len() {
            end -= incomplete_end(&line[..end]);
        }
        let (piece, rest) = line.split_at(end);
        line = rest;
        Some(piece)
    })
}

/// Bytes at the end that begin a UTF-8 character and do not complete it (0 to 3).
fn incomplete_end(data: &[u8]) -> usize {
    for back in 1..=data.len().min(3) {
        let byte = data[data.len() - back];
        let needed = match byte {
            0xc2..=0xdf => 2,
            0xe0..=0xef => 3,
            0xf0..=0xf4 => 4,
            0x80..=0xbf => continue,
            _ => return 0,
        };
        return if back < needed { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use msb_protocol::control::LogRecord;
    use proptest::prelude::*;

    use super::*;

    fn log_of(write: impl FnOnce(&mut WorkloadLog)) -> Vec<LogRecord> {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("log");
        let mut log = WorkloadLog::open(&path, 1 << 20, 2, BootId(uuid::Uuid::nil())).expect("open");
        write(&mut log);
        log.finish(Timestamp::UNIX_EPOCH);
        let text = std::fs::read_to_string(&path).expect("read");
        text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }

    #[test]
    fn lines_are_records_and_a_prompt_is_seen_at_once() {
        let records = log_of(|log| {
            log.write(LogSource::Stdout, b"one\ntwo\npro", Timestamp::UNIX_EPOCH);
            log.write(LogSource::Stderr, b"err \"q\"\n", Timestamp::UNIX_EPOCH);
            log.write(LogSource::Stdout, b"mpt> ", Timestamp::UNIX_EPOCH);
        });
        let seen: Vec<_> = records.iter().map(|record| (record.source, record.data.as_str())).collect();
        assert_eq!(
            seen,
            [
                (LogSource::Stdout, "one\n"),
                (LogSource::Stdout, "two\n"),
                (LogSource::Stdout, "pro"),
                (LogSource::Stderr, "err \"q\"\n"),
                (LogSource::Stdout, "mpt> "),
            ]
        );
        assert_eq!(records[0].time, Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn characters_survive_being_cut_and_garbage_is_made_visible() {
        let records = log_of(|log| {
            let text = "grün€𝄞".as_bytes();
            for byte in text {
                log.write(LogSource::Stdout, &[*byte], Timestamp::UNIX_EPOCH);
            }
            log.write(LogSource::Stdout, &[0xff, 0xf0, 0x9d], Timestamp::UNIX_EPOCH);
        });
        let joined: String = records.iter().map(|record| record.data.as_str()).collect();
        assert_eq!(joined, "grün€𝄞\u{fffd}\u{fffd}");
    }

    proptest! {
        #[test]
        fn text_is_whole_however_it_arrives(text in "[a-zé€𝄞\n]{0,400}", cut in 1usize..50) {
            let records = log_of(|log| {
                for piece in text.as_bytes().chunks(cut) {
                    log.write(LogSource::Stdout, piece, Timestamp::UNIX_EPOCH);
                }
            });
            prop_assert_eq!(records.into_iter().map(|record| record.data).collect::<String>(), text);
        }

        #[test]
        fn any_bytes_make_records(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            log_of(|log| log.write(LogSource::Stderr, &bytes, Timestamp::UNIX_EPOCH));
        }
    }
}
