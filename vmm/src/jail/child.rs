//! The confinement of a child program (QEMU): Landlock and no_new_privs between fork and exec, so that not one of its instructions runs
//! outside.
//!
//! Used by `engine/qemu` when it builds its command. System calls are QEMU's own affair (`-sandbox on,…`), which knows them.
#![expect(unsafe_code, reason = "runs two system calls between fork and exec")]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::files::{FilePlan, Ruleset};
use super::JailError;

/// System call number of `landlock_restrict_self`, the same on all architectures.
const LANDLOCK_RESTRICT_SELF: libc::c_long = 446;

/// A prepared confinement.
pub struct Confinement {
    ruleset: Option<OwnedFd>,
    abi: Option<i32>,
}

impl Confinement {
    /// Prepares the rules of `plan`.
    pub fn new(plan: &FilePlan) -> Result<Self, JailError> {
        let (ruleset, abi) = Ruleset::build(plan, false)?;
        Ok(Self { ruleset: ruleset.into_descriptor(), abi })
    }

    /// The Landlock ABI that enforces it; none on hosts without.
    pub fn landlock_abi(&self) -> Option<i32> {
        self.abi
    }

    /// Makes `command` enter it before its program starts.
    pub fn apply_to(self, command: &mut Command) {
        let enter = move || {
            // SAFETY: both calls take numbers only, allocate nothing and touch no lock: allowed between fork and exec. The
            // descriptor is owned by this closure, which lives until after the spawn.
            let result = unsafe {
                if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
                    -1
                } else if let Some(ruleset) = &self.ruleset {
                    libc::syscall(LANDLOCK_RESTRICT_SELF, ruleset.as_raw_fd(), 0)
                } else {
                    0
                }
            };
            if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        };
        // SAFETY: see above.
        unsafe { command.pre_exec(enter) };
    }
}
