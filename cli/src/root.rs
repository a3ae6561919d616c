//! IMAGE where it is no image: a directory or a raw disk of the host, by its path. Called by `create` and `install`; reads no more of a
//! disk than its superblock.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use msb_protocol::spec::RootKind;

use crate::failure::{self, Failure, invalid};
use crate::mounts::{utf8, whole};

/// Where the superblocks of both file systems begin, in bytes.
const SUPERBLOCK_OFFSET: u64 = 1024;
/// Magic number of EROFS (kernel source, fs/erofs/erofs_fs.h), at the beginning of its superblock.
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
/// Magic number of ext4 (kernel documentation, filesystems/ext4/super), and where in the superblock it is.
const EXT4_MAGIC: (usize, [u8; 2]) = (0x38, 0xef53_u16.to_le_bytes());
/// What formats of disks that are not raw begin with.
const FORMATS: [(&[u8], &str); 3] = [(b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK"), (b"conectix", "VHD")];

/// What a word in the place of IMAGE names on this host: a path if it begins with `/` or `.`, as a volume's does.
///
/// # Errors
/// `path_not_found`; `invalid_config` for what is neither a directory nor a raw disk with a file system that can be a root.
pub fn local(image: &str) -> Result<Option<(RootKind, String)>, Failure> {
    if !image.starts_with(['/', '.']) {
        return Ok(None);
    }
    let path = whole(Path::new(image))?;
    let kind = if path.is_dir() {
        RootKind::Directory
    } else {
        check_disk(&path)?;
        RootKind::Disk
    };
    Ok(Some((kind, utf8(&path)?)))
}

fn check_disk(path: &Path) -> Result<(), Failure> {
    let failed = |error: std::io::Error| failure::file(path, &error);
    let refuse = |what: &str| Err(invalid(format!("{} cannot be a root: {what}", path.display())));
    if !path.is_file() {
        return refuse("it is neither a directory nor a regular file");
    }
    let file = File::open(path).map_err(failed)?;
    let (mut start, mut superblock) = ([0; 8], [0; 0x40]);
    if file.read_exact_at(&mut start, 0).is_err() || file.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET).is_err() {
        return refuse("it is too short for a disk");
    }
    if let Some((_, format)) = FORMATS.iter().find(|(magic, _)| start.starts_with(magic)) {
        return refuse(&format!("it is a {format} disk; make a raw one: qemu-img convert -O raw"));
    }
    let (at, magic) = EXT4_MAGIC;
    if superblock[..4] == EROFS_MAGIC || superblock[at..at + magic.len()] == magic {
        Ok(())
    } else {
        refuse(
            "it holds neither an ext4 nor an EROFS file system (one file system, no partitions); `msb load` takes archives",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(failure: Failure) -> String {
        match failure {
            Failure::Api(error) => error.message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn paths_are_roots_and_everything_else_is_an_image() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path().canonicalize().unwrap();
        let at = |name: &str| home.join(name).to_str().unwrap().to_owned();
        for image in ["busybox", "team/x:1", "localhost:5000/x", "~/x"] {
            assert_eq!(local(image).unwrap(), None, "{image}");
        }
        std::fs::create_dir(at("tree")).unwrap();
        std::os::unix::fs::symlink("tree", at("link")).unwrap();
        assert_eq!(local(&at("link")).unwrap(), Some((RootKind::Directory, at("tree"))));
        assert!(local(&at("missing")).is_err());

        let disk = |name: &str, parts: &[(usize, &[u8])]| {
            let mut bytes = vec![0; 4096];
            for (offset, part) in parts {
                bytes[*offset..*offset + part.len()].copy_from_slice(part);
            }
            std::fs::write(at(name), bytes).unwrap();
            local(&at(name)).map_err(said)
        };
        assert_eq!(disk("erofs", &[(1024, &EROFS_MAGIC)]), Ok(Some((RootKind::Disk, at("erofs")))));
        assert_eq!(disk("ext4", &[(1024 + 0x38, &EXT4_MAGIC.1)]), Ok(Some((RootKind::Disk, at("ext4")))));
        assert!(disk("q", &[(0, b"QFI\xfb")]).unwrap_err().contains("qcow2"));
        assert!(disk("empty", &[]).unwrap_err().contains("neither an ext4 nor an EROFS"));
        std::fs::write(at("short"), "x").unwrap();
        assert!(said(local(&at("short")).unwrap_err()).contains("too short"));
        assert!(said(local("/dev/null").unwrap_err()).contains("neither a directory"));
    }
}
