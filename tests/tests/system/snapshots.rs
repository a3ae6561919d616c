//! Snapshots of disks on real guests: what a sandbox left is what the next one finds, and nothing half is ever seen.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Duration;

use msb_tests::Home;
use rustix::process::Signal;

/// Runs `line` in a running sandbox.
fn exec(home: &Home, name: &str, line: &str) -> String {
    home.msb(["exec", name, "--", "sh", "-c", line]).run().succeeds().text()
}

/// What is told to people, without the line breaks and decorations of a terminal.
fn told(home: &Home, words: &[&str], code: &str) -> String {
    home.fails(words, 1, code).replace('│', " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_snapshot_outlives_its_sandbox_and_the_prune_of_images() {
    let home = Home::with_busybox("snapshot");
    home.msb(["snapshot", "ls"]).run().succeeds().prints("SNAPSHOT  KIND  OF  IMAGE  PARENT  SIZE  ON DISK  CREATED\n");
    home.succeeds(&[
        "create",
        "--name",
        "box",
        "-m",
        "128M",
        "-e",
        "FROM=box",
        "-w",
        "/root",
        "-v",
        "/etc:/host:ro",
        "busybox",
    ]);
    exec(&home, "box", "echo kept > file; rm -rf /opt; sync");
    // A running one is refused, with what to do.
    let said = told(&home, &["snapshot", "create", "warm", "--from", "box"], "sandbox_still_running");
    assert!(said.contains("msb stop box"), "{said}");
    home.succeeds(&["stop", "box"]);
    home.msb(["snapshot", "create", "warm", "--from", "box", "-l", "team=ml"]).run().succeeds().prints("warm\n");
    home.fails(&["snapshot", "create", "warm", "--from", "box"], 1, "snapshot_already_exists");
    // The source goes on, and what it does now is not the snapshot's.
    home.succeeds(&["start", "box"]);
    exec(&home, "box", "echo later > file; sync");
    home.succeeds(&["rm", "--force", "box"]);
    let said = told(&home, &["image", "rm", "busybox"], "image_in_use");
    assert!(said.contains("snapshot warm"), "{said}");
    home.succeeds(&["image", "prune", "--all", "--yes"]);
    // Without its name it is there for the snapshot still.
    home.succeeds(&["image", "rm", "--force", "busybox"]);
    home.succeeds(&["image", "prune", "--all", "--yes"]);
    home.msb([
        "run",
        "--snapshot",
        "warm",
        "--name",
        "next",
        "--",
        "sh",
        "-c",
        "cat file; echo $FROM; hostname; ls /host /opt 2>&1 | wc -l",
    ])
    .run()
    .succeeds()
    .prints("kept\nbox\nnext\n2\n");
    assert_eq!(home.inspect("next")["spec"]["memory_mib"], 128);
    // A chain: what was taken on top goes first.
    home.succeeds(&["create", "--snapshot", "warm", "--name", "two", "--root-size", "10G"]);
    exec(&home, "two", "echo more >> file; sync");
    home.succeeds(&["stop", "two"]);
    home.succeeds(&["snapshot", "create", "warmer", "--from", "two"]);
    let detail = home.json(&["snapshot", "inspect", "warmer"]);
    assert_eq!((&detail["parent"]["name"], &detail["source"]), (&"warm".into(), &"two".into()));
    let said = told(&home, &["snapshot", "rm", "warm"], "snapshot_in_use");
    assert!(said.contains("warmer"), "{said}");
    home.msb(["run", "--snapshot", "warmer", "--", "cat", "file"]).run().succeeds().prints("kept\nmore\n");
    for (words, why) in [
        (&["--mkdir", "/x"][..], "exclude each other"),
        (&["--root-size", "1G"], "cannot become smaller"),
        (&["--pull", "always"], "cannot be used with"),
    ] {
        let line = [&["create", "--snapshot", "warm"][..], words].concat();
        let refused = home.msb(line).run();
        assert!(refused.code() != Some(0), "{}", refused.account());
        let _ = refused.complains(why);
    }
    assert!(home.succeeds(&["df"]).contains("snapshots"));
    home.msb(["snapshot", "rm", "warm", "warmer"]).run().succeeds().prints("warmer\nwarm\n");
    home.succeeds(&["rm", "--force", "next", "two"]);
    home.succeeds(&["image", "prune", "--all", "--yes"]);
    assert!(home.succeeds(&["image", "ls", "-q"]).trim().is_empty(), "now nobody needs the image");
    home.finish();
}

#[test]
fn an_archive_is_compared_before_it_counts_and_verify_sees_what_changed_since() {
    let (home, other) = (Home::with_busybox("snapshot_export"), Home::new("snapshot_import"));
    home.succeeds(&["create", "--name", "box", "busybox"]);
    exec(&home, "box", "echo travels > /root/file; sync");
    home.succeeds(&["stop", "box"]);
    home.succeeds(&["snapshot", "create", "warm", "--from", "box"]);
    let archive = other.scratch().join("warm.tar.zst");
    home.succeeds(&["snapshot", "export", "warm", "-o", archive.to_str().expect("UTF-8")]);
    assert!(std::fs::metadata(&archive).expect("the archive").len() < 8 << 20, "sparse");
    // The other home is told which image it lacks and how to get it; both steps work as they are told.
    let said = told(&other, &["snapshot", "import", "-i", "warm.tar.zst"], "image_not_found");
    assert!(said.contains("busybox") && said.contains("msb save busybox"), "{said}");
    let image = other.scratch().join("image.tar");
    home.succeeds(&["save", "busybox", "-o", image.to_str().expect("UTF-8")]);
    other.succeeds(&["load", "-i", "image.tar"]);
    let bytes = std::fs::read(&archive).expect("the archive");
    std::fs::write(other.scratch().join("cut"), &bytes[..bytes.len() * 2 / 3]).expect("a file");
    other.fails(&["snapshot", "import", "-i", "cut"], 1, "invalid_archive");
    other.msb(["snapshot", "ls", "-q"]).run().succeeds().prints("");
    other.msb(["snapshot", "import", "--name", "mine"]).input(bytes).run().succeeds().prints("mine\n");
    other.msb(["run", "--snapshot", "mine", "cat", "/root/file"]).run().succeeds().prints("travels\n");
    assert!(other.succeeds(&["snapshot", "verify", "mine"]).contains("mine: whole"));
    let disk = other.path().join("snapshots/mine/disk.img");
    std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(0o600)).expect("our own file");
    let file = std::fs::File::options().read(true).write(true).open(&disk).expect("the disk");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1_100).expect("a byte");
    file.write_all_at(&[byte[0] ^ 4], 1_100).expect("a flipped bit");
    other.msb(["snapshot", "verify", "mine"]).run().exits(1).shows("mine: DAMAGED");
    other.fails(&["snapshot", "export", "mine", "-o", "bad"], 1, "snapshot_damaged");
    assert!(!other.scratch().join("bad").exists());
    home.finish();
    other.finish();
}

#[test]
fn a_snapshot_killed_on_its_way_is_not_there() {
    let home = Home::with_busybox("snapshot_killed");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    exec(&home, "box", "dd if=/dev/urandom of=/root/noise bs=1M count=24 2>/dev/null; echo kept > /root/file; sync");
    home.succeeds(&["stop", "box"]);
    for (round, delay) in [5, 40, 90, 160, 250].into_iter().enumerate() {
        home.succeeds(&["ls"]);
        let name = format!("try{round}");
        let taking = home.msb(["snapshot", "create", &name, "--from", "box"]).start();
        std::thread::sleep(Duration::from_millis(delay));
        home.daemon().signal(Signal::KILL);
        drop(taking.finish());
        // Whole or not there, for the index and on the disk.
        let seen = home.succeeds(&["snapshot", "ls", "-q"]);
        let mut entries: Vec<String> = std::fs::read_dir(home.path().join("snapshots"))
            .into_iter()
            .flatten()
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        entries.sort();
        assert_eq!(seen.lines().collect::<Vec<_>>(), entries, "round {round}");
        for name in seen.lines() {
            home.succeeds(&["snapshot", "verify", name]);
            home.succeeds(&["snapshot", "rm", name]);
        }
        assert_eq!(home.status("box"), "stopped");
    }
    home.succeeds(&["snapshot", "create", "warm", "--from", "box"]);
    home.succeeds(&["rm", "box"]);
    home.msb(["run", "--snapshot", "warm", "cat", "/root/file"]).run().succeeds().prints("kept\n");
    home.finish();
}
