//! What a workload finds around it: what a container user expects, and nothing that would let it out.

use msb_tests::Home;

#[test]
fn the_root_the_mounts_and_the_names_are_a_containers() {
    let home = Home::with_busybox("inside");
    home.succeeds(&["create", "--name", "box", "-c", "2", "-m", "256M", "busybox"]);
    let exec = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run().succeeds().text();

    let mounts = exec("cat /proc/mounts");
    for (place, kind) in [
        ("/", "overlay"),
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev/shm", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/mqueue", "mqueue"),
        ("/sys/fs/cgroup", "cgroup2"),
    ] {
        let found = mounts.lines().any(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            words.get(1) == Some(&place) && words.get(2) == Some(&kind)
        });
        assert!(found, "no {kind} on {place}:\n{mounts}");
    }
    assert_eq!(exec("hostname"), "box\n");
    assert_eq!(exec("cat /etc/hostname"), "box\n");
    let hosts = exec("cat /etc/hosts");
    assert!(hosts.contains("127.0.0.1") && hosts.contains("localhost") && hosts.contains("box"), "{hosts}");
    exec("test -e /etc/resolv.conf");
    assert_eq!(exec("nproc"), "2\n");
    assert_eq!(exec("ping -c 1 -W 2 127.0.0.1 >/dev/null && echo up"), "up\n", "loopback is up");
    assert_eq!(
        exec(
            "for f in null zero random urandom full tty ptmx; do test -e /dev/$f || echo no $f; done; ls -l /dev/fd/0 >/dev/null && echo ok"
        ),
        "ok\n"
    );
    assert_eq!(exec("readlink /dev/stdout"), "/proc/self/fd/1\n");
    // Taken provisionally at first, and for good a second later.
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    assert_eq!(
        exec(&format!("for i in $(seq 100); do grep -q early {source} || break; usleep 100000; done; cat {source}"))
            .trim(),
        if msb_tests::engine() == "qemu" { "tsc" } else { "kvm-clock" }
    );
    let controllers = exec("cat /sys/fs/cgroup/cgroup.controllers");
    for controller in ["cpu", "memory", "io", "pids", "cpuset"] {
        assert!(controllers.split_whitespace().any(|word| word == controller), "{controllers}");
    }
    assert_eq!(exec("cat /proc/sys/net/ipv4/ip_unprivileged_port_start"), "0\n");
    assert_eq!(
        exec("ulimit -n").trim().parse::<u64>().expect("a number").max(1024),
        exec("ulimit -n").trim().parse::<u64>().expect("a number")
    );
    // The agent and init are not the workload's to kill, and the machine is not its to switch off.
    let status = exec("grep CapBnd /proc/self/status");
    let capabilities = u64::from_str_radix(status.split_whitespace().nth(1).unwrap_or_default(), 16).expect("a mask");
    assert_eq!(capabilities & (1 << 22), 0, "CAP_SYS_BOOT is there: {status}");
    home.finish();
}

#[test]
fn the_images_files_are_what_the_archive_says() {
    let home = Home::with_busybox("fidelity");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let exec = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run().succeeds().text();
    // Whiteouts, the opaque folder, a file in a folder's place, a replaced file with its new owner.
    assert_eq!(
        exec("ls /opt /opt/old"),
        "/opt:\nattributes\nlink\nold\nreplaced\nspecial\nwas-folder\n\n/opt/old:\nnew\n"
    );
    assert_eq!(
        exec("cat /opt/replaced /opt/was-folder /opt/link; stat -c '%a %u %g' /opt/replaced"),
        "new\nnow a file\nseen\n640 1000 50\n"
    );
    // Hard links, special files, modes, times, odd names, zeros.
    assert_eq!(exec("cd /opt/special; test zeros -ef zeros-again && stat -c '%h %s' zeros"), "2 1048576\n");
    assert_eq!(exec("test /bin/sh -ef /bin/busybox && echo same"), "same\n");
    assert_eq!(
        exec("cd /opt/special; stat -c '%F %a %t %T' null fifo set-uid"),
        "character special file 666 1 3\nfifo 622 0 0\nregular file 4755 0 0\n"
    );
    assert_eq!(exec("cat '/opt/special/a name with spaces, and \u{e4}\u{f6}\u{fc}'"), "found\n");
    assert_eq!(exec("stat -c %Y /etc/passwd"), "1704067200\n");
    assert_eq!(exec("stat -c %a /tmp"), "1777\n");
    assert_eq!(exec("cmp -n 1048576 /opt/special/zeros /dev/zero && echo zeros"), "zeros\n");
    // Everything can be written, and the image below stays as it is.
    assert_eq!(
        exec(
            "echo more >> /etc/passwd; rm /opt/special/zeros; mv /opt/old /opt/moved; tail -n 1 /etc/passwd; ls /opt/moved"
        ),
        "more\nnew\n"
    );
    home.msb(["run", "busybox", "--", "sh", "-c", "ls /opt/old; tail -n 1 /etc/passwd | cut -d: -f1"])
        .run()
        .succeeds()
        .prints("new\napp\n");
    home.finish();
}

#[test]
fn the_clock_is_right_and_random_numbers_differ_between_boots() {
    let home = Home::with_busybox("clock");
    let look = || {
        let before = jiff::Timestamp::now().as_millisecond();
        let text = home
            .msb(["run", "busybox", "--", "sh", "-c", "date +%s; head -c 16 /dev/urandom | md5sum"])
            .run()
            .succeeds()
            .text();
        let after = jiff::Timestamp::now().as_millisecond();
        let mut lines = text.lines().map(str::to_owned);
        let guest: i64 = lines.next().expect("a time").parse().expect("a number");
        assert!(
            (before / 1000 - 1..=after / 1000 + 1).contains(&guest),
            "the guest's {guest} is not between {before} and {after}"
        );
        lines.next().expect("a digest")
    };
    assert_ne!(look(), look(), "two boots drew the same random bytes");
    home.finish();
}

#[test]
fn a_fresh_sandbox_takes_little_of_the_disk() {
    use std::os::unix::fs::MetadataExt;
    let home = Home::with_busybox("fresh_disk");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let disk = home.path().join("sandboxes/box/upper.img");
    let metadata = std::fs::metadata(&disk).expect("the writable disk");
    assert!(metadata.blocks() * 512 < 5 << 20, "{} bytes are allocated", metadata.blocks() * 512);
    let size = home.msb(["exec", "box", "--", "sh", "-c", "df -m / | awk 'NR==2 {print $2}'"]).run().succeeds().text();
    assert!(size.trim().parse::<u64>().expect("a number") > 7000, "grown to the size that was asked for: {size}");
    // What is deleted inside goes back to the host.
    let allocated = || std::fs::metadata(&disk).expect("the writable disk").blocks() * 512;
    let _ = home
        .msb(["exec", "box", "--", "sh", "-c", "dd if=/dev/urandom of=/root/big bs=1M count=64 2>/dev/null; sync"])
        .run()
        .succeeds();
    assert!(allocated() > 60 << 20, "{}", allocated());
    let _ = home.msb(["exec", "box", "--", "sh", "-c", "rm /root/big; sync; sleep 6; sync"]).run().succeeds();
    home.succeeds(&["stop", "box"]);
    assert!(allocated() < 40 << 20, "deleting 64 MiB inside left {} bytes allocated", allocated());
    home.finish();
}
