//! `msb-upper-template PACKED`: makes the template of the writable disk and packs it, with the arguments and the code of the crate that will
//! unpack it for each sandbox. Called by `cargo xtask install`; it is not installed itself.
#![expect(clippy::print_stderr, reason = "a command line tool for developers; it talks on its streams")]

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitCode};

use msb_image::{MKE2FS_ARGUMENTS, TEMPLATE_BYTES, pack_template};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [packed] = words.as_slice() else {
        eprintln!("usage: msb-upper-template PACKED");
        return ExitCode::from(2);
    };
    match make(Path::new(packed)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn make(packed: &Path) -> Result<(), Box<dyn Error>> {
    let raw = tempfile::NamedTempFile::new()?;
    File::options().write(true).open(raw.path())?.set_len(TEMPLATE_BYTES)?;
    let output = Command::new("mke2fs")
        // mke2fs lives where an ordinary user's path does not look; a fixed time gives the same bytes every time.
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .env("E2FSPROGS_FAKE_TIME", "1704067200")
        .args(MKE2FS_ARGUMENTS)
        .arg(raw.path())
        .output()
        .map_err(|error| format!("cannot start mke2fs (package e2fsprogs): {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("mke2fs ended with {}: {}", output.status, said.trim()).into());
    }
    pack_template(raw.path(), packed)?;
    Ok(())
}
