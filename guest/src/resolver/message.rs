//! DNS messages (RFC 1035, section 4): one question out, the addresses of one answer in. Pure; an answer is hostile: every read is
//! bounded, a name's length is counted and never followed.

use std::net::IpAddr;

use super::files::ADDRESSES_MAX;

/// Record type of IPv4 addresses.
pub const TYPE_A: u16 = 1;
/// Record type of IPv6 addresses.
pub const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
const CLASS_IN: u16 = 1;
/// Largest answer over UDP that is asked for, in bytes.
pub const UDP_LEN_MAX: u16 = 1232;
/// Option code of extended errors (RFC 8914).
const OPTION_EXTENDED_ERROR: u16 = 15;
/// Most records of an answer that are looked at.
const RECORDS_MAX: usize = 256;

/// What an answer says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Addresses, perhaps none of this type.
    Addresses(Vec<IpAddr>),
    /// There is no such name.
    NoSuchName,
    /// The policy of whoever answered forbids the name; the reason in its words.
    Denied(String),
    /// Too long for UDP: ask again over TCP.
    Truncated,
    /// The server cannot or will not answer.
    Failed,
}

/// A question, or none if the name cannot be one.
#[must_use]
pub fn question(id: u16, name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() + 40);
    out.extend_from_slice(&id.to_be_bytes());
    // Recursion desired; one question, one additional record.
    out.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
    if name.is_empty() || name.len() > 253 {
        return None;
    }
    for label in name.split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..=63).contains(len))?;
        out.push(len);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&CLASS_IN.to_be_bytes());
    // EDNS (RFC 6891): root name, OPT, our size, no flags, no data. Without it nobody sends extended errors.
    out.push(0);
    out.extend_from_slice(&TYPE_OPT.to_be_bytes());
    out.extend_from_slice(&UDP_LEN_MAX.to_be_bytes());
    out.extend_from_slice(&[0; 6]);
    Some(out)
}

/// Reads what answers a question; none if it is no answer to it.
#[must_use]
pub fn answer(question: &[u8], bytes: &[u8]) -> Option<Answer> {
    let mut reader = Reader { bytes, at: 0 };
    let id = reader.short()?;
    let flags = reader.short()?;
    let counts = [reader.short()?, reader.short()?, reader.short()?, reader.short()?];
    // The same id and, if it is repeated, the same question: anything else is somebody else's or a forgery.
    if id.to_be_bytes() != question.get(..2)? || flags & 0x8000 == 0 {
        return None;
    }
    if flags & 0x0200 != 0 {
        return Some(Answer::Truncated);
    }
    for _ in 0..counts[0].min(1) {
        let start = reader.at;
        reader.name()?;
        reader.short()?;
        reader.short()?;
        let asked = question.get(12..12 + (reader.at - start))?;
        if !bytes.get(start..reader.at)?.eq_ignore_ascii_case(asked) {
            return None;
        }
    }
    let kind = u16::from_be_bytes(question.get(question.len().checked_sub(15)?..)?.first_chunk::<2>().copied()?);
    let (mut addresses, mut denied) = (Vec::new(), None);
    let records = counts[1..].iter().map(|count| usize::from(*count)).sum::<usize>().min(RECORDS_MAX);
    for number in 0..records {
        // What follows a record that cannot be read is not looked at; what came before it counts.
        let Some((record_kind, data)) = reader.record() else { break };
        if record_kind == TYPE_OPT {
            denied = denied.or_else(|| extended_denial(data));
        } else if record_kind == kind && number < usize::from(counts[1]) && addresses.len() < ADDRESSES_MAX {
            match (kind, data.len()) {
                (TYPE_A, 4) => addresses.extend(data.first_chunk::<4>().map(|octets| IpAddr::from(*octets))),
                (TYPE_AAAA, 16) => addresses.extend(data.first_chunk::<16>().map(|octets| IpAddr::from(*octets))),
                _ => {}
            }
        }
    }
    Some(match (flags & 15, denied) {
        (0, None) => Answer::Addresses(addresses),
        (0, Some(_)) if !addresses.is_empty() => Answer::Addresses(addresses),
        (_, Some(reason)) => Answer::Denied(reason),
        (3, None) => Answer::NoSuchName,
        _ => Answer::Failed,
    })
}

/// The reason of an extended error that means "not allowed" (blocked, censored, filtered, prohibited).
fn extended_denial(options: &[u8]) -> Option<String> {
    let mut reader = Reader { bytes: options, at: 0 };
    loop {
        let (code, len) = (reader.short()?, reader.short()?);
        let data = reader.take(usize::from(len))?;
        if code != OPTION_EXTENDED_ERROR {
            continue;
        }
        let (info, text) = data.split_first_chunk::<2>()?;
        if (15..=18).contains(&u16::from_be_bytes(*info)) {
            return Some(String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).take(256).collect());
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    fn short(&mut self) -> Option<u16> {
        self.take(2)?.first_chunk::<2>().map(|bytes| u16::from_be_bytes(*bytes))
    }

    /// Passes over a name; a pointer ends it.
    fn name(&mut self) -> Option<()> {
        loop {
            match self.take(1)?.first().copied()? {
                0 => return Some(()),
                len @ 1..=63 => drop(self.take(usize::from(len))?),
                0xc0..=0xff => return self.take(1).map(drop),
                _ => return None,
            }
        }
    }

    fn record(&mut self) -> Option<(u16, &'a [u8])> {
        self.name()?;
        let kind = self.short()?;
        self.take(6)?;
        let len = self.short()?;
        Some((kind, self.take(usize::from(len))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(question: &[u8], code: u8, answers: u8, additional: u8, records: &[u8]) -> Vec<u8> {
        let mut bytes = question[..2].to_vec();
        bytes.extend_from_slice(&[0x81, 0x80 | code, 0, 1, 0, answers, 0, 0, 0, additional]);
        bytes.extend_from_slice(&question[12..question.len() - 11]);
        bytes.extend_from_slice(records);
        bytes
    }

    #[test]
    fn addresses_names_and_denials_are_told_apart() {
        let asked = question(7, "db.test", TYPE_A).unwrap();
        // A CNAME before the address; both owners are pointers.
        let records = [
            &[0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xc0, 12][..],
            &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 0, 0, 9],
        ]
        .concat();
        let found = answer(&asked, &reply(&asked, 0, 2, 0, &records)).unwrap();
        assert_eq!(found, Answer::Addresses(vec![IpAddr::from([10, 0, 0, 9])]));
        assert_eq!(answer(&asked, &reply(&asked, 3, 0, 0, &[])), Some(Answer::NoSuchName));
        assert_eq!(answer(&asked, &reply(&asked, 2, 0, 0, &[])), Some(Answer::Failed));
        let denial = [&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 8, 0, 15, 0, 4, 0, 18][..], b"no"].concat();
        assert_eq!(answer(&asked, &reply(&asked, 3, 0, 1, &denial)), Some(Answer::Denied("no".into())));
        let mut cut = reply(&asked, 0, 0, 0, &[]);
        cut[2] |= 2;
        assert_eq!(answer(&asked, &cut), Some(Answer::Truncated));
    }

    #[test]
    fn answers_to_other_questions_are_none() {
        let asked = question(7, "db.test", TYPE_A).unwrap();
        let other = question(8, "db.test", TYPE_A).unwrap();
        assert_eq!(answer(&asked, &reply(&other, 0, 0, 0, &[])), None);
        let mut other = question(7, "dc.test", TYPE_A).unwrap();
        assert_eq!(answer(&asked, &reply(&other, 0, 0, 0, &[])), None);
        other = question(7, "DB.test", TYPE_A).unwrap();
        assert_eq!(answer(&asked, &reply(&other, 0, 0, 0, &[])), Some(Answer::Addresses(vec![])));
        for bad in ["", ".", "a..b", &"x".repeat(64), &"a.".repeat(200)] {
            assert_eq!(question(1, bad, TYPE_A), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_none(bytes in prop::collection::vec(any::<u8>(), 0..600), flags in any::<u8>()) {
            let asked = question(0x0707, "db.test", TYPE_AAAA).unwrap();
            let _ = answer(&asked, &bytes);
            let _ = answer(&asked, &reply(&asked, flags & 15, 200, 200, &bytes));
        }
    }
}
