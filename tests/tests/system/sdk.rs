//! The Rust client against a real daemon and real sandboxes.

use std::time::Duration;

use msb_sdk::protocol::error::ErrorCode;
use msb_sdk::protocol::images::PullPolicy;
use msb_sdk::protocol::paths::Surroundings;
use msb_sdk::protocol::state::SandboxState;
use msb_sdk::{Client, Error, Exec, Locator, Sandbox, SessionEvent};
use msb_tests::{Home, tree};

/// A client that starts this home's service as `msb` would, without touching the environment that other tests share.
pub(crate) async fn client(home: &Home) -> Client {
    let mut locator = Locator::from_environment();
    locator.surroundings = Surroundings {
        msb_home: Some(home.path()),
        home: Some(home.scratch()),
        xdg_runtime_dir: Some(home.runtime()),
        msb_host: None,
        uid: rustix::process::geteuid().as_raw(),
    };
    locator.daemon = Some(tree().join("bin/msbd"));
    locator.connect().await.expect("a service")
}

/// Files through the agent: what is written is what a command inside sees, and errors carry the system's number.
async fn files(sandbox: &Sandbox) {
    let fs = sandbox.fs();
    let content: Vec<u8> = (0..3_000_001u32).map(|at| (at % 251) as u8).collect();
    let written = fs.write("/tmp/data", content.clone()).await.expect("write");
    assert_eq!((written.size, written.mode & 0o7777), (3_000_001, 0o644));
    assert!(fs.read("/tmp/data", 4 << 20).await.expect("read") == content);
    let sum = sandbox.exec(["sh", "-c", "wc -c < /tmp/data; chmod 4755 /tmp/data; ls /tmp"]).await.expect("exec");
    assert_eq!(sum.stdout_text(), "3000001\ndata\n", "whole, and nothing beside it");
    let written = fs.write("/tmp/data", "new").await.expect("write again");
    assert_eq!((written.size, written.mode & 0o7777), (3, 0o4755), "the mode stays");
    fs.make_directories("/tmp/a/b").await.expect("mkdir");
    fs.symlink("/tmp/data", "/tmp/a/link").await.expect("symlink");
    assert_eq!(fs.read("/tmp/a/link", 10).await.expect("read through a link"), b"new");
    assert_eq!(fs.real_path("/tmp/a/./link").await.expect("realpath"), "/tmp/data");
    let names: Vec<String> = fs.list("/tmp/a").await.expect("list").into_iter().map(|entry| entry.name).collect();
    assert_eq!(names, ["b", "link"]);
    fs.rename("/tmp/a/link", "/tmp/a/c").await.expect("rename");
    fs.chown("/tmp/data", 1000, 50).await.expect("chown");
    assert_eq!(fs.stat("/tmp/data").await.expect("stat").uid, 1000);
    let error = fs.read("/tmp/none", 10).await.expect_err("nothing is there");
    assert_eq!((error.code(), error.api().errno), (ErrorCode::PathNotFound, Some(2)));
    let error = fs.clone().as_user("app").write("/etc/x", "x").await.expect_err("not app's to write");
    assert_eq!((error.code(), error.api().errno), (ErrorCode::PermissionDenied, Some(13)));
    assert_eq!(fs.remove("/tmp/a").await.expect_err("not empty").api().errno, Some(39));
    fs.remove_all("/tmp/a").await.expect("remove the tree");
    assert!(!fs.exists("/tmp/a").await.expect("exists"));
}

#[tokio::test]
async fn the_builder_makes_a_sandbox_that_answers() {
    let home = Home::new("sdk");
    // The command line starts the service, so that it runs with the test's own environment.
    home.succeeds(&["ls"]);
    let client = client(&home).await;
    home.load("busybox.tar");

    let mut sandbox = Sandbox::builder("box")
        .image("busybox")
        .cpus(1)
        .memory_mib(256)
        .env("A", "1")
        .label("team", "ml")
        .detached(true)
        .create_on(&client)
        .await
        .expect("a sandbox");
    assert_eq!(sandbox.state(), SandboxState::Running);

    let output = sandbox.exec(["sh", "-c", "echo $A; echo err >&2; exit 7"]).await.expect("exec");
    assert_eq!((output.stdout_text().as_str(), output.stderr_text().as_str()), ("1\n", "err\n"));
    assert!(!output.success());
    assert_eq!(output.end.code, Some(7));

    let output = sandbox.exec(Exec::new(["cat"]).stdin(vec![b'x'; 1 << 20])).await.expect("exec");
    assert_eq!(output.stdout.len(), 1 << 20);

    files(&sandbox).await;
    let late = sandbox.exec(Exec::new(["sleep", "600"]).timeout(Duration::from_secs(1))).await.expect("exec");
    assert!(late.end.timed_out, "{:?}", late.end);

    let mut session = sandbox
        .exec_stream(Exec::new(["sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done"]))
        .await
        .expect("a stream");
    let (mut text, mut ended) = (Vec::new(), None);
    while let Some(event) = session.next().await.expect("an event") {
        match event {
            SessionEvent::Stdout(bytes) => text.extend_from_slice(&bytes),
            SessionEvent::Exited(end) => ended = Some(end),
            _ => {}
        }
    }
    assert_eq!(text, b"1\n2\n3\n");
    assert_eq!(ended.and_then(|end| end.code), Some(0));

    sandbox.stop().await.expect("stop");
    assert_eq!(sandbox.refresh().await.expect("its detail").summary.status, SandboxState::Stopped);
    let refused = sandbox.exec(["true"]).await.expect_err("it is stopped");
    assert_eq!(refused.code(), ErrorCode::SandboxNotRunning);
    home.finish();
}

#[tokio::test]
async fn errors_have_types_and_codes_before_and_after_a_request() {
    // Refused by `build` itself, with no service anywhere.
    for request in [
        Sandbox::builder("a").image("busybox").cpus(0).build(),
        Sandbox::builder("a").image("busybox").memory_mib(0).build(),
    ] {
        assert!(matches!(request, Err(Error::InvalidConfig(_))), "{request:?}");
    }
    assert!(matches!(Sandbox::builder("../x").image("busybox").build(), Err(Error::InvalidConfig(_))));
    let home = Home::new("sdk_errors");
    home.succeeds(&["ls"]);
    let client = client(&home).await;
    let wanted = Sandbox::builder("a").image("nothing-here").pull(PullPolicy::Never).detached(true);
    let missing = wanted.create_on(&client).await.expect_err("no such image");
    assert_eq!(missing.code(), ErrorCode::ImageNotFound);
    assert!(missing.is_not_found() && !missing.hint().is_empty());
    home.finish();
}
