//! A full disk, during a load and during a run. Only root can make the small file system the tests need.

use std::time::Duration;

use msb_tests::Home;

/// Said where the small file system cannot be mounted.
const SKIPPED: &str = "skipped: mounting a small file system needs root";

#[test]
fn a_load_that_fills_the_disk_says_so_and_leaves_room_again() {
    let Some(home) = Home::on_small_disk("full_load", 4) else {
        println!("{SKIPPED}");
        return;
    };
    let archive = msb_tests::image("busybox.tar");
    let finished =
        home.msb(["--format", "json", "image", "load", "-i", archive.to_str().expect("UTF-8")]).run().exits(1);
    let said = format!("{}{}", finished.text(), finished.complaint());
    assert!(said.contains("disk_full"), "{}", finished.account());
    assert!(home.succeeds(&["image", "ls", "-q"]).trim().is_empty());
    home.succeeds(&["doctor", "--store"]);
    let free = rustix::fs::statvfs(home.path()).expect("statvfs");
    assert!(free.f_bavail * free.f_frsize > 1 << 20, "what was half loaded still takes the room");
    home.finish();
}

#[test]
fn a_run_that_fills_the_disk_waits_and_goes_on_when_there_is_room() {
    let Some(home) = Home::on_small_disk("full_run", 64) else {
        println!("{SKIPPED}");
        return;
    };
    home.load("busybox.tar");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let filler = home.path().join("filler");
    std::fs::write(&filler, vec![1; 30 << 20]).expect("a filler");
    let running = home
        .msb([
            "exec",
            "box",
            "--",
            "sh",
            "-c",
            "dd if=/dev/urandom of=/root/big bs=1M count=30 2>/dev/null && sync && md5sum < /root/big | wc -c",
        ])
        .start();
    std::thread::sleep(Duration::from_secs(12));
    // The guest waits; the daemon and the other commands do not.
    assert_eq!(home.status("box"), "running");
    std::fs::remove_file(&filler).expect("the filler");
    running.finish().succeeds().prints("36\n");
    home.finish();
}
