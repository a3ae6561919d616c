//! An upgrade: machines that older programs have started go on under the new service, and only what they are too old for is refused.

use std::path::Path;
use std::process::Command;

use msb_tests::Home;
use rustix::process::Signal;

use crate::boot_failure::share_with;

/// The service ends, as for an upgrade; the next command starts the one under test.
fn upgrade(home: &Home) {
    home.daemon().signal(Signal::TERM);
    for _ in 0..600 {
        if home.running("msbd").is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    panic!("the old service does not end");
}

#[test]
fn exec_works_on_an_agent_of_the_first_generation_and_a_newer_call_is_refused() {
    let Some(initramfs) = std::env::var_os("MSB_TEST_FIRST_AGENT") else {
        println!(
            "skipped: no agent of generation 1; `cargo xtask test` compiles it where the repository has its history"
        );
        return;
    };
    let home = Home::new("first_generation");
    let agent = std::fs::read(initramfs).expect("the agent of generation 1");
    let share = share_with(&home, &[("initramfs.cpio", &agent)]);
    let archive = msb_tests::image("busybox.tar");
    let load = ["image", "load", "-i", archive.to_str().expect("UTF-8")];
    let _ = home.msb(load).env("MSB_SHARE_DIR", &share).run().succeeds();
    home.succeeds(&["run", "-d", "--name", "old", "busybox", "--", "sh", "-c", "echo begun; exec sleep 600"]);
    let machine = home.inspect("old")["vmm_pid"].clone();

    upgrade(&home);
    home.msb(["exec", "-i", "old", "--", "sh", "-c", "echo on; cat"])
        .input("stdin")
        .run()
        .succeeds()
        .prints("on\nstdin");
    let _ = home.msb(["exec", "old", "--", "sh", "-c", "exit 3"]).run().exits(3);
    assert_eq!(home.succeeds(&["logs", "old"]), "begun\n");
    assert_eq!(home.inspect("old")["vmm_pid"], machine);
    let said = home.fails(&["cp", "old:/etc/passwd", "passwd"], 1, "unsupported_operation");
    assert!(said.contains("restart the sandbox"), "{said}");
    // It says the truth.
    home.succeeds(&["restart", "old"]);
    home.succeeds(&["cp", "old:/etc/passwd", "passwd"]);
    home.finish();
}

#[test]
fn machines_of_earlier_programs_go_on_after_an_upgrade() {
    let kept = std::env::var_os("MSB_TEST_EARLIER").unwrap_or_default();
    let trees: Vec<_> = std::env::split_paths(&kept).filter(|tree| tree.join("bin/msb").is_file()).collect();
    if trees.is_empty() {
        println!("skipped: this machine has tested no other generation than this one yet");
    }
    for tree in trees {
        println!("from {}", tree.display());
        let home = Home::new("earlier_generation");
        let archive = msb_tests::image("busybox.tar");
        earlier(&home, &tree, &["image", "load", "-i", archive.to_str().expect("UTF-8")]);
        earlier(
            &home,
            &tree,
            &["run", "-d", "--name", "old", "busybox", "--", "sh", "-c", "echo begun; exec sleep 600"],
        );
        let machine = home.running("msb-vmm").first().map(|process| process.pid);
        upgrade(&home);
        home.msb(["exec", "old", "--", "echo", "on"]).run().succeeds().prints("on\n");
        assert_eq!(home.succeeds(&["logs", "old"]), "begun\n");
        assert_eq!(home.running("msb-vmm").first().map(|process| process.pid), machine);
        home.succeeds(&["exec", "old", "--", "sh", "-c", "echo kept > /root/note"]);
        home.succeeds(&["restart", "old"]);
        assert_eq!(home.succeeds(&["exec", "old", "--", "cat", "/root/note"]), "kept\n");
        home.finish();
    }
}

/// The command of an earlier tree, with the service and the VM process that lie beside it.
#[track_caller]
fn earlier(home: &Home, tree: &Path, words: &[&str]) {
    let like = home.command("msb", words);
    let mut command = Command::new(tree.join("bin/msb"));
    command.args(words).env_clear().current_dir(home.scratch());
    for (name, value) in like.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        command.env(name, value);
    }
    // Its own programs come first there.
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let output = command.stdin(std::process::Stdio::null()).output().expect("an earlier msb");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}
