//! A snapshot as one `.tar.zst`: `manifest.json`, then `disk.img` as a sparse entry (PAX, GNU format 1.0), so that `tar --zstd -xf` of
//! GNU tar gives the same two files.
//!
//! An archive is hostile until its last byte was compared: two entries of fixed names and nothing else, a manifest of bounded size, a
//! disk no larger than the manifest says and than there is room for, written to a draft that nobody sees.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;

use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::{SNAPSHOT_MANIFEST_LEN_MAX, SnapshotManifest};

use super::disk::{self, PIECE_LEN};
use super::{DISK, MANIFEST, Sealed, SnapshotError, SnapshotFiles};
use crate::compression::{Compression, Decoder};
use crate::limits::SPARSE_RUNS;
use crate::tar_stream::{EntryKind, SkipRead, TarEntry, TarError, TarReader};

/// zstd's own default: disks are large, and the reader is not the bottleneck.
const LEVEL: i32 = 3;
/// Zeros behind the end of the archive that are still its padding (tar's usual record is 10 KiB).
const PADDING_LEN_MAX: usize = 1 << 20;
/// Size of a tar block.
const BLOCK: usize = 512;

/// Writes a snapshot.
pub(super) fn write(
    name: &SandboxName,
    bytes: &[u8],
    manifest: &SnapshotManifest,
    file: &File,
    out: &mut dyn Write,
) -> Result<(), SnapshotError> {
    let failed = SnapshotError::Stream;
    let damaged = |reason: String| SnapshotError::Damaged { name: name.to_string(), reason };
    let unreadable = |error: io::Error| damaged(format!("its disk cannot be read: {error}"));
    // Compared before the first byte goes out: nobody should carry away what cannot be imported.
    let content = disk::measure(file).map_err(unreadable)?;
    if content.digest.to_string() != manifest.disk.digest {
        return Err(damaged("its disk is not what was written".into()));
    }
    let runs = runs(file, SPARSE_RUNS).map_err(unreadable)?;
    let mut encoder = zstd::Encoder::new(out, LEVEL).map_err(failed)?;
    encoder.include_checksum(true).map_err(failed)?;
    let mut archive = tar::Builder::new(encoder);
    let mut header = header(bytes.len() as u64);
    archive.append_data(&mut header, MANIFEST, bytes).map_err(failed)?;
    append_disk(&mut archive, file, content.size_bytes, &runs).map_err(failed)?;
    let encoder = archive.into_inner().map_err(failed)?;
    encoder.finish().and_then(Write::flush).map_err(failed)
}

/// A header without anything of this machine or moment. Of the POSIX kind: GNU tar looks for a sparse map of its older format behind a
/// header of its own kind.
fn header(bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(bytes);
    header.set_mode(0o600);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::Regular);
    header
}

/// Where the content is, in at most `most` runs: where there would be more, small gaps between them are content too.
fn runs(file: &File, most: usize) -> io::Result<Vec<(u64, u64)>> {
    let mut gap = 0;
    loop {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut many = false;
        disk::pieces(file, |offset, bytes| {
            let end = offset + bytes.len() as u64;
            let full = runs.len() >= most;
            match runs.last_mut() {
                Some((start, length)) if *start + *length + gap >= offset => *length = end - *start,
                _ if full => many = true,
                _ => runs.push((offset, end - offset)),
            }
            Ok(())
        })?;
        if !many {
            return Ok(runs);
        }
        gap = (gap * 4).max(PIECE_LEN as u64);
    }
}

fn append_disk<W: Write>(
    archive: &mut tar::Builder<W>,
    file: &File,
    size_bytes: u64,
    runs: &[(u64, u64)],
) -> io::Result<()> {
    let mut map = format!("{}\n", runs.len());
    for (offset, length) in runs {
        map.push_str(&format!("{offset}\n{length}\n"));
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    let size = size_bytes.to_string();
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", DISK.as_bytes()),
        ("GNU.sparse.realsize", size.as_bytes()),
    ];
    archive.append_pax_extensions(records)?;
    let data: u64 = runs.iter().map(|(_, length)| length).sum();
    let mut header = header(map.len() as u64 + data);
    let content = Runs { file, runs: runs.iter(), now: (0, 0) };
    archive.append_data(&mut header, "GNUSparseFile.0/disk.img", io::Cursor::new(map).chain(content))
}

/// The bytes of runs, one after the other.
struct Runs<'a> {
    file: &'a File,
    runs: std::slice::Iter<'a, (u64, u64)>,
    now: (u64, u64),
}

impl Read for Runs<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.now.1 == 0 {
            match self.runs.next() {
                Some(run) => self.now = *run,
                None => return Ok(0),
            }
        }
        let (offset, left) = self.now;
        let want = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..want], offset)?;
        if count == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.now = (offset + count as u64, left - count as u64);
        Ok(count)
    }
}

/// The unpacked stream of an archive.
type Unpacked = Decoder<BufReader<Box<dyn Read + Send>>>;

impl SkipRead for Unpacked {}

/// An archive whose manifest was read and whose disk is still to come.
pub struct Importing {
    bytes: Vec<u8>,
    manifest: SnapshotManifest,
    stream: TarReader<Unpacked>,
}

impl std::fmt::Debug for Importing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Importing").field("manifest", &self.manifest).finish_non_exhaustive()
    }
}

impl From<TarError> for SnapshotError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Truncated(what) => Self::Truncated(format!("it ends inside {what}")),
            TarError::Source(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
                Self::Truncated("it ends inside its compression".into())
            }
            TarError::Source(source) => Self::Stream(source),
            error => Self::Archive(error.to_string()),
        }
    }
}

impl Importing {
    /// Reads an archive up to and with its manifest.
    ///
    /// # Errors
    /// `Archive`, `Truncated`, `Manifest`, `Stream`.
    pub fn open(source: Box<dyn Read + Send>) -> Result<Self, SnapshotError> {
        let source = BufReader::with_capacity(256 << 10, source);
        let mut stream = TarReader::new(Decoder::new(source, Compression::Zstd).map_err(SnapshotError::Stream)?);
        let entry = stream.next()?.ok_or_else(|| SnapshotError::Archive("it is empty".into()))?;
        expect(&entry, MANIFEST)?;
        if entry.sparse.is_some() || entry.size > SNAPSHOT_MANIFEST_LEN_MAX as u64 {
            return Err(SnapshotError::Archive(format!("its manifest has {} bytes", entry.size)));
        }
        let mut bytes = vec![0; usize::try_from(entry.size).unwrap_or(0)];
        stream.read_exact_data(&mut bytes)?;
        let manifest = SnapshotManifest::parse(&bytes).map_err(SnapshotError::Manifest)?;
        Ok(Self { bytes, manifest, stream })
    }

    /// What it says about itself; its disk was not looked at yet.
    #[must_use]
    pub fn manifest(&self) -> &SnapshotManifest {
        &self.manifest
    }

    /// Reads the disk and compares everything.
    ///
    /// # Errors
    /// `Archive`, `Truncated`, `Digest`, `NoRoom`, `DiskFull`, `Stream`, `Io`; nothing is left then.
    pub fn finish(mut self, files: &SnapshotFiles) -> Result<Sealed, SnapshotError> {
        let entry = self.stream.next()?.ok_or_else(|| SnapshotError::Truncated("it has no disk".into()))?;
        expect(&entry, DISK)?;
        let size_bytes = self.manifest.disk.size_bytes;
        let (real_size, runs) = match entry.sparse {
            Some(map) => (map.real_size, map.runs),
            // Somebody packed it anew with a tar that knows no holes.
            None => (entry.size, vec![(0, entry.size)]),
        };
        if real_size != size_bytes {
            let reason = format!("its disk has {real_size} bytes, its manifest says {size_bytes}");
            return Err(SnapshotError::Archive(reason));
        }
        let draft = files.draft()?;
        let (path, file) = draft.create(DISK)?;
        let free = rustix::fs::fstatvfs(&file).map_or(u64::MAX, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
        if self.manifest.disk.data_bytes > free {
            return Err(SnapshotError::NoRoom { path, needed: self.manifest.disk.data_bytes, free });
        }
        let failed = |error| SnapshotError::io("write", &path, error);
        file.set_len(size_bytes).map_err(failed)?;
        let mut left = self.manifest.disk.data_bytes;
        for (start, length) in runs {
            self.write_run(&file, start, length, &mut left).map_err(|error| match error {
                SnapshotError::Io { action, source, .. } => SnapshotError::Io { action, path: path.clone(), source },
                SnapshotError::DiskFull(_) => SnapshotError::DiskFull(path.clone()),
                error => error,
            })?;
        }
        self.end()?;
        drop(file);
        let content = draft.measure()?;
        if content.digest.to_string() != self.manifest.disk.digest {
            let expected = self.manifest.disk.digest.clone();
            return Err(SnapshotError::Digest { expected, actual: content.digest.to_string() });
        }
        draft.seal_bytes(self.bytes)
    }

    /// Writes one run, in pieces as they are counted; zeros stay holes. `left` is what the manifest still allows.
    fn write_run(&mut self, file: &File, start: u64, length: u64, left: &mut u64) -> Result<(), SnapshotError> {
        let unit = PIECE_LEN as u64;
        let mut buffer = vec![0; PIECE_LEN];
        let (mut offset, end) = (start, start + length);
        while offset < end {
            // To the end of the piece, so that a piece of zeros is seen as one.
            let want = usize::try_from((unit - offset % unit).min(end - offset)).unwrap_or(PIECE_LEN);
            self.stream.read_exact_data(&mut buffer[..want])?;
            if buffer[..want].iter().any(|byte| *byte != 0) {
                *left = left
                    .checked_sub(want as u64)
                    .ok_or_else(|| SnapshotError::Archive("its disk holds more than its manifest says".into()))?;
                file.write_all_at(&buffer[..want], offset)
                    .map_err(|error| SnapshotError::io("write", std::path::Path::new(DISK), error))?;
            }
            offset += want as u64;
        }
        Ok(())
    }

    /// Nothing but padding may follow, and the compression's own checksum must fit.
    fn end(&mut self) -> Result<(), SnapshotError> {
        if self.stream.next()?.is_some() {
            return Err(SnapshotError::Archive("it has more than a manifest and a disk".into()));
        }
        if !self.stream.saw_end_marker() {
            return Err(SnapshotError::Truncated("its end is missing".into()));
        }
        let mut padding = vec![0; 64 << 10];
        let mut seen = 0;
        loop {
            let count = match self.stream.source().read(&mut padding) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(TarError::Source(error).into()),
            };
            seen += count;
            if seen > PADDING_LEN_MAX || padding[..count].iter().any(|byte| *byte != 0) {
                return Err(SnapshotError::Archive("something follows its end".into()));
            }
        }
    }
}

/// An entry must be the regular file of this name and nothing else.
fn expect(entry: &TarEntry, name: &str) -> Result<(), SnapshotError> {
    if entry.kind != EntryKind::Regular || entry.path != name.as_bytes() {
        let found: String = String::from_utf8_lossy(&entry.path).chars().take(100).collect();
        return Err(SnapshotError::Archive(format!("it has {found:?} where {name} should be")));
    }
    Ok(())
}
