//! The files of one sandbox and how they come and go. Blocking; called on the blocking pool only.
//!
//! `<home>/sandboxes/<name>/{upper.img, logs/, heartbeat.json}` and the run directory of sockets, everything 0700/0600.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_protocol::paths::{HomeLayout, sandbox_run_dir};
use msb_protocol::vmm::{BootError, END_FILE};

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

impl Directories {
    /// Where a sandbox's files are.
    #[must_use]
    pub fn new(home: &HomeLayout, runtime_dir: &Path, name: &SandboxName, id: SandboxId) -> Self {
        let root = home.sandbox(name);
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
    use msb_protocol::id::BootId;

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
