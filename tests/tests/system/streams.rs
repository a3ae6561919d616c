//! Bytes through a sandbox: all of them, in order, with back-pressure instead of memory.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use msb_tests::Home;
use sha2::{Digest, Sha256};

/// How much goes through; a gibibyte under software emulation takes a minute or two.
const TOTAL: u64 = 1 << 30;
/// How much any of the processes on the way may grow.
const GROWTH_MAX: u64 = 16 << 20;

#[test]
fn a_gibibyte_through_cat_arrives_intact_and_no_process_grows() {
    let home = Home::with_busybox("gibibyte");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    // Warm: the first bytes allocate what every stream needs.
    let _ = home.msb(["exec", "-i", "box", "--", "cat"]).input(vec![7; 4 << 20]).run().succeeds();

    let watched: Vec<_> = home
        .processes()
        .into_iter()
        .filter(|process| process.program == "msbd" || process.program == "msb-vmm")
        .collect();
    assert!(watched.len() >= 2, "{watched:?}");
    let before: Vec<u64> = watched.iter().map(msb_tests::Process::private_memory_bytes).collect();

    let mut command = std::process::Command::new(msb_tests::tree().join("bin/msb"));
    command
        .args(["exec", "-i", "box", "--", "cat"])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", home.scratch())
        .env("MSB_HOME", home.path())
        .env("XDG_RUNTIME_DIR", home.runtime())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().expect("msb exec");
    let mut input = child.stdin.take().expect("a pipe");
    let writer = std::thread::spawn(move || {
        let mut hash = Sha256::new();
        let mut piece = vec![0u8; 1 << 20];
        for index in 0..TOTAL >> 20 {
            for (offset, byte) in piece.iter_mut().enumerate() {
                *byte = (offset as u64 * 31 + index * 17).to_le_bytes()[0];
            }
            hash.update(&piece);
            input.write_all(&piece).expect("the command takes its input");
        }
        hash.finalize()
    });
    let mut output = child.stdout.take().expect("a pipe");
    let (mut hash, mut count, mut growth) = (Sha256::new(), 0u64, 0u64);
    let mut piece = vec![0u8; 1 << 20];
    let mut last = Instant::now();
    loop {
        let read = output.read(&mut piece).expect("output");
        if read == 0 {
            break;
        }
        hash.update(&piece[..read]);
        count += read as u64;
        assert!(last.elapsed() < Duration::from_secs(20), "stalled at {count} bytes");
        last = Instant::now();
        if count % (64 << 20) < read as u64 {
            let now = watched
                .iter()
                .zip(&before)
                .map(|(process, before)| process.private_memory_bytes().saturating_sub(*before));
            growth = growth.max(now.max().unwrap_or_default());
        }
    }
    assert_eq!(child.wait().expect("the end").code(), Some(0));
    assert_eq!(count, TOTAL);
    assert_eq!(hash.finalize(), writer.join().expect("the writer"), "the bytes changed on the way");
    assert!(growth <= GROWTH_MAX, "a process grew by {growth} bytes");
    home.finish();
}

#[test]
fn output_that_nobody_reads_waits_instead_of_piling_up() {
    let home = Home::with_busybox("back_pressure");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    let mut command = std::process::Command::new(msb_tests::tree().join("bin/msb"));
    command
        .args(["exec", "box", "--", "sh", "-c", "dd if=/dev/zero bs=1M count=256 2>/dev/null; echo done > /tmp/done"])
        .env_clear()
        .env("HOME", home.scratch())
        .env("MSB_HOME", home.path())
        .env("XDG_RUNTIME_DIR", home.runtime())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = command.spawn().expect("msb exec");
    std::thread::sleep(Duration::from_secs(5));
    // The writer in the guest is held by a reader that does not read, and other streams are not.
    home.msb(["exec", "box", "--", "sh", "-c", "test -e /tmp/done && echo done || echo held"])
        .run()
        .succeeds()
        .prints("held\n");
    let mut rest = Vec::new();
    child.stdout.take().expect("a pipe").read_to_end(&mut rest).expect("output");
    assert_eq!(rest.len(), 256 << 20);
    assert_eq!(child.wait().expect("the end").code(), Some(0));
    home.finish();
}

#[test]
fn standard_input_ends_where_the_callers_ends() {
    let home = Home::with_busybox("stdin_end");
    home.succeeds(&["create", "--name", "box", "busybox"]);
    home.msb(["exec", "-i", "box", "--", "sh", "-c", "cat; echo end"])
        .input("no newline")
        .run()
        .succeeds()
        .prints("no newlineend\n");
    home.msb(["exec", "-i", "box", "--", "wc", "-c"]).input("").run().succeeds().prints("0\n");
    // Without -i the command has no input at all, and does not take the caller's.
    home.shell("echo mine | (msb exec box -- cat; cat)").run().succeeds().prints("mine\n");
    // A command that reads nothing leaves its sender unharmed.
    let _ = home.msb(["exec", "-i", "box", "--", "true"]).input(vec![0; 2 << 20]).run().succeeds();
    home.finish();
}
