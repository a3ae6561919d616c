//! `cargo xtask build`: compiles the programs, each under the profile its failure model asks for.
//!
//! `msb`, `msbd` and `msb-metrics` unwind (a panic is one actor's death) and link dynamically. `msb-vmm` and `msb-agent` abort (a
//! panic is one VM's death) and are static, so that the jail needs to open no library and the guest needs none. The two kinds are
//! two calls of cargo, because a profile's panic setting holds for a whole call.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::{cache, debian, program};

/// What the static programs are compiled for.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What links them statically.
pub(crate) const STATIC_FLAGS: &str = "-C target-feature=+crt-static";

/// Package and binary of the programs that run as services and commands.
pub(crate) const HOST: &[(&str, &str)] =
    &[("msb-cli", "msb"), ("msb-supervisor", "msbd"), ("msb-metrics-exporter", "msb-metrics")];

/// Package and binary of the static ones.
pub(crate) const STATIC: &[(&str, &str)] = &[("msb-vmm", "msb-vmm"), ("msb-guest", "msb-agent")];

/// What makes the template of the writable disk. Compiled in one call with the programs, so that no library is compiled for it alone.
const UPPER_TEMPLATE: (&str, &str) = ("msb-image", "msb-upper-template");

// No group of its own: it is part of other commands' arguments, which have the same name.
#[derive(clap::Args, Clone, Copy, Default)]
#[group(skip)]
pub(crate) struct Arguments {
    /// Compile with the development profile: faster to build, slower to run, never for measuring
    #[arg(long)]
    pub(crate) fast: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    for (name, path) in build(*arguments)?.named() {
        println!("{name:<12} {}", path.display());
    }
    Ok(())
}

/// Where the compiled programs are.
pub(crate) struct Binaries {
    host: PathBuf,
    linked_statically: PathBuf,
}

impl Binaries {
    /// Every program with its path.
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, PathBuf)> + '_ {
        let host = HOST.iter().map(|(_, name)| (*name, self.host.join(name)));
        host.chain(STATIC.iter().map(|(_, name)| (*name, self.linked_statically.join(name))))
    }

    /// The program that makes the template of the writable disk.
    pub(crate) fn upper_template(&self) -> PathBuf {
        self.host.join(UPPER_TEMPLATE.1)
    }
}

/// Compiles all programs; cargo decides what is up to date.
pub(crate) fn build(arguments: Arguments) -> Result<Binaries> {
    debian::ensure(&[debian::BUILD])?;
    let (host_profile, static_profile) = if arguments.fast { ("dev", "dev") } else { ("release", "vm") };

    let mut host = cargo();
    host.args(["build", "--locked", "--profile", host_profile]);
    name_all(&mut host, HOST);
    name_all(&mut host, &[UPPER_TEMPLATE]);
    program::run(&mut host)?;

    let mut linked_statically = cargo();
    linked_statically
        .args(["build", "--locked", "--profile", static_profile, "--target", TARGET])
        .env("RUSTFLAGS", STATIC_FLAGS);
    name_all(&mut linked_statically, STATIC);
    program::run(&mut linked_statically)?;

    let folder = |profile: &'static str| if profile == "dev" { "debug" } else { profile };
    Ok(Binaries {
        host: cache::target().join(folder(host_profile)),
        linked_statically: cache::target().join(TARGET).join(folder(static_profile)),
    })
}

/// The features of this package that the programs linking the product need. Checks and tests have them all, so that none of them breaks unseen.
pub(crate) const COMPANION_FEATURES: &str = "xtask/reference,xtask/machine";

/// Runs `xtask-<name>`, a program of this package that links a part of the product, with these words.
///
/// It is built with the features of the whole workspace, as the unit tests are, so that no library is compiled twice.
pub(crate) fn companion(name: &str, words: &[&str]) -> Result<()> {
    let program = format!("xtask-{name}");
    program::run(cargo().args([
        "build",
        "--quiet",
        "--locked",
        "--workspace",
        "--features",
        COMPANION_FEATURES,
        "--bin",
        &program,
    ]))?;
    program::run(program::command(cache::target().join("debug").join(program)).args(words))
}

/// The cargo that runs us, with its own settings for this very package removed.
pub(crate) fn cargo() -> Command {
    let mut command = program::command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("CARGO_PKG_")
            || name.starts_with("CARGO_MANIFEST_")
            || name == "CARGO_BIN_NAME"
            || name == "CARGO_CRATE_NAME"
        {
            command.env_remove(name);
        }
    }
    command
}

fn name_all(command: &mut Command, programs: &[(&str, &str)]) {
    for (package, name) in programs {
        command.args(["--package", package, "--bin", name]);
    }
}
