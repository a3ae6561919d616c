//! A file that is put aside when it is full: `name` → `name.1` → `name.2` …, the oldest one deleted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An append-only file of bounded size with bounded history.
#[derive(Debug)]
pub struct RotatingFile {
    path: PathBuf,
    file: File,
    size_bytes: u64,
    size_max_bytes: u64,
    files_max: u32,
}

impl RotatingFile {
    /// Opens or makes `path` (0600). A record that would make it larger than `size_max_bytes` goes to a fresh file; `files_max` old
    /// ones are kept (0: none).
    pub fn open(path: &Path, size_max_bytes: u64, files_max: u32) -> io::Result<Self> {
        let file = open_append(path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, size_bytes, size_max_bytes: size_max_bytes.max(1), files_max })
    }

    /// The file was moved, with the folder it is in: old ones are put aside beside it there.
    pub fn moved_to(&mut self, path: &Path) {
        path.clone_into(&mut self.path);
    }

    /// Writes whole records; they stay together in one file.
    pub fn write_record(&mut self, record: &[u8]) -> io::Result<()> {
        let length = record.len() as u64;
        if self.size_bytes > 0 && self.size_bytes + length > self.size_max_bytes {
            self.rotate()?;
        }
        // Counted before it is known to be written: a short write to a full disk has taken room too.
        self.size_bytes += length;
        self.file.write_all(record)
    }

    fn rotate(&mut self) -> io::Result<()> {
        if self.files_max == 0 {
            self.file.set_len(0)?;
        } else {
            for number in (1..self.files_max).rev() {
                rename_if_there(&self.numbered(number), &self.numbered(number + 1))?;
            }
            rename_if_there(&self.path, &self.numbered(1))?;
            self.file = open_append(&self.path)?;
        }
        self.size_bytes = 0;
        Ok(())
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    }
}

fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_bounded_and_records_stay_whole() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("log");
        let mut file = RotatingFile::open(&path, 10, 2).expect("open");
        for record in ["aaaa\n", "bbbb\n", "cccc\n", "dddd\n", "eeee\n", "ffff\n", "gggg\n"] {
            file.write_record(record.as_bytes()).expect("write");
        }
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).expect("read");
        assert_eq!(read("log"), "gggg\n");
        assert_eq!(read("log.1"), "eeee\nffff\n");
        assert_eq!(read("log.2"), "cccc\ndddd\n");
        assert_eq!(fs::read_dir(directory.path()).expect("list").count(), 3);
        // Where its folder has another name.
        let moved = directory.path().join("moved");
        fs::create_dir(&moved).expect("directory");
        fs::rename(&path, moved.join("log")).expect("rename");
        file.moved_to(&moved.join("log"));
        file.write_record(b"hhhh\n").expect("write");
        file.write_record(b"iiii\n").expect("write");
        assert_eq!(fs::read_to_string(moved.join("log")).expect("read"), "iiii\n");
        assert_eq!(fs::read_to_string(moved.join("log.1")).expect("read"), "gggg\nhhhh\n");
        // A record larger than the limit still gets a file of its own, and a reopened file goes on.
        let mut file = RotatingFile::open(&path, 10, 0).expect("open");
        file.write_record(&[b'x'; 20]).expect("write");
        assert_eq!(read("log").len(), 20);
    }
}
