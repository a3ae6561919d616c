//! `msb ssh NAME [-- COMMAND]`: the built-in client on this process's streams and terminal. It needs no key: the service's own user
//! may do in a sandbox whatever they like, so a key is made for this one connection.

use bytes::Bytes;
use msb_protocol::control::SshQuery;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_ssh::Terminal;
use msb_ssh::client::{self, ClientError, Heard, Mouth, OneTimeKey, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::context::{Context, host_variable};
use crate::failure::{ExitStatus, Failure, invalid};
use crate::printer::write_failure;
use crate::signals::{Meaning, Signals};
use crate::terminal::{self, RawTerminal};

/// Variables of this process that go along.
const ENV_SENT: [&str; 3] = ["LANG", "LC_ALL", "COLORTERM"];

/// Carries it out.
///
/// # Errors
/// Those of the service and of the connection.
pub(super) async fn run(
    name: &SandboxName,
    words: &[String],
    tty: bool,
    login: Option<String>,
    context: &Context,
) -> Result<ExitStatus, Failure> {
    let interactive = terminal::stdin_is_terminal();
    if tty && !interactive {
        return Err(invalid("-t needs a terminal on stdin"));
    }
    let tty = tty || (words.is_empty() && interactive);
    let mut signals = Signals::take();
    let service = context.client().await?;
    let host = service.ssh_host(name).await?;
    let key = OneTimeKey::generate().map_err(|error| failed(&error))?;
    let about = SshQuery { peer: Some(format!("msb:{}", std::process::id())), key: Some(key.public_line()) };
    let stream = service.ssh(name, &about).await?;
    let size = terminal::size().unwrap_or(msb_protocol::control::TerminalSize { rows: 24, columns: 80 });
    let request = Request {
        line: (!words.is_empty()).then(|| words.join(" ")),
        terminal: tty.then(|| Terminal {
            term: host_variable("TERM").unwrap_or_else(|| "xterm".into()),
            rows: size.rows,
            columns: size.columns,
        }),
        env: ENV_SENT.iter().filter_map(|name| Some(((*name).to_owned(), host_variable(name)?))).collect(),
    };
    let user = login.unwrap_or(host.user);
    let starting = client::start(stream, &host.host_key, key, &user, request);
    let (mut ear, mouth) = tokio::select! {
        started = starting => started.map_err(|error| failed(&error))?,
        number = signals.ending() => return Err(Failure::Silent(ExitStatus::of_signal(number))),
    };
    let raw = if tty { Some(RawTerminal::enter()?) } else { None };
    let mut end = None;
    {
        let typing = type_in(&mouth);
        let hearing = async {
            let (mut out, mut errors) = (tokio::io::stdout(), tokio::io::stderr());
            while let Some(heard) = ear.next().await {
                match heard {
                    Heard::Stdout(data) => {
                        out.write_all(&data).await?;
                        out.flush().await?;
                    }
                    Heard::Stderr(data) => {
                        errors.write_all(&data).await?;
                        errors.flush().await?;
                    }
                    Heard::Exited(code) => end = Some(ExitStatus(u8::try_from(code & 0xff).unwrap_or(u8::MAX))),
                    Heard::Signalled(number) => end = Some(ExitStatus::of_signal(number)),
                }
            }
            std::io::Result::Ok(())
        };
        tokio::pin!(typing, hearing);
        let mut typed = false;
        loop {
            tokio::select! {
                biased;
                meaning = signals.next() => match meaning {
                    Meaning::Forward(number) => mouth.signal(number).await.map_err(|error| failed(&error))?,
                    Meaning::Resize => if let (true, Some(size)) = (tty, terminal::size()) {
                        mouth.resize(size.rows, size.columns).await.map_err(|error| failed(&error))?;
                    },
                    Meaning::Insist(number) => return Ok(ExitStatus::of_signal(number)),
                },
                written = &mut hearing => {
                    drop(raw);
                    write_failure(written)?;
                    break;
                }
                () = &mut typing, if !typed => typed = true,
            }
        }
    }
    end.ok_or_else(|| ApiError::new(ErrorCode::ExecLost, "the SSH connection ended before the command did").into())
}

/// Standard input, as fast as it is read. A command that reads no more is no failure.
async fn type_in(mouth: &Mouth) {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 32 << 10];
    loop {
        match stdin.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(len) => {
                if mouth.write(Bytes::copy_from_slice(&buffer[..len])).await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = mouth.finish().await;
}

fn failed(error: &ClientError) -> Failure {
    let code = match error {
        ClientError::Protocol(_) => ErrorCode::ExecLost,
        ClientError::HostKey | ClientError::Refused | ClientError::Key(_) => ErrorCode::Internal,
    };
    ApiError::new(code, error.to_string()).into()
}
