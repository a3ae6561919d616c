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
    let (mut hash, mut count, mut growth) = (Sha256::new(), 0u64, vec![0u64; watched.len()]);
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
            for ((process, before), most) in watched.iter().zip(&before).zip(&mut growth) {
                *most = (*most).max(process.private_memory_bytes().saturating_sub(*before));
            }
        }
    }
    assert_eq!(child.wait().expect("the end").code(), Some(0));
    assert_eq!(count, TOTAL);
    assert_eq!(hash.finalize(), writer.join().expect("the writer"), "the bytes changed on the way");
    for (process, growth) in watched.iter().zip(&growth) {
        println!("{} grew by {} KiB", process.program, growth >> 10);
    }
    assert!(growth.iter().all(|growth| *growth <= GROWTH_MAX), "a process grew by more than {GROWTH_MAX} bytes");
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

/// How many commands at once: `cargo xtask soak` takes a thousand.
fn execs_at_once() -> usize {
    std::env::var("MSB_TEST_EXECS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn many_execs_at_once_each_have_their_own_streams_and_cost_little() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let count = execs_at_once();
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let home = Home::with_busybox("many_execs");
    home.succeeds(&["create", "--name", "box", "-m", "1G", "busybox"]);
    let _ = home.msb(["exec", "-i", "box", "--", "cat"]).input(vec![7; 1 << 20]).run().succeeds();
    let watched: Vec<_> = home
        .processes()
        .into_iter()
        .filter(|process| process.program == "msbd" || process.program == "msb-vmm")
        .collect();
    let before: Vec<u64> = watched.iter().map(msb_tests::Process::private_memory_bytes).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let growth = runtime.block_on(async {
        let client = crate::sdk::client(&home).await;
        let box_name = msb_sdk::protocol::id::SandboxName::parse("box").expect("a name");
        let request = |index: usize| msb_sdk::protocol::control::ExecRequest {
            command: vec!["sh".into(), "-c".into(), format!("read line; echo $line {index}; exit {}", index % 7)],
            stdin: true,
            ..Default::default()
        };
        // All of them are there before the first may end.
        let mut sessions = Vec::new();
        for index in 0..count {
            let mut session = client.exec(&box_name, request(index)).await.expect("an exec");
            let begun = session.next().await.expect("a start");
            assert!(matches!(begun, Some(msb_sdk::SessionEvent::Started { .. })), "{index}: {begun:?}");
            sessions.push(session);
        }
        let growth = watched
            .iter()
            .zip(&before)
            .map(|(process, before)| process.private_memory_bytes().saturating_sub(*before))
            .max()
            .unwrap_or_default();
        for (index, session) in sessions.into_iter().enumerate() {
            let output = session.collect(Some(b"line\n".to_vec()), 1 << 10).await.expect("its end");
            let wanted = format!("line {index}\n");
            assert_eq!((output.stdout_text().as_str(), output.end.code), (wanted.as_str(), Some((index % 7) as i32)));
        }
        growth
    });
    println!("{count} commands at once: the largest process grew by {} KiB", growth >> 10);
    let allowed = (8 << 20) + count as u64 * (128 << 10);
    assert!(growth <= allowed, "a process grew by {growth} bytes for {count} commands");
    home.finish();
}
