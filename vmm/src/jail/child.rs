//! The confinement of QEMU: Landlock around its program, its libraries and the two files it loads, entered by the process that is about
//! to become it, so that not one of its instructions runs outside.
//!
//! Called by `engine/qemu/child` between the start of that process and the exec. QEMU's system calls are its own affair
//! (`-sandbox on,…`), which knows them; what is here is what it may open by path, and that it may not use TCP.

use std::path::{Path, PathBuf};

use super::JailError;
use super::files::{FilePlan, Ruleset};

/// Where programs and their libraries live.
const PROGRAMS: [&str; 5] = ["/usr", "/bin", "/lib", "/lib64", "/nix/store"];
/// What a C library and QEMU read on their way to `main`.
const START_UP: [&str; 7] = [
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/dev/urandom",
    "/dev/null",
    "/proc/self",
    "/proc/cpuinfo",
    "/sys/devices/system",
];

/// Confines the calling process, which has one thread, for `program` and these files. Tells the Landlock ABI that enforces it; none on a
/// host without, where nothing happens.
pub fn confine(program: &Path, files: Vec<PathBuf>) -> Result<Option<i32>, JailError> {
    let mut read: Vec<PathBuf> = START_UP.iter().map(PathBuf::from).collect();
    read.extend(files);
    let mut execute: Vec<PathBuf> = PROGRAMS.iter().map(PathBuf::from).collect();
    // One that was built by hand lies elsewhere, with its firmware beside it.
    execute.extend(program.parent().map(Path::to_path_buf));
    let (ruleset, abi) = Ruleset::build(&FilePlan { read, execute, ..FilePlan::default() }, false)?;
    ruleset.restrict_thread()?;
    Ok(abi)
}
