//! `xtask-upper DISK PACKED`: packs a freshly made writable disk with the very code that will unpack it for each sandbox. Called by
//! `cargo xtask install`.
#![expect(clippy::print_stderr, reason = "a command line tool for developers; it talks on its streams")]

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [disk, packed] = words.as_slice() else {
        eprintln!("usage: xtask-upper DISK PACKED");
        return ExitCode::from(2);
    };
    match pack(Path::new(disk), Path::new(packed)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn pack(disk: &Path, packed: &Path) -> anyhow::Result<()> {
    anyhow::bail!("cannot pack {} to {}", disk.display(), packed.display())
}
