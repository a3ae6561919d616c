//! The figures of sessions: logins, forwarded connections and copies, beside OpenSSH's own server and tar in the same guest.
//!
//! The peer is an `sshd` inside the guest, reached through a published port; the client is OpenSSH's on both sides, with the configuration
//! that `msb ssh config` prints on ours. So both carry the same bytes through the same machine, and what differs is where SSH ends.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Row, Running, median, succeed, timed};
use crate::home::Home;
use crate::{cache, debian, images, program};

/// Bytes through a forwarded connection, all streams together, in MiB.
const FORWARDED_MIB: usize = 128;
/// Size of the file that sftp carries, in MiB.
const SFTP_MIB: usize = 256;
/// Size of the large file of `msb cp`, in MiB.
const LARGE_MIB: usize = 1 << 10;
/// Small files of `msb cp`.
const FILES: usize = 20_000;
/// Logins of one measurement.
const LOGINS: u32 = 5;

/// Measures all rows.
pub(super) fn rows(tree: &Path, rounds: usize) -> Result<Vec<Row>> {
    debian::ensure(&[debian::IMAGES, debian::CLIENTS, debian::TRAFFIC])?;
    let work = tempfile::Builder::new().prefix("bench-sessions-").tempdir_in(cache::target())?;
    let scene = Scene::new(tree, work.path())?;
    let mut rows = vec![scene.logins(rounds)?];
    for streams in [1, 8] {
        for reverse in [false, true] {
            rows.push(scene.forwarding(streams, reverse, rounds)?);
        }
    }
    rows.extend(scene.sftp(rounds)?);
    rows.extend(scene.copies(rounds)?);
    Ok(rows)
}

/// A sandbox with both servers, and a configuration in which it has two names: `msb-box` is our server, `peer` the guest's.
struct Scene<'a> {
    home: Home,
    work: &'a Path,
    config: PathBuf,
}

impl<'a> Scene<'a> {
    fn new(tree: &Path, work: &'a Path) -> Result<Self> {
        let home = Home::new("bench-sessions", tree)?;
        let archive = images::tools()?.join("tools.tar");
        succeed(&mut home.msb(&["image", "load", "-q", "-i", &archive.to_string_lossy()]))?;
        succeed(&mut home.msb(&["create", "--name", "box", "-m", "1G", "-p", "0:22", "tools"]))?;
        let key = work.join("key");
        program::output(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key))?;
        let public = std::fs::read_to_string(key.with_extension("pub"))?;
        succeed(&mut home.msb(&["ssh", "authorize", "--key", public.trim()]))?;
        let serve = format!(
            "mkdir -p -m 700 /run/sshd /root/.ssh && echo '{}' > /root/.ssh/authorized_keys && ssh-keygen -A && /usr/sbin/sshd && iperf3 -s -D",
            public.trim()
        );
        succeed(&mut home.msb(&["exec", "box", "--", "sh", "-c", &serve]))?;
        let inspected: serde_json::Value =
            serde_json::from_str(&program::output(&mut home.msb(&["inspect", "--format", "json", "box"]))?)?;
        let port = published(&inspected).with_context(|| format!("no published port: {inspected}"))?;
        let ours = program::output(&mut home.msb(&["ssh", "config", "box"]))?;
        let config = work.join("config");
        let peer = format!(
            "Host peer\n  HostName 127.0.0.1\n  Port {port}\n  User root\n  StrictHostKeyChecking no\n  UserKnownHostsFile {}\n",
            work.join("known_hosts").display()
        );
        let both = format!(
            "Host *\n  IdentityFile {}\n  IdentitiesOnly yes\n  BatchMode yes\n  LogLevel ERROR\n",
            key.display()
        );
        std::fs::write(&config, format!("{ours}\n{peer}\n{both}"))?;
        let scene = Self { home, work, config };
        for host in HOSTS {
            succeed(&mut scene.client("ssh", &[host, "true"]))?;
        }
        Ok(scene)
    }

    /// One of OpenSSH's clients.
    fn client(&self, program: &str, words: &[&str]) -> Command {
        let mut command = self.home.command(program);
        command.arg("-F").arg(&self.config).args(words);
        command
    }

    /// The same for both servers in turn; ours first.
    fn pair(&self, rounds: usize, mut measure: impl FnMut(&str) -> Result<Duration>) -> Result<[Duration; 2]> {
        let mut took = [Vec::new(), Vec::new()];
        for _ in 0..rounds {
            for (host, took) in HOSTS.iter().zip(&mut took) {
                took.push(measure(host)?);
            }
        }
        Ok(took.map(median))
    }

    fn logins(&self, rounds: usize) -> Result<Row> {
        let took = self.pair(rounds, |host| {
            let mut took = Duration::ZERO;
            for _ in 0..LOGINS {
                took += timed(&mut self.client("ssh", &[host, "true"]), Some(0))?;
            }
            Ok(took / LOGINS)
        })?;
        Ok(faster("ssh box true; the guest's own sshd".to_owned(), took, 2.0, "2 times faster"))
    }

    /// A fixed number of bytes through `-L`, by iperf3 on both ends.
    fn forwarding(&self, streams: usize, reverse: bool, rounds: usize) -> Result<Row> {
        let took = self.pair(rounds, |host| {
            let tunnel = Tunnel::open(self, host)?;
            let port = tunnel.port.to_string();
            let bytes = format!("{FORWARDED_MIB}M");
            let streams = streams.to_string();
            let mut iperf = Command::new("iperf3");
            iperf.args(["-c", "127.0.0.1", "-p", &port, "-n", &bytes, "-P", &streams]);
            if reverse {
                iperf.arg("-R");
            }
            timed(&mut iperf, Some(0))
        })?;
        let (way, many) = (if reverse { "out" } else { "in" }, if streams == 1 { "stream" } else { "streams" });
        let what = format!("ssh -L: {FORWARDED_MIB} MiB {way}, {streams} {many}; the guest's own sshd");
        Ok(faster(what, took, 1.0, "1.0 times or better"))
    }

    fn sftp(&self, rounds: usize) -> Result<Vec<Row>> {
        let (file, back) = (self.work.join("file"), self.work.join("back"));
        random_file(&file, SFTP_MIB)?;
        let batch = self.work.join("batch");
        let row = |way: &str, line: String| -> Result<Row> {
            std::fs::write(&batch, line)?;
            let took = self.pair(rounds, |host| {
                timed(&mut self.client("sftp", &["-q", "-b", &batch.to_string_lossy(), host]), Some(0))
            })?;
            let what = format!("sftp {way} of {SFTP_MIB} MiB; the guest's own sshd");
            Ok(faster(what, took, 1.0, "1.0 times or better"))
        };
        let rows = vec![
            row("put", format!("put {} /root/file\n", file.display()))?,
            row("get", format!("get /root/file {}\n", back.display()))?,
        ];
        if program::output(Command::new("cmp").arg(&file).arg(&back)).is_err() {
            bail!("sftp brought back something else");
        }
        succeed(&mut self.home.msb(&["exec", "box", "--", "rm", "/root/file"]))?;
        Ok(rows)
    }

    /// `msb cp` beside a tar stream through `msb exec`, into the same disk.
    fn copies(&self, rounds: usize) -> Result<Vec<Row>> {
        let (small, large) = (self.work.join("small"), self.work.join("large"));
        for number in 0..FILES {
            let folder = small.join(format!("folder{}", number % 200));
            if number < 200 {
                std::fs::create_dir_all(&folder)?;
            }
            std::fs::write(folder.join(format!("file{number}")), vec![b'x'; 100 + number % 4_000])?;
        }
        std::fs::create_dir_all(&large)?;
        random_file(&large.join("file"), LARGE_MIB)?;
        let mut rows = Vec::new();
        // Two minutes under emulation: once has to do.
        let large = (&large, format!("{LARGE_MIB} MiB"), 1);
        for (folder, what, rounds) in [(&small, format!("{FILES} small files"), rounds), large] {
            let from = folder.display();
            let ours = format!("exec msb cp -q '{from}' box:/srv/copy");
            let peer = format!(
                "tar -C '{from}' -cf - . | msb exec -i box -- sh -c 'mkdir /srv/copy && tar -C /srv/copy -xf -'"
            );
            let mut took = [Vec::new(), Vec::new()];
            for _ in 0..rounds {
                for (line, took) in [&ours, &peer].into_iter().zip(&mut took) {
                    took.push(timed(self.home.command("sh").args(["-c", line]), Some(0))?);
                    succeed(&mut self.home.msb(&[
                        "exec",
                        "box",
                        "--",
                        "sh",
                        "-c",
                        "rm -r /srv/copy && sync && fstrim / || true",
                    ]))?;
                }
            }
            rows.push(faster(
                format!("msb cp of {what}; tar through msb exec"),
                took.map(median),
                1.5,
                "1.5 times faster",
            ));
        }
        Ok(rows)
    }
}

/// Our server and the guest's, as the configuration calls them.
const HOSTS: [&str; 2] = ["msb-box", "peer"];

/// A client that only forwards, until it is dropped.
struct Tunnel {
    _client: Running,
    port: u16,
}

impl Tunnel {
    fn open(scene: &Scene<'_>, host: &str) -> Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let forward = format!("127.0.0.1:{port}:127.0.0.1:5201");
        let mut client = scene.client("ssh", &["-N", "-o", "ExitOnForwardFailure=yes", "-L", &forward, host]);
        let child = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("ssh")?;
        let tunnel = Self { _client: Running(child), port };
        let began = Instant::now();
        // Looked up and not tried: iperf3 serves one client at a time, and a try would be one.
        let listening = format!("0100007F:{port:04X} 00000000:0000 0A");
        while !std::fs::read_to_string("/proc/net/tcp")?.contains(&listening) {
            if began.elapsed() > Duration::from_secs(60) {
                bail!("ssh does not forward");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(tunnel)
    }
}

/// The host's port of the only published one, shown as ADDRESS:PORT:GUEST.
fn published(inspected: &serde_json::Value) -> Option<&str> {
    inspected["ports"].get(0)?.as_str()?.split(':').nth(1)
}

fn random_file(path: &Path, mib: usize) -> Result<()> {
    let mut random = std::io::Read::take(std::fs::File::open("/dev/urandom")?, (mib as u64) << 20);
    std::io::copy(&mut random, &mut std::fs::File::create(path)?)?;
    Ok(())
}

fn faster(what: String, [ours, peer]: [Duration; 2], times: f64, promise: &'static str) -> Row {
    let (ours, peer) = (ours.as_secs_f64(), peer.as_secs_f64());
    let ratio = peer / ours;
    Row { what, measured: format!("{ours:.2} s; {peer:.2} s; {ratio:.2} times"), promise, holds: ratio >= times }
}
