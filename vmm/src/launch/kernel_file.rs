//! Looks at the kernel file before any engine does, so that a file that is no kernel is refused in words.
//!
//! Only the few bytes that tell formats apart; the loaders check the rest again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use msb_protocol::error::{ApiError, ErrorCode};

use crate::engine::{KernelFile, KernelFormat};

/// Bytes looked at: the boot sector and the first set-up sector of a bzImage.
const LOOK_BYTES: usize = 0x400;
/// ELF machine of x86-64 (System V ABI).
const EM_X86_64: u16 = 62;
/// ELF type of an executable at fixed addresses, which a vmlinux is.
const ET_EXEC: u16 = 2;
/// ELF type of a position-independent program or a shared library, which no vmlinux is.
const ET_DYN: u16 = 3;
/// Where a bzImage says 0xaa55, "HdrS", its protocol version and its loader flags (Documentation/arch/x86/boot.rst).
const BOOT_FLAG_OFFSET: usize = 0x1fe;
const HEADER_MAGIC_OFFSET: usize = 0x202;
const VERSION_OFFSET: usize = 0x206;
const XLOAD_FLAGS_OFFSET: usize = 0x236;
/// ELF program header of notes, and the note that names a build.
const PT_NOTE: u64 = 4;
const NT_GNU_BUILD_ID: u64 = 3;
/// Most program headers and bytes of notes looked at.
const SEGMENTS_MAX: u64 = 64;
const NOTES_BYTES_MAX: usize = 4 << 10;
/// Bytes at each end of a file that go into its checksum.
const END_BYTES: usize = 4 << 10;
/// The first version with `xloadflags`.
const VERSION_MIN: u16 = 0x20c;
/// xloadflags: has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;

/// Opens a kernel and tells its format.
///
/// # Errors
/// `invalid_kernel` with what the file looks like instead, `path_not_found` if there is none.
pub fn open(path: &Path) -> Result<KernelFile, ApiError> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            ApiError::new(ErrorCode::PathNotFound, format!("kernel {shown} does not exist"))
        }
        _ => ApiError::new(ErrorCode::InvalidKernel, format!("kernel {shown} cannot be read: {error}")),
    })?;
    let refuse = |why: &str| Err(ApiError::new(ErrorCode::InvalidKernel, format!("{shown} is not a kernel: {why}")));
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file {
        return refuse("it is not a regular file");
    }
    let mut start = [0u8; LOOK_BYTES];
    let mut length = 0;
    while length < LOOK_BYTES {
        match file.read_at(&mut start[length..], length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return refuse(&format!("it cannot be read: {error}")),
        }
    }
    match recognise(&start[..length]) {
        Ok(format) => match fingerprint(&file, format, &start[..length]) {
            Ok(fingerprint) => Ok(KernelFile { path: path.to_owned(), file, format, fingerprint }),
            Err(error) => refuse(&format!("it cannot be read: {error}")),
        },
        Err(why) => refuse(&why),
    }
}

/// What tells this kernel from every other: the build id of an ELF file, else its length with a checksum of its two ends (that of a bzImage
/// has a checksum of everything).
///
/// # Errors
/// What the file says.
pub fn fingerprint(file: &File, format: KernelFormat, start: &[u8]) -> std::io::Result<String> {
    if format == KernelFormat::Elf
        && let Some(id) = build_id(file, start)?
    {
        return Ok(format!("build-id {}", id.iter().map(|byte| format!("{byte:02x}")).collect::<String>()));
    }
    let length = file.metadata()?.len();
    let mut checksum = 0xcbf2_9ce4_8422_2325_u64;
    let mut bytes = [0u8; END_BYTES];
    for at in [0, length.saturating_sub(END_BYTES as u64)] {
        let count = file.read_at(&mut bytes, at)?;
        // FNV-1a: against accidents, not attackers.
        let add = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        checksum = bytes[..count].iter().fold(checksum, add);
    }
    Ok(format!("{length} bytes, checksum {checksum:016x}"))
}

/// The build id in the notes of an ELF file, if it has one (System V ABI; `man ld`, --build-id).
fn build_id(file: &File, start: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
    let number = |bytes: &[u8], at: usize, length: usize| {
        bytes
            .get(at..at + length)
            .map_or(0, |bytes| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
    };
    let (table, size, count) = (number(start, 32, 8), number(start, 54, 2), number(start, 56, 2));
    let mut notes = [0u8; NOTES_BYTES_MAX];
    for index in 0..count.min(SEGMENTS_MAX) {
        let mut header = [0u8; 56];
        if file.read_at(&mut header, table.saturating_add(index * size))? < header.len() {
            break;
        }
        if number(&header, 0, 4) != PT_NOTE {
            continue;
        }
        let length = number(&header, 32, 8).min(NOTES_BYTES_MAX as u64) as usize;
        let read = file.read_at(&mut notes[..length], number(&header, 8, 8))?;
        let mut rest = &notes[..read];
        while rest.len() >= 12 {
            let padded = |length: u64| (length as usize).next_multiple_of(4);
            let (name, content, kind) = (padded(number(rest, 0, 4)), number(rest, 4, 4), number(rest, 8, 4));
            let Some(description) = rest.get(12 + name..12 + name + content as usize) else { break };
            if kind == NT_GNU_BUILD_ID && rest[12..].starts_with(b"GNU\0") {
                return Ok(Some(description.to_vec()));
            }
            rest = rest.get(12 + name + padded(content)..).unwrap_or_default();
        }
    }
    Ok(None)
}

/// Tells the format from the file's start, or says what it is.
pub fn recognise(start: &[u8]) -> Result<KernelFormat, String> {
    let half = |at: usize| start.get(at..at + 2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    if start.is_empty() {
        return Err("it is empty".into());
    }
    if start.starts_with(b"\x7fELF") {
        if start.len() < 64 {
            return Err("its ELF header is cut short".into());
        }
        if start[4] != 2 || start[5] != 1 {
            return Err("it is a 32-bit or big-endian ELF file; an x86_64 vmlinux is needed".into());
        }
        return match (half(18), half(16)) {
            (Some(EM_X86_64), Some(ET_EXEC)) => Ok(KernelFormat::Elf),
            (Some(EM_X86_64), Some(ET_DYN)) => Err("it is an ordinary program or a shared library".into()),
            (Some(EM_X86_64), _) => Err("it is an ELF file that is not executable (a module or an object file)".into()),
            (Some(machine), _) => {
                Err(format!("it is for another architecture ({}), x86_64 is needed", machine_name(machine)))
            }
            _ => Err("its ELF header is cut short".into()),
        };
    }
    if half(BOOT_FLAG_OFFSET) == Some(0xaa55)
        && start.get(HEADER_MAGIC_OFFSET..HEADER_MAGIC_OFFSET + 4) == Some(b"HdrS")
    {
        let version = half(VERSION_OFFSET).unwrap_or(0);
        let flags = half(XLOAD_FLAGS_OFFSET).unwrap_or(0);
        if version < VERSION_MIN || flags & XLF_KERNEL_64 == 0 {
            return Err("it is a bzImage without a 64-bit entry".into());
        }
        return Ok(KernelFormat::BzImage);
    }
    Err(match start {
        [0x1f, 0x8b, ..] => "it is compressed with gzip; unpack it first (a vmlinux or a bzImage is needed)".into(),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is compressed with zstd; unpack it first".into(),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is compressed with xz; unpack it first".into(),
        [b'M', b'Z', ..] => "it is a PE file without a Linux boot header".into(),
        _ if start.get(0x38..0x3c) == Some(b"ARM\x64") => {
            "it is for another architecture (arm64), x86_64 is needed".into()
        }
        _ => "it begins with neither an ELF nor a bzImage header".into(),
    })
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "i386".into(),
        40 => "arm".into(),
        183 => "arm64".into(),
        243 => "riscv".into(),
        other => format!("ELF machine {other}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::io::Write;

    use super::*;

    fn elf(machine: u16, kind: u16) -> Vec<u8> {
        let mut file = vec![0u8; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16..18].copy_from_slice(&kind.to_le_bytes());
        file[18..20].copy_from_slice(&machine.to_le_bytes());
        file
    }

    fn bz_image(version: u16, flags: u16) -> Vec<u8> {
        let mut file = vec![0u8; 0x400];
        file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        file[0x236..0x238].copy_from_slice(&flags.to_le_bytes());
        file
    }

    #[test]
    fn kernels_are_told_from_what_only_looks_like_one() {
        assert_eq!(recognise(&elf(62, 2)), Ok(KernelFormat::Elf));
        assert_eq!(recognise(&bz_image(0x20f, 1)), Ok(KernelFormat::BzImage));
        for (start, word) in [
            (vec![], "empty"),
            (b"\x7fELF".to_vec(), "cut short"),
            (elf(183, 2), "arm64"),
            (elf(62, 1), "not executable"),
            (elf(62, 3), "ordinary program"),
            (bz_image(0x20f, 0), "64-bit"),
            (bz_image(0x200, 1), "64-bit"),
            (b"\x1f\x8b\x08rest".to_vec(), "gzip"),
            (b"#!/bin/sh\n".to_vec(), "neither"),
        ] {
            let why = recognise(&start).expect_err("not a kernel");
            assert!(why.contains(word), "{why}");
        }
    }

    #[test]
    fn a_missing_file_is_said_to_be_missing() {
        assert_eq!(open(Path::new("/nonexistent/vmlinux")).unwrap_err().code, ErrorCode::PathNotFound);
        assert_eq!(open(Path::new("/proc")).unwrap_err().code, ErrorCode::InvalidKernel);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..1024)) {
            let _ = recognise(&bytes);
        }
    }

    /// A vmlinux with one segment of notes.
    fn with_notes(notes: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0u8; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (bytes[16], bytes[18], bytes[32], bytes[54], bytes[56]) = (2, 62, 64, 56, 1);
        bytes[64] = 4;
        bytes[64 + 8] = 120;
        bytes[64 + 32] = u8::try_from(notes.len()).expect("few");
        bytes.extend_from_slice(notes);
        bytes
    }

    fn fingerprint_of(bytes: &[u8]) -> String {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(bytes).expect("written");
        open(file.path()).expect("a kernel").fingerprint
    }

    #[test]
    fn a_kernel_is_known_by_its_build_or_by_its_bytes() {
        let other = b"\x04\0\0\0\x05\0\0\0\x07\0\0\0Xen\0abcde\0\0\0";
        let id = b"\x04\0\0\0\x03\0\0\0\x03\0\0\0GNU\0\xab\xcd\x0f\0";
        assert_eq!(fingerprint_of(&with_notes(&[&other[..], id].concat())), "build-id abcd0f");
        // Without one, and with notes that lie about their lengths.
        let huge = b"\x04\0\0\0\xff\xff\xff\xff\x03\0\0\0GNU\0";
        for notes in [&other[..], huge, b"\xff", b""] {
            let (one, two) = (with_notes(notes), [with_notes(notes), vec![1]].concat());
            assert!(fingerprint_of(&one).contains("checksum"), "{}", fingerprint_of(&one));
            assert_ne!(fingerprint_of(&one), fingerprint_of(&two));
        }
    }
}
