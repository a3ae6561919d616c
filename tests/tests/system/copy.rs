//! `msb cp` as users of `docker cp` know it: what goes in comes out the same, by the same rules, and a copy that fails leaves nothing half.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use msb_tests::Home;

/// A tree with one of everything that is kept.
fn furnish(root: &Path) {
    std::fs::create_dir_all(root.join("deep/er")).expect("directories");
    std::fs::create_dir(root.join("empty")).expect("a directory");
    std::fs::write(root.join("deep/er/file"), vec![b'x'; 300_000]).expect("a file");
    std::fs::write(root.join("new\nline"), "odd\n").expect("a file");
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"bytes\xff")), "raw\n").expect("a file");
    std::fs::write(root.join("tool"), "#!/bin/sh\necho ran\n").expect("a file");
    std::fs::set_permissions(root.join("tool"), PermissionsExt::from_mode(0o751)).expect("a mode");
    std::fs::set_permissions(root.join("empty"), PermissionsExt::from_mode(0o1700)).expect("a mode");
    symlink("deep/er/file", root.join("link")).expect("a link");
    symlink("/etc/passwd", root.join("absolute")).expect("a link");
    std::fs::hard_link(root.join("deep/er/file"), root.join("twin")).expect("a link");
    let sparse = std::fs::File::create(root.join("sparse")).expect("a file");
    sparse.write_at(b"end", 8 << 20).expect("bytes");
    sparse.set_len(32 << 20).expect("a size");
    let time = std::time::UNIX_EPOCH + Duration::new(1_600_000_000, 123_456_789);
    for name in ["deep/er/file", "tool", "empty", "deep"] {
        let file = std::fs::File::open(root.join(name)).expect("a file");
        file.set_times(std::fs::FileTimes::new().set_modified(time)).expect("a time");
    }
}

/// What is kept of a tree, by path; of its root only what is in it.
fn described(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(&directory).expect("a directory") {
            let at = entry.expect("an entry").path();
            let stat = at.symlink_metadata().expect("a file");
            let mode = stat.mode() & 0o7777;
            let what = if stat.is_symlink() {
                format!("link to {:?}", std::fs::read_link(&at).expect("a link"))
            } else if stat.is_dir() {
                waiting.push(at.clone());
                format!("directory {mode:o}")
            } else {
                let hash = <sha2::Sha256 as sha2::Digest>::digest(std::fs::read(&at).expect("a file"));
                format!("{mode:o} {} bytes, {} names, {}", stat.len(), stat.nlink(), hex::encode(hash))
            };
            let path = format!("{:?}", at.strip_prefix(root).expect("below the root"));
            found.insert(path, format!("{what} {}.{}", stat.mtime(), stat.mtime_nsec()));
        }
    }
    found
}

fn same(got: &Path, wanted: &Path) {
    let (got, wanted) = (described(got), described(wanted));
    for (path, text) in &wanted {
        assert_eq!(got.get(path), Some(text), "{path}");
    }
    assert_eq!(got.len(), wanted.len(), "{:?}", got.keys());
}

#[test]
fn a_tree_goes_in_and_across_and_out_again_unchanged() {
    let home = Home::with_busybox("copy_trees");
    let host = home.scratch();
    let tree = host.join("tree");
    furnish(&tree);
    let attribute =
        rustix::fs::setxattr(tree.join("tool"), "user.msb", b"a\nb\0c", rustix::fs::XattrFlags::empty()).is_ok();
    home.succeeds(&["create", "--name", "one", "busybox"]);
    home.succeeds(&["create", "--name", "two", "busybox"]);
    let exec = |name: &str, line: &str| home.msb(["exec", name, "--", "sh", "-c", line]).run().succeeds().text();

    exec("one", "mkdir -p /srv");
    exec("two", "mkdir -p /opt");
    // In: the guest's own programs see what the host's see.
    home.succeeds(&["cp", "tree", "one:/srv/"]);
    let list = "cd $1 && find . ! -name 'bytes*' ! -name . | sort; find . -type f ! -name 'bytes*' -exec md5sum {} \\; | sort; \
                find . -type f ! -name 'bytes*' -exec stat -c '%n %a %Y %h %s' {} \\; | sort; \
                find . -type d ! -name . -exec stat -c '%n %a %Y' {} \\; | sort; readlink link; readlink absolute";
    let host_list = home.shell(&format!("set -- tree; {list}")).run().succeeds().text();
    // GNU and busybox escape the newline in different ways.
    let plain = |text: &str| {
        text.lines().filter(|line| !line.contains("new") && !line.contains("line")).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(plain(&exec("one", &format!("set -- /srv/tree; {list}"))), plain(&host_list));
    assert_eq!(exec("one", "cd /srv/tree && cat 'new\nline' bytes* && ./tool"), "odd\nraw\nran\n");
    assert_eq!(exec("one", "stat -c '%u %g' /srv/tree/tool"), "0 0\n");
    // 32 MiB with one block of data.
    let blocks: u64 = exec("one", "stat -c %b /srv/tree/sparse").trim().parse().expect("a number");
    assert!(blocks < 1024, "{blocks} blocks");

    // Across, and out.
    home.succeeds(&["cp", "one:/srv/tree", "two:/root/new-name"]);
    home.succeeds(&["cp", "two:/root/new-name", "back"]);
    same(&host.join("back"), &tree);
    if attribute {
        let mut value = [0; 16];
        let len = rustix::fs::getxattr(host.join("back/tool"), "user.msb", &mut value[..]).expect("the attribute");
        assert_eq!(&value[..len], b"a\nb\0c");
    }
    assert!(host.join("back/sparse").metadata().expect("the file").blocks() < 1024);
    // Over what is there: the same again.
    home.succeeds(&["cp", "two:/root/new-name/.", "back"]);
    same(&host.join("back"), &tree);

    // As a tar stream that real tar reads, and one that real tar wrote.
    home.shell("mkdir tar && msb cp one:/srv/tree - | tar -xpC tar").run().succeeds().is_quiet();
    same(&host.join("tar/tree"), &tree);
    home.shell("tar --format=gnu -cS tree | msb cp - two:/opt && msb cp -q two:/opt/tree gnu")
        .run()
        .succeeds()
        .is_quiet();
    let find = "find . ! -type d -printf '%p %m %s %Ts %l\\n' | sort; find . -type d -printf '%p %m %Ts\\n' | sort";
    let wanted = home.shell(&format!("cd tree && {find}")).run().succeeds().text();
    assert_eq!(home.shell(&format!("cd gnu && {find}")).run().succeeds().text(), wanted);
    home.finish();
}

#[test]
fn destinations_follow_the_rules_of_docker() {
    let home = Home::with_busybox("copy_rules");
    let host = home.scratch();
    std::fs::create_dir_all(host.join("dir/sub")).expect("directories");
    std::fs::write(host.join("dir/sub/f"), "deep\n").expect("a file");
    std::fs::write(host.join("f"), "content\n").expect("a file");
    std::fs::write(host.join("a:b"), "colon\n").expect("a file");
    std::fs::set_permissions(host.join("f"), PermissionsExt::from_mode(0o4755)).expect("a mode");
    symlink("f", host.join("link")).expect("a link");
    symlink("dir", host.join("dirlink")).expect("a link");
    home.succeeds(&["create", "--name", "box", "-u", "app", "--tmpfs", "/small:1M", "busybox"]);
    let exec = |line: &str| home.msb(["exec", "-u", "root", "box", "--", "sh", "-c", line]).run().succeeds().text();
    exec(
        "mkdir -p /w/d /w/taken/f && echo old > /w/old && ln -s old /w/tofile && ln -s d /w/todir && echo other > /w/d/f",
    );

    for (source, destination, found) in [
        ("f", "box:/w/new", "/w/new"),
        ("f", "box:w/relative", "/w/relative"),
        ("f", "box:/w/d", "/w/d/f"),
        ("f", "box:/w/todir/", "/w/d/f"),
        ("./a:b", "box:/w/d/", "/w/d/a:b"),
        ("dir", "box:/w/newdir", "/w/newdir/sub/f"),
        ("dir", "box:/w/newdir2/", "/w/newdir2/sub/f"),
        ("dir", "box:/w/d", "/w/d/dir/sub/f"),
        ("dir/.", "box:/w/d", "/w/d/sub/f"),
        ("dir/sub/..", "box:/w/dots", "/w/dots/sub/f"),
        ("dirlink/", "box:/w/followed", "/w/followed/sub/f"),
    ] {
        home.succeeds(&["cp", source, destination]);
        exec(&format!("test -f {found}"));
    }
    // A link at the destination is followed to the file it means, one that is the source only when told so.
    home.succeeds(&["cp", "f", "box:/w/tofile"]);
    assert_eq!(exec("cat /w/old; readlink /w/tofile"), "content\nold\n");
    home.succeeds(&["cp", "link", "box:/w/aslink"]);
    home.succeeds(&["cp", "-L", "link", "box:/w/asfile"]);
    assert_eq!(exec("readlink /w/aslink; stat -c '%F %a' /w/asfile"), "f\nregular file 755\n");
    // Ownership: root's, or with -a whose it was.
    let owner = host.join("f").metadata().expect("the file");
    home.succeeds(&["cp", "-a", "f", "box:/w/kept"]);
    let kept = format!("{} {} 4755\n", owner.uid(), owner.gid());
    assert_eq!(exec("stat -c '%u %g %a' /w/new /w/kept"), format!("0 0 755\n{kept}"));

    let refused = |source: &str, destination: &str, code: &str| home.fails(&["cp", source, destination], 1, code);
    refused("f", "box:/w/none/", "path_not_found");
    refused("f", "box:/none/at/all", "path_not_found");
    refused("nothing", "box:/w", "path_not_found");
    refused("box:/nothing", ".", "path_not_found");
    refused("box:/w/old/", ".", "file_failed");
    refused("box:/w/old", "none/", "path_not_found");
    refused("dir", "box:/w/old", "path_exists");
    refused("f", "box:/w/taken", "path_exists");
    refused("box:/w/d", "f", "path_exists");
    refused("f", "f2", "invalid_config");
    refused("-", "-", "invalid_config");
    refused("-", "box:/none", "path_not_found");
    refused("f", "nobox:/", "sandbox_not_found");
    refused("f", "b x:/", "invalid_name");
    // What is no file: refused as itself, left out of a tree with its name.
    refused("box:/dev/null", "null", "file_failed");
    refused("/dev/null", "box:/w/null", "file_failed");
    refused("f", "box:/dev/null", "path_exists");
    exec("mkdir /w/odd && mkfifo /w/odd/pipe && mknod /w/odd/null c 1 3; echo kept > /w/odd/file");
    home.msb(["cp", "box:/w/odd", "odd"])
        .run()
        .succeeds()
        .complains("left out 'odd/pipe': it is a pipe")
        .complains("left out 'odd/null': it is a device");
    let names: Vec<_> =
        std::fs::read_dir(host.join("odd")).expect("the copy").map(|entry| entry.expect("one").file_name()).collect();
    assert_eq!(names, ["file"]);
    // A stream that is none, or leads out.
    let _ = home.shell("echo nonsense nonsense | msb cp - box:/w/d").run().exits(1);
    home.shell("tar -cP --transform 's,^f$,../evil,' f | msb cp - box:/w/d").run().exits(1).complains("leads out");
    exec("test ! -e /w/evil");
    // A full disk: told, and nothing is there.
    std::fs::write(host.join("big"), vec![1; 3 << 20]).expect("a file");
    refused("big", "box:/small/big", "disk_full");
    std::fs::create_dir(host.join("bigdir")).expect("a directory");
    std::fs::rename(host.join("big"), host.join("bigdir/big")).expect("a rename");
    refused("bigdir", "box:/small", "disk_full");
    assert_eq!(exec("ls -A /small"), "");
    home.finish();
}

#[test]
fn a_copy_that_is_given_up_leaves_nothing() {
    let home = Home::with_busybox("copy_given_up");
    let host = home.scratch();
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let exec = |line: &str| home.msb(["exec", "box", "--", "sh", "-c", line]).run().succeeds().text();
    let wait = |line: &str, wanted: &str| {
        let begun = Instant::now();
        loop {
            let got = exec(line);
            if got == wanted {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{line}: {got:?} is not {wanted:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    exec("mkdir /in");
    // The first half of a file, and then a sender who is in no hurry.
    std::fs::write(host.join("f"), vec![7; 1 << 20]).expect("a file");
    let tar = home.shell("tar -c f").run().succeeds().stdout;
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::KILL] {
        let mut child = Command::new(msb_tests::tree().join("bin/msb"))
            .args(["cp", "-", "box:/in"])
            .env_clear()
            .env("HOME", home.scratch())
            .env("MSB_HOME", home.path())
            .env("XDG_RUNTIME_DIR", home.runtime())
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("msb cp");
        let mut input = child.stdin.take().expect("a pipe");
        input.write_all(&tar[..512 << 10]).expect("the copy takes its input");
        wait("ls -A /in | cut -c1-10", ".msb-copy-\n");
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).expect("a signal");
        let end = child.wait().expect("the end");
        if signal == rustix::process::Signal::INT {
            assert_eq!(end.code(), Some(130));
        }
        wait("ls -A /in", "");
    }
    // The sandbox stops under a copy: a typed error, and nothing on the host.
    exec("head -c 300000000 /dev/zero > /big");
    let running = home.msb(["--format", "json", "cp", "box:/big", "big"]).start();
    let begun = Instant::now();
    while !std::fs::read_dir(&host)
        .expect("the folder")
        .any(|entry| entry.expect("an entry").file_name().as_bytes().starts_with(b".msb-copy-"))
    {
        assert!(begun.elapsed() < Duration::from_secs(60), "the copy does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    // A copy that stands still holds a few hundred kibibytes, not the rest of the file.
    running.signal(rustix::process::Signal::STOP);
    home.succeeds(&["stop", "--force", "box"]);
    running.signal(rustix::process::Signal::CONT);
    running.finish().exits(1).complains("exec_lost");
    let mut names: Vec<_> =
        std::fs::read_dir(&host).expect("the folder").map(|entry| entry.expect("one").file_name()).collect();
    names.retain(|name| {
        name != "f" && !name.as_bytes().starts_with(b".config") && !name.as_bytes().starts_with(b".cache")
    });
    assert!(names.is_empty(), "{names:?}");
    home.finish();
}
