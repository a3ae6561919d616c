//! Packets of SFTP version 3 (draft-ietf-secsh-filexfer-02): reading fields of a request, writing fields of an answer. Pure; a
//! request is the client's and hostile.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// Largest packet that is taken, in bytes: what OpenSSH's own limit is.
pub const PACKET_LEN_MAX: usize = 256 << 10;

/// Kinds of packets.
#[allow(missing_docs, reason = "the names are the draft's")]
pub mod kind {
    pub const INIT: u8 = 1;
    pub const VERSION: u8 = 2;
    pub const OPEN: u8 = 3;
    pub const CLOSE: u8 = 4;
    pub const READ: u8 = 5;
    pub const WRITE: u8 = 6;
    pub const LSTAT: u8 = 7;
    pub const FSTAT: u8 = 8;
    pub const SETSTAT: u8 = 9;
    pub const FSETSTAT: u8 = 10;
    pub const OPENDIR: u8 = 11;
    pub const READDIR: u8 = 12;
    pub const REMOVE: u8 = 13;
    pub const MKDIR: u8 = 14;
    pub const RMDIR: u8 = 15;
    pub const REALPATH: u8 = 16;
    pub const STAT: u8 = 17;
    pub const RENAME: u8 = 18;
    pub const READLINK: u8 = 19;
    pub const SYMLINK: u8 = 20;
    pub const STATUS: u8 = 101;
    pub const HANDLE: u8 = 102;
    pub const DATA: u8 = 103;
    pub const NAME: u8 = 104;
    pub const ATTRS: u8 = 105;
    pub const EXTENDED: u8 = 200;
    pub const EXTENDED_REPLY: u8 = 201;
}

const ATTR_SIZE: u32 = 1;
const ATTR_OWNER: u32 = 2;
const ATTR_MODE: u32 = 4;
const ATTR_TIMES: u32 = 8;
const ATTR_EXTENDED: u32 = 0x8000_0000;

/// The fields of a request, in order.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of 32 bits.
    pub fn number(&mut self) -> Option<u32> {
        self.take(4)?.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes))
    }

    /// A number of 64 bits.
    pub fn large(&mut self) -> Option<u64> {
        self.take(8)?.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes))
    }

    /// A string of bytes.
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.number()?).ok()?;
        self.take(len)
    }

    /// Attributes to set.
    pub fn attributes(&mut self) -> Option<Attributes> {
        let flags = self.number()?;
        let mut wanted = Attributes::default();
        if flags & ATTR_SIZE != 0 {
            wanted.size = Some(self.large()?);
        }
        if flags & ATTR_OWNER != 0 {
            wanted.owner = Some((self.number()?, self.number()?));
        }
        if flags & ATTR_MODE != 0 {
            wanted.mode = Some(self.number()? & 0o7777);
        }
        if flags & ATTR_TIMES != 0 {
            wanted.times = Some((self.number()?, self.number()?));
        }
        if flags & ATTR_EXTENDED != 0 {
            // Nobody defines any; they are passed over.
            for _ in 0..self.number()?.min(64) {
                self.bytes()?;
                self.bytes()?;
            }
        }
        Some(wanted)
    }
}

/// Attributes a client wants to have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Length in bytes.
    pub size: Option<u64>,
    /// User and group.
    pub owner: Option<(u32, u32)>,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Access and modification time in seconds since 1970.
    pub times: Option<(u32, u32)>,
}

/// An answer that is being written into a buffer of answers; its length is filled in when it is finished.
#[derive(Debug)]
pub struct Reply<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Reply<'a> {
    /// Begins an answer to a request.
    pub fn begin(out: &'a mut Vec<u8>, kind: u8, id: u32) -> Self {
        let mut reply = Self::bare(out, kind);
        reply.number(id);
        reply
    }

    /// Begins a packet that answers no request.
    pub fn bare(out: &'a mut Vec<u8>, kind: u8) -> Self {
        let start = out.len();
        out.extend_from_slice(&[0, 0, 0, 0, kind]);
        Self { out, start }
    }

    /// A number of 32 bits.
    pub fn number(&mut self, number: u32) -> &mut Self {
        self.out.extend_from_slice(&number.to_be_bytes());
        self
    }

    /// A number of 64 bits.
    pub fn large(&mut self, number: u64) -> &mut Self {
        self.out.extend_from_slice(&number.to_be_bytes());
        self
    }

    /// A string of bytes; nothing here is near 4 GiB.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.number(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        self.out.extend_from_slice(bytes);
        self
    }

    /// A string that is written in place: room for `len_max` bytes, of which `fill` says how many it used.
    ///
    /// # Errors
    /// As `fill`; nothing is left of the answer then.
    pub fn fill<E>(mut self, len_max: usize, fill: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        self.number(0);
        let at = self.out.len();
        self.out.resize(at + len_max, 0);
        match fill(&mut self.out[at..]) {
            Ok(len) => {
                let len = len.min(len_max);
                self.out.truncate(at + len);
                self.out[at - 4..at].copy_from_slice(&u32::try_from(len).unwrap_or(0).to_be_bytes());
                self.finish();
                Ok(())
            }
            Err(error) => {
                self.out.truncate(self.start);
                Err(error)
            }
        }
    }

    /// What a file is.
    pub fn attributes(&mut self, file: &std::fs::Metadata) -> &mut Self {
        let seconds = |time: i64| u32::try_from(time.max(0)).unwrap_or(u32::MAX);
        self.number(ATTR_SIZE | ATTR_OWNER | ATTR_MODE | ATTR_TIMES).large(file.size());
        self.number(file.uid()).number(file.gid()).number(file.mode());
        self.number(seconds(file.atime())).number(seconds(file.mtime()))
    }

    /// The end of the answer.
    pub fn finish(&mut self) {
        let len = u32::try_from(self.out.len() - self.start - 4).unwrap_or(u32::MAX);
        self.out[self.start..self.start + 4].copy_from_slice(&len.to_be_bytes());
    }
}

/// A line as `ls -l` writes it, which clients show as it is.
#[must_use]
pub fn long_name(name: &[u8], file: &std::fs::Metadata) -> Vec<u8> {
    let kind = match file.file_type() {
        kind if kind.is_dir() => 'd',
        kind if kind.is_symlink() => 'l',
        kind if kind.is_block_device() => 'b',
        kind if kind.is_char_device() => 'c',
        kind if kind.is_fifo() => 'p',
        kind if kind.is_socket() => 's',
        _ => '-',
    };
    let mode = file.mode();
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, false) => 'x',
            (false, false) => '-',
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
        });
    }
    let date = date_of(file.mtime());
    let mut line = format!("{text} {:>3} {:<8} {:<8} {:>8} {date} ", file.nlink(), file.uid(), file.gid(), file.size())
        .into_bytes();
    line.extend_from_slice(name);
    line
}

/// `Jan  2  2026`, in UTC, of seconds since 1970 (days to civil date by the Gregorian cycle of 146,097 days).
fn date_of(seconds: i64) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let days = seconds.div_euclid(86_400) + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months are counted from March, so that the leap day comes last.
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = (shifted + 2) % 12;
    let year = year_of_era + era * 400 + i64::from(month < 2);
    let name = usize::try_from(month).ok().and_then(|month| MONTHS.get(month)).copied().unwrap_or("Jan");
    format!("{name} {day:>2} {year:>5}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        for (seconds, text) in [
            (0, "Jan  1  1970"),
            (951_782_400, "Feb 29  2000"),
            (951_868_800, "Mar  1  2000"),
            (1_767_225_599, "Dec 31  2025"),
            (1_767_225_600, "Jan  1  2026"),
            (-1, "Dec 31  1969"),
        ] {
            assert_eq!(date_of(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn fields_end_where_the_packet_does() {
        let mut fields = Fields(&[0, 0, 0, 2, b'a', b'b', 0, 0, 0, 9, b'c']);
        assert_eq!(fields.bytes(), Some(&b"ab"[..]));
        assert_eq!(fields.bytes(), None);
        assert_eq!(Fields(&[0xff; 4]).bytes(), None);
        assert_eq!(Fields(&[0, 0, 0, 15, 0]).attributes(), None);
        let mut out = Vec::new();
        let mut wanted = Vec::new();
        wanted.extend_from_slice(&13u32.to_be_bytes());
        wanted.extend_from_slice(&7u64.to_be_bytes());
        for number in [0o100_644u32, 5, 6] {
            wanted.extend_from_slice(&number.to_be_bytes());
        }
        let read = Fields(&wanted).attributes().unwrap();
        assert_eq!(read, Attributes { size: Some(7), owner: None, mode: Some(0o644), times: Some((5, 6)) });
        Reply::begin(&mut out, kind::DATA, 3).fill(10, |room| Ok::<_, ()>(room.len().min(2))).unwrap();
        assert_eq!(out, [0, 0, 0, 11, 103, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0]);
        Reply::begin(&mut out, kind::DATA, 3).fill(10, |_| Err(())).unwrap_err();
        assert_eq!(out.len(), 15, "a failed answer leaves nothing");
    }
}
