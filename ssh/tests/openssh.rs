//! The server against OpenSSH's own client. The target is this machine: a process is a shell here, a connection goes to loopback,
//! so what is tested is the SSH side alone. Needs `ssh` and `ssh-keygen`; without them the tests say so, and fail where
//! `MSB_REQUIRE_ALL` is set.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use msb_protocol::error::{ApiError, ErrorCode};
use msb_protocol::state::ProcessEnd;
use msb_ssh::target::BoxFuture;
use msb_ssh::{
    AuthorizedKeys, Command, Control, HostKey, Input, Output, Process, Refusal, Server, ServerOptions, Stream, Target,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// This machine as a target.
struct Here;

impl Target for Here {
    fn start(&self, command: Command) -> BoxFuture<'_, Result<Process, ApiError>> {
        Box::pin(async move {
            if command.user == "nobody-here" {
                return Err(ApiError::new(ErrorCode::UserNotFound, "user 'nobody-here' does not exist"));
            }
            let line = command.line.unwrap_or_else(|| "cat".into());
            let mut child = tokio::process::Command::new("sh")
                .args(["-c", &line])
                .envs(command.env)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()
                .map_err(ApiError::internal)?;
            let (input, mut taken) = mpsc::channel(4);
            let (control, mut told) = mpsc::channel(4);
            let pid = child.id().unwrap();
            tokio::spawn(async move {
                while let Some(word) = told.recv().await {
                    if let Control::Signal(number) = word {
                        std::process::Command::new("kill")
                            .args([format!("-{number}"), pid.to_string()])
                            .status()
                            .unwrap();
                    }
                }
            });
            let (given, output) = mpsc::channel(4);
            let mut stdin = child.stdin.take();
            tokio::spawn(async move {
                while let Some(input) = taken.recv().await {
                    match input {
                        Input::Data(data) => {
                            if let Some(pipe) = &mut stdin
                                && pipe.write_all(&data).await.is_err()
                            {
                                stdin = None;
                            }
                        }
                        Input::Eof => stdin = None,
                    }
                }
            });
            let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
            tokio::spawn(async move {
                let mut errors = Vec::new();
                let mut piece = vec![0; 32 << 10];
                loop {
                    tokio::select! {
                        read = stdout.read(&mut piece) => match read {
                            Ok(0) | Err(_) => break,
                            Ok(len) => if given.send(Output::Stdout(Bytes::copy_from_slice(&piece[..len]))).await.is_err() { return },
                        },
                        () = given.closed() => return,
                    }
                }
                stderr.read_to_end(&mut errors).await.unwrap();
                let _ = given.send(Output::Stderr(errors.into())).await;
                let status = child.wait().await.unwrap();
                let end = match (status.code(), std::os::unix::process::ExitStatusExt::signal(&status)) {
                    (Some(code), _) => ProcessEnd::exited(code),
                    (None, signal) => ProcessEnd::signalled(signal.unwrap()),
                };
                let _ = given.send(Output::Ended(end)).await;
            });
            Ok(Process { input, control, output })
        })
    }

    fn sftp<'a>(&'a self, _user: &'a str) -> BoxFuture<'a, Result<Box<dyn Stream>, ApiError>> {
        Box::pin(async { Err(ApiError::not_implemented("sftp of this bench")) })
    }

    fn connect<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, Result<Box<dyn Stream>, Refusal>> {
        Box::pin(async move {
            if host != "inside.test" {
                return Err(Refusal::Prohibited(format!("{host} is not allowed")));
            }
            let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(|e| Refusal::Failed(e.to_string()))?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

#[allow(clippy::print_stderr, reason = "a test that cannot run here says so")]
fn skipped() {
    eprintln!("skipped: needs ssh and ssh-keygen (Debian: openssh-client)");
}

struct Bench {
    dir: tempfile::TempDir,
    port: u16,
}

impl Bench {
    /// A server on a loopback port, and a client key it knows.
    async fn new() -> Option<Self> {
        if ["ssh", "ssh-keygen"].iter().any(|tool| which(tool).is_none()) {
            assert!(std::env::var_os("MSB_REQUIRE_ALL").is_none(), "ssh and ssh-keygen are required");
            skipped();
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["known", "stranger"] {
            let made = std::process::Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.path().join(name))
                .status()
                .unwrap();
            assert!(made.success());
        }
        let authorized = std::fs::read_to_string(dir.path().join("known.pub")).unwrap();
        let keys = AuthorizedKeys::parse(&authorized).unwrap();
        let host_key = HostKey::load_or_create(&dir.path().join("host_ed25519")).unwrap();
        let options = ServerOptions { rejection_delay: Duration::from_millis(50), ..Default::default() };
        let server = Server::new(&host_key, Arc::new(Here), &options);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        std::fs::write(dir.path().join("hosts"), format!("[127.0.0.1]:{port} {}\n", host_key.public_line())).unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, peer) = listener.accept().await.unwrap();
                let (server, keys) = (server.clone(), keys.clone());
                tokio::spawn(async move {
                    let _ = server.serve(stream, keys, &peer.to_string()).await;
                });
            }
        });
        Some(Self { dir, port })
    }

    fn ssh(&self, key: &str) -> tokio::process::Command {
        self.ssh_as("user", key)
    }

    fn ssh_as(&self, user: &str, key: &str) -> tokio::process::Command {
        let mut command = tokio::process::Command::new("ssh");
        let file = |name: &str| self.dir.path().join(name).display().to_string();
        command
            .args(["-F", "none", "-o", "StrictHostKeyChecking=yes", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"])
            .args(["-o", &format!("UserKnownHostsFile={}", file("hosts")), "-i", &file(key)])
            .args(["-p", &self.port.to_string(), "-l", user])
            .kill_on_drop(true);
        command
    }

    async fn run(&self, line: &str, stdin: &[u8]) -> (i32, Vec<u8>, String) {
        let mut command = self.ssh("known");
        command.args(["127.0.0.1", line]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let bytes = stdin.to_vec();
        tokio::spawn(async move {
            let _ = pipe.write_all(&bytes).await;
        });
        let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await.unwrap().unwrap();
        (output.status.code().unwrap(), output.stdout, String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn which(tool: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(tool))
        .find(|path: &PathBuf| Path::is_file(path))
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_streams_and_ends_are_told_truly() {
    let Some(bench) = Bench::new().await else { return };
    assert_eq!(bench.run("echo out; echo err >&2; exit 7", b"").await, (7, b"out\n".to_vec(), "err\n".into()));
    assert_eq!(bench.run("exit 0", b"").await.0, 0);
    // A death by signal is never a success: OpenSSH reports an exit-signal as 255.
    assert_eq!(bench.run("kill -9 $$", b"").await.0, 255);
    let large: Vec<u8> = (0..8 << 20).map(|n: u32| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let (code, stdout, _) = bench.run("cat", &large).await;
    assert!(code == 0 && stdout == large, "8 MiB through cat: {} bytes came back", stdout.len());
}

/// The process stops reading because nobody takes its output, while the client goes on sending: whatever is behind that input on
/// the wire, the client's window above all, must still get through.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_late_gets_everything_it_sent() {
    let Some(bench) = Bench::new().await else { return };
    let mut command = bench.ssh("known");
    command.args(["127.0.0.1", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let large: Vec<u8> = (0..24 << 20).map(|n: u32| n.to_le_bytes()[0] ^ n.to_le_bytes()[2]).collect();
    let (mut pipe, bytes) = (child.stdin.take().unwrap(), large.clone());
    let writer = tokio::spawn(async move { pipe.write_all(&bytes).await });
    tokio::time::sleep(Duration::from_secs(3)).await;
    let output = tokio::time::timeout(Duration::from_secs(120), child.wait_with_output()).await.unwrap().unwrap();
    writer.await.unwrap().unwrap();
    assert!(output.stdout == large, "{} bytes came back", output.stdout.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_unknown_users_are_refused() {
    let Some(bench) = Bench::new().await else { return };
    let output = bench.ssh("stranger").args(["127.0.0.1", "true"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(255));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Permission denied (publickey)"));
    let output = bench.ssh_as("nobody-here", "known").args(["127.0.0.1", "true"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("user 'nobody-here' does not exist"));
    // Several times: the refusal must never be taken for one of the command behind it.
    for _ in 0..8 {
        let mut command = bench.ssh("known");
        command.args(["-o", "SendEnv=LC_TEST MSB_TEST", "127.0.0.1", "echo $LC_TEST$MSB_TEST"]);
        let output = command.env("LC_TEST", "sent").env("MSB_TEST", "refused").output().await.unwrap();
        assert_eq!(output.stdout, b"sent\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn local_forwarding_goes_inside_and_refusals_come_at_once() {
    let Some(bench) = Bench::new().await else { return };
    let inside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = inside.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = inside.accept().await.unwrap();
            tokio::spawn(async move {
                // Answers only after the client's half-close, so that it must have been passed on.
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                all.reverse();
                stream.write_all(&all).await.unwrap();
            });
        }
    });
    let through = |host: &str| {
        let mut command = bench.ssh("known");
        command.args(["-W", &format!("{host}:{port}"), "127.0.0.1"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut child = through("inside.test");
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"abc").await.unwrap();
    drop(stdin);
    let output = tokio::time::timeout(Duration::from_secs(30), child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(output.stdout, b"cba");

    let started = std::time::Instant::now();
    let output = tokio::time::timeout(Duration::from_secs(30), through("outside.test").wait_with_output())
        .await
        .unwrap()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("administratively prohibited") && text.contains("outside.test is not allowed"), "{text}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[tokio::test(flavor = "multi_thread")]
async fn remote_forwarding_is_refused() {
    let Some(bench) = Bench::new().await else { return };
    let mut command = bench.ssh("known");
    command.args(["-o", "ExitOnForwardFailure=yes", "-R", "0:localhost:1", "127.0.0.1", "true"]);
    let output = command.output().await.unwrap();
    assert_eq!(output.status.code(), Some(255));
    assert!(String::from_utf8_lossy(&output.stderr).contains("remote port forwarding failed"));
}
