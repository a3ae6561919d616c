//! Sparse files in tar: GNU's old format, and PAX formats 0.0, 0.1 and 1.0 (GNU tar manual, "Storing Sparse Files").
//!
//! A map is runs of data in ascending order without overlap, inside the file's real size; anything else is refused.

use super::pax::decimal;
use super::{BLOCK, TarError, parse_number};
use crate::limits::{FILE_BYTES, SPARSE_RUNS};

/// Where the stored bytes of a sparse file belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SparseMap {
    /// Apparent size of the file.
    pub(crate) real_size: u64,
    /// Offset and length of each run of data, none empty.
    pub(crate) runs: Vec<(u64, u64)>,
}

impl SparseMap {
    pub(crate) fn data_bytes(&self) -> u64 {
        self.runs.iter().map(|(_, length)| length).sum()
    }
}

#[derive(Default)]
pub(super) struct Builder {
    runs: Vec<(u64, u64)>,
}

impl Builder {
    fn add(&mut self, offset: u64, length: u64) -> Result<(), TarError> {
        if self.runs.len() >= SPARSE_RUNS {
            return Err(TarError::Format("a sparse file with too many runs"));
        }
        self.runs.push((offset, length));
        Ok(())
    }

    pub(super) fn finish(self, real_size: u64) -> Result<SparseMap, TarError> {
        const BAD: TarError = TarError::Format("a sparse file whose map is not in order");
        if real_size > FILE_BYTES {
            return Err(TarError::Format("a sparse file of more than 8 TiB"));
        }
        let mut end = 0u64;
        for (offset, length) in &self.runs {
            if *offset < end {
                return Err(BAD);
            }
            end = offset.checked_add(*length).ok_or(BAD)?;
            if end > real_size {
                return Err(BAD);
            }
        }
        Ok(SparseMap { real_size, runs: self.runs.into_iter().filter(|(_, length)| *length > 0).collect() })
    }
}

/// Adds the entries of an old GNU table; says whether an extension block follows.
pub(super) fn add_old_table(builder: &mut Builder, table: &[u8], extended: u8) -> Result<bool, TarError> {
    const BAD: TarError = TarError::Format("a sparse header that is not valid");
    for entry in table.chunks_exact(24) {
        if entry[0] == 0 && entry[12] == 0 {
            break;
        }
        let number = |field| parse_number(field).and_then(|number| u64::try_from(number).ok()).ok_or(BAD);
        builder.add(number(&entry[..12])?, number(&entry[12..])?)?;
    }
    Ok(extended != 0)
}

/// What PAX records said about a sparse file.
#[derive(Default)]
pub(super) struct PaxSparse {
    pub(super) name: Option<Vec<u8>>,
    real_size: Option<u64>,
    major: Option<u64>,
    /// Offsets and lengths in turn, as formats 0.0 and 0.1 give them.
    numbers: Vec<u64>,
    any: bool,
}

impl PaxSparse {
    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        const BAD: TarError = TarError::Format("a sparse record that is not a number");
        self.any = true;
        match key {
            b"name" if value.contains(&0) => return Err(TarError::Format("a path with a zero byte")),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.real_size = Some(decimal(value).ok_or(BAD)?),
            b"major" => self.major = Some(decimal(value).ok_or(BAD)?),
            b"offset" | b"numbytes" => self.push(decimal(value).ok_or(BAD)?)?,
            b"map" => {
                self.numbers.clear();
                for number in value.split(|byte| *byte == b',').filter(|number| !number.is_empty()) {
                    self.push(decimal(number).ok_or(BAD)?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn push(&mut self, number: u64) -> Result<(), TarError> {
        if self.numbers.len() >= SPARSE_RUNS * 2 {
            return Err(TarError::Format("a sparse file with too many runs"));
        }
        self.numbers.push(number);
        Ok(())
    }

    pub(super) fn is_one_dot_zero(&self) -> bool {
        self.major == Some(1)
    }

    pub(super) fn real_size(&self) -> Result<u64, TarError> {
        self.real_size.ok_or(TarError::Format("a sparse file without a size"))
    }

    /// The map of formats 0.0 and 0.1, if the entry is sparse.
    pub(super) fn map(&mut self) -> Result<Option<SparseMap>, TarError> {
        if !self.any {
            return Ok(None);
        }
        if self.major.is_some_and(|major| major > 1) {
            return Err(TarError::Format("a sparse file of an unknown format"));
        }
        let (pairs, rest) = self.numbers.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(TarError::Format("a sparse map of odd length"));
        }
        let mut builder = Builder::default();
        for [offset, length] in pairs {
            builder.add(*offset, *length)?;
        }
        builder.finish(self.real_size()?).map(Some)
    }
}

/// Reads the decimal lines of format 1.0 block by block.
#[derive(Default)]
pub(super) struct MapParser {
    line: Vec<u8>,
    /// Numbers still to come, once the count is known.
    expected: Option<u64>,
    offset: Option<u64>,
    builder: Option<Builder>,
}

impl MapParser {
    /// Takes one block; the finished map ends with its block.
    pub(super) fn feed(&mut self, block: &[u8; BLOCK]) -> Result<Option<Builder>, TarError> {
        const BAD: TarError = TarError::Format("a sparse map that is not valid");
        for byte in block {
            if *byte != b'\n' {
                if self.line.len() >= 20 {
                    return Err(BAD);
                }
                self.line.push(*byte);
                continue;
            }
            let number = decimal(&self.line).ok_or(BAD)?;
            self.line.clear();
            match self.expected.as_mut() {
                None => {
                    if number > SPARSE_RUNS as u64 {
                        return Err(TarError::Format("a sparse file with too many runs"));
                    }
                    self.expected = Some(number * 2);
                    self.builder = Some(Builder::default());
                }
                Some(left) => {
                    *left -= 1;
                    match self.offset.take() {
                        None => self.offset = Some(number),
                        Some(offset) => self.builder.get_or_insert_default().add(offset, number)?,
                    }
                }
            }
            if self.expected == Some(0) {
                return Ok(self.builder.take());
            }
        }
        Ok(None)
    }
}
