//! Where xtask keeps what is expensive to make: `~/.cache/msb/<kind>/<key>/`, the key being a hash of everything the result
//! depends on. Nothing of it is ever kept in the repository.
//!
//! A result is made in a temporary folder beside its final name and renamed when complete, so a reader never sees half of one and
//! two builds at once do no harm. Entries are never changed afterwards; deleting the whole folder is always safe.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The folder of this repository: the one that holds the workspace's `Cargo.toml`.
pub(crate) fn repository() -> PathBuf {
    // Set by cargo for this package at compile time; `cargo xtask` always compiles from the tree it works on.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_else(|| PathBuf::from("."))
}

/// `$XDG_CACHE_HOME/msb` or `~/.cache/msb`.
pub(crate) fn root() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(path) if Path::new(&path).is_absolute() => PathBuf::from(path),
        _ => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache"),
    };
    Ok(base.join("msb"))
}

/// Cargo's target folder for this tree: `CARGO_TARGET_DIR`, else `target`.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(path) => repository().join(path),
        None => repository().join("target"),
    }
}

/// The install tree that tests and the demo use when none is named.
pub(crate) fn development_tree() -> PathBuf {
    target().join("msb")
}

/// A cache key: the first 16 hex digits of the SHA-256 over all parts, each closed by a zero byte.
pub(crate) fn key<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part);
        hash.update([0]);
    }
    hex::encode(&hash.finalize()[..8])
}

/// The folder of one entry: found, or made by `make` in a temporary folder and then renamed into place.
pub(crate) fn entry(kind: &str, key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let parent = root()?.join(kind);
    let place = parent.join(key);
    if place.is_dir() {
        return Ok(place);
    }
    std::fs::create_dir_all(&parent).with_context(|| format!("cannot make {}", parent.display()))?;
    let temporary = tempfile::Builder::new().prefix(".making-").tempdir_in(&parent)?;
    make(temporary.path())?;
    match std::fs::rename(temporary.path(), &place) {
        Ok(()) => {}
        // Somebody else finished the same entry first: theirs is as good.
        Err(_) if place.is_dir() => {}
        Err(error) => return Err(error).with_context(|| format!("cannot move the result to {}", place.display())),
    }
    Ok(place)
}

/// Replaces `to` by the content of `from` without a moment in which it is missing or half written.
pub(crate) fn place_file(from: &Path, to: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = to.parent().context("a file has a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let temporary = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::copy(from, temporary.path())
        .with_context(|| format!("cannot copy {} to {}", from.display(), folder.display()))?;
    std::fs::set_permissions(temporary.path(), std::fs::Permissions::from_mode(mode))?;
    temporary.persist(to).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_depends_on_where_one_part_ends() {
        assert_ne!(key([b"ab".as_slice(), b"c"]), key([b"a".as_slice(), b"bc"]));
        assert_eq!(key([b"ab".as_slice()]).len(), 16);
    }
}
