//! The machine as an administrator and its users meet it: commands, what they print, conditions that are waited for.

use std::fmt::Display;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for anything: the machine is emulated and may be one of several on a slow host.
const PATIENCE: Duration = Duration::from_secs(120);

/// Users of the lab. The first two are in group msb.
pub(crate) const ANN: &str = "ann";
pub(crate) const BOB: &str = "bob";
pub(crate) const CARL: &str = "carl";

/// Installs the package and makes the users.
pub(crate) fn furnish() {
    let began = Instant::now();
    assert!(!["cc", "gcc", "ld", "cargo"].iter().any(|name| Path::new("/usr/bin").join(name).exists()), "compilers");
    succeeds("dpkg", &["--install", "/payload/msb.deb"]);
    println!("installed after {:.1} s", began.elapsed().as_secs_f64());
    for name in [ANN, BOB, CARL] {
        succeeds("useradd", &["--create-home", "--shell", "/bin/bash", name]);
    }
    for name in [ANN, BOB] {
        succeeds("usermod", &["--append", "--groups", "msb", name]);
    }
}

/// Runs a command that must succeed, and returns what it printed.
#[track_caller]
pub(crate) fn succeeds(program: &str, words: &[&str]) -> String {
    let output = run(program, words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {words:?}: {}\n{text}{said}", output.status);
    text
}

/// Runs a command.
#[track_caller]
pub(crate) fn run(program: &str, words: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// `msb` as a user who is logged in nowhere: a job of the host's.
#[track_caller]
pub(crate) fn msb(user: &str, words: &[&str]) -> String {
    let output = try_msb(user, words);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "msb {words:?} of {user}: {}\n{said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same, however it ends.
pub(crate) fn try_msb(user: &str, words: &[&str]) -> Output {
    command(user, words).stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("setpriv: {error}"))
}

fn command(user: &str, words: &[&str]) -> Command {
    let home = format!("/home/{user}");
    let mut command = Command::new("setpriv");
    command.args(["--reuid", user, "--regid", user, "--init-groups", "--", "msb"]).args(words);
    command.env_clear().env("HOME", &home).env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8").current_dir(&home);
    command
}

/// A command that runs in a sandbox and answers each line with itself, held by a client that survives.
pub(crate) struct Session {
    client: Child,
    answers: Receiver<String>,
}

impl Session {
    /// Opens one, which answers.
    #[track_caller]
    pub(crate) fn open(user: &str, name: &str) -> Self {
        let mut client = command(user, &["--format", "json", "exec", "-i", name, "--", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("setpriv: {error}"));
        let output = client.stdout.take().expect("its output");
        let (sender, answers) = sync_channel(16);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut session = Self { client, answers };
        assert_eq!(session.ask("before"), Some("before".to_owned()), "the session is not there");
        session
    }

    /// What it answers; nothing if it has ended.
    fn ask(&mut self, line: &str) -> Option<String> {
        let input = self.client.stdin.as_mut().expect("its input");
        writeln!(input, "{line}").and_then(|()| input.flush()).ok()?;
        match self.answers.recv_timeout(PATIENCE) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("a session neither answers nor ends"),
        }
    }

    /// How it came through what happened to the service: it answers as before, or it has ended with an error that says so.
    #[track_caller]
    pub(crate) fn fate(mut self) -> &'static str {
        if self.ask("after").is_some_and(|answer| answer == "after") {
            drop(self.client.stdin.take());
            let status = self.client.wait().expect("its end");
            assert!(status.success(), "{status}");
            return "intact";
        }
        let output = self.client.wait_with_output().expect("its end");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains("exec_lost"), "{said}");
        "ended with exec_lost"
    }
}

/// A shell line in a session of its own: logged in by `su -`, logged out at its end.
#[track_caller]
pub(crate) fn session(user: &str, line: &str) -> String {
    succeeds("su", &["-", user, "-c", line])
}

/// `inspect` of a user's sandbox.
#[track_caller]
pub(crate) fn inspect(user: &str, name: &str) -> Value {
    let text = msb(user, &["inspect", "--format", "json", name]);
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    match value {
        Value::Array(mut several) if several.len() == 1 => several.remove(0),
        one => one,
    }
}

/// The image that every user loads.
#[track_caller]
pub(crate) fn load(user: &str) {
    msb(user, &["image", "load", "-i", "/payload/images/busybox.tar"]);
}

/// Runs a detached sandbox that sleeps.
#[track_caller]
pub(crate) fn sleeper(user: &str, name: &str, options: &[&str]) {
    let words: Vec<&str> =
        ["run", "-d", "--name", name].iter().chain(options).chain(&["busybox", "sleep", "86400"]).copied().collect();
    msb(user, &words);
}

/// The process of a running sandbox's machine.
#[track_caller]
pub(crate) fn process(user: &str, name: &str) -> u32 {
    let detail = inspect(user, name);
    let pid = detail["vmm_pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    pid.unwrap_or_else(|| panic!("{name} has no process: {detail}"))
}

/// Whether a process is there, and no zombie.
pub(crate) fn lives(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// The control group of a process.
#[track_caller]
pub(crate) fn group(pid: u32) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_else(|error| panic!("{pid}: {error}"));
    text.trim().rsplit(':').next().unwrap_or_default().to_owned()
}

/// Processes that run this program of ours, of this user or of everybody.
pub(crate) fn processes(program: &str, user: Option<&str>) -> Vec<u32> {
    let uid = user.map(|user| succeeds("id", &["-u", user]).trim().to_owned());
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
            let owner =
                status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.to_owned();
            (name.trim() == program && uid.as_ref().is_none_or(|uid| *uid == owner) && lives(pid)).then_some(pid)
        })
        .collect()
}

/// One property of a unit of the host's.
#[track_caller]
pub(crate) fn property(unit: &str, name: &str) -> String {
    succeeds("systemctl", &["show", "--value", "--property", name, unit]).trim().to_owned()
}

/// Waits until something is so, and returns how long that took.
#[track_caller]
pub(crate) fn wait_until(what: impl Display, condition: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "not within {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(100));
    }
    began.elapsed()
}

/// Writes settings beside a unit.
pub(crate) fn drop_in(unit: &str, folder: &str, text: &str) {
    let folder = PathBuf::from(format!("/etc/systemd/{folder}/{unit}.d"));
    std::fs::create_dir_all(&folder).expect("a folder of systemd's");
    std::fs::write(folder.join("test.conf"), text).expect("settings beside a unit");
}

/// Adds a line to a file, on the disk before this returns.
pub(crate) fn note(path: &str, line: &str) {
    let mut file = std::fs::File::options().create(true).append(true).open(path).expect("the file of what was done");
    writeln!(file, "{line}").and_then(|()| file.sync_all()).expect("the file of what was done");
}

/// Boots the machine in order; ends with it.
pub(crate) fn boot() -> ! {
    succeeds("systemctl", &["reboot"]);
    loop {
        std::thread::sleep(Duration::from_secs(60));
    }
}

/// What a failure is understood by.
pub(crate) fn account() {
    for (program, words) in [
        ("journalctl", &["--boot", "--no-pager", "--lines=80", "--output=short-monotonic"][..]),
        ("systemd-cgls", &["--no-pager", "--full"]),
        ("systemctl", &["--no-pager", "--failed"]),
    ] {
        let output = run(program, words);
        println!("--- {program}\n{}", String::from_utf8_lossy(&output.stdout));
    }
    for user in [ANN, BOB, CARL] {
        let log = std::fs::read_to_string(format!("/home/{user}/.msb/msbd.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        println!("--- msbd.log of {user}\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
    }
}
