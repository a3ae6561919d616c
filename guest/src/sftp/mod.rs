//! The SFTP server: version 3 on standard input and output, as the user this process already is and in the root it already has.
//! Started by `session::sftp`, ends with its input. What the kernel allows the user is allowed, nothing else is decided here.
//!
//! ```text
//!  input ──► packets ──► Server::handle ──► answers ──► output        answers are written when no whole packet waits
//! ```
//!
//! Beside the draft: `posix-rename`, `hardlink`, `fsync`, `statvfs`, `fstatvfs`, `lsetstat` and `limits` of OpenSSH, which sftp,
//! scp and sshfs use.

mod files;
pub mod wire;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;

use files::Server;
use wire::PACKET_LEN_MAX;

/// The argument by which the agent starts this program as an SFTP server.
pub const ARGUMENT: &str = "sftp";
/// The same as execve(2) takes it.
pub const ARGUMENT_C: &std::ffi::CStr = c"sftp";
/// Bytes of answers that are held while more requests wait.
const ANSWERS_LEN_MAX: usize = 512 << 10;
/// Bytes of one read.
const READ_LEN: usize = 256 << 10;

/// Serves standard input and output to its end.
#[must_use]
pub fn run() -> ExitCode {
    let own = |end: BorrowedFd<'_>| {
        // The host's side of the stream was made non-blocking for the agent; here waiting is right.
        rustix::io::ioctl_fionbio(end, false)?;
        rustix::io::fcntl_dupfd_cloexec(end, 3).map(std::fs::File::from)
    };
    // Without descriptors there is no stream to say anything on.
    let (Ok(input), Ok(output)) = (own(std::io::stdin().as_fd()), own(std::io::stdout().as_fd())) else {
        return ExitCode::FAILURE;
    };
    match serve(input, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Serves a stream to its end.
///
/// # Errors
/// The stream breaks, or carries what is no packet.
pub fn serve(mut input: impl Read, mut output: impl Write) -> std::io::Result<()> {
    let mut server = Server::default();
    let (mut waiting, mut start) = (Vec::with_capacity(READ_LEN), 0);
    let mut answers = Vec::new();
    let mut scratch = vec![0; READ_LEN];
    loop {
        let rest = &waiting[start..];
        let whole = match rest.first_chunk::<4>() {
            Some(prefix) => {
                let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
                if len == 0 || len > PACKET_LEN_MAX {
                    return Err(std::io::ErrorKind::InvalidData.into());
                }
                rest.get(4..4 + len)
            }
            None => None,
        };
        if let Some(packet) = whole {
            server.handle(packet, &mut answers);
            start += 4 + packet.len();
            if answers.len() < ANSWERS_LEN_MAX {
                continue;
            }
        }
        if !answers.is_empty() {
            output.write_all(&answers)?;
            answers.clear();
            if answers.capacity() > 2 * ANSWERS_LEN_MAX {
                answers = Vec::new();
            }
            continue;
        }
        waiting.drain(..start);
        start = 0;
        match input.read(&mut scratch) {
            Ok(0) => return Ok(()),
            Ok(len) => waiting.extend_from_slice(&scratch[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests;
