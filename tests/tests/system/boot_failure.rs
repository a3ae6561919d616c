//! A boot that fails keeps its evidence: the error shows it, and `logs` begins with it.

use std::path::{Path, PathBuf};

use msb_tests::{Home, tree};

/// A share folder like the installed one, with some files replaced.
pub(crate) fn share_with(home: &Home, replaced: &[(&str, &[u8])]) -> PathBuf {
    let folder = home.scratch().join("share");
    std::fs::create_dir_all(&folder).expect("a folder");
    for entry in std::fs::read_dir(tree().join("share/msb")).expect("the share folder").flatten() {
        let target = folder.join(entry.file_name());
        match replaced.iter().find(|(name, _)| Path::new(name) == Path::new(&entry.file_name())) {
            Some((_, bytes)) => std::fs::write(target, bytes).expect("a file"),
            None => std::os::unix::fs::symlink(entry.path(), target).expect("a link"),
        }
    }
    folder
}

/// An archive whose `/init` is this: the smallest broken guest.
fn initramfs(init: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, (name, mode, content)) in
        [("init", 0o100_755u32, init), ("TRAILER!!!", 0, b"".as_slice())].into_iter().enumerate()
    {
        bytes.extend_from_slice(b"070701");
        let fields = [index as u32 + 1, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        for field in fields {
            bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Boots, must fail, and returns what the error said together with the first lines of the log.
fn evidence(home: &Home, share: Option<&Path>, extra: &[&str]) -> (String, String) {
    // Load with the same share folder: the first command starts the daemon, which keeps it.
    let mut load = home
        .msb(["image", "load", "-i", msb_tests::image("busybox.tar").to_str().expect("UTF-8")])
        .env("MSB_BOOT_TIMEOUT", "20s");
    if let Some(share) = share {
        load = load.env("MSB_SHARE_DIR", share);
    }
    let _ = load.run().succeeds();
    let words: Vec<&str> = ["create", "--name", "broken"].iter().chain(extra).chain(&["busybox"]).copied().collect();
    let failed = home.msb(words).env("MSB_BOOT_TIMEOUT", "20s").run().exits(1);
    let detail = home.inspect("broken");
    assert_eq!(detail["status"], "crashed", "{detail}");
    assert!(detail["boot_error"]["stage"].is_string(), "{detail}");
    let log = log_of_broken(home);
    home.wait_for_no_machine();
    (failed.complaint(), log)
}

/// What `logs` says: what msb itself has to say comes on standard error, the workload's output on standard output.
fn log_of_broken(home: &Home) -> String {
    let log = home.msb(["logs", "broken"]).run().succeeds();
    format!("{}{}", log.complaint(), log.text())
}

#[test]
fn an_init_that_ends_at_once_is_shown_with_the_kernels_words() {
    let home = Home::new("broken_init");
    let share = share_with(&home, &[("initramfs.cpio", &initramfs(b"#!/no/such/interpreter\n"))]);
    let (complaint, log) = evidence(&home, Some(&share), &[]);
    for text in [&complaint, &log] {
        assert!(text.contains("panic") || text.contains("init"), "{text}");
    }
    home.finish();
}

#[test]
fn a_kernel_without_virtio_is_named_as_the_likely_cause() {
    let home = Home::new("silent_agent");
    // An init that never says anything is what a kernel without our devices looks like from outside.
    let share = share_with(&home, &[("initramfs.cpio", &initramfs(&sleeper()))]);
    let (complaint, log) = evidence(&home, Some(&share), &[]);
    assert!(complaint.contains("CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES"), "{complaint}");
    assert!(!log.is_empty());
    home.finish();
}

/// A program that sleeps for ever: `pause` (system call 34) in a loop.
fn sleeper() -> Vec<u8> {
    msb_tests::static_program(&[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7])
}

#[test]
fn files_that_are_no_kernels_are_refused_before_anything_boots() {
    let home = Home::with_busybox("bad_kernel");
    let text = home.scratch().join("text");
    std::fs::write(&text, "this is no kernel\n").expect("a file");
    let program = tree().join("bin/msb");
    for kernel in [text.as_path(), &program, Path::new("/no/such/kernel")] {
        let finished = home
            .msb(["--format", "json", "run", "--kernel", kernel.to_str().expect("UTF-8"), "busybox", "true"])
            .run()
            .exits(125);
        let said = format!("{}{}", finished.text(), finished.complaint());
        assert!(said.contains("invalid_kernel") || said.contains("path_not_found"), "{}", finished.account());
    }
    assert!(home.sandboxes().is_empty());
    home.finish();
}

#[test]
fn a_corrupt_root_is_told_and_the_other_sandboxes_go_on() {
    let home = Home::with_busybox("corrupt_root");
    home.succeeds(&["create", "--name", "good", "busybox"]);
    home.succeeds(&["create", "--name", "broken", "busybox"]);
    home.succeeds(&["stop", "broken"]);
    let disk = home.path().join("sandboxes/broken/upper.img");
    let size = std::fs::metadata(&disk).expect("the disk").len();
    std::fs::write(&disk, [0xa5; 1 << 20]).expect("noise");
    std::fs::OpenOptions::new().write(true).open(&disk).and_then(|file| file.set_len(size)).expect("its size");
    let failed = home.msb(["start", "broken"]).run().exits(1);
    assert!(failed.complaint().contains("mount") || failed.complaint().contains("root"), "{}", failed.account());
    assert!(!log_of_broken(&home).is_empty());
    home.msb(["exec", "good", "--", "echo", "on"]).run().succeeds().prints("on\n");
    home.finish();
}
