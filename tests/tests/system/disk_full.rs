//! A full disk, during a load and during a run. Only root can make the small file system the tests need.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use msb_tests::Home;

/// A small tmpfs over a folder of the test, gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn over(folder: &Path, mebibytes: u32) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: mounting a small file system needs root");
            return None;
        }
        std::fs::create_dir_all(folder).expect("a folder");
        let options = format!("size={mebibytes}m,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder).status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount a tmpfs");
        Some(Self(folder.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_load_that_fills_the_disk_says_so_and_leaves_room_again() {
    let home = Home::new("full_load");
    let Some(disk) = SmallDisk::over(&home.path(), 4) else { return };
    let archive = msb_tests::image("busybox.tar");
    let finished =
        home.msb(["--format", "json", "image", "load", "-i", archive.to_str().expect("UTF-8")]).run().exits(1);
    let said = format!("{}{}", finished.text(), finished.complaint());
    assert!(said.contains("disk_full"), "{}", finished.account());
    assert!(home.succeeds(&["image", "ls", "-q"]).trim().is_empty());
    home.succeeds(&["doctor", "--store"]);
    let free = rustix::fs::statvfs(&disk.0).expect("statvfs");
    assert!(free.f_bavail * free.f_frsize > 1 << 20, "what was half loaded still takes the room");
    home.finish();
}

#[test]
fn a_run_that_fills_the_disk_waits_and_goes_on_when_there_is_room() {
    let home = Home::new("full_run");
    let Some(_disk) = SmallDisk::over(&home.path(), 64) else { return };
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
