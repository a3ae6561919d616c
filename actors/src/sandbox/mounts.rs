//! From the mounts and patches of a spec to what the agent and the VM process get. Looks only at which volumes there are.

use std::path::PathBuf;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::guest::{GuestMount, GuestMountSource, GuestPatch, GuestPatchKind};
use msb_protocol::mount::{MountSource, Patch, SCRIPTS_DIRECTORY, VOLUME_SIZE_MIB_DEFAULT, VolumeKind};
use msb_protocol::spec::{RootKind, SandboxSpec};
use msb_protocol::vmm::{DiskSpec, LOWER_SERIAL, LOWER_SHARE, ShareSpec};

use crate::volumes::Volumes;

/// The mounts of one run, on both sides.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MountPlan {
    /// What the agent mounts.
    pub guest: Vec<GuestMount>,
    /// What the VM process shares.
    pub shares: Vec<ShareSpec>,
    /// What it has as disks.
    pub disks: Vec<DiskSpec>,
}

/// Makes the plan. Options count on both sides: the guest's mount has them, and a share or disk that is read-only is so for the VM
/// process too.
///
/// # Errors
/// `volume_not_found` for a volume that is gone, `invalid_config` for one that is of another kind.
pub fn plan(spec: &SandboxSpec, volumes: &Volumes) -> Result<MountPlan, ApiError> {
    let forced = spec.security.forced_mount_options();
    let mut plan = MountPlan::default();
    for mount in &spec.mounts {
        let options = mount.options.with(forced);
        let share = |plan: &mut MountPlan, path: PathBuf, quota_mib: Option<u32>| {
            let name = plan.shares.len().to_string();
            plan.shares.push(ShareSpec {
                name: name.clone(),
                path,
                read_only: options.read_only,
                is_root_owned: false,
                quota_bytes: quota_mib.map(|mebibytes| u64::from(mebibytes) << 20),
            });
            GuestMountSource::Share(name)
        };
        let disk = |plan: &mut MountPlan, path: PathBuf| {
            let serial = format!("volume-{}", plan.disks.len());
            plan.disks.push(DiskSpec { serial: serial.clone(), path, read_only: options.read_only });
            GuestMountSource::Disk(serial)
        };
        let source = match &mount.source {
            MountSource::Tmpfs { size_mib } => GuestMountSource::Tmpfs(u64::from(size_mib.unwrap_or_default()) << 20),
            MountSource::Directory { path } | MountSource::File { path } => share(&mut plan, PathBuf::from(path), None),
            MountSource::Disk { path } => disk(&mut plan, PathBuf::from(path)),
            MountSource::Named { name, volume, quota_mib, .. } => {
                let (kind, path) = volumes
                    .locate(name)
                    .ok_or_else(|| ApiError::new(ErrorCode::VolumeNotFound, format!("volume {name} is gone")))?;
                if volume.is_some_and(|wanted| wanted != kind) {
                    let message = format!("volume {name} is a {} and not what was asked for", kind.as_str());
                    return Err(ApiError::new(ErrorCode::InvalidConfig, message)
                        .with_hint("leave kind= out, or choose another name"));
                }
                match kind {
                    VolumeKind::Disk if quota_mib.is_some() => {
                        let message = format!("volume {name} is a disk, which ends at its size and has no quota");
                        return Err(ApiError::new(ErrorCode::InvalidConfig, message).with_hint("leave quota= out"));
                    }
                    VolumeKind::Dir => share(&mut plan, path, *quota_mib),
                    VolumeKind::Disk => disk(&mut plan, path),
                }
            }
        };
        let options = options.to_string();
        plan.guest.push(GuestMount { target: mount.target.clone(), options, source: Some(source) });
    }
    // Only read: what the sandbox changes is on its own disk.
    let root = PathBuf::from(&spec.image);
    match spec.root {
        RootKind::Image => {}
        RootKind::Directory => {
            let name = LOWER_SHARE.to_owned();
            plan.shares.push(ShareSpec { name, path: root, read_only: true, is_root_owned: true, quota_bytes: None });
        }
        RootKind::Disk => {
            plan.disks.push(DiskSpec { serial: LOWER_SERIAL.to_owned(), path: root, read_only: true });
        }
    }
    Ok(plan)
}

/// Disks of volumes that are still to be made, with their sizes in MiB. Directory volumes are made at once.
///
/// # Errors
/// Those of the file system.
pub fn missing_disks(spec: &SandboxSpec, volumes: &Volumes) -> Result<Vec<(PathBuf, u32)>, ApiError> {
    let mut disks = Vec::new();
    for mount in &spec.mounts {
        let MountSource::Named { name, volume, size_mib, .. } = &mount.source else { continue };
        if volumes.locate(name).is_none() {
            let kind = volume.unwrap_or_default();
            let path = volumes.create(name, kind)?;
            if kind == VolumeKind::Disk {
                disks.push((path, size_mib.unwrap_or(VOLUME_SIZE_MIB_DEFAULT)));
            }
        }
    }
    Ok(disks)
}

/// The patches as the agent makes them.
#[must_use]
pub fn guest_patches(spec: &SandboxSpec) -> Vec<GuestPatch> {
    spec.patches
        .iter()
        .map(|patch| {
            let (mode, kind) = match patch {
                Patch::File { content, mode, .. } => (*mode, GuestPatchKind::File(content.clone())),
                Patch::Link { to, .. } => (0, GuestPatchKind::Link(to.clone())),
                Patch::Mkdir { mode, .. } => (*mode, GuestPatchKind::Directory(true)),
                Patch::Remove { .. } => (0, GuestPatchKind::Removed(true)),
            };
            GuestPatch { path: patch.path().to_owned(), mode, kind: Some(kind) }
        })
        .collect()
}

/// Whether the sandbox has scripts, whose directory is then on PATH.
#[must_use]
pub fn has_scripts(spec: &SandboxSpec) -> bool {
    spec.patches.iter().any(|patch| patch.path().starts_with(SCRIPTS_DIRECTORY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use msb_protocol::mount::Mount;
    use msb_protocol::security::SecurityProfile;

    #[test]
    fn options_and_what_the_profile_forces_hold_on_both_sides() {
        let home = tempfile::tempdir().unwrap();
        let volumes = Volumes::new(home.path());
        let mut spec = SandboxSpec::new("busybox");
        spec.security = SecurityProfile::Restricted;
        for text in ["/a:/a:ro", "data:/d", "work:/w:kind=disk,size=64M,noexec"] {
            spec.mounts.push(Mount::parse_volume(text).unwrap());
        }
        spec.mounts.push(Mount::parse_tmpfs("/t:1M").unwrap());
        assert_eq!(plan(&spec, &volumes).unwrap_err().code, ErrorCode::VolumeNotFound);
        let disks = missing_disks(&spec, &volumes).unwrap();
        assert_eq!(disks, [(home.path().join("work/disk.img"), 64)]);
        std::fs::write(&disks[0].0, "").unwrap();
        assert!(missing_disks(&spec, &volumes).unwrap().is_empty());
        let made = plan(&spec, &volumes).unwrap();
        let shown: Vec<_> = made.guest.iter().map(|mount| (mount.target.as_str(), mount.options.as_str())).collect();
        assert_eq!(
            shown,
            [
                ("/a", "ro,nosuid,nodev"),
                ("/d", "rw,nosuid,nodev"),
                ("/w", "rw,noexec,nosuid,nodev"),
                ("/t", "rw,nosuid,nodev")
            ]
        );
        assert_eq!(made.shares.iter().map(|share| share.read_only).collect::<Vec<_>>(), [true, false]);
        assert_eq!((made.disks.len(), made.disks[0].serial.as_str()), (1, "volume-0"));
        // A root of the host's own comes last, and is only read.
        spec.image = "/srv/root".into();
        spec.root = RootKind::Directory;
        let with_root = plan(&spec, &volumes).unwrap();
        let share = with_root.shares.last().unwrap();
        assert_eq!((share.name.as_str(), share.read_only, share.is_root_owned), ("root", true, true));
        assert_eq!((with_root.shares.len(), with_root.guest.len()), (3, 4));
        spec.root = RootKind::Disk;
        let with_root = plan(&spec, &volumes).unwrap();
        assert_eq!((with_root.disks[1].serial.as_str(), with_root.disks[1].read_only), ("root", true));
        spec.mounts = vec![Mount::parse_volume("data:/d:kind=disk").unwrap()];
        assert_eq!(plan(&spec, &volumes).unwrap_err().code, ErrorCode::InvalidConfig);
    }
}
