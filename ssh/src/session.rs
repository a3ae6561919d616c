//! One session channel, from its first request to its exit status (RFC 4254, section 6).
//!
//! ```text
//!   preparing ── pty-req, env ──► preparing
//!       │ shell, exec
//!       ▼
//!   running ── data, eof, window-change, signal ──► process
//!       │ process ended                         │ client closed
//!       ▼                                       ▼
//!   exit-status | exit-signal, eof, close     output dropped: the process ends
//! ```
//!
//! A running process has three flows that never wait for each other: what the client sends is taken at once, what of it is
//! standard input waits until the process reads it, and what the process says waits for the client.

use std::time::Duration;

use bytes::Bytes;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::state::ProcessEnd;
use russh::server::{Handle, Msg};
use russh::{Channel, ChannelId, ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::sync::mpsc;

use crate::intake::{Held, Slot};
use crate::target::{Command, Control, Input, Output, Process, Target, Terminal};
use crate::{pipe, signal};

/// Names of environment variables a client may set, as a Debian sshd does (`AcceptEnv LANG LC_*`), and the terminal's colours.
const ENV_ACCEPTED: [&str; 2] = ["LANG", "COLORTERM"];
/// Prefix of further ones.
const ENV_ACCEPTED_PREFIX: &str = "LC_";
/// Most variables of one session.
const ENV_COUNT_MAX: usize = 64;
/// Longest name or value, in bytes.
const ENV_LEN_MAX: usize = 4096;
/// Longest command line, in bytes.
const COMMAND_LEN_MAX: usize = 128 << 10;
/// Time to hand an answer over.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Rows of a terminal whose client does not know them.
const ROWS_DEFAULT: u16 = 24;
/// Columns of a terminal whose client does not know them.
const COLUMNS_DEFAULT: u16 = 80;

/// Serves one session channel.
pub(crate) async fn run<T: Target>(channel: Channel<Msg>, handle: Handle, target: &T, slot: &Slot, user: String) {
    let id = channel.id();
    let (mut from_client, to_client) = channel.split();
    let mut command = Command { user, ..Command::default() };
    // The client may vanish at any point; a message to it that fails needs no answer, the next wait ends.
    let process = loop {
        let Some(message) = from_client.wait().await else { return };
        match message {
            ChannelMsg::RequestPty { term, col_width, row_height, .. } => {
                command.terminal = Some(Terminal {
                    term: clean_term(&term),
                    rows: size(row_height, ROWS_DEFAULT),
                    columns: size(col_width, COLUMNS_DEFAULT),
                });
            }
            ChannelMsg::SetEnv { variable_name, variable_value, .. } => {
                take_env(&mut command.env, variable_name, variable_value);
            }
            ChannelMsg::RequestShell { .. } => break start(target, command, &handle, id).await,
            ChannelMsg::Exec { command: line, .. } => {
                let line = (line.len() <= COMMAND_LEN_MAX).then(|| String::from_utf8(line).ok()).flatten();
                match line {
                    Some(line) if !line.contains('\0') => {
                        command.line = Some(line);
                        break start(target, command, &handle, id).await;
                    }
                    _ => {
                        answer(handle.channel_failure(id)).await;
                    }
                }
            }
            ChannelMsg::WindowChange { col_width, row_height, .. } => {
                if let Some(terminal) = &mut command.terminal {
                    (terminal.rows, terminal.columns) =
                        (size(row_height, ROWS_DEFAULT), size(col_width, COLUMNS_DEFAULT));
                }
            }
            ChannelMsg::RequestSubsystem { name, .. } if name == "sftp" => {
                return sftp(target, &command.user, from_client, &to_client, slot, &handle).await;
            }
            ChannelMsg::RequestSubsystem { .. } => {
                answer(handle.channel_failure(id)).await;
            }
            ChannelMsg::Close => return,
            _ => {}
        }
    };
    let Some(process) = process else { return };
    let (queue, queued) = mpsc::unbounded_channel();
    let gives = give(process.output, &to_client, &handle, id);
    let takes = take(&mut from_client, queue, &process.control, slot, &handle, id);
    let feeds = async {
        feed(queued, process.input).await;
        // The end of standard input is not the end of the process.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = gives => {}
        // The client closed the channel: dropping the output ends the process.
        () = takes => {}
        () = feeds => {}
    }
}

/// Gives an answer to the connection's loop. A client that asks more than it hears answers for could make both wait for each other,
/// so an answer that does not get through is given up.
async fn answer(giving: impl Future<Output = Result<(), ()>>) {
    let _ = tokio::time::timeout(ANSWER_LIMIT, giving).await;
}

/// The sftp subsystem: packets straight between the client and a server inside.
async fn sftp<T: Target>(
    target: &T,
    user: &str,
    from_client: ChannelReadHalf,
    to_client: &ChannelWriteHalf<Msg>,
    slot: &Slot,
    handle: &Handle,
) {
    let id = to_client.id();
    match target.sftp(user).await {
        Ok(inside) => {
            answer(handle.channel_success(id)).await;
            // The end of what the server says was told already.
            pipe::run(from_client, to_client, slot, inside).await;
            let _ = handle.exit_status_request(id, 0).await;
        }
        Err(error) => {
            answer(handle.channel_success(id)).await;
            tell_failure(&error, handle, id).await;
            let _ = handle.eof(id).await;
        }
    }
    let _ = handle.close(id).await;
}

/// Starts the process; a failure is told like a shell would: text on standard error and 127, 126 or 1 (255 if msb itself failed).
async fn start<T: Target>(target: &T, command: Command, handle: &Handle, id: ChannelId) -> Option<Process> {
    match target.start(command).await {
        Ok(process) => {
            answer(handle.channel_success(id)).await;
            Some(process)
        }
        Err(error) => {
            answer(handle.channel_success(id)).await;
            tell_failure(&error, handle, id).await;
            let _ = handle.eof(id).await;
            let _ = handle.close(id).await;
            None
        }
    }
}

/// Why nothing runs: words on standard error, and the code a shell would give.
async fn tell_failure(error: &ApiError, handle: &Handle, id: ChannelId) {
    let status = match error.code {
        ErrorCode::ExecNotFound => 127,
        ErrorCode::ExecNotExecutable => 126,
        ErrorCode::ExecFailed | ErrorCode::UserNotFound | ErrorCode::PathNotFound => 1,
        _ => 255,
    };
    let text = format!("msb: {}\r\nhint: {}\r\n", error.message, error.hint);
    let _ = handle.extended_data(id, 1, Bytes::from(text)).await;
    let _ = handle.exit_status_request(id, status).await;
}

/// What waits for standard input; `None` is its end.
type Typed = (Option<Bytes>, Held);

/// What the client sends. Never waits: standard input is queued, and the connection's intake bounds how much. Ends when the client
/// closes the channel or is gone.
async fn take(
    from_client: &mut ChannelReadHalf,
    queue: mpsc::UnboundedSender<Typed>,
    control: &mpsc::Sender<Control>,
    slot: &Slot,
    handle: &Handle,
    id: ChannelId,
) {
    while let Some(message) = from_client.wait().await {
        // A process that ended takes nothing; what still comes is dropped until the client closes. The same goes for signals and
        // sizes that come faster than the sandbox takes them.
        match message {
            ChannelMsg::Data { data } => {
                let held = slot.hold(data.len());
                let _ = queue.send((Some(data), held));
            }
            ChannelMsg::Eof => {
                let _ = queue.send((None, slot.hold(0)));
            }
            ChannelMsg::WindowChange { col_width, row_height, .. } => {
                let (rows, columns) = (size(row_height, ROWS_DEFAULT), size(col_width, COLUMNS_DEFAULT));
                let _ = control.try_send(Control::Resize { rows, columns });
            }
            ChannelMsg::Signal { signal } => {
                if let Some(number) = signal::number(&signal) {
                    let _ = control.try_send(Control::Signal(number));
                }
            }
            ChannelMsg::Close => return,
            ChannelMsg::RequestShell { .. } | ChannelMsg::Exec { .. } | ChannelMsg::RequestSubsystem { .. } => {
                answer(handle.channel_failure(id)).await;
            }
            _ => {}
        }
    }
}

/// Standard input, as fast as the process reads it.
async fn feed(mut queued: mpsc::UnboundedReceiver<Typed>, input: mpsc::Sender<Input>) {
    while let Some((data, held)) = queued.recv().await {
        // A process that reads no more is not told more; dropping what is held lets the client go on.
        let _ = input.send(data.map_or(Input::Eof, Input::Data)).await;
        drop(held);
    }
}

/// What the process says, to the client, within the client's window; at the end how it ended.
async fn give(mut output: mpsc::Receiver<Output>, to_client: &ChannelWriteHalf<Msg>, handle: &Handle, id: ChannelId) {
    loop {
        let sent = match output.recv().await {
            Some(Output::Stdout(data)) => to_client.data_bytes(data).await,
            Some(Output::Stderr(data)) => to_client.extended_data_bytes(1, data).await,
            Some(Output::Ended(end)) => {
                tell_end(end, handle, id).await;
                break;
            }
            Some(Output::Failed(error)) => {
                let _ = to_client.extended_data_bytes(1, Bytes::from(format!("msb: {}\r\n", error.message))).await;
                let _ = handle.exit_status_request(id, 255).await;
                break;
            }
            // The other side went away without a word; no exit status is the truth (the client shows 255).
            None => break,
        };
        if sent.is_err() {
            return;
        }
    }
    let _ = handle.eof(id).await;
    let _ = handle.close(id).await;
}

/// A death by signal is told as one, never as a status that looks like success.
async fn tell_end(end: ProcessEnd, handle: &Handle, id: ChannelId) {
    let _ = match end.signal {
        Some(number) if !end.timed_out => {
            let text = if end.oom_killed { "out of memory".to_owned() } else { String::new() };
            handle.exit_signal_request(id, signal::name(number), end.core_dumped, text, String::new()).await
        }
        _ => handle.exit_status_request(id, u32::from(end.exit_status())).await,
    };
}

/// Whether a client may set this variable.
pub(crate) fn accepts_env(name: &str, value: &str) -> bool {
    let accepted = ENV_ACCEPTED.contains(&name) || name.starts_with(ENV_ACCEPTED_PREFIX);
    let plain = name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
    accepted && plain && name.len() <= ENV_LEN_MAX && value.len() <= ENV_LEN_MAX && !value.contains('\0')
}

/// Takes an accepted variable, unless there are too many already. What is refused is told by the connection.
fn take_env(env: &mut Vec<(String, String)>, name: String, value: String) -> bool {
    let good = accepts_env(&name, &value) && env.len() < ENV_COUNT_MAX;
    if good {
        env.push((name, value));
    }
    good
}

/// A terminal's kind is a file name in terminfo; anything else becomes the plainest one.
fn clean_term(term: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+');
    if !term.is_empty() && term.len() <= 64 && term.bytes().all(plain) && !term.starts_with('.') {
        term.into()
    } else {
        "dumb".into()
    }
}

/// A terminal's side: 1 to 65535; clients send 0 when they do not know.
fn size(characters: u32, default: u16) -> u16 {
    match characters {
        0 => default,
        n => u16::try_from(n).unwrap_or(u16::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_variables_are_taken_and_not_without_end() {
        let mut env = Vec::new();
        for (name, good) in [
            ("LANG", true),
            ("LC_ALL", true),
            ("COLORTERM", true),
            ("LD_PRELOAD", false),
            ("PATH", false),
            ("LC_a b", false),
        ] {
            assert_eq!(take_env(&mut env, name.into(), "x".into()), good, "{name}");
        }
        assert!(!take_env(&mut env, "LANG".into(), "x\0".into()));
        assert!(!take_env(&mut env, "LANG".into(), "x".repeat(ENV_LEN_MAX + 1)));
        let taken = (0..200).filter(|n| take_env(&mut env, format!("LC_{n}"), String::new())).count();
        assert_eq!(taken, ENV_COUNT_MAX - 3);
    }

    #[test]
    fn terminals_of_absurd_kind_and_size_become_plain() {
        assert_eq!(clean_term("xterm-256color"), "xterm-256color");
        for bad in ["", "../../etc/passwd", "a b", "\u{1b}[2J", ".x"] {
            assert_eq!(clean_term(bad), "dumb", "{bad:?}");
        }
        assert_eq!([0, 1, 65_535, 65_536, u32::MAX].map(|n| size(n, ROWS_DEFAULT)), [24, 1, 65_535, 65_535, 65_535]);
    }
}
