//! What SSH promises, held against OpenSSH's own programs, rsync and curl. The cases share sandboxes: a boot costs more than they do.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use msb_tests::{Home, Invocation};

/// A home whose sandbox `box` is reachable as the host `msb-box`, with a key that is authorized and one that is not.
struct Bench {
    home: Home,
}

impl Bench {
    fn new(name: &str, create: &[&str]) -> Self {
        for tool in ["ssh", "scp", "sftp", "rsync", "curl", "sshfs"] {
            let found = Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().expect("a shell");
            assert!(found.status.success(), "{tool} is not installed: cargo xtask setup");
        }
        let home = Home::with_busybox(name);
        home.succeeds(&[&["create", "--name", "box"], create, &["busybox"]].concat());
        for key in ["known", "stranger"] {
            let _ = home.shell(&format!("ssh-keygen -q -t ed25519 -N '' -C {key} -f {key}")).run().succeeds();
        }
        let authorized = home.msb(["ssh", "authorize", "--file", "known.pub"]).run().succeeds();
        assert!(authorized.text().starts_with("SHA256:"), "{}", authorized.account());
        let _ = home.shell("msb ssh config box > config").run().succeeds();
        Self { home }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.home.scratch().join(name)
    }

    /// A line for the shell, with `ssh`, `scp`, `sftp` and `rsync` finding their configuration.
    fn shell(&self, line: &str) -> Invocation {
        let options = format!(
            "-F {} -o IdentitiesOnly=yes -o BatchMode=yes -i {}",
            self.file("config").display(),
            self.file("known").display()
        );
        self.home.shell(&format!(
            "ssh() {{ command ssh {options} \"$@\"; }}; scp() {{ command scp {options} \"$@\"; }}; sftp() {{ command sftp {options} \"$@\"; }}
             export RSYNC_RSH='ssh {options}'; {line}"
        ))
    }
}

/// A port of this machine that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

/// Waits until something listens.
fn wait_for_port(port: u16) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "nothing listens on port {port} after a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn ssh_runs_commands_and_tells_ends_truly() {
    let bench = Bench::new("ssh_sessions", &["-e", "FROM=sandbox", "-w", "/opt"]);
    let ssh = |line: &str| bench.shell(&format!("ssh msb-box {line}")).run();

    ssh("'echo out; echo err >&2; exit 7'").exits(7).prints("out\n").complains("err");
    // Killed is never a success: OpenSSH shows an exit-signal as 255, the built-in client as a shell would.
    let _ = ssh("'kill -9 $$'").exits(255);
    let _ = bench.home.msb(["ssh", "box", "--", "kill -9 $$"]).run().exits(137);
    // A login is at home in the user's own shell, with what the sandbox sets.
    ssh("'pwd; echo $HOME $USER $SHELL $FROM'").succeeds().prints("/root\n/root root /bin/sh sandbox\n");
    ssh("-l app 'id -u; pwd'").succeeds().prints("1000\n/home/app\n");
    ssh("-l nobody-here true").exits(1).complains("nobody-here");
    // Accepted variables and no others.
    bench
        .shell("LC_NOTE=sent MSB_NOTE=kept ssh -o SendEnv='LC_NOTE MSB_NOTE' msb-box 'echo $LC_NOTE-$MSB_NOTE'")
        .run()
        .succeeds()
        .prints("sent-\n");
    // A terminal of the asked kind; a signal arrives even behind input that nobody reads.
    bench.shell("TERM=vt220 ssh -tt msb-box 'tty; echo $TERM'").run().succeeds().shows("/dev/pts/").shows("vt220");
    let input: Vec<u8> = (0..6 << 20).map(|at: u32| at.to_le_bytes()[1] ^ at.to_le_bytes()[0]).collect();
    let echoed = bench.shell("ssh msb-box cat").input(input.clone()).run().succeeds();
    assert!(echoed.stdout == input, "{} bytes came back", echoed.stdout.len());

    // The built-in client needs no key and no configuration.
    bench.home.msb(["ssh", "box", "--", "echo", "built", "in;", "exit", "3"]).run().exits(3).prints("built in\n");
    bench.home.msb(["ssh", "-l", "app", "box"]).input("id -u; exit 4\n").run().exits(4).prints("1000\n");
    bench.home.fails(&["ssh", "no-such-box", "true"], 125, "sandbox_not_found");
    bench.home.fails(&["ssh", "authorize", "--key", "no key"], 1, "invalid_config");

    // Who is not authorized does not come in, and stands in the log.
    let stranger = bench.shell("command ssh -F config -o IdentitiesOnly=yes -o BatchMode=yes -i stranger msb-box true");
    let _ = stranger.run().exits(255).complains("Permission denied (publickey)");
    let log = std::fs::read_to_string(bench.home.path().join("msbd.log")).expect("the daemon's log");
    assert!(log.contains("not authorized"), "{log}");

    // Twenty at once, each to its own end.
    let crowd = "for n in $(seq 20); do (ssh msb-box \"exit $n\"; [ $? = $n ] && echo right) & done; wait";
    let crowd = bench.shell(crowd).patience(Duration::from_secs(300)).run().succeeds();
    assert_eq!(crowd.text().matches("right").count(), 20, "{}", crowd.account());

    // The listener serves the same key as the pipe, and it survives a restart.
    let key = |home: &Home| home.json(&["ssh", "config", "box"])["host_key"].as_str().unwrap_or_default().to_owned();
    let before = key(&bench.home);
    let mut serving = bench.home.msb(["ssh", "serve", "box", "--port", "0"]).start();
    serving.wait_for("port ");
    let printed = serving.printed();
    let port = printed.trim().rsplit(' ').next().unwrap_or_default().to_owned();
    bench.home.shell(&format!("ssh-keyscan -p {port} 127.0.0.1")).run().succeeds().shows(&before);
    serving.signal(rustix::process::Signal::INT);
    let _ = serving.finish();
    bench.home.succeeds(&["stop", "box"]);
    let _ = ssh("true").exits(255).complains("stopped");
    bench.home.succeeds(&["start", "box"]);
    let _ = ssh("true").succeeds();
    assert_eq!(key(&bench.home), before);
    bench.home.finish();
}

#[test]
fn ssh_forwards_from_inside_the_sandbox() {
    // What listens on the host's loopback is for the jump; more memory than usual for the crowd of connections.
    let bench = Bench::new("ssh_forwarding", &["-m", "512M", "--net-rule", "allow@host:tcp"]);
    let guest = "mkdir -p /tmp/www && echo inside > /tmp/www/index.html && httpd -p 127.0.0.1:8080 -h /tmp/www; \
                 nc -ll -p 9000 -e cat & sleep 1";
    bench.home.succeeds(&["exec", "box", "--", "sh", "-c", guest]);
    let (local, socks) = (free_port(), free_port());
    let line = format!("ssh -N -L {local}:localhost:8080 -D {socks} msb-box & echo $!; wait");
    let forwarding = bench.shell(&line).start();
    wait_for_port(local);
    wait_for_port(socks);
    let curl = |words: &str| bench.home.shell(&format!("curl -sS --max-time 60 {words}")).run();
    curl(&format!("http://127.0.0.1:{local}/")).succeeds().prints("inside\n");
    // The name is resolved in the sandbox, and its loopback is the one that is meant.
    let proxy = format!("--socks5-hostname 127.0.0.1:{socks}");
    curl(&format!("{proxy} http://localhost:8080/")).succeeds().prints("inside\n");
    // Nobody listens: told at once, by the reason of RFC 4254, and not by a time-out.
    let began = Instant::now();
    let _ = curl(&format!("{proxy} http://localhost:81/")).exits(97);
    assert!(began.elapsed() < Duration::from_secs(30));
    let refused = bench.shell("command ssh -F config -i known -W localhost:81 msb-box").run().exits(255);
    refused.complains("connect failed").complains("Connection refused");
    let unknown = bench.shell("command ssh -F config -i known -W no-such-host.invalid:80 msb-box").run().exits(255);
    let _ = unknown.complains("no-such-host.invalid");
    // A half-close is kept: cat answers after the end of its input.
    let echo = bench.shell("command ssh -F config -i known -W localhost:9000 msb-box").input("to and fro\n").run();
    let _ = echo.succeeds().prints("to and fro\n");
    // A jump ends in the sandbox, and the next login begins there: on the host, where its own server listens for this once.
    let mut serving = bench.home.msb(["ssh", "serve", "box", "--port", "0"]).start();
    serving.wait_for("port ");
    let printed = serving.printed();
    let port = printed.trim().rsplit(' ').next().unwrap_or_default().to_owned();
    let jump = format!(
        "{{ cat config; echo 'Host *'; echo '  IdentityFile known'; }} > jump && command ssh -F jump -o BatchMode=yes \
         -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -J msb-box -p {port} root@host.msb.internal 'echo jumped'"
    );
    bench.home.shell(&jump).run().succeeds().prints("jumped\n");
    serving.signal(rustix::process::Signal::INT);
    let _ = serving.finish();
    crowd_of_channels(&bench);
    // What is not offered is refused in so many words.
    let remote = bench.shell("ssh -o ExitOnForwardFailure=yes -R 0:localhost:1 msb-box true").run().exits(255);
    let _ = remote.complains("remote port forwarding failed");
    let agent = bench.shell("SSH_AUTH_SOCK=/nowhere ssh -A -X msb-box 'echo [$SSH_AUTH_SOCK][$DISPLAY]'").run();
    let _ = agent.succeeds().prints("[][]\n");
    forwarding.signal(rustix::process::Signal::TERM);
    bench.home.succeeds(&["rm", "-f", "box"]);
    drop(forwarding.finish());
    bench.home.finish();
}

/// Connections that are open at once over one login; the soak has a thousand.
fn channels_at_once() -> usize {
    std::env::var("MSB_TEST_CHANNELS").ok().and_then(|text| text.parse().ok()).unwrap_or(40)
}

/// Many forwarded connections over one login, all open before the first ends, each with its own answer.
fn crowd_of_channels(bench: &Bench) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let (count, port) = (channels_at_once(), free_port());
    let client = format!("exec ssh -F config -i known -o BatchMode=yes -N -L {port}:localhost:9000 msb-box");
    let forwarding = bench.home.shell(&client).start();
    wait_for_port(port);
    let mut connections: Vec<TcpStream> = (0..count)
        .map(|_| {
            let connection = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
            connection.set_read_timeout(Some(Duration::from_secs(300))).expect("a limit");
            connection
        })
        .collect();
    for (number, connection) in connections.iter_mut().enumerate() {
        connection.write_all(format!("line {number}\n").as_bytes()).expect("a line is sent");
    }
    for (number, connection) in connections.iter_mut().enumerate() {
        let wanted = format!("line {number}\n");
        let mut answer = vec![0; wanted.len()];
        connection.read_exact(&mut answer).unwrap_or_else(|error| panic!("connection {number} of {count}: {error}"));
        assert_eq!(String::from_utf8_lossy(&answer), wanted);
    }
    println!("{count} forwarded connections were open at once");
    drop(connections);
    forwarding.signal(rustix::process::Signal::TERM);
    drop(forwarding.finish());
}

/// rsync needs itself on the other side; this machine's one goes along with the libraries it names.
fn carry_rsync(folder: &Path) {
    std::fs::create_dir(folder).expect("a folder");
    let copy = format!(
        "cp $(command -v rsync) {0}/ && for lib in $(ldd $(command -v rsync) | grep -o '/[^ ]*'); do cp -L $lib {0}/; done",
        folder.display()
    );
    assert!(Command::new("sh").args(["-c", &copy]).status().expect("a shell").success());
}

#[test]
fn sftp_scp_and_rsync_copy_both_ways() {
    let bench = Bench::new("ssh_files", &[]);
    let bytes: Vec<u8> = (0..5_000_000u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
    std::fs::write(bench.file("large"), &bytes).expect("a file");
    std::fs::write(bench.file("with space"), "small\n").expect("a file");
    carry_rsync(&bench.file("r"));

    let _ = bench.shell("scp -pr large 'with space' r msb-box:/tmp/").run().succeeds();
    let _ = bench.shell("scp -p msb-box:/tmp/large back").run().succeeds();
    assert!(std::fs::read(bench.file("back")).expect("a file") == bytes);
    // As the user who logged in, and where they are at home.
    let batch = "put large\nrename large renamed\nmkdir d\nln -s renamed link\nchmod 600 renamed\nls -l\ndf .\nget link got\nrm link\nrmdir d\n-rm missing\n";
    let sftp = bench.shell("sftp -b - -o User=app msb-box").input(batch).run().succeeds();
    let _ = sftp.shows("-rw-------").shows("1000");
    assert!(std::fs::read(bench.file("got")).expect("a file") == bytes);
    bench
        .home
        .msb(["exec", "box", "--", "stat", "-c", "%U %a", "/home/app/renamed"])
        .run()
        .succeeds()
        .prints("app 600\n");
    let denied = bench.shell("scp -o User=app large msb-box:/etc/").run();
    let _ = denied.exits(1).complains("Permission denied");

    let rsync = "rsync -a --rsync-path='/tmp/r/ld-linux-x86-64.so.2 --library-path /tmp/r /tmp/r/rsync'";
    std::fs::create_dir(bench.file("tree")).expect("a folder");
    for number in 0..50 {
        std::fs::write(bench.file("tree").join(format!("file-{number}")), vec![b'x'; number * 100]).expect("a file");
    }
    let _ =
        bench.shell(&format!("{rsync} tree/ msb-box:/tmp/tree/ && {rsync} msb-box:/tmp/tree/ again/")).run().succeeds();
    let _ = bench.shell("diff -r tree again").run().succeeds().is_quiet();
    mount_over_ssh(&bench);
    bench.home.finish();
}

/// The directory that rsync filled, as a file system of this machine.
fn mount_over_ssh(bench: &Bench) {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        println!("skipped: sshfs wants root and /dev/fuse");
        return;
    }
    std::fs::create_dir(bench.file("mnt")).expect("a folder");
    let options = format!("IdentitiesOnly=yes,BatchMode=yes,IdentityFile={}", bench.file("known").display());
    let mount = format!("sshfs -F {} -o {options} msb-box:/tmp/tree mnt", bench.file("config").display());
    let _ = bench.shell(&mount).run().succeeds();
    let work = "diff -r tree mnt && echo new > mnt/new && mv mnt/new mnt/renamed && mkdir mnt/d && rmdir mnt/d && rm mnt/file-1 && sync mnt";
    let worked = bench.shell(work).run();
    let _ = bench.shell("fusermount3 -u mnt").run().succeeds();
    let _ = worked.succeeds();
    let seen = "cd /tmp/tree; cat renamed; test ! -e file-1 && test ! -e d && echo gone";
    bench.home.msb(["exec", "box", "--", "sh", "-c", seen]).run().succeeds().prints("new\ngone\n");
}

#[test]
fn a_login_wakes_a_sandbox_and_a_session_keeps_it_awake() {
    let bench = Bench::new("ssh_wakes", &["--idle-timeout", "4s"]);
    bench.home.wait_until("box", "asleep");
    bench.shell("ssh msb-box 'sleep 8; echo awake'").run().succeeds().prints("awake\n");
    assert_eq!(bench.home.status("box"), "running");
    // A connection that is only held open is no activity.
    bench.home.succeeds(&["exec", "box", "--", "sh", "-c", "nc -ll -p 9000 -e cat & sleep 1"]);
    let held = bench.shell("command ssh -F config -i known -W localhost:9000 msb-box; true").start();
    bench.home.wait_until("box", "asleep");
    drop(held.finish());
    bench.home.finish();
}
