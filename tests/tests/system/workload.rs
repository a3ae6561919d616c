//! What a sandbox runs: the image's entrypoint and command, its user, folder, environment, volumes and stop signal.

use msb_tests::Home;

#[test]
fn an_images_own_settings_are_used_and_can_be_overridden() {
    let home = Home::new("image_settings");
    home.load("app.tar");
    home.msb(["run", "app:1"])
        .run()
        .succeeds()
        .prints("entry: default words\nuser 1000:1000 in /srv/app with hello from the image\n");
    home.msb(["run", "app:1", "exit", "9"]).run().exits(9).prints("entry: exit 9\n");
    home.msb(["run", "-u", "0", "-w", "/", "-e", "GREETING=hi", "app:1", "--", "x"])
        .run()
        .succeeds()
        .prints("entry: x\nuser 0:0 in / with hi\n");
    home.msb(["run", "--entrypoint", "/bin/echo", "app:1", "instead"]).run().succeeds().prints("instead\n");
    home.finish();
}

#[test]
fn stop_sends_the_images_stop_signal_and_flushes() {
    let home = Home::new("stop_signal");
    home.load("app.tar");
    home.succeeds(&["run", "-d", "--name", "app", "app:1", "serve"]);
    let mut follow = home.msb(["logs", "-f", "app"]).start();
    follow.wait_for("serving");
    // exec does not run the entrypoint, and the volume has the image's files.
    home.msb(["exec", "app", "--", "cat", "/data/from-image"])
        .run()
        .succeeds()
        .prints("an image may have files under its volume\n");
    home.succeeds(&["stop", "app"]);
    let _ = follow.finish();
    let end = home.inspect("app")["last_end"].clone();
    assert_eq!(end["cause"], "stop_requested", "{end}");
    assert_eq!(end["process"]["code"], 0, "the trap ran: {end}");
    home.succeeds(&["start", "app"]);
    home.msb(["exec", "app", "--", "cat", "/data/stopped"]).run().succeeds().prints("stopped by SIGUSR1\n");
    home.finish();
}

#[test]
fn the_workloads_end_is_the_sandboxes_end() {
    let home = Home::with_busybox("workload_end");
    home.succeeds(&["run", "-d", "--name", "short", "busybox", "--", "sh", "-c", "echo bye; exit 5"]);
    home.wait_until("short", "stopped");
    let end = home.inspect("short")["last_end"].clone();
    assert_eq!((end["cause"].as_str(), end["process"]["code"].as_i64()), (Some("completed"), Some(5)), "{end}");
    home.msb(["logs", "short"]).run().succeeds().prints("bye\n");
    home.wait_for_no_machine();

    // A named attached run stays; --rm removes it; its exit code is the command's.
    let _ = home.msb(["run", "--name", "named", "busybox", "false"]).run().exits(1);
    let _ = home.msb(["run", "--rm", "--name", "removed", "busybox", "--", "sh", "-c", "exit 3"]).run().exits(3);
    home.wait_for_no_machine();
    let mut names = home.sandboxes();
    names.sort();
    assert_eq!(names, ["named", "short"]);
    home.finish();
}

#[test]
fn a_signal_an_out_of_memory_kill_and_a_timeout_are_told_apart() {
    let home = Home::with_busybox("told_apart");
    let _ = home.msb(["run", "--name", "signal", "busybox", "--", "sh", "-c", "kill -9 $$"]).run().exits(137);
    let _ = home.msb(["run", "--name", "slow", "--timeout", "1s", "busybox", "sleep", "600"]).run().exits(124);
    let _ = home
        .msb(["run", "--name", "hungry", "-m", "128M", "busybox", "--", "sh", "-c", "tail /dev/zero"])
        .run()
        .exits(137);
    let process = |name: &str| home.inspect(name)["last_end"]["process"].clone();
    let (signal, slow, hungry) = (process("signal"), process("slow"), process("hungry"));
    assert_eq!(signal["signal"], 9, "{signal}");
    assert_eq!(signal["oom_killed"], false, "{signal}");
    assert_eq!(slow["timed_out"], true, "{slow}");
    assert_eq!(hungry["oom_killed"], true, "{hungry}");
    assert_eq!(
        home.inspect("hungry")["last_end"]["cause"],
        "completed",
        "the guest and its agent outlive the workload's memory"
    );
    home.finish();
}
