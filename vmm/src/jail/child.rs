//! The confinement of QEMU: namespaces and Landlock around its program, its libraries and the two files it loads, entered by the process that is
//! about to become it, so that not one of its instructions runs outside.
//!
//! Called by `engine/qemu/child` between the start of that process and the exec. QEMU's system calls are its own affair
//! (`-sandbox on,…`), which knows them; what is here is what it may open by path, and that it may not use TCP.

use std::path::{Path, PathBuf};

use rustix::thread::CapabilitySet;

use super::files::{FilePlan, Ruleset};
use super::{JailError, JailReport, namespaces};

/// Where programs and their libraries live.
const PROGRAMS: [&str; 5] = ["/usr", "/bin", "/lib", "/lib64", "/nix/store"];
/// What a C library and QEMU read on their way to `main`.
const START_UP: [&str; 8] = [
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/alternatives",
    "/dev/urandom",
    "/dev/null",
    "/proc/self",
    "/proc/cpuinfo",
    "/sys/devices/system",
];

/// How far the host let a child be confined.
#[derive(Debug)]
pub struct Confinement {
    /// The Landlock ABI that enforces it; none on a host without.
    pub landlock: Option<i32>,
    /// Why it has no root of its own, if it has none.
    pub shares_root: Option<String>,
}

/// Confines the calling process, which has one thread and has entered its namespaces, for `program` and these files.
pub fn confine(program: &Path, files: Vec<PathBuf>) -> Result<Confinement, JailError> {
    let mut read: Vec<PathBuf> = START_UP.iter().map(PathBuf::from).collect();
    read.extend(files);
    let mut execute: Vec<PathBuf> = PROGRAMS.iter().map(PathBuf::from).collect();
    // One that was built by hand lies elsewhere, with its firmware beside it.
    execute.extend(program.parent().map(Path::to_path_buf));
    let plan = FilePlan { read, execute, ..FilePlan::default() };
    let (ruleset, landlock) = Ruleset::build(&plan, false)?;
    let mut report = JailReport::default();
    namespaces::hide(&plan, &mut report)?;
    namespaces::drop_capabilities(CapabilitySet::empty())
        .map_err(|source| JailError::Process { what: "capabilities", source })?;
    ruleset.restrict_thread()?;
    Ok(Confinement { landlock, shares_root: report.missing.pop() })
}
