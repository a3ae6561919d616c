//! Named volumes: `<home>/volumes/<name>/data` is a directory volume, `<home>/volumes/<name>/disk.img` a disk. What is there is what the
//! files say; there is no second record that could differ. Blocking; called on the blocking pool, but for [`Volumes::locate`].

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_protocol::mount::{MountSource, VolumeKind, volume_name};
use msb_protocol::spec::SandboxSpec;
use msb_protocol::volume::{VolumeDetail, VolumeUser};

use crate::sandbox::directories::{file_error, make_private};

/// Files of a directory volume that are counted.
const COUNTED_MAX: usize = 50_000;
const DIRECTORY: &str = "data";
const DISK: &str = "disk.img";

/// The volumes of a home.
#[derive(Clone, Debug)]
pub struct Volumes {
    root: PathBuf,
}

impl Volumes {
    /// The volumes below a directory.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Where a volume's data is, if there is such a volume. The path has no links but what the home's own has.
    #[must_use]
    pub fn locate(&self, name: &SandboxName) -> Option<(VolumeKind, PathBuf)> {
        let place = self.root.join(name.as_str());
        let (directory, disk) = (place.join(DIRECTORY), place.join(DISK));
        if disk.symlink_metadata().is_ok_and(|data| data.is_file()) {
            Some((VolumeKind::Disk, disk))
        } else if directory.symlink_metadata().is_ok_and(|data| data.is_dir()) {
            Some((VolumeKind::Dir, directory))
        } else {
            None
        }
    }

    /// Makes a directory volume, or the place of a disk; gives the path of the disk that its caller then makes.
    ///
    /// # Errors
    /// `volume_already_exists`, or those of the file system.
    pub fn create(&self, name: &SandboxName, kind: VolumeKind) -> Result<PathBuf, ApiError> {
        if self.locate(name).is_some() {
            return Err(ApiError::new(ErrorCode::VolumeAlreadyExists, format!("volume {name} exists already")));
        }
        let place = self.root.join(name.as_str());
        make_private(&place).map_err(|error| file_error(&place, &error))?;
        match kind {
            VolumeKind::Disk => Ok(place.join(DISK)),
            VolumeKind::Dir => {
                let directory = place.join(DIRECTORY);
                match std::fs::DirBuilder::new().create(&directory) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(file_error(&directory, &error));
                    }
                    _ => {}
                }
                // Its mode is the guest's to see, whatever the daemon's umask is; the home around it is private.
                std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755))
                    .map_err(|error| file_error(&directory, &error))?;
                Ok(directory)
            }
        }
    }

    /// What is known of a volume.
    ///
    /// # Errors
    /// `volume_not_found`.
    pub fn inspect(&self, name: &SandboxName, users: Vec<VolumeUser>) -> Result<VolumeDetail, ApiError> {
        let missing = || ApiError::new(ErrorCode::VolumeNotFound, format!("no volume is called {name}"));
        let (kind, path) = self.locate(name).ok_or_else(missing)?;
        let data = path.symlink_metadata().map_err(|_| missing())?;
        let place = self.root.join(name.as_str()).metadata().map_err(|_| missing())?;
        let (size_bytes, allocated_bytes) = match kind {
            VolumeKind::Disk => (Some(data.len()), data.blocks() * 512),
            VolumeKind::Dir => (None, allocated(&path)),
        };
        // The place is made once and gets no further entries, so its change is the volume's birth.
        let made = place.created().or_else(|_| place.modified()).ok();
        Ok(VolumeDetail {
            name: name.clone(),
            kind,
            size_bytes,
            allocated_bytes,
            created_at: made.and_then(|time| Timestamp::try_from(time).ok()).unwrap_or(Timestamp::UNIX_EPOCH),
            path: path.display().to_string(),
            users,
        })
    }

    /// The names of all volumes, in their order.
    #[must_use]
    pub fn names(&self) -> Vec<SandboxName> {
        let entries = std::fs::read_dir(&self.root).into_iter().flatten().flatten();
        let mut names: Vec<SandboxName> = entries
            .filter_map(|entry| volume_name(entry.file_name().to_str()?).ok())
            .filter(|name| self.locate(name).is_some())
            .collect();
        names.sort();
        names
    }

    /// Removes a volume with everything in it.
    ///
    /// # Errors
    /// `volume_not_found`, `volume_in_use` naming the users, or those of the file system.
    pub fn remove(&self, name: &SandboxName, users: &[VolumeUser]) -> Result<(), ApiError> {
        if self.locate(name).is_none() {
            return Err(ApiError::new(ErrorCode::VolumeNotFound, format!("no volume is called {name}")));
        }
        if !users.is_empty() {
            let names: Vec<String> = users.iter().map(|user| user.sandbox.to_string()).collect();
            let message = format!("volume {name} is used by {}", names.join(", "));
            return Err(ApiError::new(ErrorCode::VolumeInUse, message).with_details(names));
        }
        let place = self.root.join(name.as_str());
        std::fs::remove_dir_all(&place).map_err(|error| file_error(&place, &error))
    }
}

/// Bytes that the host allocates below a directory, following no link.
fn allocated(directory: &Path) -> u64 {
    let mut waiting = vec![directory.to_path_buf()];
    let (mut bytes, mut counted) = (0u64, 0usize);
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            counted += 1;
            if counted > COUNTED_MAX {
                return bytes;
            }
            let Ok(data) = entry.path().symlink_metadata() else { continue };
            bytes += data.blocks() * 512;
            if data.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    bytes
}

/// How a sandbox uses a volume, if it does.
pub fn use_of<'a>(
    sandbox: &'a SandboxName,
    spec: &'a SandboxSpec,
    wanted: &'a SandboxName,
) -> impl Iterator<Item = VolumeUser> + 'a {
    let forced = spec.security.forced_mount_options();
    spec.mounts.iter().filter_map(move |mount| match &mount.source {
        MountSource::Named { name, .. } if name == wanted => Some(VolumeUser {
            sandbox: sandbox.clone(),
            target: mount.target.clone(),
            options: mount.options.with(forced),
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use msb_protocol::mount::Mount;

    fn name(text: &str) -> SandboxName {
        text.parse().unwrap()
    }

    #[test]
    fn volumes_are_made_listed_and_removed_unless_somebody_uses_them() {
        let home = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(home.path().join("volumes"));
        assert!(volumes.names().is_empty());
        let path = volumes.create(&name("data"), VolumeKind::Dir).unwrap();
        std::fs::write(path.join("file"), vec![1; 8192]).unwrap();
        assert_eq!(volumes.create(&name("data"), VolumeKind::Dir).unwrap_err().code, ErrorCode::VolumeAlreadyExists);
        // A disk that was not finished is no volume yet.
        let disk = volumes.create(&name("disk"), VolumeKind::Disk).unwrap();
        assert_eq!(volumes.names(), [name("data")]);
        std::fs::write(&disk, vec![0; 4096]).unwrap();
        assert_eq!(volumes.names(), [name("data"), name("disk")]);
        let detail = volumes.inspect(&name("disk"), Vec::new()).unwrap();
        assert_eq!((detail.kind, detail.size_bytes), (VolumeKind::Disk, Some(4096)));
        assert!(volumes.inspect(&name("data"), Vec::new()).unwrap().allocated_bytes >= 8192);
        let mut spec = SandboxSpec::new("busybox");
        spec.mounts.push(Mount::parse_volume("data:/d:ro").unwrap());
        let users: Vec<VolumeUser> = use_of(&name("box"), &spec, &name("data")).collect();
        let error = volumes.remove(&name("data"), &users).unwrap_err();
        assert_eq!((error.code, error.details), (ErrorCode::VolumeInUse, vec!["box".to_owned()]));
        volumes.remove(&name("data"), &[]).unwrap();
        assert_eq!(volumes.remove(&name("data"), &[]).unwrap_err().code, ErrorCode::VolumeNotFound);
    }
}
