//! Real sessions over socket pairs on the test machine's own root, without cgroups: what a caller of the agent sees.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use msb_guest::agent::{Agent, connection};
use msb_guest::root::directory::RootDirectory;
use msb_guest::security::Security;
use msb_guest::session::pump::{Door, OutputLog};
use msb_guest::session::workload::Host;
use msb_guest::session::{Guest, Sessions};
use msb_protocol::frame::Decoder;
use msb_protocol::guest::{
    Assembler, Data, EnvVar, ExecConfig, Exited, GuestBody, GuestConfig, HostBody, MainConfig, Open, OpenAttach,
    OpenControl, OpenKind, OpenMain, OpenTcp, OutputStream, ResourceLimit, STDIN_WINDOW, Shutdown as ShutdownOrder,
    Signal, StdinEof, TerminalSize, encode_host,
};
use msb_protocol::security::SecurityProfile;

const BOOT_ID: &[u8] = b"0123456789abcdef";

/// What the agent link would have been told.
#[derive(Default)]
struct Collector {
    output: Mutex<Vec<u8>>,
    ends: Mutex<Vec<Exited>>,
    starts: Mutex<Vec<u32>>,
    lines: Mutex<Vec<String>>,
    blocked: Mutex<bool>,
    door: Mutex<Option<Arc<Door>>>,
}

impl Collector {
    fn block(&self, blocked: bool) {
        *self.blocked.lock().unwrap() = blocked;
        if let Some(door) = &*self.door.lock().unwrap() {
            door.wake();
        }
    }
}

impl OutputLog for Collector {
    fn has_room(&self) -> bool {
        !*self.blocked.lock().unwrap()
    }

    fn push(&self, _stream: OutputStream, data: &[u8]) {
        self.output.lock().unwrap().extend_from_slice(data);
    }
}

impl Host for Collector {
    fn main_started(&self, pid: u32) {
        self.starts.lock().unwrap().push(pid);
    }

    fn main_exited(&self, end: Exited) {
        self.ends.lock().unwrap().push(end);
    }

    fn log(&self, line: &str) {
        self.lines.lock().unwrap().push(line.to_owned());
    }
}

fn agent_with(config: GuestConfig) -> (Arc<Agent>, Arc<Collector>) {
    let guest = Guest {
        config,
        late_main: Default::default(),
        boot_id: BOOT_ID.to_vec(),
        root: RootDirectory::open(Path::new("/")).unwrap(),
        enter_root: false,
        null: std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into(),
        terminals: None,
        workload: None,
        security: Security::new(SecurityProfile::Default).unwrap(),
        sessions: Sessions::default(),
    };
    let collector = Arc::new(Collector::default());
    let agent = Arc::new(Agent::new(guest, Arc::clone(&collector) as Arc<dyn Host>).unwrap());
    *collector.door.lock().unwrap() = Some(agent.main.door());
    (agent, collector)
}

fn agent() -> Arc<Agent> {
    agent_with(GuestConfig::default()).0
}

/// The host's end of a stream.
struct Caller {
    socket: UnixStream,
    decoder: Decoder,
    assembler: Assembler,
    credit: usize,
}

/// What a session said.
#[derive(Default, Debug)]
struct Heard {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<Exited>,
    refused: Option<String>,
}

impl Caller {
    fn open(agent: &Arc<Agent>, kind: OpenKind) -> Self {
        Self::open_as(agent, BOOT_ID, 1, Some(kind))
    }

    fn open_as(agent: &Arc<Agent>, boot_id: &[u8], generation: u32, kind: Option<OpenKind>) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        connection::spawn(agent, theirs.into());
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut caller =
            Self { socket: ours, decoder: Decoder::new(), assembler: Assembler::new(), credit: STDIN_WINDOW as usize };
        caller.send(HostBody::Open(Open { generation, boot_id: boot_id.to_vec(), kind }));
        caller
    }

    fn exec(agent: &Arc<Agent>, config: ExecConfig) -> Self {
        Self::open(agent, OpenKind::Exec(config))
    }

    fn send(&mut self, body: HostBody) {
        let mut wire = Vec::new();
        encode_host(body, &mut wire).unwrap();
        self.socket.write_all(&wire).unwrap();
    }

    fn next(&mut self) -> Option<GuestBody> {
        let mut scratch = vec![0; 64 << 10];
        loop {
            if let Some(body) = self.decoder.next_body().unwrap()
                && let Some(message) = self.assembler.guest(body).unwrap()
            {
                return Some(message);
            }
            match self.socket.read(&mut scratch).unwrap() {
                0 => return None,
                len => self.decoder.push(&scratch[..len]),
            }
        }
    }

    /// Reads until the stream ends.
    fn hear(&mut self) -> Heard {
        let mut heard = Heard::default();
        while let Some(message) = self.next() {
            match message {
                GuestBody::Output(output) if output.stream == OutputStream::Stdout as i32 => {
                    heard.stdout.extend(output.data)
                }
                GuestBody::Output(output) => heard.stderr.extend(output.data),
                GuestBody::Exited(end) => heard.end = Some(end),
                GuestBody::Refused(failure) => {
                    heard.stderr.extend(failure.message.as_bytes());
                    heard.refused = Some(failure.code);
                }
                GuestBody::StdinCredit(credit) => self.credit += credit.bytes as usize,
                _ => assert!(heard.end.is_none(), "the end is the last word"),
            }
        }
        heard
    }

    /// Reads until something has been printed.
    fn hear_until(&mut self, needle: &str) -> String {
        let mut text = String::new();
        while !text.contains(needle) {
            match self.next().unwrap_or_else(|| panic!("the stream ended before {needle:?}: {text:?}")) {
                GuestBody::Output(output) => text.push_str(&String::from_utf8_lossy(&output.data)),
                GuestBody::Exited(end) => panic!("the session ended before {needle:?}: {text:?} {end:?}"),
                _ => {}
            }
        }
        text
    }
}

fn command(argv: &[&str]) -> ExecConfig {
    ExecConfig { argv: argv.iter().map(|word| (*word).to_owned()).collect(), ..ExecConfig::default() }
}

fn shell(script: &str) -> ExecConfig {
    command(&["sh", "-c", script])
}

fn run(config: ExecConfig) -> Heard {
    Caller::exec(&agent(), config).hear()
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn output_and_code_arrive() {
    let heard = run(shell("echo out; echo err >&2; exit 7"));
    assert_eq!((heard.stdout.as_slice(), heard.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(heard.end, Some(Exited { code: 7, ..Exited::default() }));
}

#[test]
fn a_signal_is_told_as_a_signal() {
    let heard = run(shell("kill -9 $$"));
    assert_eq!(heard.end, Some(Exited { signal: 9, ..Exited::default() }));
}

#[test]
fn what_cannot_be_started_is_refused_with_its_code() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "text").unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let user = |user: &str| ExecConfig { user: user.into(), ..command(&["true"]) };
    let workdir = |path: &str| ExecConfig { workdir: path.into(), ..command(&["true"]) };
    for (config, code) in [
        (command(&["no-such-command"]), "exec_not_found"),
        (command(&["/no/such/command"]), "exec_not_found"),
        (command(&[plain.to_str().unwrap()]), "exec_not_executable"),
        (command(&[script.to_str().unwrap()]), "exec_not_executable"),
        (command(&["/tmp"]), "exec_not_executable"),
        (user("no-such-user"), "user_not_found"),
        (user("root:no-such-group"), "user_not_found"),
        (workdir("/no/such/directory"), "path_not_found"),
        (workdir("/etc/passwd"), "path_not_found"),
        (command(&[]), "invalid_config"),
    ] {
        let heard = run(config.clone());
        assert_eq!(heard.refused.as_deref(), Some(code), "{config:?}: {}", String::from_utf8_lossy(&heard.stderr));
        assert_eq!(heard.end, None);
    }
}

#[test]
fn environment_directory_and_user_are_as_asked() {
    let big = "x".repeat(100 << 10);
    let env = vec![EnvVar { name: "A".into(), value: "1 2".into() }, EnvVar { name: "BIG".into(), value: big }];
    let rlimits = vec![ResourceLimit { resource: "nofile".into(), soft: 100, hard: 200 }];
    let config = ExecConfig {
        env,
        rlimits,
        workdir: "/tmp".into(),
        user: "1234:77".into(),
        ..shell("echo $A ${#BIG}; pwd; id -u; id -g; id -G; echo ${HOME-none}; ulimit -Sn; ulimit -Hn")
    };
    assert_eq!(String::from_utf8(run(config).stdout).unwrap(), "1 2 102400\n/tmp\n1234\n77\n77\nnone\n100\n200\n");
}

#[test]
fn an_environment_of_a_mebibyte_arrives() {
    let env = (0..16).map(|at| EnvVar { name: format!("BIG{at}"), value: "y".repeat(64 << 10) }).collect();
    let heard = run(ExecConfig { env, ..shell("env | wc -c") });
    let len: usize = String::from_utf8(heard.stdout).unwrap().trim().parse().unwrap();
    assert!(len > 1 << 20, "{len}");
}

#[test]
fn a_background_child_holds_nothing_open() {
    let started = Instant::now();
    let heard = run(shell("sleep 30 & echo $!; exit 3"));
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(heard.end.unwrap().code, 3);
    let pid: i32 = String::from_utf8(heard.stdout).unwrap().trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL)
        .expect("the child was left running");
}

#[test]
fn wait_output_waits_for_the_background_child() {
    let heard = run(ExecConfig { wait_output: true, ..shell("(sleep 0.5; echo late) & exit 3") });
    assert_eq!((heard.stdout.as_slice(), heard.end.unwrap().code), (&b"late\n"[..], 3));
}

#[test]
fn the_timeout_kills_the_group_and_says_so() {
    let started = Instant::now();
    let heard = run(ExecConfig { timeout_ms: 300, ..shell("echo begun; sleep 30; echo never") });
    assert!(started.elapsed() < Duration::from_secs(5));
    let end = heard.end.unwrap();
    assert!(end.timed_out && end.signal == 9, "{end:?}");
    assert_eq!(heard.stdout, b"begun\n");
}

#[test]
fn without_stdin_a_reader_sees_the_end() {
    assert_eq!(run(shell("cat; echo done")).stdout, b"done\n");
}

#[test]
fn stdin_left_open_does_not_hold_the_end() {
    let agent = agent();
    let mut caller = Caller::exec(&agent, ExecConfig { stdin: true, ..command(&["true"]) });
    caller.send(HostBody::Stdin(Data { data: b"nobody reads this".to_vec() }));
    assert_eq!(caller.hear().end.unwrap().code, 0);
}

#[test]
fn sixty_four_mebibytes_of_stdin_come_back() {
    const LEN: usize = 64 << 20;
    let agent = agent();
    let before = resident();
    let mut caller = Caller::exec(&agent, ExecConfig { stdin: true, ..command(&["wc", "-c"]) });
    let (mut sent, mut stdout) = (0, Vec::new());
    let mut end = None;
    while end.is_none() {
        while sent < LEN && caller.credit > 0 {
            let len = (LEN - sent).min(caller.credit).min(64 << 10);
            caller.send(HostBody::Stdin(Data { data: vec![b'z'; len] }));
            (sent, caller.credit) = (sent + len, caller.credit - len);
            if sent == LEN {
                caller.send(HostBody::StdinEof(StdinEof {}));
            }
        }
        match caller.next().unwrap() {
            GuestBody::StdinCredit(credit) => caller.credit += credit.bytes as usize,
            GuestBody::Output(output) => stdout.extend(output.data),
            GuestBody::Exited(exited) => end = Some(exited),
            _ => {}
        }
    }
    assert_eq!(String::from_utf8(stdout).unwrap().trim(), LEN.to_string());
    assert!(resident().saturating_sub(before) < 48 << 20, "the agent kept the input");
}

#[test]
fn a_sender_beyond_its_credit_loses_the_stream() {
    let agent = agent();
    let mut caller = Caller::exec(&agent, ExecConfig { stdin: true, ..command(&["sleep", "30"]) });
    let mut wire = Vec::new();
    // Its credit, as much again that the pipe takes, and more.
    for _ in 0..12 {
        encode_host(HostBody::Stdin(Data { data: vec![0; 64 << 10] }), &mut wire).unwrap();
    }
    let _ = caller.socket.write_all(&wire);
    let started = Instant::now();
    let mut scratch = vec![0; 4096];
    while caller.socket.read(&mut scratch).is_ok_and(|len| len > 0) {}
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(agent.guest.sessions.wait_empty(Duration::from_secs(5)), "the process outlived its stream");
}

#[test]
fn a_stopped_reader_stops_the_writer_and_memory_stays_flat() {
    let agent = agent();
    let mut caller = Caller::exec(&agent, command(&["yes"]));
    caller.hear_until("y\n");
    std::thread::sleep(Duration::from_millis(300));
    let before = resident();
    std::thread::sleep(Duration::from_secs(2));
    assert!(resident().saturating_sub(before) < 8 << 20, "the agent buffers for a stopped reader");
    let mut read = 0usize;
    let mut scratch = vec![0; 1 << 20];
    while read < 256 << 20 {
        read += caller.socket.read(&mut scratch).unwrap();
    }
    assert!(resident().saturating_sub(before) < 48 << 20);
    drop(caller);
    assert!(agent.guest.sessions.wait_empty(Duration::from_secs(5)), "`yes` outlived its caller");
}

#[test]
fn a_slow_reader_gets_every_byte_of_an_ended_process() {
    let agent = agent();
    let mut caller = Caller::exec(&agent, shell("head -c 3000000 /dev/zero; sleep 30 & exit 0"));
    std::thread::sleep(Duration::from_millis(700));
    let heard = caller.hear();
    assert_eq!((heard.stdout.len(), heard.end.unwrap().code), (3_000_000, 0));
}

#[test]
fn a_lost_caller_hangs_its_command_up() {
    let agent = agent();
    let dir = tempfile::tempdir().unwrap();
    let note = dir.path().join("note");
    let script = format!("trap 'echo hup > {}; exit' HUP; echo ready; while :; do sleep 0.1; done", note.display());
    let mut caller = Caller::exec(&agent, shell(&script));
    caller.hear_until("ready");
    drop(caller);
    assert!(agent.guest.sessions.wait_empty(Duration::from_secs(5)));
    assert_eq!(std::fs::read_to_string(note).unwrap(), "hup\n");
    let mut caller = Caller::exec(&agent, shell("trap '' HUP; echo ready; while :; do sleep 0.1; done"));
    caller.hear_until("ready");
    caller.socket.shutdown(Shutdown::Both).unwrap();
    assert!(agent.guest.sessions.wait_empty(Duration::from_secs(5)), "one that ignores the hang-up is killed");
}

#[test]
fn signals_reach_the_process_group() {
    let agent = agent();
    let mut caller =
        Caller::exec(&agent, shell("trap 'echo got; exit 4' USR1; echo ready; while :; do sleep 0.1; done"));
    caller.hear_until("ready");
    for number in [0, -1, 65, i32::MAX] {
        caller.send(HostBody::Signal(Signal { number }));
    }
    caller.send(HostBody::Signal(Signal { number: 10 }));
    let heard = caller.hear();
    assert!(heard.stdout.ends_with(b"got\n"));
    assert_eq!(heard.end.unwrap().code, 4);
}

#[test]
fn a_terminal_has_its_size_and_its_keys() {
    let agent = agent();
    let terminal = Some(TerminalSize { rows: 33, columns: 99 });
    let mut caller = Caller::exec(
        &agent,
        ExecConfig { stdin: true, terminal, ..shell("stty size; echo $TERM; tty; read x; stty size; cat; echo over") },
    );
    let text = caller.hear_until("/dev/pts/");
    assert!(text.contains("33 99") && text.contains("xterm"), "{text:?}");
    caller.send(HostBody::Resize(TerminalSize { rows: 0, columns: 1 << 30 }));
    caller.send(HostBody::Resize(TerminalSize { rows: 50, columns: 132 }));
    caller.send(HostBody::Stdin(Data { data: b"\n".to_vec() }));
    caller.hear_until("50 132");
    caller.send(HostBody::StdinEof(StdinEof {}));
    caller.hear_until("over");
    assert_eq!(caller.hear().end.unwrap().code, 0);
    let mut caller = Caller::exec(&agent, ExecConfig { stdin: true, terminal, ..shell("echo ready; sleep 30") });
    caller.hear_until("ready");
    caller.send(HostBody::Stdin(Data { data: vec![3] }));
    assert_eq!(caller.hear().end.unwrap().signal, 2, "Ctrl-C interrupts");
}

#[test]
fn three_hundred_at_once() {
    let agent = agent();
    let mut callers =
        (0..300).map(|at| Caller::exec(&agent, shell(&format!("echo {at}; exit {}", at % 100)))).collect::<Vec<_>>();
    for (at, caller) in callers.iter_mut().enumerate() {
        let heard = caller.hear();
        assert_eq!(String::from_utf8(heard.stdout).unwrap(), format!("{at}\n"));
        assert_eq!(heard.end.unwrap().code, i32::try_from(at % 100).unwrap());
    }
    assert_eq!(agent.guest.sessions.alive(), 0);
}

#[test]
fn strangers_and_garbage_get_nowhere() {
    let agent = agent();
    let kind = || Some(OpenKind::Exec(command(&["true"])));
    assert_eq!(
        Caller::open_as(&agent, b"another boot....", 1, kind()).hear().refused.as_deref(),
        Some("sandbox_not_running")
    );
    assert_eq!(Caller::open_as(&agent, BOOT_ID, 0, kind()).hear().refused.as_deref(), Some("unsupported_operation"));
    assert_eq!(Caller::open_as(&agent, BOOT_ID, 9, None).hear().refused.as_deref(), Some("unsupported_operation"));
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 0, 0, 2, 0xff, 0xff], &[0xff; 64], &[]] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        connection::spawn(&agent, theirs.into());
        ours.write_all(garbage).unwrap();
        ours.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        ours.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }
    assert_eq!(run(command(&["true"])).end.unwrap().code, 0);
}

fn main_config(exec: ExecConfig) -> GuestConfig {
    GuestConfig {
        main: Some(MainConfig { exec: Some(exec), autostart: false, stop_signal: 15 }),
        ..GuestConfig::default()
    }
}

#[test]
fn the_main_workload_has_one_primary_a_log_and_watchers() {
    let (agent, collector) = agent_with(main_config(ExecConfig {
        stdin: true,
        ..shell("read a; echo first $a; read b; echo second $b; exit 5")
    }));
    assert_eq!(
        Caller::open(&agent, OpenKind::Attach(OpenAttach::default())).hear().refused.as_deref(),
        Some("sandbox_not_running")
    );
    let mut primary = Caller::open(&agent, OpenKind::Main(OpenMain::default()));
    primary.send(HostBody::Stdin(Data { data: b"one\n".to_vec() }));
    primary.hear_until("first one");
    assert_eq!(
        Caller::open(&agent, OpenKind::Main(OpenMain::default())).hear().refused.as_deref(),
        Some("invalid_request")
    );
    let mut watcher = Caller::open(&agent, OpenKind::Attach(OpenAttach { stdin: true, terminal: None }));
    assert!(matches!(watcher.next(), Some(GuestBody::Opened(_))));
    watcher.send(HostBody::Stdin(Data { data: b"two\n".to_vec() }));
    let watched = watcher.hear();
    assert_eq!((watched.stdout.as_slice(), watched.end.unwrap().code), (&b"second two\n"[..], 5));
    assert_eq!(primary.hear().stdout, b"second two\n");
    assert_eq!(collector.output.lock().unwrap().as_slice(), b"first one\nsecond two\n");
    assert_eq!((collector.starts.lock().unwrap().len(), collector.ends.lock().unwrap()[0].code), (1, 5));
}

#[test]
fn the_main_workloads_terminal_takes_the_size_of_whoever_came_last() {
    let terminal = Some(TerminalSize { rows: 24, columns: 80 });
    let (agent, _) = agent_with(main_config(ExecConfig {
        stdin: true,
        terminal,
        ..shell("stty size; while read x; do stty size; done")
    }));
    let size = |rows, columns| Some(TerminalSize { rows, columns });
    let mut primary = Caller::open(&agent, OpenKind::Main(OpenMain { terminal: size(40, 100), timeout_ms: 0 }));
    primary.hear_until("40 100");
    let mut watcher = Caller::open(&agent, OpenKind::Attach(OpenAttach { stdin: true, terminal: size(50, 120) }));
    watcher.send(HostBody::Stdin(Data { data: b"\n".to_vec() }));
    watcher.hear_until("50 120");
    primary.hear_until("50 120");
    // The one who has no terminal has no say in the size. (It asks by itself: what others ask may be answered before it listens.)
    let mut third = Caller::open(&agent, OpenKind::Attach(OpenAttach { stdin: true, terminal: None }));
    third.send(HostBody::Stdin(Data { data: b"\n".to_vec() }));
    third.hear_until("50 120");
    drop(primary);
    watcher.send(HostBody::Stdin(Data { data: vec![4] }));
    assert_eq!(watcher.hear().end.unwrap().code, 0, "Ctrl-D ends the shell's input");
}

#[test]
fn the_main_workload_goes_on_without_its_caller() {
    let (agent, collector) = agent_with(main_config(shell("echo begun; sleep 0.5; echo ended")));
    let mut primary = Caller::open(&agent, OpenKind::Main(OpenMain::default()));
    primary.hear_until("begun");
    drop(primary);
    assert!(agent.main.wait_finished(Duration::from_secs(10)));
    assert_eq!(collector.output.lock().unwrap().as_slice(), b"begun\nended\n");
    assert_eq!(collector.ends.lock().unwrap()[0].code, 0);
}

#[test]
fn a_full_log_stops_the_workload_and_a_slow_watcher_does_not() {
    let (agent, collector) = agent_with(main_config(shell("head -c 5000000 /dev/zero")));
    collector.block(true);
    let shared = Arc::clone(&agent);
    let main = std::thread::spawn(move || shared.run_main(None).is_ok());
    let until = Instant::now() + Duration::from_secs(10);
    while agent.main.pid() == 0 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut watcher = Caller::open(&agent, OpenKind::Attach(OpenAttach::default()));
    assert!(matches!(watcher.next(), Some(GuestBody::Opened(_))));
    std::thread::sleep(Duration::from_millis(300));
    assert!(agent.main.is_alive() && collector.output.lock().unwrap().is_empty(), "the workload waits for the log");
    collector.block(false);
    assert!(agent.main.wait_ended(Duration::from_secs(10)), "the watcher that does not read held the workload up");
    let (mut received, mut lost) = (0u64, 0u64);
    while let Some(message) = watcher.next() {
        match message {
            GuestBody::Output(output) => received += output.data.len() as u64,
            GuestBody::OutputLost(report) => lost += report.bytes,
            _ => {}
        }
    }
    assert!(main.join().unwrap());
    assert_eq!(collector.output.lock().unwrap().len(), 5_000_000);
    assert!(lost > 0 && received + lost == 5_000_000, "{received} received, {lost} lost");
}

#[test]
fn a_main_workload_that_cannot_start_is_an_end_too() {
    let (agent, collector) = agent_with(main_config(command(&["no-such-command"])));
    let heard = Caller::open(&agent, OpenKind::Main(OpenMain::default())).hear();
    assert_eq!(heard.refused.as_deref(), Some("exec_not_found"));
    assert_eq!(collector.ends.lock().unwrap()[0].code, 127);
    assert!(collector.starts.lock().unwrap().is_empty());
    assert!(collector.lines.lock().unwrap().iter().any(|line| line.contains("no-such-command")));
}

#[test]
fn control_beats_answers_and_tells_the_end_of_main() {
    let (agent, _collector) = agent_with(main_config(shell("sleep 0.2; exit 9")));
    let mut old = Caller::open(&agent, OpenKind::Control(OpenControl {}));
    assert!(matches!(old.next(), Some(GuestBody::Opened(opened)) if opened.main_pid == 0));
    assert!(matches!(old.next(), Some(GuestBody::Beat(beat)) if beat.sequence == 1 && beat.memory_total_bytes > 0));
    let mut control = Caller::open(&agent, OpenKind::Control(OpenControl {}));
    while old.next().is_some() {}
    control.send(HostBody::Ping(msb_protocol::guest::Ping { token: 77 }));
    let mut primary = Caller::open(&agent, OpenKind::Main(OpenMain::default()));
    let (mut beats, mut pong, mut end) = (Vec::new(), false, None);
    while end.is_none() || beats.len() < 2 {
        match control.next().unwrap() {
            GuestBody::Beat(beat) => beats.push(beat.sequence),
            GuestBody::Pong(answer) => pong = answer.token == 77,
            GuestBody::MainExited(exited) => end = Some(exited),
            _ => {}
        }
    }
    assert!(pong && beats.windows(2).all(|pair| pair[0] < pair[1]));
    assert_eq!((end.unwrap().code, primary.hear().end.unwrap().code), (9, 9));
    // The end of the main workload is the end of the sandbox: nothing new is opened.
    assert_eq!(Caller::exec(&agent, command(&["true"])).hear().refused.as_deref(), Some("sandbox_not_running"));
}

#[test]
fn a_shutdown_order_stops_what_obeys_and_kills_what_does_not() {
    let order = ShutdownOrder { grace_ms: 1000, ..ShutdownOrder::default() };
    let dir = tempfile::tempdir().unwrap();
    let hook = dir.path().join("hook");
    let (agent, _) =
        agent_with(main_config(shell("trap 'echo bye; exit 6' TERM; echo up; while :; do sleep 0.05; done")));
    let mut primary = Caller::open(&agent, OpenKind::Main(OpenMain::default()));
    primary.hear_until("up");
    let started = Instant::now();
    let with_hook = ShutdownOrder {
        pre_stop: vec!["touch".into(), hook.to_str().unwrap().into()],
        pre_stop_budget_ms: 5000,
        ..order.clone()
    };
    agent.stop(&with_hook);
    let heard = primary.hear();
    assert!(heard.stdout.ends_with(b"bye\n") && heard.end.unwrap().code == 6 && hook.exists());
    assert!(started.elapsed() < Duration::from_secs(1));

    let (agent, _) = agent_with(main_config(shell("trap '' TERM; echo up; while :; do sleep 0.05; done")));
    let mut primary = Caller::open(&agent, OpenKind::Main(OpenMain::default()));
    primary.hear_until("up");
    let mut exec = Caller::exec(&agent, shell("trap '' TERM; echo up; while :; do sleep 0.05; done"));
    exec.hear_until("up");
    agent.stop(&order);
    assert_eq!((primary.hear().end.unwrap().signal, exec.hear().end.unwrap().signal), (9, 9));
}

fn tcp(host: &str, port: u16) -> OpenKind {
    OpenKind::Tcp(OpenTcp { host: host.into(), port: u32::from(port) })
}

#[test]
fn a_connection_carries_bare_bytes_and_each_half_closes_by_itself() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // Speaks first, and answers only after the other half has ended.
        stream.write_all(b"hello ").unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    let mut caller = Caller::open(&agent(), tcp("localhost", port));
    assert!(matches!(caller.next(), Some(GuestBody::Opened(_))));
    let large = vec![0x5a; 1 << 20];
    caller.socket.write_all(&large).unwrap();
    caller.socket.shutdown(Shutdown::Write).unwrap();
    let mut heard = caller.decoder.into_rest();
    caller.socket.read_to_end(&mut heard).unwrap();
    assert!(heard.starts_with(b"hello ") && heard[6..] == large, "{} bytes", heard.len());
    server.join().unwrap();
}

#[test]
fn a_connection_that_cannot_be_made_is_refused_at_once_and_in_words() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let began = Instant::now();
    for (kind, code, word) in [
        (tcp("127.0.0.1", port), "connect_failed", "refused"),
        (tcp("localhost", 0), "invalid_config", "port"),
        (tcp("", 80), "invalid_config", "host"),
        (tcp(&"x".repeat(300), 80), "invalid_config", "host"),
        (tcp("a..b", 80), "connect_failed", "a..b"),
    ] {
        let heard = Caller::open(&agent(), kind.clone()).hear();
        let text = String::from_utf8_lossy(&heard.stderr).into_owned();
        assert_eq!(heard.refused.as_deref(), Some(code), "{kind:?}: {text}");
        assert!(text.contains(word), "{kind:?}: {text}");
    }
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_host_that_goes_away_takes_its_connection_along() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut caller = Caller::open(&agent(), tcp("127.0.0.1", listener.local_addr().unwrap().port()));
    assert!(matches!(caller.next(), Some(GuestBody::Opened(_))));
    let (mut stream, _) = listener.accept().unwrap();
    drop(caller);
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    // The server never speaks, so only the agent's own look finds out that nobody is left.
    let gone = Instant::now() + Duration::from_secs(60);
    while stream.write(b"x").is_ok() {
        assert!(Instant::now() < gone, "the connection is still open");
        std::thread::sleep(Duration::from_millis(100));
    }
}
