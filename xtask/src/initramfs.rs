//! The guest's initramfs: one static program and the few nodes it needs before it has mounted anything.
//!
//! Written as an uncompressed cpio in the "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel):
//! unpacking gzip costs a guest a hundred milliseconds of instructions, plain bytes ten. The same program gives the same bytes:
//! owner 0, time 0, inodes counted from 1.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// What the whole archive may take: it sits in the guest's memory until init has left it.
const SIZE_MAX: usize = 4 << 20;

pub(crate) const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Writes the archive for this agent to `output`.
///
/// # Errors
///
/// When the agent cannot be read or the archive would be 4 MiB or more.
pub(crate) fn write(agent: &Path, output: &Path) -> Result<()> {
    let agent = std::fs::read(agent).with_context(|| format!("cannot read {}", agent.display()))?;
    let archive = archive(&agent);
    if archive.len() >= SIZE_MAX {
        bail!("the initramfs would be {} bytes; the limit is {SIZE_MAX}", archive.len());
    }
    std::fs::File::create(output)
        .and_then(|mut file| file.write_all(&archive))
        .with_context(|| format!("cannot write {}", output.display()))
}

fn archive(agent: &[u8]) -> Vec<u8> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "run", "root"] {
        archive.entry(folder, DIRECTORY, (0, 0), &[]);
    }
    // The kernel opens /dev/console as init's standard streams before anything is mounted.
    archive.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[]);
    archive.entry("dev/null", CHARACTER_DEVICE | 0o666, (1, 3), &[]);
    archive.entry("init", EXECUTABLE, (0, 0), agent);
    archive.finish()
}

/// A cpio archive in the making.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a file, folder or node.
    pub(crate) fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        // Fields in order: inode, mode, uid, gid, links, time, size, device of the file, device it names, length of the name, checksum.
        let name_length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.entries, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    /// Names and contents end at multiples of 4.
    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_is_the_same_every_time_and_aligned() {
        let first = archive(b"program");
        assert_eq!(first, archive(b"program"));
        assert_eq!(first.len() % 512, 0);
        assert!(first.starts_with(b"070701"));
    }

    #[test]
    fn archive_reads_back_with_cpio() {
        if !crate::program::is_installed("cpio") {
            println!("skipped: cpio is not installed");
            return;
        }
        let folder = tempfile::tempdir().expect("temporary folder");
        let agent = folder.path().join("agent");
        std::fs::write(&agent, b"\x7fELF and more").expect("agent");
        let output = folder.path().join("initramfs.cpio");
        write(&agent, &output).expect("archive");
        let listed = crate::program::output(
            crate::program::command("sh").arg("-c").arg(format!("cpio -itv --quiet < {}", output.display())),
        )
        .expect("cpio lists it");
        for wanted in ["drwxr-xr-x", "crw-------", "5,   1", "dev/console", "init"] {
            assert!(listed.contains(wanted), "no {wanted:?} in\n{listed}");
        }
    }

    #[test]
    fn an_agent_of_four_mebibytes_is_refused() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let agent = folder.path().join("agent");
        std::fs::write(&agent, vec![0; SIZE_MAX]).expect("agent");
        let error = write(&agent, &folder.path().join("out")).expect_err("too large");
        assert!(error.to_string().contains("the limit is"), "{error}");
    }
}
