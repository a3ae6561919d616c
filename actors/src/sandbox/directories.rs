//! The files of one sandbox and how they come and go. Blocking; called on the blocking pool only.
//!
//! `<home>/sandboxes/<name>/{upper.img, logs/, heartbeat.json}` and the run directory of sockets, everything 0700/0600. Of a sandbox that
//! sleeps with its memory also `memory-<boot id>/{memory.img, machine.json}`: which of them counts is the machine's to say, not the disk's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{BootId, SandboxId, SandboxName};
use msb_protocol::paths::{HomeLayout, sandbox_run_dir};
use msb_protocol::vmm::{BootError, END_FILE, RestoreSpec};

/// What the directory of a run's memory is called, before the run.
const MEMORY_PREFIX: &str = "memory-";
/// Evidence of failed boots that is kept, in files.
pub const BOOT_ERRORS_KEPT: usize = 20;

/// The places of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    /// Its own directory.
    pub root: PathBuf,
    /// Logs.
    pub logs: PathBuf,
    /// The writable disk.
    pub upper: PathBuf,
    /// The heartbeat file.
    pub heartbeat: Arc<Path>,
    /// Sockets.
    pub run: PathBuf,
    /// Evidence of failed boots of all sandboxes.
    pub boot_errors: PathBuf,
}

/// Where machines made of the memory of the sandbox in `root` note which pages they wrote first.
#[must_use]
pub fn written(root: &Path) -> PathBuf {
    root.join("memory.written")
}

impl Directories {
    /// Where a sandbox's files are.
    #[must_use]
    pub fn new(home: &HomeLayout, runtime_dir: &Path, name: &SandboxName, id: SandboxId) -> Self {
        Self::at(home.sandbox(name), home, runtime_dir, id)
    }

    /// Those of a machine whose own directory is elsewhere.
    #[must_use]
    pub fn at(root: PathBuf, home: &HomeLayout, runtime_dir: &Path, id: SandboxId) -> Self {
        Self {
            logs: root.join("logs"),
            upper: root.join("upper.img"),
            heartbeat: root.join("heartbeat.json").into(),
            run: sandbox_run_dir(runtime_dir, id),
            boot_errors: home.home.join("boot-errors"),
            root,
        }
    }

    /// Makes what is missing before a boot and removes what an earlier boot left.
    ///
    /// # Errors
    /// `disk_full`, `permission_denied` or `home_unusable` naming the path.
    pub fn prepare(&self) -> Result<(), ApiError> {
        for directory in [&self.root, &self.logs, &self.run] {
            make_private(directory).map_err(|error| file_error(directory, &error))?;
        }
        // Nothing of an earlier boot may be taken for news of this one.
        for stale in [&*self.heartbeat, &self.run.join(END_FILE)] {
            match std::fs::remove_file(stale) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error(stale, &error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Where the memory of a run is kept, and everything else of its machine.
    #[must_use]
    pub fn memory(&self, run: BootId) -> RestoreSpec {
        let directory = self.root.join(format!("{MEMORY_PREFIX}{run}"));
        RestoreSpec {
            memory: directory.join("memory.img"),
            state: directory.join("machine.json"),
            written: Some(written(&self.root)),
        }
    }

    /// The same, if it is there.
    ///
    /// # Errors
    /// `snapshot_damaged` naming what is missing.
    pub fn kept_memory(&self, run: BootId) -> Result<RestoreSpec, ApiError> {
        let kept = self.memory(run);
        for path in [&kept.memory, &kept.state] {
            if !path.exists() {
                let message = format!("the memory that it slept with is gone: {}", path.display());
                return Err(ApiError::new(ErrorCode::SnapshotDamaged, message));
            }
        }
        Ok(kept)
    }

    /// Makes the two empty files that a machine is written into: its memory, everything else.
    ///
    /// # Errors
    /// `disk_full`, `permission_denied` or `home_unusable` naming the path.
    pub fn create_memory(&self, run: BootId) -> Result<(File, File), ApiError> {
        let RestoreSpec { memory, state, .. } = self.memory(run);
        let create = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
            file.map_err(|error| file_error(path, &error))
        };
        if let Some(directory) = memory.parent() {
            make_private(directory).map_err(|error| file_error(directory, &error))?;
        }
        Ok((create(&memory)?, create(&state)?))
    }

    /// Makes what was written down of a run durable, and its disk with it: after a power cut the two must fit each other.
    ///
    /// # Errors
    /// As [`Self::create_memory`].
    pub fn sync_memory(&self, run: BootId) -> Result<(), ApiError> {
        let RestoreSpec { memory, state, .. } = self.memory(run);
        let directory = memory.parent().unwrap_or(&self.root);
        for path in [&memory, &state, &self.upper, directory, &self.root] {
            File::open(path).and_then(|file| file.sync_all()).map_err(|error| file_error(path, &error))?;
        }
        Ok(())
    }

    /// Removes what was written down of a run.
    ///
    /// # Errors
    /// The path that could not be removed.
    pub fn remove_memory(&self, run: BootId) -> io::Result<()> {
        match self.memory(run).memory.parent().map_or(Ok(()), std::fs::remove_dir_all) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes the memory of every run but `kept`: what a daemon that died left.
    ///
    /// # Errors
    /// The path that could not be removed.
    pub fn sweep_memory(&self, kept: Option<BootId>) -> io::Result<()> {
        let kept = kept.map(|run| format!("{MEMORY_PREFIX}{run}"));
        let entries = match std::fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let is_memory = name.to_str().is_some_and(|name| name.starts_with(MEMORY_PREFIX));
            if is_memory && name.to_str() != kept.as_deref() {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes everything.
    ///
    /// # Errors
    /// The path that could not be removed.
    pub fn remove(&self) -> Result<(), ApiError> {
        for directory in [&self.run, &self.root] {
            match std::fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error(directory, &error)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Keeps the evidence of a failed boot, the last [`BOOT_ERRORS_KEPT`] of this home.
    ///
    /// # Errors
    /// The path that could not be written.
    pub fn keep_boot_error(&self, name: &SandboxName, error: &BootError) -> io::Result<()> {
        make_private(&self.boot_errors)?;
        // Boot ids are ordered by time, so the oldest sorts first.
        let path = self.boot_errors.join(format!("{}-{name}.json", error.boot_id));
        std::fs::write(&path, serde_json::to_vec_pretty(error)?)?;
        let mut kept: Vec<PathBuf> =
            std::fs::read_dir(&self.boot_errors)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
        kept.sort();
        for old in kept.iter().take(kept.len().saturating_sub(BOOT_ERRORS_KEPT)) {
            std::fs::remove_file(old)?;
        }
        Ok(())
    }
}

/// Makes a directory and its missing parents, 0700.
pub(crate) fn make_private(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// A file system's refusal as users see it.
pub(crate) fn file_error(path: &Path, error: &io::Error) -> ApiError {
    let code = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::DiskFull,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorCode::PermissionDenied,
        _ => ErrorCode::HomeUnusable,
    };
    ApiError::new(code, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_finds_nothing_of_an_earlier_one_and_a_removal_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let directories = Directories::new(
            &HomeLayout::new(home.path()),
            &home.path().join("rt"),
            &"web".parse().unwrap(),
            SandboxId::generate(),
        );
        directories.prepare().unwrap();
        std::fs::write(directories.run.join(END_FILE), "{}").unwrap();
        std::fs::write(&directories.heartbeat, "{}").unwrap();
        std::fs::write(&directories.upper, "disk").unwrap();
        directories.prepare().unwrap();
        assert!(
            !directories.run.join(END_FILE).exists() && !directories.heartbeat.exists() && directories.upper.exists()
        );
        directories.remove().unwrap();
        directories.remove().unwrap();
        assert!(!directories.root.exists() && !directories.run.exists());
    }

    #[test]
    fn memory_is_that_of_one_run_and_the_rest_is_swept() {
        let home = tempfile::tempdir().unwrap();
        let name = "web".parse().unwrap();
        let directories = Directories::new(&HomeLayout::new(home.path()), home.path(), &name, SandboxId::generate());
        directories.sweep_memory(None).unwrap();
        directories.prepare().unwrap();
        std::fs::write(&directories.upper, "disk").unwrap();
        let runs = [BootId::generate(), BootId::generate()];
        for run in runs {
            directories.create_memory(run).unwrap();
            directories.sync_memory(run).unwrap();
        }
        assert!(directories.create_memory(runs[0]).is_err(), "it is written down twice");
        directories.sweep_memory(Some(runs[1])).unwrap();
        assert!(!directories.memory(runs[0]).memory.exists() && directories.memory(runs[1]).state.exists());
        directories.remove_memory(runs[0]).unwrap();
        directories.remove_memory(runs[1]).unwrap();
        assert!(!directories.memory(runs[1]).state.exists() && directories.upper.exists());
        assert_eq!(directories.sync_memory(runs[1]).unwrap_err().code, ErrorCode::HomeUnusable);
    }

    #[test]
    fn the_last_twenty_failed_boots_are_kept() {
        let home = tempfile::tempdir().unwrap();
        let name: SandboxName = "web".parse().unwrap();
        let directories = Directories::new(&HomeLayout::new(home.path()), home.path(), &name, SandboxId::generate());
        let ids: Vec<BootId> = (0..25).map(|number| BootId(uuid::Uuid::from_u128(number))).collect();
        for boot_id in &ids {
            let error = BootError {
                boot_id: *boot_id,
                at_ns: 0,
                stage: "agent".into(),
                error: ApiError::internal("x"),
                console_tail: String::new(),
            };
            directories.keep_boot_error(&name, &error).unwrap();
        }
        let mut kept: Vec<_> = std::fs::read_dir(&directories.boot_errors)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        kept.sort();
        assert_eq!(kept.len(), BOOT_ERRORS_KEPT);
        assert_eq!(kept[0], format!("{}-web.json", ids[5]));
    }
}
