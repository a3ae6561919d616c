//! Mounts and volumes: what is shared is what was meant, options hold on both sides, and a hostile guest stays inside.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use msb_tests::Home;

#[test]
fn shared_directories_files_and_memory_are_what_their_options_say() {
    let home = Home::with_busybox("mounts");
    let host = home.scratch();
    for directory in ["rw/sub", "ro", "nested"] {
        std::fs::create_dir_all(host.join(directory)).expect("a directory");
    }
    std::fs::write(host.join("rw/host"), "from the host\n").expect("a file");
    std::fs::write(host.join("ro/host"), "fixed\n").expect("a file");
    std::fs::write(host.join("file"), "one file\n").expect("a file");
    home.succeeds(&[
        "create",
        "--name",
        "box",
        "-u",
        "app",
        "-v",
        "./rw/../rw:/rw",
        "-v",
        "./ro:/ro:ro,noexec",
        "-v",
        "./nested:/rw/sub:nodev",
        "--mount-file",
        "./file:/etc/one-file:ro",
        "--tmpfs",
        "/cache:8M:noexec,nosuid",
        "busybox",
    ]);
    let exec = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run().succeeds().text();
    let fails = |line: &str| home.msb(["exec", "-u", "root", "box", "--", "sh", "-c", line]).run();

    // The caller's files belong to the guest's user, who reads and writes them.
    assert_eq!(exec("id -un; cat /rw/host; stat -c '%U %G' /rw/host /rw"), "app\nfrom the host\napp app\napp app\n");
    exec(
        "echo more >> /rw/host && mkdir -p /rw/a/b && echo deep > /rw/a/b/c && mv /rw/a /rw/moved && ln -s host /rw/link",
    );
    assert_eq!(std::fs::read_to_string(host.join("rw/host")).expect("the file"), "from the host\nmore\n");
    assert_eq!(std::fs::read_to_string(host.join("rw/moved/b/c")).expect("the file"), "deep\n");
    assert_eq!(exec("cat /rw/link /etc/one-file; ls /rw/moved/b"), "from the host\nmore\none file\nc\n");
    // The nested one lies over its parent, which was mounted first.
    exec("echo inner > /rw/sub/inner");
    assert!(host.join("nested/inner").exists() && !host.join("rw/sub/inner").exists());

    // Options, in the guest's own words.
    let mounts = exec("cat /proc/mounts");
    for (target, flags) in [("/ro", "ro,noexec"), ("/rw/sub", "rw,nodev"), ("/cache", "rw,nosuid,noexec")] {
        let line = mounts.lines().find(|line| line.contains(&format!(" {target} "))).unwrap_or_default();
        assert!(line.contains(flags), "{target} {flags}: {line}");
    }
    for line in
        ["echo x > /ro/new", "echo x >> /ro/host", "rm /ro/host", "chmod 777 /ro/host", "echo x > /etc/one-file"]
    {
        let _ = fails(line).exits(1).complains("Read-only file system");
    }
    exec("cp /bin/busybox /cache/sh");
    assert_eq!(home.msb(["exec", "box", "--", "/cache/sh", "true"]).run().code(), Some(126), "noexec");
    // A host that loosens nothing: the same share mounted anew without `ro` by the guest's root is still refused.
    let _ = fails("mount -o remount,bind,rw /ro && echo x > /ro/new").exits(1).complains("Read-only file system");
    assert_eq!(std::fs::read_dir(host.join("ro")).expect("the directory").count(), 1);

    let inspect = home.succeeds(&["inspect", "box"]);
    for shown in
        ["/ro on /ro (ro,noexec)", "nested on /rw/sub (rw,nodev)", "tmpfs of 8 MiB on /cache (rw,noexec,nosuid)"]
    {
        assert!(inspect.contains(shown), "{shown}: {inspect}");
    }
    // In force, or the host is said to lack it.
    assert!(inspect.contains("mount namespace"), "{inspect}");
    // chown, chmod and mknod are the guest's; the host's files stay ordinary.
    let root = |line: &str| home.msb(["exec", "-u", "root", "box", "--", "sh", "-c", line]).run();
    let made = root(
        "cd /rw && echo x > owned && chmod 4751 owned && chown 1234:99 owned && mknod dev c 1 3 && mkfifo pipe \
         && stat -c '%n %u %g %a %F' owned dev pipe",
    );
    if made.code() == Some(0) {
        made.prints("owned 1234 99 751 regular file\ndev 0 0 644 character special file\npipe 0 0 644 fifo\n");
        let own = rustix::process::geteuid().as_raw();
        for name in ["owned", "dev", "pipe"] {
            let data = std::fs::symlink_metadata(host.join("rw").join(name)).expect("the file");
            assert!(data.is_file() && data.uid() == own && data.permissions().mode() & 0o7000 == 0, "{name}: {data:?}");
        }
    } else {
        // A file system of the host that keeps no attributes: it says so, and nothing is half done.
        let _ = made.complains("Operation not permitted");
    }
    // A restart finds everything again.
    home.succeeds(&["restart", "box"]);
    assert_eq!(exec("cat /rw/moved/b/c /rw/sub/inner"), "deep\ninner\n");
    home.finish();
}

#[test]
fn a_hostile_guest_does_not_leave_a_shared_directory() {
    let home = Home::with_busybox("hostile_guest");
    let host = home.scratch();
    std::fs::create_dir_all(host.join("shared/inner")).expect("a directory");
    std::fs::write(host.join("secret"), "secret\n").expect("a file");
    symlink("../secret", host.join("shared/up")).expect("a link");
    symlink(host.join("secret"), host.join("shared/absolute")).expect("a link");
    symlink("/proc/self/root", host.join("shared/magic")).expect("a link");
    home.succeeds(&["create", "--name", "box", "-v", "./shared:/shared", "busybox"]);
    let exec = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run().text();
    let secret = host.join("secret").display().to_string();
    for line in [
        "cat /shared/up /shared/absolute".to_owned(),
        format!("cat /shared/magic{secret}"),
        "cat /shared/../secret /shared/inner/../../secret".to_owned(),
        // The agent's own view of the shares, reached through PID 1 as root of the default profile may.
        "cat /proc/1/root/shares/../secret /proc/1/root/shares/0/../secret /proc/1/root/shares/0/up".to_owned(),
        "ls -a /proc/1/root/shares/0/../.. | grep secret".to_owned(),
        "ln /shared/up /shared/hard; cat /shared/hard".to_owned(),
        "mv /shared/inner /shared/inner/self; mv /shared /other; cat /shared/inner/../../secret".to_owned(),
        // A directory and a link change places as fast as they can while another process reads through them.
        "cd /shared && mkdir d && ln -s .. l && echo own > d/secret && \
         (i=0; while [ $i -lt 40 ]; do mv d t; mv l d; mv d l; mv t d; i=$((i+1)); done) & \
         cd /shared; i=0; while [ $i -lt 40 ]; do cat d/secret 2>/dev/null | grep -v own; i=$((i+1)); done; wait"
            .to_owned(),
    ] {
        let seen = exec(&line);
        assert!(!seen.contains("secret"), "{line}\n{seen}");
    }
    // What it makes, it makes inside.
    exec(
        "ln -s ../planted /shared/out; echo x > /shared/out; mkdir -p /shared/../planted2; echo y > /shared/inner/../../planted3",
    );
    let mut left: Vec<String> = std::fs::read_dir(&host)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| !name.starts_with('.'))
        .collect();
    left.sort();
    assert_eq!(left, ["secret", "shared"]);
    assert_eq!(std::fs::read_to_string(host.join("secret")).expect("the file"), "secret\n");
    home.finish();
}

#[test]
fn named_volumes_live_longer_than_their_sandboxes_and_are_not_removed_under_them() {
    let home = Home::with_busybox("named_volumes");
    home.msb(["volume", "ls"]).run().succeeds().prints("VOLUME  KIND  SIZE  ON DISK  CREATED  MOUNTED BY\n");
    home.succeeds(&["volume", "create", "made"]);
    let _ = home.msb(["volume", "create", "made"]).run().exits(1).complains("exists already");
    home.succeeds(&[
        "create",
        "--name",
        "one",
        "--mount-named",
        "made:/made:quota=8M",
        "--mount-named",
        "work:/work:kind=disk,size=256M,nosuid",
        "-v",
        "fresh:/fresh:ro",
        "busybox",
    ]);
    let exec = |name: &str, line: &str| home.msb(["exec", name, "--", "sh", "-c", line]).run().succeeds().text();
    exec("one", "echo kept > /made/file && echo kept > /work/file && sync");
    assert!(exec("one", "grep ' /work ' /proc/mounts").contains("ext4 rw,nosuid"));
    // A full disk is an error for the writer and nothing else.
    let full = home.msb(["exec", "one", "--", "dd", "if=/dev/zero", "of=/work/big", "bs=1M", "count=400"]).run();
    let _ = full.exits(1).complains("No space left on device");
    // So is a full quota; what is removed makes room again.
    let full = home.msb(["exec", "one", "--", "dd", "if=/dev/zero", "of=/made/big", "bs=1M", "count=16"]).run();
    let _ = full.exits(1).complains("No space left on device");
    let on_host = std::fs::metadata(home.path().join("volumes/made/data/big")).expect("a file").blocks() * 512;
    assert!((7 << 20..=8 << 20).contains(&on_host), "{on_host}");
    // (busybox's df asks the first mount of the same device.)
    assert_eq!(exec("one", "stat -f -c '%b %s' /made | awk '{ print $1 * $2 }'"), "8388608\n");
    exec("one", "rm /made/big && dd if=/dev/zero of=/made/big bs=1M count=7 && rm /made/big");
    // Flushed, because a forced removal kills.
    exec("one", "rm /work/big && sync && cat /work/file");
    let list = home.succeeds(&["volume", "ls"]);
    for part in ["one:/made (rw)", "one:/work (rw,nosuid)", "one:/fresh (ro)", "256 MiB"] {
        assert!(list.contains(part), "{part}: {list}");
    }
    let _ = home.msb(["volume", "rm", "made"]).run().exits(1).complains("used by one");
    // A directory has many users at once, a disk one writer.
    home.succeeds(&["create", "--name", "two", "-v", "made:/made:ro", "busybox"]);
    assert_eq!(exec("two", "cat /made/file"), "kept\n");
    exec("one", "echo news > /made/news");
    assert_eq!(exec("two", "sleep 2; cat /made/news"), "news\n");
    let busy = home.msb(["create", "--name", "three", "-v", "work:/work", "busybox"]).run().exits(1);
    let _ = busy.complains("in use");
    let _ = home.msb(["rm", "--force", "three"]).run();
    home.succeeds(&["rm", "--force", "one", "two"]);
    // The disk goes on where the first one left it.
    home.msb([
        "run",
        "-v",
        "work:/work",
        "busybox",
        "--",
        "sh",
        "-c",
        "cat /work/file; test -e /work/big || echo gone",
    ])
    .run()
    .succeeds()
    .prints("kept\ngone\n");
    home.succeeds(&["volume", "rm", "made"]);
    let _ = home.msb(["volume", "inspect", "made"]).run().exits(1).complains("no volume is called made");
    home.msb(["volume", "prune"]).run().succeeds().prints("fresh\nwork\n");
    home.finish();
}

#[test]
fn patches_and_scripts_are_there_before_the_workload() {
    let home = Home::with_busybox("patches");
    let host = home.scratch();
    std::fs::create_dir_all(host.join("tree/sub")).expect("a directory");
    std::fs::write(host.join("tree/sub/tool"), "#!/bin/sh\necho tool\n").expect("a file");
    std::fs::set_permissions(host.join("tree/sub/tool"), std::fs::Permissions::from_mode(0o755)).expect("a mode");
    symlink("sub/tool", host.join("tree/link")).expect("a link");
    home.msb([
        "run", "--security", "strict", "--copy", "./tree:/srv/tree", "--mkdir", "/srv/empty", "--remove-path", "/opt",
        "--script", "hello=echo hello $1", "busybox", "--", "sh", "-c",
        "/srv/tree/link; ls -d /srv/empty; test -e /opt || echo gone; hello you; touch /srv/x 2>/dev/null || echo closed",
    ])
    .run()
    .succeeds()
    .prints("tool\n/srv/empty\ngone\nhello you\nclosed\n");
    // What cannot be meant is refused before anything is made.
    for (words, why) in [
        (&["-v", "/:/x:ro,rw"][..], "both ro and rw"),
        (&["-v", "./tree:/x,ro"], "follow a colon"),
        (&["-v", "./nothing-here:/x"], "nothing-here"),
        (&["--tmpfs", "/x:1M:size=2M"], "two sizes"),
        (&["--tmpfs", "/proc/x"], "the guest's own"),
        (&["--tmpfs", "/x", "-v", "a:/x/"], "two mounts are on /x"),
        (&["--mkdir", "relative"], "not absolute"),
    ] {
        let line = [&["create", "--name", "never"][..], words, &["busybox"]].concat();
        let _ = home.msb(line).run().exits(1).complains(why);
    }
    home.msb(["ls", "-q"]).run().succeeds().prints("");
    home.finish();
}
