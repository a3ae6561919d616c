//! The quickstart of docs/sdk/rust.md, which CI runs as it stands.
#![expect(clippy::print_stdout, reason = "it shows what it did")]

use std::time::Duration;

use msb_sdk::protocol::error::ErrorCode;
use msb_sdk::{Error, Exec, Image, Sandbox, SessionEvent};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    match Image::get("busybox").await {
        Err(error) if error.code() == ErrorCode::ImageNotFound => drop(Image::load("busybox.tar").await?),
        found => drop(found?),
    }

    let builder = Sandbox::builder("quickstart-rust").image("busybox").memory_mib(256).env("WHO", "world");
    // Without `.detached(true)` it ends with this process; `.ephemeral(true)` removes it then.
    let sandbox = builder.ephemeral(true).create().await?;
    let output = sandbox.shell("echo hello $WHO; exit 7").await?;
    assert_eq!((output.stdout_text().as_str(), output.end.code), ("hello world\n", Some(7)));

    // Files, without a command inside.
    sandbox.fs().write("/tmp/note", "a note\n").await?;
    assert_eq!(sandbox.fs().read("/tmp/note", 1024).await?, b"a note\n");

    // A stream: events as they happen, stdin, signals.
    let mut running = sandbox.exec_stream(Exec::new(["cat"]).stdin_open()).await?;
    if let Some(mut stdin) = running.take_stdin() {
        stdin.write_all(b"a line\n").await?;
        stdin.finish().await?;
    }
    while let Some(event) = running.next().await? {
        match event {
            SessionEvent::Stdout(data) => assert_eq!(data, "a line\n"),
            SessionEvent::Exited(end) => assert!(end.success()),
            _ => {}
        }
    }

    // `check` turns a bad end into an error.
    let late = sandbox.exec(Exec::new(["sleep", "600"]).timeout(Duration::from_millis(500))).await?.check();
    let error = late.expect_err("it sleeps longer than that");
    assert_eq!(error.code(), ErrorCode::ExecTimeout);
    println!("{} - {}", error.code(), error.hint());
    sandbox.kill().await?;
    Ok(())
}
