//! `cargo xtask install --prefix P`: the tree that `msb` runs from.
//!
//! ```text
//! P/bin/{msb,msbd,msb-vmm,msb-metrics}
//! P/share/msb/{vmlinux,System.map,initramfs.cpio,upper.ext4.zst}
//! P/share/man/man1/msb*.1 and completions for bash, zsh and fish (with --prefix only)
//! P/lib/systemd/{user,system}/… and P/lib/sysusers.d/msb.conf (with --prefix only; `units`)
//! P/share/msb/installed.txt, the manifest that `msb self uninstall` goes by (with --prefix only): the files, and with a slash at
//!     the end the folders that were not there before
//! ```
//!
//! Each file is replaced by a rename, so a running daemon keeps what it has opened. Without `--prefix` the tree is the development
//! tree `target/msb`, where the demo and the tests find it.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{binaries, cache, debian, initramfs, kernel, program, units};

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
    if arguments.prefix.is_some() {
        // A tree of its own first: what is in it is what the manifest names.
        let work = tempfile::tempdir()?;
        let tree = work.path().join("tree");
        lay_out(&tree, &prefix, arguments.build)?;
        let names = files_below(&tree)?;
        let mut manifest = std::fs::OpenOptions::new().append(true).open(tree.join(MANIFEST))?;
        for folder in made_folders(&names, &prefix) {
            writeln!(manifest, "{folder}/")?;
        }
        for name in names {
            let from = tree.join(&name);
            let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&from)?.permissions()) & 0o777;
            cache::place_file(&from, &prefix.join(&name), mode)?;
        }
        hints(&prefix);
    } else {
        install(&prefix, arguments.build)?;
    }
    println!("installed under {}; the command is {}", prefix.display(), prefix.join("bin/msb").display());
    Ok(())
}

/// The manifest below the prefix.
pub(crate) const MANIFEST: &str = "share/msb/installed.txt";

/// Everything that is shipped, in a fresh tree, with units for programs that run from `prefix`.
pub(crate) fn lay_out(tree: &Path, prefix: &Path, build: binaries::Arguments) -> Result<()> {
    install(tree, build)?;
    binaries::companion("reference", &["--manuals", tree.to_str().context("a path that is not UTF-8")?])?;
    for (path, text) in units::files(prefix) {
        let place = tree.join(path);
        std::fs::create_dir_all(place.parent().context("a unit has a folder")?)?;
        std::fs::write(&place, text).with_context(|| format!("cannot write {}", place.display()))?;
    }
    let mut names = files_below(tree)?;
    names.push(MANIFEST.to_owned());
    names.sort();
    let manifest = tree.join(MANIFEST);
    std::fs::write(&manifest, names.join("\n") + "\n").with_context(|| format!("cannot write {}", manifest.display()))
}

/// Every file of a tree, relative to it, in order.
fn files_below(tree: &Path) -> Result<Vec<String>> {
    let (mut folders, mut names) = (vec![tree.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                names.push(entry.path().strip_prefix(tree)?.to_str().context("a name that is not UTF-8")?.to_owned());
            }
        }
    }
    names.sort();
    Ok(names)
}

/// The folders that this installation makes below the prefix, and those that an earlier one made.
fn made_folders(names: &[String], prefix: &Path) -> BTreeSet<String> {
    let earlier = std::fs::read_to_string(prefix.join(MANIFEST)).unwrap_or_default();
    let mut folders: BTreeSet<String> =
        earlier.lines().filter_map(|line| line.strip_suffix('/')).map(str::to_owned).collect();
    let needed = names.iter().flat_map(|name| Path::new(name).ancestors().skip(1)).filter_map(Path::to_str);
    folders.extend(needed.filter(|folder| !folder.is_empty() && !prefix.join(folder).is_dir()).map(str::to_owned));
    folders
}

/// What the host still has to be told, if systemd runs it.
fn hints(prefix: &Path) {
    if !Path::new("/run/systemd/system").is_dir() {
        return;
    }
    if prefix != Path::new("/usr") && prefix != Path::new("/usr/local") {
        println!("systemd looks for units under /usr and /usr/local only: link {}/lib/systemd", prefix.display());
    }
    println!("to have the socket held by systemd: systemctl --user enable --now msbd.socket");
    let user = std::env::var("USER").unwrap_or_default();
    if !user.is_empty() && user != "root" && !Path::new("/var/lib/systemd/linger").join(&user).exists() {
        println!("sandboxes end with your last session until you run: loginctl enable-linger {user}");
    }
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
    cache::place_file(&upper_template(&programs)?, &share.join("upper.ext4.zst"), 0o644)
}

/// The packed template of the writable disk, made anew when the code that says how changes.
fn upper_template(programs: &binaries::Binaries) -> Result<PathBuf> {
    debian::ensure(&[debian::BUILD])?;
    let recipe =
        std::fs::read(cache::repository().join("image/src/upper.rs")).context("cannot read image/src/upper.rs")?;
    let place = cache::entry("upper", &cache::key([recipe.as_slice()]), |result| {
        let packed = result.join("upper.ext4.zst");
        program::run(program::command(programs.upper_template()).arg(packed))
    })?;
    Ok(place.join("upper.ext4.zst"))
}
