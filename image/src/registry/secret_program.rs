//! Runs the small programs that keep secrets for others: docker's credential helpers and `secret-tool`.
//!
//! A secret goes in and out through pipes, never through arguments or variables. A program that hangs is ended.

use std::io::{ErrorKind, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Time for one answer: a helper may have to ask its user to unlock something.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Most that is read of an answer, in bytes.
const ANSWER_BYTES: u64 = 64 << 10;
/// Time between two looks whether it has ended.
const LOOK: Duration = Duration::from_millis(5);

/// Why there is no answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HelperError {
    /// There is no such program.
    Missing,
    /// It failed; what it said may hold a secret and is not kept.
    Failed(String),
}

/// What the program answers to `input`.
pub(super) fn ask(program: &str, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>, HelperError> {
    let failed = |what: &str| HelperError::Failed(format!("{program} {what}"));
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => HelperError::Missing,
            _ => failed(&format!("cannot be run: {error}")),
        })?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // One that does not read has its reasons; its exit status tells.
                let _ = stdin.write_all(input);
            }
        });
        let answer = scope.spawn(move || {
            let mut bytes = Vec::new();
            let read = stdout.map(|stdout| stdout.take(ANSWER_BYTES).read_to_end(&mut bytes));
            read.and_then(Result::ok).map(|_| bytes)
        });
        let begun = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) if begun.elapsed() > TIMEOUT => {
                    // Killed and reaped, so that the threads above see the pipes close.
                    let _ = child.kill();
                    let _ = child.wait();
                    break Err(failed("did not answer in time"));
                }
                Ok(None) => std::thread::sleep(LOOK),
                Err(error) => break Err(failed(&format!("is lost: {error}"))),
            }
        }?;
        let answer = answer.join().ok().flatten().ok_or_else(|| failed("gave no answer"))?;
        if status.success() { Ok(answer) } else { Err(failed("has nothing, or failed")) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_back_and_failures_are_told_apart() {
        assert_eq!(ask("cat", &[], b"secret"), Ok(b"secret".to_vec()));
        assert_eq!(ask("no-such-helper-of-msb", &[], b""), Err(HelperError::Missing));
        let error = ask("sh", &["-c", "cat; exit 3"], b"secret").unwrap_err();
        assert!(!format!("{error:?}").contains("secret"));
        // One that writes without end is cut off, and one that does not read its input is no deadlock.
        assert!(ask("sh", &["-c", "head -c 1000000 /dev/zero"], &vec![0; 1 << 20]).is_err());
    }
}
