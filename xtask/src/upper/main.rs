//! `xtask-upper PACKED`: makes the template of the writable disk and packs it, with the arguments and the code of the crate that will
//! unpack it for each sandbox. Called by `cargo xtask install`.
#![expect(clippy::print_stderr, reason = "a command line tool for developers; it talks on its streams")]

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use msb_image::{MKE2FS_ARGUMENTS, TEMPLATE_BYTES, pack_template};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [packed] = words.as_slice() else {
        eprintln!("usage: xtask-upper PACKED");
        return ExitCode::from(2);
    };
    match make(Path::new(packed)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn make(packed: &Path) -> Result<()> {
    let raw = tempfile::NamedTempFile::new()?;
    File::options().write(true).open(raw.path())?.set_len(TEMPLATE_BYTES)?;
    let output = Command::new("mke2fs")
        // mke2fs lives where an ordinary user's path does not look; a fixed time gives the same bytes every time.
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .env("E2FSPROGS_FAKE_TIME", "1704067200")
        .args(MKE2FS_ARGUMENTS)
        .arg(raw.path())
        .output()
        .context("cannot start mke2fs (package e2fsprogs)")?;
    ensure!(
        output.status.success(),
        "mke2fs ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    pack_template(raw.path(), packed)?;
    Ok(())
}
