//! A tree of this machine for the suite's copies, with what copies get wrong, and what two trees have in common. Called by `suite`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::program;

/// Makes the tree.
pub(super) fn make(root: &Path) -> Result<()> {
    let deep = root.join("a folder/deeper");
    std::fs::create_dir_all(&deep)?;
    std::fs::create_dir(root.join("empty"))?;
    std::fs::write(root.join("file"), "content\n")?;
    std::fs::write(root.join("nothing"), "")?;
    std::fs::write(deep.join("x".repeat(120)), "a name that is too long for one header\n")?;
    std::fs::write(root.join("grün"), vec![7; 300_000])?;
    std::fs::set_permissions(root.join("file"), PermissionsExt::from_mode(0o750))?;
    let holes = File::create(root.join("holes"))?;
    holes.write_all_at(b"end", 4 << 20)?;
    symlink("../outside", deep.join("link"))?;
    symlink("/etc", root.join("absolute"))?;
    std::fs::hard_link(root.join("file"), root.join("twin"))?;
    // Last, because each entry changes its folder's time.
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for path in [&root.join("file"), &deep, &root.to_owned()] {
        File::open(path)?.set_modified(old)?;
    }
    Ok(())
}

/// Unpacks the lowest layer of a docker archive: enough of an image for a root.
pub(super) fn unpack(archive: &Path, root: &Path) -> Result<()> {
    let layers = tempfile::tempdir()?;
    std::fs::create_dir(root)?;
    program::run(program::command("tar").arg("-xf").arg(archive).arg("-C").arg(layers.path()))?;
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(layers.path().join("manifest.json"))?)?;
    let layer = manifest[0]["Layers"][0].as_str().context("an archive without layers")?;
    program::run(program::command("tar").arg("-xf").arg(layers.path().join(layer)).arg("-C").arg(root))?;
    Ok(())
}

/// Fails with the first path in which two trees differ.
pub(super) fn compare(one: &Path, other: &Path) -> Result<()> {
    let (one, other) = (read(one)?, read(other)?);
    for path in one.keys().chain(other.keys()) {
        let (a, b) = (one.get(path), other.get(path));
        if a != b {
            bail!("'{path}' was {a:?} and is {b:?}");
        }
    }
    Ok(())
}

/// What each path of a tree is: kind, permission bits, time in seconds, content or target.
fn read(root: &Path) -> Result<BTreeMap<String, String>> {
    let (mut found, mut waiting) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = waiting.pop() {
        let data = std::fs::symlink_metadata(&path)?;
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        let is = if data.is_dir() {
            for entry in std::fs::read_dir(&path)? {
                waiting.push(entry?.path());
            }
            format!("a directory, {:o}, {}", data.mode() & 0o777, data.mtime())
        } else if data.is_symlink() {
            format!("a link to {}", std::fs::read_link(&path)?.display())
        } else {
            let content = Sha256::digest(std::fs::read(&path)?);
            format!("a file, {:o}, {}, {} bytes, {content:x?}", data.mode() & 0o777, data.mtime(), data.len())
        };
        found.insert(name, is);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_like_itself_and_a_changed_bit_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        std::fs::create_dir(&one).and_then(|()| std::fs::create_dir(&other)).expect("two folders");
        make(&one).and_then(|()| make(&other)).expect("two trees");
        for tree in [&one, &other] {
            for name in ["a folder", "empty", "grün", "holes", "nothing"] {
                let path = tree.join(name);
                File::open(path).and_then(|file| file.set_modified(std::time::UNIX_EPOCH)).expect("a time");
            }
            let long = tree.join("a folder/deeper").join("x".repeat(120));
            File::open(long).and_then(|file| file.set_modified(std::time::UNIX_EPOCH)).expect("a time");
        }
        compare(&one, &other).expect("they are alike");
        std::fs::set_permissions(other.join("nothing"), PermissionsExt::from_mode(0o600)).expect("a mode");
        let told = compare(&one, &other).expect_err("they differ").to_string();
        assert!(told.starts_with("'nothing' was"), "{told}");
    }
}
