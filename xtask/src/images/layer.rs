//! One layer of an image, written entry by entry as a tar stream.
//!
//! Owners, times and order are what the caller says and nothing else, so the same calls give the same digest. Extended attributes
//! travel as PAX records `SCHILY.xattr.<name>`, as docker and buildah write them.

use anyhow::Result;
use tar::{Builder, EntryType, Header};

/// 2024-01-01: any fixed moment that is not the epoch, so that a lost time shows.
const MODIFIED: u64 = 1_704_067_200;

/// uid and gid.
pub(crate) type Owner = (u64, u64);
/// The owner of almost everything.
pub(crate) const ROOT: Owner = (0, 0);

/// A layer in the making; paths are relative, without a leading slash.
pub(crate) struct Layer {
    tar: Builder<Vec<u8>>,
}

impl Layer {
    /// An empty layer.
    pub(crate) fn new() -> Self {
        Self { tar: Builder::new(Vec::new()) }
    }

    /// The finished tar stream.
    pub(crate) fn finish(self) -> Result<Vec<u8>> {
        Ok(self.tar.into_inner()?)
    }

    pub(crate) fn folder(&mut self, path: &str, mode: u32, owner: Owner) -> Result<()> {
        self.append(EntryType::Directory, &format!("{path}/"), mode, owner, &[])
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, owner: Owner, content: &[u8]) -> Result<()> {
        self.append(EntryType::Regular, path, mode, owner, content)
    }

    /// A regular file with extended attributes.
    pub(crate) fn file_with_attributes(
        &mut self,
        path: &str,
        mode: u32,
        owner: Owner,
        content: &[u8],
        attributes: &[(&str, &[u8])],
    ) -> Result<()> {
        let records: Vec<(String, &[u8])> =
            attributes.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value)).collect();
        self.tar.append_pax_extensions(records.iter().map(|(name, value)| (name.as_str(), *value)))?;
        self.file(path, mode, owner, content)
    }

    pub(crate) fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Link, 0o755, ROOT, 0);
        Ok(self.tar.append_link(&mut header, path, target)?)
    }

    pub(crate) fn symbolic_link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Symlink, 0o777, ROOT, 0);
        Ok(self.tar.append_link(&mut header, path, target)?)
    }

    pub(crate) fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<()> {
        let mut header = header(EntryType::Char, mode, ROOT, 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        Ok(self.tar.append_data(&mut header, path, [].as_slice())?)
    }

    pub(crate) fn fifo(&mut self, path: &str, mode: u32) -> Result<()> {
        self.append(EntryType::Fifo, path, mode, ROOT, &[])
    }

    /// Removes what lower layers have at this path.
    pub(crate) fn whiteout(&mut self, folder: &str, name: &str) -> Result<()> {
        self.file(&format!("{folder}/.wh.{name}"), 0o644, ROOT, &[])
    }

    /// Hides everything lower layers have in this folder.
    pub(crate) fn opaque(&mut self, folder: &str) -> Result<()> {
        self.file(&format!("{folder}/.wh..wh..opq"), 0o644, ROOT, &[])
    }

    fn append(&mut self, kind: EntryType, path: &str, mode: u32, owner: Owner, content: &[u8]) -> Result<()> {
        let mut header = header(kind, mode, owner, content.len() as u64);
        Ok(self.tar.append_data(&mut header, path, content)?)
    }
}

fn header(kind: EntryType, mode: u32, owner: Owner, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner.0);
    header.set_gid(owner.1);
    header.set_mtime(MODIFIED);
    header.set_size(size);
    header
}
