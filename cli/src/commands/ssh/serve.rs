//! `msb ssh serve`: carries SSH connections to a sandbox's server, from a port or from stdin and stdout. It reads none of it: keys are
//! checked by the server, which the sandbox's actor owns.

use std::net::IpAddr;

use clap::Args;
use msb_protocol::control::SshQuery;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::id::SandboxName;
use msb_sdk::Client;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::context::Context;
use crate::failure::{ExitStatus, Failure};
use crate::parse;
use crate::signals::Signals;

/// Bytes copied at once, each way.
const COPY_LEN: usize = 128 << 10;

/// Options of `ssh serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The sandbox
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 for any free one
    #[arg(long, value_name = "PORT", default_value_t = 2222)]
    pub port: u16,
    /// Serve one connection on stdin and stdout, for ProxyCommand
    #[arg(long, conflicts_with_all = ["host", "port"])]
    pub stdio: bool,
}

#[derive(Serialize)]
struct Listening<'a> {
    sandbox: &'a SandboxName,
    host: IpAddr,
    port: u16,
    fingerprint: &'a str,
}

/// Carries it out.
///
/// # Errors
/// `sandbox_not_found`, `port_in_use`.
pub(super) async fn run(args: ServeArgs, context: &Context) -> Result<ExitStatus, Failure> {
    let name = parse::name(&args.name)?;
    let client = context.client().await?;
    if args.stdio {
        let about = SshQuery { peer: Some(format!("stdio:{}", std::process::id())), key: None };
        let stream = client.ssh(&name, &about).await?;
        carry(tokio::io::join(tokio::io::stdin(), tokio::io::stdout()), stream).await;
        return Ok(ExitStatus::SUCCESS);
    }
    let mut signals = Signals::take();
    // Asked for first, so that a sandbox that does not exist is told before anything listens.
    let host = client.ssh_host(&name).await?;
    let listener = TcpListener::bind((args.host, args.port)).await.map_err(|error| {
        let code = match error.kind() {
            std::io::ErrorKind::AddrInUse => ErrorCode::PortInUse,
            std::io::ErrorKind::PermissionDenied => ErrorCode::PermissionDenied,
            _ => ErrorCode::InvalidConfig,
        };
        ApiError::new(code, format!("cannot listen on {} port {}: {error}", args.host, args.port))
    })?;
    let port = listener.local_addr().map_err(ApiError::internal)?.port();
    let listening = Listening { sandbox: &name, host: args.host, port, fingerprint: &host.fingerprint };
    if context.printer.is_json() {
        context.printer.json_line(&listening)?;
    } else {
        context.printer.text(&format!("{} port {port}\n", args.host))?;
        context.printer.note(&format!("host key {}; Ctrl-C ends it", host.fingerprint));
    }
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let (client, name) = (client.clone(), name.clone());
                    tokio::spawn(async move { serve_one(&client, &name, stream, peer.to_string()).await });
                }
                // Out of descriptors, or a client that was gone before it was there.
                Err(error) => {
                    context.printer.warning(&format!("a connection was not accepted: {error}"));
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            number = signals.ending() => return Err(Failure::Silent(ExitStatus::of_signal(number))),
        }
    }
}

async fn serve_one(client: &Client, name: &SandboxName, stream: TcpStream, peer: String) {
    // Small packets of a terminal must not wait; a system that refuses is only slower.
    let _ = stream.set_nodelay(true);
    // A service that is gone closes the connection, which is all an SSH client can be told before it has spoken.
    if let Ok(inside) = client.ssh(name, &SshQuery { peer: Some(peer), key: None }).await {
        carry(stream, inside).await;
    }
}

/// Copies until either side is over: SSH has its own goodbyes.
async fn carry(outside: impl AsyncRead + AsyncWrite + Unpin, inside: impl AsyncRead + AsyncWrite + Unpin) {
    let (mut from_outside, mut to_outside) = tokio::io::split(outside);
    let (mut from_inside, mut to_inside) = tokio::io::split(inside);
    let up = async {
        let _ = copy(&mut from_outside, &mut to_inside).await;
        let _ = to_inside.shutdown().await;
        // What the server still says is delivered; it ends by itself.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = up => {}
        _ = copy(&mut from_inside, &mut to_outside) => {}
    }
    let _ = to_outside.shutdown().await;
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    use tokio::io::AsyncReadExt;
    let mut buffer = vec![0; COPY_LEN];
    loop {
        let len = from.read(&mut buffer).await?;
        if len == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..len]).await?;
        to.flush().await?;
    }
}
