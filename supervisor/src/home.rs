//! The home and runtime directories: ours, private, writable, and served by one daemon only.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::paths::HomeLayout;

/// Held for as long as the daemon serves its home.
#[derive(Debug)]
pub struct HomeLock {
    _file: File,
}

/// Makes a directory private, or checks that it is.
///
/// # Errors
/// `home_unusable` saying what is wrong with it.
pub fn private_directory(path: &Path) -> Result<(), ApiError> {
    let refuse = |why: String| ApiError::new(ErrorCode::HomeUnusable, format!("{}: {why}", path.display()));
    if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(path) {
        let code = if error.kind() == ErrorKind::StorageFull { ErrorCode::DiskFull } else { ErrorCode::HomeUnusable };
        return Err(ApiError::new(code, format!("{} cannot be made: {error}", path.display())));
    }
    let metadata = std::fs::symlink_metadata(path).map_err(|error| refuse(error.to_string()))?;
    // A link is followed by everything that comes later, so what it points to is what counts, except in /tmp where anybody may lay one.
    let metadata = if metadata.is_symlink() && !path.starts_with("/tmp") {
        std::fs::metadata(path).map_err(|error| refuse(error.to_string()))?
    } else {
        metadata
    };
    if !metadata.is_dir() {
        return Err(refuse("is not a directory".into()));
    }
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own {
        return Err(refuse(format!("belongs to user {}, not to {own}", metadata.uid())));
    }
    if metadata.mode() & 0o077 != 0 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
            .map_err(|error| refuse(format!("is open to others and cannot be closed: {error}")))?;
    }
    let probe = path.join(format!(".writable-{}", std::process::id()));
    let written = File::create(&probe).and_then(|mut file| file.write_all(b"x"));
    let removed = std::fs::remove_file(&probe);
    match written.and(removed) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::StorageFull => {
            Err(ApiError::new(ErrorCode::DiskFull, format!("{}: {error}", path.display())))
        }
        Err(error) => Err(refuse(format!("is not writable: {error}"))),
    }
}

/// Takes the home for this process.
///
/// # Errors
/// `daemon_running` saying which process has it.
pub fn lock(home: &HomeLayout) -> Result<HomeLock, ApiError> {
    let path = home.lock();
    let refuse = |error: std::io::Error| ApiError::new(ErrorCode::HomeUnusable, format!("{}: {error}", path.display()));
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(refuse)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut pid = String::new();
            // The text is for people; the lock itself is what counts.
            let _ = (&mut file).take(32).read_to_string(&mut pid);
            let pid = pid.trim();
            let message = format!(
                "another msbd serves {}{}",
                home.home.display(),
                if pid.is_empty() { String::new() } else { format!(" (pid {pid})") }
            );
            return Err(ApiError::new(ErrorCode::DaemonRunning, message));
        }
        Err(std::fs::TryLockError::Error(error)) => return Err(refuse(error)),
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    // A full disk must not keep the daemon from starting for want of a number.
    if let Err(error) = write(&mut file) {
        tracing::warn!(path = %path.display(), %error, "the process id could not be written into the lock");
    }
    Ok(HomeLock { _file: file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_is_made_private_and_one_that_is_not_a_directory_is_refused() {
        let top = tempfile::tempdir().unwrap();
        let home = top.path().join("a/b");
        private_directory(&home).unwrap();
        assert_eq!(std::fs::metadata(&home).unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&home, std::fs::Permissions::from_mode(0o755)).unwrap();
        private_directory(&home).unwrap();
        assert_eq!(std::fs::metadata(&home).unwrap().mode() & 0o777, 0o700);
        let file = top.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(private_directory(&file).unwrap_err().code, ErrorCode::HomeUnusable);
        std::os::unix::fs::symlink("/proc/self", top.path().join("link")).unwrap();
        assert!(private_directory(&top.path().join("link")).is_err());
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&home, Some(12_345), None).unwrap();
            assert!(private_directory(&home).unwrap_err().message.contains("belongs to user 12345"));
        }
    }

    #[test]
    fn a_second_daemon_is_told_who_is_first() {
        let top = tempfile::tempdir().unwrap();
        let home = HomeLayout::new(top.path());
        let first = lock(&home).unwrap();
        let error = lock(&home).unwrap_err();
        assert_eq!(error.code, ErrorCode::DaemonRunning);
        assert!(error.message.contains(&std::process::id().to_string()), "{}", error.message);
        drop(first);
        lock(&home).unwrap();
    }
}
