//! A running command seen from the client: its output, its stdin within the service's credit, its signals.
//!
//! ```text
//!            signal, resize, stdin_eof            ┌────────────────┐   Session::next ──► events
//!  caller ── stdin, within the Window ──────────► │ agent's stream │ ◄─ started, stdin_credit, exited, error
//!            (SessionControl, SessionStdin)       │ or a WebSocket │ ◄─ output
//!                                                 └────────────────┘
//! ```
//!
//! The agent's own stream ([`crate::direct`]) where the service hands it over; else a WebSocket of the service, on which text messages are
//! JSON and binary ones bytes. Both say the same.
//!
//! Credit keeps stdin from filling the pipe, so a signal is never stuck behind it. A caller that stops reading stops the command's
//! output (back-pressure), nothing grows. Dropping the session ends the connection, and with it an exec, never the main workload.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use msb_protocol::control::{ClientMessage, STDERR_TAG, STDOUT_TAG, ServerMessage, TerminalSize};
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::frame::DATA_LEN_MAX;
use msb_protocol::guest::{GuestBody, OutputStream, STDIN_WINDOW};
use msb_protocol::state::ProcessEnd;
use tokio::sync::Mutex;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

use crate::connection::Socket;
use crate::direct::{DirectReader, DirectWriter, Incoming};
use crate::error::Error;
use crate::exec::ExecOutput;
use crate::window::Window;

/// Something that happened to a running command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    /// The process exists.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Standard output; with a terminal, all output.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// This watcher was too slow and missed output.
    OutputLost {
        /// Bytes missed.
        bytes: u64,
    },
    /// It ended; nothing follows.
    Exited(ProcessEnd),
}

/// Where a session hears from.
enum Reader {
    WebSocket(SplitStream<Socket>),
    Direct(DirectReader),
}

/// Where a session speaks to.
enum Writer {
    WebSocket(SplitSink<Socket, Message>),
    Direct(DirectWriter),
}

/// A running command.
pub struct Session {
    reader: Reader,
    control: SessionControl,
    window: Arc<Window>,
    stdin: Option<SessionStdin>,
    over: bool,
}

impl Session {
    /// Opens a session on a fresh socket: `first` is its first message, `stdin` whether that forwards stdin.
    pub(crate) async fn open(socket: Socket, first: &ClientMessage, stdin: bool) -> Result<Self, Error> {
        let (sink, reader) = socket.split();
        let session = Self::over(Reader::WebSocket(reader), Writer::WebSocket(sink), stdin);
        session.control.send(first).await?;
        Ok(session)
    }

    /// A session on a stream that was opened already.
    pub(crate) fn direct(reader: DirectReader, writer: DirectWriter, stdin: bool) -> Self {
        Self::over(Reader::Direct(reader), Writer::Direct(writer), stdin)
    }

    fn over(reader: Reader, writer: Writer, stdin: bool) -> Self {
        let control = SessionControl { writer: Arc::new(Mutex::new(writer)) };
        let window = Arc::new(Window::new(u64::from(STDIN_WINDOW)));
        let stdin = stdin.then(|| SessionStdin { control: control.clone(), window: Arc::clone(&window) });
        Self { reader, control, window, stdin, over: false }
    }

    /// What happens next; `None` after the end. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The service's error, after which nothing follows; `exec_lost` if the connection ends before the command does.
    pub async fn next(&mut self) -> Result<Option<SessionEvent>, Error> {
        while !self.over {
            let event = match &mut self.reader {
                Reader::WebSocket(reader) => match reader.next().await {
                    Some(Ok(message)) => self.take(message)?,
                    Some(Err(error)) => return Err(self.lost(&reason(&error))),
                    None => return Err(self.lost("the service closed it")),
                },
                Reader::Direct(reader) => match reader.next().await {
                    Ok(Incoming::Output(OutputStream::Stdout, data)) => Some(SessionEvent::Stdout(data)),
                    Ok(Incoming::Output(OutputStream::Stderr, data)) => Some(SessionEvent::Stderr(data)),
                    Ok(Incoming::Message(message)) => self.take_guest(message)?,
                    Err(why) => return Err(self.lost(&why)),
                },
            };
            if event.is_some() {
                return Ok(event);
            }
        }
        Ok(None)
    }

    fn take_guest(&mut self, message: GuestBody) -> Result<Option<SessionEvent>, Error> {
        match message {
            GuestBody::Started(begun) => Ok(Some(SessionEvent::Started { pid: begun.pid })),
            GuestBody::StdinCredit(credit) => {
                self.window.add(u64::from(credit.bytes));
                Ok(None)
            }
            GuestBody::Output(output) if output.stream == i32::from(OutputStream::Stderr) => {
                Ok(Some(SessionEvent::Stderr(output.data.into())))
            }
            GuestBody::Output(output) => Ok(Some(SessionEvent::Stdout(output.data.into()))),
            GuestBody::OutputLost(lost) => Ok(Some(SessionEvent::OutputLost { bytes: lost.bytes })),
            GuestBody::Exited(end) => {
                self.end();
                Ok(Some(SessionEvent::Exited(end.into())))
            }
            GuestBody::Refused(failure) => Err(self.ended_by(Error::Api(failure.into()))),
            // What a later agent says beyond that is not for this client.
            _ => Ok(None),
        }
    }

    fn take(&mut self, message: Message) -> Result<Option<SessionEvent>, Error> {
        match message {
            Message::Binary(data) => match data.first() {
                Some(&STDOUT_TAG) => Ok(Some(SessionEvent::Stdout(data.slice(1..)))),
                Some(&STDERR_TAG) => Ok(Some(SessionEvent::Stderr(data.slice(1..)))),
                _ => Err(self.ended_by(Error::protocol("output of an unknown kind"))),
            },
            Message::Text(text) => match serde_json::from_str::<ServerMessage>(text.as_str()) {
                Ok(ServerMessage::Started { pid }) => Ok(Some(SessionEvent::Started { pid })),
                Ok(ServerMessage::StdinCredit { bytes }) => {
                    self.window.add(u64::from(bytes));
                    Ok(None)
                }
                Ok(ServerMessage::OutputLost { bytes }) => Ok(Some(SessionEvent::OutputLost { bytes })),
                Ok(ServerMessage::Exited { end }) => {
                    self.end();
                    Ok(Some(SessionEvent::Exited(end)))
                }
                Ok(ServerMessage::Error { error }) => Err(self.ended_by(Error::Api(error))),
                Err(error) => Err(self.ended_by(Error::protocol(error))),
            },
            Message::Close(_) => Err(self.lost("the service closed it")),
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => Ok(None),
        }
    }

    /// What sends signals and sizes; any number of copies may exist.
    #[must_use]
    pub fn control(&self) -> SessionControl {
        self.control.clone()
    }

    /// The command's stdin, once, if it was asked for.
    pub fn take_stdin(&mut self) -> Option<SessionStdin> {
        self.stdin.take()
    }

    /// Writes `input`, reads to the end and gives back everything.
    ///
    /// # Errors
    /// Those of [`Session::next`]; `limit_exceeded` if there is more output than `output_len_max`.
    pub async fn collect(mut self, input: Option<Vec<u8>>, output_len_max: usize) -> Result<ExecOutput, Error> {
        let writer = self.take_stdin().map(|mut stdin| {
            tokio::spawn(async move {
                // A command may end without reading its stdin: that is its right, and its end is what counts.
                if let Some(input) = input
                    && stdin.write_all(&input).await.is_err()
                {
                    return;
                }
                let _ = stdin.finish().await;
            })
        });
        let result = self.read_all(output_len_max).await;
        if let Some(writer) = writer {
            writer.abort();
        }
        result
    }

    async fn read_all(&mut self, output_len_max: usize) -> Result<ExecOutput, Error> {
        let mut output = ExecOutput::default();
        while let Some(event) = self.next().await? {
            let (into, data) = match event {
                SessionEvent::Stdout(data) => (&mut output.stdout, data),
                SessionEvent::Stderr(data) => (&mut output.stderr, data),
                SessionEvent::Exited(end) => {
                    output.end = end;
                    continue;
                }
                SessionEvent::Started { .. } | SessionEvent::OutputLost { .. } => continue,
            };
            into.extend_from_slice(&data);
            if output.stdout.len() + output.stderr.len() > output_len_max {
                let message = format!("the command wrote more than {output_len_max} bytes");
                let error = ApiError::new(ErrorCode::LimitExceeded, message)
                    .with_hint("read it as a stream, or raise output_len_max");
                return Err(Error::Client(error));
            }
        }
        Ok(output)
    }

    fn end(&mut self) {
        self.over = true;
        self.window.close();
    }

    fn ended_by(&mut self, error: Error) -> Error {
        self.end();
        error
    }

    fn lost(&mut self, why: &str) -> Error {
        self.end();
        let message = format!("the connection to the running command was lost: {why}");
        Error::Client(ApiError::new(ErrorCode::ExecLost, message))
    }
}

fn unsent(error: &dyn std::fmt::Display) -> Error {
    let message = format!("the connection to the running command was lost: {error}");
    Error::Client(ApiError::new(ErrorCode::ExecLost, message))
}

/// What happened to the connection, without the words of its protocol.
fn reason(error: &WsError) -> String {
    match error {
        WsError::ConnectionClosed
        | WsError::AlreadyClosed
        | WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => "the service closed it".to_owned(),
        other => other.to_string(),
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A stdin writer that waits for credit must not wait for ever.
        self.window.close();
    }
}

/// Sends signals and terminal sizes to a running command.
#[derive(Clone)]
pub struct SessionControl {
    writer: Arc<Mutex<Writer>>,
}

impl SessionControl {
    /// Sends a signal to the command's process group.
    ///
    /// # Errors
    /// `exec_lost` if the connection is gone.
    pub async fn signal(&self, number: i32) -> Result<(), Error> {
        self.send(&ClientMessage::Signal { number }).await
    }

    /// Tells the command the terminal's size.
    ///
    /// # Errors
    /// `exec_lost` if the connection is gone.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), Error> {
        self.send(&ClientMessage::Resize { size }).await
    }

    async fn send(&self, message: &ClientMessage) -> Result<(), Error> {
        match &mut *self.writer.lock().await {
            Writer::WebSocket(sink) => {
                let text = serde_json::to_string(message).map_err(Error::protocol)?;
                sink.send(Message::text(text)).await.map_err(|error| unsent(&error))
            }
            Writer::Direct(writer) => writer.send(message).await.map_err(|error| unsent(&error)),
        }
    }

    async fn stdin(&self, data: &[u8]) -> Result<(), Error> {
        match &mut *self.writer.lock().await {
            Writer::WebSocket(sink) => {
                sink.send(Message::binary(Bytes::copy_from_slice(data))).await.map_err(|error| unsent(&error))
            }
            Writer::Direct(writer) => writer.stdin(data).await.map_err(|error| unsent(&error)),
        }
    }
}

/// The stdin of a running command.
pub struct SessionStdin {
    control: SessionControl,
    window: Arc<Window>,
}

impl SessionStdin {
    /// Writes all of `data`, waiting while the command does not read.
    ///
    /// # Errors
    /// `exec_lost` once the command has ended or the connection is gone.
    pub async fn write_all(&mut self, data: &[u8]) -> Result<(), Error> {
        let mut rest = data;
        while !rest.is_empty() {
            let Some(granted) = self.window.take(rest.len().min(DATA_LEN_MAX)).await else {
                return Err(Error::Client(ApiError::new(ErrorCode::ExecLost, "the command has ended")));
            };
            let (now, later) = rest.split_at(granted);
            self.control.stdin(now).await?;
            rest = later;
        }
        Ok(())
    }

    /// Ends stdin: the command reads end of file.
    ///
    /// # Errors
    /// `exec_lost` if the connection is gone.
    pub async fn finish(self) -> Result<(), Error> {
        self.control.send(&ClientMessage::StdinEof).await
    }
}
