//! A streaming tar reader for hostile input: ustar, GNU and PAX in one forward pass.
//!
//! Called by the archive loader (outer archive) and the layer importer. It is our own because the usual crate splits PAX records at
//! newlines, which a binary extended attribute may contain, and does not know GNU sparse format 1.0. It allocates at most
//! [`TAR_HEADER_BYTES`] per header and never seeks; it does not interpret paths, that is the caller's business.
//!
//! ```text
//!   512-byte header ─┬─ 'x' PAX records ─┐
//!                    ├─ 'L','K' GNU name ├─► remembered for the next entry
//!                    ├─ 'g' global PAX ──┘   (ignored, as docker does)
//!                    ├─ entry ─► data, padded to 512
//!                    └─ zero block: end of the archive
//! ```

mod pax;
mod sparse;

use std::io::{self, Read};

use crate::limits::TAR_HEADER_BYTES;
pub(crate) use pax::Xattr;
pub(crate) use sparse::SparseMap;

/// Size of a header and unit of padding.
pub(crate) const BLOCK: usize = 512;

/// Why a tar stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The stream ended inside something.
    #[error("it ends inside {0}")]
    Truncated(&'static str),
    /// A header or record is not valid.
    #[error("{0}")]
    Format(&'static str),
    /// A header asks for more than its limit.
    #[error("a tar header of more than {0} bytes")]
    HeaderSize(u64),
    /// The source failed.
    #[error(transparent)]
    Source(#[from] io::Error),
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    Regular,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
}

/// One entry, with everything PAX and GNU headers say about it already applied.
#[derive(Clone, Debug)]
pub(crate) struct TarEntry {
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// Permission bits with set-id and sticky bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    pub(crate) mtime_nanoseconds: u32,
    pub(crate) device_major: u32,
    pub(crate) device_minor: u32,
    /// Bytes of data that follow in the stream.
    pub(crate) size: u64,
    /// Where those bytes belong, for a sparse file.
    pub(crate) sparse: Option<SparseMap>,
    pub(crate) xattrs: Vec<Xattr>,
}

/// A source that can leave bytes unread more cheaply than by reading them.
pub(crate) trait SkipRead: Read {
    /// Passes over `count` bytes; fails with `UnexpectedEof` if the source is known to hold fewer.
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let mut left = count;
        let mut sink = vec![0; usize::try_from(count.min(64 << 10)).unwrap_or(0)];
        while left > 0 {
            let want = sink.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match self.read(&mut sink[..want]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => left -= read as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl SkipRead for &[u8] {}

/// Reads entries one after the other.
pub(crate) struct TarReader<R> {
    source: R,
    /// Data bytes of the current entry not yet read.
    remaining: u64,
    /// Padding behind them.
    padding: u64,
    ended: bool,
    saw_end_marker: bool,
}

impl<R: SkipRead> TarReader<R> {
    pub(crate) fn new(source: R) -> Self {
        Self { source, remaining: 0, padding: 0, ended: false, saw_end_marker: false }
    }

    /// Whether the end was marked by a zero block, and not only reached.
    pub(crate) fn saw_end_marker(&self) -> bool {
        self.saw_end_marker
    }

    /// Gives the source back, positioned behind what was read.
    pub(crate) fn source(&mut self) -> &mut R {
        &mut self.source
    }

    /// Passes over what is left of the current entry and reads the next header.
    pub(crate) fn next(&mut self) -> Result<Option<TarEntry>, TarError> {
        self.skip_data()?;
        let mut extended = pax::Extended::default();
        loop {
            if self.ended {
                return Ok(None);
            }
            let mut block = [0; BLOCK];
            if !self.read_block(&mut block)? {
                self.ended = true;
                if extended.is_empty() {
                    return Ok(None);
                }
                return Err(TarError::Truncated("an extended header"));
            }
            if block.iter().all(|byte| *byte == 0) {
                self.ended = true;
                self.saw_end_marker = true;
                return Ok(None);
            }
            let header = Header::parse(&block)?;
            match header.kind {
                b'x' | b'X' => extended.add_records(&self.read_extension(header.size)?)?,
                b'g' => {
                    self.read_extension(header.size)?;
                }
                b'L' => extended.long_path = Some(until_nul(&self.read_extension(header.size)?).to_vec()),
                b'K' => extended.long_link = Some(until_nul(&self.read_extension(header.size)?).to_vec()),
                // A volume label is a name for the tape, not a file.
                b'V' => self.set_data(header.size)?,
                _ => return self.finish_entry(&header, &block, extended).map(Some),
            }
            if header.kind == b'V' {
                self.skip_data()?;
            }
        }
    }

    fn finish_entry(
        &mut self,
        header: &Header,
        block: &[u8; BLOCK],
        mut extended: pax::Extended,
    ) -> Result<TarEntry, TarError> {
        let mut kind = match header.kind {
            0 | b'0' | b'7' | b'S' => EntryKind::Regular,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Character,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            _ => return Err(TarError::Format("an entry of unknown type")),
        };
        let path = extended.take_path().unwrap_or_else(|| header.path.clone());
        let link = extended.take_link().unwrap_or_else(|| header.link.clone());
        // Version 7 tar had no type for directories, only a trailing slash.
        if matches!(header.kind, 0 | b'0') && path.ends_with(b"/") {
            kind = EntryKind::Directory;
        }
        // Everything but a regular file is header only, whatever size it claims (POSIX pax, "linkname").
        let stored = if kind == EntryKind::Regular { extended.size.unwrap_or(header.size) } else { 0 };
        self.set_data(stored)?;
        let sparse = if kind != EntryKind::Regular {
            None
        } else if header.kind == b'S' {
            Some(self.read_old_sparse(block)?)
        } else if extended.sparse.is_one_dot_zero() {
            let map = self.read_sparse_map(extended.sparse.real_size()?)?;
            Some(map)
        } else {
            extended.sparse.map()?
        };
        if let Some(map) = &sparse
            && map.data_bytes() != self.remaining
        {
            return Err(TarError::Format("a sparse file whose map does not fit its data"));
        }
        let (mtime, mtime_nanoseconds) = extended.mtime.unwrap_or((header.mtime, 0));
        Ok(TarEntry {
            path,
            link,
            kind,
            mode: header.mode,
            uid: extended.uid.map_or_else(|| header.uid(), Ok)?,
            gid: extended.gid.map_or_else(|| header.gid(), Ok)?,
            mtime,
            mtime_nanoseconds,
            device_major: header.device_major,
            device_minor: header.device_minor,
            size: self.remaining,
            sparse,
            xattrs: extended.take_xattrs(),
        })
    }

    fn set_data(&mut self, size: u64) -> Result<(), TarError> {
        if size > i64::MAX as u64 - BLOCK as u64 {
            return Err(TarError::Format("an entry of absurd size"));
        }
        self.remaining = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let skip = self.remaining + self.padding;
        if skip > 0 {
            self.source.skip(skip).map_err(|error| eof("an entry", error))?;
        }
        self.remaining = 0;
        self.padding = 0;
        Ok(())
    }

    /// Reads one block; `false` at a clean end of the source.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(TarError::Truncated("a header")),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    fn read_extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > TAR_HEADER_BYTES {
            return Err(TarError::HeaderSize(TAR_HEADER_BYTES));
        }
        self.set_data(size)?;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        self.read_exact_data(&mut bytes)?;
        self.skip_data()?;
        Ok(bytes)
    }

    /// Fills `buffer` from the current entry's data.
    pub(crate) fn read_exact_data(&mut self, buffer: &mut [u8]) -> Result<(), TarError> {
        if buffer.len() as u64 > self.remaining {
            return Err(TarError::Truncated("an entry"));
        }
        self.source.read_exact(buffer).map_err(|error| eof("an entry", error))?;
        self.remaining -= buffer.len() as u64;
        Ok(())
    }

    /// Reads some of the current entry's data; 0 at its end, never before.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let want = buffer.len().min(usize::try_from(self.remaining).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        loop {
            match self.source.read(&mut buffer[..want]) {
                Ok(0) => return Err(TarError::Truncated("an entry")),
                Ok(count) => {
                    self.remaining -= count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn read_old_sparse(&mut self, block: &[u8; BLOCK]) -> Result<SparseMap, TarError> {
        let mut builder = sparse::Builder::default();
        let mut more = sparse::add_old_table(&mut builder, &block[386..482], block[482])?;
        let real_size = parse_number(&block[483..495])
            .and_then(|size| u64::try_from(size).ok())
            .ok_or(TarError::Format("a sparse file without a size"))?;
        // Extension blocks stand before the data and outside its size.
        while more {
            let mut extension = [0; BLOCK];
            if !self.read_block(&mut extension)? {
                return Err(TarError::Truncated("a sparse header"));
            }
            more = sparse::add_old_table(&mut builder, &extension[..504], extension[504])?;
        }
        builder.finish(real_size)
    }

    /// The map of format 1.0: decimal lines at the start of the data, padded to a block.
    fn read_sparse_map(&mut self, real_size: u64) -> Result<SparseMap, TarError> {
        let mut parser = sparse::MapParser::default();
        loop {
            let mut block = [0; BLOCK];
            self.read_exact_data(&mut block)?;
            if let Some(builder) = parser.feed(&block)? {
                return builder.finish(real_size);
            }
        }
    }
}

fn eof(what: &'static str, error: io::Error) -> TarError {
    if error.kind() == io::ErrorKind::UnexpectedEof { TarError::Truncated(what) } else { TarError::Source(error) }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or(bytes)
}

/// The fixed fields of one header block.
struct Header {
    path: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    mode: u16,
    uid: i64,
    gid: i64,
    size: u64,
    mtime: i64,
    device_major: u32,
    device_minor: u32,
}

impl Header {
    /// POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
    fn parse(block: &[u8; BLOCK]) -> Result<Self, TarError> {
        let expected = parse_number(&block[148..156]).ok_or(TarError::Format("a header without a checksum"))?;
        let mut unsigned = 0i64;
        let mut signed = 0i64;
        for (index, byte) in block.iter().enumerate() {
            let byte = if (148..156).contains(&index) { b' ' } else { *byte };
            unsigned += i64::from(byte);
            // Some old tars summed signed bytes.
            signed += i64::from(byte.cast_signed());
        }
        if expected != unsigned && expected != signed {
            return Err(TarError::Format("a header with a wrong checksum"));
        }
        let field = |range: std::ops::Range<usize>, what| parse_number(&block[range]).ok_or(TarError::Format(what));
        let mut path = until_nul(&block[..100]).to_vec();
        let posix = &block[257..263] == b"ustar\0";
        let prefix = until_nul(&block[345..500]);
        if posix && !prefix.is_empty() {
            let mut joined = prefix.to_vec();
            joined.push(b'/');
            joined.extend_from_slice(&path);
            path = joined;
        }
        let has_devices = &block[257..262] == b"ustar";
        let device = |range: std::ops::Range<usize>| {
            if has_devices {
                parse_number(&block[range]).and_then(|number| u32::try_from(number).ok())
            } else {
                Some(0)
            }
            .ok_or(TarError::Format("a device number that is not valid"))
        };
        let kind = block[156];
        let is_device = matches!(kind, b'3' | b'4');
        let mode = field(100..108, "a mode that is not a number")?;
        let size = field(124..136, "a size that is not a number")?;
        Ok(Self {
            path,
            link: until_nul(&block[157..257]).to_vec(),
            kind,
            mode: u16::try_from(mode & 0o7777).unwrap_or(0),
            uid: field(108..116, "a user id that is not a number")?,
            gid: field(116..124, "a group id that is not a number")?,
            size: u64::try_from(size).map_err(|_| TarError::Format("a negative size"))?,
            mtime: field(136..148, "a time that is not a number")?,
            device_major: if is_device { device(329..337)? } else { 0 },
            device_minor: if is_device { device(337..345)? } else { 0 },
        })
    }

    fn uid(&self) -> Result<u32, TarError> {
        u32::try_from(self.uid).map_err(|_| TarError::Format("a user id outside 32 bits"))
    }

    fn gid(&self) -> Result<u32, TarError> {
        u32::try_from(self.gid).map_err(|_| TarError::Format("a group id outside 32 bits"))
    }
}

/// A numeric field: octal with blanks around, or GNU base-256 when the top bit is set. Empty means 0.
fn parse_number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        // Two's complement, big endian, the marker bit being part of neither sign nor value.
        let mut value: i64 = if first & 0x40 != 0 { -1 } else { 0 };
        for (index, byte) in field.iter().enumerate() {
            let byte = if index == 0 { if value < 0 { byte | 0x80 } else { byte & 0x7f } } else { *byte };
            value = value.checked_mul(256)?.checked_add(i64::from(byte))?;
        }
        return Some(value);
    }
    let text = field.trim_ascii_start();
    let end = text.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(text.len());
    text[..end].iter().try_fold(0i64, |value, byte| {
        if !(b'0'..=b'7').contains(byte) || value > i64::MAX >> 3 {
            return None;
        }
        Some((value << 3) | i64::from(byte - b'0'))
    })
}

#[cfg(test)]
mod tests;
