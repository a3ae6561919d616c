//! The session a newcomer types, line by line.

use msb_tests::Home;

#[test]
fn an_unnamed_run_streams_ends_with_its_code_and_leaves_nothing() {
    let home = Home::with_busybox("ephemeral_run");
    home.msb(["run", "busybox", "echo", "hello"]).run().succeeds().prints("hello\n").is_quiet();
    home.msb(["run", "-i", "busybox", "--", "cat"]).input("data\n").run().succeeds().prints("data\n").is_quiet();
    let _ = home
        .msb(["run", "busybox", "--", "sh", "-c", "echo out; echo err >&2; exit 7"])
        .run()
        .exits(7)
        .prints("out\n")
        .complains("err\n");
    home.wait_for_no_machine();
    assert_eq!(home.sandboxes(), [""; 0], "an ephemeral sandbox stayed");
    let left: Vec<_> = std::fs::read_dir(home.path().join("sandboxes")).into_iter().flatten().flatten().collect();
    assert!(left.is_empty(), "folders of ephemeral sandboxes stayed: {left:?}");
    home.finish();
}

#[test]
fn a_named_sandbox_lives_through_exec_stop_start_restart_and_remove() {
    let home = Home::with_busybox("life_of_box");
    std::fs::write(home.scratch().join("file.env"), "# a comment\nFROM_FILE=yes\n\nWITH_EQUALS=a=b\n")
        .expect("env file");
    home.msb([
        "create",
        "--name",
        "box",
        "-c",
        "1",
        "-m",
        "256M",
        "-e",
        "A=1",
        "--env-file",
        "file.env",
        "--label",
        "team=ml",
        "busybox",
    ])
    .run()
    .succeeds()
    .shows("box")
    .is_quiet();
    assert_eq!(home.status("box"), "running", "create boots and waits");
    home.msb(["exec", "box", "--", "sh", "-c", "echo $A $FROM_FILE $WITH_EQUALS; exit 7"])
        .run()
        .exits(7)
        .prints("1 yes a=b\n");

    let detail = home.inspect("box");
    assert_eq!(detail["spec"]["memory_mib"], 256, "{detail}");
    assert_eq!(detail["labels"]["team"], "ml", "{detail}");
    assert_eq!(
        detail["labels"]["org.opencontainers.image.title"], "busybox",
        "the image's labels are the base: {detail}"
    );
    let first_boot = detail["boot_id"].clone();
    assert!(first_boot.is_string(), "{detail}");

    let _ = home.msb(["exec", "box", "--", "sh", "-c", "echo kept > /root/note; rm /etc/os-release"]).run().succeeds();
    home.succeeds(&["stop", "box"]);
    assert_eq!(home.status("box"), "stopped");
    home.fails(&["exec", "box", "--", "true"], 125, "sandbox_not_running");

    home.succeeds(&["start", "box"]);
    home.msb(["exec", "box", "--", "cat", "/root/note"]).run().succeeds().prints("kept\n");
    let _ = home.msb(["exec", "box", "--", "test", "-e", "/etc/os-release"]).run().exits(1);
    assert_ne!(home.inspect("box")["boot_id"], first_boot, "each boot has an id of its own");

    home.succeeds(&["restart", "box"]);
    home.msb(["exec", "box", "--", "cat", "/root/note"]).run().succeeds().prints("kept\n");

    home.fails(&["rm", "box"], 1, "sandbox_still_running");
    home.succeeds(&["stop", "box"]);
    home.succeeds(&["rm", "box"]);
    home.fails(&["inspect", "box"], 1, "sandbox_not_found");
    home.finish();
}

#[test]
fn a_detached_run_stays_and_its_log_can_be_read_and_followed() {
    let home = Home::with_busybox("detached_web");
    let id = home.succeeds(&[
        "run",
        "-d",
        "--name",
        "web",
        "busybox",
        "--",
        "sh",
        "-c",
        "i=0; while :; do echo tick $i; i=$((i+1)); sleep 1; done",
    ]);
    assert!(!id.trim().is_empty(), "run -d tells what it started");
    let mut follow = home.msb(["logs", "-f", "web"]).start();
    follow.wait_for("tick 2");
    assert_eq!(home.status("web"), "running");

    // Stopping the follower disturbs nobody.
    follow.signal(rustix::process::Signal::INT);
    let _ = follow.finish();
    home.succeeds(&["stop", "-t", "1", "web"]);
    assert_eq!(home.status("web"), "stopped", "-d stays after its end");
    let log = home.succeeds(&["logs", "web"]);
    assert!(log.contains("tick 0\n") && log.contains("tick 2\n"), "{log}");
    home.msb(["logs", "--tail", "1", "web"]).run().succeeds().shows("tick");

    // `start` runs the workload again.
    home.succeeds(&["start", "web"]);
    assert_eq!(home.status("web"), "running");
    home.succeeds(&["rm", "--force", "web"]);
    home.finish();
}

#[test]
fn a_sandbox_starts_as_often_as_it_is_asked_to() {
    // Each run has the place of the one before it: what is left over from nine of them must not crowd the tenth out.
    let home = Home::with_busybox("many_starts");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    for _ in 0..9 {
        home.succeeds(&["restart", "-t", "0", "box"]);
    }
    home.succeeds(&["exec", "box", "--", "true"]);
    home.finish();
}

#[test]
fn the_service_starts_by_itself_and_is_found_again() {
    let home = Home::new("service_starts");
    assert!(home.running("msbd").is_empty());
    home.succeeds(&["ls"]);
    let daemon = home.daemon();
    home.succeeds(&["image", "ls"]);
    assert_eq!(home.daemon().pid, daemon.pid, "the next command found the same service");
    home.finish();
}

#[test]
fn doctor_says_which_engine_and_why() {
    let home = Home::new("doctor");
    let text = home.succeeds(&["doctor"]);
    for word in ["kvm", "qemu"] {
        assert!(text.to_lowercase().contains(word), "{text}");
    }
    let report = home.json(&["doctor"]);
    assert!(report.to_string().contains("qemu"), "{report}");
    let bundle = home.scratch().join("report.tar");
    let said = home
        .msb(["doctor", "--bundle", bundle.to_str().expect("UTF-8")])
        .env("SECRET_TOKEN", "tell-nobody")
        .run()
        .succeeds();
    let bytes = std::fs::read(&bundle).unwrap_or_else(|error| panic!("no bundle ({error}): {}", said.account()));
    assert!(!bytes.is_empty());
    assert!(!bytes.windows(11).any(|window| window == b"tell-nobody"), "the bundle holds a secret of the environment");
    home.finish();
}
