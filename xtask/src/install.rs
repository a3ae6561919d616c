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

/// How the template of the writable disk is made; a change of this text makes a new one. The journal is small because the disk is
/// for one sandbox, and nothing is reserved for root. Inode tables are marked as zeroed here (a fresh sparse file is), so that the guest
/// does not write them in the background and allocate them. Times and identifiers are fixed: the same options give the same bytes.
const UPPER_OPTIONS: &[&str] = &[
    "-q",
    "-F",
    "-t",
    "ext4",
    "-b",
    "4096",
    "-I",
    "256",
    "-m",
    "0",
    "-L",
    "msb-upper",
    "-J",
    "size=8",
    "-U",
    "6d736220-7570-7065-7200-000000000001",
    "-E",
    "lazy_itable_init=0,lazy_journal_init=1,nodiscard,root_owner=0:0,hash_seed=6d736220-7570-7065-7200-000000000002",
];

/// Size of the template; the guest grows the file system to the size the sandbox asked for.
const UPPER_SIZE_MIB: u64 = 512;

fn upper_template() -> Result<PathBuf> {
    debian::ensure(&[debian::BUILD])?;
    let size = format!("{UPPER_SIZE_MIB}M");
    let mut parts: Vec<&[u8]> = UPPER_OPTIONS.iter().map(|option| option.as_bytes()).collect();
    parts.push(size.as_bytes());
    let packed_by = std::fs::read(cache::repository().join("image/src/upper.rs")).unwrap_or_default();
    parts.push(&packed_by);
    let place = cache::entry("upper", &cache::key(parts), |result| {
        let work = tempfile::tempdir()?;
        let disk = work.path().join("upper.ext4");
        let mut make = program::command("mke2fs");
        // mke2fs lives where an ordinary user's path does not look; E2FSPROGS_FAKE_TIME fixes the times it writes.
        make.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
            .env("E2FSPROGS_FAKE_TIME", "1")
            .args(UPPER_OPTIONS)
            .arg(&disk)
            .arg(&size);
        program::output(&mut make)?;
        let packed = result.join("upper.ext4.zst");
        binaries::companion(
            "upper",
            &[
                disk.to_str().context("a temporary path that is not UTF-8")?,
                packed.to_str().context("a cache path that is not UTF-8")?,
            ],
        )
    })?;
    Ok(place.join("upper.ext4.zst"))
}
