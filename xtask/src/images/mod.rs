//! `cargo xtask images`: the OCI archives of the demo and of the tests, made from Debian packages only.
//!
//! | file | form | what it is for |
//! |---|---|---|
//! | `busybox.tar` | docker archive, plain layers | the demo; most tests |
//! | `busybox-oci.tar` | OCI layout, gzip layers | the same image in the other form |
//! | `app.tar` | OCI layout, one zstd layer | entrypoint, non-root user, workdir, volume, labels, stop signal |
//! | `python.tar` | OCI layout, gzip layers | a larger one: Debian with python3 |
//! | `tools.tar` | docker archive, plain layers | whole programs inside a guest, as Docker; made when a long proof wants it |
//!
//! They hold what real images hold and toys do not: several layers, whiteouts, an opaque folder, hard links, xattrs, a file
//! capability, device nodes, a fifo, a set-uid file, a sticky folder, names with spaces. Kept under `~/.cache/msb/images/<key>/`.

mod archive;
mod busybox;
pub(crate) mod large;
mod layer;
mod python;
mod root;
mod tools;

use std::path::PathBuf;

use anyhow::Result;

use crate::{cache, debian};

/// The sources that decide what comes out.
const RECIPE: &[&str] =
    &[include_str!("archive.rs"), include_str!("busybox.rs"), include_str!("layer.rs"), include_str!("root.rs")];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only the small ones; python.tar needs root and a minute
    #[arg(long)]
    small: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    println!("{}", small()?.display());
    if !arguments.small {
        println!("{}", python()?.display());
    }
    Ok(())
}

/// The folder with `busybox.tar`, `busybox-oci.tar` and `app.tar`.
pub(crate) fn small() -> Result<PathBuf> {
    let (_, version) = debian::first_known(&["busybox-static"])?;
    let parts = RECIPE[..3].iter().copied().chain([version.as_str()]).map(str::as_bytes);
    cache::entry("images", &cache::key(parts), |result| {
        debian::ensure(&[debian::IMAGES])?;
        println!("test images: making busybox and app from busybox-static {version}");
        busybox::make(result)
    })
}

/// The folder with `python.tar`.
///
/// # Errors
///
/// Also when this user cannot become root: debootstrap makes files of many owners.
pub(crate) fn python() -> Result<PathBuf> {
    let (codename, mirror) = debian::release()?;
    let parts = RECIPE.iter().copied().chain([include_str!("python.rs"), codename.as_str()]).map(str::as_bytes);
    cache::entry("images", &cache::key(parts), |result| {
        debian::ensure(&[debian::IMAGES])?;
        println!("test images: making python from Debian packages ({codename}), about a minute");
        python::make(&codename, &mirror, result)
    })
}

/// The folder with `tools.tar`, which needs some minutes and half a gigabyte.
///
/// # Errors
///
/// As [`python`].
pub(crate) fn tools() -> Result<PathBuf> {
    let (codename, mirror) = debian::release()?;
    let parts = RECIPE.iter().copied().chain([include_str!("tools.rs"), codename.as_str()]).map(str::as_bytes);
    cache::entry("images", &cache::key(parts), |result| {
        debian::ensure(&[debian::IMAGES])?;
        println!("test images: making tools from Debian packages ({codename}), some minutes");
        tools::make(&codename, &mirror, result)
    })
}
