//! What the virtual machine itself promises its guest: processors that agree on the time, and memory that is what the disk said.

use std::time::{Duration, Instant};

use msb_tests::Home;

/// Programs that differ in one byte of code, each at the same place of its page.
const PROGRAMS: u8 = 50;
/// How often each is read from the disk and run.
const ROUNDS: u32 = 8;

#[test]
fn four_processors_share_one_clock_and_code_read_from_the_disk_is_the_code_that_runs() {
    let home = Home::with_busybox("machine");
    home.succeeds(&["create", "--name", "box", "-c", "4", "-m", "256M", "busybox"]);
    let exec = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run();
    // The kernel takes the counter provisionally at first, and for good a second later.
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let settled = format!("for i in $(seq 100); do grep -q early {source} || break; usleep 100000; done");
    let clock = exec(&format!("{settled}; nproc; cat {source}")).succeeds().text();
    // Hardware virtualisation offers a clock of its own, which survives a processor whose counter does not.
    assert!(clock == "4\ntsc\n" || msb_tests::engine() == "kvm" && clock == "4\nkvm-clock\n", "{clock}");

    // Software emulation does not notice that another process wrote to guest memory: a page that was executed, freed and filled anew by
    // a disk's back-end ran its old code, which is why that engine boots with `init_on_alloc=1`. Each program exits with its own number.
    let mut script = String::from("mkdir -p /root/p && cd /root/p\n");
    for number in 1..=PROGRAMS {
        let bytes: String = msb_tests::exiting_program(number).iter().map(|byte| format!("\\{byte:03o}")).collect();
        script.push_str(&format!("printf '{bytes}' >{number}\n"));
    }
    script.push_str(&format!(
        "chmod 755 *; sync; wrong=0; ran=0\n\
         for round in $(seq {ROUNDS}); do\n\
           echo 3 >/proc/sys/vm/drop_caches\n\
           for number in $(seq {PROGRAMS}); do ./$number; [ $? = $number ] || wrong=$((wrong + 1)); ran=$((ran + 1)); done\n\
         done\n\
         echo $ran programs ran, $wrong ran something else\n"
    ));
    let ran = u32::from(PROGRAMS) * ROUNDS;
    home.msb(["exec", "-i", "box", "--", "sh"])
        .input(script)
        .run()
        .succeeds()
        .prints(&format!("{ran} programs ran, 0 ran something else\n"));
    home.finish();
}

#[test]
fn each_boot_has_its_kernel_somewhere_else() {
    if msb_tests::engine() != "kvm" {
        println!("skipped: on engine qemu the kernel lies where it was linked to");
        return;
    }
    let home = Home::with_busybox("kernel_place");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let places = || {
        let script = "grep ' _text$' /proc/kallsyms; grep 'Kernel code' /proc/iomem";
        home.msb(["exec", "box", "--", "sh", "-c", script]).run().succeeds().text()
    };
    let first = places();
    let lines: Vec<&str> = first.lines().collect();
    assert!(
        matches!(lines[..], [text, code] if text.starts_with("ffffffff") && !code.contains("00000000-")),
        "{first}"
    );
    home.succeeds(&["restart", "box"]);
    // One of some five hundred in its own addresses, one of some thirty in memory.
    assert_ne!(places(), first);
    home.finish();
}

#[test]
fn each_boot_that_comes_to_nothing_leaves_no_machine() {
    if msb_tests::engine() != "kvm" {
        println!("skipped: only engine kvm begins a machine before it knows whose it is");
        return;
    }
    let home = Home::with_busybox("begun");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    // The log of the one that was begun is its sandbox's from its launch on.
    let log = std::fs::read_to_string(home.path().join("sandboxes/box/logs/vmm.log")).expect("its log");
    assert!(log.contains("sandbox=box"), "{log}");
    // Until then nothing but its parent tells whose it is.
    let tasks = format!("/proc/{}/task", home.daemon().pid);
    let children = || -> usize {
        let tasks = std::fs::read_dir(&tasks).expect("the service's threads").flatten();
        let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        lists.map(|list| list.split_whitespace().count()).sum()
    };
    assert_eq!(children(), 1);
    // One has begun by the time that its name is found to be taken.
    home.fails(&["create", "--name", "box", "busybox"], 1, "sandbox_already_exists");
    assert_eq!(children(), 2);
    let deadline = Instant::now() + Duration::from_secs(60);
    while children() != 1 {
        assert!(Instant::now() < deadline, "it waits for ever");
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(home.running("msb-vmm").len(), 1);
    assert_eq!(home.msb(["exec", "box", "--", "echo", "on"]).run().succeeds().text(), "on\n");
    home.finish();
}

#[test]
fn memory_that_a_guest_frees_goes_back_to_the_host() {
    if msb_tests::engine() != "kvm" {
        println!("skipped: only engine kvm has a balloon");
        return;
    }
    const MIB: u64 = 1 << 20;
    let home = Home::with_busybox("memory_back");
    home.succeeds(&["create", "--name", "box", "-m", "256M", "busybox"]);
    let held = || home.running("msb-vmm")[0].private_memory_bytes();
    let before = held();
    home.succeeds(&["exec", "box", "--", "sh", "-c", "dd if=/dev/zero of=/dev/shm/much bs=1M count=100 2>/dev/null"]);
    let full = held();
    assert!(full > before + 90 * MIB, "{full} bytes after 100 MiB were written, {before} before");
    home.succeeds(&["exec", "box", "--", "rm", "/dev/shm/much"]);
    // The guest's kernel reports what has been free for two seconds.
    let deadline = Instant::now() + Duration::from_secs(120);
    while held() > full - 80 * MIB {
        assert!(Instant::now() < deadline, "{} bytes two minutes after 100 MiB of {full} were freed", held());
        std::thread::sleep(Duration::from_millis(500));
    }
    home.msb(["exec", "box", "--", "echo", "on"]).run().succeeds().prints("on\n");
    home.finish();
}
