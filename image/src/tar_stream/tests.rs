//! What real writers produce, and what nobody should.

use proptest::prelude::*;

use super::*;

/// Reads everything; each entry with its data.
fn read_all(bytes: &[u8]) -> Result<Vec<(TarEntry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(bytes);
    let mut out = Vec::new();
    while let Some(entry) = reader.next()? {
        let mut data = Vec::new();
        let mut buffer = [0; 700];
        loop {
            match reader.read_data(&mut buffer)? {
                0 => break,
                count => data.extend_from_slice(&buffer[..count]),
            }
        }
        out.push((entry, data));
    }
    Ok(out)
}

fn sample() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o4755);
    header.set_uid(1234);
    header.set_gid(5678);
    header.set_mtime(99);
    header.set_size(3);
    header.set_cksum();
    builder.append_data(&mut header.clone(), "a/b", &b"abc"[..]).unwrap();
    builder.append_data(&mut header.clone(), "x".repeat(300), &b"def"[..]).unwrap();
    builder.append_pax_extensions([("SCHILY.xattr.user.k", &b"v"[..]), ("mtime", b"5.25")]).unwrap();
    builder.append_data(&mut header, "c", &b"ghi"[..]).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn fields_long_names_and_pax_values_are_read() {
    let entries = read_all(&sample()).unwrap();
    assert_eq!(entries.len(), 3);
    let (entry, data) = &entries[0];
    assert_eq!((entry.path.as_slice(), data.as_slice()), (&b"a/b"[..], &b"abc"[..]));
    assert_eq!((entry.mode, entry.uid, entry.gid, entry.mtime), (0o4755, 1234, 5678, 99));
    assert_eq!(entries[1].0.path.len(), 300);
    assert_eq!(entries[2].0.xattrs, [(b"user.k".to_vec(), b"v".to_vec())]);
    assert_eq!((entries[2].0.mtime, entries[2].0.mtime_nanoseconds), (5, 250_000_000));
}

#[test]
fn base_256_numbers_are_read_with_their_sign() {
    assert_eq!(parse_number(b"0000644\0"), Some(0o644));
    assert_eq!(parse_number(b"   644 \0"), Some(0o644));
    assert_eq!(parse_number(b"\0\0\0"), Some(0));
    assert_eq!(parse_number(b"9"), None);
    assert_eq!(parse_number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Some(256));
    assert_eq!(parse_number(&[0xff; 12]), Some(-1));
    assert_eq!(parse_number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]), Some(-2));
    assert_eq!(parse_number(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    assert_eq!(parse_number(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), Some(i64::MAX));
}

#[test]
fn a_cut_at_every_byte_is_noticed_or_leaves_whole_entries() {
    let bytes = sample();
    let complete = read_all(&bytes).unwrap().len();
    for cut in 0..bytes.len() {
        match read_all(&bytes[..cut]) {
            Ok(entries) => {
                assert!(cut % BLOCK == 0 || entries.len() == complete, "a cut inside a block at {cut} went unnoticed");
                assert!(entries.len() <= complete);
            }
            Err(error) => assert!(matches!(error, TarError::Truncated(_)), "{cut}: {error}"),
        }
    }
}

#[test]
fn a_wrong_checksum_and_an_unknown_type_are_refused() {
    let mut bytes = sample();
    bytes[0] ^= 1;
    assert!(matches!(read_all(&bytes), Err(TarError::Format("a header with a wrong checksum"))));
    let mut header = tar::Header::new_ustar();
    header.set_path("x").unwrap();
    header.set_size(0);
    header.set_mode(0);
    header.set_entry_type(tar::EntryType::new(b'?'));
    header.set_cksum();
    assert!(matches!(read_all(header.as_bytes()), Err(TarError::Format("an entry of unknown type"))));
}

#[test]
fn a_huge_extension_is_refused_before_it_is_read() {
    let mut header = tar::Header::new_ustar();
    header.set_path("x").unwrap();
    header.set_size(TAR_HEADER_BYTES + 1);
    header.set_mode(0);
    header.set_entry_type(tar::EntryType::XHeader);
    header.set_cksum();
    assert!(matches!(read_all(header.as_bytes()), Err(TarError::HeaderSize(_))));
}

fn gnu_tar(format: &[&str]) -> Option<Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("holes");
    let file = std::fs::File::create(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 1 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 100], 40 << 20).unwrap();
    file.set_len(64 << 20).unwrap();
    let output = std::process::Command::new("tar")
        .args(["-S", "-cf", "-", "-C"])
        .arg(directory.path())
        .args(format)
        .arg("holes")
        .output()
        .ok()?;
    output.status.success().then_some(output.stdout)
}

#[test]
fn all_sparse_formats_of_gnu_tar_give_the_same_file() {
    for format in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let bytes = gnu_tar(format).expect("GNU tar makes a sparse archive");
        assert!(bytes.len() < 1 << 20, "{format:?} was not sparse");
        let entries = read_all(&bytes).unwrap();
        assert_eq!(entries.len(), 1);
        let (entry, data) = &entries[0];
        assert_eq!(entry.path, b"holes", "{format:?}");
        let map = entry.sparse.as_ref().expect("sparse");
        assert_eq!(map.real_size, 64 << 20);
        let mut at = 0;
        let byte_at = |wanted: u64| {
            let mut base = 0u64;
            for (offset, length) in &map.runs {
                if (*offset..offset + length).contains(&wanted) {
                    return data[usize::try_from(base + wanted - offset).unwrap()];
                }
                base += length;
            }
            0
        };
        for (offset, value) in
            [(0, 0), (1 << 20, 7), ((1 << 20) + 4999, 7), (40 << 20, 9), ((40 << 20) + 99, 9), (50 << 20, 0)]
        {
            assert_eq!(byte_at(offset), value, "{format:?} at {offset}");
            at += 1;
        }
        assert_eq!(at, 6);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_bytes_end_in_entries_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let _ = read_all(&bytes);
    }

    #[test]
    fn a_flipped_bit_never_panics(position in 0usize..8000, bit in 0u8..8) {
        let mut bytes = sample();
        let position = position % bytes.len();
        bytes[position] ^= 1 << bit;
        let _ = read_all(&bytes);
    }
}
