//! IMAGE where it is a directory or a raw disk of the host: it is a root as an image is one, and nothing of it is changed.

use std::os::unix::fs::MetadataExt;

use msb_tests::Home;

/// Everything of the busybox image but what the guest mounts over it.
const TREE: &str = "mkdir tree data && msb run busybox -- sh -c 'cd / && tar -cf - $(ls | grep -Ev \"^(proc|sys|dev)$\")' | tar -xf - -C tree";

#[test]
fn a_directory_or_a_disk_of_the_host_is_a_root_and_stays_as_it_is() {
    let home = Home::with_busybox("root");
    let host = home.scratch();
    let _ = home.shell(TREE).run().succeeds();

    // Ephemeral, by a relative path, and with the files of its own root belonging to root.
    let line = "echo inside > /etc/inside && rm /bin/sh && id -u && stat -c %u /bin/busybox && busybox cat /etc/inside";
    home.msb(["run", "./tree", "--", "sh", "-c", line]).run().succeeds().prints("0\n0\ninside\n");
    assert!(!host.join("tree/etc/inside").exists() && host.join("tree/bin/sh").symlink_metadata().is_ok());

    // Shares beside it belong to the guest's user; what was written is there after the next start.
    home.succeeds(&["create", "--name", "rooted", "-u", "app", "-v", "./data:/data", "./tree"]);
    let exec = |line: &str| home.msb(["exec", "rooted", "--", "sh", "-c", line]).run().succeeds().text();
    assert_eq!(
        exec("id -un; stat -c %U /etc/passwd /data; echo kept > /home/app/kept; echo out > /data/out"),
        "app\nroot\napp\n"
    );
    assert_eq!(std::fs::metadata(host.join("data/out")).expect("a file").uid(), rustix::process::geteuid().as_raw());
    let spec = &home.inspect("rooted")["spec"];
    assert_eq!(
        (&spec["root"], spec["image"].as_str()),
        (&"directory".into(), host.join("tree").canonicalize().expect("a path").to_str())
    );
    home.msb(["inspect", "--format", "text", "rooted"]).run().succeeds().shows("directory");
    home.succeeds(&["stop", "-t", "1", "rooted"]);
    home.fails(&["snapshot", "create", "x", "--from", "rooted"], 1, "invalid_request");
    home.succeeds(&["start", "rooted"]);
    assert_eq!(exec("cat /home/app/kept"), "kept\n");
    home.succeeds(&["rm", "-f", "rooted"]);

    // Disks of both file systems, each used by two sandboxes at once.
    let _ = home.shell("mke2fs -q -t ext4 -d tree ext4.img 64M && mkfs.erofs --quiet erofs.img tree").run().succeeds();
    for disk in ["ext4.img", "erofs.img"] {
        let before = std::fs::read(host.join(disk)).expect("a disk");
        let path = format!("./{disk}");
        home.succeeds(&["create", "--name", "one", &path]);
        home.msb(["run", &path, "--", "sh", "-c", "echo x > /etc/passwd && cat /etc/passwd"])
            .run()
            .succeeds()
            .prints("x\n");
        home.msb(["exec", "one", "--", "head", "-n", "1", "/etc/passwd"]).run().succeeds().shows("root");
        home.succeeds(&["rm", "-f", "one"]);
        assert!(std::fs::read(host.join(disk)).expect("a disk") == before, "{disk} was changed");
    }

    std::fs::write(host.join("text"), "x".repeat(4096)).expect("a file");
    home.fails(&["run", "./text", "--", "true"], 125, "invalid_config");
    home.fails(&["run", "./nowhere", "--", "true"], 125, "path_not_found");
    home.fails(&["run", "--pull", "always", "./tree", "--", "true"], 125, "invalid_config");
    home.finish();
}
