//! The program `msb`. Everything is in the library, so that `xtask` can write the documentation from the same types.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    msb_cli::main()
}
