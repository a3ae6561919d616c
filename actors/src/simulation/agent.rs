//! The agent's side of one stream, enough for the API's tests: `echo` prints, `cat` copies stdin, `exit N` exits, `exists PATH` exits
//! with 0 if the host has that file, `yes` never ends, everything else waits for a signal; a connection from inside answers with what
//! it hears.

use msb_protocol::frame::Decoder;
use msb_protocol::guest::{
    Assembler, Exited, Failure, GuestBody, HostBody, Open, OpenKind, Opened, Output, OutputStream, Started,
    StdinCredit, encode_guest,
};
use msb_protocol::id::BootId;
use msb_protocol::state::ProcessEnd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

struct Stream {
    io: DuplexStream,
    decoder: Decoder,
    assembler: Assembler,
}

impl Stream {
    async fn next(&mut self) -> Option<HostBody> {
        loop {
            if let Some(body) = self.decoder.next_body().ok()? {
                match self.assembler.host(body).ok()? {
                    Some(message) => return Some(message),
                    None => continue,
                }
            }
            let mut buffer = vec![0; 16 << 10];
            match self.io.read(&mut buffer).await.ok()? {
                0 => return None,
                read => self.decoder.push(&buffer[..read]),
            }
        }
    }

    async fn send(&mut self, body: GuestBody) -> Option<()> {
        let mut wire = Vec::new();
        encode_guest(body, &mut wire).ok()?;
        self.io.write_all(&wire).await.ok()
    }

    async fn print(&mut self, stream: OutputStream, data: Vec<u8>) -> Option<()> {
        self.send(GuestBody::Output(Output { stream: stream.into(), data })).await
    }
}

/// Serves one stream. `main_ended` is called when the main workload's stream came to its end.
pub(super) async fn serve(io: DuplexStream, boot_id: BootId, main_ended: impl FnOnce(ProcessEnd)) {
    let mut stream = Stream { io, decoder: Decoder::new(), assembler: Assembler::new() };
    // A stream that breaks is the other side's business.
    let _ = serve_one(&mut stream, boot_id, main_ended).await;
}

async fn serve_one(stream: &mut Stream, boot_id: BootId, main_ended: impl FnOnce(ProcessEnd)) -> Option<()> {
    let Some(HostBody::Open(Open { boot_id: wanted, kind: Some(kind), .. })) = stream.next().await else { return None };
    if wanted != boot_id.0.as_bytes() {
        let failure =
            Failure { code: "sandbox_not_running".into(), message: "another boot".into(), ..Failure::default() };
        return stream.send(GuestBody::Refused(failure)).await;
    }
    let argv = match &kind {
        OpenKind::Exec(exec) => exec.argv.clone(),
        OpenKind::Main(_) | OpenKind::Attach(_) => vec!["echo".into(), "main".into()],
        OpenKind::Control(_) | OpenKind::Tcp(_) | OpenKind::Sftp(_) => Vec::new(),
        // It speaks generation 1, and answers what that did not know as an agent of that age does.
        OpenKind::Files(_) | OpenKind::Archive(_) | OpenKind::Renew(_) => {
            let message = "this agent (generation 1) does not know what the stream is for";
            let code = "unsupported_operation".into();
            return stream
                .send(GuestBody::Refused(Failure { code, message: message.into(), ..Failure::default() }))
                .await;
        }
    };
    if argv.first().is_some_and(|program| program == "missing") {
        let failure =
            Failure { code: "exec_not_found".into(), message: "missing: not found".into(), ..Failure::default() };
        return stream.send(GuestBody::Refused(failure)).await;
    }
    stream.send(GuestBody::Opened(Opened { generation: 1, agent_version: "fake".into(), ..Opened::default() })).await?;
    if matches!(kind, OpenKind::Control(_)) {
        while stream.next().await.is_some() {}
        return Some(());
    }
    if matches!(kind, OpenKind::Tcp(_) | OpenKind::Sftp(_)) {
        // What is behind it says back what it hears.
        let (mut read, mut write) = tokio::io::split(&mut stream.io);
        tokio::io::copy(&mut read, &mut write).await.ok()?;
        return write.shutdown().await.ok();
    }
    stream.send(GuestBody::Started(Started { pid: 7 })).await?;
    let exited = run(stream, &argv).await?;
    stream.send(GuestBody::Exited(exited)).await?;
    if matches!(kind, OpenKind::Main(_)) {
        main_ended(exited.into());
    }
    Some(())
}

async fn run(stream: &mut Stream, argv: &[String]) -> Option<Exited> {
    let code = |code| Exited { code, signal: 0, core_dumped: false, oom_killed: false, timed_out: false };
    match argv.first().map(String::as_str) {
        Some("echo") => {
            stream.print(OutputStream::Stdout, format!("{}\n", argv[1..].join(" ")).into_bytes()).await?;
            Some(code(0))
        }
        Some("exit") => {
            stream.print(OutputStream::Stderr, b"going\n".to_vec()).await?;
            Some(code(argv.get(1)?.parse().ok()?))
        }
        Some("exists") => Some(code(i32::from(!std::path::Path::new(argv.get(1)?).exists()))),
        Some("yes") => loop {
            stream.print(OutputStream::Stdout, vec![b'y'; 32 << 10]).await?;
        },
        Some("cat") => loop {
            match stream.next().await? {
                HostBody::Stdin(data) => {
                    let bytes = u32::try_from(data.data.len()).ok()?;
                    stream.print(OutputStream::Stdout, data.data).await?;
                    stream.send(GuestBody::StdinCredit(StdinCredit { bytes })).await?;
                }
                HostBody::StdinEof(_) => return Some(code(0)),
                HostBody::Signal(signal) => return Some(Exited { signal: signal.number, ..code(0) }),
                _ => {}
            }
        },
        _ => loop {
            if let HostBody::Signal(signal) = stream.next().await? {
                return Some(Exited { signal: signal.number, ..code(0) });
            }
        },
    }
}
