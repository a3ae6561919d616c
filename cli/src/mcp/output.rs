//! How much of a command's output an agent gets: its beginning and its end, with the number of bytes left out between them. Used by the
//! tools that run commands. It never keeps more than it gives, however much a command writes.

use std::collections::VecDeque;

use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::state::ProcessEnd;
use msb_sdk::{Session, SessionEvent};
use serde::Serialize;

/// Most of each stream that is kept, in bytes.
pub const KEPT_LEN_MAX: usize = 64 << 10;

/// What came out of a command.
#[derive(Debug, Serialize)]
pub struct CommandOutput {
    exit_code: Option<i32>,
    signal: Option<i32>,
    timed_out: bool,
    out_of_memory: bool,
    stdout: String,
    stderr: String,
    /// Bytes that were written, and not only those that are shown.
    stdout_bytes: u64,
    stderr_bytes: u64,
}

impl CommandOutput {
    fn new(end: &ProcessEnd, stdout: &Kept, stderr: &Kept) -> Self {
        Self {
            exit_code: end.code,
            signal: end.signal,
            timed_out: end.timed_out,
            out_of_memory: end.oom_killed,
            stdout: stdout.text(),
            stderr: stderr.text(),
            stdout_bytes: stdout.len,
            stderr_bytes: stderr.len,
        }
    }
}

/// Writes the input, reads to the end.
///
/// # Errors
/// Those of the session.
pub(super) async fn collect(mut session: Session, input: Option<String>) -> Result<CommandOutput, ApiError> {
    let (mut stdout, mut stderr) = (Kept::default(), Kept::default());
    let stdin = session.take_stdin();
    let write = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input)
            && stdin.write_all(input.as_bytes()).await.is_ok()
        {
            // A command may end without reading its stdin: its end is what counts.
            let _ = stdin.finish().await;
        }
        std::future::pending::<()>().await;
    };
    let read = async {
        while let Some(event) = session.next().await? {
            match event {
                SessionEvent::Stdout(data) => stdout.add(&data),
                SessionEvent::Stderr(data) => stderr.add(&data),
                SessionEvent::Exited(end) => return Ok(CommandOutput::new(&end, &stdout, &stderr)),
                SessionEvent::Started { .. } | SessionEvent::OutputLost { .. } => {}
            }
        }
        Err(ApiError::new(ErrorCode::ExecLost, "the command's stream ended without its end"))
    };
    tokio::select! {
        outcome = read => outcome,
        () = write => Err(ApiError::internal("the writer of a command's stdin ended")),
    }
}

/// The beginning and the end of a stream.
#[derive(Debug, Default)]
struct Kept {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    len: u64,
}

impl Kept {
    fn add(&mut self, data: &[u8]) {
        self.len += data.len() as u64;
        let (now, rest) = data.split_at(data.len().min(KEPT_LEN_MAX / 2 - self.head.len()));
        self.head.extend_from_slice(now);
        let rest = &rest[rest.len().saturating_sub(KEPT_LEN_MAX / 2)..];
        self.tail.extend(rest);
        let surplus = self.tail.len().saturating_sub(KEPT_LEN_MAX / 2);
        self.tail.drain(..surplus);
    }

    /// As text; bytes that are no UTF-8 are replaced.
    fn text(&self) -> String {
        let left_out = self.len - (self.head.len() + self.tail.len()) as u64;
        let mut whole = self.head.clone();
        if left_out > 0 {
            whole.extend_from_slice(format!("\n[{left_out} bytes left out]\n").as_bytes());
        }
        whole.extend(&self.tail);
        String::from_utf8_lossy(&whole).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_fits_is_whole_and_what_does_not_loses_its_middle() {
        let mut kept = Kept::default();
        kept.add(b"one ");
        kept.add(b"two");
        assert_eq!(kept.text(), "one two");
        let mut kept = Kept::default();
        kept.add(&[b'a'; KEPT_LEN_MAX]);
        assert_eq!(kept.text().len(), KEPT_LEN_MAX);
        kept.add(&[b'b'; 10]);
        let text = kept.text();
        assert!(text.contains("\n[10 bytes left out]\n") && text.ends_with("bbbbbbbbbb"));
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_every_byte_is_counted(pieces in prop::collection::vec(0usize..100_000, 0..12)) {
            let mut kept = Kept::default();
            for piece in &pieces {
                kept.add(&vec![b'x'; *piece]);
                prop_assert!(kept.head.len() + kept.tail.len() <= KEPT_LEN_MAX);
            }
            prop_assert_eq!(kept.len, pieces.iter().sum::<usize>() as u64);
            prop_assert!(kept.text().len() <= KEPT_LEN_MAX + 64);
        }
    }
}
