//! What the tests run: the install tree and the image archives. `cargo xtask test` makes them and says where they are; run by hand,
//! the development tree and the cache are looked up.

use std::path::{Path, PathBuf};

/// The install tree: `bin/msb` and so on.
///
/// # Panics
///
/// When there is none, with the command that makes it.
#[must_use]
pub fn tree() -> PathBuf {
    let tree = std::env::var_os("MSB_TEST_TREE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/msb"), PathBuf::from);
    assert!(
        tree.join("bin/msb").is_file(),
        "there is no msb under {}; `cargo xtask install` makes it, `cargo xtask test --only e2e` does everything",
        tree.display()
    );
    tree.canonicalize().expect("the install tree's real path")
}

/// One of the small archives: `busybox.tar`, `busybox-oci.tar` or `app.tar`.
///
/// # Panics
///
/// When `MSB_TEST_IMAGES` does not name their folder.
#[must_use]
pub fn image(name: &str) -> PathBuf {
    let folder = std::env::var_os("MSB_TEST_IMAGES").map(PathBuf::from);
    let folder = folder.expect("MSB_TEST_IMAGES names the folder that `cargo xtask images --small` prints");
    let path = folder.join(name);
    assert!(path.is_file(), "there is no {}", path.display());
    path
}

/// The archive with python, where it could be made.
#[must_use]
pub fn python_image() -> Option<PathBuf> {
    std::env::var_os("MSB_TEST_PYTHON").map(PathBuf::from)
}

/// The archive with whole programs (curl, dig, iperf3, python3), for the long proofs.
#[must_use]
pub fn tools_image() -> Option<PathBuf> {
    std::env::var_os("MSB_TEST_TOOLS").map(PathBuf::from)
}

/// Programs that others wrote and that watch what we tell: `python/` with a collector and the protobuf definitions, `debian/` with
/// Prometheus. Where they could be fetched.
#[must_use]
pub fn observers() -> Option<PathBuf> {
    std::env::var_os("MSB_TEST_OBSERVERS").map(PathBuf::from)
}

/// The engine under test: `qemu` unless `MSB_TEST_ENGINE` says otherwise.
#[must_use]
pub fn engine() -> String {
    std::env::var("MSB_TEST_ENGINE").unwrap_or_else(|_| "qemu".to_owned())
}
