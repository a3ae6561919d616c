//! Sleep with memory on real guests: what ran goes on where it was, whoever comes wakes it, and no crash of the service makes two of it.

use std::io::Read;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use msb_tests::{Home, engine};
use rustix::process::Signal;

/// Longest wait for anything, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `line` in a sandbox, which wakes it.
fn exec(home: &Home, name: &str, line: &str) -> String {
    home.msb(["exec", name, "--", "sh", "-c", line]).run().succeeds().text()
}

/// What is kept of the sandbox's memory.
fn kept(home: &Home, name: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(home.path().join("sandboxes").join(name)).expect("its folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("memory-"))).collect()
}

/// It is awake, or at rest, and nothing is left of the memory that it slept with.
fn until_none_is_kept(home: &Home, name: &str) {
    let until = Instant::now() + PATIENCE;
    while !kept(home, name).is_empty() {
        if home.status(name) == "asleep" {
            exec(home, name, "true");
        }
        assert!(Instant::now() < until, "{:?} stays", kept(home, name));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What the server in the guest answers to one connection of its published port; nothing if it was not listening.
fn visit(home: &Home, name: &str) -> String {
    let port = home.inspect(name)["ports"][0].as_str().expect("a port").to_owned();
    let mut answer = String::new();
    let asked = TcpStream::connect(port.trim_end_matches(":80")).and_then(|mut stream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read_to_string(&mut answer)
    });
    if let Err(error) = asked {
        println!("{port}: {error}");
    }
    answer
}

fn told(home: &Home, kind: &str) -> usize {
    home.succeeds(&["events", "--format", "json"]).lines().filter(|line| line.contains(&format!("\"{kind}\""))).count()
}

#[test]
fn a_sandbox_sleeps_with_its_memory_and_goes_on_where_it_was() {
    let home = Home::with_busybox("suspend");
    let idle = ["--idle-timeout", "4s", "--on-idle", "suspend"];
    let create = |name: &str, more: &[&str]| {
        let words = [&["create", "--name", name, "-m", "128M"], &idle[..], more].concat();
        home.msb(words).run()
    };
    let said = create("no", &["-v", "/etc:/host:ro", "busybox"]).exits(1).complaint();
    if engine() == "qemu" {
        assert!(said.contains("engine qemu"), "{said}");
        home.fails(&[&["create"], &idle[..], &["busybox"]].concat(), 1, "unsupported_operation");
        assert!(home.sandboxes().is_empty());
        return home.finish();
    }
    assert!(said.contains("/etc on /host"), "{said}");
    // A server that knows how often it was asked, nowhere but in its memory.
    let serve =
        "i=0; while :; do i=$((i+1)); echo visit $i > /dev/shm/answer; nc -l -p 80 -e cat /dev/shm/answer; done";
    let _ = create("web", &["-p", "0:80", "busybox", "--", "sh", "-c", serve]).succeeds();
    exec(&home, "web", "echo kept > /dev/shm/file; echo disk > /root/file");
    let until = Instant::now() + PATIENCE;
    while visit(&home, "web") != "visit 1\n" {
        assert!(Instant::now() < until, "nobody listens");
        std::thread::sleep(Duration::from_millis(200));
    }
    let ran = exec(&home, "web", "cat /proc/sys/kernel/random/boot_id");
    home.wait_until("web", "asleep");
    assert_eq!(kept(&home, "web").len(), 1);
    assert!(home.inspect("web")["memory_allocated_bytes"].as_u64() > Some(1 << 20));
    home.wait_for_no_machine();
    // A connection waits and is answered by what ran before; the same for an exec, after another sleep.
    assert_eq!(visit(&home, "web"), "visit 2\n");
    assert_eq!(exec(&home, "web", "cat /dev/shm/file /root/file; date +%s > /root/file; sync"), "kept\ndisk\n");
    until_none_is_kept(&home, "web");
    assert_ne!(exec(&home, "web", "cat /proc/sys/kernel/random/boot_id"), ran);
    home.wait_until("web", "asleep");
    assert_eq!(exec(&home, "web", "cat /dev/shm/file"), "kept\n");
    // What is the matter with it is told, and it boots from its disk.
    home.wait_until("web", "asleep");
    let state = kept(&home, "web").remove(0).join("machine.json");
    let text = std::fs::read_to_string(&state).expect("the saved machine");
    std::fs::write(&state, text.replacen("build-id ", "build-id 00", 1)).expect("written");
    assert_eq!(
        exec(&home, "web", "test -e /dev/shm/file || echo fresh; test -s /root/file && echo there"),
        "fresh\nthere\n"
    );
    until_none_is_kept(&home, "web");
    assert_eq!(told(&home, "memory_lost"), 1);
    // A stop forgets it.
    home.wait_until("web", "asleep");
    home.succeeds(&["stop", "web"]);
    until_none_is_kept(&home, "web");
    assert_eq!(home.status("web"), "stopped");

    // The service is killed while it suspends and while it wakes, at any moment: the sandbox is there afterwards, once, with its memory
    // or from its disk, and nothing half of it is left.
    let _ = create("box", &["busybox"]).succeeds();
    for (number, wakes) in [(1, false), (2, true), (3, false), (4, true), (5, false), (6, true)] {
        exec(&home, "box", &format!("echo {number} > /dev/shm/file; echo {number} > /root/file; sync"));
        if wakes {
            home.wait_until("box", "asleep");
            let waking = home.msb(["exec", "box", "--", "true"]).start();
            std::thread::sleep(Duration::from_millis(20 * number));
            home.daemon().signal(Signal::KILL);
            drop(waking);
        } else {
            std::thread::sleep(Duration::from_millis(4_000 + 30 * number));
            home.daemon().signal(Signal::KILL);
        }
        let found = exec(&home, "box", "cat /root/file; test ! -e /dev/shm/file || cat /dev/shm/file");
        let number = format!("{number}\n");
        assert!(found == number || found == number.repeat(2), "{found}");
        assert_eq!(home.running("msb-vmm").len(), 1);
        until_none_is_kept(&home, "box");
    }
    home.succeeds(&["rm", "-f", "box", "web"]);
    home.finish();
}

#[test]
fn without_room_for_its_memory_a_sandbox_goes_on() {
    if engine() == "qemu" {
        return;
    }
    let Some(home) = Home::on_small_disk("suspend_full", 40) else { return };
    home.load("busybox.tar");
    home.succeeds(&[
        "create",
        "--name",
        "box",
        "-m",
        "128M",
        "--idle-timeout",
        "4s",
        "--on-idle",
        "suspend",
        "busybox",
    ]);
    exec(&home, "box", "head -c 31457280 /dev/urandom > /dev/shm/file && echo kept > /dev/shm/word");
    let until = Instant::now() + PATIENCE;
    while told(&home, "suspend_failed") == 0 {
        assert!(Instant::now() < until, "it is not told that there is no room");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(exec(&home, "box", "cat /dev/shm/word"), "kept\n");
    until_none_is_kept(&home, "box");
    home.fails(&["snapshot", "create", "mem", "--from", "box", "--memory"], 1, "disk_full");
    assert_eq!(exec(&home, "box", "cat /dev/shm/word; echo more > /root/file; cat /root/file"), "kept\nmore\n");
    home.msb(["snapshot", "ls", "--quiet"]).run().succeeds().prints("");
    home.succeeds(&["rm", "-f", "box"]);
    home.finish();
}
