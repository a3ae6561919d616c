//! Attributes of the whole process: no core dumps, nothing inherited, no privileges to gain.

use std::os::fd::RawFd;

use nix::sys::resource::{Resource, setrlimit};

use super::JailError;

/// Descriptors that there is room for at once. A restored machine with a network passes 64 before its guest runs.
const DESCRIPTORS: RawFd = 512;

/// Closes every descriptor above standard error that is not in `keep`. For the first lines of `main`: a daemon with a leak must not pass
/// it on to what a guest may take over.
pub fn close_inherited(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).filter(|&fd| fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3u32;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1);
        }
        first = first.max(fd.saturating_add(1));
    }
    close_range(first, u32::MAX);
}

/// Makes room for descriptors while there is one thread. Later the kernel would wait for an RCU grace period (6.5 ms in the exact lab) when the
/// table of a process with threads grows beyond 64.
pub fn make_room_for_descriptors() {
    // Without it the wait comes later, and nothing else happens.
    drop(rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), DESCRIPTORS - 1));
}

#[expect(unsafe_code, reason = "close_range has no wrapper that takes a range")]
fn close_range(first: u32, last: u32) {
    // SAFETY: called before the process owns any descriptor in the range: nothing that Rust believes open is closed. The call cannot
    // fail but on kernels before 5.9, where what was inherited stays open.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// No core files, and no attaching by others of the same user: a dump would contain guest memory.
pub(super) fn forbid_core_dumps() -> Result<(), JailError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
        .map_err(|error| JailError::Process { what: "core limit", source: error.into() })?;
    nix::sys::prctl::set_dumpable(false)
        .map_err(|error| JailError::Process { what: "dumpable flag", source: error.into() })
}

/// Set-user-id programs and file capabilities mean nothing from here on.
pub(super) fn forbid_new_privileges() -> Result<(), JailError> {
    nix::sys::prctl::set_no_new_privs()
        .map_err(|error| JailError::Process { what: "no_new_privs", source: error.into() })
}
