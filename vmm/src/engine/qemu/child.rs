//! The moment between our fork and QEMU: `msb-vmm --qemu-child PARENT PROGRAM WORDS…` makes sure that QEMU dies with us, then becomes it.
//!
//! A program of its own, because what must happen between fork and exec may not allocate and would be `unsafe` to write; an exec more
//! costs a millisecond. Called by `main` alone. It also drops what QEMU does not need: core dumps and the wish for new privileges.
//!
//! Its standard input is a socket that ends when QEMU has a root directory of its own: before that the VM process cannot change its own, which
//! would be this one's, too. What comes over it is why there is none.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use rustix::process::getppid;

use crate::jail;

/// The first word that makes `msb-vmm` this program.
pub const CHILD_WORD: &str = "--qemu-child";

/// Time for a process to confine itself.
const TELL_TIMEOUT: Duration = Duration::from_secs(10);
/// Of what it tells, at most.
const TOLD_BYTES: u64 = 512;

/// Our own words for starting `program` with `words`.
pub(super) fn arguments(program: &Path, words: Vec<String>) -> Vec<OsString> {
    let mut all = vec![CHILD_WORD.into(), std::process::id().to_string().into(), program.as_os_str().to_owned()];
    all.extend(words.into_iter().map(OsString::from));
    all
}

/// Becomes QEMU; returns only an error.
pub fn become_qemu(mut words: impl Iterator<Item = OsString>) -> io::Error {
    let usage = || io::Error::new(io::ErrorKind::InvalidInput, "usage: --qemu-child PARENT PROGRAM WORDS...");
    let parent = words.next().and_then(|word| word.to_str().and_then(|text| text.parse::<i32>().ok()));
    let (Some(parent), Some(program)) = (parent, words.next()) else { return usage() };
    jail::namespaces::enter();
    if let Err(error) = confine(parent) {
        return error;
    }
    let words: Vec<OsString> = words.collect();
    // Kernel and initramfs are named by descriptor; Landlock judges the file behind it.
    let files = words.iter().filter(|word| word.as_encoded_bytes().starts_with(b"/proc/self/fd/")).map(PathBuf::from);
    let told = jail::child::confine(Path::new(&program), files.collect())
        .map_err(io::Error::other)
        .and_then(|confinement| tell(confinement.shares_root.as_deref().unwrap_or_default()));
    if let Err(error) = told {
        return error;
    }
    let name = Path::new(&program).file_name().unwrap_or(OsStr::new("qemu")).to_owned();
    Command::new(program).arg0(name).args(words).env_clear().exec()
}

/// Tells the VM process why it may not change its root directory, or nothing, and that QEMU comes now.
fn tell(why: &str) -> io::Result<()> {
    let mut parent = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    parent.write_all(why.as_bytes())?;
    Ok(nix::unistd::dup2_stdin(File::open("/dev/null")?)?)
}

/// The other end: waits until QEMU comes, or will not.
///
/// # Errors
/// Neither happens for [`TELL_TIMEOUT`].
pub(super) fn hear(child: UnixStream) -> io::Result<String> {
    child.set_read_timeout(Some(TELL_TIMEOUT))?;
    let mut why = String::new();
    child.take(TOLD_BYTES).read_to_string(&mut why)?;
    Ok(why)
}

fn confine(parent: i32) -> io::Result<()> {
    // Outlives exec (prctl(2)): the kernel kills QEMU when the thread that started it ends, however it ends.
    prctl::set_pdeathsig(Some(Signal::SIGKILL))?;
    prctl::set_no_new_privs()?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // Had the parent died before the line above, nothing would kill us any more.
    if getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(parent) {
        return Err(io::Error::other("the VM process is gone"));
    }
    Ok(())
}
