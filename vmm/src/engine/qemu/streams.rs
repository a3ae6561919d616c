//! QEMU's two outgoing streams: the guest's serial console and QEMU's own complaints. Both bounded: a guest can cause either.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::process::ChildStderr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::ConsoleSink;
use crate::jail::{self, ThreadClass};
use crate::logs::console::clean;
use crate::logs::limit::RateLimit;

/// Console bytes per read.
const CONSOLE_BYTES: usize = 4096;
/// Longest line of QEMU that is kept, in bytes.
const LINE_BYTES_MAX: u64 = 1024;
/// Complaints kept for the error message: the last ones.
const LINES_KEPT: usize = 4;
const STACK_BYTES: usize = 128 * 1024;

/// Copies the console until QEMU ends. QEMU waits for a reader that is slow, and so does the guest.
pub(super) fn copy_console(mut socket: UnixStream, mut console: ConsoleSink) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("console".into()).stack_size(STACK_BYTES).spawn(move || {
        let mut buffer = [0u8; CONSOLE_BYTES];
        loop {
            match socket.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    jail::enter_or_abort(ThreadClass::Service);
                    let _ = console.write_all(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// What QEMU says on standard error.
pub(super) struct Complaints(Option<JoinHandle<Vec<String>>>);

impl Complaints {
    /// Logs lines, a few per second, and keeps the last ones.
    pub(super) fn collect(stderr: ChildStderr) -> io::Result<Self> {
        let thread =
            std::thread::Builder::new().name("qemu-stderr".into()).stack_size(STACK_BYTES).spawn(move || {
                let mut lines: Vec<String> = Vec::new();
                let mut limit = RateLimit::new(20, Duration::from_secs(10));
                let mut reader = BufReader::with_capacity(2048, stderr);
                loop {
                    let mut line = Vec::new();
                    match reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                        Ok(0) | Err(_) => return lines,
                        Ok(_) => {
                            jail::enter_or_abort(ThreadClass::Device);
                            let text = clean(&line).trim().to_owned();
                            if text.is_empty() {
                                continue;
                            }
                            if let Some(suppressed) = limit.allow(Instant::now()) {
                                tracing::warn!(suppressed, "qemu: {text}");
                            }
                            if lines.len() == LINES_KEPT {
                                lines.remove(0);
                            }
                            lines.push(text);
                        }
                    }
                }
            })?;
        Ok(Self(Some(thread)))
    }

    /// Nothing to read.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// The last lines, once QEMU has ended.
    pub(super) fn finish(self) -> String {
        self.0.and_then(|thread| thread.join().ok()).unwrap_or_default().join("; ")
    }
}
