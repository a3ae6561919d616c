//! What the tests of this crate share: real tools, archives made by hand, and a comparable description of a file tree.
//!
//! Each test file uses a part of it.
#![allow(dead_code, reason = "every test binary compiles the whole module and uses some of it")]
#![allow(clippy::print_stdout, reason = "a skipped test says why")]
#![allow(unreachable_pub, reason = "shared by several test crates")]

pub mod archive;
pub mod registry;
pub mod tools;
pub mod tree;

use std::path::{Path, PathBuf};

use msb_image::{LoadOptions, LoadSource, LoadedImage, RootImage, Store};

/// A store in a directory of its own.
pub struct Home {
    pub directory: tempfile::TempDir,
    pub store: Store,
}

pub fn home() -> Home {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    Home { directory, store }
}

/// Loads bytes as a stream, the way an upload arrives.
pub fn load(store: &Store, bytes: &[u8]) -> Result<Vec<LoadedImage>, msb_image::ImageError> {
    store.load(LoadSource::Stream(Box::new(bytes)), &LoadOptions::default(), &mut |_| {})
}

/// Loads a file, the way `msb image load -i` does.
pub fn load_file(store: &Store, path: &Path) -> Result<Vec<LoadedImage>, msb_image::ImageError> {
    store.load(LoadSource::File(std::fs::File::open(path).unwrap()), &LoadOptions::default(), &mut |_| {})
}

/// Writes the concatenation that a sandbox's read-only disk is.
pub fn concatenate(root: &RootImage, path: &Path) {
    let mut out = std::fs::File::create(path).unwrap();
    for (part, length) in [(root.metadata.clone(), root.metadata_len)].iter().chain(&root.data) {
        let mut file = std::fs::File::open(part).unwrap();
        assert_eq!(std::io::copy(&mut file, &mut out).unwrap(), *length, "{}", part.display());
    }
}

/// Every file below a directory of the store.
pub fn files_below(path: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    let mut pending = vec![path.to_path_buf()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            } else {
                out.push(entry.path());
            }
        }
    }
    out.sort();
    out
}

/// The store holds nothing: what a failed load must leave.
pub fn assert_empty(home: &Home) {
    let images = home.directory.path().join("images");
    for directory in ["tmp", "blobs", "layers", "roots", "records"] {
        let files = files_below(&images.join(directory));
        assert!(files.is_empty(), "{directory} holds {files:?}");
    }
    assert!(std::fs::read_dir(images.join("tmp")).unwrap().next().is_none(), "tmp holds a directory");
    assert_sound(&home.store);
}

/// The store passes its own closest check.
pub fn assert_sound(store: &Store) {
    let report = store.check(msb_image::CheckDepth::Content).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
}
