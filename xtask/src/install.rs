//! `cargo xtask install --prefix P`: the tree that `msb` runs from.
//!
//! ```text
//! P/bin/{msb,msbd,msb-vmm,msb-metrics}
//! P/share/msb/{vmlinux,System.map,initramfs.cpio,upper.ext4.zst}
//! P/share/man/man1/msb*.1 and completions for bash, zsh and fish (with --prefix only)
//! ```
//!
//! Each file is replaced by a rename, so a running daemon keeps what it has opened. Without `--prefix` the tree is the development
//! tree `target/msb`, where the demo and the tests find it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{binaries, cache, debian, initramfs, kernel, program};

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where to install, for example /usr/local; the development tree when left out
    #[arg(long)]
    prefix: Option<PathBuf>,
    #[command(flatten)]
    build: binaries::Arguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let prefix = match &arguments.prefix {
        Some(prefix) => std::path::absolute(prefix)?,
        None => cache::development_tree(),
    };
    install(&prefix, arguments.build)?;
    if arguments.prefix.is_some() {
        binaries::companion("reference", &["--manuals", prefix.to_str().context("a prefix that is not UTF-8")?])?;
    }
    println!("installed under {}; the command is {}", prefix.display(), prefix.join("bin/msb").display());
    Ok(())
}

/// Builds what is missing and lays it out under `prefix`.
pub(crate) fn install(prefix: &Path, build: binaries::Arguments) -> Result<()> {
    let kernel = kernel::built()?;
    let programs = binaries::build(build)?;
    let work = tempfile::tempdir()?;
    let (commands, share) = (prefix.join("bin"), prefix.join("share/msb"));

    for (name, path) in programs.named() {
        let stripped = work.path().join(name);
        program::output(program::command("strip").arg("-o").arg(&stripped).arg(&path))?;
        if name != "msb-agent" {
            cache::place_file(&stripped, &commands.join(name), 0o755)?;
        }
    }
    let image = work.path().join("initramfs.cpio");
    initramfs::write(&work.path().join("msb-agent"), &image)?;
    cache::place_file(&image, &share.join("initramfs.cpio"), 0o644)?;
    for name in ["vmlinux", "System.map"] {
        cache::place_file(&kernel.join(name), &share.join(name), 0o644)?;
    }
    cache::place_file(&upper_template()?, &share.join("upper.ext4.zst"), 0o644)
}

/// The packed template of the writable disk, made anew when the code that says how changes.
fn upper_template() -> Result<PathBuf> {
    debian::ensure(&[debian::BUILD])?;
    let recipe =
        std::fs::read(cache::repository().join("image/src/upper.rs")).context("cannot read image/src/upper.rs")?;
    let place = cache::entry("upper", &cache::key([recipe.as_slice()]), |result| {
        let packed = result.join("upper.ext4.zst");
        binaries::companion("upper", &[packed.to_str().context("a cache path that is not UTF-8")?])
    })?;
    Ok(place.join("upper.ext4.zst"))
}
