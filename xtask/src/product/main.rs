//! `xtask-product`: the chores that need the product's own types. Called by `xtask`, never by people.
//!
//! `docs` writes the generated references, `pack-upper` packs the writable disk's template with the code that will unpack it.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command line tool for developers; it talks on its streams"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "xtask-product")]
enum Chore {
    /// Pack a freshly made writable disk
    PackUpper {
        /// What mke2fs made
        disk: PathBuf,
        /// Where the packed template goes
        packed: PathBuf,
    },
}

fn main() -> ExitCode {
    let result: anyhow::Result<()> = match Chore::parse() {
        Chore::PackUpper { disk, packed } => {
            println!("{} {}", disk.display(), packed.display());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
