//! Header blocks of one entry, as GNU tar and everybody else reads them: ustar, with a pax extended header in front where ustar is too
//! narrow (long names, times below a second, large files, holes, extended attributes). Pure; used by `pack`.

use tar::{EntryType, Header};

/// Bytes of a tar block.
pub(crate) const BLOCK_LEN: usize = 512;
/// Largest value of a ustar number field of 12 bytes (11 octal digits).
const OCTAL_11_MAX: u64 = 0o77_777_777_777;
/// Largest value of a ustar number field of 8 bytes (7 octal digits).
const OCTAL_7_MAX: u64 = 0o7_777_777;
/// Prefix of an extended attribute's record.
pub(crate) const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What a header says.
#[derive(Debug)]
pub(crate) struct Described<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) kind: EntryType,
    /// Target of a link.
    pub(crate) link: &'a [u8],
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    /// Bytes that follow.
    pub(crate) size: u64,
    /// Size of a file with holes; the bytes that follow begin with a map of it.
    pub(crate) sparse_size: Option<u64>,
    pub(crate) xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// Appends the header's blocks.
pub(crate) fn write(entry: &Described<'_>, out: &mut Vec<u8>) {
    let mut records = Vec::new();
    let mut name = entry.path;
    if let Some(real) = entry.sparse_size {
        record(&mut records, b"GNU.sparse.major", b"1");
        record(&mut records, b"GNU.sparse.minor", b"0");
        record(&mut records, b"GNU.sparse.name", entry.path);
        record(&mut records, b"GNU.sparse.realsize", real.to_string().as_bytes());
        name = b"GNUSparseFile.0/sparse";
    } else if name.len() > 100 {
        record(&mut records, b"path", name);
    }
    if entry.link.len() > 100 {
        record(&mut records, b"linkpath", entry.link);
    }
    if entry.size > OCTAL_11_MAX {
        record(&mut records, b"size", entry.size.to_string().as_bytes());
    }
    for (key, id) in [(&b"uid"[..], entry.uid), (b"gid", entry.gid)] {
        if u64::from(id) > OCTAL_7_MAX {
            record(&mut records, key, id.to_string().as_bytes());
        }
    }
    let (seconds, nanoseconds) = entry.mtime;
    if nanoseconds > 0 || u64::try_from(seconds).map_or(true, |seconds| seconds > OCTAL_11_MAX) {
        record(&mut records, b"mtime", time(seconds, nanoseconds).as_bytes());
    }
    for (key, value) in entry.xattrs {
        record(&mut records, &[XATTR_PREFIX, key].concat(), value);
    }
    if !records.is_empty() {
        let mut header = Header::new_ustar();
        fill(&mut header, b"PaxHeaders/entry", b"", 0o644);
        header.set_entry_type(EntryType::XHeader);
        header.set_size(records.len() as u64);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        let len = records.len();
        out.append(&mut records);
        out.resize(out.len() + padding(len as u64), 0);
    }
    let mut header = Header::new_ustar();
    fill(&mut header, name, entry.link, entry.mode & 0o7777);
    header.set_entry_type(entry.kind);
    header.set_size(entry.size.min(OCTAL_11_MAX));
    header.set_uid(u64::from(entry.uid).min(OCTAL_7_MAX));
    header.set_gid(u64::from(entry.gid).min(OCTAL_7_MAX));
    header.set_mtime(u64::try_from(seconds).unwrap_or(0).min(OCTAL_11_MAX));
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
}

/// Bytes between an entry's content and the next block.
pub(crate) fn padding(len: u64) -> usize {
    // Below a block.
    (len.wrapping_neg() % BLOCK_LEN as u64) as usize
}

fn fill(header: &mut Header, name: &[u8], link: &[u8], mode: u32) {
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    if let Some(ustar) = header.as_ustar_mut() {
        let len = name.len().min(100);
        ustar.name[..len].copy_from_slice(&name[..len]);
        let len = link.len().min(100);
        ustar.linkname[..len].copy_from_slice(&link[..len]);
    }
}

/// `LENGTH KEY=VALUE\n`, the length counting itself.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    out.extend_from_slice(len.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// Seconds with a fraction; before 1970 the fraction still counts forward, as in timespec.
fn time(seconds: i64, nanoseconds: u32) -> String {
    if nanoseconds == 0 {
        return seconds.to_string();
    }
    if seconds < 0 {
        return format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds);
    }
    format!("{seconds}.{nanoseconds:09}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        for len in [1, 5, 85, 86, 87, 88, 985, 986, 987, 988, 989] {
            let mut out = Vec::new();
            record(&mut out, b"key", &vec![b'x'; len]);
            let text = String::from_utf8(out.clone()).unwrap();
            assert_eq!(text.split_once(' ').unwrap().0.parse::<usize>().unwrap(), out.len());
        }
    }

    #[test]
    fn times_before_1970_are_written_as_decimal_fractions() {
        assert_eq!(time(-1, 500_000_000), "-0.500000000");
        assert_eq!(time(-2, 1), "-1.999999999");
        assert_eq!(time(5, 7), "5.000000007");
    }
}
