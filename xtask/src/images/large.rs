//! The image that loading and pulling are measured with: Debian with Python and what people compute with in it, in eight layers.
//!
//! The first layer is the one of `python.tar`; each of the others holds the files of one or two Debian packages, unpacked and not
//! installed: nobody runs this image.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use super::archive::{Compression, Image, StoredLayer};
use crate::{debian, program};

/// Packages by layer. The names of a version of Python stand for whichever the release has.
const LAYERS: [&[&[&str]]; 7] = [
    &[&["libpython3.11-stdlib", "libpython3.13-stdlib", "libpython3.12-stdlib", "libpython3.10-stdlib"]],
    &[&["python3-numpy"]],
    &[&["python3-scipy"]],
    &[&["python3-sympy"]],
    &[&["python3-pandas"], &["python3-pandas-lib"]],
    &[&["python3-matplotlib"]],
    &[&["libopenblas0-pthread"]],
];

/// The layers as tar streams, bottom first; `python` is the archive of the image of that name.
pub(crate) fn layers(python: &Path, scratch: &Path) -> Result<Vec<Vec<u8>>> {
    let mut layers = vec![base(python)?];
    for (number, packages) in LAYERS.iter().enumerate() {
        let root = scratch.join(format!("layer{number}"));
        std::fs::create_dir_all(&root)?;
        for names in *packages {
            let (name, _) = debian::first_known(names)?;
            let package = debian::download(name, scratch)?;
            debian::unpack(&package, &root)?;
            std::fs::remove_file(&package)?;
        }
        layers.push(packed(&root)?);
        std::fs::remove_dir_all(&root)?;
    }
    Ok(layers)
}

/// Writes the layers as `docker save` does.
pub(crate) fn write(layers: Vec<Vec<u8>>, reference: &str, archive: &Path) -> Result<()> {
    let layers = layers.into_iter().map(|tar| StoredLayer { tar, compression: Compression::Gzip }).collect();
    Image { reference, config: json!({ "Cmd": ["python3"] }), layers }.write_docker(archive)
}

/// The tar stream of a folder.
pub(crate) fn packed(root: &Path) -> Result<Vec<u8>> {
    let tar: PathBuf = root.with_extension("tar");
    let mut pack = program::command("tar");
    pack.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@1704067200", "-C"]).arg(root);
    program::output(pack.arg("-cf").arg(&tar).arg("."))?;
    let bytes = std::fs::read(&tar)?;
    std::fs::remove_file(&tar)?;
    Ok(bytes)
}

/// The largest blob of an OCI archive, unpacked.
fn base(archive: &Path) -> Result<Vec<u8>> {
    let mut largest = Vec::new();
    for entry in tar::Archive::new(std::fs::File::open(archive)?).entries()? {
        let mut entry = entry?;
        if entry.size() > largest.len() as u64 {
            largest.clear();
            entry.read_to_end(&mut largest)?;
        }
    }
    let mut tar = Vec::new();
    flate2::read::GzDecoder::new(largest.as_slice()).read_to_end(&mut tar).context("the layer of python.tar")?;
    Ok(tar)
}
