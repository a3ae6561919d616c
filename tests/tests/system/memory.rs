//! Snapshots of memory and forks on real guests: what ran goes on in each copy, and no two copies share what must be there only once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use msb_tests::{Home, engine};
use rustix::process::Signal;

/// Runs `line` in a running sandbox.
fn exec(home: &Home, name: &str, line: &str) -> String {
    home.msb(["exec", name, "--", "sh", "-c", line]).run().succeeds().text()
}

#[test]
fn forks_go_on_where_their_source_is_and_share_nothing_that_must_be_unique() {
    let home = Home::with_busybox("memory");
    home.succeeds(&["create", "--name", "box", "-m", "128M", "busybox"]);
    if engine() == "qemu" {
        for words in [&["snapshot", "create", "mem", "--from", "box", "--memory"][..], &["fork", "box"]] {
            let said = home.fails(words, 1, "unsupported_operation");
            assert!(said.contains("engine qemu"), "{said}");
        }
        assert_eq!(exec(&home, "box", "echo still there"), "still there\n");
        home.msb(["snapshot", "ls", "--quiet"]).run().succeeds().prints("");
        return;
    }
    // A process that counts, a file that is nowhere but in memory, one on the disk that was not flushed.
    exec(&home, "box", "mkdir /dev/shm/mem; echo kept > /dev/shm/mem/file; echo disk > /root/file");
    exec(
        &home,
        "box",
        "(i=0; while :; do i=$((i+1)); echo $i > /dev/shm/mem/count; usleep 10000; done) > /dev/null 2>&1 < /dev/null &",
    );
    let count = |name: &str| exec(&home, name, "cat /dev/shm/mem/count").trim().parse::<u64>().unwrap_or_default();
    let first = count("box");

    home.succeeds(&["snapshot", "create", "mem", "--from", "box", "--memory"]);
    let detail = home.json(&["snapshot", "inspect", "mem"]);
    assert_eq!(detail["kind"], "memory");
    home.msb(["snapshot", "verify", "mem"]).run().succeeds();
    home.fails(&["snapshot", "export", "mem", "-o", "/dev/null"], 1, "unsupported_operation");
    // The source goes on, and what it does now is not the snapshot's.
    assert!(count("box") > first);
    exec(&home, "box", "echo later > /dev/shm/mem/file; echo later > /root/file; touch /dev/shm/mem/gone");

    home.fails(&["create", "--snapshot", "mem", "--name", "no", "-m", "256M"], 1, "invalid_config");
    home.fails(&["create", "--snapshot", "mem", "--name", "no", "--no-net"], 1, "invalid_config");
    home.succeeds(&["create", "--snapshot", "mem", "--name", "one"]);
    assert_eq!(
        exec(&home, "one", "cat /dev/shm/mem/file /root/file; ls /dev/shm/mem; hostname"),
        "kept\ndisk\ncount\nfile\none\n"
    );
    let then = count("one");
    assert!(then >= first, "{then} {first}");
    let until = Instant::now() + Duration::from_secs(60);
    while count("one") <= then && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
    }
    assert!(count("one") > then, "the process does not go on");

    let names: Vec<String> =
        home.succeeds(&["fork", "box", "--count", "2", "--name", "twin"]).lines().map(String::from).collect();
    assert_eq!(names, ["twin-1", "twin-2"]);
    // A fork of a fork: it has what its own source has, not what the first one had.
    exec(&home, "twin-1", "echo twin > /dev/shm/mem/file");
    home.succeeds(&["fork", "twin-1", "--name", "grandchild"]);
    assert_eq!(exec(&home, "grandchild", "cat /dev/shm/mem/file /root/file"), "twin\nlater\n");
    assert_eq!(exec(&home, "twin-2", "cat /dev/shm/mem/file"), "later\n");
    home.msb(["snapshot", "ls", "--quiet"]).run().succeeds().prints("mem\n");

    // Nothing of these is there twice: numbers, names, runs, the wall clock agrees with ours.
    let all = ["box", "one", "twin-1", "twin-2", "grandchild"];
    let ask = |line: &str| all.iter().map(|name| exec(&home, name, line)).collect::<Vec<_>>();
    for line in ["cat /proc/sys/kernel/random/uuid", "head -c 16 /dev/urandom | od -x", "hostname"] {
        let answers = ask(line);
        assert_eq!(answers.iter().collect::<BTreeSet<_>>().len(), all.len(), "{line}: {answers:?}");
    }
    let runs: BTreeSet<String> = all.iter().map(|name| home.inspect(name)["boot_id"].to_string()).collect();
    assert_eq!(runs.len(), all.len());
    for now in ask("date +%s") {
        let ours = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs();
        let theirs: u64 = now.trim().parse().expect("seconds");
        assert!(ours.abs_diff(theirs) < 60, "{ours} {theirs}");
    }

    // Gone by name, there for whoever is made of it; their disks are their own, and a restart boots from them.
    home.succeeds(&["snapshot", "rm", "mem"]);
    assert_eq!(exec(&home, "one", "cat /dev/shm/mem/file"), "kept\n");
    exec(&home, "one", "echo own > /root/own");
    home.succeeds(&["restart", "one"]);
    assert_eq!(exec(&home, "one", "cat /root/file /root/own; ls -d /dev/shm/mem/file 2>&1 | wc -l"), "disk\nown\n1\n");

    // Whatever is killed on the way: no half snapshot is seen, and the source lives on.
    let before = count("box");
    let taking = home.msb(["snapshot", "create", "half", "--from", "box", "--memory"]).start();
    std::thread::sleep(Duration::from_millis(300));
    home.daemon().signal(Signal::KILL);
    drop(taking);
    home.msb(["snapshot", "ls", "--quiet"]).run().succeeds();
    assert_eq!(home.status("box"), "running");
    exec(&home, "box", "true");
    assert!(count("box") > before);
    home.succeeds(&["stop", "box"]);
}
