//! Volumes of the image and what cannot live on an overlay: directories of the writable disk bound over the root. On first use one
//! is filled with what the image has at that path, as docker does. Called by `root::set_up`.

use std::fs;
use std::io;
use std::path::{Component, Path};

use rustix::fs::OFlags;
use rustix::mount::mount_bind;

use super::copy::copy_tree;
use super::directory::{RootDirectory, path_of};
use super::{RootError, Trying};

/// Most volumes of one guest.
const VOLUMES_MAX: usize = 256;
const STAGE: &str = "volumes";

/// Binds every volume, parents before what lies inside them.
///
/// # Errors
/// As mount(2) and the copy.
pub fn bind_all(root: &RootDirectory, upper: &Path, paths: &[String]) -> Result<(), RootError> {
    let mut paths = paths.iter().filter(|path| is_usable(path)).collect::<Vec<_>>();
    paths.sort_unstable();
    paths.dedup();
    if paths.len() > VOLUMES_MAX {
        return Err(io::Error::from(io::ErrorKind::InvalidInput)).trying(STAGE, "too many volumes");
    }
    for path in paths {
        bind(root, upper, path).trying(STAGE, &format!("cannot set up the volume {path}"))?;
    }
    Ok(())
}

/// Absolute, below the root, without `..`.
fn is_usable(path: &str) -> bool {
    let mut components = Path::new(path).components();
    components.next() == Some(Component::RootDir)
        && components.clone().next().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)))
}

/// A file name for a path, reversible. One that is longer than the file system takes is its error.
fn directory_name(path: &str) -> String {
    path.trim_matches('/').replace('%', "%25").replace('/', "%2F")
}

fn bind(root: &RootDirectory, upper: &Path, path: &str) -> io::Result<()> {
    let target = root.create_directories(Path::new(path), 0o755)?;
    let volumes = upper.join("msb/volumes");
    fs::create_dir_all(&volumes)?;
    let directory = volumes.join(directory_name(path));
    if !directory.exists() {
        let fresh = volumes.join(".filling");
        match fs::remove_dir_all(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir(&fresh)?;
        let copied = copy_tree(&target, &fs::File::open(&fresh)?.into())?;
        if copied > 0 {
            // The name appears only when the copy is whole and on the disk: a crash leaves nothing half-filled under it.
            rustix::fs::syncfs(fs::File::open(&volumes)?)?;
        }
        fs::rename(&fresh, &directory)?;
    }
    let source =
        rustix::fs::open(&directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    mount_bind(path_of(&source), path_of(&target))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_the_root_are_volumes() {
        for good in ["/data", "/var/lib/docker", "/a//b/"] {
            assert!(is_usable(good), "{good}");
        }
        for bad in ["", "/", "data", "/a/../b", "../x"] {
            assert!(!is_usable(bad), "{bad}");
        }
    }

    #[test]
    fn names_of_different_paths_differ() {
        assert_eq!(directory_name("/var/lib/docker"), "var%2Flib%2Fdocker");
        assert_ne!(directory_name("/a%2Fb"), directory_name("/a/b"));
    }
}
