//! `cargo xtask docs`: the references that are generated from the program's own types, so that they cannot drift from it.
//!
//! The work is done by `xtask-reference`, which links those types. `--check` compares and changes nothing.

use anyhow::Result;

use crate::binaries;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only say which files are out of date; fails when one is
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.check { check() } else { binaries::companion("reference", &[]) }
}

/// Fails when a generated file differs from what would be generated now.
pub(crate) fn check() -> Result<()> {
    binaries::companion("reference", &["--check"])
}
