//! The service of the host: one door for the users of group msb.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use crate::Next;
use crate::machine::{
    ANN, BOB, CARL, Session, drop_in, group, inspect, lives, load, msb, process, processes, property, run, sleeper,
    succeeds, try_msb, wait_until,
};

const SOCKET: &str = "/run/msb/msbd.sock";

pub(crate) fn two_users_share_a_host(_: u32) -> Next {
    let began = Instant::now();
    succeeds("systemctl", &["enable", "--now", "msbd.socket", "msbd.service"]);
    let socket = std::fs::metadata(SOCKET).expect("the socket");
    let members = succeeds("getent", &["group", "msb"]);
    assert_eq!(members.trim().split(':').nth(2), Some(socket.gid().to_string().as_str()), "{members}");
    assert_eq!((socket.uid(), socket.mode() & 0o777), (0, 0o660));
    for unit in ["msbd.socket", "msbd.service", "msb-flush.service"] {
        assert_eq!(property(unit, "ActiveState"), "active", "{unit}");
    }

    load(ANN);
    sleeper(ANN, "box", &[]);
    assert_eq!(msb(ANN, &["exec", "box", "--", "echo", "hello"]), "hello\n");
    println!("from the installed package to hello: {:.1} s", began.elapsed().as_secs_f64());
    load(BOB);
    assert_eq!(msb(BOB, &["run", "--rm", "busybox", "echo", "of bob"]), "of bob\n");
    for words in [&["inspect", "box"][..], &["exec", "box", "--", "id"], &["stop", "box"], &["rm", "-f", "box"]] {
        let words: Vec<&str> = ["--format", "json"].iter().chain(words).copied().collect();
        let output = try_msb(BOB, &words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("sandbox_not_found"), "{words:?}: {said}");
    }
    // Who may not knock is not let in.
    let direct = ["--reuid", CARL, "--regid", CARL, "--init-groups", "--", "env", "MSB_HOST=/run/msb/msbd.sock"];
    let words: Vec<&str> = direct.iter().chain(&["msb", "--format", "json", "ls"]).copied().collect();
    let output = run("setpriv", &words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("permission_denied"), "{said}");
    // Whose the machine is.
    let machine = std::fs::metadata(format!("/proc/{}", process(ANN, "box"))).expect("the machine's process");
    assert_eq!(succeeds("id", &["-u", ANN]).trim(), machine.uid().to_string());
    let boot = inspect(ANN, "box")["boot_id"].clone();
    let scope = format!("/msb.slice/msb-{}.scope", boot.as_str().expect("a boot id"));
    assert_eq!(group(process(ANN, "box")), scope);
    Next::Go
}

pub(crate) fn machines_have_scopes_and_outlive_the_service(_: u32) -> Next {
    sleeper(ANN, "second", &[]);
    let (first, second) = (process(ANN, "box"), process(ANN, "second"));
    let boot = inspect(ANN, "box")["boot_id"].clone();
    assert_ne!(group(first), group(second));

    let session = Session::open(ANN, "box");
    succeeds("systemctl", &["restart", "msbd.service"]);
    still_there("a restart", (first, second));
    println!("a session over a restart: {}", session.fate());
    let front = property("msbd.service", "MainPID");
    let session = Session::open(ANN, "box");
    succeeds("kill", &["-KILL", &front]);
    wait_until("systemd starts the service again", || {
        property("msbd.service", "ActiveState") == "active" && property("msbd.service", "MainPID") != front
    });
    still_there("a kill of the front door", (first, second));
    println!("a session over a kill of the front door: {}", session.fate());
    let before = service_of_ann();
    let session = Session::open(ANN, "box");
    succeeds("kill", &["-KILL", &before.to_string()]);
    // Nobody has to ask for it to come back.
    wait_until("her service is started again", || processes("msbd", Some(ANN)).iter().any(|pid| *pid != before));
    println!("a session over a kill of her service: {}", session.fate());
    still_there("a kill of her service", (first, second));
    assert_eq!(inspect(ANN, "box")["boot_id"], boot);
    let place = format!("/sys/fs/cgroup{}", group(second));
    assert!(Path::new(&place).exists(), "{place}");
    msb(ANN, &["rm", "-f", "second"]);
    wait_until("the scope of a sandbox that is gone goes", || !Path::new(&place).exists());
    Next::Go
}

/// The process of her service, once it serves.
#[track_caller]
fn service_of_ann() -> u32 {
    wait_until("her service runs", || processes("msbd", Some(ANN)).len() == 1);
    assert_eq!(msb(ANN, &["exec", "box", "--", "echo", "on"]), "on\n");
    let found = processes("msbd", Some(ANN));
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]
}

#[track_caller]
fn still_there(after: &str, machines: (u32, u32)) {
    let began = Instant::now();
    assert_eq!(msb(ANN, &["exec", "box", "--", "echo", "on"]), "on\n", "after {after}");
    println!("after {after}: exec answers after {:.2} s", began.elapsed().as_secs_f64());
    assert_eq!((process(ANN, "box"), process(ANN, "second")), machines, "after {after}");
}

pub(crate) fn the_slice_is_stopped_with_a_flush(_: u32) -> Next {
    let machine = process(ANN, "box");
    msb(ANN, &["exec", "box", "--", "sh", "-c", "echo written just before > /root/note"]);
    let began = Instant::now();
    succeeds("systemctl", &["stop", "msb.slice"]);
    println!("the slice is stopped after {:.1} s", began.elapsed().as_secs_f64());
    assert!(!lives(machine), "the machine goes on");
    wait_until("the sandbox rests", || inspect(ANN, "box")["status"] == "stopped");
    msb(ANN, &["start", "box"]);
    assert_eq!(msb(ANN, &["exec", "box", "--", "cat", "/root/note"]), "written just before\n");
    // What stops them the next time is there again.
    wait_until("the flush stands ready again", || property("msb-flush.service", "ActiveState") == "active");
    Next::Go
}

pub(crate) fn a_service_that_hangs_is_replaced(_: u32) -> Next {
    drop_in("msbd.service", "system", "[Service]\nWatchdogSec=5s\n");
    succeeds("systemctl", &["daemon-reload"]);
    succeeds("systemctl", &["restart", "msbd.service"]);
    let machine = process(ANN, "box");
    let front = property("msbd.service", "MainPID");
    succeeds("kill", &["-STOP", &front]);
    let took = wait_until("systemd replaces the front door", || {
        let now = property("msbd.service", "MainPID");
        now != front && now != "0" && property("msbd.service", "ActiveState") == "active"
    });
    println!("a front door that hangs is replaced after {:.1} s", took.as_secs_f64());
    // The new door starts her service anew, too.
    let own = service_of_ann();
    succeeds("kill", &["-STOP", &own.to_string()]);
    let took = wait_until("her service is replaced", || {
        let now = processes("msbd", Some(ANN));
        !now.is_empty() && !now.contains(&own)
    });
    println!("a user's service that hangs is replaced after {:.1} s", took.as_secs_f64());
    assert_eq!(msb(ANN, &["exec", "box", "--", "echo", "on"]), "on\n");
    assert_eq!(process(ANN, "box"), machine);
    Next::Go
}

pub(crate) fn a_boot_brings_back_what_was_asked_for(part: u32) -> Next {
    if part == 0 {
        // One processor carries no more than a few machines.
        msb(ANN, &["rm", "-f", "box"]);
        sleeper(ANN, "paused", &["--restart", "unless-stopped"]);
        msb(ANN, &["stop", "paused"]);
        sleeper(ANN, "always", &["--restart", "always"]);
        sleeper(ANN, "unless", &["--restart", "unless-stopped"]);
        sleeper(ANN, "never", &["--restart", "no"]);
        msb(ANN, &["exec", "always", "--", "sh", "-c", "echo written before the boot > /root/note"]);
        return Next::Boot(1);
    }
    // Nobody but systemd has started anything.
    wait_until("the machines of a boot before are there again", || processes("msb-vmm", Some(ANN)).len() >= 2);
    for (name, status) in [("always", "running"), ("unless", "running"), ("paused", "stopped"), ("never", "stopped")] {
        wait_until(format!("{name} is {status}"), || inspect(ANN, name)["status"] == status);
    }
    assert_eq!(msb(ANN, &["exec", "always", "--", "cat", "/root/note"]), "written before the boot\n");
    Next::Go
}

pub(crate) fn removal_leaves_nothing(_: u32) -> Next {
    succeeds("dpkg", &["--purge", "msb"]);
    for program in ["msbd", "msb-vmm"] {
        wait_until(format!("no {program} runs"), || processes(program, None).is_empty());
    }
    for path in [
        "/usr/bin/msb",
        "/usr/bin/msbd",
        "/usr/share/msb",
        "/usr/lib/systemd/system/msbd.service",
        "/etc/systemd/system/multi-user.target.wants/msbd.service",
        "/etc/systemd/system/sockets.target.wants/msbd.socket",
        "/run/msb",
        "/var/lib/msb",
    ] {
        assert!(std::fs::symlink_metadata(path).is_err(), "{path} is left");
    }
    let units = succeeds("systemctl", &["list-units", "--all", "--plain", "--no-legend", "msb*"]);
    assert!(!units.contains("active running"), "{units}");
    Next::Go
}
