//! The server against packets in memory, on a folder of the test machine.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use proptest::prelude::*;

use super::wire::{Fields, Reply, kind};

/// Sends packets and gives back the kinds and bodies of the answers.
fn exchange(packets: &[Vec<u8>]) -> Vec<(u8, Vec<u8>)> {
    let mut out = Vec::new();
    let _ = super::serve(packets.concat().as_slice(), &mut out);
    let mut answers = Vec::new();
    let mut rest = &out[..];
    while let Some((len, after)) = rest.split_first_chunk::<4>() {
        let (packet, after) = after.split_at(u32::from_be_bytes(*len) as usize);
        answers.push((packet[0], packet[1..].to_vec()));
        rest = after;
    }
    answers
}

fn request(kind: u8, id: u32, write: impl FnOnce(&mut Reply<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    let mut packet = Reply::begin(&mut out, kind, id);
    write(&mut packet);
    packet.finish();
    out
}

fn name(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

fn status(answer: &(u8, Vec<u8>)) -> u32 {
    assert_eq!(answer.0, kind::STATUS, "{answer:?}");
    let mut fields = Fields(&answer.1[4..]);
    fields.number().unwrap()
}

#[test]
fn a_file_is_written_read_renamed_and_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (file, other) = (dir.path().join("a\nb"), dir.path().join("c"));
    let zero = 0u32.to_be_bytes();
    let answers = exchange(&[
        request(kind::OPEN, 1, |packet| {
            packet.bytes(name(&file)).number(2 | 8 | 16 | 1).number(4).number(0o640);
        }),
        request(kind::WRITE, 2, |packet| {
            packet.bytes(&zero).large(2).bytes(b"xyz");
        }),
        request(kind::READ, 3, |packet| {
            packet.bytes(&zero).large(0).number(1 << 30);
        }),
        request(kind::READ, 4, |packet| {
            packet.bytes(&zero).large(5).number(10);
        }),
        request(kind::CLOSE, 5, |packet| {
            packet.bytes(&zero);
        }),
        request(kind::RENAME, 6, |packet| {
            packet.bytes(name(&file)).bytes(name(&other));
        }),
        request(kind::STAT, 7, |packet| {
            packet.bytes(name(&file));
        }),
        request(kind::OPENDIR, 8, |packet| {
            packet.bytes(name(dir.path()));
        }),
        request(kind::READDIR, 9, |packet| {
            packet.bytes(&1u32.to_be_bytes());
        }),
        request(kind::READDIR, 10, |packet| {
            packet.bytes(&1u32.to_be_bytes());
        }),
    ]);
    assert_eq!(answers[0].0, kind::HANDLE);
    assert_eq!(status(&answers[1]), 0);
    assert_eq!((answers[2].0, &answers[2].1[8..]), (kind::DATA, &b"\0\0xyz"[..]));
    assert_eq!(status(&answers[3]), 1);
    assert_eq!(status(&answers[4]), 0);
    assert_eq!(status(&answers[5]), 0);
    assert_eq!(status(&answers[6]), 2);
    assert_eq!((answers[8].0, answers[8].1[4..8].to_vec()), (kind::NAME, vec![0, 0, 0, 1]));
    assert_eq!(status(&answers[9]), 1);
    // A rename never replaces; the extension does.
    std::fs::write(&file, "new").unwrap();
    let answers = exchange(&[
        request(kind::RENAME, 1, |packet| {
            packet.bytes(name(&file)).bytes(name(&other));
        }),
        request(kind::EXTENDED, 2, |packet| {
            packet.bytes(b"posix-rename@openssh.com").bytes(name(&file)).bytes(name(&other));
        }),
        request(kind::EXTENDED, 3, |packet| {
            packet.bytes(b"unknown@test");
        }),
        request(kind::SETSTAT, 4, |packet| {
            packet.bytes(name(&other)).number(4 | 8).number(0o600).number(5).number(6);
        }),
    ]);
    assert_eq!(answers.iter().map(status).collect::<Vec<_>>(), [4, 0, 8, 0]);
    let kept = std::fs::metadata(&other).unwrap();
    assert_eq!(kept.len(), 3);
    use std::os::unix::fs::MetadataExt;
    assert_eq!((kept.mode() & 0o7777, kept.mtime()), (0o600, 6));
}

#[test]
fn what_is_not_there_or_not_a_file_has_its_code() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| {
        request(kind::OPEN, 1, |packet| {
            packet.bytes(name(path)).number(1).number(0);
        })
    };
    let answers = exchange(&[
        open(&dir.path().join("none")),
        open(dir.path()),
        request(kind::READ, 2, |packet| {
            packet.bytes(b"nope").large(0).number(1);
        }),
        request(kind::CLOSE, 3, |packet| {
            packet.bytes(b"x");
        }),
        request(99, 4, |_| {}),
        request(kind::MKDIR, 5, |packet| {
            packet.bytes(b"a\0b").number(0);
        }),
        request(kind::REALPATH, 6, |packet| {
            packet.bytes(name(&dir.path().join("new")));
        }),
    ]);
    assert_eq!(answers[..6].iter().map(status).collect::<Vec<_>>(), [2, 4, 5, 5, 8, 5]);
    assert_eq!(answers[6].0, kind::NAME);
}

proptest! {
    #[test]
    fn any_packets_are_answered_or_end_the_stream(bytes in prop::collection::vec(any::<u8>(), 0..200), which in 5u8..9) {
        // Only requests that change nothing on the machine, with any body.
        let mut packet = u32::try_from(bytes.len() + 1).unwrap().to_be_bytes().to_vec();
        packet.push(which);
        packet.extend_from_slice(&bytes);
        let _ = exchange(&[packet]);
        let _ = exchange(&[bytes]);
    }
}
