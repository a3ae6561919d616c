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
        Ok(format) => Ok(KernelFile { path: path.to_owned(), file, format }),
        Err(why) => refuse(&why),
    }
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
}
