//! `kill -9` of anything at any moment: afterwards the commands tell the truth and nothing is orphaned.

use std::time::Duration;

use msb_tests::Home;
use rustix::process::Signal;

#[test]
fn a_killed_daemon_leaves_its_machines_running_and_is_replaced() {
    let home = Home::with_busybox("killed_daemon");
    home.succeeds(&[
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
    let boot = home.inspect("web")["boot_id"].clone();
    let machine = home.running("msb-vmm");
    let running = home.msb(["exec", "web", "--", "sleep", "600"]).start();
    std::thread::sleep(Duration::from_secs(2));
    home.daemon().signal(Signal::KILL);
    // The session that went through the daemon ends with a clear error and msb's own code.
    let lost = running.finish().exits(125);
    assert!(!lost.stderr.is_empty(), "{}", lost.account());
    // The next command starts a daemon, which finds the machine as it was.
    assert_eq!(home.status("web"), "running");
    assert_eq!(home.inspect("web")["boot_id"], boot, "it was started again instead of adopted");
    assert_eq!(
        home.running("msb-vmm").iter().map(|process| process.pid).collect::<Vec<_>>(),
        machine.iter().map(|process| process.pid).collect::<Vec<_>>()
    );
    home.msb(["exec", "web", "--", "echo", "back"]).run().succeeds().prints("back\n");
    // Its log has no hole: the machine's own process wrote it all the time.
    std::thread::sleep(Duration::from_secs(2));
    let log = home.succeeds(&["logs", "web"]);
    let numbers: Vec<u32> = log.lines().filter_map(|line| line.strip_prefix("tick ")?.parse().ok()).collect();
    assert!(numbers.iter().copied().eq(0..u32::try_from(numbers.len()).expect("few")), "{log}");
    home.succeeds(&["stop", "-t", "1", "web"]);
    assert_eq!(home.status("web"), "stopped");
    home.finish();
}

#[test]
fn a_workload_that_ends_while_no_daemon_is_there_is_told_afterwards() {
    let home = Home::with_busybox("ended_alone");
    home.succeeds(&["run", "-d", "--name", "job", "busybox", "--", "sh", "-c", "sleep 4; exit 5"]);
    home.daemon().signal(Signal::KILL);
    home.wait_for_no_machine();
    let end = home.inspect("job")["last_end"].clone();
    assert_eq!((end["cause"].as_str(), end["process"]["code"].as_i64()), (Some("completed"), Some(5)), "{end}");
    home.finish();
}

#[test]
fn a_killed_machine_is_a_crash_of_one_sandbox() {
    let home = Home::with_busybox("killed_machine");
    home.succeeds(&["create", "--name", "good", "busybox"]);
    home.succeeds(&["create", "--name", "bad", "--restart", "no", "busybox"]);
    let pid = home.inspect("bad")["vmm_pid"].as_i64().expect("a process id");
    home.running("msb-vmm")
        .iter()
        .find(|process| i64::from(process.pid) == pid)
        .expect("the machine")
        .signal(Signal::KILL);
    home.wait_until("bad", "crashed");
    let end = home.inspect("bad")["last_end"].clone();
    assert_eq!(end["cause"], "vmm_crash", "{end}");
    home.msb(["exec", "good", "--", "echo", "on"]).run().succeeds().prints("on\n");
    // No engine process outlives its owner.
    assert_eq!(home.running("msb-vmm").len(), 1);
    assert!(
        home.processes().iter().filter(|process| process.program.starts_with("qemu-system")).count() <= 1,
        "{:?}",
        home.processes()
    );
    home.succeeds(&["start", "bad"]);
    home.msb(["exec", "bad", "--", "echo", "again"]).run().succeeds().prints("again\n");
    home.finish();
}

#[test]
fn a_killed_client_takes_its_ephemeral_sandbox_with_it() {
    let home = Home::with_busybox("killed_client");
    let mut running = home.msb(["run", "busybox", "--", "sh", "-c", "echo up; sleep 600"]).start();
    running.wait_for("up");
    running.signal(Signal::KILL);
    drop(running.finish());
    home.wait_for_no_machine();
    for _ in 0..50 {
        if home.sandboxes().is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(home.sandboxes(), [""; 0]);
    home.finish();
}

#[test]
fn anything_killed_at_any_moment_of_a_run_leaves_the_truth() {
    let home = Home::with_busybox("killed_anywhere");
    // Moments spread over a boot: before, during and after the machine's start, the agent's hello, the workload.
    for (round, delay) in [40, 150, 400, 800, 1300, 2000, 3000].into_iter().enumerate() {
        let victim = ["msb", "msbd", "msb-vmm"][round % 3];
        let name = format!("victim{round}");
        let running = home.msb(["run", "--name", &name, "busybox", "--", "sleep", "2"]).start();
        std::thread::sleep(Duration::from_millis(delay));
        for process in home.processes().into_iter().filter(|process| process.program == victim) {
            process.signal(Signal::KILL);
        }
        drop(running.finish());
        // Whatever it is, it comes to rest, can be removed, and the next one works.
        if home.sandboxes().contains(&name) {
            home.succeeds(&["rm", "--force", &name]);
        }
    }
    home.wait_for_no_machine();
    assert_eq!(home.sandboxes(), [""; 0]);
    home.msb(["run", "busybox", "echo", "fine"]).run().succeeds().prints("fine\n");
    home.finish();
}

#[test]
fn a_load_killed_halfway_leaves_the_store_sound() {
    let home = Home::new("killed_load");
    let archive = msb_tests::python_image().unwrap_or_else(|| msb_tests::image("busybox.tar"));
    let archive = archive.to_str().expect("UTF-8");
    home.succeeds(&["ls"]);
    for (delay, victim) in [(50, "msb"), (200, "msbd"), (500, "msb"), (900, "msbd")] {
        let running = home.msb(["image", "load", "-i", archive]).start();
        std::thread::sleep(Duration::from_millis(delay));
        for process in home.processes().into_iter().filter(|process| process.program == victim) {
            process.signal(Signal::KILL);
        }
        drop(running.finish());
        home.succeeds(&["doctor", "--store"]);
    }
    home.succeeds(&["image", "load", "-i", archive]);
    home.finish();
}
