//! Entries of a tar stream that nobody vouches for: ustar, GNU and pax headers, both ways of writing holes. Whatever the bytes say, memory
//! is bounded by [`EXTENSION_LEN_MAX`] and [`EXTENTS_MAX`]. It judges no path: that is `unpack`'s. Used by `unpack`, and by the fuzzer.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use crate::TreeError;
use crate::header::{BLOCK_LEN, XATTR_PREFIX, padding};

/// Longest extended header, in bytes: the largest set of attributes Linux keeps, with room around it.
pub(crate) const EXTENSION_LEN_MAX: u64 = 1 << 20;
/// Most pieces of data in a file with holes.
pub(crate) const EXTENTS_MAX: usize = 1 << 16;
/// Most extended headers in a row.
const EXTENSIONS_MAX: usize = 16;

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its path as it stands in the stream.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change: seconds since 1970, and nanoseconds.
    pub modified: (i64, u32),
    /// Bytes of content that follow in the stream.
    pub size: u64,
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Of a file with holes: its real size, and the pieces of data (offset and length in bytes), in order.
    pub sparse: Option<(u64, Vec<(u64, u64)>)>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this text.
    Symlink(Vec<u8>),
    /// One more name of this entry.
    HardLink(Vec<u8>),
    /// Something that is not copied.
    Special(&'static str),
}

/// Reads entries one after the other.
pub struct Entries<R> {
    input: R,
    /// Content of the last entry that was not read yet.
    left: u64,
    /// Bytes after it up to the next block.
    padding: u64,
    over: bool,
}

/// What extended headers say about the entry that follows.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse_version: Option<Vec<u8>>,
    sparse_minor: Option<Vec<u8>>,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_old: bool,
}

impl<R: Read> Entries<R> {
    /// Reads from here.
    pub fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0, over: false }
    }

    /// The next entry; none at the end of the archive. What is left of the last one's content is skipped.
    ///
    /// # Errors
    /// [`TreeError::Malformed`], [`TreeError::Stream`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TreeError> {
        let mut extension = Extension::default();
        for _ in 0..=EXTENSIONS_MAX {
            self.skip(self.left)?;
            self.left = 0;
            self.skip(self.padding)?;
            self.padding = 0;
            let Some(header) = self.header()? else { return Ok(None) };
            let size = number(header.entry_size())?;
            match header.entry_type() {
                EntryType::XHeader => {
                    let records = self.extension(size)?;
                    extension.pax(&records)?;
                }
                EntryType::XGlobalHeader => drop(self.extension(size)?),
                EntryType::GNULongName => extension.path = Some(text(self.extension(size)?)),
                EntryType::GNULongLink => extension.link = Some(text(self.extension(size)?)),
                kind => return self.entry(&header, kind, extension).map(Some),
            }
        }
        Err(TreeError::Malformed("too many extended headers in a row"))
    }

    /// Reads content of the last entry; 0 at its end.
    ///
    /// # Errors
    /// [`TreeError::Stream`] if the stream ends within it.
    pub fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, TreeError> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if len == 0 {
            return Ok(0);
        }
        let got = self.read_some(&mut buffer[..len])?;
        self.left -= got as u64;
        Ok(got)
    }

    /// Reads what follows the archive up to the end of the stream, so that the sender is done.
    ///
    /// # Errors
    /// [`TreeError::Stream`].
    pub fn finish(mut self) -> Result<(), TreeError> {
        let mut waste = vec![0; 16 << 10];
        loop {
            match self.input.read(&mut waste) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// At least one byte.
    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, TreeError> {
        loop {
            match self.input.read(buffer) {
                Ok(0) => return Err(TreeError::Stream(io::ErrorKind::UnexpectedEof.into())),
                Ok(len) => return Ok(len),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn skip(&mut self, mut len: u64) -> Result<(), TreeError> {
        let mut waste = [0; BLOCK_LEN];
        while len > 0 {
            let now = usize::try_from(len).unwrap_or(usize::MAX).min(waste.len());
            len -= self.read_some(&mut waste[..now])? as u64;
        }
        Ok(())
    }

    /// The next header; none at the end. An end without its two empty blocks is taken for one, as everybody does.
    fn header(&mut self) -> Result<Option<Header>, TreeError> {
        if self.over {
            return Ok(None);
        }
        let mut block = [0; BLOCK_LEN];
        let mut filled = 0;
        while filled < BLOCK_LEN {
            match self.input.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => {
                    self.over = true;
                    return Ok(None);
                }
                Ok(0) => return Err(TreeError::Stream(io::ErrorKind::UnexpectedEof.into())),
                Ok(len) => filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        if block == [0; BLOCK_LEN] {
            self.over = true;
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        let sum =
            block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) });
        if header.cksum().ok() != Some(sum.sum()) {
            return Err(TreeError::Malformed("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    /// The content of an extended header.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TreeError> {
        if size > EXTENSION_LEN_MAX {
            return Err(TreeError::Malformed("an extended header is too long"));
        }
        self.left = size;
        self.padding = padding(size) as u64;
        let mut content = Vec::new();
        let mut block = [0; BLOCK_LEN];
        loop {
            match self.read_content(&mut block)? {
                0 => return Ok(content),
                len => content.extend_from_slice(&block[..len]),
            }
        }
    }

    fn entry(&mut self, header: &Header, kind: EntryType, extension: Extension) -> Result<Entry, TreeError> {
        let size = match extension.size {
            Some(size) => size,
            None => number(header.entry_size())?,
        };
        let id = |own: Option<u64>, header: io::Result<u64>| -> Result<u32, TreeError> {
            let id = match own {
                Some(id) => id,
                None => number(header)?,
            };
            u32::try_from(id).map_err(|_| TreeError::Malformed("an owner is no number of a user"))
        };
        let modified = match extension.modified {
            Some(modified) => modified,
            // A negative number in GNU's binary form comes as the same bits.
            None => (number(header.mtime())?.cast_signed(), 0),
        };
        let path = extension.sparse_name.or(extension.path).unwrap_or_else(|| header.path_bytes().into_owned());
        if path.is_empty() {
            return Err(TreeError::Malformed("an entry has no name"));
        }
        let link = extension
            .link
            .unwrap_or_else(|| header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default());
        let kind_of_entry = match kind {
            EntryType::Directory => EntryKind::Directory,
            EntryType::Symlink => EntryKind::Symlink(link),
            EntryType::Link => EntryKind::HardLink(link),
            EntryType::Char | EntryType::Block => EntryKind::Special("device"),
            EntryType::Fifo => EntryKind::Special("pipe"),
            // Before POSIX a directory was a file whose name ends so.
            EntryType::Regular if path.ends_with(b"/") => EntryKind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => EntryKind::File,
            _ => EntryKind::Special("thing of an unknown kind"),
        };
        // Only files have content; what a link or a directory claims is an old tar's idea of a size.
        let has_content = matches!(kind_of_entry, EntryKind::File | EntryKind::Special(_));
        self.left = if has_content { size } else { 0 };
        self.padding = if has_content { padding(size) as u64 } else { 0 };
        let sparse = match (kind, &extension.sparse_version) {
            _ if kind_of_entry != EntryKind::File => None,
            (EntryType::GNUSparse, _) => Some(self.gnu_map(header)?),
            (_, Some(major)) if major == b"1" && extension.sparse_minor.as_deref() == Some(b"0") => {
                let real = extension.sparse_size.ok_or(TreeError::Malformed("a file with holes has no size"))?;
                Some((real, self.pax_map()?))
            }
            (_, Some(_)) => return Err(TreeError::Malformed("holes are written in an unknown way")),
            _ if extension.sparse_old => {
                return Err(TreeError::Malformed("holes are written in an old way; use tar --sparse-version=1.0"));
            }
            _ => None,
        };
        if let Some((real, map)) = &sparse {
            check_map(*real, map, self.left)?;
        }
        Ok(Entry {
            path,
            kind: kind_of_entry,
            mode: number(header.mode())? & 0o7777,
            uid: id(extension.uid, header.uid())?,
            gid: id(extension.gid, header.gid())?,
            modified,
            size: self.left,
            xattrs: extension.xattrs,
            sparse,
        })
    }

    /// The map in front of the data of a file with holes (GNU.sparse 1.0): numbers, one a line, filled up to a block.
    fn pax_map(&mut self) -> Result<Vec<(u64, u64)>, TreeError> {
        let mut block = [0; BLOCK_LEN];
        let mut at = BLOCK_LEN;
        let mut next = |entries: &mut Self| -> Result<u64, TreeError> {
            let mut value = 0u64;
            let mut digits = 0;
            loop {
                if at == BLOCK_LEN {
                    let mut filled = 0;
                    while filled < BLOCK_LEN {
                        match entries.read_content(&mut block[filled..])? {
                            0 => return Err(TreeError::Malformed("a map of holes is cut short")),
                            len => filled += len,
                        }
                    }
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match byte {
                    b'\n' if digits > 0 => return Ok(value),
                    b'0'..=b'9' if digits < 20 => {
                        digits += 1;
                        value = value
                            .checked_mul(10)
                            .and_then(|value| value.checked_add(u64::from(byte - b'0')))
                            .ok_or(TreeError::Malformed("a map of holes has a number that is too large"))?;
                    }
                    _ => return Err(TreeError::Malformed("a map of holes is no list of numbers")),
                }
            }
        };
        let count = next(self)?;
        if count > EXTENTS_MAX as u64 {
            return Err(TreeError::Malformed("a file has too many holes"));
        }
        let mut map = Vec::new();
        for _ in 0..count {
            map.push((next(self)?, next(self)?));
        }
        Ok(map)
    }

    /// The map in the header of a file with holes, and in the blocks that follow it (GNU's own form).
    fn gnu_map(&mut self, header: &Header) -> Result<(u64, Vec<(u64, u64)>), TreeError> {
        let gnu = header.as_gnu().ok_or(TreeError::Malformed("a file with holes has no GNU header"))?;
        let mut map = Vec::new();
        let add = |map: &mut Vec<(u64, u64)>, piece: &GnuSparseHeader| -> Result<(), TreeError> {
            if !piece.is_empty() {
                map.push((number(piece.offset())?, number(piece.length())?));
            }
            if map.len() > EXTENTS_MAX { Err(TreeError::Malformed("a file has too many holes")) } else { Ok(()) }
        };
        for piece in &gnu.sparse {
            add(&mut map, piece)?;
        }
        let mut more = gnu.is_extended();
        let (left, padding) = (self.left, self.padding);
        while more {
            let mut block = GnuExtSparseHeader::new();
            let mut filled = 0;
            while filled < BLOCK_LEN {
                filled += self.read_some(&mut block.as_mut_bytes()[filled..])?;
            }
            for piece in block.sparse() {
                add(&mut map, piece)?;
            }
            more = block.is_extended();
            if more && block.sparse().iter().all(GnuSparseHeader::is_empty) {
                return Err(TreeError::Malformed("a map of holes does not end"));
            }
        }
        (self.left, self.padding) = (left, padding);
        Ok((number(gnu.real_size())?, map))
    }
}

fn check_map(real: u64, map: &[(u64, u64)], stored: u64) -> Result<(), TreeError> {
    let (mut end, mut sum) = (0u64, 0u64);
    for (offset, len) in map {
        let after = offset.checked_add(*len).filter(|after| *offset >= end && *after <= real);
        end = after.ok_or(TreeError::Malformed("a map of holes contradicts itself"))?;
        sum += len;
    }
    if sum == stored { Ok(()) } else { Err(TreeError::Malformed("a map of holes does not fit its data")) }
}

fn number<T>(value: io::Result<T>) -> Result<T, TreeError> {
    value.map_err(|_| TreeError::Malformed("a header holds what is no number"))
}

/// Up to the first zero byte.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

impl Extension {
    /// Takes the records of a pax header in place of those of an earlier one.
    fn pax(&mut self, mut records: &[u8]) -> Result<(), TreeError> {
        let broken = || TreeError::Malformed("an extended header is no list of records");
        self.xattrs.clear();
        while !records.is_empty() {
            let space = records.iter().take(20).position(|byte| *byte == b' ').ok_or_else(broken)?;
            let len = usize::try_from(decimal(&records[..space]).ok_or_else(broken)?).map_err(|_| broken())?;
            let record =
                records.get(space + 1..len).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(broken)?;
            records = &records[len..];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(broken)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let size = || decimal(value).ok_or_else(broken);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(size()?),
                b"uid" => self.uid = Some(size()?),
                b"gid" => self.gid = Some(size()?),
                b"mtime" => self.modified = Some(time(value).ok_or_else(broken)?),
                b"GNU.sparse.major" => self.sparse_version = Some(value.to_vec()),
                b"GNU.sparse.minor" => self.sparse_minor = Some(value.to_vec()),
                b"GNU.sparse.name" => self.sparse_name = Some(value.to_vec()),
                b"GNU.sparse.realsize" => self.sparse_size = Some(size()?),
                b"GNU.sparse.map" | b"GNU.sparse.offset" | b"GNU.sparse.numblocks" => self.sparse_old = true,
                _ => {
                    if let Some(name) = key.strip_prefix(XATTR_PREFIX)
                        && !name.is_empty()
                    {
                        self.xattrs.push((name.to_vec(), value.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Decimal seconds, with a fraction and a sign if there are.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |rest| (true, rest));
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let whole = i64::try_from(decimal(whole)?).ok()?;
    let mut nanoseconds = 0u32;
    for at in 0..9 {
        let digit = fraction.get(at).copied().unwrap_or(b'0');
        nanoseconds = nanoseconds * 10 + char::from(digit).to_digit(10)?;
    }
    Some(match (negative, nanoseconds) {
        (false, _) => (whole, nanoseconds),
        (true, 0) => (-whole, 0),
        (true, _) => (-whole - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        for (text, wanted) in [
            ("5", Some((5, 0))),
            ("5.000000007", Some((5, 7))),
            ("-0.5", Some((-1, 500_000_000))),
            ("-1.999999999", Some((-2, 1))),
            ("-3", Some((-3, 0))),
            ("1.x", None),
            ("", None),
            ("9223372036854775808", None),
        ] {
            assert_eq!(time(text.as_bytes()), wanted, "{text}");
        }
    }

    #[test]
    fn maps_that_contradict_themselves_are_refused() {
        assert!(check_map(10, &[(0, 2), (4, 2)], 4).is_ok());
        for (real, map, stored) in [
            (10, vec![(4, 2), (0, 2)], 4),
            (10, vec![(0, 4), (2, 2)], 6),
            (3, vec![(0, 4)], 4),
            (10, vec![(u64::MAX, 2)], 2),
            (10, vec![(0, 4)], 5),
        ] {
            assert!(check_map(real, &map, stored).is_err(), "{map:?}");
        }
    }
}
