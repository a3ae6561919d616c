//! The files of snapshots: an immutable disk and a manifest, made whole or not at all.
//!
//! ```text
//!  <home>/snapshots/
//!    .work-XXXXXX/              being made or removed; emptied when the daemon starts
//!    <name>/                    0700, files 0400
//!      manifest.json            its digest is the snapshot's identity
//!      memory.img, machine.json of one with memory: pages, sparse; processors and devices, as `msb-vmm` wrote them
//!      disk.img                 sparse; shares extents with its source and its copies where the file system can
//! ```
//! Called by the snapshot actor, which keeps the index in the journal and decides about names; here is no decision about which snapshots
//! there are. Everything blocks. Crash order: files, fsync, rename, fsync of the directory, and then the caller's reference.

mod archive;
pub mod disk;
mod error;

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use msb_protocol::id::SandboxName;
use msb_protocol::snapshot::{SNAPSHOT_MANIFEST_LEN_MAX, SnapshotManifest};
use msb_protocol::vmm::RestoreSpec;

use crate::digest::Digest;
pub use archive::Importing;
pub use disk::DiskContent;
pub use error::SnapshotError;

const MANIFEST: &str = "manifest.json";
const DISK: &str = "disk.img";
const MEMORY: &str = "memory.img";
/// What machines made of it note for each other; no part of it.
const WRITTEN: &str = "memory.written";
const MACHINE: &str = "machine.json";
/// Largest file of processors and devices, in bytes.
const MACHINE_LEN_MAX: u64 = 8 << 20;
const WORK: &str = ".work-";

/// The directory of all snapshots.
#[derive(Clone, Debug)]
pub struct SnapshotFiles {
    root: PathBuf,
}

impl SnapshotFiles {
    /// The snapshots below a directory; it is made when the first one is.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where a snapshot's files are.
    #[must_use]
    pub fn path(&self, name: &SandboxName) -> PathBuf {
        self.root.join(name.as_str())
    }

    /// Begins a snapshot. Dropping the draft leaves nothing of it.
    ///
    /// # Errors
    /// `DiskFull`, `Io`.
    pub fn draft(&self) -> Result<Draft, SnapshotError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .map_err(|error| SnapshotError::io("create", &self.root, error))?;
        let directory = tempfile::Builder::new()
            .prefix(WORK)
            .tempdir_in(&self.root)
            .map_err(|error| SnapshotError::io("create", &self.root, error))?;
        Ok(Draft { directory })
    }

    /// Gives a sealed snapshot its name. Nobody may have that name.
    ///
    /// # Errors
    /// `DiskFull`, `Io`; nothing is left then.
    pub fn publish(&self, sealed: Sealed, name: &SandboxName) -> Result<(), SnapshotError> {
        let place = self.path(name);
        fs::rename(sealed.directory.path(), &place).map_err(|error| SnapshotError::io("create", &place, error))?;
        // From here on it is not temporary; the guard would remove a path that is not there any more.
        drop(sealed.directory.keep());
        sync_directory(&self.root)
    }

    /// Removes a snapshot's files, if there are any: out of sight at once, then from the disk.
    ///
    /// # Errors
    /// `Io` if they cannot be moved away; they are whole then.
    pub fn remove(&self, name: &SandboxName) -> Result<(), SnapshotError> {
        let place = self.path(name);
        if place.symlink_metadata().is_err() {
            return Ok(());
        }
        let trash = self.draft()?.directory.keep();
        let failed = |error| SnapshotError::io("remove", &place, error);
        fs::rename(&place, trash.join("snapshot")).map_err(failed)?;
        sync_directory(&self.root)?;
        if let Err(error) = fs::remove_dir_all(&trash) {
            // The next start sweeps it.
            tracing::warn!(path = %trash.display(), %error, "a removed snapshot still takes space");
        }
        Ok(())
    }

    /// Removes what an interrupted piece of work left, and names the snapshots that are there.
    ///
    /// # Errors
    /// `Io` when the directory cannot be read.
    pub fn sweep(&self) -> Result<Vec<SandboxName>, SnapshotError> {
        let failed = |error| SnapshotError::io("read", &self.root, error);
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file_name = entry.map_err(failed)?.file_name();
            let Some(text) = file_name.to_str() else { continue };
            if text.starts_with(WORK) {
                let path = self.root.join(text);
                match fs::remove_dir_all(&path) {
                    Ok(()) => tracing::warn!(path = %path.display(), "an unfinished snapshot was removed"),
                    Err(error) => tracing::warn!(path = %path.display(), %error, "an unfinished snapshot stays"),
                }
            } else if let Ok(name) = text.parse() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// The manifest of a snapshot, with its digest.
    ///
    /// # Errors
    /// `Missing`, `Damaged`, `Io`.
    pub fn read(&self, name: &SandboxName) -> Result<(Digest, SnapshotManifest), SnapshotError> {
        let bytes = self.manifest_bytes(name)?;
        let manifest = SnapshotManifest::parse(&bytes)
            .map_err(|error| SnapshotError::Damaged { name: name.to_string(), reason: error.message })?;
        Ok((Digest::of(&bytes), manifest))
    }

    fn manifest_bytes(&self, name: &SandboxName) -> Result<Vec<u8>, SnapshotError> {
        let path = self.path(name).join(MANIFEST);
        let mut bytes = Vec::new();
        self.open(name, &path)?
            .take(SNAPSHOT_MANIFEST_LEN_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| SnapshotError::io("read", &path, error))?;
        Ok(bytes)
    }

    fn open(&self, name: &SandboxName, path: &Path) -> Result<File, SnapshotError> {
        File::open(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => SnapshotError::Missing(name.to_string()),
            _ => SnapshotError::io("read", path, error),
        })
    }

    /// The disk of a snapshot, if it has the size it should have.
    fn open_disk(&self, name: &SandboxName, size_bytes: u64) -> Result<File, SnapshotError> {
        let path = self.path(name).join(DISK);
        let file = self.open(name, &path)?;
        let found = file.metadata().map_err(|error| SnapshotError::io("read", &path, error))?.len();
        if found != size_bytes {
            let reason = format!("its disk has {found} bytes and should have {size_bytes}");
            return Err(SnapshotError::Damaged { name: name.to_string(), reason });
        }
        Ok(file)
    }

    /// Bytes the host allocates for a snapshot.
    #[must_use]
    pub fn allocated_bytes(&self, name: &SandboxName) -> u64 {
        let place = self.path(name);
        [MANIFEST, DISK, MEMORY, MACHINE]
            .iter()
            .map(|file| fs::metadata(place.join(file)).map_or(0, |data| data.blocks() * 512))
            .sum()
    }

    /// Makes a writable disk of `bytes` at `target` out of a snapshot's. The path appears when the disk is whole.
    ///
    /// # Errors
    /// `Missing`, `Damaged`, `DiskFull`, `Io`.
    pub fn clone_disk(
        &self,
        name: &SandboxName,
        size_bytes: u64,
        target: &Path,
        bytes: u64,
    ) -> Result<(), SnapshotError> {
        let source = self.open_disk(name, size_bytes)?;
        let failed = |error| SnapshotError::io("write", target, error);
        let directory = target.parent().unwrap_or(Path::new("/"));
        let copy = tempfile::Builder::new().prefix(".upper-").tempfile_in(directory).map_err(failed)?;
        disk::copy(&source, copy.as_file()).map_err(failed)?;
        copy.as_file().set_len(bytes.max(size_bytes)).map_err(failed)?;
        copy.persist_noclobber(target).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Reads everything of a snapshot again and tells what is not as it was written: the bytes compared, and what is wrong.
    ///
    /// # Errors
    /// `Io` when a file that is there cannot be read.
    pub fn verify(
        &self,
        name: &SandboxName,
        id: &str,
        manifest: &SnapshotManifest,
    ) -> Result<(u64, Vec<String>), SnapshotError> {
        let mut problems = Vec::new();
        match self.read(name) {
            Ok((digest, _)) if digest.to_string() == id => {}
            Ok((digest, _)) => problems.push(format!("its manifest has digest {digest} and should have {id}")),
            Err(error @ SnapshotError::Io { .. }) => return Err(error),
            Err(error) => problems.push(error.to_string()),
        }
        let path = self.path(name).join(DISK);
        let file = match self.open(name, &path) {
            Ok(file) => file,
            Err(error @ SnapshotError::Io { .. }) => return Err(error),
            Err(error) => {
                problems.push(error.to_string());
                return Ok((0, problems));
            }
        };
        let found = disk::measure(&file).map_err(|error| SnapshotError::io("read", &path, error))?;
        if found.size_bytes != manifest.disk.size_bytes {
            let should = manifest.disk.size_bytes;
            problems.push(format!("its disk has {} bytes and should have {should}", found.size_bytes));
        } else if found.digest.to_string() != manifest.disk.digest {
            problems.push(format!("its disk has digest {} and should have {}", found.digest, manifest.disk.digest));
        }
        let mut bytes = found.data_bytes;
        if let Some(memory) = &manifest.memory {
            let place = self.path(name);
            match measure_memory(&place) {
                Ok((content, machine)) => {
                    bytes += content.data_bytes;
                    if content.size_bytes != memory.size_bytes || content.digest.to_string() != memory.digest {
                        problems.push(format!(
                            "its memory has digest {} and should have {}",
                            content.digest, memory.digest
                        ));
                    }
                    if machine.to_string() != memory.machine {
                        problems.push(format!("its machine has digest {machine} and should have {}", memory.machine));
                    }
                }
                Err(error) => problems.push(error.to_string()),
            }
        }
        Ok((bytes, problems))
    }

    /// The files of a snapshot's memory and machine.
    #[must_use]
    pub fn memory_files(&self, name: &SandboxName) -> RestoreSpec {
        let place = self.path(name);
        RestoreSpec { memory: place.join(MEMORY), state: place.join(MACHINE), written: Some(place.join(WRITTEN)) }
    }

    /// Writes a snapshot as one `.tar.zst`, its disk as a sparse entry. What is damaged is not written to its end.
    ///
    /// # Errors
    /// `Missing`, `Damaged`, `Io`; `Stream` when `out` fails.
    pub fn export(
        &self,
        name: &SandboxName,
        id: &str,
        manifest: &SnapshotManifest,
        out: &mut dyn Write,
    ) -> Result<(), SnapshotError> {
        if manifest.memory.is_some() {
            return Err(SnapshotError::HasMemory(name.to_string()));
        }
        let bytes = self.manifest_bytes(name)?;
        if Digest::of(&bytes).to_string() != id {
            let reason = "its manifest is not what was written".to_owned();
            return Err(SnapshotError::Damaged { name: name.to_string(), reason });
        }
        let file = self.open_disk(name, manifest.disk.size_bytes)?;
        archive::write(name, &bytes, manifest, &file, out)
    }
}

/// A snapshot that is being made.
#[derive(Debug)]
pub struct Draft {
    directory: tempfile::TempDir,
}

impl Draft {
    fn create(&self, name: &str) -> Result<(PathBuf, File), SnapshotError> {
        let path = self.directory.path().join(name);
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| SnapshotError::io("create", &path, error))?;
        Ok((path, file))
    }

    /// Gives it the content of a disk that nobody writes to meanwhile.
    ///
    /// # Errors
    /// `DiskFull`, `Io`.
    pub fn copy_disk(&self, from: &Path) -> Result<(), SnapshotError> {
        let source = File::open(from).map_err(|error| SnapshotError::io("read", from, error))?;
        let (path, file) = self.create(DISK)?;
        disk::copy(&source, &file).map_err(|error| SnapshotError::io("write", &path, error))
    }

    /// The files for memory and machine, empty.
    ///
    /// # Errors
    /// `DiskFull`, `Io`.
    pub fn create_memory(&self) -> Result<(File, File), SnapshotError> {
        Ok((self.create(MEMORY)?.1, self.create(MACHINE)?.1))
    }

    /// Digests its memory and its machine.
    ///
    /// # Errors
    /// `Io`.
    pub fn measure_memory(&self) -> Result<(DiskContent, Digest), SnapshotError> {
        measure_memory(self.directory.path())
    }

    /// Lengths of its disk and its memory in bytes, for one that nobody will compare with anything.
    ///
    /// # Errors
    /// `Io`.
    pub fn sizes(&self) -> Result<(u64, u64), SnapshotError> {
        let length = |name| {
            let path = self.directory.path().join(name);
            fs::metadata(&path).map(|data| data.len()).map_err(|error| SnapshotError::io("read", &path, error))
        };
        Ok((length(DISK)?, length(MEMORY)?))
    }

    /// Digests its disk.
    ///
    /// # Errors
    /// `Io`.
    pub fn measure(&self) -> Result<DiskContent, SnapshotError> {
        let path = self.directory.path().join(DISK);
        let measured = File::open(&path).and_then(|file| disk::measure(&file));
        measured.map_err(|error| SnapshotError::io("read", &path, error))
    }

    /// Writes its manifest and makes everything durable, unless it is transient.
    ///
    /// # Errors
    /// `DiskFull`, `Io`, `Manifest` for one that would not be read again.
    pub fn seal(self, manifest: &SnapshotManifest) -> Result<Sealed, SnapshotError> {
        let bytes = serde_json::to_vec_pretty(manifest).map_err(|error| SnapshotError::Archive(error.to_string()))?;
        self.seal_bytes(bytes)
    }

    fn seal_bytes(self, bytes: Vec<u8>) -> Result<Sealed, SnapshotError> {
        let manifest = SnapshotManifest::parse(&bytes).map_err(SnapshotError::Manifest)?;
        let (path, mut file) = self.create(MANIFEST)?;
        file.write_all(&bytes).map_err(|error| SnapshotError::io("write", &path, error))?;
        let memory = if manifest.memory.is_some() { &[MEMORY, MACHINE][..] } else { &[] };
        for name in [MANIFEST, DISK].iter().chain(memory) {
            let path = self.directory.path().join(name);
            let failed = |error| SnapshotError::io("write", &path, error);
            let file = File::open(&path).map_err(failed)?;
            file.set_permissions(Permissions::from_mode(0o400)).map_err(failed)?;
            if !manifest.transient {
                file.sync_all().map_err(failed)?;
            }
        }
        sync_directory(self.directory.path())?;
        Ok(Sealed { directory: self.directory, id: Digest::of(&bytes), manifest })
    }
}

/// A snapshot that is whole and durable, and has no name yet. Dropping it leaves nothing of it.
#[derive(Debug)]
pub struct Sealed {
    directory: tempfile::TempDir,
    id: Digest,
    manifest: SnapshotManifest,
}

impl Sealed {
    /// Its identity.
    #[must_use]
    pub fn id(&self) -> Digest {
        self.id
    }

    /// What it says about itself.
    #[must_use]
    pub fn manifest(&self) -> &SnapshotManifest {
        &self.manifest
    }
}

fn measure_memory(place: &Path) -> Result<(DiskContent, Digest), SnapshotError> {
    let path = place.join(MEMORY);
    let content = File::open(&path).and_then(|file| disk::measure(&file));
    let content = content.map_err(|error| SnapshotError::io("read", &path, error))?;
    let path = place.join(MACHINE);
    let mut bytes = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MACHINE_LEN_MAX).read_to_end(&mut bytes))
        .map_err(|error| SnapshotError::io("read", &path, error))?;
    Ok((content, Digest::of(&bytes)))
}

fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| SnapshotError::io("sync", path, error))
}

#[cfg(test)]
mod tests;
