//! Snapshots of memory and forks on real guests: what ran goes on in each copy, and no two copies share what must be there only once.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use msb_tests::{Home, engine};
use rustix::process::Signal;

/// Longest wait for anything, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Writes numbers into a file, several times a second: a guest that does nothing else leaves room for its copies.
const COUNTING: &str =
    "(i=0; while :; do i=$((i+1)); echo $i > /dev/shm/mem/count; usleep 200000; done) > /dev/null 2>&1 < /dev/null &";

/// Runs `line` in a running sandbox.
fn exec(home: &Home, name: &str, line: &str) -> String {
    home.msb(["exec", name, "--", "sh", "-c", line]).run().succeeds().text()
}

/// Where the counter of a sandbox is. The file is empty for a moment each time.
fn count(home: &Home, name: &str) -> u64 {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Ok(number) = exec(home, name, "cat /dev/shm/mem/count").trim().parse() {
            return number;
        }
        assert!(Instant::now() < until, "{name} does not count");
    }
}

/// Waits until something holds.
fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// A server on the host's loopback that takes in whatever comes; how many connections it had, and its port.
fn swallowing_host() -> (Arc<AtomicUsize>, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let port = listener.local_addr().expect("its address").port();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            counted.fetch_add(1, Ordering::SeqCst);
            std::thread::spawn(move || {
                let mut bytes = [0; 512];
                while stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
            });
        }
    });
    (count, port)
}

/// Whether this engine cannot, and says so for each of its ways.
fn is_refused(home: &Home) -> bool {
    if engine() != "qemu" {
        return false;
    }
    for words in [&["snapshot", "create", "mem", "--from", "box", "--memory"][..], &["fork", "box"]] {
        let said = home.fails(words, 1, "unsupported_operation");
        assert!(said.contains("engine qemu"), "{said}");
    }
    assert_eq!(exec(home, "box", "echo still there"), "still there\n");
    home.msb(["snapshot", "ls", "--quiet"]).run().succeeds().prints("");
    true
}

#[test]
fn forks_go_on_where_their_source_is_and_share_nothing_that_must_be_unique() {
    let home = Home::with_busybox("memory");
    home.succeeds(&["create", "--name", "box", "-m", "128M", "--net", "host", "busybox"]);
    if is_refused(&home) {
        return;
    }
    // A process that counts, a file that is nowhere but in memory, one on the disk that was not flushed, a connection to the outside.
    exec(&home, "box", "mkdir /dev/shm/mem; echo kept > /dev/shm/mem/file; echo disk > /root/file");
    exec(&home, "box", COUNTING);
    let (connections, port) = swallowing_host();
    exec(
        &home,
        "box",
        &format!(
            "(while :; do echo x; usleep 300000; done | nc 172.16.0.1 {port}; echo $? > /dev/shm/mem/cut) > /dev/null 2>&1 < /dev/null &"
        ),
    );
    wait_until("the guest does not connect", || connections.load(Ordering::SeqCst) == 1);
    wait_until("it does not count", || exec(&home, "box", "cat /dev/shm/mem/count 2> /dev/null | wc -l") == "1\n");

    let names: Vec<String> =
        home.succeeds(&["fork", "box", "--count", "2", "--name", "twin"]).lines().map(String::from).collect();
    assert_eq!(names, ["twin-1", "twin-2"]);
    // The source goes on, and what it does now is its own.
    let then = count(&home, "box");
    wait_until("the source does not go on", || count(&home, "box") > then);
    exec(&home, "box", "echo later > /dev/shm/mem/file; echo later > /root/file");
    for twin in ["twin-1", "twin-2"] {
        let then = count(&home, twin);
        wait_until("a copy does not go on", || count(&home, twin) > then);
        let said = exec(&home, twin, "cat /dev/shm/mem/file /root/file; hostname; cat /etc/hostname");
        assert_eq!(said, format!("kept\ndisk\n{twin}\n{twin}\n"));
        // Its end of the connection is nobody's: it breaks, and the other end never hears of it.
        wait_until("a copy's connection lives on", || {
            exec(&home, twin, "test -e /dev/shm/mem/cut && echo cut || echo open") == "cut\n"
        });
        // New ones are its own.
        exec(&home, twin, &format!("echo hello | nc 172.16.0.1 {port}"));
    }
    assert_eq!(exec(&home, "box", "test -e /dev/shm/mem/cut && echo cut || echo open"), "open\n");
    assert_eq!(connections.load(Ordering::SeqCst), 3);

    // A copy of a copy has what its own source has.
    exec(&home, "twin-1", "echo twin > /dev/shm/mem/file");
    home.succeeds(&["fork", "twin-1", "--name", "grandchild"]);
    assert_eq!(exec(&home, "grandchild", "cat /dev/shm/mem/file /root/file"), "twin\ndisk\n");
    assert_eq!(exec(&home, "twin-2", "cat /dev/shm/mem/file"), "kept\n");
    home.msb(["snapshot", "ls", "--quiet"]).run().succeeds().prints("");

    // Nothing of these is there twice: numbers, names, runs, keys; and their clocks are right.
    let all = ["box", "twin-1", "twin-2", "grandchild"];
    let ask = |line: &str| all.iter().map(|name| exec(&home, name, line)).collect::<Vec<_>>();
    for line in [
        "cat /proc/sys/kernel/random/boot_id",
        "cat /proc/sys/kernel/random/uuid",
        "head -c 16 /dev/urandom | od -x",
        "hostname",
    ] {
        let answers = ask(line);
        assert_eq!(answers.iter().collect::<BTreeSet<_>>().len(), all.len(), "{line}: {answers:?}");
    }
    let runs: BTreeSet<String> = all.iter().map(|name| home.inspect(name)["boot_id"].to_string()).collect();
    assert_eq!(runs.len(), all.len());
    let keys: BTreeSet<String> =
        all.iter().map(|name| home.json(&["ssh", "config", name])["fingerprint"].to_string()).collect();
    assert_eq!(keys.len(), all.len(), "{keys:?}");
    for now in ask("date +%s") {
        let ours = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs();
        let theirs: u64 = now.trim().parse().expect("seconds");
        assert!(ours.abs_diff(theirs) < 60, "{ours} {theirs}");
    }
    for words in [&["fork", "box", "--count", "0"][..], &["fork", "nobody"]] {
        assert_ne!(home.msb(words).run().code(), Some(0));
    }
    home.succeeds(&["stop", "twin-2"]);
    home.fails(&["fork", "twin-2"], 1, "sandbox_not_running");
}

#[test]
fn a_snapshot_of_memory_starts_sandboxes_and_is_refused_where_it_does_not_fit() {
    let home = Home::with_busybox("memory_snapshot");
    home.succeeds(&["create", "--name", "box", "-m", "128M", "busybox"]);
    if is_refused(&home) {
        return;
    }
    exec(&home, "box", "mkdir /dev/shm/mem; echo kept > /dev/shm/mem/file; echo disk > /root/file");
    exec(&home, "box", COUNTING);
    wait_until("it does not count", || exec(&home, "box", "cat /dev/shm/mem/count 2> /dev/null | wc -l") == "1\n");
    let first = count(&home, "box");
    home.succeeds(&["snapshot", "create", "mem", "--from", "box", "--memory"]);
    assert_eq!(home.json(&["snapshot", "inspect", "mem"])["kind"], "memory");
    home.succeeds(&["snapshot", "verify", "mem"]);
    home.fails(&["snapshot", "export", "mem", "-o", "/dev/null"], 1, "unsupported_operation");
    exec(&home, "box", "echo later > /dev/shm/mem/file; echo later > /root/file");

    for (option, value) in [("-m", "256M"), ("--cpus", "2"), ("-e", "A=b")] {
        home.fails(&["create", "--snapshot", "mem", "--name", "no", option, value], 1, "invalid_config");
    }
    home.fails(&["create", "--snapshot", "mem", "--name", "no", "--no-net"], 1, "invalid_config");
    home.succeeds(&["create", "--snapshot", "mem", "--name", "one"]);
    assert_eq!(exec(&home, "one", "cat /dev/shm/mem/file /root/file; hostname"), "kept\ndisk\none\n");
    assert!(count(&home, "one") >= first);

    // A command in it is its main workload: output, exit code and end are the caller's.
    home.msb(["run", "--snapshot", "mem", "--", "sh", "-c", "cat /dev/shm/mem/file; exit 7"])
        .run()
        .exits(7)
        .prints("kept\n");
    // One that runs goes on, and is attached to.
    let serve = "i=0; while :; do i=$((i+1)); echo line $i; sleep 1; done";
    home.succeeds(&["run", "-d", "--name", "main", "-m", "128M", "busybox", "--", "sh", "-c", serve]);
    home.succeeds(&["snapshot", "create", "main", "--from", "main", "--memory"]);
    home.fails(&["run", "--snapshot", "main", "--", "true"], 125, "invalid_config");
    home.succeeds(&["run", "-d", "--snapshot", "main", "--name", "second"]);
    wait_until("the main workload of a copy is not heard of", || home.succeeds(&["logs", "second"]).contains("line "));
    home.succeeds(&["stop", "second"]);
    home.succeeds(&["rm", "-f", "main"]);

    // What another build or another processor wrote is refused in words that name what is missing.
    let state = home.path().join("snapshots/mem/machine.json");
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o600)).expect("permissions");
    let text = std::fs::read_to_string(&state).expect("the saved machine");
    let tampered = |text: String, code: &str, words: &str| {
        std::fs::write(&state, text).expect("written");
        home.msb(["snapshot", "verify", "mem"]).run().exits(1).shows("DAMAGED");
        let failed = home.msb(["create", "--snapshot", "mem", "--name", "no", "--format", "json"]).run().exits(1);
        let said = failed.complaint();
        assert!(said.contains(code) && said.contains(words), "{said}");
        home.succeeds(&["rm", "-f", "no"]);
    };
    tampered(text.replacen("\"format\":2,", "\"format\":9,", 1), "unsupported_operation", "format 9");
    tampered(text.replacen("build-id ", "build-id 00", 1), "unsupported_operation", "guest kernel is build-id 00");
    let mut machine: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let leaves = machine["vcpus"][0]["cpuid"].as_array_mut().expect("leaves");
    // Bytes, as the kernel's structure has them: function, index, flags, eax, ebx, ecx, edx.
    let leaf = leaves.iter_mut().find(|leaf| leaf[0] == 1 && leaf[1] == 0).expect("leaf 1");
    let has = (0..4).fold(0, |has, at| has | leaf[20 + at].as_u64().expect("a byte") << (8 * at));
    // Whatever this processor lacks.
    let flags = [(30, "rdrand"), (28, "avx"), (12, "fma"), (29, "f16c"), (22, "movbe"), (17, "pcid"), (7, "bit 7")];
    let (bit, flag) = flags.iter().find(|(bit, _)| has & (1 << bit) == 0).expect("a processor that lacks something");
    let with = has | 1 << bit;
    for at in 0..4 {
        leaf[20 + at] = (with >> (8 * at) & 0xff).into();
    }
    tampered(machine.to_string(), "unsupported_operation", flag);
    tampered(text[..text.len() / 2].to_owned(), "snapshot_damaged", "machine.json");
    std::fs::write(&state, &text).expect("written");
    home.succeeds(&["snapshot", "verify", "mem"]);
    flip(&home.path().join("snapshots/mem/memory.img"));
    home.msb(["snapshot", "verify", "mem"]).run().exits(1).shows("DAMAGED");

    // Gone by name, there for whoever is made of it; their disks are their own, and a restart boots from them.
    home.succeeds(&["snapshot", "rm", "mem"]);
    assert_eq!(exec(&home, "one", "cat /dev/shm/mem/file; echo own > /root/own"), "kept\n");
    home.succeeds(&["restart", "one"]);
    assert_eq!(exec(&home, "one", "cat /root/file /root/own; ls /dev/shm"), "disk\nown\n");

    // Whatever is killed on the way: no half snapshot is seen, and the source lives on.
    let before = count(&home, "box");
    for pause_ms in [100, 600, 1_500] {
        let taking = home.msb(["snapshot", "create", "half", "--from", "box", "--memory"]).start();
        std::thread::sleep(Duration::from_millis(pause_ms));
        home.daemon().signal(Signal::KILL);
        drop(taking);
        if home.succeeds(&["snapshot", "ls", "--quiet"]).contains("half\n") {
            home.succeeds(&["snapshot", "verify", "half"]);
            home.succeeds(&["snapshot", "rm", "half"]);
        }
        assert_eq!(home.status("box"), "running");
    }
    wait_until("the source does not go on", || count(&home, "box") > before);
    home.succeeds(&["stop", "box"]);
}

#[test]
fn a_template_is_warm_where_an_image_is_cold() {
    let home = Home::with_busybox("template");
    let make = |name: &str, warm: &str| {
        home.msb(["template", "create", name, "--from", "busybox", "-m", "128M", "--warm", warm]).run()
    };
    if engine() == "qemu" {
        let said = make("warm", "true").exits(1).complaint();
        assert!(said.contains("engine qemu"), "{said}");
        assert!(home.sandboxes().is_empty());
        return;
    }
    let said = make("cold", "echo no such thing >&2; exit 3").exits(1).complaint();
    assert!(said.contains("ended with 3: no such thing"), "{said}");
    make("warm", "echo warm > /dev/shm/file").succeeds().prints("warm\n");
    home.msb(["template", "ls", "--quiet"]).run().succeeds().prints("warm\n");
    assert!(home.sandboxes().is_empty(), "what it was made of stays");
    home.msb(["run", "warm", "--", "cat", "/dev/shm/file"]).run().succeeds().prints("warm\n");
    assert!(home.msb(["run", "busybox", "--", "cat", "/dev/shm/file"]).run().code() != Some(0));
    home.succeeds(&["template", "rm", "warm"]);
    home.finish();
}

#[test]
fn ready_forks_stand_by_and_become_whoever_takes_them() {
    if engine() == "qemu" {
        return;
    }
    let home = Home::with_busybox("ready_forks");
    let words =
        ["template", "create", "warm", "--from", "busybox", "-m", "128M", "--warm", "echo warm > /dev/shm/file"];
    home.succeeds(&[&words[..], &["--pool", "2"]].concat());
    let stand = |count: &str| home.succeeds(&["template", "ls"]).contains(&format!(" {count} "));
    let disks = || std::fs::read_dir(home.path().join("pool")).expect("the pool").count();
    wait_until("no ready forks", || stand("2/2"));
    assert!(home.sandboxes().is_empty(), "a ready fork is no sandbox");
    assert_eq!(disks(), 2);

    // Taken: what the template had, and an identity of its own each.
    home.succeeds(&["create", "--name", "one", "warm"]);
    home.succeeds(&["create", "--name", "two", "warm"]);
    let actors = home.succeeds(&["debug", "actors"]);
    assert!(actors.contains("2 taken"), "{actors}");
    let said = ["one", "two"].map(|name| {
        exec(
            &home,
            name,
            "cat /dev/shm/file; hostname; cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id",
        )
    });
    for (name, said) in ["one", "two"].into_iter().zip(&said) {
        assert!(said.starts_with(&format!("warm\n{name}\n")), "{said}");
        let log = home.path().join("sandboxes").join(name).join("logs/vmm.log");
        assert!(std::fs::read_to_string(log).expect("its log").contains("launch"), "its log is another's");
    }
    let drawn: std::collections::BTreeSet<&str> = said.iter().flat_map(|said| said.lines().skip(2)).collect();
    assert_eq!(drawn.len(), 4, "{said:?}");
    home.succeeds(&["rm", "-f", "one"]);
    wait_until("they are not made again", || stand("2/2"));

    // Long enough for them to be halted.
    std::thread::sleep(Duration::from_secs(15));
    // One with a workload of its own, whose output, clock and end are those of any other.
    home.succeeds(&[
        "run",
        "-d",
        "--name",
        "main",
        "warm",
        "sh",
        "-c",
        "echo said; cat /dev/shm/file; date +%s; sleep 1000",
    ]);
    wait_until("no output", || home.succeeds(&["logs", "main"]).lines().count() == 3);
    let logged = home.succeeds(&["logs", "main"]);
    let lines: Vec<&str> = logged.lines().collect();
    assert_eq!(lines[..2], ["said", "warm"]);
    let clock: u64 = lines[2].parse().expect("seconds");
    assert!(unix_seconds().abs_diff(clock) <= 30, "{clock}");
    assert!(home.succeeds(&["debug", "actors"]).contains("3 taken"));
    home.succeeds(&["stop", "main"]);
    // From now on it boots from its disk.
    home.succeeds(&["start", "main"]);
    wait_until("it does not start again", || home.succeeds(&["logs", "main"]).lines().count() >= 5);
    home.succeeds(&["rm", "-f", "main"]);
    wait_until("they are not made again", || stand("2/2"));
    // What a ready fork has not, a start makes itself.
    home.succeeds(&["create", "--name", "published", "-p", "0:80", "warm"]);
    assert_eq!(exec(&home, "published", "cat /dev/shm/file"), "warm\n");
    assert!(home.succeeds(&["debug", "actors"]).contains("3 taken"));
    home.succeeds(&["rm", "-f", "published"]);

    // They end with the service, however it ends; the next one sweeps and makes its own.
    home.daemon().signal(Signal::KILL);
    wait_until("no ready forks of the next service", || stand("2/2"));
    assert_eq!(disks(), 2);
    assert_eq!(exec(&home, "two", "cat /dev/shm/file"), "warm\n");
    home.succeeds(&["template", "rm", "warm"]);
    wait_until("disks of a template that is gone", || disks() == 0);
    home.succeeds(&["rm", "-f", "two"]);
    home.finish();
}

fn unix_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Turns one bit of the first page that has data.
fn flip(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("permissions");
    let file = std::fs::File::options().read(true).write(true).open(path).expect("the file");
    let place = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).expect("data");
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).expect("read");
    file.write_all_at(&[byte[0] ^ 1], place).expect("written");
}
