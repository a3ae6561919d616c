//! PAX extended headers: `LENGTH key=value\n`, cut by length and never at newlines.
//!
//! POSIX.1-2017 pax, "pax Extended Header"; the attribute keys of star (`SCHILY.xattr.`) and libarchive (`LIBARCHIVE.xattr.`).

use super::TarError;
use super::sparse::PaxSparse;

/// An extended attribute: complete name and raw value.
pub(crate) type Xattr = (Vec<u8>, Vec<u8>);

/// What extended headers said about the entry that follows them.
#[derive(Default)]
pub(crate) struct Extended {
    pub(super) long_path: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) sparse: PaxSparse,
    xattrs: Vec<Xattr>,
    /// Attributes in libarchive's spelling; star's wins where both are present.
    encoded_xattrs: Vec<Xattr>,
    seen: bool,
}

impl Extended {
    pub(super) fn is_empty(&self) -> bool {
        !self.seen && self.long_path.is_none() && self.long_link.is_none()
    }

    pub(super) fn take_path(&mut self) -> Option<Vec<u8>> {
        // GNU's sparse name is the real one; `path` is then a made-up name for readers that know no sparse files.
        self.sparse.name.take().or_else(|| self.path.take()).or_else(|| self.long_path.take())
    }

    pub(super) fn take_link(&mut self) -> Option<Vec<u8>> {
        self.link.take().or_else(|| self.long_link.take())
    }

    pub(super) fn take_xattrs(&mut self) -> Vec<Xattr> {
        let mut xattrs = std::mem::take(&mut self.xattrs);
        for (name, value) in std::mem::take(&mut self.encoded_xattrs) {
            if !xattrs.iter().any(|(known, _)| *known == name) {
                xattrs.push((name, value));
            }
        }
        xattrs.sort();
        xattrs
    }

    pub(super) fn add_records(&mut self, mut bytes: &[u8]) -> Result<(), TarError> {
        const BAD: TarError = TarError::Format("a malformed pax record");
        self.seen = true;
        // Some writers pad the records with zeros up to the size they announced.
        while bytes.first().is_some_and(|byte| *byte != 0) {
            let blank = bytes.iter().take(20).position(|byte| *byte == b' ').ok_or(BAD)?;
            let length = decimal(&bytes[..blank]).and_then(|length| usize::try_from(length).ok()).ok_or(BAD)?;
            if length <= blank + 2 || length > bytes.len() || bytes[length - 1] != b'\n' {
                return Err(BAD);
            }
            let record = &bytes[blank + 1..length - 1];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
            self.add(&record[..equals], &record[equals + 1..])?;
            bytes = &bytes[length..];
        }
        Ok(())
    }

    fn add(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            set_xattr(&mut self.xattrs, name.to_vec(), value.to_vec());
            return Ok(());
        }
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let name = percent_decode(name).ok_or(TarError::Format("an attribute name that is not percent-encoded"))?;
            let value = base64_decode(value).ok_or(TarError::Format("an attribute value that is not base64"))?;
            set_xattr(&mut self.encoded_xattrs, name, value);
            return Ok(());
        }
        if key.starts_with(b"GNU.sparse.") {
            return self.sparse.add(&key[b"GNU.sparse.".len()..], value);
        }
        // An empty value takes an earlier one back (POSIX pax); real images have them.
        match key {
            b"path" => self.path = some_bytes(value, "a path with a zero byte")?,
            b"linkpath" => self.link = some_bytes(value, "a link with a zero byte")?,
            b"size" => self.size = some_number(value, "a pax size that is not a number")?,
            b"uid" => self.uid = some_id(value)?,
            b"gid" => self.gid = some_id(value)?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or(TarError::Format("a pax time that is not a number"))?),
            _ => {}
        }
        Ok(())
    }
}

fn set_xattr(list: &mut Vec<Xattr>, name: Vec<u8>, value: Vec<u8>) {
    match list.iter_mut().find(|(known, _)| *known == name) {
        Some(known) => known.1 = value,
        None => list.push((name, value)),
    }
}

fn some_bytes(value: &[u8], zero: &'static str) -> Result<Option<Vec<u8>>, TarError> {
    if value.contains(&0) {
        return Err(TarError::Format(zero));
    }
    Ok(if value.is_empty() { None } else { Some(value.to_vec()) })
}

fn some_number(value: &[u8], bad: &'static str) -> Result<Option<u64>, TarError> {
    if value.is_empty() { Ok(None) } else { decimal(value).map(Some).ok_or(TarError::Format(bad)) }
}

fn some_id(value: &[u8]) -> Result<Option<u32>, TarError> {
    const BAD: &str = "a pax user or group id outside 32 bits";
    some_number(value, BAD)?.map(|id| u32::try_from(id).map_err(|_| TarError::Format(BAD))).transpose()
}

/// Digits only; no sign, no blanks.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0u64, |value, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

/// Seconds with an optional fraction, as a floor and nanoseconds.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &[][..]),
    };
    let seconds = i64::try_from(if whole.is_empty() && !fraction.is_empty() { 0 } else { decimal(whole)? }).ok()?;
    let mut nanoseconds = 0u32;
    for index in 0..9 {
        let digit = match fraction.get(index) {
            Some(byte) if byte.is_ascii_digit() => u32::from(byte - b'0'),
            Some(_) => return None,
            None => 0,
        };
        nanoseconds = nanoseconds * 10 + digit;
    }
    if fraction.iter().any(|byte| !byte.is_ascii_digit()) {
        return None;
    }
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        if *byte == b'%' {
            let mut value = [0];
            hex::decode_to_slice(text.get(at + 1..at + 3)?, &mut value).ok()?;
            out.push(value[0]);
            at += 3;
        } else {
            out.push(*byte);
            at += 1;
        }
    }
    (!out.contains(&0)).then_some(out)
}

/// RFC 4648 base64 with or without padding; libarchive writes it without.
fn base64_decode(text: &[u8]) -> Option<Vec<u8>> {
    let text = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    if text.len() % 4 == 1 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    for group in text.chunks(4) {
        let mut bits = 0u32;
        for byte in group {
            let value = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = (bits << 6) | u32::from(value);
        }
        bits <<= 6 * (4 - group.len());
        out.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut length = body + 1;
        while length != body + length.to_string().len() {
            length = body + length.to_string().len();
        }
        [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
    }

    #[test]
    fn a_newline_inside_a_value_is_only_a_byte() {
        let mut extended = Extended::default();
        let bytes =
            [record(b"SCHILY.xattr.security.capability", b"\x01\n\n7 a=b\n"), record(b"path", b"a=b\nc")].concat();
        extended.add_records(&bytes).unwrap();
        assert_eq!(extended.take_xattrs(), [(b"security.capability".to_vec(), b"\x01\n\n7 a=b\n".to_vec())]);
        assert_eq!(extended.take_path().unwrap(), b"a=b\nc");
    }

    #[test]
    fn both_spellings_of_attributes_are_read_and_star_wins() {
        let mut extended = Extended::default();
        let bytes = [
            record(b"LIBARCHIVE.xattr.user.x%20y", b"AAEC"),
            record(b"LIBARCHIVE.xattr.user.both", b"AA"),
            record(b"SCHILY.xattr.user.both", b"star"),
        ]
        .concat();
        extended.add_records(&bytes).unwrap();
        assert_eq!(
            extended.take_xattrs(),
            [(b"user.both".to_vec(), b"star".to_vec()), (b"user.x y".to_vec(), vec![0, 1, 2])]
        );
    }

    #[test]
    fn times_are_floored_and_negative_ones_survive() {
        assert_eq!(time(b"12"), Some((12, 0)));
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"12.1234567899"), Some((12, 123_456_789)));
        assert_eq!(time(b"-1"), Some((-1, 0)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        for bad in [&b""[..], b"-", b"1.x", b"x", b"1.0000000000x", b"99999999999999999999"] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"5 a=b\n"[..],
            b"7 a=b\n",
            b"x a=b\n",
            b"6 a=bx",
            b"6 aab\n",
            b"99999999999999999999999 a=b\n",
            b"3 \n",
            b"0 a=b\n",
        ] {
            assert!(Extended::default().add_records(bad).is_err(), "{bad:?}");
        }
        let mut extended = Extended::default();
        extended.add_records(b"6 a=b\n\0\0\0").unwrap();
        assert!(extended.add_records(&record(b"path", b"a\0b")).is_err());
        assert!(extended.add_records(&record(b"uid", b"4294967296")).is_err());
        extended.add_records(&record(b"uid", b"4294967295")).unwrap();
        assert_eq!(extended.uid, Some(u32::MAX));
        extended.add_records(&record(b"uid", b"")).unwrap();
        assert_eq!(extended.uid, None);
    }

    #[test]
    fn base64_takes_both_paddings_and_nothing_else() {
        assert_eq!(base64_decode(b"aGk="), Some(b"hi".to_vec()));
        assert_eq!(base64_decode(b"aGk"), Some(b"hi".to_vec()));
        assert_eq!(base64_decode(b""), Some(vec![]));
        assert_eq!(base64_decode(b"a"), None);
        assert_eq!(base64_decode(b"a b="), None);
    }
}
