//! What `msb` prints and returns: stdout, stderr and exit code of every command against a service of canned answers, as
//! snapshots. User-visible text is an interface; a change of it is read in review here.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod service;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use service::Service;

fn msb(service: &Service, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_msb"));
    command.args(words).env_clear().current_dir(service.dir());
    command
        .env("MSB_HOST", &service.socket)
        .env("MSB_HOME", service.dir().join("home"))
        .env("TZ", "UTC0")
        .env("FROM_HOST", "from the host");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn shown(service: &Service, output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(service.dir().to_str().unwrap(), "[DIR]");
    let code = output.status.code().map_or("signal".to_owned(), |code| code.to_string());
    format!("exit: {code}\n----- stdout -----\n{}----- stderr -----\n{}", text(&output.stdout), text(&output.stderr))
}

fn session(lines: &[&[&str]]) -> String {
    let service = Service::start();
    let mut text = String::new();
    for words in lines {
        let output = msb(&service, words).output().unwrap();
        text.push_str(&format!("$ msb {}\n{}\n", words.join(" "), shown(&service, &output)));
    }
    text
}

fn run_with_input(service: &Service, words: &[&str], input: &[u8]) -> Output {
    let mut child = msb(service, words).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

#[test]
fn lists() {
    insta::assert_snapshot!(session(&[
        &["ls"],
        &["ls", "-q"],
        &["ls", "-a", "-q"],
        &["ls", "--running"],
        &["ls", "--stopped", "-q"],
        &["list", "--label", "team=ml", "-q"],
        &["ls", "--label", "=x"],
        &["ps"],
        &["ps", "-a"],
        &["ps", "old"],
        &["ps", "nobody"],
        &["--format", "json", "ps", "old"],
    ]));
}

#[test]
fn metrics_as_a_table_as_lines_and_for_programs() {
    insta::assert_snapshot!(session(&[
        &["metrics"],
        &["metrics", "--all", "--sort", "mem"],
        &["metrics", "-q", "--sort", "cpu", "-a"],
        &["metrics", "web", "--format", "json"],
        &["metrics", "old"],
        &["metrics", "nobody"],
        &["metrics", "--label", "team=ml", "-q"],
        &["metrics", "--label", "=x"],
        &["metrics", "--watch", "web"],
        &["metrics", "--follow", "web"],
        &["metrics", "--follow", "web", "--format", "json"],
        &["metrics", "--watch", "--follow"],
        &["metrics", "--watch", "--interval", "5ms"],
        &["metrics", "--sort", "disk"],
        &["top"],
        &["top", "--format", "json"],
    ]));
}

#[test]
fn inspecting() {
    insta::assert_snapshot!(session(&[
        &["inspect", "web"],
        &["inspect", "box", "--format", "json"],
        &["inspect", "nobody"],
        &["inspect", "nobody", "--format=json"],
        &["inspect", "../x"],
    ]));
}

#[test]
fn operations_on_several_go_on_after_a_failure() {
    insta::assert_snapshot!(session(&[
        &["stop", "old", "web", "web"],
        &["stop", "web", "old", "--format", "json"],
        &["stop", "-f", "web"],
        &["stop", "-f", "-t", "3", "web"],
        &["start", "--label", "team=ml", "old"],
        &["start", "--label", "gone"],
        &["start"],
        &["restart", "web"],
        &["rm", "web", "old"],
        &["rm", "-f", "web"],
        &["remove", "nobody"],
        &["detach", "web"],
        &["touch", "web", "nobody"],
        &["pause", "web", "old"],
        &["resume", "web", "--format", "json"],
        &["pause"],
        &["wait", "web"],
        &["wait", "web", "--format", "json"],
    ]));
}

#[test]
fn snapshots() {
    let service = Service::start();
    std::fs::write(service.dir().join("good.tar.zst"), "archive").unwrap();
    std::fs::write(service.dir().join("bad.tar.zst"), "!archive").unwrap();
    let mut text = String::new();
    for words in [
        &["snapshot", "create", "new", "--from", "old", "-l", "team=ml"][..],
        &["snapshot", "create", "warm", "--from", "old"],
        &["snapshot", "create", "new", "--from", "web"],
        &["snapshot", "create", "../x", "--from", "old"],
        &["snapshot", "create", "new", "--from", "old", "--pool", "2"],
        &["snapshot", "create", "new"],
        &["snapshot", "ls"],
        &["snap", "list", "-q"],
        &["snapshot", "ls", "--format", "json"],
        &["snapshot", "inspect", "warm"],
        &["snapshot", "inspect", "warmer", "--format", "json"],
        &["snapshot", "inspect", "gone"],
        &["snapshot", "verify", "warm", "bad", "gone"],
        &["snapshot", "verify", "warm", "--format", "json"],
        &["snapshot", "export", "warm", "-o", "out.tar.zst"],
        &["snapshot", "export", "warm"],
        &["snapshot", "export", "bad", "-o", "half.tar.zst"],
        &["snapshot", "export", "gone"],
        &["snapshot", "import", "-i", "good.tar.zst"],
        &["snapshot", "import", "-i", "good.tar.zst", "--name", "other"],
        &["snapshot", "import", "-i", "bad.tar.zst"],
        &["snapshot", "import", "-i", "missing.tar.zst"],
        &["snapshot", "rm", "warm", "warmer"],
        &["template", "ls"],
        &["template", "create", "new", "--from", "busybox", "--name", "x"],
        &["template", "create", "warm", "--from", "busybox"],
        &["create", "--snapshot", "warm"],
        &["create", "--snapshot", "gone"],
        &["create", "--snapshot", "warm", "--mkdir", "/x"],
        &["create"],
    ] {
        let output = msb(&service, words).output().unwrap();
        text.push_str(&format!("$ msb {}\n{}\n", words.join(" "), shown(&service, &output)));
    }
    let read = |name: &str| std::fs::read_to_string(service.dir().join(name)).ok();
    assert_eq!((read("out.tar.zst").as_deref(), read("half.tar.zst")), (Some("archive of warm"), None));
    insta::assert_snapshot!(text);
}

#[test]
fn images() {
    let service = Service::start();
    std::fs::write(service.dir().join("good.tar"), "archive").unwrap();
    std::fs::write(service.dir().join("bad.tar"), "!archive").unwrap();
    let mut text = String::new();
    for words in [
        &["image", "load", "-i", "good.tar"][..],
        &["load", "-i", "good.tar", "--format", "json"],
        &["image", "load", "-i", "bad.tar"],
        &["image", "load", "-i", "missing.tar"],
        &["image", "load", "-i", "."],
        &["image", "ls"],
        &["images", "-q"],
        &["image", "list", "--digests"],
        &["image", "inspect", "busybox"],
        &["image", "inspect", "nothing"],
        &["rmi", "busybox", "used", "gone"],
        &["image", "history", "busybox"],
        &["image", "tag", "busybox", "mine:1"],
        &["image", "tag", "gone", "mine:1"],
        &["image", "pin", "busybox", "gone"],
        &["image", "unpin", "busybox"],
        &["image", "prune"],
        &["image", "prune", "--dry-run"],
        &["image", "prune", "--yes", "--filter", "label=nothing"],
        &["image", "prune", "--yes", "--older-than", "7d", "--keep-size", "1G", "--format", "json"],
        &["image", "prune", "--yes", "--filter", "until=3h"],
        &["df"],
        &["pull", "busybox"],
        &["image", "pull", "--platform", "linux/arm64", "busybox", "--format", "json"],
        &["pull", "gone"],
        &["pull", "--password-stdin", "busybox"],
        &["pull", "--ca-certs", "missing.pem", "busybox"],
        &["registry", "list"],
        &["registry", "login", "r.test"],
        &["registry", "logout", "r.test"],
        &["create", "--pull", "always", "gone"],
        &["save", "busybox"],
        &["image", "save", "--format", "oci", "busybox", "-o", "saved.tar"],
        &["save", "gone"],
        &["save", "broken", "-o", "broken.tar"],
        &["image", "ls", "--format", "oci"],
    ] {
        text.push_str(&format!(
            "$ msb {}\n{}\n",
            words.join(" "),
            shown(&service, &msb(&service, words).output().unwrap())
        ));
    }
    insta::assert_snapshot!(text);
    assert_eq!(std::fs::read_to_string(service.dir().join("saved.tar")).unwrap(), "oci archive of busybox");
    assert!(!service.dir().join("broken.tar").exists(), "what broke off has no name");
    let login = ["registry", "login", "-u", "me", "--password-stdin", "r.test"];
    let logged_in = run_with_input(&service, &login, b"right\n");
    let said = String::from_utf8_lossy(&logged_in.stderr).into_owned();
    assert!(logged_in.status.success() && said.contains("not encrypted, in /home/u/.msb/registries.json"), "{said}");
    assert_eq!(run_with_input(&service, &login, b"wrong").status.code(), Some(1));
    let piped = run_with_input(&service, &["load"], b"archive");
    assert_eq!((piped.status.code(), &piped.stdout[..]), (Some(0), &b"busybox:latest\n"[..]));
}

#[test]
fn creating() {
    insta::assert_snapshot!(session(&[
        &["create", "--name", "new", "-c", "1", "-m", "256M", "busybox"],
        &["create", "busybox"],
        &["create", "--name", "web", "busybox"],
        &["create", "--name", "web", "--replace", "busybox"],
        &["create", "--name", "new", "-c", "0", "busybox"],
        &["create", "--name", "new", "-m", "0", "busybox"],
        &["create", "--name", "new", "-m", "lots", "busybox"],
        &["create", "--name", "bad/name", "busybox"],
        &["create", "alpine"],
        &["create", "-p", "80:80", "busybox"],
        &["create", "-e", "UNSET", "busybox"],
        &["create"],
        &["run", "-d", "--name", "new", "busybox", "--", "sleep", "9"],
        &["run", "alpine"],
        &["run", "--no-such-flag", "busybox"],
        &["run", "-d", "--timeout", "3", "busybox"],
    ]));
}

#[test]
fn logs_and_events() {
    insta::assert_snapshot!(session(&[
        &["logs", "web"],
        &["logs", "-t", "-n", "1", "web"],
        &["logs", "--json", "--tail", "1", "web"],
        &["logs", "--source", "nowhere", "web"],
        &["logs", "--since", "yesterday", "web"],
        &["logs", "nobody"],
        &["events"],
        &["events", "--format", "json"],
    ]));
}

#[test]
fn what_is_not_built_says_so() {
    let service = Service::start();
    let words = ["create", "--secret", "a", "busybox"];
    let output = msb(&service, &words).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.starts_with("error: --secret ") && error.contains("is not built yet"), "{error}");
    let output = msb(&service, &[&["--format", "json"], &words[..]].concat()).output().unwrap();
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["code"], "not_implemented", "{error}");
}

#[test]
fn exec_streams_and_returns_the_commands_own_code() {
    insta::assert_snapshot!(session(&[
        &["exec", "web", "--", "echo", "hello"],
        &["exec", "web", "echo", "--", "-x"],
        &["exec", "web", "both"],
        &["exec", "web", "exit", "7"],
        &["exec", "web", "die", "9"],
        &["exec", "web", "late"],
        &["exec", "web", "missing"],
        &["exec", "web", "plain-file"],
        &["exec", "web", "lose"],
        &["exec", "old", "echo"],
        &["exec", "nobody", "echo"],
        &["exec", "nobody", "echo", "--format", "json"],
        &["--format", "json", "exec", "nobody", "echo"],
        &["exec", "web"],
        &["exec", "--nonsense", "web", "x"],
        &["exec", "-it", "web", "sh"],
        &[
            "exec",
            "-e",
            "A=1",
            "-e",
            "FROM_HOST",
            "-w",
            "/w",
            "-u",
            "app",
            "--timeout",
            "90",
            "--rlimit",
            "nofile=10",
            "web",
            "request"
        ],
    ]));
}

#[test]
fn run_streams_and_returns_the_commands_own_code() {
    let lines = session(&[
        &["run", "busybox", "echo", "hello"],
        &["run", "busybox", "--", "both"],
        &["run", "--rm", "--name", "tmp", "busybox", "exit", "7"],
        &["run", "busybox", "die", "15"],
        &["run", "--timeout", "2s", "busybox", "request"],
        &["run", "busybox", "late"],
        &["run", "busybox", "missing"],
        &["run", "busybox", "plain-file"],
        &["run", "busybox", "lose"],
        &["run", "-it", "busybox", "sh"],
    ]);
    insta::assert_snapshot!(lines);
    let service = Service::start();
    let output = run_with_input(&service, &["run", "-i", "busybox", "--", "cat"], b"data\n");
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"data\n"[..]));
}

#[test]
fn stdin_is_forwarded_whole_and_only_when_asked_for() {
    let service = Service::start();
    let input: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let output = run_with_input(&service, &["exec", "-i", "web", "cat"], &input);
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stdout == input, "{} of {} bytes came back", output.stdout.len(), input.len());
    let output = run_with_input(&service, &["exec", "web", "request"], b"ignored");
    assert!(String::from_utf8(output.stdout).unwrap().contains("\"stdin\":false"));
}

#[test]
fn a_reader_that_goes_ends_msb_quietly() {
    let service = Service::start();
    let mut child = msb(&service, &["exec", "web", "yes"]).spawn().unwrap();
    let mut first = [0u8; 2];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(141), ""));
    // A list into a pipe that is closed from the start.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = msb(&service, &["ls"]).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(141), ""));
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let output = msb(&service, &["ls"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot write to standard output"));
}

fn signal(child: &std::process::Child, number: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), number).unwrap();
}

#[test]
fn signals_reach_the_workload() {
    use nix::sys::signal::Signal;
    let service = Service::start();
    let mut child = msb(&service, &["exec", "web", "signals"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    for number in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        signal(&child, number);
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
    }
    signal(&child, Signal::SIGTERM);
    assert_eq!(lines.next().unwrap().unwrap(), "[2, 1, 10, 15]");
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn a_stopped_reader_does_not_keep_a_person_from_insisting() {
    use nix::sys::signal::Signal;
    let service = Service::start();
    // Nobody reads this pipe, so msb's writing thread blocks.
    let mut child = msb(&service, &["exec", "web", "yes"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    for _ in 0..3 {
        signal(&child, Signal::SIGINT);
        std::thread::sleep(Duration::from_millis(50));
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "msb still runs");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn doctor_finds_and_redacts() {
    let service = Service::start();
    let output = msb(&service, &["doctor", "--store", "--bundle", "report.tar"]).output().unwrap();
    let text = shown(&service, &output);
    assert_eq!(output.status.code(), Some(1), "a damaged store is a problem: {text}");
    for part in ["kvm", "/dev/kvm does not exist", "software emulation", "blob sha256:12 is damaged", "40 GiB free"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let mut archive = tar::Archive::new(std::fs::File::open(service.dir().join("report.tar")).unwrap());
    let mut names = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        names.push(entry.path().unwrap().display().to_string());
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        assert!(!text.contains("hunter2"), "{names:?}");
    }
    assert_eq!(names.len(), 5, "{names:?}");
    let checks = msb(&service, &["doctor", "--format", "json"]).output().unwrap();
    // The canned host has no kernel file.
    assert_eq!(checks.status.code(), Some(1));
    assert!(serde_json::from_slice::<serde_json::Value>(&checks.stdout).unwrap().as_array().unwrap().len() > 5);
}

#[test]
fn settings_are_shown_with_their_origin() {
    let service = Service::start();
    std::fs::create_dir(service.dir().join("home")).unwrap();
    let file = service.dir().join("home/config.toml");
    std::fs::write(&file, "[sandbox]\ncpus = 2\n").unwrap();
    let run = |words: &[&str]| shown(&service, &msb(&service, words).env("MSB_MEMORY", "1G").output().unwrap());
    let good = run(&["config", "show", "--origin"]);
    std::fs::write(&file, "cpu = 2\n").unwrap();
    insta::assert_snapshot!(format!("{good}\n{}", run(&["create", "busybox"])));
}

#[test]
fn without_a_service_and_without_a_daemon_the_error_says_what_to_do() {
    let service = Service::start();
    let mut command = msb(&service, &["ls"]);
    command.env("MSB_HOST", service.dir().join("gone.sock"));
    let named = shown(&service, &command.output().unwrap());
    let mut command = msb(&service, &["ls", "--format", "json"]);
    command
        .env_remove("MSB_HOST")
        .env("MSB_DAEMON", service.dir().join("no-msbd"))
        .env("XDG_RUNTIME_DIR", service.dir());
    let missing = shown(&service, &command.output().unwrap());
    let mut command = msb(&service, &["version"]);
    command.env_remove("MSB_HOST").env("XDG_RUNTIME_DIR", service.dir());
    let version = shown(&service, &command.output().unwrap());
    insta::assert_snapshot!(format!("{named}\n{missing}\n{version}"));
}

#[test]
fn help_of_every_command() {
    fn page(command: &clap::Command, path: &str, text: &mut String) {
        let mut command = command.clone().term_width(110);
        text.push_str(&format!("===== {path} =====\n{}\n", command.render_help()));
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
            page(sub, &format!("{path} {}", sub.get_name()), text);
        }
    }
    let mut command = msb_cli::command();
    command.build();
    let mut text = String::new();
    page(&command, "msb", &mut text);
    insta::assert_snapshot!(text);
}

#[test]
fn the_short_ways_to_help_work() {
    let service = Service::start();
    let help = msb(&service, &["--help"]).output().unwrap();
    assert_eq!(help.status.code(), Some(0));
    for words in [&[][..], &["-h"], &["help"]] {
        let output = msb(&service, words).output().unwrap();
        assert_eq!((output.status.code(), &output.stdout), (Some(0), &help.stdout), "{words:?}");
    }
    assert!(!help.stdout.contains(&0x1b), "colours only on a terminal");
    let tree = msb(&service, &["--tree"]).output().unwrap();
    assert!(String::from_utf8(tree.stdout).unwrap().contains("exec"));
    for shell in ["bash", "zsh", "fish"] {
        let script = msb(&service, &["completion", shell]).output().unwrap();
        assert!(script.status.success() && script.stdout.len() > 1000, "{shell}");
    }
    let usage = msb(&service, &["ls", "--nonsense"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
}

/// A terminal of its own for one `msb`.
struct Terminal {
    master: std::os::fd::OwnedFd,
    slave: std::os::fd::OwnedFd,
}

impl Terminal {
    fn open(rows: u16, columns: u16) -> Self {
        let master = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
        rustix::pty::grantpt(&master).unwrap();
        rustix::pty::unlockpt(&master).unwrap();
        let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        let terminal = Self { master, slave };
        terminal.resize(rows, columns);
        terminal
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.slave, size).unwrap();
    }

    fn is_raw(&self) -> bool {
        let modes = rustix::termios::tcgetattr(&self.slave).unwrap().local_modes;
        !modes.intersects(
            rustix::termios::LocalModes::ICANON | rustix::termios::LocalModes::ECHO | rustix::termios::LocalModes::ISIG,
        )
    }

    fn spawn(&self, mut command: Command) -> std::process::Child {
        let end = || self.slave.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end()).env("TERM", "dumb").spawn().unwrap()
    }

    fn type_text(&self, text: &[u8]) {
        rustix::io::write(&self.master, text).unwrap();
    }

    /// Reads until the screen has shown this.
    fn expect(&self, text: &str) {
        let mut seen = Vec::new();
        let mut buffer = [0u8; 256];
        let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
        while !String::from_utf8_lossy(&seen).contains(text) {
            let mut ready = [rustix::event::PollFd::new(&self.master, rustix::event::PollFlags::IN)];
            let count = rustix::event::poll(&mut ready, Some(&limit)).unwrap();
            assert!(count == 1, "{text:?} never came: {:?}", String::from_utf8_lossy(&seen));
            let len = rustix::io::read(&self.master, &mut buffer[..]).unwrap();
            seen.extend_from_slice(&buffer[..len]);
        }
    }
}

#[test]
fn the_terminal_is_handed_over_and_given_back() {
    let service = Service::start();
    let terminal = Terminal::open(30, 100);
    assert!(!terminal.is_raw());
    // Leaving by the detach keys.
    let mut child = terminal.spawn(msb(&service, &["exec", "-it", "web", "ready-cat"]));
    terminal.expect("ready");
    terminal.type_text(b"hello\x03");
    // In raw mode nothing but the workload echoes, and Ctrl-C is a byte for it.
    terminal.expect("hello\x03");
    assert!(terminal.is_raw());
    terminal.type_text(b"\x1d");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!terminal.is_raw());
    // The workload's own end; a new size on the way.
    let mut child = terminal.spawn(msb(&service, &["exec", "-it", "web", "sizes"]));
    terminal.expect("ready");
    terminal.resize(40, 120);
    signal(&child, nix::sys::signal::Signal::SIGWINCH);
    terminal.expect("40x120");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!terminal.is_raw());
    // A person who insists from another terminal, and a lost connection.
    let mut child = terminal.spawn(msb(&service, &["exec", "-it", "web", "signals"]));
    terminal.expect("ready");
    for _ in 0..3 {
        signal(&child, nix::sys::signal::Signal::SIGINT);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!terminal.is_raw());
    let mut child = terminal.spawn(msb(&service, &["exec", "-it", "web", "lose"]));
    assert_eq!(child.wait().unwrap().code(), Some(125));
    assert!(!terminal.is_raw());
}

#[test]
fn a_terminal_is_asked_for_with_its_size_and_kind() {
    let service = Service::start();
    let terminal = Terminal::open(30, 100);
    let mut child = terminal.spawn(msb(&service, &["exec", "-it", "web", "request"]));
    terminal.expect("\"TERM\":\"dumb\"");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut child = terminal.spawn(msb(&service, &["exec", "-it", "web", "request"]));
    terminal.expect("\"terminal\":{\"rows\":30,\"columns\":100}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_wait_is_shown_on_a_terminal_and_nowhere_else() {
    let service = Service::start();
    let terminal = Terminal::open(30, 100);
    let mut child = terminal.spawn(msb(&service, &["create", "--name", "new", "busybox"]));
    terminal.expect("software emulation: slow, not a security boundary");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let output = msb(&service, &["create", "--name", "new", "busybox"]).output().unwrap();
    assert!(output.stderr.is_empty());
}
