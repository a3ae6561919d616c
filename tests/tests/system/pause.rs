//! Pauses on real guests: engine kvm halts one where it is; engine qemu says that it cannot.

use std::time::Duration;

use msb_tests::{Home, engine};
use rustix::process::Signal;

/// Runs `line` in a running sandbox.
fn exec(home: &Home, name: &str, line: &str) -> String {
    home.msb(["exec", name, "--", "sh", "-c", line]).run().succeeds().text()
}

#[test]
fn a_paused_sandbox_stands_still_and_goes_on_where_it_was() {
    let home = Home::with_busybox("pause");
    home.succeeds(&["create", "--name", "box", "-m", "128M", "busybox"]);
    if engine() == "qemu" {
        let said = home.fails(&["pause", "box"], 1, "unsupported_operation");
        assert!(said.contains("engine qemu"), "{said}");
        assert_eq!(home.status("box"), "running");
        assert_eq!(exec(&home, "box", "echo still there"), "still there\n");
        return;
    }
    // A loop in the guest writes where it is: it must stand while the sandbox does.
    exec(&home, "box", "(i=0; while :; do i=$((i+1)); echo $i > /tmp/count; done) > /dev/null 2>&1 < /dev/null &");
    let count = |home: &Home| exec(home, "box", "cat /tmp/count").trim().parse::<u64>().unwrap_or_default();
    let boot = home.inspect("box")["boot_id"].clone();
    for _ in 0..3 {
        assert_eq!(home.succeeds(&["pause", "box"]), "box\n");
        assert_eq!(home.status("box"), "paused");
        home.fails(&["exec", "box", "--", "true"], 125, "sandbox_paused");
        home.fails(&["start", "box"], 1, "sandbox_paused");
        home.fails(&["rm", "box"], 1, "sandbox_still_running");
        let used = || home.json(&["metrics", "box"])["sandboxes"][0]["sample"]["cpu_time_us"].as_u64();
        // Longer than beats may be missed; samples come each second.
        std::thread::sleep(Duration::from_secs(4));
        let before = used();
        std::thread::sleep(Duration::from_secs(4));
        assert_eq!(home.status("box"), "paused");
        assert_eq!(used(), before, "a halted vCPU uses no time");
        assert_eq!(home.succeeds(&["resume", "box"]), "box\n");
        assert_eq!(home.inspect("box")["boot_id"], boot);
        // A count is empty while the loop writes the next one.
        let first = count(&home);
        assert!((0..60).any(|_| count(&home) > first), "the loop does not go on");
    }
    // A service that comes back finds it as it was; a stop lets it go on, so that it can flush.
    exec(&home, "box", "echo kept > /root/file");
    home.succeeds(&["pause", "box"]);
    home.daemon().signal(Signal::KILL);
    assert_eq!(home.status("box"), "paused");
    home.succeeds(&["stop", "box"]);
    let end = home.inspect("box")["last_end"].clone();
    assert_eq!(end["cause"], "stop_requested", "{end}");
    home.succeeds(&["start", "box"]);
    assert_eq!(exec(&home, "box", "cat /root/file"), "kept\n");
}
