//! What an SSH connection reaches in its sandbox: sessions and connections, each a stream of its own to the agent. A session counts
//! as activity while its process lives, a forwarded connection by its bytes only. Used by `msb_ssh::Server`, runs beside the actors.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::frame::{DATA_LEN_MAX, FrameError};
use msb_protocol::guest::{
    self, Data, EnvVar, ExecConfig, GuestBody, HostBody, OpenKind, OpenSftp, OpenTcp, OutputStream, STDIN_WINDOW,
    StdinEof,
};
use msb_protocol::id::{SandboxId, SandboxName};
use msb_ssh::target::BoxFuture;
use msb_ssh::{Command, Control, Input, Output, Process, Refusal, Stream, Target};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Semaphore, mpsc};

use crate::daemon::Daemon;
use crate::sandbox::activity::{Activity, ActivityGuard, ActivityKind};
use crate::vm::session::{Session, SessionError, SessionReader, SessionWriter};

/// Messages that wait for either side of a process.
const QUEUE_LEN: usize = 8;

/// Streams that are being opened in one sandbox at a time. Others wait for their turn: a guest refuses what its agent has not
/// accepted in time, and a client may ask for a thousand at once.
const OPENING_MAX: usize = 64;

/// One sandbox, by name and identity: a later one of the same name is another.
#[derive(Clone)]
pub(super) struct SandboxTarget {
    daemon: Daemon,
    name: SandboxName,
    id: SandboxId,
    opening: Arc<Semaphore>,
}

impl SandboxTarget {
    pub(super) fn new(daemon: Daemon, name: SandboxName, id: SandboxId) -> Self {
        Self { daemon, name, id, opening: Arc::new(Semaphore::new(OPENING_MAX)) }
    }

    async fn open(&self, kind: OpenKind, activity: ActivityKind) -> Result<(Session, ActivityGuard), ApiError> {
        if self.daemon.identity(&self.name).await? != self.id {
            return Err(ApiError::new(ErrorCode::SandboxNotFound, format!("sandbox {} was removed", self.name)));
        }
        let _turn = self.opening.acquire().await.map_err(ApiError::internal)?;
        self.daemon.open(&self.name, kind, activity).await
    }
}

impl Target for SandboxTarget {
    fn logged_in(&self) {
        let target = self.clone();
        tokio::spawn(async move {
            // What the client asks for next waits for the same start, and is told if it fails.
            if let Err(error) = target.daemon.wake(&target.name).await {
                tracing::debug!(sandbox = %target.name, error = %error.message, "a login did not wake the sandbox");
            }
        });
    }

    fn start(&self, command: Command) -> BoxFuture<'_, Result<Process, ApiError>> {
        Box::pin(async move {
            let mut env: Vec<EnvVar> = command.env.into_iter().map(|(name, value)| EnvVar { name, value }).collect();
            let terminal = command.terminal.map(|terminal| {
                env.push(EnvVar { name: "TERM".into(), value: terminal.term });
                size(terminal.rows, terminal.columns)
            });
            let config = ExecConfig {
                argv: command.line.into_iter().collect(),
                env,
                user: command.user,
                stdin: true,
                terminal,
                login: true,
                ..ExecConfig::default()
            };
            let (session, guard) = self.open(OpenKind::Exec(config), ActivityKind::Ssh).await?;
            let (input, typed) = mpsc::channel(QUEUE_LEN);
            let (control, told) = mpsc::channel(QUEUE_LEN);
            let (said, output) = mpsc::channel(QUEUE_LEN);
            tokio::spawn(async move {
                run(session, typed, told, said).await;
                drop(guard);
            });
            Ok(Process { input, control, output })
        })
    }

    fn sftp<'a>(&'a self, user: &'a str) -> BoxFuture<'a, Result<Box<dyn Stream>, ApiError>> {
        Box::pin(async move {
            let kind = OpenKind::Sftp(OpenSftp { user: user.into() });
            let (session, guard) = self.open(kind, ActivityKind::Ssh).await?;
            // Its process lives as long as its stream.
            Ok(Box::new(Active { stream: session.into_bytes(), _guard: guard }) as Box<dyn Stream>)
        })
    }

    fn connect<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, Result<Box<dyn Stream>, Refusal>> {
        Box::pin(async move {
            let kind = OpenKind::Tcp(OpenTcp { host: host.into(), port: u32::from(port) });
            let (session, guard) = self.open(kind, ActivityKind::Forward).await.map_err(refusal)?;
            let activity = Arc::clone(guard.activity());
            Ok(Box::new(Counted { stream: session.into_bytes(), activity }) as Box<dyn Stream>)
        })
    }
}

fn refusal(error: ApiError) -> Refusal {
    match error.code {
        ErrorCode::ConnectDenied => Refusal::Prohibited(error.message),
        ErrorCode::LimitExceeded => Refusal::Shortage(error.message),
        _ => Refusal::Failed(error.message),
    }
}

fn size(rows: u16, columns: u16) -> guest::TerminalSize {
    guest::TerminalSize { rows: rows.into(), columns: columns.into() }
}

/// Joins a process to its channels until it has ended or nobody listens; dropping the session then ends the process.
async fn run(
    session: Session,
    typed: mpsc::Receiver<Input>,
    told: mpsc::Receiver<Control>,
    said: mpsc::Sender<Output>,
) {
    let Session { mut reader, mut writer, .. } = session;
    let credit = Semaphore::new(STDIN_WINDOW as usize);
    let last = tokio::select! {
        end = downwards(&mut reader, &said, &credit) => end,
        // A guest that closed its side tells why on the other one.
        () = upwards(&mut writer, typed, told, &credit) => None,
        () = said.closed() => None,
    };
    if let Some(last) = last {
        // Nobody may be left to hear it.
        let _ = said.send(last).await;
    }
}

/// Ends only by being dropped: the process is over when the other direction says so.
async fn upwards(
    writer: &mut SessionWriter,
    mut typed: mpsc::Receiver<Input>,
    mut told: mpsc::Receiver<Control>,
    credit: &Semaphore,
) {
    let (mut waiting, mut open, mut listening) = (Bytes::new(), true, true);
    loop {
        let piece = waiting.len().min(DATA_LEN_MAX);
        // Fits: a piece is smaller than the window, and the window smaller than u32.
        let wanted = u32::try_from(piece).unwrap_or(u32::MAX);
        let body = tokio::select! {
            biased;
            word = told.recv(), if listening => match word {
                Some(Control::Signal(number)) => HostBody::Signal(guest::Signal { number }),
                Some(Control::Resize { rows, columns }) => HostBody::Resize(size(rows, columns)),
                None => {
                    listening = false;
                    continue;
                }
            },
            input = typed.recv(), if open && waiting.is_empty() => match input {
                Some(Input::Data(data)) => {
                    waiting = data;
                    continue;
                }
                Some(Input::Eof) => HostBody::StdinEof(StdinEof {}),
                None => {
                    open = false;
                    continue;
                }
            },
            permits = credit.acquire_many(wanted), if !waiting.is_empty() => {
                if let Ok(permits) = permits {
                    permits.forget();
                }
                HostBody::Stdin(Data { data: waiting.split_to(piece).to_vec() })
            }
            else => std::future::pending().await,
        };
        if writer.send(body).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn downwards(reader: &mut SessionReader, said: &mpsc::Sender<Output>, credit: &Semaphore) -> Option<Output> {
    loop {
        let output = match reader.next().await {
            Ok(Some(GuestBody::Output(output))) => {
                let data = Bytes::from(output.data);
                if output.stream == i32::from(OutputStream::Stderr) {
                    Output::Stderr(data)
                } else {
                    Output::Stdout(data)
                }
            }
            Ok(Some(GuestBody::Exited(end))) => return Some(Output::Ended(end.into())),
            Ok(Some(GuestBody::StdinCredit(more))) => {
                let (more, window) = (more.bytes as usize, STDIN_WINDOW as usize);
                if more > window.saturating_sub(credit.available_permits()) {
                    return Some(Output::Failed(SessionError::Frame(FrameError::Malformed).into()));
                }
                credit.add_permits(more);
                continue;
            }
            Ok(Some(GuestBody::Refused(failure))) => return Some(Output::Failed(failure.into())),
            // What a later agent says beyond that is not for this daemon.
            Ok(Some(_)) => continue,
            Ok(None) => {
                let message = "the sandbox closed the stream before the command ended";
                return Some(Output::Failed(ApiError::new(ErrorCode::ExecLost, message)));
            }
            Err(error) => return Some(Output::Failed(error.into())),
        };
        if said.send(output).await.is_err() {
            return None;
        }
    }
}

/// A stream that is activity for as long as it lives.
struct Active<S> {
    stream: S,
    _guard: ActivityGuard,
}

/// A stream whose bytes are activity.
struct Counted<S> {
    stream: S,
    activity: Arc<Activity>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Active<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Active<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.touch(ActivityKind::Forward);
        }
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, data);
        if matches!(outcome, Poll::Ready(Ok(len)) if len > 0) {
            self.activity.touch(ActivityKind::Forward);
        }
        outcome
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
